"""Losses and learning rates on fixed inputs, against loops over the formulas written out."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from vatt.config import OptimizerParams
from vatt.losses import Form, mil_nce, nce, paper_form, release_form, symmetric_form
from vatt.training.optimizer import learning_rate
from vatt.verify.row import Check, compare

TEMPERATURES = (0.07, 1.0)
_CLIPS, _WIDTH = 6, 10
_TOLERANCE = 1e-12  # 64-bit arithmetic on both sides

Valid = Sequence[Sequence[bool]]
Scores = list[list[list[float]]]  # of clip i's video with candidate l of clip j

_ALL, _NONE = (True, True, True), (False, False, False)
MASKS: dict[str, Valid] = {
    "every text": (_ALL,) * _CLIPS,
    "texts missing": (
        _ALL,
        (True, False, True),
        _NONE,
        (False, False, True),
        (True, True, False),
        _ALL,
    ),
    "clips without text": (_ALL, _NONE, _ALL, _ALL, _NONE, _ALL),
    "no text": (_NONE,) * _CLIPS,
}


def loss_rows() -> list[Check]:
    """NCE and MIL-NCE of the paper and of the release, with and without missing texts."""
    paper, release = "paper, section 3", "release (docs/model.md)"
    masks = tuple(MASKS)
    cases: tuple[tuple[str, str, Form, Callable[..., float], tuple[str, ...]], ...] = (
        ("", paper, paper_form, _paper, masks),
        ("release, ", release, release_form, _release, (masks[0], *masks[2:])),
        ("release, symmetric, ", release, symmetric_form, _symmetric, (masks[0], *masks[2:])),
    )
    video, audio, texts = _vectors(1)[:, 0], _vectors(2)[:, :1], _vectors(3)
    rows = []
    for temperature in TEMPERATURES:
        for name, source, form, naive, mask_names in cases:
            ours = nce(video, audio[:, 0], temperature, form=form)
            expected = _mean(naive, video, audio, temperature, [(True,)] * _CLIPS)
            rows.append(_row(f"{name}NCE, temperature {temperature}", source, ours, expected))
            for mask in mask_names:
                valid = torch.tensor(MASKS[mask])
                ours = mil_nce(video, texts, temperature, valid=valid, form=form)
                expected = _mean(naive, video, texts, temperature, MASKS[mask])
                title = f"{name}MIL-NCE, {mask}, temperature {temperature}"
                rows.append(_row(title, source, ours, expected))
    ours = mil_nce(video, texts, TEMPERATURES[0], max_scores=40)  # two anchors at a time
    expected = _mean(_paper, video, texts, TEMPERATURES[0], MASKS["every text"])
    rows.append(_row(f"MIL-NCE in blocks, temperature {TEMPERATURES[0]}", paper, ours, expected))
    return rows


def _mean(
    naive: Callable[[Scores, int, Valid], float],
    video: Tensor,
    texts: Tensor,
    temperature: float,
    valid: Valid,
) -> float:
    """The mean over the clips with a candidate; 0 without any."""
    clips = range(len(valid))
    scores = [
        [[float(video[i] @ text) / temperature for text in texts[j]] for j in clips] for i in clips
    ]
    losses = [naive(scores, i, valid) for i in clips if any(valid[i])]
    return sum(losses) / len(losses) if losses else 0.0


def _paper(scores: Scores, i: int, valid: Valid) -> float:
    """log[sum_l e^s_iil + sum_{j!=i, l} (e^s_ijl + e^s_jil)] - log sum_l e^s_iil."""
    positive = sum(
        math.exp(score) for score, there in zip(scores[i][i], valid[i], strict=True) if there
    )
    negative = 0.0
    for j in range(len(valid)):
        if j == i or not any(valid[j]):
            continue
        for candidate in range(len(valid[j])):
            negative += math.exp(scores[i][j][candidate]) * valid[j][candidate]
            negative += math.exp(scores[j][i][candidate]) * valid[i][candidate]
    return math.log(positive + negative) - math.log(positive)


def _release(scores: Scores, i: int, valid: Valid) -> float:
    """log[sum_jl e^s_ijl + sum_jl e^s_jil] - log sum_l e^s_iil."""
    row, column, positive = _release_sums(scores, i, valid)
    return math.log(row + column) - math.log(positive)


def _symmetric(scores: Scores, i: int, valid: Valid) -> float:
    """One loss for each direction."""
    row, column, positive = _release_sums(scores, i, valid)
    return math.log(row) + math.log(column) - 2 * math.log(positive)


def _release_sums(scores: Scores, i: int, valid: Valid) -> tuple[float, float, float]:
    clips = range(len(valid))
    row = sum(math.exp(score) for j in clips if any(valid[j]) for score in scores[i][j])
    column = sum(math.exp(score) for j in clips for score in scores[j][i])
    return row, column, sum(math.exp(score) for score in scores[i][i])


def _vectors(key: int) -> Tensor:
    """Fixed unit vectors (clips, 3, width), 64 bit, of no special direction."""
    numbers = torch.arange(_CLIPS * 3 * _WIDTH, dtype=torch.float64)
    vectors = torch.cos(key + 1.7 * numbers + 0.01 * key * numbers**2)
    return torch.nn.functional.normalize(vectors.reshape(_CLIPS, 3, _WIDTH), dim=-1)


def _row(name: str, source: str, ours: Tensor, naive: float) -> Check:
    return compare(
        f"loss, {name}, {_CLIPS} clips",
        source=source,
        unit="nats",
        ours=float(ours),
        expected=naive,
        tolerance=_TOLERANCE,
    )


_TOLERANCE = 1e-12  # 64-bit arithmetic, rates up to 0.2

# name: (peak, final, warm-up, steps, share of a cosine period, source)
SCHEDULES: dict[str, tuple[float, float, int, int, Literal["quarter", "half"], str]] = {
    "pre-training": (1e-4, 5e-5, 10_000, 500_000, "quarter", "paper, section 4.1"),
    "video fine-tuning": (0.005, 0.0, 2_500, 100_000, "half", "paper, appendix A.2"),
    "AudioSet fine-tuning": (0.2, 0.0, 5_000, 50_000, "half", "paper, appendix A.2"),
    "release pre-training": (1e-4, 5e-5, 5_000, 500_000, "half", "release (docs/model.md)"),
}


def schedule_rows() -> list[Check]:
    """At the start, half-way up, at the peak, on the way down and at the end."""
    rows = []
    for name, (peak, final, warmup, steps, share, source) in SCHEDULES.items():
        params = OptimizerParams(
            name="adam",
            learning_rate=peak,
            final_learning_rate=final,
            warmup_steps=warmup,
            schedule="quarter_cosine" if share == "quarter" else "half_cosine",
            weight_decay=0.0,
            clip_norm=None,
        )
        stated = {warmup: peak, steps: final} if source.startswith("paper") else {}
        middle = (warmup + steps) // 2
        for step in (0, warmup // 2, warmup, middle, steps - 1, steps):
            rows.append(
                compare(
                    f"learning rate, {name}, step {step}",
                    source=source,
                    unit="1",
                    ours=learning_rate(step, steps=steps, params=params),
                    expected=_rate(step, peak, final, warmup, steps, share),
                    tolerance=_TOLERANCE,
                    paper=stated.get(step),
                )
            )
    return rows


def _rate(
    step: int, peak: float, final: float, warmup: int, steps: int, share: Literal["quarter", "half"]
) -> float:
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / (steps - warmup)
    if share == "quarter":
        return final + (peak - final) * math.cos(math.pi / 2 * progress)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2
