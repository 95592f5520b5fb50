"""The loop that pre-training and fine-tuning share: batches in, updates made, states kept."""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vatt.data.batches import Batch
from vatt.errors import DataError, Stopped, VattError
from vatt.training import distributed
from vatt.training.engine import Engine, Weights
from vatt.training.state import States, open_states
from vatt.training.stopping import stop_requests

Report = Callable[[int, dict[str, float]], None]  # (updates made, metrics)
Progress = Callable[[int, int], None]
BatchesFrom = Callable[[int], Iterable[Batch]]  # first step -> this process's parts from there on
InputsOf = Callable[[Batch, int], tuple[Any, ...]]  # batch, step -> what the module takes


def ignore(*_: Any) -> None:
    """A reporter for those who want none."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to train, and what happens now and then on the way."""

    steps: int
    batch_size: int  # global
    seed: int
    save_every: int
    keep_states: int
    report_every: int
    learning_rate: Callable[[int], float]  # of update `step`, from 0
    report: Report = ignore  # this and what follows: in rank 0 only
    progress: Progress = ignore
    before_save: Callable[[], None] = ignore  # a state must not be ahead of what was reported


def train(
    engine: Engine,
    batches_from: BatchesFrom,
    inputs_of: InputsOf,
    plan: Plan,
    *,
    state: Path,
    identity: dict[str, Any],
    export: Callable[[Weights], object] = ignore,
) -> Weights:
    """Train from the newest state in the folder to the end; returns the weights in rank 0.

    `identity` says, key by key, what shapes the weights; a state of another one is not resumed.
    `export` gets the weights before the state is marked as done: a kill in between loses nothing.
    """
    with open_states(state, identity, keep=plan.keep_states) as states:
        _make_updates(engine, batches_from, inputs_of, plan, states)
        weights = {name.removeprefix("model."): value for name, value in engine.weights().items()}
        if distributed.rank() == 0:
            export(weights)
        states.finish()
    return weights


def _make_updates(
    engine: Engine,
    batches_from: BatchesFrom,
    inputs_of: InputsOf,
    plan: Plan,
    states: States,
) -> None:
    """Make the updates that are left. A step's losses are named scalars; `loss` is minimised."""
    first_step = states.resume(engine)
    batches = iter(batches_from(first_step))
    meter = _Meter(plan.batch_size)
    tells = distributed.rank() == 0
    with stop_requests() as asked_to_stop:
        for step in range(first_step, plan.steps):
            with meter.waiting():
                batch = _next(batches, step)
            seed_dropout(plan.seed, step)
            losses = engine(*inputs_of(batch, step))
            rate = plan.learning_rate(step)
            norm = engine.update(losses["loss"], learning_rate=rate)
            _check_finite(losses, norm, step, batch)
            meter.steps += 1
            done = step + 1
            if tells:
                _tell(plan, done, losses, {"learning_rate": rate, "gradient_norm": norm}, meter)
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
    plan: Plan, done: int, losses: dict[str, Tensor], more: dict[str, float], meter: "_Meter"
) -> None:
    if done % plan.report_every == 0 or done == plan.steps:
        plan.report(done, _floats(losses) | more | meter.read())
    plan.progress(done, plan.steps)


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


def _check_finite(losses: dict[str, Tensor], norm: float, step: int, batch: Batch) -> None:
    numbers = _floats(losses) | {"gradient norm": norm}
    bad = [f"{name} = {value}" for name, value in numbers.items() if not math.isfinite(value)]
    if bad:
        raise VattError(
            f"training left the finite numbers at step {step}: {', '.join(bad)}; "
            f"clips of this process: {', '.join(batch.clip_ids)}",
            hint="the last saved state is good; look at these clips, or lower the learning rate",
        )


@dataclass(slots=True)
class _Meter:
    """Speed since the last reading."""

    batch_size: int
    steps: int = 0
    waited: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.began
        numbers = {
            "samples_per_second": self.steps * self.batch_size / seconds,
            "data_wait_share": self.waited / seconds,
            "peak_memory_gb": distributed.peak_memory_gb(),
        }
        self.steps, self.waited, self.began = 0, 0.0, time.perf_counter()
        return numbers
