"""What happens inside the encoders: their input tokens, and how active each node of the MLPs is.

For figures 3 and 4 of the paper. B clips of a batch, n in all, L words, N tokens, D encoder width,
M hidden nodes of an MLP.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vatt.data.batches import Batch, model_inputs
from vatt.evaluation.features import Array
from vatt.model.assembly import MODALITIES
from vatt.model.vatt import VATT

CLIPS = 64  # that are looked at


class Watched:
    """What one tower was seen doing, batch after batch."""

    def __init__(self, tower: Any) -> None:
        self.tower = tower
        self.clip_ids: list[str] = []
        self.inputs: list[Array] = []
        self.sums = torch.zeros(())  # (depth, M)
        self.tokens = 0

    def watch(self, clip_ids: list[str], inputs: Tensor, counts: Tensor | None) -> None:
        """Run the tower; `counts` (B, 1 + N) is 0 for pads."""
        entered: list[tuple[Tensor, ...]] = []
        active: list[Tensor] = []

        def add(_module: Any, _inputs: Any, nodes: Tensor) -> None:
            whole = nodes.new_ones(nodes.shape[:2]) if counts is None else counts
            active.append(torch.einsum("bnm,bn->m", nodes.double(), whole.double()))

        encoder = self.tower.encoder
        hooks = [encoder.register_forward_pre_hook(lambda _, given: entered.append(given))]
        try:
            self.tower(inputs)
            hooks += [block.mlp.activation.register_forward_hook(add) for block in encoder.blocks]
            encoder(*entered[0])  # for every token; a tower asks for AGG's answer alone
        finally:
            for hook in hooks:
                hook.remove()
        tokens = entered[0][0]
        whole = tokens.new_ones(tokens.shape[:2]) if counts is None else counts.to(tokens.dtype)
        own = whole[:, 1:, None]  # AGG is no input
        self.inputs.append(((tokens[:, 1:] * own).sum(1) / own.sum(1)).float().cpu().numpy())
        self.sums = self.sums + torch.stack(active).cpu()
        self.tokens += int(whole.sum())
        self.clip_ids += clip_ids


@torch.inference_mode()
def inner_views(model: VATT, batches: Iterable[Batch]) -> dict[str, Array]:
    """Mean input tokens and mean activations of the clips in `batches`, by modality.

    `input/<modality>` (n, D) is the mean of a clip's tokens as the encoder receives them, with
    `input/<modality>/clip_ids` (n,); `nodes/<modality>` (depth, M) the mean activation, after the
    GELU, of every MLP node over all tokens. Pads count nowhere; of several texts, the first does.
    """
    model.eval()
    device = next(model.parameters()).device
    watched = {name: Watched(getattr(model, name)) for name in MODALITIES}
    for batch in batches:
        here = batch.to(device)
        video, audio, texts = model_inputs(here)
        text = texts[:, 0] if texts.shape[1] else texts[:, :, 0]
        words = text != 0
        for name, given, present, counts in (
            ("video", video, here.has_video, None),
            ("audio", audio, here.has_audio, None),
            ("text", text, words.any(1), torch.nn.functional.pad(words, (1, 0), value=True)),
        ):
            if given.numel() and present.any():
                ids = [clip for clip, there in zip(batch.clip_ids, present, strict=True) if there]
                watched[name].watch(
                    ids, given[present], None if counts is None else counts[present]
                )
    found: dict[str, Array] = {}
    for name, seen in watched.items():
        if seen.tokens:
            found[f"input/{name}"] = np.concatenate(seen.inputs)
            found[f"input/{name}/clip_ids"] = np.asarray(seen.clip_ids)
            found[f"nodes/{name}"] = (seen.sums / seen.tokens).float().numpy()
    return found
