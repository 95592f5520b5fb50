"""Seconds of a step by part: on a named GPU by formula, on the machine at hand from a trial."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol

from vatt.config import ModelParams, PretrainParams
from vatt.plan.memory import FP32, Counts, Setting, feature_values
from vatt.training.devices import Device
from vatt.training.telemetry import pretraining_work

# Of a GPU's peak: not measured by this project, which had none at hand. 0.4 is what large encoders
# commonly reach in bf16; small ones reach less.
GPU_SHARE = 0.4
FP32_SHARE = 0.5  # for the scores, which are plain products
MACHINE = 8  # GPUs in one
UPDATE_BYTES = 28  # a weight: gradient, weight, two moments read; the last three written
SCORE_TRAFFIC = 40  # bytes moved for each pair of clip and text, there and back
HOST_UPDATE = 50e9  # bytes a second of the processors' Adam, with offload


@dataclass(frozen=True, slots=True)
class Seconds:
    """A step's parts; the loader works beside the others."""

    compute: float
    loss: float
    update: float
    network: float
    loader: float  # 0.0: not known

    @property
    def busy(self) -> float:
        """All but the loader, one after another: what could overlap is not counted as doing so."""
        return self.compute + self.loss + self.update + self.network

    @property
    def total(self) -> float:
        """A step."""
        return max(self.busy, self.loader)

    @property
    def bound(self) -> str:
        """The part that must become faster first."""
        if self.loader >= self.busy:
            return "loader"
        names = [field.name for field in fields(self) if field.name != "loader"]
        return max(names, key=lambda name: float(getattr(self, name)))


class Speed(Protocol):
    """What tells the time of a step."""

    def __call__(self, setting: Setting) -> Seconds:
        """The seconds of a step in this setting."""


def gather_bytes(model: ModelParams, params: PretrainParams, processes: int) -> float:
    """What a process receives and sends of features and their gradients, in one step.

    All-gather of fp32 features: (n - 1) / n of all; their gradients by all-reduce: twice that.
    """
    whole = params.batch_size * feature_values(model, params.text_candidates) * FP32
    return 3 * (processes - 1) / processes * whole


def gradient_bytes(counts: Counts, setting: Setting, *, passes: int = 2) -> float:
    """What a process sends of gradients and weights: fp32, in a ring.

    All-reduce, or reduce-scatter and all-gather: 2 (n - 1) / n. Stage 3 gathers the weights anew
    in every pass of every micro-batch instead.
    """
    once = (setting.processes - 1) / setting.processes * counts.trained * FP32
    return once * (1 + passes) if setting.zero_stage == 3 else 2 * once


def network_seconds(
    device: Device, model: ModelParams, params: PretrainParams, counts: Counts, setting: Setting
) -> float:
    """Features and gradients to the other GPUs, offloaded weights from the main memory."""
    n, batch = setting.processes, params.batch_size
    rounds = -(-setting.rows(batch) // setting.at_once(batch))
    passes = (2 + int(setting.is_cached(batch))) * rounds
    sent = gather_bytes(model, params, n) + gradient_bytes(counts, setting, passes=passes)
    seconds = sent / (device.link if n <= MACHINE else device.network)
    if setting.offload == "all":
        seconds += passes * counts.trained * FP32 / device.host
    return seconds


@dataclass(frozen=True, slots=True)
class GpuSpeed:
    """A named GPU, by formula."""

    device: Device
    model: ModelParams
    params: PretrainParams
    counts: Counts
    loader: float | None = None  # samples a second of one machine, where it was measured
    share: float = GPU_SHARE  # of the peak, reached by the encoders

    def __call__(self, setting: Setting) -> Seconds:
        """Operations over a share of the peak, bytes over bandwidths."""
        params, device, n = self.params, self.device, setting.processes
        batch, rows = params.batch_size, setting.rows(params.batch_size)
        cached = setting.is_cached(batch)
        forward = pretraining_work(self.model, params).flops / batch / 3
        again = int(cached) + int(setting.activation_checkpointing)
        peak = device.bf16_flops if params.precision == "bf16" else device.fp32_flops
        own = self.counts.trained / (n if setting.zero_stage > 0 else 1)
        update = own * UPDATE_BYTES / device.bandwidth
        if setting.offload != "none":
            update = own * (UPDATE_BYTES / HOST_UPDATE + 2 * FP32 / device.host)
        machines = -(-n // MACHINE)
        return Seconds(
            compute=rows * forward * (3 + again) / (peak * self.share),
            loss=loss_flops(self.model, params) / (device.fp32_flops * FP32_SHARE)
            + batch**2 * (1 + params.text_candidates) * SCORE_TRAFFIC / device.bandwidth,
            update=update,
            network=network_seconds(device, self.model, params, self.counts, setting),
            loader=batch / (self.loader * machines) if self.loader else 0.0,
        )


@dataclass(frozen=True, slots=True)
class Trial:
    """Seconds of a step's parts in one process."""

    fixed: float  # of every step: the optimiser, starting and ending
    clip: float  # forward and backward
    cached_clip: float  # forward twice, backward once
    losses: dict[int, float]  # heads and loss, by clips of the global batch

    def step(self, batch_size: int, *, rows: int, cached: bool) -> float:
        """A step of `rows` clips of the global batch, without network and loader."""
        clip = self.cached_clip if cached else self.clip
        return self.fixed + rows * clip + self.loss(batch_size)

    def loss(self, batch_size: int) -> float:
        """Heads and loss; the loss compares every clip with every other."""
        nearest = min(self.losses, key=lambda size: abs(size - batch_size))
        return self.losses[nearest] * (batch_size / nearest) ** 2


@dataclass(frozen=True, slots=True)
class TrialSpeed:
    """This machine, from its trial."""

    trial: Trial
    params: PretrainParams
    loader: float | None = None
    network: Callable[[Setting], float] = lambda _: 0.0  # seconds, where they can be told

    def __call__(self, setting: Setting) -> Seconds:
        """Clips times a clip's seconds, and what every step costs."""
        batch, trial = self.params.batch_size, self.trial
        rows, cached = setting.rows(batch), setting.is_cached(batch)
        clip = trial.cached_clip if cached else trial.clip
        if setting.activation_checkpointing:
            clip += trial.cached_clip - trial.clip  # a forward pass more
        return Seconds(
            compute=rows * clip,
            loss=trial.loss(batch),
            update=trial.fixed,
            network=self.network(setting),
            loader=batch / self.loader if self.loader else 0.0,
        )


def loss_flops(model: ModelParams, params: PretrainParams) -> float:
    """Heads and scores of the whole batch, which every process computes.

    Scores of all pairs in both directions: forward, again where blocks are, and backward.
    """
    from vatt.model.assembly import feature_dims

    batch, candidates, va, vt = (
        params.batch_size, params.text_candidates, model.va_dim, model.vt_dim,
    )  # fmt: skip
    dims = feature_dims(model)
    heads = (dims["video"] + va + vt + dims["audio"]) * va + candidates * dims["text"] * vt
    return 3 * 2.0 * batch * heads + 4 * 2 * 2.0 * batch**2 * (va + candidates * vt)
