"""The loop that pre-training and fine-tuning share: batches in, updates made, states kept.

It stops at losses that are not finite, and reports losses that jump.
"""

import hashlib
import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vatt.data.loading.batches import Batch
from vatt.errors import DataError, Stopped, VattError
from vatt.files import atomic_write
from vatt.training import distributed
from vatt.training.distributed import stop_requests
from vatt.training.engine import Engine, Weights
from vatt.training.state import States, open_states
from vatt.training.telemetry import Meter, Work

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


Report = Callable[[int, dict[str, float]], None]  # (updates made, metrics)
Progress = Callable[[int, int], None]
Evaluate = Callable[[int, Weights], dict[str, float]]  # (updates made, weights) -> measures
BatchesFrom = Callable[[int], Iterable[Batch]]  # first step -> this process's parts from there on
InputsOf = Callable[[Batch, int], tuple[Any, ...]]  # batch, step -> what the module takes


def ignore(*_: Any) -> None:
    """A reporter for those who want none."""


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """How long to train, and what happens now and then on the way."""

    steps: int
    seed: int
    save_every: int
    keep_states: int
    report_every: int
    learning_rate: Callable[[int], float]  # of update `step`, from 0
    work: Work  # of one step
    keep_states_every: int | None = None  # steps
    evaluate_every: int | None = None
    evaluate: Evaluate | None = (
        None  # asked when `evaluate_every` is set; this and what follows: in rank 0 only
    )
    begin: Callable[[int], None] = ignore  # (updates made before)
    report: Report = ignore
    spike: Callable[[int, float], None] = ignore  # (updates made, loss)
    progress: Progress = ignore
    before_save: Callable[[], None] = ignore  # a state must not be ahead of what was reported

    def evaluates(self, done: int) -> bool:
        """Whether an evaluation is due after so many updates."""
        return self.evaluate_every is not None and done % self.evaluate_every == 0

    def is_told(self, done: int) -> bool:
        """Whether there is a report after so many updates; an evaluation always makes one."""
        return self.evaluates(done) or done % self.report_every == 0 or done == self.steps


def train(
    engine: Engine,
    batches_from: BatchesFrom,
    inputs_of: InputsOf,
    plan: LoopSettings,
    *,
    state: Path,
    identity: dict[str, Any],
    export: Callable[[Weights], object] = ignore,
) -> Weights:
    """Train from the newest state in the folder to the end; returns the weights in rank 0.

    `identity` says, key by key, what shapes the weights; a state of another one is not resumed.
    `export` gets the weights before the state is marked as done: a kill in between loses nothing.
    """
    with open_states(
        state, identity, keep=plan.keep_states, keep_every=plan.keep_states_every
    ) as states:
        _make_updates(engine, batches_from, inputs_of, plan, states)
        weights = named_weights(engine)
        if distributed.rank() == 0:
            export(weights)
        states.finish()
    return weights


def _make_updates(
    engine: Engine,
    batches_from: BatchesFrom,
    inputs_of: InputsOf,
    plan: LoopSettings,
    states: States,
) -> None:
    """Make the updates that are left. A step's losses are named scalars; `loss` is minimised."""
    first_step = states.resume(engine)
    plan.begin(first_step)
    batches = iter(batches_from(first_step))
    meter, watch = Meter(plan.work), SpikeWatch()
    tells = distributed.rank() == 0
    with stop_requests() as asked_to_stop:
        for step in range(first_step, plan.steps):
            with meter.waiting():
                batch = _next(batches, step)
            seed_dropout(plan.seed, step)
            losses = engine(*inputs_of(batch, step))
            rate = plan.learning_rate(step)
            norm = engine.update(losses["loss"], learning_rate=rate)
            numbers = _floats(losses) | {"gradient_norm": norm}
            check_finite(numbers, step=step, clip_ids=batch.clip_ids, folder=states.folder)
            meter.steps += 1
            done = step + 1
            if watch.is_spike(numbers["loss"]) and tells:
                plan.spike(done, numbers["loss"])
            _tell(engine, plan, done, numbers | {"learning_rate": rate}, meter)
            stop = distributed.any_process(bool(asked_to_stop)) and done < plan.steps
            if stop or done % plan.save_every == 0 or done == plan.steps:
                if tells:
                    plan.before_save()
                states.save(engine, done)
            if stop:
                raise Stopped(
                    f"stopped after step {done} of {plan.steps}; the state is saved",
                    hint="run it again: it continues there",
                )


def _tell(
    engine: Engine, plan: LoopSettings, done: int, numbers: dict[str, float], meter: Meter
) -> None:
    """Report where it is due, and what an evaluation found; called by every process."""
    told = distributed.rank() == 0
    if plan.is_told(done):
        numbers |= meter.read()
        if plan.evaluates(done):
            assert plan.evaluate is not None
            with meter.apart(), torch.random.fork_rng():
                weights = named_weights(engine)
                numbers |= plan.evaluate(done, weights) if told else {}
        if told:
            plan.report(done, numbers)
    if told:
        plan.progress(done, plan.steps)


def named_weights(engine: Engine) -> Weights:
    """The model's weights under its own names, in rank 0; called by every process."""
    return {name.removeprefix("model."): value for name, value in engine.weights().items()}


def seed_dropout(seed: int, step: int) -> None:
    """One stream of random numbers per step and process, so that a resumed step repeats itself."""
    key = f"dropout/{seed}/{step}/{distributed.rank()}".encode()
    torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "little", signed=True))


def _next(batches: Any, step: int) -> Batch:
    batch = next(batches, None)
    if batch is None:
        raise DataError(f"the batches ended before step {step}")
    return batch


def _floats(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in losses.items()}
