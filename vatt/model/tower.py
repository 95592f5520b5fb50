"""A tower: raw input -> tokens with an AGG token in front -> encoder -> AGG's output.

B clips, N tokens, K tokens kept, L words, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vatt.model.operators import full_precision
from vatt.model.transformer import MASKED, Encoder, RelativeBias


class Tower(nn.Module):
    """Video or audio; the encoder may be shared with other towers."""

    def __init__(self, embed: nn.Module, encoder: Encoder, *, dim: int, post: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        self.agg_token = nn.Parameter(torch.empty(dim))
        self.encoder = encoder
        self.post = post

    def forward(self, inputs: Tensor, kept: Tensor | None = None) -> Tensor:
        """Raw input -> features (B, D), fp32; `kept` (B, K) names the tokens that go on."""
        tokens = prepend(self.agg_token, self.embed(inputs, kept))
        return full_precision(self.post(self.encoder(tokens, wanted=1)[:, 0]))


class TextTower(nn.Module):
    """Words; pads are masked, and positions are relative, in the first `relative_layers`."""

    def __init__(
        self,
        embed: nn.Module,
        encoder: Encoder,
        *,
        dim: int,
        lift: nn.Module,
        relative: RelativeBias | None,
        relative_layers: int,
        post: nn.Module,
    ) -> None:
        super().__init__()
        self.embed = embed
        self.agg_token = nn.Parameter(torch.empty(dim))
        self.lift = lift
        self.relative = relative
        self.relative_layers = relative_layers
        self.encoder = encoder
        self.post = post

    def forward(self, text: Tensor) -> Tensor:  # (B, L) word ids, 0 pads -> (B, D), fp32
        tokens = self.lift(prepend(self.agg_token, self.embed(text)))
        return full_precision(self.post(self.encoder(tokens, self._biases(text), wanted=1)[:, 0]))

    def _biases(self, text: Tensor) -> Sequence[Tensor]:
        is_pad = nn.functional.pad(text == 0, (1, 0))  # AGG is none
        mask = torch.where(is_pad, MASKED, 0.0)[:, None, None]
        depth = len(self.encoder.blocks)
        if self.relative is None:
            return [mask] * depth
        first = mask + self.relative(text.shape[1] + 1)
        return [first] * self.relative_layers + [mask] * (depth - self.relative_layers)


def prepend(agg_token: Tensor, tokens: Tensor) -> Tensor:  # (D,), (B, N, D) -> (B, 1 + N, D)
    """Put the AGG token in front of each clip's tokens; it has no position."""
    return torch.cat([agg_token.to(tokens.dtype).expand(len(tokens), 1, -1), tokens], dim=1)
