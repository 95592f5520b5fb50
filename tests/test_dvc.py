"""DVC under vattctl: stopped, killed and torn; with real DVC and a stage that waits."""

import contextlib
import fcntl
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.test_architecture import ROOT
from vattctl.dvc import ANSWER, changed_stages, repair

STAGE = """
import time
from pathlib import Path
from vatt.process import run_stage

def main():
    Path("began").touch()
    while Path("wait").exists():
        time.sleep(0.1)
    {end}
    Path("data").mkdir(exist_ok=True)
    Path("data/out.txt").write_text("made")

run_stage("{name}", main)
"""
PIPELINE = {
    "stages": {
        "download": {"cmd": "python -m stages.download", "outs": ["data/out.txt"]},
        "preprocess": {
            "cmd": "cp data/out.txt data/copy.txt",
            "deps": ["data/out.txt"],
            "outs": ["data/copy.txt"],
        },
    }
}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1"}
ENVIRONMENT["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def new_project(folder: Path) -> None:
    """A project of two stages; the first waits while there is a file named `wait`."""
    shutil.copy(ROOT / "params.yaml", folder)
    (folder / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc")
    (folder / "dvc.yaml").write_text(yaml.safe_dump(PIPELINE, sort_keys=False))
    (folder / "stages").mkdir()
    (folder / "stages/__init__.py").touch()
    write_stage(folder)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """A new project whose first stage waits."""
    new_project(tmp_path)
    (tmp_path / "wait").touch()
    yield tmp_path
    for process in processes(tmp_path):  # of a test that failed
        process.kill()


def write_stage(project: Path, end: str = "pass") -> None:
    (project / "stages/download.py").write_text(STAGE.format(name="download", end=end))


def processes(project: Path) -> list[psutil.Process]:
    """What runs in the project."""
    found = []
    for process in psutil.process_iter(["cwd", "status"]):
        if process.info["cwd"] == str(project) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def start(project: Path, *command: str) -> subprocess.Popen[str]:
    """Start a command and wait until the stage works."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=project, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_until(lambda: (project / "began").exists() or process.poll() is not None)
    assert process.poll() is None, process.communicate()[0]
    return process


def wait_until(condition, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


def named(project: Path, *words: str) -> psutil.Process:
    return next(p for p in processes(project) if set(words) <= set(p.cmdline()[:3]))


def vattctl(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vattctl.cli", *arguments],
        cwd=project, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def succeeds(project: Path, *arguments: str) -> str:
    done = vattctl(project, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


WHO = {"vattctl": ("vattctl.cli",), "dvc": ("vattctl.dvc",), "stage": ("stages.download",)}


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_to_any_process_stops_all_with_one_message(
    project: Path, who: str, number: signal.Signals, code: int
) -> None:
    process = start(project, "vattctl.cli", "repro")
    named(project, *WHO[who]).send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert output.count("; what is done is saved. To continue: vattctl repro\n") == 1
    assert "rror: " not in output
    assert "ERROR" not in output
    assert "Traceback" not in output
    assert processes(project) == []


@pytest.mark.parametrize("command", [("vattctl.cli", "repro"), ("dvc", "repro")])
def test_nothing_is_left_when_what_was_started_is_killed(
    project: Path, command: tuple[str, ...]
) -> None:
    process = start(project, *command)
    process.kill()
    wait_until(lambda: processes(project) == [], seconds=30)
    (project / "wait").unlink()
    succeeds(project, "repro")
    assert (project / "data/copy.txt").read_text() == "made"


def test_a_killed_dvc_stops_its_stage_and_vattctl_says_so(project: Path) -> None:
    process = start(project, "vattctl.cli", "repro")
    named(project, "vattctl.dvc").kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "To continue: vattctl repro" in output
    assert processes(project) == []


def test_a_bare_dvc_goes_on_when_the_shell_that_started_it_has_ended(project: Path) -> None:
    command = f"nohup {sys.executable} -m dvc repro > log 2>&1 &"
    subprocess.run(["bash", "-c", command], cwd=project, env=ENVIRONMENT, check=True)
    wait_until(lambda: (project / "began").exists())
    time.sleep(2)  # longer than the stage waits between two looks
    (project / "wait").unlink()
    wait_until(lambda: (project / "data/copy.txt").exists() and processes(project) == [])
    assert "Updating lock file" in (project / "log").read_text()


@pytest.mark.parametrize("error", ["DataError('no clip left')", "PermissionError(13, 'no', 'x')"])
def test_an_error_is_printed_once(project: Path, error: str) -> None:
    (project / "wait").unlink()
    write_stage(project, end=f"from vatt.errors import DataError; raise {error}")
    done = vattctl(project, "repro")
    output = done.stdout + done.stderr
    assert done.returncode == (3 if "clip" in error else 4), output
    assert output.count("no clip left" if "clip" in error else "no permission: x") == 1, output
    assert "failed to reproduce" not in output


def test_a_dead_stage_without_a_reason_is_dvcs_error(project: Path) -> None:
    (project / "wait").unlink()
    write_stage(project, end="import os; os.kill(os.getpid(), 9)")
    done = vattctl(project, "repro")
    assert done.returncode == 4
    assert "failed to reproduce 'download'" in done.stderr
    assert "its message is above" in done.stderr


def test_settings_that_an_editor_changes_while_a_stage_runs_are_not_recorded(
    project: Path,
) -> None:
    pipeline = yaml.safe_load((project / "dvc.yaml").read_text())
    pipeline["stages"]["download"]["params"] = ["seed"]
    (project / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    process = start(project, "vattctl.cli", "repro")
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("\nseed: 0", "\nseed: 1"))
    (project / "wait").unlink()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert "params.yaml was changed while download ran (seed)" in output
    assert not (project / "dvc.lock").exists()
    succeeds(project, "repro")
    assert "seed: 1" in (project / "dvc.lock").read_text()


# --- on a terminal --------------------------------------------------------------------------------

SAVING = """
import time
from pathlib import Path
from vatt.process import run_stage

def main():
    try:
        Path("began").touch()
        while Path("wait").exists():
            time.sleep(0.1)
    except KeyboardInterrupt:  # as a training that saves its state
        time.sleep(3)
        Path("saved").touch()
        raise

run_stage("download", main)
"""
TOKENS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+")


class Terminal:
    """A command on a terminal of its own: what it writes, and the keys that a person presses."""

    def __init__(self, project: Path, *command: str) -> None:
        self.child, self.screen = pty.fork()
        if self.child == 0:
            os.chdir(project)
            os.environ.update(ENVIRONMENT, TERM="xterm", COLUMNS="100", LINES="40")
            os.execv(sys.executable, [sys.executable, "-m", *command])
        self.seen = ""

    def read(self, until: str = "\0", seconds: float = 90) -> str:
        """All that was written, up to some words or to the end."""
        deadline = time.monotonic() + seconds
        while until not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.screen], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.screen, 65536).decode(errors="replace")
                except OSError:  # the command has ended
                    break
        return self.seen

    def press(self, key: bytes) -> None:
        os.write(self.screen, key)

    def close(self) -> int:
        """The exit code."""
        os.close(self.screen)
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])

    def lines(self) -> list[str]:
        """What is left on the screen: later text has replaced what the cursor went back to."""
        rows, row, column = [""], 0, 0
        for token in TOKENS.findall(self.seen):
            if token == "\n":
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            elif token == "\r":
                column = 0
            elif token.startswith("\x1b"):
                if token.endswith("A"):
                    row -= int(token[2:-1] or 1)
                if token.endswith("K"):
                    rows[row] = ""
            else:
                before, after = rows[row][:column].ljust(column), rows[row][column + len(token) :]
                rows[row], column = before + token + after, column + len(token)
        return [line.rstrip() for line in rows]


def test_a_terminal_shows_one_table_of_the_stages_with_their_last_states(project: Path) -> None:
    terminal = Terminal(project, "vattctl.cli", "repro")
    assert "waiting" in terminal.read(until="running")
    (project / "wait").unlink()
    terminal.read()
    assert terminal.close() == 0, terminal.seen
    lines = terminal.lines()
    for stage in ("download", "preprocess"):
        (line,) = [line for line in lines if line.startswith(f"{stage} ")]
        assert line.split()[1] == "done" and line.endswith(" s"), lines
    assert "Running stage" not in terminal.seen


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_once_or_twice_ends_with_one_line_after_the_stage_has_ended(
    project: Path, presses: int
) -> None:
    (project / "stages/download.py").write_text(SAVING)
    terminal = Terminal(project, "vattctl.cli", "repro")
    wait_until((project / "began").exists)
    terminal.read(until="running")
    for _ in range(presses):
        terminal.press(b"\x03")
        terminal.read(until="stopping")
        time.sleep(0.5)
    terminal.read()
    assert terminal.close() == 130, terminal.seen
    assert (project / "saved").exists() == (presses == 1)
    lines = terminal.lines()
    assert sum("To continue: vattctl repro" in line for line in lines) == 1, lines
    assert "Traceback" not in terminal.seen and "rror" not in terminal.seen, terminal.seen
    (line,) = [line for line in lines if line.startswith("download ")]
    assert line.split()[1] == "stopped", lines
    assert processes(project) == []


@pytest.fixture(scope="module")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    new_project(folder)
    succeeds(folder, "repro")
    return folder


@pytest.fixture
def finished(run_once: Path, tmp_path: Path) -> Path:
    """A project whose stages have run."""
    return Path(shutil.copytree(run_once, tmp_path / "copy"))


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"write": {"/a": {"pid": 1',
        "[]",
        "\0\0\0",
        json.dumps({"write": {}, "read": {"/": [{"pid": 2**22 + 1, "cmd": "dvc repro"}]}}),
        json.dumps({"write": {"/": {"pid": os.getpid(), "cmd": "dvc repro"}}, "read": {}}),
        json.dumps({"write": {}, "read": {}, "more": {}}),
        json.dumps({"write": {"/": {"pid": 1}}, "read": {}}),
        json.dumps({"write": {"/": {"pid": 10**20, "cmd": "dvc repro"}}, "read": {}}),
        "[" * 100_000,
    ],
    ids=[
        "empty",
        "cut off",
        "not a table",
        "zeros",
        "dead",
        "its number is another process's",
        "another key",
        "no command",
        "no process",
        "deep",
    ],
)
def test_a_stale_rwlock_is_removed(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rwlock = tmp_path / ".dvc/tmp/rwlock"
    rwlock.parent.mkdir(parents=True)
    rwlock.write_text(content)
    os.utime(rwlock, (1, 1))  # long before this process started
    repair(tmp_path)
    assert not rwlock.exists()
    assert f"repaired {rwlock}" in capsys.readouterr().err
    repair(tmp_path)
    assert capsys.readouterr().err == ""


def test_an_rwlock_in_use_stays(tmp_path: Path) -> None:
    rwlock = tmp_path / ".dvc/tmp/rwlock"
    rwlock.parent.mkdir(parents=True)
    dead, live = ({"pid": pid, "cmd": "dvc repro"} for pid in (2**22 + 1, os.getpid()))
    rwlock.write_text(text := json.dumps({"write": {"/a": dead, "/b": live}, "read": {}}))
    repair(tmp_path)
    assert rwlock.read_text() == text


def test_dvc_works_again_after_a_torn_rwlock(finished: Path) -> None:
    (finished / ".dvc/tmp/rwlock").write_text("")
    (finished / ".dvc/tmp/lock").write_text(" 999999\n")  # left by the killed DVC
    assert "up to date" in succeeds(finished, "repro")


def test_a_torn_rwlock_stays_while_dvc_runs(project: Path) -> None:
    process = start(project, "dvc", "repro")
    rwlock = project / ".dvc/tmp/rwlock"
    wait_until(rwlock.exists)
    rwlock.write_text("")
    done = vattctl(project, "repro")
    assert done.returncode == 4
    assert f"DVC (process {process.pid}) is running" in done.stderr
    assert rwlock.read_text() == ""
    process.kill()


def test_a_torn_dvc_lock_is_restored_at_any_length(finished: Path) -> None:
    lock = finished / "dvc.lock"
    whole = yaml.safe_load(text := lock.read_text())
    for length in range(0, len(text), 7):
        lock.write_text(text[:length])
        repair(finished)
        assert yaml.safe_load(lock.read_text()) == whole
    lock.write_text(text[: len(text) // 2])
    assert "Running stage" not in succeeds(finished, "repro")


def test_without_a_copy_complete_stages_of_a_torn_dvc_lock_remain(finished: Path) -> None:
    lock = finished / "dvc.lock"
    shutil.rmtree(finished / ".vattctl")
    text = lock.read_text()
    lock.write_text(text[: text.rindex("path") + 2])
    output = succeeds(finished, "repro")
    assert "the stages that it lacked count as changed" in output
    assert "'download' didn't change" in output


CHANGES = {
    "an output changed": lambda project: (project / "data/out.txt").write_text("else"),
    "an output is gone": lambda project: (project / "data/copy.txt").unlink(),
    "the cache is gone": lambda project: shutil.rmtree(project / ".dvc/cache"),
    "the pipeline": lambda project: (project / "dvc.yaml").write_text(
        (project / "dvc.yaml").read_text().replace("cp data", "cp -f data")
    ),
    "what was recorded": lambda project: (project / "dvc.lock").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_last_answer_of_dvc_status_holds_until_a_file_changes(
    finished: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    assert changed_stages() == {}
    (finished / ANSWER).write_text((finished / ANSWER).read_text().replace("{}", '{"kept": []}'))
    assert changed_stages() == {"kept": []}  # DVC was not asked again
    CHANGES[change](finished)
    assert changed_stages().keys() & {"download", "preprocess"}
    assert "kept" not in changed_stages()


def test_a_merge_conflict_in_dvc_lock_is_named(finished: Path) -> None:
    lock = finished / "dvc.lock"
    lock.write_text("<<<<<<< HEAD\n" + lock.read_text())
    done = vattctl(finished, "repro")
    assert done.returncode == 2
    assert "unfinished git merge" in done.stderr


def test_damaged_settings_of_dvc_are_named(finished: Path) -> None:
    (finished / ".dvc/config.local").write_text("['remote \"x")
    done = vattctl(finished, "repro")
    assert done.returncode == 2
    assert ".dvc/config.local" in done.stderr


def test_a_damaged_cache_of_dvc_is_made_again(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = finished / "site"
    monkeypatch.setitem(ENVIRONMENT, "DVC_SITE_CACHE_DIR", str(site))
    succeeds(finished, "repro", "--force")
    databases = list(site.glob("**/*.db"))
    for file in databases:
        file.write_bytes(b"not a database at all" * 1000)
        for rest in file.parent.glob(f"{file.name}-*"):
            rest.unlink()
    assert databases
    assert "removed a damaged cache" in succeeds(finished, "repro", "--force")


def test_a_refused_change_leaves_params_yaml_as_it_is(project: Path) -> None:
    before = (project / "params.yaml").read_text()
    process = start(project, "dvc", "repro")
    done = vattctl(project, "repro", "--set", "pretrain.steps=7")
    assert done.returncode == 4
    assert "params.yaml cannot be changed while a stage runs" in done.stderr
    assert (project / "params.yaml").read_text() == before
    process.kill()


def test_another_dvc_at_work_is_waited_for_and_named(finished: Path) -> None:
    (finished / ".dvc/tmp/rwlock").write_text("")
    with (finished / ".dvc/tmp/lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        done = vattctl(finished, "repro")
    assert done.returncode == 4
    assert "another DVC holds" in done.stderr


@pytest.mark.slow
def test_kills_at_random_moments_leave_nothing_behind_and_wedge_nothing(project: Path) -> None:
    (project / "wait").unlink()
    draw = random.Random(0)
    for number in range(30):
        (project / "params.yaml").write_text(
            (ROOT / "params.yaml").read_text() + f"# attempt {number}\n"
        )
        (project / "data/out.txt").unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "vattctl.cli", "repro", "--force"],
            cwd=project, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(draw.uniform(0.2, 4))
        running = processes(project)
        if running:
            with contextlib.suppress(psutil.NoSuchProcess):
                draw.choice(running).kill()
        process.wait(timeout=60)
        wait_until(lambda: processes(project) == [], seconds=30)
    succeeds(project, "repro")
    assert (project / "data/copy.txt").read_text() == "made"
