"""Labels and losses of classification: pure functions.

B clips, C classes; targets (B, C) are shares in [0, 1].
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vatt.data.manifest import LABEL_SEPARATOR
from vatt.model.operators import full_precision


def one_hot(labels: Sequence[str], classes: Sequence[str]) -> Tensor:  # -> (B, C)
    """1 for each class of a clip."""
    place = {name: number for number, name in enumerate(classes)}
    targets = torch.zeros(len(labels), len(classes))
    for row, label in enumerate(labels):
        for name in label.split(LABEL_SEPARATOR):
            targets[row, place[name]] = 1
    return targets


def softmax_loss(logits: Tensor, targets: Tensor, *, smoothing: float) -> Tensor:
    """Cross-entropy with smoothed labels, the mean over clips."""
    targets = targets * (1 - smoothing) + smoothing / targets.shape[1]
    return -(targets * F.log_softmax(full_precision(logits), dim=1)).sum(1).mean()


def balanced_sigmoid_loss(logits: Tensor, targets: Tensor, *, smoothing: float) -> Tensor:
    """Sigmoid cross-entropy summed over classes; a clip weighs as its labels are rare in the batch.

    w_i = sum_c(y_ic / n_c) / sum_c y_ic with n_c the count of class c in the batch.
    """
    logits, smoothed = full_precision(logits), targets * (1 - smoothing) + smoothing / 2
    each = F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none").sum(1)
    rarity = (targets / targets.sum(0).clamp(min=1e-12)).sum(1)
    weights = rarity / targets.sum(1).clamp(min=1e-12)
    return (weights * each).mean()


def draw_mix(alpha: float, *, seed: int, step: int, samples: Sequence[int]) -> Tensor:  # -> (B,)
    """Each clip's own share in its mixture, from Beta(alpha, alpha), by (seed, step, sample)."""

    def draw(sample: int) -> float:
        key = f"mixup/{seed}/{step}/{sample}".encode()
        number = int.from_bytes(hashlib.sha256(key).digest()[:8], "little")
        return float(np.random.default_rng(number).beta(alpha, alpha))

    return torch.tensor([draw(sample) for sample in samples])


def mix(values: Tensor, own: Tensor, partners: Tensor) -> Tensor:  # (B, ...), (B,), (B,)
    """Each row mixed with its partner's."""
    share = own.view(-1, *[1] * (values.dim() - 1)).to(values)
    return share * values + (1 - share) * values[partners]


def neighbours(count: int) -> Tensor:
    """Partners for `mix`: rows 0 and 1, 2 and 3, ...; they share a process however many there are.

    Rows come in random order, so that a neighbour is as random as any other partner.
    """
    assert count % 2 == 0, "neighbours need an even number of rows"
    return torch.arange(count) ^ 1
