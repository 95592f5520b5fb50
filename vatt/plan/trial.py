"""A short trial on this machine: seconds and bytes of real steps on random clips.

It runs in a process of its own, so that only its memory counts and is freed afterwards.
"""

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vatt import checkpoint
from vatt.config import MachineParams, ModelParams, Params, PretrainParams
from vatt.data.loading.batches import Batch, Loading, Sampling, open_index, train_batches
from vatt.errors import MachineError
from vatt.losses import FORMS, pretraining_loss
from vatt.model.vatt import VATT, Features
from vatt.plan.forecast import Trial
from vatt.plan.memory import changes_colour
from vatt.training import distributed
from vatt.training.engine import Engine, make_engine
from vatt.training.pretrain import Pretraining, pretraining_inputs
from vatt.training.telemetry import pretraining_work

ROUNDS = 3  # the result is their median
SECONDS = 1.0  # target for the larger of the two batches
GUESS = 2e11  # operations per second, to choose the size of the batches
LARGEST = 32  # clips
FEW = 4  # clips
COLOUR = (0.1, 1.2, 0.8, 0.1)  # a change of colours that does some work
LOADED = 32  # clips of a batch in the trial of the loader
LOADER_SECONDS = 3.0
# Freed tensors return to the system at once, so that the peak is memory in use.
EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True, slots=True)
class TrialResult:
    """Measured steps of a setting."""

    seconds: list[float]
    peak: int  # bytes in addition to those held before the model was built


def run_trial(params: Params) -> Trial:
    """Try the model of the settings on this machine, with their precision and ZeRO stage."""
    found = _in_process("trial", params)
    losses = {int(size): seconds for size, seconds in found.pop("losses").items()}
    return Trial(**found, losses=losses)


def run_step(params: Params, *, exact_memory: bool) -> TrialResult:
    """Measure complete steps with the settings as they are."""
    return TrialResult(**_in_process("step", params, EXACT_MALLOC if exact_memory else {}))


def run_loader(params: Params) -> float:
    """Samples per second of the loader on this machine, each decoded from the shards."""
    return float(_in_process("loader", params)["samples_per_second"])


def _in_process(what: str, params: Params, environment: Mapping[str, str] | None = None) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "vatt.plan.trial", what],
        input=params.model_dump_json(),
        capture_output=True,
        text=True,
        # The number of threads that each of the processes will have.
        env={
            **os.environ,
            "LOCAL_WORLD_SIZE": str(params.machine.processes),
            **(environment or {}),
        },
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MachineError(
            f"the trial ended with exit code {done.returncode}: {last}",
            hint="name a GPU with --device: then no trial is needed",
        )
    return json.loads(done.stdout.splitlines()[-1])


# --- inside the process ---------------------------------------------------------------------------


def main() -> None:
    """Read settings from stdin, print the result as one line of JSON."""
    what, params = sys.argv[1], Params.model_validate_json(sys.stdin.read())
    if what == "loader":
        found: Any = {"samples_per_second": loader_rate(params)}
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


def trial(params: Params) -> Trial:
    """Fixed part and part per clip from two batch sizes, caching from a cached batch."""
    pretrain = params.pretrain
    flops = pretraining_work(params.model, pretrain).flops / pretrain.batch_size
    large = max(4, min(LARGEST, int(SECONDS * GUESS / flops)))
    small = max(1, large // 4)
    engine, module = _engine(params.model, pretrain, params.machine)
    losses = {
        size: _median(_loss_step(module.model, pretrain, size))
        for size in {small, large, pretrain.batch_size}
    }
    module.micro_batch_size = None
    times = {
        size: _median(_step(engine, module, make_clips(params, size))) - losses[size]
        for size in (small, large)
    }
    clip = max(0.0, (times[large] - times[small]) / (large - small))
    fixed = max(0.0, times[small] - small * clip)
    module.micro_batch_size = max(1, large // 2)
    cached = _median(_step(engine, module, make_clips(params, large))) - losses[large]
    return Trial(fixed, clip, max(clip, (cached - fixed) / large), losses)


def steps(params: Params) -> TrialResult:
    """Complete steps on one batch that stays in memory."""
    _warm_up(params)
    before = _held()
    batch = make_clips(params, params.pretrain.batch_size)
    engine, module = _engine(params.model, params.pretrain, params.machine)
    step = _step(engine, module, batch)
    step()
    _forget_peak()
    seconds = [_timed(step) for _ in range(ROUNDS)]
    return TrialResult(seconds, _peak() - before)


def make_clips(params: Params, size: int) -> Batch:
    """Random clips with the shapes of the settings."""
    generator = torch.Generator().manual_seed(0)
    model, candidates = params.model, params.pretrain.text_candidates
    frame = model.video.frame_size
    height, width = frame if isinstance(frame, tuple) else (frame, frame)
    heard = (size, model.audio.samples, *([model.audio.mel_bins] if model.audio.mel_bins else []))

    def draw(low: int, high: int, shape: tuple[int, ...], kind: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=kind)

    return Batch(
        clip_ids=[str(row) for row in range(size)],
        video=draw(0, 256, (size, model.video.frames, height, width, 3), torch.uint8),
        audio=draw(-9000, 9000, heard, torch.int16),
        text=draw(2, model.text.vocabulary, (size, candidates, model.text.words), torch.int64),
        has_video=torch.ones(size, dtype=torch.bool),
        has_audio=torch.ones(size, dtype=torch.bool),
        colour=torch.tensor([COLOUR] * size) if changes_colour(params.pretrain) else None,
        labels={},
    )


def _engine(
    model: ModelParams, params: PretrainParams, machine: MachineParams
) -> tuple[Engine, Pretraining]:
    module = Pretraining(checkpoint.build(model), params, micro_batch_size=machine.micro_batch_size)
    return make_engine(module, params.optimizer, params.precision, machine), module


def _step(engine: Engine, module: Pretraining, batch: Batch) -> Callable[[], None]:
    def step() -> None:
        drop = module.params.drop_rate
        losses = engine(*pretraining_inputs(module.model, batch, 0, drop_rate=drop, seed=0))
        engine.update(losses["loss"], learning_rate=1e-6)

    return step


def _loss_step(model: VATT, params: PretrainParams, size: int) -> Callable[[], None]:
    dims, candidates = checkpoint.feature_dims(model.params), params.text_candidates
    shapes = ((size, dims["video"]), (size, dims["audio"]), (size, candidates, dims["text"]))
    there = torch.ones(size, dtype=torch.bool, device=distributed.device())

    def step() -> None:
        parts = [torch.randn(shape, device=there.device, requires_grad=True) for shape in shapes]
        losses = pretraining_loss(
            model.project(Features(*parts)),
            has_video=there,
            has_audio=there,
            has_text=there[:, None].expand(-1, candidates),
            temperature=params.temperature,
            mil_nce_weight=params.mil_nce_weight,
            form=FORMS[model.params.recipe],
        )
        torch.autograd.grad(losses.total, parts)

    return step


def _median(step: Callable[[], None]) -> float:
    step()
    return statistics.median(_timed(step) for _ in range(ROUNDS))


def _timed(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


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
