"""Several processes that act as one: who am I, and a gather that gradients pass through."""

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from vatt.config import MachineParams


def rank() -> int:
    """This process's number, 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's number among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def device() -> torch.device:
    """Where this process computes: its own GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def hardware() -> tuple[str, int]:
    """What is computed on, and how many of it: GPUs, one a process, or this machine's cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), world_size()
    return "CPU core", len(os.sched_getaffinity(0))


def peak_memory_gb() -> float:
    """The most memory this process ever held: the GPU's where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in kB


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        ctx.rows = part.shape[0]
        whole = part.new_empty(world_size() * part.shape[0], *part.shape[1:])
        dist.all_gather_into_tensor(whole, part.contiguous())
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Collectives read memory, not strides: a transposed gradient would arrive scrambled.
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather(part: Tensor) -> Tensor:  # (B / processes, ...) -> (B, ...)
    """Join the equal parts of all processes in rank order; gradients flow back to every part."""
    return _Gather.apply(part) if world_size() > 1 else part


def any_process(flag: bool) -> bool:
    """Whether the flag is up in any process; all of them get the same answer."""
    if world_size() == 1:
        return flag
    raised = torch.tensor([int(flag)], device=device())
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())


def from_rank_0(value: Any) -> Any:
    """The value that rank 0 has, in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def to_rank_0(value: Any) -> list[Any] | None:
    """The values of all processes, by rank, in rank 0; None in the others."""
    if world_size() == 1:
        return [value]
    box = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, box, dst=0)
    return box


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def process_group(machine: MachineParams) -> Iterator[None]:
    """Join the processes that a launcher started, or stand alone; leave in good order."""
    _stand_alone_unless_launched()
    torch.set_num_threads(machine.threads or _fair_threads())
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=30))
    try:
        yield
        # Processes that tear down while another still talks abort now and then.
        barrier()
    finally:
        dist.destroy_process_group()


def _fair_threads() -> int:
    cores = len(os.sched_getaffinity(0))
    return max(
        1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    )


def _stand_alone_unless_launched() -> None:
    if "RANK" in os.environ:
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(free_port())


def free_port() -> int:
    """A TCP port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
