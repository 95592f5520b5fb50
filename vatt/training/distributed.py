"""Several processes that act as one: starting and stopping them, ranks, and gathers.

A stage starts itself again under DeepSpeed's launcher. Ctrl-C, and SIGTERM and SIGUSR1, which job
queues send, stop a training at the end of a step. A state is written in equal shares, one for each
process, and any number of processes at any ZeRO stage can read it.
"""

import logging
import os
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from vatt.config import MachineParams
from vatt.errors import REPEAT_SECONDS, Interrupted, Stopped
from vatt.process import check_hostfile


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
    """The kind of device and its number: one GPU for each process, or the cores of this machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), world_size()
    return "CPU core", len(os.sched_getaffinity(0))


def peak_memory_gb() -> float:
    """The peak memory of this process: GPU memory where there is a GPU, else resident memory."""
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


def gather_flags(part: Tensor) -> Tensor:  # (B / processes, ...) bool -> (B, ...)
    """`gather` for what is true or false; not every backend sends bools."""
    return gather(part.to(torch.uint8)).bool() if world_size() > 1 else part


def any_process(flag: bool) -> Tensor | bool:
    """Whether the flag is set in any process; the answer is a tensor, so that no process waits."""
    if world_size() == 1:
        return flag
    raised = torch.full((), float(flag), device=device())
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return raised


def from_all(value: Any) -> list[Any]:
    """The values of all processes, by rank, in every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


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
    """Join the processes that a launcher started, or run alone; leave together at the end."""
    _stand_alone_unless_launched()
    torch.set_num_threads(machine.threads or _fair_threads())
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=30))
    try:
        yield
        # A process that leaves while another still communicates aborts now and then.
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
    """A free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """True once this process was asked to stop, or the process that started it has ended."""

    def __init__(self) -> None:
        self.asked = False
        self.interrupted: float | None = None  # when Ctrl-C came first
        self.parent = os.getppid()

    def __bool__(self) -> bool:
        return self.asked or os.getppid() != self.parent

    def note(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: remember, so that the running step can end; another Ctrl-C ends it."""
        if signum == signal.SIGINT:
            now = time.monotonic()
            self.interrupted = self.interrupted or now
            if now - self.interrupted > REPEAT_SECONDS:
                raise KeyboardInterrupt
        self.asked = True


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn the stop signals and Ctrl-C into a flag while the body runs."""
    request = StopRequest()
    numbers = (*STOP_SIGNALS, signal.SIGINT)
    before = {number: signal.signal(number, request.note) for number in numbers}
    try:
        yield request
    except Stopped as stop:
        if request.interrupted is None:
            raise
        raise Interrupted(stop.problem, hint=stop.hint) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


LAUNCHED = "VATT_LAUNCHED"  # set in the processes that `launch` started: their parent holds locks

log = logging.getLogger(__name__)


def launch(module: str, machine: MachineParams, *arguments: str) -> int | None:
    """Run `python -m module arguments` in `machine.processes` processes and return their exit code.

    None when there is nothing to start: one process is enough, or this is one of them already,
    started by this function, by torchrun or by Slurm. Stop signals are passed on to each process;
    all of them save and end with 75.
    """
    if "RANK" in os.environ or (machine.processes == 1 and not machine.launcher_counts):
        return None
    command = [*launch_line(module, machine), *arguments]
    log.warning("launch: %s", shlex.join(command))
    more = {LAUNCHED: "1", "DS_ACCELERATOR": device().type}
    launcher = subprocess.Popen(command, env=os.environ | more)
    with _passing_on(launcher.pid):
        return launcher.wait()


def launch_line(module: str, machine: MachineParams) -> list[str]:
    """The command that `launch` runs; later launcher arguments win over ours."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--module", "--no_local_rank"]
    check_hostfile(machine.launcher_arguments)
    if not machine.launcher_counts:
        command += ["--num_gpus", str(machine.processes)]
    command += ["--master_port", str(free_port()), "--quiet", *machine.launcher_arguments]
    return [*command, module]


@contextmanager
def _passing_on(launcher: int) -> Iterator[None]:
    def pass_on(signum: int, frame: FrameType | None) -> None:
        # Not to the launcher: it would kill its processes before they have saved.
        for process in _workers(launcher):
            process.send_signal(signum)

    numbers = (*STOP_SIGNALS, signal.SIGINT)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _workers(launcher: int) -> list[psutil.Process]:
    """The processes that train: children of DeepSpeed's per-machine launcher."""
    workers = []
    for process in psutil.Process(launcher).children(recursive=True):
        try:
            parent = process.parent()
            if parent is not None and "deepspeed.launcher.launch" in parent.cmdline():
                workers.append(process)
        except psutil.Error:  # it ended while we looked
            continue
    return workers


TensorState = dict[str, Tensor]  # "value", and for a trained weight its moments by name


def write_share(folder: Path, entries: Iterable[tuple[str, TensorState]], *, updates: int) -> None:
    """Write this process's share; `entries`, equal in all processes, may be read collectively."""
    share = {
        name: {key: tensor.detach().to("cpu", copy=True) for key, tensor in entry.items()}
        for number, (name, entry) in enumerate(entries)
        if number % world_size() == rank()
    }
    path = folder / f"share-{rank():05d}.pt"
    torch.save({"updates": updates, "entries": share}, path)


def read_shares(folder: Path) -> tuple[int, dict[str, TensorState]]:
    """How many updates were made, and every tensor by name; read from disk as it is used."""
    updates = 0
    entries: dict[str, TensorState] = {}
    for path in sorted(folder.glob("share-*.pt")):
        share = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        updates = share["updates"]
        entries |= share["entries"]
    return updates, entries
