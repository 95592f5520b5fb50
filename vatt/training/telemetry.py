"""How fast and at what cost a training runs, from one report to the next.

Counting is a few additions a step. What processes know apart from each other (memory, energy,
waiting) is joined when a report is due, by one small collective.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vatt.config import FinetuneTaskParams, ModelParams, PretrainParams
from vatt.model.drop_token import num_kept
from vatt.model.flops import (
    audio_flops,
    multimodal_flops,
    num_audio_tokens,
    num_video_tokens,
    text_flops,
    video_flops,
)
from vatt.training import distributed
from vatt.training.devices import Precision, peak_flops

BACKWARD = 2  # times the operations of a forward pass
RAPL = Path("/sys/class/powercap")
TOLD_RANKS = 64  # each one's peak memory is told up to so many processes


@dataclass(frozen=True, slots=True)
class Work:
    """What one step does, all processes together; what is computed twice counts once."""

    samples: int
    tokens: float
    flops: float
    precision: Precision


def pretraining_work(model: ModelParams, params: PretrainParams) -> Work:
    """One step of pre-training."""
    drop, candidates = params.drop_rate, params.text_candidates
    forward = multimodal_flops(model, drop_rate=drop, convention="true")
    forward += (candidates - 1) * text_flops(model.text, convention="true")
    tokens = num_kept(num_video_tokens(model.video), drop)
    tokens += num_kept(num_audio_tokens(model.audio), drop) + candidates * model.text.words
    batch = params.batch_size
    return Work(batch, batch * tokens, batch * (1 + BACKWARD) * forward, params.precision)


def finetuning_work(model: ModelParams, task: FinetuneTaskParams) -> Work:
    """One step of fine-tuning: a single tower."""
    drop, batch = task.drop_rate, task.batch_size
    if task.modality == "audio":
        tokens = num_kept(num_audio_tokens(model.audio), drop)
        forward = audio_flops(model.audio, drop_rate=drop, convention="true")
    else:
        tokens = num_kept(num_video_tokens(model.video), drop)
        forward = video_flops(model.video, drop_rate=drop, convention="true")
    return Work(batch, batch * tokens, batch * (1 + BACKWARD) * forward, task.precision)


class Meter:
    """Speed, waiting, memory and energy since the last reading."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._peak = peak_flops(work.precision)
        self._joules = energy_counter()
        self._start()

    def _start(self) -> None:
        self.steps, self._waited, self._apart = 0, 0.0, 0.0
        self._began = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The body waits for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def apart(self) -> Iterator[None]:
        """The body is no part of training: its time counts for no speed."""
        began = time.perf_counter()
        yield
        self._apart += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """The numbers of the steps since the last reading; called by every process."""
        elapsed = time.perf_counter() - self._began
        seconds = elapsed - self._apart
        steps_per_second = self.steps / seconds
        flops = steps_per_second * self._work.flops
        joules = self._joules()
        known = [distributed.peak_memory_gb(), self._waited / seconds, joules or 0.0]
        ranks = _from_all(known)
        numbers = {
            "samples_per_second": steps_per_second * self._work.samples,
            "tokens_per_second": steps_per_second * self._work.tokens,
            "tflops_per_second": flops / 1e12,
            "mfu": flops / (self._peak * distributed.world_size()),
            "data_wait_share": max(wait for _, wait, _ in ranks),
            "peak_memory_gb": max(memory for memory, _, _ in ranks),
        }
        if 1 < len(ranks) <= TOLD_RANKS:
            numbers |= {f"peak_memory_gb.rank_{rank}": row[0] for rank, row in enumerate(ranks)}
        if joules is not None:
            numbers["power_watts"] = sum(row[2] for row in ranks) / elapsed
        self._start()
        return numbers


def _from_all(numbers: list[float]) -> list[list[float]]:
    """Every process's numbers, by rank."""
    if distributed.world_size() == 1:
        return [numbers]
    own = torch.tensor(numbers, dtype=torch.float64, device=distributed.device())
    whole = own.new_empty(distributed.world_size(), len(numbers))
    dist.all_gather_into_tensor(whole, own[None])
    rows: list[list[float]] = whole.tolist()
    return rows


def energy_counter() -> Callable[[], float | None]:
    """A function that says how many joules went since its last call; None where nobody counts.

    A GPU's own counter, read by the process that uses it; else the processors', read by the
    first process of a machine.
    """
    if torch.cuda.is_available():
        read = _nvml_reader()
        return _since_last(read) if read is not None else lambda: None
    if distributed.local_rank() > 0:
        return lambda: 0.0 if _rapl_zones(RAPL) else None
    readers = [_rapl_reader(zone) for zone in _rapl_zones(RAPL)]
    return (lambda: sum(read() for read in readers)) if readers else lambda: None


def _rapl_reader(zone: Path) -> Callable[[], float]:
    whole = int((zone / "max_energy_range_uj").read_text()) / 1e6
    return _since_last(lambda: _microjoules(zone) / 1e6, wraps_at=whole)


def _since_last(read: Callable[[], float], *, wraps_at: float = 0.0) -> Callable[[], float]:
    last = read()

    def since() -> float:
        nonlocal last
        now = read()
        gone = now - last if now >= last else now - last + wraps_at
        last = now
        return gone

    return since


def _rapl_zones(folder: Path) -> list[Path]:
    """The processors' counters that this user may read."""
    zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    try:
        for zone in zones:
            _microjoules(zone)
    except (OSError, ValueError):
        return []
    return zones


def _microjoules(zone: Path) -> int:
    return int((zone / "energy_uj").read_text())


def _nvml_reader() -> Callable[[], float] | None:
    """Joules that this process's GPU has used since its driver was loaded."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
