"""Losses on fixed inputs, against loops over the formula written out."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vatt.losses import mil_nce, nce
from vatt.verify.row import Row, compare

TEMPERATURES = (0.07, 1.0)
_CLIPS, _WIDTH = 6, 10
_TOLERANCE = 2e-6  # ours are computed in 32 bit; a loss here lies between 0 and 30
_SOURCE = "paper (SPEC section 1)"

# Candidates there are of each clip: all; some missing, one clip without any; none at all.
MASKS = {
    "every text": ((True, True, True),) * _CLIPS,
    "texts missing": (
        (True, True, True),
        (True, False, True),
        (False, False, False),
        (False, False, True),
        (True, True, False),
        (True, True, True),
    ),
    "no text": ((False, False, False),) * _CLIPS,
}
Valid = Sequence[Sequence[bool]]


def loss_rows() -> list[Row]:
    """NCE and MIL-NCE of the paper, with and without missing texts, at two temperatures."""
    video, audio, texts = _vectors(1)[:, 0], _vectors(2)[:, :1], _vectors(3)
    rows = []
    for temperature in TEMPERATURES:
        everyone = [(True,)] * _CLIPS
        ours = nce(video.float(), audio[:, 0].float(), temperature)
        naive = _naive(video, audio, temperature, everyone)
        rows.append(_row(f"NCE, temperature {temperature}", ours, naive))
        for name, valid in MASKS.items():
            ours = mil_nce(video.float(), texts.float(), temperature, valid=torch.tensor(valid))
            naive = _naive(video, texts, temperature, valid)
            rows.append(_row(f"MIL-NCE, {name}, temperature {temperature}", ours, naive))
        ours = mil_nce(video.float(), texts.float(), temperature, block_size=4)
        naive = _naive(video, texts, temperature, MASKS["every text"])
        rows.append(_row(f"MIL-NCE in blocks, temperature {temperature}", ours, naive))
    return rows


def _naive(video: Tensor, texts: Tensor, temperature: float, valid: Valid) -> float:
    """The mean over clips with a text of log(positives + negatives both ways) - log positives."""
    clips = range(len(valid))
    score = [
        [[float(video[i] @ text) / temperature for text in texts[j]] for j in clips] for i in clips
    ]
    losses = []
    for i in clips:
        positive = sum(
            math.exp(s) for s, is_there in zip(score[i][i], valid[i], strict=True) if is_there
        )
        if not positive:
            continue
        negative = 0.0
        for j in clips:
            if j == i:
                continue
            for candidate, is_there in enumerate(valid[j]):
                negative += math.exp(score[i][j][candidate]) * is_there
            for candidate, is_there in enumerate(valid[i]):
                negative += math.exp(score[j][i][candidate]) * is_there * any(valid[j])
        losses.append(math.log(positive + negative) - math.log(positive))
    return sum(losses) / len(losses) if losses else 0.0


def _vectors(key: int) -> Tensor:
    """Fixed unit vectors (clips, 3, width), 64 bit, of no special direction."""
    numbers = torch.arange(_CLIPS * 3 * _WIDTH, dtype=torch.float64)
    vectors = torch.cos(key + 1.7 * numbers + 0.01 * key * numbers**2)
    return torch.nn.functional.normalize(vectors.reshape(_CLIPS, 3, _WIDTH), dim=-1)


def _row(name: str, ours: Tensor, naive: float) -> Row:
    return compare(
        f"loss, {name}, {_CLIPS} clips",
        source=_SOURCE,
        unit="nats",
        ours=float(ours),
        expected=naive,
        tolerance=_TOLERANCE,
    )
