"""What happens inside the encoders: their input tokens, and how active each node of the MLPs is.

For figures 3 and 4 of the paper. B clips of a batch, n in all, L words, N tokens, D encoder width,
M hidden nodes of an MLP.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vatt.data.batches import Batch, model_inputs
from vatt.evaluation.features import Array
from vatt.evaluation.share import ALONE, Share
from vatt.model.assembly import MODALITIES
from vatt.model.vatt import VATT

CLIPS = 64  # that are looked at


@dataclass(frozen=True, slots=True)
class Seen:
    """What one tower was seen doing with a batch."""

    clip_ids: list[str]
    inputs: Array  # (B, D) mean token of each clip as the encoder receives it
    sums: Array  # (depth, M) activations summed over tokens
    tokens: int


def watch(tower: Any, clip_ids: list[str], inputs: Tensor, counts: Tensor | None) -> Seen:
    """Run the tower; `counts` (B, 1 + N) is 0 for pads."""
    entered: list[tuple[Tensor, ...]] = []
    active: list[Tensor] = []

    def add(_module: Any, _inputs: Any, nodes: Tensor) -> None:
        whole = nodes.new_ones(nodes.shape[:2]) if counts is None else counts
        active.append(torch.einsum("bnm,bn->m", nodes.double(), whole.double()))

    encoder = tower.encoder
    hooks = [encoder.register_forward_pre_hook(lambda _, given: entered.append(given))]
    try:
        tower(inputs)
        hooks += [block.mlp.activation.register_forward_hook(add) for block in encoder.blocks]
        encoder(*entered[0])  # for every token; a tower asks for AGG's answer alone
    finally:
        for hook in hooks:
            hook.remove()
    tokens = entered[0][0]
    whole = tokens.new_ones(tokens.shape[:2]) if counts is None else counts.to(tokens.dtype)
    own = whole[:, 1:, None]  # AGG is no input
    means = (tokens[:, 1:] * own).sum(1) / own.sum(1)
    return Seen(
        clip_ids,
        means.float().cpu().numpy(),
        torch.stack(active).cpu().numpy(),
        int(whole.sum()),
    )


@torch.inference_mode()
def inner_views(model: VATT, batches: Iterable[Batch], *, share: Share = ALONE) -> dict[str, Array]:
    """Mean input tokens and mean activations of the clips in `batches`, by modality.

    `input/<modality>` (n, D) is the mean of a clip's tokens as the encoder receives them, with
    `input/<modality>/clip_ids` (n,); `nodes/<modality>` (depth, M) the mean activation, after the
    GELU, of every MLP node over all tokens. Pads count nowhere; of several texts, the first does.
    """
    model.eval()
    device = next(model.parameters()).device
    joined = share.joined([_watch_batch(model, batch.to(device)) for batch in batches])
    found: dict[str, Array] = {}
    for name in MODALITIES:
        seen = [part[name] for part in joined or () if name in part]
        if seen:
            found[f"input/{name}"] = np.concatenate([one.inputs for one in seen])
            ids = [clip for one in seen for clip in one.clip_ids]
            found[f"input/{name}/clip_ids"] = np.asarray(ids)
            sums = np.sum([one.sums for one in seen], axis=0)
            found[f"nodes/{name}"] = (sums / sum(one.tokens for one in seen)).astype(np.float32)
    return found


def _watch_batch(model: VATT, batch: Batch) -> dict[str, Seen]:
    video, audio, texts = model_inputs(batch)
    text = texts[:, 0] if texts.shape[1] else texts[:, :, 0]
    words = text != 0
    found = {}
    for name, given, present, counts in (
        ("video", video, batch.has_video, None),
        ("audio", audio, batch.has_audio, None),
        ("text", text, words.any(1), torch.nn.functional.pad(words, (1, 0), value=True)),
    ):
        if given.numel() and present.any():
            ids = [clip for clip, there in zip(batch.clip_ids, present, strict=True) if there]
            own = None if counts is None else counts[present]
            found[name] = watch(getattr(model, name), ids, given[present], own)
    return found
