"""`vattctl doctor`: what of this machine works, and what params.yaml needs of it.

Every check is a function that yields lines. A line fails only where params.yaml needs what is
missing (or nothing works without it); what may matter later is a warning.
"""

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from vatt import __version__
from vatt.errors import MachineError, SettingsError, VattError, redact
from vattctl.dvc import was_made_by_init
from vattctl.params import PARAMS, enter_project, json_option, print_json
from vattctl.project import shipped_pipeline

if TYPE_CHECKING:
    from vatt.config import Params

State = Literal["ok", "warn", "fail"]
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
GB = 1e9
FICLONE = 0x40049409  # of Linux: share the blocks of a file
OLDEST_PYTHON = (3, 11)
UI_PORT = 5000
CLOCK_SECONDS = 2.0  # that the clocks of this machine and its disk may differ
OLD_DAYS = 60  # of yt-dlp: sites change
OLDEST_DENO = (2, 3, 0)  # that yt-dlp can use
DECODERS = ("h264", "hevc", "vp9", "av1", "aac", "mp3", "opus", "vorbis")  # of common videos
REPEATS = 8  # of a product that is measured
SPARE_GB = 5.0  # of disk, below which a warning is due
ANSWER_SECONDS = 2.0  # that a tracking server may take


@dataclass(frozen=True, slots=True)
class Finding:
    """A line of the result."""

    name: str
    state: State
    detail: str
    remedy: str | None = None


Findings = Iterator[Finding]


@click.command(
    epilog="""\b
Examples:
  vattctl doctor
  vattctl doctor --json"""
)
@json_option
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Check the machine, the installed programs and the project, with a remedy for each problem.

    Outside a project, only the machine is checked. Exit code 4 if something fails that params.yaml
    needs.
    """
    findings = list(examine(*_project(context)))
    counts = {state: sum(one.state == state for one in findings) for state in COLOURS}
    if as_json:
        print_json(counts=counts, checks=list(map(asdict, findings)))
    else:
        for one in findings:
            click.echo(f"{click.style(f'{one.state:4}', COLOURS[one.state])}  {_line(one)}")
        click.echo(f"{counts['ok']} ok, {_many(counts['warn'], 'warning')}, "
                   f"{_many(counts['fail'], 'failure')}")  # fmt: skip
    if counts["fail"]:
        context.exit(MachineError.exit_code)


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _line(one: Finding) -> str:
    remedy = f"\n{'':19}-> {one.remedy}" if one.remedy else ""
    return f"{one.name:11}  {one.detail}{remedy}"


def _project(context: click.Context) -> tuple[Path | None, "Params | None", Finding]:
    """The project's folder and settings, where they are there, and a line on both."""
    from vatt.config import load_params

    try:
        folder = enter_project(context)
    except SettingsError:
        if context.obj["project"] is not None:
            raise
        remedy = "`vattctl init DIR` makes a project"
        return (
            None,
            None,
            Finding("project", "ok", "none here: only the machine is checked", remedy),
        )
    try:
        return folder, load_params(), Finding("project", "ok", f"{folder}: {PARAMS} is valid")
    except VattError as error:
        return folder, None, Finding("project", "fail", error.problem, error.hint)


def examine(project: Path | None, params: "Params | None", about: Finding) -> Findings:
    """All lines, in order."""
    yield about
    checks: tuple[Callable[[Path, Params | None], Findings], ...] = (
        _python, _torch, _precision, _deepspeed, _collectives, _ffmpeg, _pyav, _yt_dlp, _extras,
        _disk, _memory, _git, _dvc, _mlflow, _ports, _clock, _pipeline,
    )  # fmt: skip
    for check in checks:
        try:
            yield from check(project or Path.cwd(), params)
        except VattError as error:
            yield Finding(check.__name__.strip("_"), "fail", error.problem, error.hint)
        except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
            detail = redact(f"cannot be checked: {type(error).__name__}: {error}").splitlines()[0]
            yield Finding(check.__name__.strip("_"), "fail", detail, "install vattctl again")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- Python, torch, devices -----------------------------------------------------------------------


def _python(project: Path, params: "Params | None") -> Findings:
    version = sys.version.partition(" ")[0]
    if sys.version_info < OLDEST_PYTHON:
        yield Finding("python", "fail", version, "install Python 3.11 or newer")
    else:
        yield Finding("python", "ok", f"{version}, vattctl {__version__}")


def _torch(project: Path, params: "Params | None") -> Findings:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("torch", "fail", f"import fails: {error}", "install vattctl again")
        return
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
    yield Finding("torch", "ok", f"{torch.__version__}, {built}")
    processes = params.machine.processes if params else 1
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        facts = torch.cuda.get_device_properties(0)
        name = f"{count} x {facts.name}, {facts.total_memory / 2**30:.0f} GiB each"
        if processes > count and not (params and params.machine.launcher_arguments):
            remedy = f"set machine.processes to {count} or less"
            yield Finding("device", "fail", f"{name}, for {processes} processes", remedy)
        else:
            yield Finding("device", "ok", name)
        return
    cores = f"CPU, {len(os.sched_getaffinity(0))} cores"
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        remedy = (
            "compare `nvidia-smi` with the CUDA version that torch was built for; "
            "https://pytorch.org/get-started says which torch fits the driver"
        )
        yield Finding("device", "warn", f"{cores}; there is a GPU that torch cannot use", remedy)
    else:
        yield Finding("device", "ok", cores)


def _precision(project: Path, params: "Params | None") -> Findings:
    """A small product in each type: whether it runs, how fast, and how it rounds."""
    try:
        import torch
    except (ImportError, OSError):
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    size = 4096 if device.type == "cuda" else 256
    left, right = (torch.randn(size, size, generator=generator).to(device) for _ in range(2))
    exact = (left[:8].double() @ right.double()).cpu()
    speeds: dict[str, float] = {}
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        try:
            seconds, error = _product(left.to(kind), right.to(kind), exact)
        except RuntimeError as problem:
            needed = params is not None and name == "bf16" and _wants_bf16(params)
            remedy = "set each `precision` in params.yaml to fp32" if needed else None
            state: State = "fail" if needed else "ok"
            yield Finding(name, state, f"does not run: {problem}".splitlines()[0], remedy)
            continue
        speeds[name] = 2 * size**3 / seconds
        rounded = f"largest error {error:.0e}"
        yield _judge(name, speeds, rounded, is_needed=params is None or _wants_bf16(params))


def _product(left: Any, right: Any, exact: Any) -> tuple[float, float]:
    """The seconds of a product (the best), and its largest error, relative to its largest value."""
    import torch

    def finish() -> None:
        if left.is_cuda:
            torch.cuda.synchronize()

    took = []
    for _ in range(REPEATS):  # the first one also prepares
        start = time.perf_counter()
        answer = left @ right
        finish()
        took.append(time.perf_counter() - start)
    error = (answer[:8].double().cpu() - exact).abs().max() / exact.abs().max()
    return min(took[1:]), float(error)


def _judge(name: str, speeds: dict[str, float], rounded: str, *, is_needed: bool) -> Finding:
    ratio = speeds[name] / speeds.get("fp32", speeds[name])
    shown = f"{speeds[name] / 1e9:,.{0 if speeds[name] >= 1e10 else 1}f} GFLOP/s"
    detail = f"runs at {shown}, {ratio:.2g} x fp32, {rounded}"
    if name == "fp32":
        return Finding(name, "ok", f"runs at {shown}, {rounded}")
    if name == "bf16" and ratio < 0.9 and is_needed:
        remedy = "this processor has no fast bf16; precision fp32 in params.yaml may be faster"
        return Finding(name, "warn", detail, remedy)
    return Finding(name, "ok", detail)


def _wants_bf16(params: "Params") -> bool:
    tasks = [params.finetune.tasks[name].precision for name in params.finetune.run]
    return "bf16" in (params.pretrain.precision, params.evaluate.precision, *tasks)


# --- training -------------------------------------------------------------------------------------


def _deepspeed(project: Path, params: "Params | None") -> Findings:
    version = _version("deepspeed")
    if version is None or importlib.util.find_spec("deepspeed") is None:
        yield Finding("deepspeed", "fail", "not installed", "pip install deepspeed")
        return
    missing = [program for program in ("g++", "ninja") if shutil.which(program) is None]
    offload = params.machine.offload if params else "none"
    if offload != "none" and missing:
        remedy = "install it, or set machine.offload to none"
        detail = f"{version}; machine.offload compiles its optimiser and finds no {missing[0]}"
        yield Finding("deepspeed", "fail", detail, remedy)
    else:
        note = "" if not missing else f" (without {missing[0]}, offloading is not possible)"
        yield Finding("deepspeed", "ok", f"{version}{note}")


def _collectives(project: Path, params: "Params | None") -> Findings:
    """What processes communicate with."""
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError):
        return
    on_gpu = torch.cuda.is_available()
    name = "nccl" if on_gpu else "gloo"
    there = dist.is_available() and (
        dist.is_nccl_available() if on_gpu else dist.is_gloo_available()
    )
    if not there:
        remedy = "install torch from https://pytorch.org/get-started"
        yield Finding(name, "fail", "torch was built without it", remedy)
    elif on_gpu:
        yield Finding(name, "ok", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Finding(name, "ok", "for several processes on CPUs; NCCL needs GPUs")


# --- media ----------------------------------------------------------------------------------------


def _ffmpeg(project: Path, params: "Params | None") -> Findings:
    from vatt.data.clips.media import ffmpeg_version, find_ffmpeg

    program = find_ffmpeg(params.machine.ffmpeg if params else None)
    version = ffmpeg_version(program)
    listed = subprocess.run(
        [program, "-hide_banner", "-codecs"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    ).stdout
    storage = {"libx264": "video_storage h264", "aac": "audio_storage aac", "flac": "flac"}
    wanted = {"libx264"} if params is None or params.preprocess.video_storage == "h264" else set()
    wanted |= {params.preprocess.audio_storage} & set(storage) if params else set()
    encoders = {"libx264": "libx264", "aac": r"\.EA.* aac ", "flac": r"\.EA.* flac "}
    lost = [name for name in sorted(wanted) if not re.search(encoders[name], listed)]
    remedy = "set machine.ffmpeg to null: the one in the imageio-ffmpeg package has them all"
    if lost:
        yield Finding("ffmpeg", "fail", f"{version} cannot encode {', '.join(lost)}", remedy)
        return
    lost = [name for name in DECODERS if not re.search(rf"^ D.{{5}} {name} ", listed, re.MULTILINE)]
    if lost:
        yield Finding("ffmpeg", "warn", f"{version} cannot decode {', '.join(lost)}", remedy)
    else:
        yield Finding("ffmpeg", "ok", f"{version}; {', '.join(DECODERS)}")


def _pyav(project: Path, params: "Params | None") -> Findings:
    try:
        import av
    except (ImportError, OSError) as error:
        yield Finding("pyav", "fail", f"import fails: {error}", "pip install --force-reinstall av")
        return
    libraries = ".".join(map(str, av.library_versions["libavcodec"]))
    lost = [name for name in DECODERS if name not in _decoders(av)]
    detail = f"{av.__version__}, libavcodec {libraries}"
    if lost:
        remedy = "pip install --force-reinstall --only-binary av av"
        yield Finding("pyav", "warn", f"{detail}, cannot decode {', '.join(lost)}", remedy)
    else:
        yield Finding("pyav", "ok", detail)


def _decoders(av: Any) -> set[str]:
    known = set(av.codecs_available)
    aliases = {"av1": {"av1", "libdav1d", "libaom-av1"}, "vp9": {"vp9", "libvpx-vp9"}}
    return {name for name in DECODERS if aliases.get(name, {name}) & known}


def _yt_dlp(project: Path, params: "Params | None") -> Findings:
    version = _version("yt-dlp")
    if version is None:
        yield Finding("yt-dlp", "fail", "not installed", "pip install yt-dlp")
        return
    found = re.match(r"(\d{4})\.(\d+)\.(\d+)", version)
    age = (datetime.now(UTC).date() - date(*map(int, found.groups()))).days if found else 0
    deno, scripts = _deno_version(), _version("yt-dlp-ejs")
    detail = f"{version}, {max(age, 0)} days old"
    detail += f"; JavaScript: deno {'.'.join(map(str, deno))}" if deno else "; no JavaScript (deno)"
    if params is None or not params.data.allow_youtube:
        yield Finding("yt-dlp", "ok", detail)
    elif deno is None or deno < OLDEST_DENO:
        wanted = ".".join(map(str, OLDEST_DENO))
        remedy = f"YouTube needs deno {wanted} or newer: https://deno.com"
        yield Finding("yt-dlp", "fail", detail, remedy)
    elif scripts is None:
        remedy = "YouTube needs them: pip install 'vattctl[youtube]'"
        yield Finding("yt-dlp", "fail", f"{detail}; its scripts are not installed", remedy)
    elif age > OLD_DAYS:
        yield Finding("yt-dlp", "warn", detail, "sites change: pip install --upgrade yt-dlp")
    else:
        yield Finding("yt-dlp", "ok", detail)


def _deno_version() -> tuple[int, ...] | None:
    """Of the only runtime that yt-dlp uses unasked, because it shuts scripts in."""
    if shutil.which("deno") is None:
        return None
    done = subprocess.run(
        ["deno", "--version"], capture_output=True, text=True, check=False, timeout=ANSWER_SECONDS
    )
    found = re.match(r"deno (\d+)\.(\d+)\.(\d+)", done.stdout)
    return tuple(map(int, found.groups())) if found else None


def _extras(project: Path, params: "Params | None") -> Findings:
    """Optional packages that the settings ask for."""
    if params is None:
        return
    machine = params.machine
    wanted = {
        "ray": ("ray", "pip install 'vattctl[ray]', or machine.executor: local"),
        "languages": ("py3langid", "pip install 'vattctl[text]', or an empty list of languages"),
    }
    url = (machine.shards_url or "").partition("://")[0]
    stores = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
    text = params.preprocess.text_quality
    needed = {"ray": machine.executor == "ray", "languages": bool(text and text.languages)}
    if url in stores:
        wanted[url] = (stores[url], f"pip install {stores[url]}: machine.shards_url needs it")
        needed[url] = True
    for name, (package, remedy) in wanted.items():
        version = _version(package)
        if needed[name] and version is None:
            yield Finding(name, "fail", f"{package} is not installed", remedy)
        elif needed[name]:
            yield Finding(name, "ok", f"{package} {version}")


# --- room -----------------------------------------------------------------------------------------


def _disk(project: Path, params: "Params | None") -> Findings:
    """A line for each disk on which something will be written."""
    if not os.access(project, os.W_OK):
        yield Finding(
            "disk", "fail", f"no permission to write in {project}", "change it: chmod u+w"
        )
        return
    needs: dict[int, tuple[Path, float]] = {}
    for place, need in _needed_disk(params) if params else [(project, 0.0)]:
        folder = next(one for one in (project / place, *(project / place).parents) if one.exists())
        disk = folder.stat().st_dev
        known, before = needs.get(disk, (folder, 0.0))
        needs[disk] = known, before + need
    for folder, need in needs.values():
        yield _room(folder, need / GB, is_known=params is not None)


def _room(folder: Path, need: float, *, is_known: bool) -> Finding:
    usage = shutil.disk_usage(folder)
    free = usage.free / GB
    detail = f"{free:,.0f} GB free of {usage.total / GB:,.0f} at {folder}"
    detail += f"; params.yaml needs about {need:,.1f}" if is_known else ""
    remedy = "free some space, or name another disk in `paths` of params.yaml"
    if free < need:
        return Finding("disk", "fail", detail, remedy)
    if free < max(1.5 * need, need + SPARE_GB):
        return Finding("disk", "warn", detail, remedy)
    return Finding("disk", "ok", detail)


def _needed_disk(params: "Params") -> list[tuple[Path, float]]:
    """Places and the bytes still to be written: shards of all clips, states, checkpoints."""
    from vatt.plan.memory import ADAM_STATES, FP32, SGD_STATES, count

    paths, weights = params.paths, count(params.model).all * FP32
    shards, states = 0.0, 0.0
    if not (paths.shards / "index.jsonl").exists():
        shards = _num_clips(params) * _clip_bytes(params)
    if not paths.pretrained.exists():
        moments = SGD_STATES if params.pretrain.optimizer.name == "sgd" else ADAM_STATES
        states = weights * (1 + moments) * (params.pretrain.keep_states + 1)
    checkpoints = weights * (1 + len(params.finetune.run) * len(params.finetune.init))
    return [
        (paths.shards, shards),
        (paths.pretrain_state, states),
        (paths.checkpoints, checkpoints),
        (Path(), shards + 2 * checkpoints),  # DVC's cache of both, MLflow's artifacts
    ]


def _num_clips(params: "Params") -> float:
    """The manifest's clips by its size, or the demo's by its settings."""
    manifest = params.paths.manifest
    if manifest.is_file() and manifest.suffix == ".jsonl":
        with manifest.open("rb") as file:
            lines = file.readlines(1_000_000)
        mean = sum(map(len, lines)) / max(len(lines), 1)
        return manifest.stat().st_size / max(mean, 1.0)
    demo = params.data.demo
    return demo.train_clips + demo.test_clips if params.data.source == "demo" else 0.0


def _clip_bytes(params: "Params") -> float:
    """Of a clip in a shard, by rates that are measured in docs/data-format.md."""
    settings = params.preprocess
    pixels = settings.short_side**2 * 16 / 9 * settings.fps * settings.clip_seconds
    picture = pixels * (0.05 if settings.video_storage == "h264" else 0.15)
    rate = {"pcm": 2.0, "flac": 1.2}.get(settings.audio_storage)
    sound = settings.audio_hz * rate if rate else settings.aac_kbps * 1000 / 8
    return picture + sound * settings.clip_seconds + 5_000  # headers of the tar and the json


def _memory(project: Path, params: "Params | None") -> Findings:
    import psutil

    room, limit = psutil.virtual_memory().available, _memory_limit()
    detail = f"{room / 2**30:.1f} GiB available"
    if limit is not None and limit < room:
        room, detail = limit, f"{limit / 2**30:.1f} GiB, the limit of this container"
    if params is None or _version("torch") is None:
        yield Finding("memory", "ok", detail)
        return
    from vatt.plan.forecast import as_set, forecast_memory, this_place

    place = this_place(params)
    one = forecast_memory(params, as_set(params, place), place).total
    if place.on_gpu:
        import torch

        room, total = torch.cuda.mem_get_info()[0], one
        detail += f"; on the GPU {room / 2**30:.0f} GiB"
    else:
        one *= params.machine.processes
        total = one + params.machine.cache_gb * GB  # the cache fills as far as there is room
    detail += f"; a pre-training needs about {total / 2**30:.1f} GiB"
    if total > room:
        remedy = "`vattctl plan` finds settings that fit, such as machine.micro_batch_size"
        yield Finding("memory", "fail" if one > room else "warn", detail, remedy)
    else:
        yield Finding("memory", "ok", detail)


def _memory_limit() -> int | None:
    """What a container may still take."""
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        return limit - used
    return None


# --- git, DVC, MLflow -----------------------------------------------------------------------------


def _git(project: Path, params: "Params | None") -> Findings:
    if shutil.which("git") is None:
        remedy = "install git; without it, DVC keeps no history of settings and metrics"
        yield Finding("git", "warn", "not installed", remedy)
        return
    done = subprocess.run(["git", "--version"], capture_output=True, text=True, check=False)
    yield Finding("git", "ok", done.stdout.strip().removeprefix("git version "))


def _dvc(project: Path, params: "Params | None") -> Findings:
    version = _version("dvc")
    if version is None:
        yield Finding("dvc", "fail", "not installed", "pip install dvc")
        return
    folders = (project, *project.parents)
    repository = next((folder for folder in folders if (folder / ".dvc").is_dir()), None)
    if repository is None:
        if params is None:
            yield Finding("dvc", "ok", version)
        else:
            remedy = "run `dvc init` in the project's root"
            yield Finding("dvc", "fail", f"{version}; no .dvc here or above", remedy)
        return
    link = _link_type(repository)
    detail = f"{version}, cache links: {link}"
    if link == "copy":
        remedy = "every output lies on the disk twice; keep .dvc/cache on the same disk as the data"
        yield Finding("dvc", "warn", detail, remedy)
    else:
        yield Finding("dvc", "ok", detail)


def _link_type(repository: Path) -> str:
    """How DVC can link a file of its cache into the project without a copy."""
    cache = (
        repository / ".dvc/cache" if (repository / ".dvc/cache").is_dir() else repository / ".dvc"
    )
    try:
        with (
            tempfile.NamedTemporaryFile(dir=cache) as source,
            tempfile.TemporaryDirectory(dir=repository, prefix=".vattctl-") as folder,
        ):
            source.write(b"x")
            source.flush()
            target = Path(folder) / "link"
            with target.open("wb") as file, contextlib.suppress(OSError):
                fcntl.ioctl(file, FICLONE, source.fileno())
                return "reflink"
            target.unlink()
            with contextlib.suppress(OSError):
                target.hardlink_to(source.name)
                return "hardlink"
    except OSError:
        return "unknown, the folder is read-only"
    return "copy"


def _mlflow(project: Path, params: "Params | None") -> Findings:
    version = _version("mlflow")
    if version is None:
        yield Finding("mlflow", "fail", "not installed", "pip install mlflow")
        return
    if params is None:
        yield Finding("mlflow", "ok", version)
        return
    from vatt.tracking.mlflow import store_uri

    uri = store_uri(params.machine)
    detail = f"{version}, store {redact(uri)}"
    if uri.startswith("sqlite:///"):
        yield _database(Path(uri.removeprefix("sqlite:///")), detail)
    elif uri.startswith(("http://", "https://")):
        yield _server(uri, detail)
    else:
        yield Finding("mlflow", "ok", detail)


def _database(file: Path, detail: str) -> Finding:
    """Whether this version of MLflow can use the database; it upgrades older ones itself."""
    if not file.exists():
        return Finding("mlflow", "ok", f"{detail} (made by the first run)")
    try:
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
            revision = database.execute("SELECT version_num FROM alembic_version").fetchone()[0]
    except (sqlite3.Error, TypeError) as error:
        remedy = f"move {file} away: a new one is made; or restore a copy of it"
        return Finding("mlflow", "fail", f"{detail} cannot be read: {error}", remedy)
    known, newest = _revisions()
    if revision == newest:
        return Finding("mlflow", "ok", f"{detail}, schema {revision}")
    if revision in known:
        remedy = f"keep a copy, then: mlflow db upgrade sqlite:///{file}"
        return Finding("mlflow", "warn", f"{detail} has the schema of an older MLflow", remedy)
    remedy = "install the version of MLflow that wrote it, or a newer one"
    return Finding("mlflow", "fail", f"{detail} was written by a newer MLflow", remedy)


def _revisions() -> tuple[set[str], str | None]:
    """The database schemas that the installed MLflow knows, and the newest; it is not imported."""
    spec = importlib.util.find_spec("mlflow")
    folder = Path(spec.origin or "").parent if spec else Path()
    before = {}
    for file in sorted((folder / "store/db_migrations/versions").glob("*.py")):
        text = file.read_text(encoding="utf-8")
        own = re.search(r"^revision = [\"'](\w+)", text, re.MULTILINE)
        if own:
            down = re.search(r"^down_revision = [\"'](\w+)", text, re.MULTILINE)
            before[own[1]] = down[1] if down else None
    newest = set(before) - set(before.values())
    return set(before), next(iter(newest), None)


def _server(uri: str, detail: str) -> Finding:
    from urllib.error import URLError
    from urllib.request import urlopen

    try:
        with urlopen(f"{uri.rstrip('/')}/version", timeout=ANSWER_SECONDS) as answer:
            theirs = answer.read(100).decode(errors="replace").strip()
    except (URLError, OSError, ValueError) as error:
        remedy = "start the server, or correct machine.mlflow_uri; training goes on without it"
        return Finding("mlflow", "warn", f"{detail} does not answer: {redact(str(error))}", remedy)
    return Finding("mlflow", "ok", f"{detail}, server {theirs}")


# --- network, clock, project ----------------------------------------------------------------------


def _ports(project: Path, params: "Params | None") -> Findings:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError as error:
        remedy = "processes of a training meet on a port of 127.0.0.1: allow it"
        yield Finding("ports", "fail", f"no port of 127.0.0.1 can be used: {error}", remedy)
        return
    with socket.socket() as probe:
        in_use = probe.connect_ex(("127.0.0.1", UI_PORT)) == 0
    detail = f"127.0.0.1 has free ports; {UI_PORT}, that of `vattctl ui`, is"
    if in_use:
        remedy = f"vattctl ui --port {UI_PORT + 1}"
        yield Finding("ports", "warn", f"{detail} in use", remedy)
    else:
        yield Finding("ports", "ok", f"{detail} free")


def _clock(project: Path, params: "Params | None") -> Findings:
    """This machine's clock against the disk's, and against the newest file of the project."""
    now = time.time()
    remedy = "set the clock (timedatectl set-ntp true): DVC and make compare times of files"
    apart = 0.0
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=project) as file:
        apart = Path(file.name).stat().st_mtime - now
    locks = [project / name for name in ("dvc.lock", "params.yaml", "dvc.yaml")]
    written = max((path.stat().st_mtime for path in locks if path.exists()), default=now)
    if abs(apart) > CLOCK_SECONDS:
        yield Finding("clock", "warn", f"{apart:+.0f} s from the clock of the disk", remedy)
    elif written > now + CLOCK_SECONDS:
        detail = f"files of the project are {written - now:,.0f} s in the future"
        yield Finding("clock", "warn", detail, remedy)
    else:
        yield Finding("clock", "ok", datetime.now(UTC).isoformat(timespec="seconds"))


def _pipeline(project: Path, params: "Params | None") -> Findings:
    """The pipeline of this version, and whether a stage is running."""
    if params is None:
        return
    text = (project / "dvc.yaml").read_text(encoding="utf-8")
    if was_made_by_init(project) and text != shipped_pipeline():
        remedy = "`vattctl init --update .` writes that of the installed version"
        yield Finding("pipeline", "warn", "dvc.yaml is of another version, or was edited", remedy)
    else:
        yield Finding("pipeline", "ok", "dvc.yaml fits the installed version")
    from vatt.files import lock
    from vatt.process import SETTINGS_LOCK

    if not (project / SETTINGS_LOCK).exists():  # nothing has run
        return
    try:
        with lock(project / SETTINGS_LOCK):
            pass
    except MachineError:
        remedy = "wait until it has ended, or stop it; `vattctl status` shows which"
        yield Finding("stages", "warn", "a stage is running in this project", remedy)
