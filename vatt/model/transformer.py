"""The pre-norm Transformer encoder, and T5's relative position bias.

B clips, N tokens, D width; a bias is added to attention scores and broadcasts to
(B, heads, N, N).
"""

import math
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from vatt.config import SizeParams
from vatt.model.operators import Linear, attention

Norm = Callable[[int], nn.Module]
MASKED = -1e9  # added to the score of a pad


def layer_norm(dim: int) -> nn.Module:
    """The layer norm of every tower."""
    return nn.LayerNorm(dim, eps=1e-6)


class Attention(nn.Module):
    """Multi-head self-attention; heads x head_dim may differ from the width."""

    def __init__(self, size: SizeParams, *, bias: bool, scale: float, dropout: float) -> None:
        super().__init__()
        inner = size.heads * size.head_dim
        self.heads, self.scale, self.dropout = size.heads, scale, dropout
        self.qkv = Linear(size.dim, 3 * inner, bias=bias)
        self.out = Linear(inner, size.dim, bias=bias)

    def forward(
        self, tokens: Tensor, bias: Tensor | None = None, *, wanted: int | None = None
    ) -> Tensor:  # (B, N, D) -> (B, wanted or N, D)
        parts = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in parts)
        query, bias = query[:, :, :wanted], None if bias is None else bias[:, :, :wanted]
        dropout = self.dropout if self.training else 0.0
        mixed = attention(query, key, value, bias=bias, scale=self.scale, dropout=dropout)
        return self.out(rearrange(mixed, "b heads n d -> b n (heads d)"))


class MLP(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, size: SizeParams, *, bias: bool, dropout: float) -> None:
        super().__init__()
        self.hidden = Linear(size.dim, size.mlp_dim, bias=bias)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.out = Linear(size.mlp_dim, size.dim, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.dropout(self.activation(self.hidden(tokens))))


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(
        self, size: SizeParams, *, norm: Norm, bias: bool, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.attention_norm = norm(size.dim)
        self.attention = Attention(size, bias=bias, scale=scale, dropout=dropout)
        self.mlp_norm = layer_norm(size.dim)
        self.mlp = MLP(size, bias=bias, dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, tokens: Tensor, bias: Tensor | None = None, *, wanted: int | None = None
    ) -> Tensor:  # (B, N, D) -> (B, wanted or N, D)
        mixed = self.attention(self.attention_norm(tokens), bias, wanted=wanted)
        tokens = tokens[:, :wanted] + self.dropout(mixed)
        return tokens + self.dropout(self.mlp(self.mlp_norm(tokens)))


class Encoder(nn.Module):
    """A stack of blocks and a final norm."""

    def __init__(
        self,
        size: SizeParams,
        *,
        dropout: float,
        norm: Norm = layer_norm,
        bias: bool = True,
        scaled: bool = True,
    ) -> None:
        super().__init__()
        scale = 1 / math.sqrt(size.head_dim) if scaled else 1.0
        self.blocks = nn.ModuleList(
            Block(size, norm=norm, bias=bias, scale=scale, dropout=dropout)
            for _ in range(size.depth)
        )
        self.norm = norm(size.dim)

    def forward(
        self,
        tokens: Tensor,
        biases: Sequence[Tensor | None] = (),
        *,
        wanted: int | None = None,
    ) -> Tensor:
        """(B, N, D) -> (B, N, D), or the first `wanted` tokens alone, which costs a block less.

        `biases`, where given, holds one bias for each block.
        """
        biases = biases or [None] * len(self.blocks)
        for number, (block, bias) in enumerate(zip(self.blocks, biases, strict=True), start=1):
            # What the last block makes of the other tokens, nobody would read.
            tokens = block(tokens, bias, wanted=wanted if number == len(self.blocks) else None)
        return self.norm(tokens)


class RelativeBias(nn.Module):
    """T5's learned bias of a head for the distance between two tokens, in buckets."""

    def __init__(self, heads: int, *, num_buckets: int = 32, max_distance: int = 64) -> None:
        super().__init__()
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.table = nn.Embedding(num_buckets, heads)

    def forward(self, num_tokens: int) -> Tensor:  # -> (1, heads, N, N)
        place = torch.arange(num_tokens, device=self.table.weight.device)
        buckets = relative_bucket(place[None] - place[:, None], self.num_buckets, self.max_distance)
        return rearrange(self.table(buckets), "n m heads -> 1 heads n m")


def relative_bucket(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of a distance (key - query): half of them for keys that come later.

    In each half, small distances have a bucket of their own; larger ones share buckets whose width
    grows with the logarithm, up to `max_distance`.
    """
    half = num_buckets // 2
    exact = half // 2
    size = distance.abs()
    growth = torch.log(size.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    shared = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(size < exact, size, shared) + half * (distance > 0)
