"""Trainings that leave the rails: numbers that are not finite, and losses that jump."""

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from vatt.errors import VattError
from vatt.files import atomic_write
from vatt.training import distributed

WINDOW = 64  # losses that say what is usual
ENOUGH = 16  # fewer say nothing
TIMES = 8.0  # typical deviations above the median that make a spike
SIGMA = 1.4826  # standard deviation of a normal distribution / median absolute deviation
LEAST_SHARE = 0.02  # of the median: a flat curve's noise is no spike
NAMED = 8  # clips of each process in the message
FILE = "not-finite.json"


def check_finite(
    numbers: Mapping[str, float], *, step: int, clip_ids: Sequence[str], folder: Path
) -> None:
    """Stop at a number that is none, naming it, the step and the clips; the last state is kept.

    Every process must call it with the same numbers; all clips are listed in a file of `folder`.
    """
    bad = [f"{name} = {value}" for name, value in numbers.items() if not math.isfinite(value)]
    if not bad:
        return
    by_rank = _from_all(list(clip_ids))
    file = folder / FILE
    if distributed.rank() == 0:
        told = {name: str(value) for name, value in numbers.items()}
        with atomic_write(file) as path:
            path.write_text(json.dumps({"step": step, "numbers": told, "clips": by_rank}, indent=1))
    named = [name for names in by_rank for name in names[:NAMED]]
    rest = sum(map(len, by_rank)) - len(named)
    raise VattError(
        f"training left the finite numbers at step {step}: {', '.join(bad)}; "
        f"clips of this step: {', '.join(named)}" + (f" and {rest} more in {file}" if rest else ""),
        hint="the last saved state is good; look at these clips, or lower the learning rate",
    )


def _from_all(names: list[str]) -> list[list[str]]:
    if distributed.world_size() == 1:
        return [names]
    rows: list[list[str]] = [[] for _ in range(distributed.world_size())]
    dist.all_gather_object(rows, names)
    return rows


class SpikeWatch:
    """Knows the last losses, and a loss far above them: median + 8 typical deviations."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Whether this loss is one; it joins the window either way."""
        limit = self.limit()
        self._losses.append(loss)
        return loss > limit

    def limit(self) -> float:
        """Losses above it are spikes; infinite while too few are known."""
        if len(self._losses) < ENOUGH:
            return math.inf
        middle = statistics.median(self._losses)
        deviation = statistics.median(abs(loss - middle) for loss in self._losses)
        return middle + TIMES * max(SIGMA * deviation, LEAST_SHARE * abs(middle))
