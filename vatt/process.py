"""A stage's process: its rank under Slurm, whether it lives, and how it ends.

A stage leaves an exit code and one clear message in a file: DVC answers 255 for any failed stage,
and `vattctl` reads the file and exits with the stage's own code.
"""

import errno
import json
import logging
import os
import re
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import psutil

from vatt.errors import MachineError, Stopped, VattError
from vatt.files import atomic_write, lock

FOLDER = Path(".vattctl")  # in the project's root; locks, the last outcome, the last traceback
OUTCOME = FOLDER / "outcome.json"
TRACEBACK = FOLDER / "traceback.txt"
DEBUG_VARIABLE = "VATTCTL_DEBUG"  # set by `vattctl --debug`
VERBOSE_VARIABLE = "VATTCTL_VERBOSE"  # set by `vattctl --verbose`
LAUNCHED_VARIABLE = "VATT_LAUNCHED"  # set by vatt.training.distributed for the processes it starts

BUG = 101
INTERRUPTED = 130


def run_stage(stage: str, main: Callable[[], None]) -> None:
    """Run a stage's main alone (a second writer is refused), then exit with its code."""
    sys.exit(_run(stage, main))


def _run(stage: str, main: Callable[[], None]) -> int:
    level = logging.INFO if os.environ.get(VERBOSE_VARIABLE) else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s")
    for number in (signal.SIGTERM, signal.SIGUSR1):  # training replaces these by its own
        signal.signal(number, _stop)
    join_step()
    try:
        if is_first_process() and LAUNCHED_VARIABLE not in os.environ:
            with lock(FOLDER / f"{stage}.lock"):
                main()
        else:  # whoever launched this process holds the lock
            main()
    except VattError as error:
        return _leave_known(stage, error)
    except KeyboardInterrupt:
        return _leave(stage, INTERRUPTED, "interrupted; run it again to continue")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = MachineError(
                f"the disk is full: {error.filename or Path.cwd()}",
                hint="free some space, then run it again: it continues where it stopped",
            )
            return _leave_known(stage, full)
        return _leave_bug(stage, error)
    except Exception as error:  # noqa: BLE001 - the last line of defence, with its traceback kept
        stopped = _stop_under(error)
        return _leave_bug(stage, error) if stopped is None else _leave_known(stage, stopped)
    return 0


def is_first_process() -> bool:
    """True in the process that speaks for the stage: rank 0, or the one a launcher grew from."""
    return int(os.environ.get("RANK", "0")) == 0


def read_outcome(project: Path = Path()) -> tuple[int, str] | None:
    """The last failed stage's code and message; None when no stage has left any."""
    try:
        outcome = json.loads((project / OUTCOME).read_text(encoding="utf-8"))
        return int(outcome["code"]), str(outcome["message"])
    except (OSError, ValueError, KeyError):
        return None


def _stop(signum: int, frame: FrameType | None) -> None:
    """What is on disk is complete at any moment, so a stage without steps just stops."""
    raise Stopped("stopped by a signal", hint="run it again: it continues where it stopped")


def _leave_known(stage: str, error: VattError) -> int:
    return _leave(stage, error.exit_code, str(error))


def _stop_under(error: BaseException) -> Stopped | None:
    """The stop that a library took for a failure of its own, as MLflow's database does."""
    under: BaseException | None = error
    while under is not None and not isinstance(under, Stopped):
        under = under.__cause__ or under.__context__
    return under


def _leave_bug(stage: str, error: BaseException) -> int:
    text = "".join(traceback.format_exception(error))
    if os.environ.get(DEBUG_VARIABLE):
        sys.stderr.write(text)
    else:
        FOLDER.mkdir(exist_ok=True)
        TRACEBACK.write_text(text, encoding="utf-8")
    summary = traceback.format_exception_only(error)[-1].strip()
    return _leave(
        stage,
        BUG,
        f"a fault of vattctl's own: {summary}\n  -> please report it with {TRACEBACK}; "
        "--debug shows the traceback",
    )


def _leave(stage: str, code: int, message: str) -> int:
    if is_first_process():
        sys.stderr.write(f"{stage}: {message}\n")
        try:
            with atomic_write(OUTCOME) as path:
                path.write_text(json.dumps({"stage": stage, "code": code, "message": message}))
        except OSError:  # a full disk must not hide the message above
            return code
    return code


FIRST_PORT, PORTS = 20_000, 20_000


def join_step() -> None:
    """Inside `srun` with several tasks, set the variables by which torch's processes find another.

    What is set already stays: MASTER_ADDR and MASTER_PORT may be chosen by the job's script.
    """
    step = os.environ
    if "RANK" in step or int(step.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    job = int(step.get("SLURM_JOB_ID", "0"))
    told = {
        "RANK": step["SLURM_PROCID"],
        "LOCAL_RANK": step["SLURM_LOCALID"],
        "WORLD_SIZE": step["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": first_count(step.get("SLURM_STEP_TASKS_PER_NODE", "1")),
        "MASTER_ADDR": first_host(step["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(FIRST_PORT + job % PORTS),
    }
    for name, value in told.items():
        step.setdefault(name, value)


def first_host(nodes: str) -> str:
    """The first machine of a list such as `gpu[07-12,15],login1`."""
    found = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    assert found is not None, f"no machine in {nodes!r}"
    return "".join(part or "" for part in found.groups())


def first_count(tasks: str) -> str:
    """Tasks on the first machine of `4(x2),1`."""
    return re.split(r"[(,]", tasks)[0]


CLOCK_SECONDS = 2.0  # a start time is derived from the boot time, which may be corrected


def myself() -> str:
    """A name for this process that no other process ever has."""
    process = psutil.Process()
    return json.dumps([socket.gethostname(), process.pid, round(process.create_time(), 2)])


def is_dead(name: str) -> bool:
    """Whether the process so named is surely gone; of another machine's nothing is known."""
    try:
        host, pid, started = json.loads(name)
    except ValueError:
        return False
    if host != socket.gethostname():
        return False
    try:
        process = psutil.Process(pid)
        return (
            process.status() == psutil.STATUS_ZOMBIE
            or abs(process.create_time() - started) > CLOCK_SECONDS
        )
    except psutil.NoSuchProcess:
        return True
