"""How fast a training runs and what it costs, from one report to the next.

Counting takes a few additions a step. What each process measures alone (memory, energy, waiting) is
joined by one small collective when a report is due.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from vatt.config import FinetuneTaskParams, ModelParams, Precision, PretrainParams
from vatt.flops import (
    multimodal_flops,
    num_signal_tokens,
    signal_flops,
    signals_of,
    text_flops,
)
from vatt.model.operators import Linear
from vatt.model.patches import num_kept
from vatt.model.vatt import tower_of
from vatt.senses import SENSES
from vatt.training import distributed

PROBE, GPU_PROBE = 1024, 8192  # rows and columns of the matrices multiplied to find a peak
PROBES = 8  # the best of so many counts


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, from its maker's data sheet; products are dense ones of the tensor cores."""

    name: str
    memory_gb: float  # GiB that a process can have
    bandwidth: float  # bytes a second of that memory
    bf16_flops: float
    fp32_flops: float  # tensor cores in TF32 are not used by default
    watts: float  # the board's limit
    link: float  # bytes a second to a neighbour in the same machine, one direction
    network: float  # bytes a second of a machine's usual network, by GPU
    host: float  # bytes a second to the main memory


GPUS = {
    device.name: device
    for device in (
        Device("h200-141gb", 139, 4.8e12, 989e12, 67e12, 700, 450e9, 50e9, 55e9),
        Device("h100-80gb", 79, 3.35e12, 989e12, 67e12, 700, 450e9, 50e9, 55e9),
        Device("a100-80gb", 79, 2.0e12, 312e12, 19.5e12, 400, 300e9, 25e9, 25e9),
        Device("a100-40gb", 39.4, 1.55e12, 312e12, 19.5e12, 400, 300e9, 25e9, 25e9),
        Device("l40s", 44.5, 0.86e12, 362e12, 91.6e12, 350, 25e9, 12.5e9, 25e9),
        Device("a6000", 47.5, 0.77e12, 155e12, 38.7e12, 300, 25e9, 12.5e9, 25e9),
        Device("rtx4090", 23.6, 1.0e12, 165e12, 82.6e12, 450, 25e9, 1.25e9, 25e9),
        Device("rtx3090", 23.6, 0.94e12, 71e12, 35.6e12, 350, 25e9, 1.25e9, 25e9),
        Device("v100-32gb", 31.7, 0.9e12, 15.7e12, 15.7e12, 300, 150e9, 12.5e9, 12e9),
        Device("t4", 14.6, 0.32e12, 8.1e12, 8.1e12, 70, 12e9, 1.25e9, 12e9),
    )
}


def named_like(full_name: str, memory_gb: float) -> Device | None:
    """The data sheet of a GPU as its driver names it (`NVIDIA H100 80GB HBM3`); None if unknown."""
    plain = full_name.lower().replace(" ", "").replace("-", "")
    fitting = [
        device
        for device in GPUS.values()
        if device.name.partition("-")[0] in plain and device.memory_gb < memory_gb * 1.1
    ]
    return max(fitting, key=lambda device: device.memory_gb, default=None)


@lru_cache(maxsize=4)
def peak_flops(precision: Precision) -> float:
    """Operations a second that this process's device reaches at most in a dense product."""
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(torch.cuda.current_device())
        known = named_like(facts.name, facts.total_memory / 2**30)
        if known is not None:
            return known.bf16_flops if precision == "bf16" else known.fp32_flops
    return measured_flops(precision)


def measured_flops(precision: Precision) -> float:
    """The same, measured with the product that the model uses; draws no random number."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    if torch.cuda.is_available():
        matrix = torch.full((GPU_PROBE, GPU_PROBE), 0.5, device="cuda", dtype=kind)
        return 2 * GPU_PROBE**3 / _least_seconds(lambda: matrix @ matrix)
    layer = torch.nn.utils.skip_init(Linear, PROBE, PROBE, bias=False)
    inputs = torch.full((PROBE, PROBE), 0.5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        layer.weight.fill_(0.5)
        return 2 * PROBE**3 / _least_seconds(lambda: layer(inputs))


def _least_seconds(work: Callable[[], object]) -> float:
    """Of several turns."""
    seconds = []
    for _ in range(PROBES):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


BACKWARD = 2  # times the operations of a forward pass
RAPL = Path("/sys/class/powercap")
LISTED_RANKS = 64  # with more processes, only the largest peak memory is reported


@dataclass(frozen=True, slots=True)
class Work:
    """The work of one step in all processes; what is computed twice counts once."""

    samples: int
    tokens: float
    flops: float
    precision: Precision


def pretraining_work(model: ModelParams, params: PretrainParams) -> Work:
    """One step of pre-training."""
    drop, candidates = params.drop_rate, params.text_candidates
    forward = multimodal_flops(
        model, drop_rate=drop, merge_rate=params.merge_rate, convention="true"
    )
    forward += (candidates - 1) * text_flops(model.text, experts=model.experts, convention="true")
    tokens = candidates * model.text.words
    for name, section in signals_of(model).items():
        tokens += num_kept(num_signal_tokens(name, section), drop)
    batch = params.batch_size
    return Work(batch, batch * tokens, batch * (1 + BACKWARD) * forward, params.precision)


def finetuning_work(model: ModelParams, task: FinetuneTaskParams) -> Work:
    """One step of fine-tuning: a single tower."""
    drop, batch = task.drop_rate, task.batch_size
    name = tower_of(task.modality)
    section = SENSES[name].section(model)
    tokens = num_kept(num_signal_tokens(name, section), drop)
    forward = signal_flops(name, section, drop_rate=drop, experts=model.experts, convention="true")
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
        """The time of the body is left out of all speeds."""
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
        ranks = distributed.from_all(known)
        numbers = {
            "samples_per_second": steps_per_second * self._work.samples,
            "tokens_per_second": steps_per_second * self._work.tokens,
            "tflops_per_second": flops / 1e12,
            "mfu": flops / (self._peak * distributed.world_size()),
            "data_wait_share": max(wait for _, wait, _ in ranks),
            "peak_memory_gb": max(memory for memory, _, _ in ranks),
        }
        if 1 < len(ranks) <= LISTED_RANKS:
            numbers |= {f"peak_memory_gb.rank_{rank}": row[0] for rank, row in enumerate(ranks)}
        if joules is not None:
            numbers["power_watts"] = sum(row[2] for row in ranks) / elapsed
        self._start()
        return numbers


def energy_counter() -> Callable[[], float | None]:
    """A function that returns the joules used since its last call, or None without a counter.

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
