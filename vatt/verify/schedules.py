"""Learning rates at several steps, against the formula written out."""

import math
from typing import Literal

from vatt.config import OptimizerParams
from vatt.training.schedule import learning_rate
from vatt.verify.row import Row, compare

_TOLERANCE = 1e-12  # 64-bit arithmetic, rates up to 0.2

# name: (peak, final, warm-up, steps, share of a cosine period, source)
SCHEDULES: dict[str, tuple[float, float, int, int, Literal["quarter", "half"], str]] = {
    "pre-training": (1e-4, 5e-5, 10_000, 500_000, "quarter", "paper (SPEC section 2)"),
    "video fine-tuning": (0.005, 0.0, 2_500, 100_000, "half", "paper (SPEC section 2)"),
    "AudioSet fine-tuning": (0.2, 0.0, 5_000, 50_000, "half", "paper (SPEC section 2)"),
    "release pre-training": (1e-4, 5e-5, 5_000, 500_000, "half", "release (SPEC section 3)"),
}


def schedule_rows() -> list[Row]:
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
