"""step -> learning rate: a linear warm-up, then a part of a cosine."""

import math

from vatt.config import OptimizerParams

PERIOD_SHARE = {"quarter_cosine": 0.25, "half_cosine": 0.5}  # of a full cosine period


def learning_rate(step: int, *, steps: int, params: OptimizerParams) -> float:
    """The rate of update `step`, counted from 0; the final rate is reached at `steps`."""
    if step < params.warmup_steps:
        return params.learning_rate * step / params.warmup_steps
    done = min(1.0, (step - params.warmup_steps) / max(1, steps - params.warmup_steps))
    angle = 2 * math.pi * PERIOD_SHARE[params.schedule]
    # 1 at the start, 0 at the end, whatever the share of the period.
    height = (math.cos(angle * done) - math.cos(angle)) / (1 - math.cos(angle))
    return params.final_learning_rate + height * (params.learning_rate - params.final_learning_rate)
