"""A stage's process: its rank under Slurm, whether it lives, and how it ends.

DVC ends with 255 for every failure of any stage. So a stage leaves its exit code and one clear
message in a file; `vattctl` prints the message and ends with the code.
"""

import contextlib
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from vatt.errors import (
    BUG,
    Interrupted,
    SettingsError,
    Stopped,
    VattError,
    machine_error,
    redact,
    redact_logs,
    stop,
)
from vatt.files import UNREADABLE, atomic_write, lock

FOLDER = Path(".vattctl")  # in the project's root; locks, the last outcome, the last traceback
OUTCOME = FOLDER / "outcome.json"
TRACEBACK = FOLDER / "traceback.txt"
MARKS = FOLDER / "code"  # in a project without a clone: the installed code of each stage
SETTINGS_LOCK = FOLDER / "settings.lock"  # shared by what reads params.yaml while it runs
DEBUG_VARIABLE = "VATTCTL_DEBUG"  # set by `vattctl --debug`
RUN_NAME_VARIABLE = "VATTCTL_RUN_NAME"  # set by `--name`: the pipeline's name in MLflow
VERBOSE_VARIABLE = "VATTCTL_VERBOSE"  # set by `vattctl --verbose`
DVC_VARIABLE = "VATTCTL_DVC"  # the id of the DVC process that vattctl started
LAUNCHED_VARIABLE = "VATT_LAUNCHED"  # set by vatt.training.distributed for the processes it starts

STOPS = (signal.SIGTERM, signal.SIGUSR1)
WATCH_SECONDS = 1.0  # between two looks at the DVC that started this stage


def check_hostfile(arguments: Sequence[str]) -> None:
    """DeepSpeed would train on this machine alone without the file, and only warn."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    for name, file in pairwise(words):
        if name in ("--hostfile", "-H") and not Path(file).is_file():
            raise SettingsError(
                f"the hostfile {file} does not exist",
                hint="write it, a line `HOST slots=N` for each machine, or leave out --hostfile",
            )


def run_stage(stage: str, main: Callable[[], None]) -> None:
    """Run a stage's main alone (a second writer is refused), then exit with its code."""
    sys.exit(_run(stage, main))


def _run(stage: str, main: Callable[[], None]) -> int:
    level = logging.INFO if os.environ.get(VERBOSE_VARIABLE) else logging.WARNING
    redact_logs()
    logging.basicConfig(level=level, format="%(message)s")
    for number in STOPS:  # training replaces these by its own
        signal.signal(number, stop)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOPS, signal.SIGINT))  # vattctl blocks them
        join_step()
        if is_first_process() and LAUNCHED_VARIABLE not in os.environ:
            _stop_without_dvc()
            busy = f"busy: another process runs the stage {stage} in this project"
            own = lock(FOLDER / f"{stage}.lock", busy=busy)
            with lock(SETTINGS_LOCK, shared=True), own, same_settings(stage):
                main()
        else:  # whoever launched this process holds the lock
            main()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last line of defence
        _ignore_signals()
        return _leave_with(stage, error)
    return 0


@contextlib.contextmanager
def same_settings(stage: str) -> Iterator[None]:
    """Refuse to end well if the stage's settings in params.yaml were changed while it ran.

    DVC would record the new ones as those of the results.
    """
    file = Path("params.yaml")
    before = file.read_bytes() if file.is_file() else b""
    try:
        yield
    except SystemExit as end:  # processes that it launched did the work
        if end.code:
            raise
    if before and (not file.is_file() or file.read_bytes() != before):
        changed = _changed_settings(stage, before, file)
        if changed:
            raise SettingsError(
                f"params.yaml was changed while {stage} ran ({', '.join(changed)}); the results "
                "are those of the old settings, so DVC does not record them",
                hint="run it again; with the old settings back, a training ends at once",
            )


def _changed_settings(stage: str, before: bytes, file: Path) -> list[str]:
    """The settings of a stage that differ now, of those that dvc.yaml declares."""
    import yaml

    from vatt.config import load_params, parse_params

    declared = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
    kind, _, variant = stage.partition("-")
    own = declared[kind].get("do", declared[kind])
    old = parse_params(yaml.safe_load(before), source=file).model_dump(mode="json")
    new = load_params(file).model_dump(mode="json")
    found = []
    for key in own.get("params", []):
        name = str(key).replace("${item.task}", variant.rpartition("-")[0])
        one, other = old, new
        for part in name.split("."):
            one, other = (section.get(part, {}) for section in (one, other))
        found += _differing(name, one, other)
    return found


def _differing(key: str, one: Any, other: Any) -> list[str]:
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [key]
    return [
        inner
        for name in {**one, **other}
        for inner in _differing(f"{key}.{name}", one.get(name), other.get(name))
    ]


def _leave_with(stage: str, error: BaseException) -> int:
    """The code for what ended the stage; a fault of our own keeps its traceback."""
    if isinstance(error, OSError):
        error = machine_error(error) or error
    reason = stop_under(error) or error
    if isinstance(reason, KeyboardInterrupt):
        return _leave(stage, Interrupted.exit_code, "interrupted; run it again to continue")
    if isinstance(reason, VattError):
        return _leave(stage, reason.exit_code, str(reason))
    return _leave_bug(stage, error)


def _ignore_signals() -> None:
    """A second signal does not disturb the clean end that the first one began."""
    for number in (*STOPS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _stop_without_dvc() -> None:
    """Stop as on SIGTERM once the DVC that started this stage has died."""
    if DVC_VARIABLE not in os.environ and "DVC_STAGE" not in os.environ:  # DVC sets this one
        return
    starter = _dvc_above()
    if starter is None and DVC_VARIABLE not in os.environ:  # started by a program that uses DVC
        return

    def watch() -> None:
        while starter is not None and not has_ended(starter):
            time.sleep(WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch DVC", daemon=True).start()


def _dvc_above() -> psutil.Process | None:
    """The DVC that runs this stage; its child may be a shell, and this a child of the shell."""
    known = os.environ.get(DVC_VARIABLE)
    for process in psutil.Process().parents():
        words = process.cmdline()[:3]
        if str(process.pid) == known or any(Path(word).name == "dvc" for word in words):
            return process
    return None


def has_ended(process: psutil.Process) -> bool:
    """True for a zombie too; no change of the clock can make it true."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def is_first_process() -> bool:
    """True in the process that speaks for the stage: rank 0, or the one a launcher grew from."""
    return int(os.environ.get("RANK", "0")) == 0


def read_outcome(project: Path = Path()) -> tuple[int, str] | None:
    """The last failed stage's code and message; None when no stage has left any."""
    try:
        outcome = json.loads((project / OUTCOME).read_text(encoding="utf-8"))
        return int(outcome["code"]), str(outcome["message"])
    except (*UNREADABLE, OverflowError):
        return None


def stop_under(error: BaseException) -> BaseException | None:
    """The stop behind an error, if a library took it for a failure, as MLflow's database does."""
    under: BaseException | None = error
    while under is not None and not isinstance(under, Stopped | KeyboardInterrupt):
        under = under.__cause__ or under.__context__
    return under


def _leave_bug(stage: str, error: BaseException) -> int:
    text = redact("".join(traceback.format_exception(error)))
    if os.environ.get(DEBUG_VARIABLE):
        sys.stderr.write(text)
    else:
        with contextlib.suppress(OSError), atomic_write(TRACEBACK) as path:
            path.write_text(text, encoding="utf-8")
    summary = redact(traceback.format_exception_only(error)[-1].strip())
    return _leave(
        stage,
        BUG,
        f"a bug in vattctl: {summary}\n  -> please report it with {TRACEBACK}; "
        "--debug shows the traceback",
    )


def _leave(stage: str, code: int, message: str) -> int:
    # Of several processes one may fail, and its launcher stop the others: its reason counts.
    is_stop = code in (Stopped.exit_code, Interrupted.exit_code)
    if _has_an_outcome() or (is_stop and not is_first_process()):
        return code
    outcome = {"stage": stage, "code": code, "message": message}
    try:
        with atomic_write(OUTCOME) as path:
            path.write_text(json.dumps(outcome), encoding="utf-8")
        if DVC_VARIABLE in os.environ:  # vattctl reads the file and prints it
            return code
    except OSError:  # a full disk must not hide the message
        pass
    sys.stderr.write(f"{stage}: {message}\n")
    return code


def _has_an_outcome() -> bool:
    """Whether one of this stage's processes has left already."""
    try:
        return OUTCOME.stat().st_mtime > psutil.Process().create_time()
    except FileNotFoundError:
        return False


FIRST_PORT, PORTS = 20_000, 20_000


def join_step() -> None:
    """Inside `srun` with several tasks, set the variables by which processes find each other.

    Variables that are set already stay: a job's script may choose MASTER_ADDR and MASTER_PORT.
    """
    step = os.environ
    if "RANK" in step or int(step.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    job = int(step.get("SLURM_JOB_ID", "0"))
    variables = {
        "RANK": step["SLURM_PROCID"],
        "LOCAL_RANK": step["SLURM_LOCALID"],
        "WORLD_SIZE": step["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": first_count(step.get("SLURM_STEP_TASKS_PER_NODE", "1")),
        "MASTER_ADDR": first_host(step["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(FIRST_PORT + job % PORTS),
    }
    for name, value in variables.items():
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
    """Whether this process has certainly ended; never for one of another machine."""
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
