"""NCE and MIL-NCE over a global batch: pure functions of embeddings, computed in fp32 or better.

B clips, K candidate texts of a clip, E common-space width, b anchors of a block;
s_ijl = v_i . t_jl / temperature, with one l for audio.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_NEVER = -1e30  # the score of a pair that takes no part; finite, so that no gradient is NaN
MAX_SCORES = 2**20  # scores in memory at once, in each direction: a few tens of MB

# Scores (b, B, K) of the anchors' videos with all texts and of their texts with all videos, the
# positions of the anchors in the batch (b,), which candidates exist (B, K) -> the loss of each
# anchor (b,).
Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class EmbeddingsLike(Protocol):
    """The inputs of the losses: unit vectors in the common spaces, by sense."""

    @property
    def va(self) -> Mapping[str, Tensor]: ...  # (B, E)
    @property
    def vt(self) -> Mapping[str, Tensor]: ...  # video (B, E), text (B, K, E)


@dataclass(frozen=True, slots=True)
class Losses:
    """`total` is what training minimises; the others are its parts."""

    total: Tensor
    nce: Tensor
    mil_nce: Tensor
    more: dict[str, Tensor]  # NCE of the senses beyond the paper's with video, by sense


def paper_form(row: Tensor, column: Tensor, own: Tensor, valid: Tensor) -> Tensor:
    """log[sum_l e^s_iil + sum_{j!=i,l} (e^s_ijl + e^s_jil)] - log sum_l e^s_iil.

    The positive counts once, the negatives in both directions. An absent candidate is in no sum; a
    clip without candidates is not a negative either.
    """
    row = row.masked_fill(~valid, _NEVER)
    is_own = own[:, None] == torch.arange(len(valid), device=own.device)
    others = valid[own][:, None] & (valid.any(1) & ~is_own)[..., None]
    column = column.masked_fill(~others, _NEVER)
    return torch.logaddexp(_log_sum(row), _log_sum(column)) - _positive(row, own)


def release_form(row: Tensor, column: Tensor, own: Tensor, valid: Tensor) -> Tensor:
    """log[sum_jl e^s_ijl + sum_jl e^s_jil] - log sum_l e^s_iil: positives count twice.

    The candidates of a clip without text are not in the first sum; its video is in the second.
    """
    row = row.masked_fill(~valid.any(1)[:, None], _NEVER)
    return torch.logaddexp(_log_sum(row), _log_sum(column)) - _positive(row, own)


def symmetric_form(row: Tensor, column: Tensor, own: Tensor, valid: Tensor) -> Tensor:
    """The variant of the release: the two directions are separate losses."""
    row = row.masked_fill(~valid.any(1)[:, None], _NEVER)
    return _log_sum(row) + _log_sum(column) - 2 * _positive(row, own)


FORMS: dict[str, Form] = {"paper": paper_form, "release": release_form}  # by recipe


def pretraining_loss(
    embeddings: EmbeddingsLike,
    present: Mapping[str, Tensor],
    *,
    temperature: float,
    mil_nce_weight: float,
    senses_weight: float = 1.0,
    form: Form = paper_form,
    text_weights: Tensor | None = None,
    compiled: Callable[..., Tensor] | None = None,
) -> Losses:
    """NCE(video, audio) + weight x MIL-NCE(video, texts) over the given, global batch.

    For each other sense of the space va, senses_weight x NCE(video, sense) is added. `present` is
    bool, by sense: (B,), and (B, K) for text. A clip without a sense takes no part in the losses
    that need it. The release halves the total; Adam makes this irrelevant. `text_weights` (B, K)
    are those of `mil_nce`, and `compiled` is a compiled form of `anchors_loss`.
    """
    has_video = present["video"]
    pairs = {
        name: nce(
            embeddings.va["video"],
            vectors,
            temperature,
            valid=has_video & present[name],
            form=form,
            compiled=compiled,
        )
        for name, vectors in embeddings.va.items()
        if name != "video"
    }
    vt = mil_nce(
        embeddings.vt["video"],
        embeddings.vt["text"],
        temperature,
        valid=has_video[:, None] & present["text"],
        form=form,
        weights=text_weights,
        compiled=compiled,
    )
    va = pairs.pop("audio")
    total = va + mil_nce_weight * vt
    for loss in pairs.values():
        total = total + senses_weight * loss
    return Losses(total=total, nce=va, mil_nce=vt, more=pairs)


def nce(
    video: Tensor,
    audio: Tensor,
    temperature: float,
    *,
    valid: Tensor | None = None,
    form: Form = paper_form,
    compiled: Callable[..., Tensor] | None = None,
) -> Tensor:
    """NCE of (B, E) and (B, E): MIL-NCE with one candidate; `valid` (B,) marks the clips to use."""
    valid = None if valid is None else valid[:, None]
    return mil_nce(video, audio[:, None], temperature, valid=valid, form=form, compiled=compiled)


def mil_nce(
    video: Tensor,
    texts: Tensor,
    temperature: float,
    *,
    valid: Tensor | None = None,
    form: Form = paper_form,
    max_scores: int = MAX_SCORES,
    weights: Tensor | None = None,
    compiled: Callable[..., Tensor] | None = None,
) -> Tensor:
    """MIL-NCE of (B, E) and (B, K, E): the mean of `form` over the clips with a candidate, or 0.

    `valid` (B, K) marks the candidates that exist. Anchors are computed in blocks of at most
    `max_scores` scores, and each block again in the backward pass, so that memory does not grow
    with B x B x K.

    With `weights` (B, K) in [0, 1], the positive sum of clip i is sum_l w_il e^s_iil / c_i with
    c_i = max_l w_il, and the mean over the clips is weighted with c_i: a clip counts as much as its
    best candidate. Negatives are not weighted.
    """
    video, texts = (
        part.to(torch.promote_types(part.dtype, torch.float32)) for part in (video, texts)
    )
    if valid is None:
        valid = torch.ones(texts.shape[:2], dtype=torch.bool, device=texts.device)
    best, log_weights = (None, None) if weights is None else _clip_weights(weights, valid)
    block = max(1, max_scores // max(1, valid.numel()))
    total, loss_of = video.new_zeros(()), compiled or anchors_loss
    for own in torch.arange(len(video), device=video.device).split(block):
        given = (video, texts, valid, own, temperature, form, best, log_weights)
        if len(own) == len(video):
            total = total + loss_of(*given)
        else:
            total = total + checkpoint(loss_of, *given, use_reentrant=False)
    if best is not None:
        return total / best.sum().clamp(min=torch.finfo(best.dtype).tiny)
    return total / valid.any(1).sum().clamp(min=1)


def anchors_loss(
    video: Tensor,
    texts: Tensor,
    valid: Tensor,
    own: Tensor,
    temperature: float,
    form: Form,
    best: Tensor | None,  # (B,)
    log_weights: Tensor | None,  # (B, K)
) -> Tensor:
    """The sum of the losses of the anchors `own`; an anchor without a candidate adds 0."""
    row = torch.einsum("ie,jle->ijl", video[own], texts) / temperature
    column = torch.einsum("ile,je->ijl", texts[own], video) / temperature
    if best is None or log_weights is None:
        return torch.where(valid.any(1)[own], form(row, column, own, valid), 0.0).sum()
    is_own = (own[:, None] == torch.arange(len(valid), device=own.device))[..., None]
    added = torch.where(is_own, log_weights[own][:, None], 0.0)
    losses = form(row + added, column + added, own, valid)
    return torch.where(best[own] > 0, best[own] * losses, 0.0).sum()


def _clip_weights(weights: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The weight of each clip (B,), and the logarithms of those within it (B, K)."""
    weights = weights.detach()
    best = weights.masked_fill(~valid, 0.0).amax(1)
    within = weights / torch.where(best > 0, best, 1.0)[:, None]
    return best, within.log().clamp(min=_NEVER)


@torch.no_grad()
def agreement(
    video: Tensor,
    texts: Tensor,
    temperature: float,
    *,
    valid: Tensor,
    max_scores: int = MAX_SCORES,
) -> Tensor:
    """How well each candidate fits its clip (B, K): mean_j sigmoid(s_iil - s_jil) over j != i.

    That is the probability that the candidate chooses its own clip and not another: 0.5 is chance.
    Only clips with a valid candidate are compared, and 1 is the answer where there is no other. A
    candidate that is not valid has 0. In the line of Temporal Alignment Networks (Han et al.,
    2022), which find sentences that cannot be seen by the model's own similarity.
    """
    there, places = valid.any(1), torch.arange(len(video), device=video.device)
    video, texts = (
        part.to(torch.promote_types(part.dtype, torch.float32)) for part in (video, texts)
    )
    found = []
    for own in places.split(max(1, max_scores // max(1, valid.numel()))):
        scores = torch.einsum("ile,je->ijl", texts[own], video) / temperature
        mine = scores[torch.arange(len(own), device=own.device), own]
        others = (there & (own[:, None] != places))[..., None]
        chosen = torch.sigmoid(mine[:, None] - scores).masked_fill(~others, 0.0).sum(1)
        number = others.sum(1)
        found.append(torch.where(number > 0, chosen / number.clamp(min=1), 1.0))
    return torch.cat(found).masked_fill(~valid, 0.0)


def weights_of(agreements: Tensor, *, kind: str, least: float) -> Tensor:
    """The weights of candidates by their agreement: 0 or 1, or rising from `least` to 1."""
    if kind == "drop":
        return (agreements >= least).to(agreements.dtype)
    return ((agreements - least) / (1 - least)).clamp(min=0.0)


def _log_sum(scores: Tensor) -> Tensor:  # (b, B, K) -> (b,)
    return scores.flatten(1).logsumexp(1)


def _positive(row: Tensor, own: Tensor) -> Tensor:  # (b, B, K) -> (b,)
    return row[torch.arange(len(own), device=own.device), own].logsumexp(1)
