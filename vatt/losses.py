"""NCE and MIL-NCE over a global batch: pure functions of embeddings, computed in fp32.

B clips, K candidate texts of a clip, E common-space width; s_ijl = v_i . t_jl / temperature.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_NEVER = -1e30  # the score of a pair that takes no part; finite, so that no gradient is NaN


class EmbeddingsLike(Protocol):
    """What the losses read: unit vectors in the common spaces."""

    @property
    def video_va(self) -> Tensor | None: ...  # (B, E)
    @property
    def audio_va(self) -> Tensor | None: ...  # (B, E)
    @property
    def video_vt(self) -> Tensor | None: ...  # (B, E)
    @property
    def text_vt(self) -> Tensor | None: ...  # (B, K, E)


@dataclass(frozen=True, slots=True)
class Losses:
    """`total` is what training minimises; the others are its parts."""

    total: Tensor
    nce: Tensor
    mil_nce: Tensor


def pretraining_loss(
    embeddings: EmbeddingsLike,
    *,
    has_video: Tensor,
    has_audio: Tensor,
    has_text: Tensor,
    temperature: float,
    mil_nce_weight: float,
) -> Losses:
    """NCE(video, audio) + weight x MIL-NCE(video, texts) over the given, global batch.

    has_video, has_audio (B,) and has_text (B, K) are bool: a clip leaves a loss for which it lacks
    a modality, as anchor, candidate and negative.
    """
    assert embeddings.video_va is not None and embeddings.audio_va is not None
    assert embeddings.video_vt is not None and embeddings.text_vt is not None
    va = nce(embeddings.video_va, embeddings.audio_va, temperature, valid=has_video & has_audio)
    vt = mil_nce(
        embeddings.video_vt, embeddings.text_vt, temperature, valid=has_video[:, None] & has_text
    )
    return Losses(total=va + mil_nce_weight * vt, nce=va, mil_nce=vt)


def nce(video: Tensor, audio: Tensor, temperature: float, *, valid: Tensor | None = None) -> Tensor:
    """NCE of (B, E) and (B, E): MIL-NCE with one candidate; `valid` (B,) names clips."""
    return mil_nce(
        video, audio[:, None], temperature, valid=None if valid is None else valid[:, None]
    )


def mil_nce(
    video: Tensor,
    texts: Tensor,
    temperature: float,
    *,
    valid: Tensor | None = None,
    block_size: int = 1024,
) -> Tensor:
    """The paper's MIL-NCE of (B, E) and (B, K, E), a mean over the valid clips, or 0.

    loss_i = log[sum_l e^s_iil + sum_{j!=i,l} (e^s_ijl + e^s_jil)] - log sum_l e^s_iil: the positive
    counts once, negatives come both ways. `valid` (B, K) names the candidates there are; a clip
    without one leaves wholly. Anchors are taken `block_size` at a time, and a block is computed
    again in the backward pass, so memory grows with block_size x B x K, not with B x B x K.
    """
    video, texts = video.float(), texts.float()
    if valid is None:
        valid = torch.ones(texts.shape[:2], dtype=torch.bool, device=texts.device)
    total = video.new_zeros(())
    for start in range(0, len(video), block_size):
        stop = min(start + block_size, len(video))
        if stop - start == len(video):
            total = total + _anchors_loss(video, texts, valid, start, stop, temperature)
        else:
            total = total + checkpoint(
                _anchors_loss, video, texts, valid, start, stop, temperature, use_reentrant=False
            )
    return total / valid.any(1).sum().clamp(min=1)


def _anchors_loss(
    video: Tensor, texts: Tensor, valid: Tensor, start: int, stop: int, temperature: float
) -> Tensor:
    """The sum of loss_i over the valid anchors i in [start, stop)."""
    has_any = valid.any(1)
    own = torch.arange(start, stop, device=video.device)
    place = torch.arange(stop - start, device=video.device)
    row = torch.einsum("ie,jle->ijl", video[start:stop], texts) / temperature
    row = row.masked_fill(~valid, _NEVER)
    column = torch.einsum("ile,je->ijl", texts[start:stop], video) / temperature
    counts = valid[start:stop, None] & has_any[:, None]
    # The positive is in the row already.
    is_own = own[:, None] == torch.arange(len(video), device=video.device)
    column = column.masked_fill(~counts | is_own[..., None], _NEVER)
    everything = torch.cat([row.flatten(1), column.flatten(1)], dim=1).logsumexp(1)
    losses = everything - row[place, own].logsumexp(1)
    return torch.where(has_any[start:stop], losses, 0.0).sum()
