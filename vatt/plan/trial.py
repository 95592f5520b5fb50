"""A short trial on this machine: seconds and bytes of real steps on random clips.

It runs in a process of its own, so that only its memory counts and is freed afterwards.
"""

import ctypes
import gc
import json
import logging
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from vatt import checkpoint
from vatt.config import (
    FinetuneTaskParams,
    MachineParams,
    ModelParams,
    Params,
    PretrainParams,
    fingerprint,
)
from vatt.data.loading.batches import Batch, Loading, Sampling, open_index, train_batches
from vatt.errors import MachineError
from vatt.files import UNREADABLE, atomic_write
from vatt.losses import FORMS, pretraining_loss
from vatt.model.transformer import resolve
from vatt.model.vatt import VATT, Classifier
from vatt.plan.forecast import (
    USABLE,
    Place,
    Trial,
    forecast_memory,
    plain_setting,
    this_place,
    widest,
)
from vatt.plan.memory import (
    BatchSettings,
    Counts,
    changes_colour,
    count,
    count_weights,
    finetuning_memory,
    optimizer_bytes,
)
from vatt.senses import SENSES
from vatt.training import distributed
from vatt.training.engine import Engine, ProvenPrecision, apply_options, compiles, make_engine
from vatt.training.finetune import Finetuning, finetuning_inputs
from vatt.training.pretrain import Pretraining, pretraining_inputs
from vatt.training.telemetry import pretraining_work

clock = time.perf_counter  # bench/plan.py takes processor time on a busy machine
ROUNDS = 3  # the result is their median
LONG = 6.0  # seconds: a round of steps that takes more is measured once, after the warm-up
MORE_BLOCKS = 2  # of the deeper of the two models that are tried
SECONDS = 0.5  # target for the larger of the two batches
GUESS = 1e11  # operations per second, to choose the size of the batches
LARGEST = 32  # clips
LARGEST_LOSS = 1024  # clips that the heads and the loss are tried with
NOTED_SECONDS = 3600.0  # that the result of a trial counts for
FEW = 4  # clips
LEAST_SECONDS = 1e-4  # of a step: a loss can seem slower than the step that it is a part of
COLOUR = (0.1, 1.2, 0.8, 0.1)  # a change of colours that does some work
LOADED = 32  # clips of a batch in the trial of the loader
LOADER_SECONDS = 3.0
LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC", "GROUP_", "ROLE_", "LOCAL_WORLD_SIZE")
# Freed tensors return to the system at once, so that the peak is memory in use.
EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True, slots=True)
class TrialResult:
    """Measured steps of a setting."""

    seconds: list[float]
    peak: int  # bytes in addition to those held before the model was built


def run_trial(params: Params, notes: Path | None = None) -> Trial:
    """Try the model of the settings on this machine, with their precision and ZeRO stage.

    The result is noted in a file, where its folder exists.
    """
    found = _in_process("trial", params)
    if notes is not None and notes.parent.is_dir():
        with suppress(OSError), atomic_write(notes) as path:  # nothing is noted where it fails
            path.write_text(json.dumps({"key": _key(params), "trial": found}))
    return _trial_of(found)


def last_trial(params: Params, notes: Path) -> Trial | None:
    """What the file holds for the same settings, unless it is older than an hour or damaged."""
    try:
        known = json.loads(notes.read_text())
        is_old = time.time() - notes.stat().st_mtime > NOTED_SECONDS
        return None if is_old or known["key"] != _key(params) else _trial_of(known["trial"])
    except UNREADABLE:
        return None


def _key(params: Params) -> str:
    """A hash of the settings that a trial depends on."""
    how = {"processes", "threads", "zero_stage", "offload", "activation_checkpointing", "compile"}
    return fingerprint(params.model, params.pretrain, params.machine.model_dump(include=how))


def _trial_of(found: dict[str, Any]) -> Trial:
    losses = {int(size): float(seconds) for size, seconds in found["losses"].items()}
    fixed, clip, cached = (float(found[name]) for name in ("fixed", "clip", "cached_clip"))
    return Trial(fixed, clip, cached, losses)


def run_step(params: Params, *, exact_memory: bool) -> TrialResult:
    """Measure complete steps with the settings as they are."""
    return TrialResult(**_in_process("step", params, EXACT_MALLOC if exact_memory else {}))


def run_loader(params: Params) -> float:
    """Samples per second of the loader on this machine, each decoded from the shards."""
    return float(_in_process("loader", params)["samples_per_second"])


def _in_process(
    what: str, params: Params, environment: Mapping[str, str] | None = None, **more: Any
) -> Any:
    # A process of its own, also where this one is one of several.
    own = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER)}
    done = subprocess.run(
        [sys.executable, "-m", "vatt.plan.trial", what],
        input=json.dumps({"params": params.model_dump(mode="json"), "more": more}),
        capture_output=True,
        text=True,
        # The number of threads that each of the processes will have.
        env={**own, "LOCAL_WORLD_SIZE": str(params.machine.processes), **(environment or {})},
        check=False,
    )
    if what == "fits" and done.returncode == -signal.SIGKILL:
        return {"fits": False}  # the system ended it for its memory
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MachineError(
            f"the trial ended with exit code {done.returncode}: {last}",
            hint="name a GPU with --device: then no trial is needed",
        )
    return json.loads(done.stdout.splitlines()[-1])


# --- machine.micro_batch_size: auto ---------------------------------------------------------------

log = logging.getLogger(__name__)

CHOICE = "micro-batch.json"  # in the folder of the states


@dataclass(frozen=True, slots=True)
class Job:
    """A training whose micro-batch is chosen."""

    params: Params
    state: Path  # the folder of its states
    task: str | None = None  # of fine-tuning
    classes: int = 0
    own_model: ModelParams | None = None  # in place of the one of `params`

    @property
    def model(self) -> ModelParams:
        """What is trained."""
        return self.own_model or self.params.model

    @property
    def settings(self) -> PretrainParams | FinetuneTaskParams:
        """Batch size and precision."""
        return self.params.pretrain if self.task is None else self.params.finetune.tasks[self.task]

    def memory(self, setting: BatchSettings, place: Place, counts: Counts, batch: int) -> float:
        """The bytes of a step with this global batch."""
        settings = self.settings.model_copy(update={"batch_size": batch})
        if isinstance(settings, FinetuneTaskParams):
            return finetuning_memory(self.model, settings, setting, counts).total
        params = self.params.model_copy(update={"pretrain": settings})
        return forecast_memory(params, setting, place, counts).total

    def count(self) -> Counts:
        """The weights."""
        if self.task is None:
            return count(self.model)
        with checkpoint.without_memory():
            return count_weights(self.classifier())

    def classifier(self) -> Classifier:
        """The model of fine-tuning."""
        task = self.params.finetune.tasks[str(self.task)]
        return checkpoint.build_classifier(
            self.model,
            modality=task.modality,
            num_classes=self.classes,
            head_dropout=task.head_dropout,
        )


def chosen(job: Job) -> tuple[MachineParams, int]:
    """`machine` with a number in place of `auto`, and how many micro-batches are kept.

    Every process calls it, and all get the answer of rank 0. It is noted next to the states, and a
    training that goes on keeps it, unless another device or another setting asks for another one.
    """
    machine = job.params.machine
    if machine.micro_batch_size != "auto":
        return machine, 1
    machine = machine.model_copy(update={"processes": distributed.world_size()})
    job = replace(job, params=job.params.model_copy(update={"machine": machine}))
    place = this_place(job.params)
    room = min(distributed.from_all(min(place.memory, _free(place, machine.processes))))
    size, kept = distributed.from_rank_0(
        _choose(job, place, room) if distributed.rank() == 0 else None
    )
    return machine.model_copy(update={"micro_batch_size": size}), kept


def _free(place: Place, processes: int) -> float:
    """Bytes that nobody uses; on a GPU the trial finds out."""
    return math.inf if place.on_gpu else psutil.virtual_memory().available / processes


def _noted(file: Path) -> dict[str, Any] | None:
    """An earlier choice; None where there is none, or its file is damaged."""
    try:
        noted: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        sizes = [noted["micro_batch_size"], noted["kept"]]
        is_sound = isinstance(noted["key"], str) and sizes[1] is not None
        are_counts = all(size is None or (type(size) is int and size >= 0) for size in sizes)
    except UNREADABLE:
        return None
    return noted if is_sound and are_counts and sizes[0] != 0 else None


def _choose(job: Job, place: Place, room: float) -> tuple[int | None, int]:
    """What was noted for the same settings and device; else the largest that fits, proven."""
    machine, settings = job.params.machine, job.settings
    key = fingerprint(
        job.model,
        {"batch": settings.batch_size, "precision": settings.precision, "device": place.name},
        {"memory": int(place.memory), "processes": machine.processes, "stage": machine.zero_stage},
        {"offload": machine.offload, "checkpointing": machine.activation_checkpointing},
    )
    file = job.state / CHOICE
    noted = _noted(file)
    if noted is not None and noted["key"] == key:
        return noted["micro_batch_size"], noted["kept"]
    setting = _proven(job, place, room)
    size, kept = setting.micro_batch_size, setting.kept_micro_batches
    if noted is not None and (noted["micro_batch_size"], noted["kept"]) != (size, kept):
        log.warning(
            "machine.micro_batch_size: auto is now %s; with other settings or on another device it "
            "was %s; numbers differ by rounding", size or "all clips",
            noted["micro_batch_size"] or "all clips",
        )  # fmt: skip
    job.state.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as path:
        path.write_text(json.dumps({"key": key, "micro_batch_size": size, "kept": kept}))
    return size, kept


def _proven(job: Job, place: Place, room: float) -> BatchSettings:
    """The largest micro-batch by the formula; half of it as often as a trial needs more memory."""
    counts, batch = job.count(), job.settings.batch_size
    start = plain_setting(job.params.machine, place)

    def fits(tried: BatchSettings) -> bool:
        return job.memory(tried, place, counts, batch) <= room * USABLE

    least = replace(start, micro_batch_size=1)
    setting = widest(start, batch, fits) or least
    while not _trial_fits(job, setting, place, counts):
        size = setting.at_once(batch)
        if size == 1:
            raise MachineError(
                f"a training step needs more memory than {place.name} has, even clip by clip",
                hint="`vattctl plan` finds settings that fit, such as a smaller --size",
            )
        log.warning(
            "a trial of %d clips at once needs more memory than there is; trying %d",
            size,
            size // 2,
        )
        setting = widest(start, batch, fits, most=size // 2) or least
    return setting


def _trial_fits(job: Job, setting: BatchSettings, place: Place, counts: Counts) -> bool:
    """Try as many clips as have all their activations at once; other memory is only taken up."""
    batch = job.settings.batch_size
    clips = setting.rows(batch)
    if setting.is_cached(batch):
        largest = setting.micro_batches(batch)[-1]
        clips = min(clips, largest * (setting.kept_micro_batches + 1))
    # The trial has no optimiser, and one process.
    alone = replace(setting, processes=1, zero_stage=0, offload="none")
    tried = job.memory(alone, place, counts, clips)
    tried -= optimizer_bytes(counts, job.settings, alone)
    found = _in_process(
        "fits",
        job.params.model_copy(update={"model": job.model}),
        size=setting.micro_batch_size,
        kept=setting.kept_micro_batches,
        clips=clips,
        held=int(max(0, job.memory(setting, place, counts, batch) - tried)),
        task=job.task,
        classes=job.classes,
    )
    return bool(found["fits"])


# --- inside the process ---------------------------------------------------------------------------


def fits(
    params: Params,
    *,
    size: int | None,
    kept: int,
    clips: int,
    held: int,
    task: str | None,
    classes: int,
) -> bool:
    """Whether a forward and a backward pass go through while `held` bytes are taken."""
    machine = params.machine.model_copy(update={"micro_batch_size": size})
    job = Job(params, Path(), task, classes)
    settings = job.settings.model_copy(update={"batch_size": clips})
    try:
        taken = torch.ones(held, dtype=torch.uint8, device=distributed.device())
        module, inputs = _module(job, settings, size, kept)
        module = module.to(distributed.device()).train()
        apply_options(module, machine)
        run = ProvenPrecision(module, settings.precision, compiled=compiles(machine))
        run(*inputs())["loss"].backward()
        del taken
    except (torch.OutOfMemoryError, MemoryError):
        return False
    except RuntimeError as error:  # what a CPU's allocator raises
        if "can't allocate memory" not in str(error):
            raise
        return False
    return True


def _module(
    job: Job, settings: PretrainParams | FinetuneTaskParams, size: int | None, kept: int
) -> tuple[nn.Module, Callable[[], tuple[Any, ...]]]:
    """What is trained, and random clips for it."""
    divided: dict[str, Any] = {"micro_batch_size": size, "kept_micro_batches": kept}
    batch = make_clips(job.params, settings.batch_size)
    if isinstance(settings, PretrainParams):
        pretraining = Pretraining(checkpoint.build(job.params.model), settings, **divided)
        return pretraining, lambda: _inputs(pretraining, batch)
    classifier, names = job.classifier(), [str(number) for number in range(job.classes)]
    labelled = replace(batch, labels={settings.label: ["0"] * settings.batch_size})
    finetuning = Finetuning(classifier, settings, **divided)
    return finetuning, lambda: finetuning_inputs(
        classifier, labelled, 0, params=settings, classes=names, seed=0
    )


def main() -> None:
    """Read settings from stdin, print the result as one line of JSON."""
    what, asked = sys.argv[1], json.load(sys.stdin)
    params = Params.model_validate(asked["params"])
    if what == "loader":
        found: Any = {"samples_per_second": loader_rate(params)}
    elif what == "fits":
        with distributed.process_group(params.machine):
            found = {"fits": fits(params, **asked["more"])}
    else:
        with distributed.process_group(params.machine):
            found = asdict(trial(params) if what == "trial" else steps(params))
    sys.stdout.write("\n" + json.dumps(found) + "\n")


def loader_rate(params: Params) -> float:
    """Samples per second after the workers have started."""
    pretrain, size = params.pretrain, min(params.pretrain.batch_size, LOADED)
    loading = replace(Loading.of(params.machine), cache_gb=0.0)
    batches = train_batches(
        open_index(params.paths.shards, loading, split="train"),
        Sampling.for_pretraining(params.model, pretrain),
        batch_size=size,
        steps=range(1000),
        seed=params.seed,
        loading=loading,
    )
    next(batches)
    began, made = time.perf_counter(), 0
    while time.perf_counter() - began < LOADER_SECONDS:
        next(batches)
        made += size
    return made / (time.perf_counter() - began)


@dataclass(frozen=True, slots=True)
class Tried:
    """A model with few blocks, and its steps by their clips."""

    model: VATT
    share: float  # of the work of the blocks that the first tried model lacks
    steps: dict[int, Callable[[], None]]
    cached: Callable[[], None]  # the most clips, encoded in two halves, each twice


def trial(params: Params) -> Trial:
    """The parts of a step, from steps of models with few blocks: the whole model is never built.

    All blocks but the last are alike, so time grows in a line with their number.
    """
    pretrain, batch = params.pretrain, params.pretrain.batch_size
    depths = tried_depths(params.model)
    tried = [_tried(params, blocks) for blocks in depths]
    sizes, last = list(tried[0].steps), tried[-1]
    compared = {*sizes, min(batch, LARGEST_LOSS)}
    losses = _medians({size: _loss_step(tried[0].model, pretrain, size) for size in compared})
    steps = {(k, size): one.steps[size] for k, one in enumerate(tried) for size in sizes}
    seconds = _medians({**steps, "cached": last.cached})
    fixed, fixed_blocks, clip, clip_blocks = step_parts(
        [(tried[k].share, size, seconds[k, size] - losses[size]) for k, size in steps]
    )
    most = sizes[-1]
    cached = seconds["cached"] - losses[most] - fixed - fixed_blocks * last.share
    again = times_longer(cached, (clip + clip_blocks * last.share) * most)
    clip += clip_blocks
    return Trial(fixed + fixed_blocks, clip, clip * again, losses)


def times_longer(cached: float, once: float) -> float:
    """How much longer clips take with gradient caching; 1 where a busy machine hid their time."""
    return max(1.0, cached / once) if once > 0 else 1.0


def _tried(params: Params, blocks: int) -> Tried:
    model, pretrain = shallow(params.model, blocks), params.pretrain
    depths = tried_depths(params.model)

    def flops(one: ModelParams) -> float:
        return pretraining_work(one, pretrain).flops / pretrain.batch_size

    least, most = (flops(shallow(params.model, depth)) for depth in (depths[0], depths[-1]))
    share = (flops(model) - least) / max(1.0, flops(params.model) - least)
    engine, module = _engine(model, pretrain, params.machine)

    def step(size: int, *, halves: bool) -> Callable[[], None]:
        whole = _step(engine, module, make_clips(params, size))

        def run() -> None:
            module.micro_batch_size = max(1, size // 2) if halves else None
            module.kept_micro_batches = 0
            whole()

        return run

    large = max(2, min(LARGEST, int(SECONDS * GUESS / most)))
    sizes = (max(1, large // 4), large)
    return Tried(
        module.model,
        share,
        {size: step(size, halves=False) for size in sizes},
        step(large, halves=True),
    )


def shallow(model: ModelParams, blocks: int) -> ModelParams:
    """The same model with at most so many blocks in each tower."""
    towers = {}
    for name, section in model.towers().items():
        size = resolve(section.size)
        size = size.model_copy(update={"depth": min(blocks, size.depth)})
        towers[name] = section.model_copy(update={"size": size})
    return model.model_copy(update=towers)


def tried_depths(model: ModelParams) -> tuple[int, ...]:
    """Blocks of the models that are tried; the last block differs from the others."""
    least = 1 if model.experts is None else 2
    deepest = max(resolve(section.size).depth for section in model.towers().values())
    return (least, least + MORE_BLOCKS) if deepest > least else (deepest,)


def step_parts(rows: Sequence[tuple[float, int, float]]) -> list[float]:
    """Seconds of every step, of a clip, and of each what the missing blocks add to it.

    The order: every step, its blocks, a clip, its blocks. A row has the share of those blocks, the
    clips and the measured seconds. Relative errors count, and no part is negative, whatever a busy
    machine measures.
    """
    from scipy.optimize import nnls

    measured = np.array([max(seconds, LEAST_SECONDS) for *_, seconds in rows])
    parts = [[1.0, share, clips, clips * share] for share, clips, _ in rows]
    found, _ = nnls(np.array(parts) / measured[:, None], np.ones(len(rows)))
    return [float(value) for value in found]


def steps(params: Params) -> TrialResult:
    """Complete steps on one batch that stays in memory."""
    _warm_up(params)
    before = _held()
    step = whole_step(params)
    step()
    _forget_peak()
    seconds = [_timed(step) for _ in range(ROUNDS)]
    return TrialResult(seconds, _peak() - before)


def whole_step(params: Params) -> Callable[[], None]:
    """A step of the whole model on one batch that stays in memory."""
    batch = make_clips(params, params.pretrain.batch_size)
    return _step(*_engine(params.model, params.pretrain, params.machine), batch)


def make_clips(params: Params, size: int) -> Batch:
    """Random clips with the shapes of the settings."""
    generator = torch.Generator().manual_seed(0)
    shapes = Sampling.for_pretraining(params.model, params.pretrain).shapes()

    def draw(name: str) -> torch.Tensor:
        shape, kind = shapes[name]
        if np.issubdtype(kind, np.floating):
            return torch.rand((size, *shape), generator=generator)
        low, high = {"text": (2, params.model.text.vocabulary), "video": (0, 256)}.get(
            name, (-9000, 9000)
        )
        values = torch.randint(low, high, (size, *shape), generator=generator)
        return values.to(torch.from_numpy(np.empty(0, kind)).dtype)

    signals = {name: draw(name) for name in SENSES if name in shapes}
    present = {name: torch.ones(size, dtype=torch.bool) for name in signals if name != "text"}
    colour = {"video": torch.tensor([COLOUR] * size)} if changes_colour(params.pretrain) else {}
    return Batch([str(row) for row in range(size)], signals, present, {}, colour)


def _engine(
    model: ModelParams, params: PretrainParams, machine: MachineParams
) -> tuple[Engine, Pretraining]:
    size = machine.micro_batch_size
    module = Pretraining(
        checkpoint.build(model), params, micro_batch_size=size if isinstance(size, int) else None
    )
    return make_engine(module, params.optimizer, params.precision, machine), module


def _inputs(module: Pretraining, batch: Batch) -> tuple[Any, ...]:
    """The clips as its forward pass takes them."""
    drop, drawn = module.params.drop_rate, module.params.random_share
    return pretraining_inputs(module.model, batch, 0, drop_rate=drop, seed=0, random_share=drawn)


def _step(engine: Engine, module: Pretraining, batch: Batch) -> Callable[[], None]:
    def step() -> None:
        losses = engine(*_inputs(module, batch))
        engine.update(losses["loss"], learning_rate=1e-6)

    return step


def _loss_step(model: VATT, params: PretrainParams, size: int) -> Callable[[], None]:
    dims, candidates = checkpoint.feature_dims(model.params), params.text_candidates
    shapes: dict[str, tuple[int, ...]] = {name: (size, dim) for name, dim in dims.items()}
    shapes |= {"text": (size, candidates, dims["text"])}
    there = torch.ones(size, dtype=torch.bool, device=distributed.device())
    present = dict.fromkeys(dims, there) | {"text": there[:, None].expand(-1, candidates)}

    def step() -> None:
        parts = {
            name: torch.randn(shape, device=there.device, requires_grad=True)
            for name, shape in shapes.items()
        }
        losses = pretraining_loss(
            model.project(parts),
            present,
            temperature=params.temperature,
            mil_nce_weight=params.mil_nce_weight,
            senses_weight=params.senses_weight,
            form=FORMS[model.params.recipe],
        )
        torch.autograd.grad(losses.total, list(parts.values()))

    return step


def _medians(steps: Mapping[Any, Callable[[], None]]) -> dict[Any, float]:
    """Seconds of each step after one that warms up; in turns, so a busy machine slows all alike."""
    first = sum(_timed(step) for step in steps.values())
    rounds = [
        {name: _timed(step) for name, step in steps.items()}
        for _ in range(1 if first > LONG else ROUNDS)
    ]
    return {name: statistics.median(one[name] for one in rounds) for name in steps}


def _timed(step: Callable[[], object]) -> float:
    began = clock()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - began


def _warm_up(params: Params) -> None:
    """Load all code of a step with two steps of few clips, then free the memory."""
    engine, module = _engine(params.model, params.pretrain, params.machine)
    step = _step(engine, module, make_clips(params, FEW))
    step(), step()
    del engine, module, step
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _held() -> int:
    """Bytes in use now, of the GPU's memory if there is one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _resident("VmRSS")


def _peak() -> int:
    """The most bytes in use since `_forget_peak`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
