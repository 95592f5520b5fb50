"""Forecasts of a pre-training (time, memory, energy) and the cheapest way to compute it.

The seconds of a step come from a formula for a named GPU, or from a trial on this machine.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Protocol

from vatt.config import MachineParams, ModelParams, Params, PretrainParams
from vatt.data.loading.loader import AHEAD
from vatt.errors import SettingsError
from vatt.flops import clip_work
from vatt.plan.memory import (
    FP32,
    BatchSettings,
    Counts,
    MemoryPeak,
    batch_bytes,
    count,
    feature_values,
    memory,
)
from vatt.training.telemetry import GPUS, Device, named_like, pretraining_work

# What the parts of a training step reach on a GPU in bf16, relative to the data sheet: from the
# profile of a step of 64 clips of VATT-MBS on an H200 (docs/benchmarks.md).
DENSE_SHARE = 0.82  # of the peak, by the products of linear layers
ATTENTION_SHARE = 0.17  # of the peak, by flash attention, forward and backward
EAGER_BYTES = 450  # moved for each number of the residual stream in a block: norms, GELU, casts ...
COMPILED_BYTES = 300  # the same when torch.compile fuses them
INPUT_BYTES = 450  # moved for each number of the kept patches: colours and scaling
COMMON_SHARE = 0.35  # of the peak, in whole steps of such models; for other work than steps
FP32_SHARE = 0.5  # of the fp32 peak, by plain products
MACHINE = 8  # GPUs per machine
UPDATE_BYTES = 28  # per weight: gradient, weight and two moments are read, the last three written
SCORE_TRAFFIC = 40  # bytes moved for each pair of clip and text, forward and backward
HOST_UPDATE = 50e9  # bytes per second of Adam on the CPU, with offload


@dataclass(frozen=True, slots=True)
class Seconds:
    """The parts of a step; the loader works in parallel with the others."""

    compute: float
    loss: float
    update: float
    network: float
    loader: float  # 0.0: unknown

    @property
    def busy(self) -> float:
        """All parts but the loader, one after another; overlap is not counted."""
        return self.compute + self.loss + self.update + self.network

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return max(self.busy, self.loader)

    @property
    def bound(self) -> str:
        """The part that limits the speed."""
        if self.loader >= self.busy:
            return "loader"
        names = [field.name for field in fields(self) if field.name != "loader"]
        return max(names, key=lambda name: float(getattr(self, name)))


class Speed(Protocol):
    """Anything that knows the time of a step."""

    def __call__(self, setting: BatchSettings) -> Seconds:
        """The seconds of a step in this setting."""


def gather_bytes(model: ModelParams, params: PretrainParams, processes: int) -> float:
    """Bytes of features and their gradients that a process exchanges in one step.

    All-gather of fp32 features: (n - 1) / n of all; all-reduce of their gradients: twice that.
    """
    features = params.batch_size * feature_values(model, params.text_candidates) * FP32
    return 3 * (processes - 1) / processes * features


def gradient_bytes(counts: Counts, setting: BatchSettings, *, passes: int = 2) -> float:
    """Bytes of gradients and weights that a process sends: fp32, in a ring.

    All-reduce, or reduce-scatter and all-gather: 2 (n - 1) / n. Stage 3 gathers the weights again
    in every pass of every micro-batch instead.
    """
    once = (setting.processes - 1) / setting.processes * counts.trained * FP32
    return once * (1 + passes) if setting.zero_stage == 3 else 2 * once


def network_seconds(
    device: Device,
    model: ModelParams,
    params: PretrainParams,
    counts: Counts,
    setting: BatchSettings,
) -> float:
    """Seconds for features and gradients between GPUs, and for offloaded weights from memory."""
    n, batch = setting.processes, params.batch_size
    passes = setting.passes(batch)
    sent = gather_bytes(model, params, n) + gradient_bytes(counts, setting, passes=passes)
    seconds = sent / (device.link if n <= MACHINE else device.network)
    if setting.offload == "all":
        seconds += passes * counts.trained * FP32 / device.host
    return seconds


@dataclass(frozen=True, slots=True)
class GpuSpeed:
    """The speed of a named GPU, by formula."""

    device: Device
    model: ModelParams
    params: PretrainParams
    counts: Counts
    loader: float | None = None  # samples per second of one machine, if measured
    share: float | None = None  # of the peak that the encoders reach; None: counted
    compiled: bool = True  # except at ZeRO stage 3, where weights are gathered and freed

    def __call__(self, setting: BatchSettings) -> Seconds:
        """Operations divided by the speed that they reach, bytes divided by bandwidths."""
        params, device, n = self.params, self.device, setting.processes
        batch, rows = params.batch_size, setting.rows(params.batch_size)
        own = self.counts.trained / (n if setting.zero_stage > 0 else 1)
        update = own * UPDATE_BYTES / device.bandwidth
        if setting.offload != "none":
            update = own * (UPDATE_BYTES / HOST_UPDATE + 2 * FP32 / device.host)
        machines = -(-n // MACHINE)
        return Seconds(
            compute=rows * self.clip_seconds(setting),
            loss=loss_flops(self.model, params) / (device.fp32_flops * FP32_SHARE)
            + batch**2 * (1 + params.text_candidates) * SCORE_TRAFFIC / device.bandwidth,
            update=update,
            network=network_seconds(device, self.model, params, self.counts, setting),
            loader=batch / (self.loader * machines) if self.loader else 0.0,
        )

    def clip_seconds(self, setting: BatchSettings) -> float:
        """One clip through the encoders, there and back; again where activations are not kept."""
        params, device = self.params, self.device
        again = setting.repeated(params.batch_size) + int(setting.activation_checkpointing)
        passes = 3 + again  # the way back is two forward passes
        if self.share is not None:
            peak = device.bf16_flops if params.precision == "bf16" else device.fp32_flops
            forward = pretraining_work(self.model, params).flops / params.batch_size / 3
            return passes * forward / (peak * self.share)
        work = clip_work(
            self.model,
            drop_rate=params.drop_rate,
            candidates=params.text_candidates,
            merge_rate=params.merge_rate,
        ).times(passes)
        if params.precision == "bf16":
            products = work.dense / DENSE_SHARE + work.attention / ATTENTION_SHARE
            products /= device.bf16_flops
        else:
            products = (work.dense + work.attention) / (device.fp32_flops * FP32_SHARE)
        fused = self.compiled and setting.zero_stage < 3
        moved = work.values / 3 * (COMPILED_BYTES if fused else EAGER_BYTES)
        kept = (1 - params.drop_rate) * video_values(self.model)
        moved += (1 + again) * kept * INPUT_BYTES
        return products + moved / device.bandwidth


def video_values(model: ModelParams) -> int:
    """The numbers of one clip's pictures."""
    size = model.video.frame_size
    height, width = (size, size) if isinstance(size, int) else size
    return model.video.frames * height * width * 3


@dataclass(frozen=True, slots=True)
class Trial:
    """Measured seconds of the parts of a step in one process."""

    fixed: float  # in every step: the optimiser, start and end
    clip: float  # forward and backward
    cached_clip: float  # forward twice, backward once
    losses: dict[int, float]  # heads and loss, by clips of the global batch

    def step(self, batch_size: int, *, rows: int, cached: bool) -> float:
        """A step with `rows` clips of the global batch, without network and loader."""
        clip = self.cached_clip if cached else self.clip
        return self.fixed + rows * clip + self.loss(batch_size)

    def loss(self, batch_size: int) -> float:
        """Heads and loss; the loss compares every clip with all others."""
        nearest = min(self.losses, key=lambda size: abs(size - batch_size))
        return self.losses[nearest] * (batch_size / nearest) ** 2


@dataclass(frozen=True, slots=True)
class TrialSpeed:
    """The speed of this machine, from its trial."""

    trial: Trial
    params: PretrainParams
    loader: float | None = None
    network: Callable[[BatchSettings], float] = lambda _: 0.0  # seconds, if known

    def __call__(self, setting: BatchSettings) -> Seconds:
        """The seconds of all clips and the fixed part of a step."""
        batch, trial = self.params.batch_size, self.trial
        rows, again = setting.rows(batch), trial.cached_clip - trial.clip
        clip = trial.clip + again * setting.repeated(batch)
        if setting.activation_checkpointing:
            clip += again
        return Seconds(
            compute=rows * clip,
            loss=trial.loss(batch),
            update=trial.fixed,
            network=self.network(setting),
            loader=batch / self.loader if self.loader else 0.0,
        )


def loss_flops(model: ModelParams, params: PretrainParams) -> float:
    """Operations of heads and scores for the global batch, which every process computes.

    Scores of all pairs in both directions: forward, again for blocks, and backward.
    """
    from vatt.checkpoint import feature_dims

    batch, candidates, va, vt = (
        params.batch_size, params.text_candidates, model.va_dim, model.vt_dim,
    )  # fmt: skip
    dims = feature_dims(model)
    signals = sum(dims[name] for name in dims if name != "text")
    heads = (signals + va + vt) * va + candidates * dims["text"] * vt
    pairs = len(dims) - 2  # NCE of video with audio and every further sense
    return 3 * 2.0 * batch * heads + 4 * 2 * 2.0 * batch**2 * (pairs * va + candidates * vt)


USABLE = 0.92  # share of a device's memory: allocators leave gaps
HOST_WATTS = 100.0  # of processors, memory and fans, for each GPU
CPU_WATTS = 100.0  # assumed for a machine without GPUs
HOURS, DAYS = 3600.0, 86400.0
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Place:
    """The machine of a forecast."""

    name: str
    memory: float  # bytes for each process
    watts: float  # for each process
    on_gpu: bool
    device: Device | None = None  # its data sheet, if there is one


@dataclass(frozen=True, slots=True)
class Forecast:
    """A setting with its memory, time and energy."""

    setting: BatchSettings
    memory: MemoryPeak
    limit: float  # bytes
    seconds: Seconds
    steps: int
    batch_size: int
    watts: float

    @property
    def fits(self) -> bool:
        """Whether the memory is enough."""
        return self.memory.total <= self.limit

    @property
    def samples_per_second(self) -> float:
        """Clips per second of all processes together."""
        return self.batch_size / self.seconds.total

    @property
    def days(self) -> float:
        """Days from the first step to the last."""
        return self.steps * self.seconds.total / DAYS

    @property
    def device_hours(self) -> float:
        """Hours of all devices together."""
        return self.days * 24 * self.setting.processes

    @property
    def kwh(self) -> float:
        """Energy at the power limit of the boards, plus a share for the rest of the machine."""
        return self.device_hours * self.watts / 1000


def named_place(name: str) -> Place:
    """A GPU by its name in the table."""
    if name not in GPUS:
        raise SettingsError(f"unknown device '{name}'", hint=f"known devices: {', '.join(GPUS)}")
    device = GPUS[name]
    return Place(name, device.memory_gb * GIB, device.watts + HOST_WATTS, True, device)


def this_place(params: Params) -> Place:
    """This machine: its GPU, or its main memory divided by the processes."""
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


def as_set(params: Params, place: Place, counts: Counts | None = None) -> BatchSettings:
    """The setting in params.yaml; `auto` becomes the largest micro-batch that fits."""
    size = params.machine.micro_batch_size
    setting = plain_setting(params.machine, place)
    if size != "auto":
        return replace(setting, micro_batch_size=size)
    counts = counts or count(params.model)

    def fits(tried: BatchSettings) -> bool:
        return forecast_memory(params, tried, place, counts).total <= place.memory * USABLE

    return widest(setting, params.pretrain.batch_size, fits) or replace(setting, micro_batch_size=1)


def plain_setting(machine: MachineParams, place: Place) -> BatchSettings:
    """The setting without micro-batches."""
    return BatchSettings(
        processes=machine.processes,
        zero_stage=machine.zero_stage,
        offload=machine.offload,
        activation_checkpointing=machine.activation_checkpointing,
        on_gpu=place.on_gpu,
    )


def widest(
    setting: BatchSettings,
    batch_size: int,
    fits: Callable[[BatchSettings], bool],
    most: int | None = None,
) -> BatchSettings | None:
    """The largest micro-batch that fits, of at most so many clips, and as many kept as fit.

    None if not even one clip fits; no micro-batches if all clips fit at once.
    """
    rows = setting.rows(batch_size)
    size = _largest(
        lambda tried: fits(replace(setting, micro_batch_size=tried)), min(most or rows, rows)
    )
    if size in (0, rows):
        return replace(setting, micro_batch_size=None) if size else None
    setting = replace(setting, micro_batch_size=size)
    setting = replace(setting, micro_batch_size=setting.at_once(batch_size))
    number = len(setting.micro_batches(batch_size))
    kept = _largest(lambda tried: fits(replace(setting, kept_micro_batches=tried)), number - 1)
    return replace(setting, kept_micro_batches=max(1, kept))


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, if all smaller ones do; 0 if 1 does not."""
    least = 0
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def forecast_memory(
    params: Params, setting: BatchSettings, place: Place, counts: Counts | None = None
) -> MemoryPeak:
    """Memory with as many batches prepared in advance as the settings allow."""
    one = batch_bytes(params.model, params.pretrain, setting)
    ahead = max(1, min(AHEAD, int(params.machine.prefetch_gb * 1e9 / one)))
    if place.on_gpu:  # most of them wait in main memory
        from vatt.training.loop import PREFETCHED_SHARE

        ahead = int(one <= place.memory * PREFETCHED_SHARE)
    return memory(params.model, params.pretrain, setting, counts, batches=1 + ahead)


def forecast(
    params: Params, setting: BatchSettings, place: Place, speed: Speed, counts: Counts | None = None
) -> Forecast:
    """The forecast for one setting."""
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
    params: Params, setting: BatchSettings, place: Place, counts: Counts
) -> int | None:
    """The most clips that a process can encode at once; None if not even one fits."""

    def fits(size: int) -> bool:
        tried = replace(setting, micro_batch_size=size)
        return forecast_memory(params, tried, place, counts).total <= place.memory * USABLE

    return _largest(fits, setting.rows(params.pretrain.batch_size)) or None


def cheapest(
    params: Params, processes: int, place: Place, speed: Speed, counts: Counts
) -> Forecast | None:
    """The setting that fits and takes the least time; of equal ones the simplest."""
    tried = (
        forecast(params, setting, place, speed, counts)
        for setting in settings(params.pretrain.batch_size, processes, place)
    )
    fitting = [one for one in tried if one.fits]
    return min(fitting, key=lambda one: one.seconds.total, default=None)


def settings(batch_size: int, processes: int, place: Place) -> Iterator[BatchSettings]:
    """All ways to compute a batch, the simplest first."""
    ways = [(1, "none")]
    if place.on_gpu:
        ways += [(2, "none"), (3, "none"), (2, "optimizer"), (3, "all")]
    rows = -(-batch_size // processes)
    sizes: list[int | None] = [None]
    sizes += [2**power for power in reversed(range(rows.bit_length())) if 2**power < rows]
    for zero_stage, offload in ways:
        for checkpointing in (False, True):
            for micro in sizes:
                yield BatchSettings(
                    processes, micro, 1, zero_stage, offload, checkpointing, place.on_gpu
                )
