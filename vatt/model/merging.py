"""Fewer tokens in every block: similar ones are merged (ToMe: Bolya et al., ICLR 2023).

A block merges between its attention and its MLP. Tokens are compared by their attention keys, and
a merged token is the mean of the original tokens in it. How many it stands for is its size: it
weighs the mean, and in the attention of later blocks a token counts as often as its size says.
There is nothing to learn, so a trained model can merge as well. The AGG token is never merged.

B clips, N tokens with AGG, D width; the tokens after AGG are alternately first and second ones:
F and S of them. R first ones are merged into second ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vatt.model.operators import exact_product, full_precision

# Similarities are compared in steps of 1 / 65,536. Rounding in another batch size or on another
# device is far smaller, so it rarely changes a choice; equal ones are chosen in their order.
STEPS = 2**16


def num_merged(num_tokens: int, rate: float) -> int:
    """How many of `num_tokens` (with AGG) one block merges away, at a rate of at most one half."""
    return int(round(rate * (num_tokens - 1), 6))


def token_counts(num_tokens: int, rate: float, depth: int) -> list[int]:
    """The tokens (with AGG) that enter each of `depth` blocks; the last block merges none."""
    counts = [num_tokens]
    for _ in range(depth - 1):
        counts.append(counts[-1] - num_merged(counts[-1], rate))
    return counts


def size_bias(sizes: Tensor) -> Tensor:  # (B, N) -> (B, 1, 1, N)
    """Added to the scores of attention: a token counts as often as its size says."""
    return sizes.log()[:, None, None]


def merge(
    tokens: Tensor, keys: Tensor, sizes: Tensor | None, count: int
) -> tuple[
    Tensor, Tensor
]:  # (B, N, D), (B, heads, N, head_dim), (B, N) -> (B, N - R, D), (B, N - R)
    """Merge `count` tokens away; returns the tokens and their sizes.

    AGG stays first. It is followed by the first tokens that are not merged, then by all second
    ones, both in their order.
    """
    if sizes is None:
        sizes = full_precision(tokens.new_ones(tokens.shape[:2]))
    merged, staying, partners = match(keys, count)
    first, first_sizes = tokens[:, 1::2], sizes[:, 1::2]
    second, second_sizes = tokens[:, 2::2], sizes[:, 2::2]
    weights = first_sizes.gather(1, merged)
    totals = second_sizes.scatter_add(1, partners, weights)  # whole numbers: exact in any order
    # A product, because floats added by index are added in any order on a GPU.
    places = torch.arange(second.shape[1], device=tokens.device)[:, None]
    shares = (partners[:, None] == places) * weights[:, None] / totals[..., None]  # (B, S, R)
    joining = shares.to(tokens.dtype) @ _rows(first, merged)
    second = second * (second_sizes / totals)[..., None].to(tokens.dtype) + joining
    return (
        torch.cat([tokens[:, :1], _rows(first, staying), second.to(tokens.dtype)], dim=1),
        torch.cat([sizes[:, :1], first_sizes.gather(1, staying), totals], dim=1),
    )


@torch.no_grad()
def match(keys: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which first tokens are merged (B, R) and which stay (B, F - R), in order; and into which.

    The third, (B, R), has for each merged one the second token that is most similar to it: by the
    cosine of their keys, averaged over heads. The R most similar pairs are merged.
    """
    directions = F.normalize(full_precision(keys).mean(1), dim=-1)
    cosines = exact_product(directions[:, 1::2], directions[:, 2::2].transpose(1, 2))  # (B, F, S)
    best, partners = (cosines * STEPS).round().max(dim=2)  # the first of equal ones
    length = best.shape[1]
    # Different numbers, so that they have one order on every device.
    ranked = best.long() * length - torch.arange(length, device=best.device)
    order = ranked.argsort(dim=1, descending=True)
    merged, staying = order[:, :count].sort().values, order[:, count:].sort().values
    return merged, staying, partners.gather(1, merged)


def _rows(tokens: Tensor, places: Tensor) -> Tensor:  # (B, F, D), (B, R) -> (B, R, D)
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
