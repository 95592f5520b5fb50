"""Kills, full disks and torn files, tried on a real project: is anything lost, duplicated or stuck?

    python bench/faults.py [--kills 200] [--only kills|faults] [--seed 0] [--json FILE]

A small demo project runs once undisturbed: its files are the truth. Kills: each stage starts again
and again from the state before it, and a SIGKILL hits the stage, DVC, vattctl, or all of them at
a random moment, until the stage gets to its end; then its files must equal the truth. Faults: each
damages one thing (a torn file, a full disk, a locked database), runs a command, checks its exit
code, mends what a user would mend, and checks that the next run reaches the truth. It needs
Linux; the faults with a full or read-only disk need the right to mount.
"""

import argparse
import hashlib
import json
import operator
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.test_stages import SMALL, environment, new_project

STAGES = ("download", "preprocess", "pretrain", "finetune@audio-scratch", "evaluate", "report")
SHARE = (0.25, 0.25, 0.2, 0.1, 0.1, 0.1)  # of the kills; the first two have the most to lose
VICTIMS = ("stage", "stage", "vattctl", "dvc", "all")
MEDIA = 24 * "[0-9a-f]"  # the names of downloaded files
GRACE = 60.0  # seconds in which what was left behind must end by itself, on a busy machine
LIMIT = 600.0  # seconds; a command that takes longer hangs, also on a busy machine
SMALLER = SMALL | {
    "data.demo.train_clips": 48,
    "data.demo.test_clips": 24,
    "preprocess.samples_per_shard": 16,
    "finetune.tasks.audio.train_labels": 16,
    "evaluate.retrieval_pool": 16,
    "report.tsne_clips": 20,
}


# --- a project and its truth ----------------------------------------------------------------------


def vattctl(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vattctl.cli", *arguments]


def run(project: Path, *arguments: str, prefix: tuple[str, ...] = ()) -> tuple[int, str]:
    """A command's exit code and what it printed."""
    try:
        done = subprocess.run(
            [*prefix, *vattctl(*arguments)], cwd=project, env=environment(), text=True, timeout=LIMIT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return -1, f"no end after {LIMIT:.0f} s"
    return done.returncode, done.stdout


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def facts(project: Path, stage: str) -> dict[str, Any]:
    """What a stage has made, so that two projects can be compared; order does not count."""
    data, runs = project / "data", project / "runs/checkpoints"
    if stage == "download":
        rows = lines(data / "download.ledger.jsonl")
        found: dict[str, Any] = {f"clip {row['clip_id']}": row["state"] for row in rows}
        media = sorted((data / "media").glob(MEDIA))
        assert media, "no media"
        found |= {f"media {path.name}": sha(path) for path in media}
        return found | {"rows": len(rows), "manifest": sha(data / "manifest.jsonl")}
    if stage == "preprocess":
        rows = lines(data / "preprocess.ledger.jsonl")
        found = {f"clip {row['clip_id']}": row["state"] for row in rows}
        samples = [row["key"] for row in lines(data / "shards/index.jsonl") if "key" in row]
        found |= {f"sample {key}": count for key, count in Counter(samples).items()}
        found |= {f"shard {tar.name}": sha(tar) for tar in sorted((data / "shards").glob("*.tar"))}
        return found | {"rows": len(rows)}
    if stage == "pretrain":
        history = lines_of_curve(runs / "pretrained/history.json")
        return {"weights": sha(runs / "pretrained/model.safetensors"), "curve": history}
    if stage.startswith("finetune"):
        return {"weights": sha(runs / "finetuned/audio-scratch/model.safetensors")}
    if stage == "evaluate":
        return {"metrics": json.loads((project / "reports/metrics/evaluate.json").read_text())}
    return {"report": (project / "reports/report/report.html").stat().st_size > 10_000}


def lines_of_curve(path: Path) -> list[Any]:
    rows: list[Any] = json.loads(path.read_text(encoding="utf-8"))
    return rows


@dataclass
class Truth:
    """A project before each stage and after the last, and what each stage made undisturbed."""

    root: Path
    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def before(self, stage: str) -> Path:
        return self.root / f"before-{stage.partition('@')[0]}"

    @property
    def finished(self) -> Path:
        return self.root / "finished"


def undisturbed(root: Path) -> Truth:
    """Run every stage once, with a copy of the project before each; or read what an earlier try left."""
    truth, project, known = Truth(root), root / "project", root / "truth.json"
    if known.exists():
        facts_of = json.loads(known.read_text(encoding="utf-8"))
        return Truth(root, facts_of["made"], facts_of["seconds"])
    project.mkdir(parents=True)
    new_project(project)
    settings = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    for key, value in SMALLER.items():
        *sections, name = key.split(".")
        reduce(operator.getitem, sections, settings)[name] = value
    (project / "params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    for stage in STAGES:
        shutil.copytree(project, truth.before(stage), symlinks=True)
        began = time.monotonic()
        code, text = run(project, "repro", stage)
        assert code == 0, f"{stage} does not even run undisturbed:\n{text}"
        truth.seconds[stage] = time.monotonic() - began
        truth.made[stage] = facts(project, stage)
        print(f"undisturbed {stage}: {truth.seconds[stage]:.1f} s", file=sys.stderr)
    code, text = run(project, "repro")
    assert code == 0, text
    project.rename(truth.finished)
    known.write_text(json.dumps({"made": truth.made, "seconds": truth.seconds}), encoding="utf-8")
    return truth


def difference(truth: dict[str, Any], found: dict[str, Any]) -> tuple[int, int, int]:
    """Things lost, doubled (or there for no reason), and changed."""
    lost = len(truth.keys() - found.keys())
    more = len(found.keys() - truth.keys())
    changed = sum(truth[key] != found[key] for key in truth.keys() & found.keys())
    return lost, more, changed


# --- processes ------------------------------------------------------------------------------------


def processes_in(project: Path) -> list[psutil.Process]:
    """Every living process that works in the project's folder."""
    found = []
    for process in psutil.process_iter():
        try:
            there = Path(process.cwd())
            if there.is_relative_to(project) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def victims(project: Path, kind: str) -> list[psutil.Process]:
    """The processes that a kill of this kind hits."""
    hit = []
    for process in processes_in(project):
        try:
            words = " ".join(process.cmdline())
        except psutil.Error:
            continue
        is_stage, is_dvc = "-m stages." in words, "dvc" in words and "repro" in words
        is_vattctl = "vattctl.cli" in words
        if kind == "all" or {"stage": is_stage, "dvc": is_dvc, "vattctl": is_vattctl}[kind]:
            hit.append(process)
    return hit


def strike(project: Path, kind: str, number: signal.Signals = signal.SIGKILL) -> bool:
    """Send a signal; False when nobody of that kind lives."""
    hit = victims(project, kind)
    for process in hit:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue
    return bool(hit)


def orphans(project: Path) -> int:
    """How many processes do not end by themselves; they are ended here."""
    end = time.monotonic() + GRACE
    while (left := processes_in(project)) and time.monotonic() < end:
        time.sleep(0.2)
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return len(left)


# --- kills ----------------------------------------------------------------------------------------


@dataclass
class Kills:
    """The account of one stage."""

    stage: str
    kills: int = 0
    rounds: int = 0
    lost: int = 0
    doubled: int = 0
    changed: int = 0
    wedged: int = 0
    orphans: int = 0
    victims: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def kill_rounds(truth: Truth, stage: str, wanted: int, chance: random.Random) -> Kills:
    """Kill a stage until there were enough kills; compare each time that it got to its end."""
    account = Kills(stage)
    while account.kills < wanted:
        project = truth.root / f"killed-{os.getpid()}"
        shutil.copytree(truth.before(stage), project, symlinks=True)
        ended = False
        while not ended:
            ended = kill_once(project, stage, account, truth.seconds[stage], chance, wanted)
        account.rounds += 1
        if not account.wedged:
            lost, more, changed = difference(truth.made[stage], facts(project, stage))
            account.lost, account.doubled = account.lost + lost, account.doubled + more
            account.changed += changed
        shutil.rmtree(project)
        print(f"of {wanted}: {kill_line(account)}", file=sys.stderr)
    return account


def kill_once(
    project: Path, stage: str, account: Kills, seconds: float, chance: random.Random, wanted: int
) -> bool:
    """Start the stage and kill; True when it ended before that, or cannot be started any more."""
    last = account.kills >= wanted
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(
            vattctl("repro", stage), cwd=project, env=environment(),
            stdout=printed, stderr=subprocess.STDOUT,
        )  # fmt: skip
        kind = chance.choice(VICTIMS)
        end = time.monotonic() + (LIMIT if last else chance.uniform(0.2, 1.1 * seconds))
        while time.monotonic() < end and process.poll() is None:
            time.sleep(0.02)
        if process.poll() is None and not last:
            while process.poll() is None and not strike(project, kind):
                kind = "all"  # DVC or the stage is not there yet
            process.wait()
            account.kills += 1
            account.victims[kind] = account.victims.get(kind, 0) + 1
            account.orphans += orphans(project)
            return False
        process.kill()
        code = process.wait()
        printed.seek(0)
        if code != 0:
            account.wedged += 1
            account.notes.append(f"exit {code}: {printed.read()[-600:]}")
        return True


# --- faults ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """Damage, the command that meets it, the exit codes allowed, and what a user does then."""

    name: str
    stage: str  # the project is copied from before this stage, or "finished"
    damage: Callable[[Path], Any]  # may return what undoes it
    codes: tuple[int, ...]
    command: tuple[str, ...] = ()  # empty: repro of the stage
    prefix: tuple[str, ...] = ()  # a program that runs the command


def truncate(pattern: str, share: float = 0.5) -> Callable[[Path], None]:
    """Cut the files of a pattern short."""

    def damage(project: Path) -> None:
        files = sorted(project.glob(pattern))
        assert files, f"no {pattern}"
        for file in files[:1]:
            data = file.read_bytes()
            if file.is_symlink() or file.stat().st_nlink > 1:
                file.unlink()
            file.write_bytes(data[: int(len(data) * share)])

    return damage


def write(name: str, text: str) -> Callable[[Path], None]:
    def damage(project: Path) -> None:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text, encoding="utf-8")

    return damage


def remove(pattern: str) -> Callable[[Path], None]:
    def damage(project: Path) -> None:
        for path in project.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def mounted(
    folder: str, *, spare: int, read_only: bool = False
) -> Callable[[Path], Callable[[], None]]:
    """A disk of its own over a folder, with what the folder held and `spare` free kilobytes."""

    def damage(project: Path) -> Callable[[], None]:
        target, held, saved = (project / folder, *(project.parent / n for n in ("held", "saved")))
        target.mkdir(parents=True, exist_ok=True)
        shutil.copytree(target, held, symlinks=True)
        # Half a page is lost at the end of each file, and a page for each folder.
        used = sum(4 * (1 + path.lstat().st_size // 4096) for path in held.rglob("*"))
        mount = ["mount", "-t", "tmpfs", "-o", f"size={used + spare}k", "tmpfs", str(target)]
        subprocess.run(mount, check=True)
        shutil.copytree(held, target, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(held)
        disk, filler = os.statvfs(target), target / ".filler"
        filler.write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - 1024 * spare)))
        if read_only:
            subprocess.run(["mount", "-o", "remount,ro", str(target)], check=True)

        def undo() -> None:
            ignored = shutil.ignore_patterns(filler.name)
            shutil.copytree(target, saved, symlinks=True, ignore=ignored)
            subprocess.run(["umount", "-l", str(target)], check=True)
            shutil.rmtree(target)
            saved.rename(target)

        return undo

    return damage


def locked_database(project: Path) -> Callable[[], None]:
    connection = sqlite3.connect(project / "mlflow.db", isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    return connection.close


def clock_set_back(project: Path) -> None:
    """Everything that is there was written tomorrow."""
    tomorrow = time.time() + 86_400
    for path in project.rglob("*"):
        if not path.is_symlink():
            os.utime(path, (tomorrow, tomorrow))


def another_writer(project: Path) -> Callable[[], None]:
    """A second command on the same stage, started a moment before."""
    first = subprocess.Popen(
        vattctl("repro", "pretrain"), cwd=project, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not victims(project, "stage") and first.poll() is None and time.monotonic() < end:
        time.sleep(0.1)

    def undo() -> None:
        first.wait(timeout=LIMIT)

    return undo


def store_at(project: Path, port: int) -> Callable[[], None]:
    """The settings name an MLflow server; call to put them back."""
    settings = project / "params.yaml"
    text = settings.read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    content["machine"]["mlflow_uri"] = f"http://127.0.0.1:{port}"
    settings.write_text(yaml.safe_dump(content), encoding="utf-8")

    def put_back() -> None:
        settings.write_text(text, encoding="utf-8")

    return put_back


def silent_server(project: Path) -> Callable[[], None]:
    """The settings name an MLflow server that accepts connections and never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    put_back = store_at(project, server.getsockname()[1])

    def undo() -> None:
        server.close()
        put_back()

    return undo


def server_gone(number: signal.Signals) -> Callable[[Path], Callable[[], None]]:
    """An MLflow server, which gets a signal once it has a run: it is gone, or hangs."""

    def damage(project: Path) -> Callable[[], None]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        store = project.parent / "store"
        store.mkdir()
        shutil.copy(project / "mlflow.db", store)
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"],
            env=environment() | {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{store}/mlflow.db"},
            cwd=store, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        wait_until(lambda: answers(port))
        put_back = store_at(project, port)

        def undo() -> None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            put_back()

        def later() -> None:
            wait_until(lambda: has_run(store / "mlflow.db"))
            os.killpg(server.pid, number)

        threading.Thread(target=later, daemon=True).start()
        return undo

    return damage


def answers(port: int) -> bool:
    """Whether the server is ready."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
    except OSError:
        return False
    return True


def has_run(database: Path) -> bool:
    """Whether a stage has opened a run there and noted its settings."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        begun = "FROM params JOIN runs USING (run_uuid) WHERE status = 'RUNNING'"
        return bool(connection.execute(f"SELECT count(*) {begun}").fetchone()[0])


def wait_until(is_so: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.05)


def network(*, back: bool) -> tuple[str, ...]:
    """A network of its own, whose link goes down once some media are there; it may come back."""
    up, down = "ip link set lo up", "ip link set lo down"
    enough = "[ $(ls data/media 2>/dev/null | grep -cE '^[0-9a-f]{24}$') -ge 5 ]"
    later = f"until {enough}; do sleep 0.02; done; {down}" + (f"; sleep 5; {up}" if back else "")
    return "unshare", "--net", "sh", "-c", f'{up}; ({later}) & exec "$@"', "sh"


def signalled(number: signal.Signals) -> Callable[[Path], None]:
    """The stage gets a signal two seconds after it began."""

    def damage(project: Path) -> None:
        def later() -> None:
            end = time.monotonic() + 60
            while not victims(project, "stage") and time.monotonic() < end:
                time.sleep(0.02)
            time.sleep(1.5)
            strike(project, "stage", number)

        threading.Thread(target=later, daemon=True).start()

    return damage


RWLOCK = ".dvc/tmp/rwlock"
DEAD = '{"write": {"data/shards": {"pid": 4194303, "cmd": "dvc repro"}}}'
FAULTS = (
    Fault("empty lock of DVC", "preprocess", write(RWLOCK, ""), (0,)),
    Fault("torn lock of DVC", "preprocess", write(RWLOCK, DEAD[:20]), (0,)),
    Fault("lock of DVC held by a dead process", "preprocess", write(RWLOCK, DEAD), (0,)),
    Fault("lock of DVC with something else in it", "preprocess", write(RWLOCK, '{"a": 1}'), (0,)),
    Fault("torn dvc.lock", "finished", truncate("dvc.lock"), (0, 2, 3, 4), ("repro",)),
    Fault("empty dvc.lock", "finished", truncate("dvc.lock", 0), (0, 2, 3, 4), ("repro",)),
    Fault("torn params.yaml", "pretrain", truncate("params.yaml", 0.3), (2,)),
    Fault("last line of the ledger torn", "preprocess", truncate("data/download.ledger.jsonl", 0.97), (0, 3)),
    Fault("manifest cut short", "preprocess", truncate("data/manifest.jsonl"), (0, 3)),
    Fault("a media file cut short", "preprocess", truncate(f"data/media/{MEDIA}"), (3,)),
    Fault("media folder lost", "preprocess", remove("data/media"), (0, 3)),
    Fault("a shard cut short", "pretrain", truncate("data/shards/train-*.tar"), (0, 3)),
    Fault("index of the shards cut short", "pretrain", truncate("data/shards/index.jsonl", 0.511), (0, 3)),
    Fault("vocabulary lost", "pretrain", remove("data/shards/vocabulary.txt"), (0, 3)),
    Fault("checkpoint cut short", "evaluate", truncate("runs/checkpoints/pretrained/model.safetensors"), (0, 3)),
    Fault("config of the checkpoint cut short", "evaluate", truncate("runs/checkpoints/pretrained/config.json"), (0, 3)),
    Fault("a share of the state cut short", "finished", truncate("runs/pretrain-state/step-*/share-*.pt"), (0, 3), ("pretrain", "--set", "pretrain.steps=14")),
    Fault("history beside the state torn", "finished", truncate("runs/pretrain-state/history.jsonl", 0.7), (0, 3), ("pretrain", "--set", "pretrain.steps=14")),
    Fault("outcome of the last stage torn", "finished", write(".vattctl/outcome.json", '{"code": 3'), (0,), ("status",)),
    Fault("record of a run torn", "finished", truncate("reports/runs/*.json"), (0,), ("status",)),
    Fault("metrics cut short", "report", truncate("reports/metrics/evaluate.json"), (0, 3)),
    Fault("MLflow's database cut short", "pretrain", truncate("mlflow.db"), (0, 4)),
    Fault("MLflow's database locked", "pretrain", locked_database, (0, 4)),
    Fault("MLflow's server never answers", "pretrain", silent_server, (0, 4)),
    Fault("MLflow's server gone in the middle", "pretrain", server_gone(signal.SIGKILL), (0,)),
    Fault("MLflow's server hangs in the middle", "pretrain", server_gone(signal.SIGSTOP), (0,)),
    Fault("network gone", "download", write("a", ""), (3, 4), prefix=("unshare", "--net")),
    Fault("network gone in the middle", "download", write("a", ""), (3, 4), prefix=network(back=False)),
    Fault("network gone for some seconds", "download", write("a", ""), (0,), prefix=network(back=True)),
    Fault("clock set back by a day", "pretrain", clock_set_back, (0,)),
    Fault("files left by a killed writer", "preprocess", write("data/.shards.tmp/x", "rest"), (0,)),
    Fault("disk full while shards are written", "preprocess", mounted("data", spare=150), (4,)),
    Fault("disk full while a state is saved", "pretrain", mounted("runs", spare=2000), (4,)),
    Fault("disk full while media are fetched", "download", mounted("data", spare=300), (4,)),
    Fault("disk full everywhere, download", "download", mounted(".", spare=500), (4,)),
    Fault("disk full everywhere, preprocess", "preprocess", mounted(".", spare=100), (4,)),
    Fault("disk full everywhere, pretrain", "pretrain", mounted(".", spare=2000), (4,)),
    Fault("disk full everywhere, evaluate", "evaluate", mounted(".", spare=100), (4,)),
    Fault("disk full everywhere, report", "report", mounted(".", spare=0), (4,)),
    Fault("disk without one free byte", "pretrain", mounted(".", spare=0), (4,)),
    Fault("data folder read-only", "preprocess", mounted("data", spare=9000, read_only=True), (4,)),
    Fault("runs folder read-only", "pretrain", mounted("runs", spare=9000, read_only=True), (4,)),
    Fault("reports folder read-only", "report", mounted("reports", spare=9000, read_only=True), (4,)),
    Fault("whole project read-only", "pretrain", mounted(".", spare=9000, read_only=True), (4,)),
    Fault("two at once", "pretrain", another_writer, (4,)),
    *(
        Fault(f"SIGTERM to {stage.partition('@')[0]}", stage, signalled(signal.SIGTERM), (0, 75))
        for stage in STAGES
    ),
    *(
        Fault(f"SIGINT to {stage.partition('@')[0]}", stage, signalled(signal.SIGINT), (0, 130))
        for stage in STAGES
    ),
)  # fmt: skip


@dataclass
class Outcome:
    """What a fault led to."""

    name: str
    code: int
    line: str
    state: str  # green, red, or skipped
    why: str = ""


@contextmanager
def copied(truth: Truth, fault: Fault) -> Iterator[Path]:
    source = truth.finished if fault.stage == "finished" else truth.before(fault.stage)
    project = truth.root / f"faulty-{os.getpid()}" / "project"
    shutil.copytree(source, project, symlinks=True)
    try:
        yield project
    finally:
        orphans(project)
        shutil.rmtree(project.parent, ignore_errors=True)


def try_fault(truth: Truth, fault: Fault) -> Outcome:
    """Damage, run, undo, run again: the end must be the truth."""
    with copied(truth, fault) as project:
        try:
            undo = fault.damage(project)
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            return Outcome(fault.name, -1, "", "skipped", f"cannot be made here: {error}")
        params = (project / "params.yaml").read_text(encoding="utf-8", errors="replace")
        code, text = run(project, *(fault.command or ("repro", fault.stage)), prefix=fault.prefix)
        if callable(undo):
            undo()
        said = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        outcome = Outcome(fault.name, code, first_error(text) or said, "green")
        if code not in fault.codes:
            outcome.state, outcome.why = "red", f"exit {code}, allowed {fault.codes}: {text[-500:]}"
            return outcome
        if "Traceback" in text:
            outcome.state, outcome.why = "red", "a traceback is shown"
            return outcome
        why = recovers(truth, fault, project, params)
        if why:
            outcome.state, outcome.why = "red", why
        return outcome


def first_error(text: str) -> str:
    """The line that says what is wrong."""
    marks = ("error", "cannot", "missing", "full", "broken", "read-only", "another", "not ")
    return next((x for x in text.splitlines() if any(mark in x.lower() for mark in marks)), "")[
        :160
    ]


def recovers(truth: Truth, fault: Fault, project: Path, params: str) -> str:
    """Put the damaged input back as a user would, run again; why it is not the truth, or ""."""
    source = truth.finished if fault.stage == "finished" else truth.before(fault.stage)
    for name in ("params.yaml", "dvc.lock", "mlflow.db"):
        if (source / name).exists():
            shutil.copy(source / name, project / name)
    for folder in ("data", "runs/checkpoints", "reports/metrics"):
        restore(source / folder, project / folder)
    stage = "pretrain" if fault.stage == "finished" else fault.stage
    code, text = run(project, "repro", stage)
    if code != 0:
        return f"the next run ends with {code}: {text[-500:]}"
    lost, more, changed = difference(truth.made[stage], facts(project, stage))
    return f"{lost} lost, {more} doubled, {changed} changed" if lost or more or changed else ""


def restore(source: Path, target: Path) -> None:
    """Give back each file that stood in `source` and is another now; what is new stays."""
    for path in (p for p in source.rglob("*") if p.is_file()):
        there = target / path.relative_to(source)
        if not there.is_file() or there.stat().st_size != path.stat().st_size:
            there.parent.mkdir(parents=True, exist_ok=True)
            there.unlink(missing_ok=True)
            shutil.copy(path, there)


# --- the whole ------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--only", choices=["kills", "faults"])
    parser.add_argument("--match", nargs="+", default=[""], help="parts of names of stages, faults")
    parser.add_argument("--folder", type=Path, help="keep the undisturbed project, or use it again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    kills: list[Kills] = []
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        truth = undisturbed((chosen.folder or Path(folder)).absolute())
        for account in tried(truth, chosen):
            (kills if isinstance(account, Kills) else outcomes).append(account)  # type: ignore[arg-type]
            print(
                kill_line(account) if isinstance(account, Kills) else fault_line(account),
                flush=True,
            )
            if chosen.json:
                rows = {"kills": list(map(asdict, kills)), "faults": list(map(asdict, outcomes))}
                chosen.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    bad = sum(k.lost + k.doubled + k.changed + k.wedged + k.orphans for k in kills)
    red = sum(outcome.state == "red" for outcome in outcomes)
    total = sum(k.kills for k in kills)
    green = sum(outcome.state == "green" for outcome in outcomes)
    print(f"{total} kills, {bad} of them with a loss; {green} faults green, {red} red")
    return 1 if bad or red else 0


def tried(truth: Truth, chosen: argparse.Namespace) -> Iterator["Kills | Outcome"]:
    """The account of each stage and the outcome of each fault that the options choose."""
    chance = random.Random(chosen.seed)
    for stage, share in zip(STAGES, SHARE, strict=True):
        if chosen.only != "faults" and any(part in stage for part in chosen.match):
            yield kill_rounds(truth, stage, round(chosen.kills * share), chance)
    for fault in FAULTS:
        if chosen.only != "kills" and any(part in fault.name for part in chosen.match):
            yield try_fault(truth, fault)


def kill_line(account: Kills) -> str:
    hit = ", ".join(f"{name} {count}" for name, count in sorted(account.victims.items()))
    return (
        f"| {account.stage} | {account.kills} ({hit}) | {account.rounds} | {account.lost} | "
        f"{account.doubled} | {account.changed} | {account.wedged} | {account.orphans} |"
        + "".join(f"\n    {note}" for note in account.notes)
    )


def fault_line(outcome: Outcome) -> str:
    why = f"\n    {outcome.why}" if outcome.why else ""
    return f"| {outcome.name} | {outcome.code} | {outcome.line} | {outcome.state} |{why}"


if __name__ == "__main__":
    sys.exit(main())
