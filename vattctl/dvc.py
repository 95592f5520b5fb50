"""DVC as a subprocess, run from here only: start it, stop it, repair what a kill left torn.

`run_dvc` starts this module as `python -m vattctl.dvc ...`, which runs DVC's own command line and
watches over it in a thread. Signals go to the running stage, so that it can save; when vattctl
dies, the stage is stopped in the same way. Without this, DVC would ignore SIGINT while a stage
runs, and would leave the stage behind on SIGTERM.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from _thread import interrupt_main
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import click

from vatt.errors import DataError, Interrupted, MachineError, SettingsError, Stopped, VattError
from vatt.files import UNREADABLE, atomic_write, lock
from vatt.process import (
    CLOCK_SECONDS,
    DVC_VARIABLE,
    FOLDER,
    MARKS,
    OUTCOME,
    SETTINGS_LOCK,
    has_ended,
    read_outcome,
)
from vatt.progress import FRAME_SECONDS, PROGRESS_VARIABLE, Board, Row, duration
from vattctl.params import SHIPPED

STAGES = ("download", "preprocess", "pretrain", "finetune", "evaluate", "report")
CODE_STAGE = "code"  # of a project made by `vattctl init`; it marks the installed code
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
VATTCTL_VARIABLE = "VATTCTL_PROCESS"  # the id of the process that started DVC
WATCH_SECONDS, LOOK_SECONDS, PATIENCE_SECONDS, LOCK_SECONDS = 1.0, 0.2, 5.0, 3.0
CONFIG_ERROR, DVC_INTERRUPTED, DVC_FAILED = 251, 252, 255  # DVC's exit codes
LARGEST_PID = 2**31
FINAL_INTERRUPT = 3  # this many Ctrl-C do not wait for the stage


class StageFailed(VattError):
    """A stage ended with its own code and message."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = code


def stages_here() -> list[str]:
    """The stages of this project in their order; an experiment has only some of them."""
    import yaml

    declared = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return [name for name in STAGES if name in declared]


def stage_names() -> list[str]:
    """The stages of this project as DVC runs them, each fine-tuning by its task and start."""
    import yaml

    settings = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))["finetune"]
    tasks = [f"finetune@{'-'.join(each)}" for each in product(settings["run"], settings["init"])]
    return [name for stage in stages_here() for name in (tasks if stage == "finetune" else [stage])]


# --- running DVC ----------------------------------------------------------------------------------


def run_dvc(arguments: list[str], *, quiet: bool) -> None:
    """Run DVC in this folder; when a stage fails, raise its own code and message."""
    here = Path.cwd()  # an experiment's stage may need a stage of the project above it
    projects = [folder for folder in (here, *here.parents) if (folder / "dvc.yaml").is_file()]
    for project in projects:
        (project / OUTCOME).unlink(missing_ok=True)
    repair(here)
    for project in projects:
        _keep_copy(project / "dvc.lock")
        refresh_marks(project)
    with lock(SETTINGS_LOCK, shared=True):
        code = _wait_for(arguments, quiet=quiet)
        if code == DVC_FAILED and not _outcome(projects) and remove_broken_caches():
            code = _wait_for(arguments, quiet=quiet)
    for project in projects:
        _keep_copy(project / "dvc.lock")
    if code:
        raise _failure(arguments[0], code, projects)


def _wait_for(arguments: list[str], *, quiet: bool) -> int:
    """DVC's exit code. Signals are handed on to it; it sends them to the stage."""
    folder = str(Path(sys.executable).parent)
    display = Display(arguments, quiet=quiet)
    environment = {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}",
        "DVC_NO_ANALYTICS": "1",
        VATTCTL_VARIABLE: str(os.getpid()),
        PROGRESS_VARIABLE: str(display.progress),
    }
    process: subprocess.Popen[bytes] | None = None
    signals: list[int] = []

    def hand_on(signum: int, frame: FrameType | None) -> None:
        signals.append(signum)
        if process is None:
            return
        if signals.count(signal.SIGINT) >= FINAL_INTERRUPT:
            os.killpg(process.pid, signal.SIGKILL)
        process.send_signal(signum)

    handlers = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        # A process group of its own: Ctrl-C in a terminal reaches vattctl alone, and the stage
        # gets it once. It writes to a file: a pipe would break when vattctl is killed.
        process = subprocess.Popen(
            [sys.executable, "-m", "vattctl.dvc", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=display.file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        for signum in signals[:]:  # those that came before there was a process
            process.send_signal(signum)
        while (code := process.poll()) is None:
            display.show(stopping=bool(signals))
            time.sleep(LOOK_SECONDS / 4)
        while code < 0 and _group_lives(process.pid):  # DVC was killed; its stage saves and ends
            time.sleep(0.1)
    finally:
        display.close(failed=process is None or process.returncode != 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code


RUNNING = re.compile(r"Running stage '(?:.*:)?([^']+)':")
SKIPPED = re.compile(r"Stage '(?:.*:)?([^']+)' (?:didn't change|is cached)")
FAILED = re.compile(r"ERROR: failed to reproduce '(?:.*:)?([^']+)'")
NOISE = re.compile(  # in addition to a table
    r"\s*$|> |\t|(Updating|Generating) lock file|To (track|enable)|Use `dvc push`|"
    r".*: \d+/\d+ \w+|Data and pipelines"
)
HINTS = re.compile(r"\t|To (track|enable)|Use `dvc push`")  # of DVC, for what vattctl does itself
LOGS, KEPT_LOGS = FOLDER / "logs", 20


class Display:
    """DVC's output: kept in a file, shown as plain lines or, on a terminal, as a table of stages.

    With `quiet` only errors are shown.
    """

    def __init__(self, arguments: Sequence[str], *, quiet: bool) -> None:
        LOGS.mkdir(parents=True, exist_ok=True)
        for old in sorted(LOGS.glob("*.log"))[: -KEPT_LOGS + 1]:
            old.unlink(missing_ok=True)
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        path = (LOGS / f"{now}-{os.getpid()}.log").absolute()
        self.progress = path.parent.parent / "progress.json"
        self.file, self._read = path.open("ab"), path.open("rb")
        self._rest, self._quiet = b"", quiet
        self._rows = {name: Row(name, "waiting") for name in _expected(arguments)}
        self._board = None if quiet or not sys.stderr.isatty() else Board()
        self._running, self._began, self._drawn = "", 0.0, 0.0
        self.progress.unlink(missing_ok=True)

    def show(self, *, stopping: bool = False) -> None:
        """Show what is new in the file."""
        *lines, self._rest = (self._rest + self._read.read()).split(b"\n")
        for line in lines:
            self._take(line.decode(errors="replace"))
        if self._board is not None and time.monotonic() - self._drawn >= FRAME_SECONDS:
            self._drawn = time.monotonic()
            self._note_progress()
            if stopping and self._running:
                self._rows[self._running].state = "stopping"
            self._board.draw(list(self._rows.values()))

    def close(self, *, failed: bool) -> None:
        """Show the rest, with the last state of each stage."""
        self._drawn = 0.0
        if self._running:
            self._end("stopped" if failed else "done")
        self.show()
        if self._board is not None:
            self._board.close()
        self.file.close()
        self._read.close()
        self.progress.unlink(missing_ok=True)

    def _take(self, line: str) -> None:
        if self._board is None:
            if line.startswith("ERROR") or not (self._quiet or HINTS.match(line)):
                click.echo(line, err=True)
            return
        if match := RUNNING.match(line):
            self._end("done")
            if match[1] != CODE_STAGE:
                self._running, self._began = match[1], time.monotonic()
                self._rows.setdefault(match[1], Row(match[1], "")).state = "running"
        elif match := SKIPPED.match(line):
            self._end("done")
            self._rows.setdefault(match[1], Row(match[1], "")).state = "up to date"
        elif match := FAILED.match(line):
            self._end("failed")
            self._board.say(line)
        elif not NOISE.match(line):
            self._board.say(line)

    def _end(self, state: str) -> None:
        """The running stage has ended; its progress is replaced by what it took."""
        if self._running:
            took = duration(time.monotonic() - self._began)
            self._rows[self._running] = Row(self._running, state, text=took)
            self._running = ""
            self.progress.unlink(missing_ok=True)

    def _note_progress(self) -> None:
        if self._running:
            row = self._rows[self._running]
            row.text = duration(time.monotonic() - self._began)
            with contextlib.suppress(*UNREADABLE, ZeroDivisionError):
                found = json.loads(self.progress.read_text(encoding="utf-8"))
                row.share, row.text = found["done"] / found["total"], str(found["text"])


def _expected(arguments: Sequence[str]) -> list[str]:
    """The stages that a `dvc repro` may run."""
    names = stage_names()
    targets = [word for word in arguments[1:] if not word.startswith("-")]
    wanted = [n for n in names if n in targets or n.partition("@")[0] in targets]
    if not targets or "--single-item" in arguments:
        return wanted or names
    return names[: names.index(wanted[-1]) + 1] if wanted else names


def stage_log(stage: str, *, follow: bool = False) -> Iterator[str]:
    """The lines of a stage's last run; with `follow` until it ends. A variant may be left out."""
    for path in sorted(LOGS.glob("*.log"), reverse=True):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        starts = [
            number
            for number, line in enumerate(lines)
            if (match := RUNNING.match(line)) and stage in (match[1], match[1].partition("@")[0])
        ]
        if starts:
            with path.open(encoding="utf-8", errors="replace") as log:
                for _ in range(starts[-1]):
                    next(log)
                yield from _section(log, int(path.stem.rpartition("-")[2]), follow=follow)
            return
    raise DataError(
        f"no log of {stage}",
        hint=f"it has not run here under vattctl; {LOGS} keeps the last {KEPT_LOGS} runs",
    )


def _section(log: TextIO, vattctl: int, *, follow: bool) -> Iterator[str]:
    """The lines up to the next stage."""
    import psutil

    yield log.readline().rstrip("\n")
    rest = ""
    while True:
        is_alive = follow and psutil.pid_exists(vattctl)
        rest += log.readline()
        if rest.endswith("\n"):
            if RUNNING.match(rest) or SKIPPED.match(rest) or rest.startswith("Updating lock file"):
                return
            yield rest.rstrip("\n")
            rest = ""
        elif not is_alive:
            return
        else:
            time.sleep(LOOK_SECONDS)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _outcome(projects: Sequence[Path]) -> tuple[int, str] | None:
    return next(filter(None, map(read_outcome, projects)), None)


def _failure(command: str, code: int, projects: Sequence[Path]) -> VattError:
    """Why DVC failed: the stage's own reason, a signal, or DVC's own error, printed above."""
    outcome = _outcome(projects)
    if outcome is not None:
        return StageFailed(*outcome)
    if code in (Interrupted.exit_code, -signal.SIGINT, DVC_INTERRUPTED):
        return StageFailed(Interrupted.exit_code, "interrupted; run it again to continue")
    if code in (Stopped.exit_code, -signal.SIGTERM, -signal.SIGUSR1):
        return StageFailed(Stopped.exit_code, "stopped by a signal; run it again to continue")
    if code == CONFIG_ERROR:
        return SettingsError(
            "DVC cannot read its settings; its message is above",
            hint="restore .dvc/config with `git checkout .dvc/config`; "
            "write .dvc/config.local again, or delete it",
        )
    if code == -signal.SIGKILL:
        return MachineError("DVC was killed", hint="the same command continues where it stopped")
    return MachineError(f"dvc {command} ended with {code}", hint="its message is above")


def changed_stages(files: Sequence[Path] = (Path("dvc.yaml"),)) -> dict[str, list[str]]:
    """What DVC finds changed, by stage, in those of the repository's dvc.yaml files that exist."""
    with changed_in_background(files) as answer:
        changed = answer()
    if changed is None:
        raise MachineError("busy: a stage is running", hint="wait until it has ended")
    return changed


BUSY = "busy, it is being blocked by"  # DVC, of a path that a running stage reads or writes
Changes = dict[str, list[str]]


@contextlib.contextmanager
def changed_in_background(
    files: Sequence[Path] = (Path("dvc.yaml"),),
) -> Iterator[Callable[[], Changes | None]]:
    """Start `dvc status`; the function waits for its answer, None while a stage runs.

    Where no file has changed since the last answer, that one is given, and DVC is not started.
    """
    repository = _repository(Path.cwd())
    there = [str(file) for file in files if file.exists() and repository is not None]
    repair(Path.cwd())
    for folder in (Path.cwd(), *Path.cwd().parents):
        refresh_marks(folder)
    mark = _mark_of_files(repository) if there == ["dvc.yaml"] else None
    last = _last_answer(mark)
    if last is not None:
        yield lambda: last
        return
    command = [sys.executable, "-m", "dvc", "status", "--json", *there]
    begun = subprocess.Popen(
        command if there else ["echo", "{}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def answer() -> Changes | None:
        found = _changes(begun, command)
        if found is not None and mark == _mark_of_files(repository):
            _remember(mark, found)
        return found

    try:
        yield answer
    finally:
        if begun.poll() is None:
            begun.terminate()
            begun.communicate()


def _changes(begun: subprocess.Popen[str], command: Sequence[str]) -> Changes | None:
    """What `dvc status` has found; None while a stage runs."""
    output, errors = begun.communicate()
    code = begun.returncode
    if code != 0 and BUSY not in errors and remove_broken_caches():
        again = subprocess.run(command, capture_output=True, text=True, check=False)
        output, errors, code = again.stdout, again.stderr, again.returncode
    if code != 0:
        if BUSY in errors:
            return None
        raise MachineError(f"dvc status failed: {errors.strip().splitlines()[-1:] or code}")
    return {
        stage: [f"{kind}: {_plain_name(name)}" for kind, name in _leaves(changes)]
        for stage, changes in json.loads(output or "{}").items()
        if stage.rpartition(":")[2] != CODE_STAGE  # DVC counts it as changed always
    }


ANSWER = FOLDER / "status.json"  # the last one of `dvc status`, and the files that it is about
PATH_KEY = re.compile(r"\$\{paths\.(\w+)\}")


def _last_answer(mark: str | None) -> Changes | None:
    with contextlib.suppress(*UNREADABLE):
        known = json.loads(ANSWER.read_text(encoding="utf-8"))
        if mark is not None and known["mark"] == mark:
            changes: Changes = known["changes"]
            return changes
    return None


def _remember(mark: str | None, changes: Changes) -> None:
    if mark is not None:
        with contextlib.suppress(OSError), atomic_write(ANSWER) as path:
            path.write_text(json.dumps({"mark": mark, "changes": changes}), encoding="utf-8")


def _mark_of_files(repository: Path | None) -> str | None:
    """Size, times and inode of every file that DVC would look at; None where it must look."""
    if repository is None:
        return None
    with contextlib.suppress(*UNREADABLE):
        return _mark_within(repository)
    return None


def _mark_within(repository: Path) -> str | None:
    if any(json.loads(_read(repository / ".dvc/tmp/rwlock") or "{}").values()):  # a stage runs
        return None
    own = [repository / ".dvc" / name for name in ("config", "config.local")]
    if any("dir =" in _read(file) for file in own):  # the cache is elsewhere
        return None
    digest = hashlib.sha256()
    places = [*own, repository / ".dvcignore", *map(Path, ("dvc.yaml", "dvc.lock", "params.yaml"))]
    for place in (*places, *_declared_paths()):
        for file in _files_of(place):
            one = file.stat()
            facts = (str(file), one.st_size, one.st_mtime_ns, one.st_ctime_ns, one.st_ino)
            digest.update(repr(facts).encode())
    for folder in sorted((repository / ".dvc/cache/files/md5").glob("*")):
        digest.update(f"{folder.name}:{folder.stat().st_mtime_ns}".encode())
    return digest.hexdigest()


def _declared_paths() -> list[Path]:
    """What the stages in dvc.yaml depend on and make; of an item's path the folder above it."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        pipeline, settings = (
            yaml.load(_read(Path(name)), Loader=loader) for name in ("dvc.yaml", "params.yaml")
        )
    except yaml.YAMLError:
        raise ValueError("cannot be read") from None
    stages, known = pipeline["stages"].values(), settings["paths"]
    named = [
        path
        for stage in stages
        for key in ("deps", "outs", "metrics")
        for one in stage.get(key, [])
        for path in ([one] if isinstance(one, str) else one)
    ]
    whole = {PATH_KEY.sub(lambda key: str(known[key[1]]), path) for path in named}
    return sorted({Path(path.partition("/${item")[0]) for path in whole})


def _files_of(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
    for folder, inner, names in os.walk(place):
        inner[:] = sorted(set(inner) - {"__pycache__"})
        yield from (Path(folder, name) for name in sorted(names))


def refresh_marks(project: Path) -> None:
    """In a project without a clone, note the installed code where it differs from what is noted."""
    if was_made_by_init(project):
        from vatt.tracking.provenance import write_marks

        write_marks(SHIPPED / "dvc.yaml", project)


def was_made_by_init(project: Path) -> bool:
    """Whether the stages of a folder depend on marks of the installed code, not on source files."""
    pipeline = project / "dvc.yaml"
    return pipeline.is_file() and f"- {MARKS.as_posix()}/" in pipeline.read_text(encoding="utf-8")


def _plain_name(name: str) -> str:
    return "the installed code" if f"{MARKS.as_posix()}/" in name else name


def init_repository(folder: Path, scm: str) -> None:
    """`dvc init` in a folder: with `git` there, in a `subdir` of a repository, or with `none`."""
    flags = {"git": [], "subdir": ["--subdir"], "none": ["--no-scm"]}[scm]
    command = [sys.executable, "-m", "dvc", "init", "--quiet", *flags]
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise MachineError(
            f"dvc init failed in {folder}: {lines[-1] if lines else done.returncode}"
        )


def _leaves(changes: list[Any]) -> list[tuple[str, str]]:
    """DVC's nested answer as (what happened, to what)."""
    found = []
    for change in changes:
        if isinstance(change, str):
            found.append((change, "the stage"))
            continue
        for things in change.values():
            for name, kind in things.items():
                nested = kind if isinstance(kind, dict) else {name: kind}
                found += [(str(value), str(key)) for key, value in nested.items()]
    return found


# --- repairing what a killed DVC left -------------------------------------------------------------

LOCK_FILES = ("dvc.lock", "*/dvc.lock", "*/*/dvc.lock")  # the project's and its experiments'
STAGE_ENTRY = re.compile(r"^  \S.*:\s*$", re.MULTILINE)


def repair(project: Path) -> None:
    """Repair a torn dvc.lock or rwlock, which would stop every later command; report each repair.

    DVC writes both in place, so a kill may leave them empty or cut off.
    """
    repository = _repository(project)
    if repository is None:
        return
    rwlock = repository / ".dvc/tmp/rwlock"
    locks = [file for pattern in LOCK_FILES for file in sorted(repository.glob(pattern))]
    if not _is_stale(rwlock) and not any(map(_is_torn, locks)):
        return
    with _dvc_locked(rwlock.parent):  # look again: now no process is writing
        for file in filter(_is_torn, locks):
            click.echo(f"repaired {file}: {_restore(file)}", err=True)
        if _is_stale(rwlock):
            _refuse_beside_dvc(repository, rwlock)
            rwlock.unlink()
            click.echo(f"repaired {rwlock}: removed what a killed DVC had left", err=True)


def _repository(project: Path) -> Path | None:
    folders = (project, *project.parents)
    return next((folder for folder in folders if (folder / ".dvc").is_dir()), None)


@contextlib.contextmanager
def _dvc_locked(folder: Path) -> Iterator[None]:
    """Hold the two locks under which DVC writes its files."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for name in ("lock", "rwlock.lock"):
            handle = stack.enter_context((folder / name).open("a", encoding="utf-8"))
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise MachineError(
                            f"another DVC holds {folder / name}", hint="wait until it has ended"
                        ) from None
                    time.sleep(0.1)
        yield


def _is_stale(rwlock: Path) -> bool:
    """Whether DVC's list of paths in use is torn, or all processes that it names are gone."""
    try:
        written = rwlock.stat().st_mtime
        content = json.loads(rwlock.read_text(encoding="utf-8"))
        readers = [info for infos in content.get("read", {}).values() for info in infos]
        uses = [*readers, *content.get("write", {}).values()]
        owners = {use["pid"] for use in uses}
        is_sound = content.keys() <= {"read", "write"} and all(map(_is_use, uses))
    except FileNotFoundError:
        return False
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return True
    return not is_sound or (bool(owners) and not any(_was_alive(pid, written) for pid in owners))


def _is_use(use: dict[str, Any]) -> bool:
    """Whether DVC, which accepts nothing else in this file, can read an entry."""
    types = {key: type(value) for key, value in use.items()}
    return types == {"pid": int, "cmd": str} and 0 <= use["pid"] < LARGEST_PID


def _was_alive(pid: int, moment: float) -> bool:
    """Whether this process runs and ran then; a later process may have the same number."""
    import psutil

    try:
        process = psutil.Process(pid)
        return not has_ended(process) and process.create_time() <= moment + CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return False


def _names_dvc(command: list[str]) -> bool:
    return any(Path(word).name in ("dvc", "vattctl.dvc", "dvc.exe") for word in command[:3])


def _refuse_beside_dvc(repository: Path, rwlock: Path) -> None:
    """Without a readable list, a DVC that waits for its stage is known by its folder only."""
    import psutil

    for process in psutil.process_iter(["pid", "cmdline", "cwd"]):
        folder = process.info["cwd"]
        inside = folder is not None and Path(folder).is_relative_to(repository)
        if inside and _names_dvc(process.info["cmdline"] or []) and process.pid != os.getpid():
            raise MachineError(
                f"{rwlock} is damaged, and DVC (process {process.pid}) is running in {repository}",
                hint="wait until it has ended; the same command then repairs the file",
            )


def _copy_of(file: Path) -> Path:
    return file.parent / FOLDER / file.name


def _keep_copy(file: Path) -> None:
    """A copy of a complete dvc.lock, in case it is torn."""
    text = _read(file)
    if text != _read(_copy_of(file)) and _stages_in(text) is not None:
        with contextlib.suppress(OSError), atomic_write(_copy_of(file)) as path:
            path.write_text(text, encoding="utf-8")


def _is_torn(file: Path) -> bool:
    """Whether a dvc.lock was cut off while it was written."""
    text, copy = _read(file), _read(_copy_of(file))
    if text == copy:
        return False
    if "\n<<<<<<< " in f"\n{text}":
        raise SettingsError(
            f"{file} holds an unfinished git merge",
            hint=f"take one side: git checkout --theirs {file.name} (or --ours), then run it again",
        )
    return copy.startswith(text) or _stages_in(text) is None


def _restore(file: Path) -> str:
    """Complete stages of the torn file; the others as the copy, or else git, last had them."""
    import yaml

    text, source = _read(file), "its last copy"
    known = _stages_in(_read(_copy_of(file)))
    if known is None:
        command = ["git", "show", f"HEAD:./{file.name}"]
        shown = subprocess.run(command, cwd=file.parent, capture_output=True, check=False)
        known, source = _stages_in(shown.stdout.decode(errors="replace")), "the last commit"
    ends = [match.start() for match in STAGE_ENTRY.finditer(text)][1:]
    whole = next(filter(None, (_stages_in(text[:end]) for end in reversed(ends))), {})
    stages = {**(known or {}), **whole}
    if not stages:
        file.unlink()
        return "it was damaged and nothing could be restored, so every stage counts as changed"
    with atomic_write(file) as path:
        content = {"schema": "2.0", "stages": stages}
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    others = f"are those of {source}" if known else "count as changed"
    return f"it was cut off; the stages that it lacked {others}"


def _stages_in(text: str) -> dict[str, Any] | None:
    """The stages of a dvc.lock; None when it is damaged."""
    import yaml

    try:
        content = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        stages: dict[str, Any] = content["stages"]
        whole = all(
            isinstance(stage["cmd"], str)
            and all(
                isinstance(item["path"], str)
                for key in ("deps", "outs")
                for item in stage.get(key, [])
            )
            for stage in stages.values()
        )
    except (yaml.YAMLError, *UNREADABLE):
        return None
    return stages if whole and stages else None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def remove_broken_caches() -> bool:
    """Remove DVC's SQLite caches that are damaged; DVC makes them again."""
    site = Path(os.environ.get("DVC_SITE_CACHE_DIR", "/var/tmp/dvc"))
    removed = False
    for file in [*site.glob("repo/*/**/*.db"), *Path(".dvc/tmp").glob("**/*.db")]:
        if _is_broken(file):
            shutil.rmtree(file.parent, ignore_errors=True)
            click.echo(f"repaired {file}: removed a damaged cache of DVC", err=True)
            removed = True
    return removed


def _is_broken(database: Path) -> bool:
    try:
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as opened:
            return opened.execute("PRAGMA quick_check(1)").fetchone() != ("ok",)
    except sqlite3.OperationalError:  # locked, or not ours to read
        return False
    except sqlite3.DatabaseError:
        return True


# --- inside DVC's process -------------------------------------------------------------------------


class Watch(threading.Thread):
    """Waits for signals and for vattctl's end; either stops the stage, then DVC."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.signum: int | None = None  # the one that stops
        self.vattctl = int(os.environ[VATTCTL_VARIABLE])

    def run(self) -> None:
        while True:
            found = signal.sigtimedwait(SIGNALS, WATCH_SECONDS)
            if found is not None:
                self.stop(found.si_signo)
            elif os.getppid() != self.vattctl:  # another process has adopted this one
                self.stop(signal.SIGTERM)

    def stop(self, signum: int) -> None:
        """Send the signal to the stage; to each one that starts later, too. Never returns."""
        self.signum = signum
        sent: set[int] = set()
        patience = time.monotonic()
        while True:
            stage = _running_stage()
            if stage is not None and stage.pid not in sent:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(stage.pid, signum)
                sent.add(stage.pid)
            # Without a stage DVC itself is at work, and ends as on Ctrl-C. It ignores SIGINT
            # while a stage starts, and ends by itself after one that was stopped.
            is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            if stage is not None:
                patience = time.monotonic() + PATIENCE_SECONDS
            elif not is_ignored and time.monotonic() >= patience:
                interrupt_main()
                patience = time.monotonic() + PATIENCE_SECONDS
            again = signal.sigtimedwait(SIGNALS, LOOK_SECONDS)
            if again is not None:
                sent.clear()


def _running_stage() -> Any:
    """The stage's process: not the shell that started it, nor a process that it launched."""
    import psutil

    for child in psutil.Process().children(recursive=True):  # parents come first
        with contextlib.suppress(psutil.Error):  # it ended while we looked
            if child.cmdline()[1:2] == ["-m"] and child.cmdline()[2].startswith("stages."):
                return child
    return None


def _is_news(record: logging.LogRecord) -> bool:
    """False for what vattctl reports itself: an interruption, a stage that gave its reason."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, KeyboardInterrupt):
        return False
    while error is not None and type(error).__name__ != "StageCmdFailedError":
        error = error.__cause__
    return error is None or read_outcome() is None


def _run_watched(arguments: list[str]) -> int:
    """DVC's command line in this process, under watch."""
    # Blocked, the signals wait for the watch; a stage unblocks them when it is ready for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.environ[DVC_VARIABLE] = str(os.getpid())
    watch = Watch()
    watch.start()
    from dvc.cli import main  # type: ignore[import-untyped]  # noqa: TID251 - its own process

    for handler in logging.getLogger("dvc").handlers:
        handler.addFilter(_is_news)
    code = int(main(arguments))
    if watch.signum is None or code == 0:
        return code
    return Interrupted.exit_code if watch.signum == signal.SIGINT else Stopped.exit_code


if __name__ == "__main__":
    sys.exit(_run_watched(sys.argv[1:]))
