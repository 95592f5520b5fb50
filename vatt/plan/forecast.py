"""What a pre-training will take: memory, time, energy; and the cheapest way to compute it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vatt.config import Params
from vatt.data.loader import AHEAD
from vatt.errors import SettingsError
from vatt.plan.memory import Counts, Memory, Setting, batch_bytes, memory
from vatt.plan.speed import Seconds, Speed
from vatt.training.devices import GPUS, Device, named_like

USABLE = 0.92  # of a device's memory: allocators leave gaps
HOST_WATTS = 100.0  # of processors, memory and fans, for each GPU
CPU_WATTS = 100.0  # of a machine without GPUs, where nobody counts
HOURS, DAYS = 3600.0, 86400.0
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Place:
    """Where it would run."""

    name: str
    memory: float  # bytes for each process
    watts: float  # for each process
    on_gpu: bool
    device: Device | None = None  # the data sheet, where there is one


@dataclass(frozen=True, slots=True)
class Forecast:
    """One setting and what it takes."""

    setting: Setting
    memory: Memory
    limit: float  # bytes
    seconds: Seconds
    steps: int
    batch_size: int
    watts: float

    @property
    def fits(self) -> bool:
        """Whether memory suffices."""
        return self.memory.total <= self.limit

    @property
    def samples_per_second(self) -> float:
        """Clips, all processes together."""
        return self.batch_size / self.seconds.total

    @property
    def days(self) -> float:
        """From the first step to the last."""
        return self.steps * self.seconds.total / DAYS

    @property
    def device_hours(self) -> float:
        """Hours of all devices together."""
        return self.days * 24 * self.setting.processes

    @property
    def kwh(self) -> float:
        """At the boards' limit and a share for the machine around them."""
        return self.device_hours * self.watts / 1000


def named_place(name: str) -> Place:
    """A GPU by its name in the table."""
    if name not in GPUS:
        raise SettingsError(f"no device '{name}'", hint=f"there are: {', '.join(GPUS)}")
    device = GPUS[name]
    return Place(name, device.memory_gb * GIB, device.watts + HOST_WATTS, True, device)


def this_place(params: Params) -> Place:
    """The machine at hand: its GPU, or its main memory shared by the processes."""
    import psutil
    import torch

    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        known = _sheet(facts.name, facts.total_memory)
        watts = known.watts + HOST_WATTS if known else CPU_WATTS
        return Place(facts.name, facts.total_memory, watts, True, known)
    room = psutil.virtual_memory().total - params.machine.cache_gb * 1e9
    processes = params.machine.processes
    return Place("this machine's CPU", room / processes, CPU_WATTS / processes, False)


def _sheet(name: str, memory_bytes: int) -> Device | None:
    return named_like(name, memory_bytes / GIB)


def as_set(params: Params, place: Place) -> Setting:
    """The setting that params.yaml asks for."""
    machine = params.machine
    return Setting(
        processes=machine.processes,
        micro_batch_size=machine.micro_batch_size,
        zero_stage=machine.zero_stage,
        offload=machine.offload,
        activation_checkpointing=machine.activation_checkpointing,
        on_gpu=place.on_gpu,
    )


def forecast_memory(
    params: Params, setting: Setting, place: Place, counts: Counts | None = None
) -> Memory:
    """Memory with as many batches made ahead as the settings allow."""
    one = batch_bytes(params.model, params.pretrain, setting)
    ahead = max(1, min(AHEAD, int(params.machine.prefetch_gb * 1e9 / one)))
    batches = 1 if place.on_gpu else 1 + ahead  # those made ahead wait in main memory
    return memory(params.model, params.pretrain, setting, counts, batches=batches)


def forecast(
    params: Params, setting: Setting, place: Place, speed: Speed, counts: Counts | None = None
) -> Forecast:
    """All of it for one setting."""
    return Forecast(
        setting=setting,
        memory=forecast_memory(params, setting, place, counts),
        limit=place.memory * USABLE,
        seconds=speed(setting),
        steps=params.pretrain.steps,
        batch_size=params.pretrain.batch_size,
        watts=place.watts,
    )


def largest_micro_batch(
    params: Params, setting: Setting, place: Place, counts: Counts
) -> int | None:
    """The most clips that a process can encode at a time; None when not even one fits."""

    def fits(size: int) -> bool:
        tried = replace(setting, micro_batch_size=size)
        return forecast_memory(params, tried, place, counts).total <= place.memory * USABLE

    if not fits(1):
        return None
    least, most = 1, setting.rows(params.pretrain.batch_size)
    while least < most:  # memory grows with the micro-batch
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def cheapest(
    params: Params, processes: int, place: Place, speed: Speed, counts: Counts
) -> Forecast | None:
    """The setting that fits and takes the least time; of equal ones the plainest."""
    tried = (
        forecast(params, setting, place, speed, counts)
        for setting in settings(params.pretrain.batch_size, processes, place)
    )
    fitting = [one for one in tried if one.fits]
    return min(fitting, key=lambda one: one.seconds.total, default=None)


def settings(batch_size: int, processes: int, place: Place) -> Iterator[Setting]:
    """All ways to compute a batch, the plainest first."""
    ways = [(1, "none")]
    if place.on_gpu:
        ways += [(2, "none"), (3, "none"), (2, "optimizer"), (3, "all")]
    rows = -(-batch_size // processes)
    sizes: list[int | None] = [None]
    sizes += [2**power for power in reversed(range(rows.bit_length())) if 2**power < rows]
    for zero_stage, offload in ways:
        for checkpointing in (False, True):
            for micro in sizes:
                yield Setting(processes, micro, zero_stage, offload, checkpointing, place.on_gpu)
