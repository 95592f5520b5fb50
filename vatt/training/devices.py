"""What a device can do at most: makers' figures by name, or a short product measured here."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from vatt.model.operators import Linear

Precision = Literal["fp32", "bf16"]

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
