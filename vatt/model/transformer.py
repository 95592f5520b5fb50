"""The pre-norm Transformer encoder of the paper's section 3, its sizes, and the towers around it.

B clips, N tokens, K tokens kept, L words, D width; a bias is added to attention scores and
broadcasts to (B, heads, N, N).
"""

import math
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from vatt.config import ExpertsParams, SizeName, SizeParams
from vatt.model.experts import Experts, has_experts, note_routing
from vatt.model.merging import merge, num_merged, size_bias
from vatt.model.operators import Linear, attention, full_precision
from vatt.model.patches import Patches

# Paper, section 4.1; heads are 64 wide. `tiny` is ours, for CPUs.
SIZES: dict[SizeName, SizeParams] = {
    "tiny": SizeParams(depth=4, dim=192, mlp_dim=768, heads=3, head_dim=64),
    "small": SizeParams(depth=6, dim=512, mlp_dim=2048, heads=8, head_dim=64),
    "base": SizeParams(depth=12, dim=768, mlp_dim=3072, heads=12, head_dim=64),
    "medium": SizeParams(depth=12, dim=1024, mlp_dim=4096, heads=16, head_dim=64),
    "large": SizeParams(depth=24, dim=1024, mlp_dim=4096, heads=16, head_dim=64),
}


def resolve(size: SizeName | SizeParams) -> SizeParams:
    """The dimensions that a name stands for; dimensions are returned unchanged."""
    return size if isinstance(size, SizeParams) else SIZES[size]


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
    ) -> tuple[Tensor, Tensor]:  # (B, N, D) -> (B, wanted or N, D), (B, heads, N, head_dim)
        """The mixed values, and the keys, by which tokens are merged."""
        parts = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in parts)
        is_learned = bias is not None and bias.shape[1] > 1  # for each head; a mask is for all
        query, bias = query[:, :, :wanted], None if bias is None else bias[:, :, :wanted]
        if bias is not None and is_learned and self.training and not torch.compiler.is_compiling():
            # torch chooses the kernel by whether a bias needs a gradient. A pass without a graph
            # must give the same numbers as one with a graph: micro-batches are encoded in both.
            bias = bias.to(query.dtype).requires_grad_()
        dropout = self.dropout if self.training else 0.0
        mixed = attention(query, key, value, bias=bias, scale=self.scale, dropout=dropout)
        return self.out(rearrange(mixed, "b heads n d -> b n (heads d)")), key


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
    """x + attention(norm x), then x + mlp(norm x); tokens may be merged in between."""

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
        self,
        tokens: Tensor,
        bias: Tensor | None = None,
        sizes: Tensor | None = None,
        *,
        wanted: int | None = None,
        merged: int = 0,
    ) -> tuple[Tensor, Tensor | None]:  # (B, N, D) -> (B, wanted or N - merged, D), (B, N - merged)
        """The tokens, and how many original ones each stands for; None: each for itself.

        `sizes` (B, N), where given, take the place of a bias; `merged` tokens are merged away.
        """
        tokens, sizes = self.attend(tokens, bias, sizes, wanted=wanted, merged=merged)
        return tokens + self.dropout(self.mlp(self.mlp_norm(tokens))), sizes

    def attend(
        self,
        tokens: Tensor,
        bias: Tensor | None,
        sizes: Tensor | None,
        *,
        wanted: int | None = None,
        merged: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """The first half of the block, after which tokens are merged."""
        bias = bias if sizes is None else size_bias(sizes)
        mixed, keys = self.attention(self.attention_norm(tokens), bias, wanted=wanted)
        tokens = tokens[:, :wanted] + self.dropout(mixed)
        return merge(tokens, keys, sizes, merged) if merged else (tokens, sizes)


class ExpertBlock(Block):
    """A block with experts in place of the MLP; it also returns how tokens were routed."""

    def __init__(
        self, size: SizeParams, experts: ExpertsParams, *, norm: Norm, scale: float, dropout: float
    ) -> None:
        super().__init__(size, norm=norm, bias=True, scale=scale, dropout=dropout)
        self.mlp = Experts(size, experts, dropout=dropout)  # type: ignore[assignment]

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        bias: Tensor | None = None,
        sizes: Tensor | None = None,
        real: Tensor | None = None,
        *,
        merged: int = 0,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # the same and (B, Q)
        tokens, sizes = self.attend(tokens, bias, sizes, merged=merged)
        change, routing = self.mlp(self.mlp_norm(tokens), real)
        return tokens + self.dropout(change), sizes, routing


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
        experts: ExpertsParams | None = None,
    ) -> None:
        super().__init__()
        scale = 1 / math.sqrt(size.head_dim) if scaled else 1.0
        self.blocks = nn.ModuleList(
            ExpertBlock(size, experts, norm=norm, scale=scale, dropout=dropout)
            if experts is not None and has_experts(number, size.depth, experts)
            else Block(size, norm=norm, bias=bias, scale=scale, dropout=dropout)
            for number in range(1, size.depth + 1)
        )
        self.norm = norm(size.dim)

    def forward(
        self,
        tokens: Tensor,
        biases: Sequence[Tensor | None] = (),
        real: Tensor | None = None,
        *,
        wanted: int | None = None,
        merge_rate: float = 0.0,
    ) -> Tensor:
        """(B, N, D) -> (B, N, D), or only the first `wanted` tokens, which saves most of a block.

        `biases`, where given, holds one bias for each block, and `real` (B, N) is False for pads.
        Without biases, every block but the last may merge a share of its tokens away; the first
        token is never merged.
        """
        assert not (biases and merge_rate), "biases are for the tokens that there are at first"
        sizes: Tensor | None = None
        biases = biases or [None] * len(self.blocks)
        for number, (block, bias) in enumerate(zip(self.blocks, biases, strict=True), start=1):
            is_last = number == len(self.blocks)
            merged = 0 if is_last else num_merged(tokens.shape[1], merge_rate)
            if isinstance(block, ExpertBlock):
                tokens, sizes, routing = block(tokens, bias, sizes, real, merged=merged)
                note_routing(routing)
                continue
            # Only these outputs of the last block are used.
            tokens, sizes = block(
                tokens, bias, sizes, wanted=wanted if is_last else None, merged=merged
            )
        return self.norm(tokens)


class RelativeBias(nn.Module):
    """For each head, a learned bias for the distance between two tokens, in T5's buckets."""

    def __init__(self, heads: int, *, num_buckets: int = 32, max_distance: int = 64) -> None:
        super().__init__()
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.table = nn.Embedding(num_buckets, heads)

    def forward(self, num_tokens: int) -> Tensor:  # -> (1, heads, N, N)
        place = torch.arange(num_tokens, device=self.table.weight.device)
        buckets = relative_bucket(place[None] - place[:, None], self.num_buckets, self.max_distance)
        return rearrange(self.table(buckets), "n m heads -> 1 heads n m")


def relative_bucket(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of a distance (key - query); half of the buckets are for keys that come later.

    In each half, every small distance has its own bucket. Larger distances share buckets, whose
    width grows with the logarithm up to `max_distance`.
    """
    half = num_buckets // 2
    exact = half // 2
    size = distance.abs()
    growth = torch.log(size.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    shared = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(size < exact, size, shared) + half * (distance > 0)


class Tower(nn.Module):
    """An encoder and the AGG token in front of its tokens; AGG's output is the clip's feature.

    The encoder may be shared with other towers. `width` is that of the features.
    """

    def __init__(self, dim: int, *, width: int) -> None:
        super().__init__()
        self.agg_token = nn.Parameter(torch.empty(dim))
        self.width = width

    def prepend_agg(self, tokens: Tensor) -> Tensor:  # (B, N, D) -> (B, 1 + N, D)
        """Put the AGG token in front of each clip's tokens; it has no position."""
        agg = self.agg_token.to(tokens.dtype).expand(len(tokens), 1, -1)
        return torch.cat([agg, tokens], dim=1)


class SignalTower(Tower):
    """Video or audio; `set_merging` changes its `merge_rate`."""

    def __init__(
        self, embed: nn.Module, encoder: Encoder, *, dim: int, width: int | None = None
    ) -> None:
        super().__init__(dim, width=width or dim)
        self.embed = embed
        self.encoder = encoder
        self.merge_rate = 0.0

    def forward(self, inputs: Tensor | Patches, kept: Tensor | None = None) -> Tensor:
        """Raw input -> features (B, D), fp32; `kept` (B, K) names the tokens that go on."""
        tokens = self.prepend_agg(self.embed(inputs, kept))
        encoded = self.encoder(tokens, wanted=1, merge_rate=self.merge_rate)
        return full_precision(encoded[:, 0])


def set_merging(model: nn.Module, rate: float) -> None:
    """From now on, let each block merge this share of its tokens, in every tower but text's.

    The last block merges none. Weights stay as they are.
    """
    for part in model.modules():
        if isinstance(part, SignalTower):
            part.merge_rate = rate


class TextTower(Tower):
    """Words; pads are masked; the first layer has a relative bias in place of positions."""

    def __init__(
        self, embed: nn.Module, encoder: Encoder, *, dim: int, relative: RelativeBias
    ) -> None:
        super().__init__(dim, width=dim)
        self.embed = embed
        self.relative = relative
        self.encoder = encoder

    def forward(self, text: Tensor) -> Tensor:  # (B, L) word ids, 0 pads -> (B, D), fp32
        tokens, mask = self.prepend_agg(self.embed(text)), pad_mask(text)
        first = mask + self.relative(tokens.shape[1])
        biases = [first] + [mask] * (len(self.encoder.blocks) - 1)
        real = nn.functional.pad(text != 0, (1, 0), value=True)
        return full_precision(self.encoder(tokens, biases, real, wanted=1)[:, 0])


def pad_mask(text: Tensor) -> Tensor:  # (B, L) word ids -> (B, 1, 1, 1 + L)
    """The bias that hides pads; the AGG token in front is always seen."""
    is_pad = nn.functional.pad(text == 0, (1, 0))
    return torch.where(is_pad, MASKED, 0.0)[:, None, None]
