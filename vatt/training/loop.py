"""The loop that pre-training and fine-tuning share: batches in, updates made, states kept.

`Training` holds what both receive, `Objective` what differs between them, and a `Reporter`
receives the events. The loop stops when a loss is not finite, and reports a loss that jumps.
"""

import hashlib
import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vatt.config import FinetuneTaskParams, MachineParams, PretrainParams
from vatt.data.loading.batches import Batch
from vatt.errors import DataError, Stopped, VattError
from vatt.files import atomic_write
from vatt.training import distributed
from vatt.training.distributed import stop_requests
from vatt.training.engine import Engine, EngineMaker, Weights, make_engine
from vatt.training.optimizer import learning_rate
from vatt.training.state import States, open_states
from vatt.training.telemetry import Meter, Work

BatchesFrom = Callable[[int], Iterable[Batch]]  # first step -> this process's parts from there on
InputsOf = Callable[[Batch, int], tuple[Any, ...]]  # batch, step -> what the module takes


class Reporter(Protocol):
    """Receives the events of a training, in rank 0 only."""

    def begin(self, first_step: int) -> None:
        """The training starts after so many updates."""

    def describe(self, facts: Mapping[str, str]) -> None:
        """What the first step has shown, by name."""

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """The metrics after so many updates."""

    def spike(self, step: int, loss: float) -> None:
        """A loss that jumped."""

    def progress(self, done: int, total: int) -> None:
        """An update was made."""

    def evaluate(self, step: int, weights: Weights) -> dict[str, float]:
        """Measure the weights; called every `evaluate_every` updates."""

    def before_save(self) -> None:
        """Store what was reported: a state must not be ahead of it."""

    def export(self, weights: Weights) -> None:
        """Write the result; the state is marked as done only afterwards: a kill loses nothing."""


@dataclass(frozen=True, slots=True)
class Training:
    """What every training is given."""

    batches_from: BatchesFrom
    machine: MachineParams
    seed: int
    state: Path  # the folder of its states
    data_hash: str
    reporter: Reporter
    _: KW_ONLY
    kept_micro_batches: int = 1
    engine_of: EngineMaker = make_engine

    def micro_batches(self) -> dict[str, Any]:
        """How a module divides its batch."""
        size = self.machine.micro_batch_size
        assert size != "auto", "a stage makes it a number: vatt.plan.trial.chosen"
        return {"micro_batch_size": size, "kept_micro_batches": self.kept_micro_batches}


@dataclass(frozen=True, slots=True)
class Objective:
    """What is trained, and how it differs from other trainings."""

    module: nn.Module  # inputs -> losses by name; `loss` is minimised
    inputs_of: InputsOf
    work: Work  # of one step
    identity: dict[str, Any]  # what shapes the weights; a state of another identity is not resumed
    keep_states: int
    keep_states_every: int | None = None  # steps
    evaluate_every: int | None = None  # steps


def train(
    objective: Objective, params: PretrainParams | FinetuneTaskParams, training: Training
) -> Weights:
    """Train from the newest state to the end; returns the weights in rank 0, nothing elsewhere."""
    engine = training.engine_of(
        objective.module, params.optimizer, params.precision, training.machine
    )
    with open_states(
        training.state,
        objective.identity,
        keep=objective.keep_states,
        keep_every=objective.keep_states_every,
    ) as states:
        _Loop(engine, objective, params, training, states).run()
        weights = named_weights(engine)
        if distributed.rank() == 0:
            training.reporter.export(weights)
        states.finish()
    return weights


class _Loop:
    """One run of the loop: from the newest state to the end, or to a stop signal."""

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        params: PretrainParams | FinetuneTaskParams,
        training: Training,
        states: States,
    ) -> None:
        self.engine, self.objective, self.params = engine, objective, params
        self.training, self.seed, self.batches_from = training, training.seed, training.batches_from
        self.reporter, self.states = training.reporter, states
        self.reports = distributed.rank() == 0
        self.meter, self.watch = Meter(objective.work), SpikeWatch()
        self.unread: deque[Reading] = deque()

    def run(self) -> None:
        """Make the updates that are left."""
        first_step = self.states.resume(self.engine)
        if self.reports:
            self.reporter.begin(first_step)
        feed = Feed(self.batches_from(first_step), self.objective.inputs_of, self.meter)
        with stop_requests() as asked_to_stop:
            for step in range(first_step, self.params.steps):
                batch, inputs = feed.take(step)
                seed_dropout(self.seed, step)
                losses = self.engine(*inputs)
                if step == first_step and self.reports:
                    self.reporter.describe(self.engine.facts | self._sizes(len(batch.clip_ids)))
                if step + 1 < self.params.steps:
                    feed.prefetch(step + 1)
                rate = self._rate(step)
                norm = self.engine.update(losses["loss"], learning_rate=rate)
                self.meter.steps += 1
                numbers = {**losses, "gradient_norm": norm, "learning_rate": rate}
                stop = distributed.any_process(bool(asked_to_stop))
                self.unread.append(Reading(step + 1, batch.clip_ids, numbers, stop))
                self._after(step + 1)

    def _sizes(self, clips: int) -> dict[str, str]:
        """How the module divides its part of a batch."""
        size = self.training.machine.micro_batch_size
        if not isinstance(size, int) or size >= clips:
            return {"micro_batch.clips": f"{clips} (all)"}
        kept = str(self.training.kept_micro_batches)
        return {"micro_batch.clips": f"{size} of {clips}", "micro_batch.kept": kept}

    def _rate(self, step: int) -> float:
        return learning_rate(step, steps=self.params.steps, params=self.params.optimizer)

    def _after(self, done: int) -> None:
        """Check, report and save what is due after so many updates."""
        evaluates = _every(self.objective.evaluate_every, done)
        last = done == self.params.steps
        reports = evaluates or _every(self.params.report_every, done) or last
        saves = _every(self.params.save_every, done) or last
        numbers, stop = self._read(everything=reports or saves)
        if reports:
            self._report(done, numbers, evaluates=evaluates)
        if self.reports:
            self.reporter.progress(done, self.params.steps)
        if saves or (stop and not last):
            self._save(done)
        if stop and not last:
            raise Stopped(
                f"stopped after step {done} of {self.params.steps}; the state is saved",
                hint="run it again: it continues there",
            )

    def _read(self, *, everything: bool) -> tuple[dict[str, float], bool]:
        """Check the readings that are due; the newest one's numbers, and whether to stop.

        A stop signal makes the rest due, since a state is saved.
        """
        numbers: dict[str, float] = {}
        stop = False
        while len(self.unread) > (
            0 if everything or stop else READ_LATE[distributed.device().type]
        ):
            reading = self.unread.popleft()
            numbers = reading.numbers()
            stop = stop or numbers.pop("stop") > 0
            check_finite(
                numbers,
                step=reading.done - 1,
                clip_ids=reading.clip_ids,
                folder=self.states.folder,
            )
            if self.watch.is_spike(numbers["loss"]) and self.reports:
                self.reporter.spike(reading.done, numbers["loss"])
        return numbers, stop

    def _report(self, done: int, numbers: dict[str, float], *, evaluates: bool) -> None:
        """Report, with what an evaluation found; called by every process."""
        numbers |= self.meter.read()
        if evaluates:
            with self.meter.apart(), torch.random.fork_rng():
                weights = named_weights(self.engine)
                numbers |= self.reporter.evaluate(done, weights) if self.reports else {}
        if self.reports:
            self.reporter.report(done, numbers)

    def _save(self, done: int) -> None:
        if self.reports:
            self.reporter.before_save()
        self.states.save(self.engine, done)


def named_weights(engine: Engine) -> Weights:
    """The model's weights under its own names, in rank 0; called by every process."""
    return {name.removeprefix("model."): value for name, value in engine.weights().items()}


def seed_dropout(seed: int, step: int) -> None:
    """One stream of random numbers per step and process, so that a resumed step repeats itself."""
    key = f"dropout/{seed}/{step}/{distributed.rank()}".encode()
    torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "little", signed=True))


def _every(period: int | None, done: int) -> bool:
    return period is not None and done % period == 0


# --- nothing waits for the host -------------------------------------------------------------------

# By device: how many readings may stay on their way, and whether the next batch is brought over
# early. A GPU thus always has work; on a CPU there is nothing to wait for and nowhere to bring it.
# Equal in every process, since what follows from a reading is collective.
READ_LATE = {"cpu": 0, "cuda": 1}
PREFETCH = {"cpu": False, "cuda": True}
PREFETCHED_SHARE = 1 / 6  # of a GPU's memory: a larger batch is not brought over early


class Feed:
    """The batches, as the module takes them.

    On a GPU, `prefetch` brings the next one over on a second stream while this one trains.
    """

    def __init__(self, batches: Iterable[Batch], inputs_of: InputsOf, meter: Meter) -> None:
        self._batches, self._inputs_of, self._meter = iter(batches), inputs_of, meter
        self._stream = torch.cuda.Stream() if distributed.device().type == "cuda" else None
        self._next: tuple[Batch, tuple[Any, ...]] | None = None
        self._size = 0  # of the last batch, in bytes

    def take(self, step: int) -> tuple[Batch, tuple[Any, ...]]:
        """The batch of a step, and what the module takes."""
        batch, inputs = self._next or self._prepare(step)
        self._next = None
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            for value in _tensors(inputs):  # their memory is free again after this stream's work
                value.record_stream(torch.cuda.current_stream())
        return batch, inputs

    def prefetch(self, step: int) -> None:
        """Begin to bring over the batch of a step, where that saves time and there is room."""
        if PREFETCH[distributed.device().type] and self._size <= _room():
            self._next = self._prepare(step)

    def _prepare(self, step: int) -> tuple[Batch, tuple[Any, ...]]:
        with self._meter.waiting():
            batch = next(self._batches, None)
        if batch is None:
            raise DataError(f"the batches ended before step {step}")
        self._size = sum(value.nbytes for value in batch.tensors())
        if self._stream is None:
            return batch, self._inputs_of(batch, step)
        with torch.cuda.stream(self._stream):
            # In memory from which a GPU copies by itself.
            return batch, self._inputs_of(batch.mapped(Tensor.pin_memory), step)


def _tensors(inputs: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors of what a module takes: itself, or in groups that list theirs."""
    for value in inputs:
        if isinstance(value, Tensor):
            yield value
        elif hasattr(value, "tensors"):
            yield from value.tensors()


def _room() -> float:
    """The bytes that a batch may have to be brought over early."""
    if distributed.device().type != "cuda":
        return math.inf
    return torch.cuda.get_device_properties(distributed.device()).total_memory * PREFETCHED_SHARE


class Reading:
    """The numbers of a step, on their way from the device."""

    def __init__(
        self,
        done: int,
        clip_ids: Sequence[str],
        numbers: Mapping[str, Tensor | float],
        stop: Tensor | float,
    ) -> None:
        self.done, self.clip_ids = done, clip_ids
        self._numbers = {
            name: value.detach().to("cpu", non_blocking=True)
            if isinstance(value, Tensor)
            else value
            for name, value in {**numbers, "stop": stop}.items()
        }
        self._arrived = torch.cuda.Event() if distributed.device().type == "cuda" else None
        if self._arrived is not None:
            self._arrived.record()

    def numbers(self) -> dict[str, float]:
        """The numbers, once they are here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return {name: float(value) for name, value in self._numbers.items()}


# --- losses that are not finite, and losses that jump ---------------------------------------------

NOT_FINITE_FILE = "not-finite.json"
NAMED = 8  # clips of each process in the message

WINDOW = 64  # losses that say what is usual
ENOUGH = 16  # fewer say nothing
TIMES = 8.0  # typical deviations above the median that make a spike
SIGMA = 1.4826  # standard deviation of a normal distribution / median absolute deviation
LEAST_SHARE = 0.02  # of the median: the noise of a flat curve is not a spike


def check_finite(
    numbers: Mapping[str, float], *, step: int, clip_ids: Sequence[str], folder: Path
) -> None:
    """Stop when a value is not finite, naming it, the step and the clips; the last state is kept.

    Every process must call it with the same numbers; all clips are listed in a file of `folder`.
    """
    bad = [f"{name} = {value}" for name, value in numbers.items() if not math.isfinite(value)]
    if not bad:
        return
    by_rank = distributed.from_all(list(clip_ids))
    file = folder / NOT_FINITE_FILE
    if distributed.rank() == 0:
        values = {name: str(value) for name, value in numbers.items()}
        content = {"step": step, "numbers": values, "clips": by_rank}
        with atomic_write(file) as path:
            path.write_text(json.dumps(content, indent=1))
    named = [name for names in by_rank for name in names[:NAMED]]
    rest = sum(map(len, by_rank)) - len(named)
    raise VattError(
        f"a value is not finite at step {step}: {', '.join(bad)}; "
        f"clips of this step: {', '.join(named)}" + (f" and {rest} more in {file}" if rest else ""),
        hint="the last saved state is good; look at these clips, or lower the learning rate",
    )


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
