"""Any number of processes from one command: a stage starts itself again under DeepSpeed."""

import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

from vatt.config import MachineParams
from vatt.training.distributed import device, free_port
from vatt.training.stopping import STOP_SIGNALS

LAUNCHED = "VATT_LAUNCHED"  # set in the processes that `launch` started: their parent holds locks

log = logging.getLogger(__name__)


def launch(module: str, machine: MachineParams, *arguments: str) -> int | None:
    """Run `python -m module arguments` in `machine.processes` processes and return their exit code.

    None when there is nothing to start: one process is enough, or this is one of them already,
    started by this function, by torchrun or by Slurm. Stop signals are passed on to each process;
    all of them save and end with 75.
    """
    if "RANK" in os.environ or (machine.processes == 1 and not _names_machines(machine)):
        return None
    command = [*launch_line(module, machine), *arguments]
    log.warning("launch: %s", shlex.join(command))
    told = {LAUNCHED: "1", "DS_ACCELERATOR": device().type}
    launcher = subprocess.Popen(command, env=os.environ | told)
    with _passing_on(launcher.pid):
        return launcher.wait()


def launch_line(module: str, machine: MachineParams) -> list[str]:
    """The command that `launch` runs; later launcher arguments win over ours."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--module", "--no_local_rank"]
    if not _names_machines(machine):
        command += ["--num_gpus", str(machine.processes)]
    command += ["--master_port", str(free_port()), "--quiet", *machine.launcher_arguments]
    return [*command, module]


def _names_machines(machine: MachineParams) -> bool:
    """Whether the launcher's arguments say where to start how many processes."""
    given = {argument.partition("=")[0] for argument in machine.launcher_arguments}
    return bool(given & {"--hostfile", "-H", "--include", "-i", "--num_nodes", "--num_gpus"})


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
