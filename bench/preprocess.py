"""Seconds of 720p video that preprocessing turns into shards in a second on one core.

    python bench/preprocess.py                       # about four minutes
    python bench/preprocess.py --source film.mp4     # with your own film

Compared, alternately, with one plain ffmpeg command that decodes once and cuts by split and trim,
and with one ffmpeg command per clip. All write the same clips (settings of presets/paper.yaml: ten
seconds, 10 frames per second, short side 256, H.264, sound as 48 kHz mono PCM). First one core
each, then two processes on two cores; ratios are medians over the rounds. The film is made with
ffmpeg: a test picture with noise at 2.5 Mbit/s, 30 frames per second, with a tone.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vatt.config import Params, load_params
from vatt.data.clips.ledger import Entry
from vatt.data.clips.manifest import Clip
from vatt.data.clips.media import find_ffmpeg
from vatt.data.sharding.shards import write_shards

ROOT = Path(__file__).parents[1]
QUIET = ("-nostdin", "-hide_banner", "-loglevel", "error", "-y")
X264 = ("-c:v", "libx264", "-preset", "veryfast", "-tune", "fastdecode", "-threads", "1")
PLAIN = ("-filter_complex_threads", "1", *QUIET)


def make_film(path: Path, seconds: int) -> None:
    """A film of 1280 x 720 with sound."""
    picture = f"testsrc2=s=1280x720:r=30:d={seconds},noise=alls=6:allf=t"
    tone = f"sine=f=440:r=44100:d={seconds}"
    run(
        *("-f", "lavfi", "-i", picture, "-f", "lavfi", "-i", tone, "-c:v", "libx264"),
        *("-preset", "veryfast", "-b:v", "2500k", "-pix_fmt", "yuv420p", "-c:a", "aac", str(path)),
    )


def run(*arguments: str) -> None:
    """ffmpeg, on the cores that this process may use."""
    subprocess.run([find_ffmpeg(None), *QUIET, *arguments], check=True)


def spans(seconds: float, params: Params) -> list[tuple[float, float]]:
    """The clips of a film."""
    length = params.preprocess.clip_seconds
    return [(k * length, (k + 1) * length) for k in range(int(seconds / length))]


def encoder(params: Params) -> tuple[str, ...]:
    """The encoder settings of both peers: the same as ours."""
    how = params.preprocess
    return (*X264, "-crf", str(how.crf), "-g", str(how.gop))


def split_and_trim(film: Path, folder: Path, cuts: Sequence[tuple[float, float]], params: Params):
    """One command: decode, scale, then split and trim, also for the sound."""
    how = params.preprocess
    count = len(cuts)
    pictures = "".join(f"[v{k}]" for k in range(count))
    sounds = "".join(f"[a{k}]" for k in range(count))
    graph = [
        f"[0:v]fps={how.fps},scale=-2:{how.short_side},split={count}{pictures}",
        f"[0:a]aresample={how.audio_hz},aformat=channel_layouts=mono,asplit={count}{sounds}",
    ]
    outputs: list[str] = []
    for k, (start, end) in enumerate(cuts):
        frames = f"start_frame={round(start * how.fps)}:end_frame={round(end * how.fps)}"
        graph.append(f"[v{k}]trim={frames},setpts=PTS-STARTPTS[w{k}]")
        graph.append(f"[a{k}]atrim={start}:{end},asetpts=PTS-STARTPTS[b{k}]")
        outputs += ["-map", f"[w{k}]", *encoder(params), str(folder / f"{k}.mp4")]
        outputs += ["-map", f"[b{k}]", str(folder / f"{k}.wav")]
    run(*PLAIN, "-threads", "1", "-i", str(film), "-filter_complex", ";".join(graph), *outputs)


def one_call_a_clip(film: Path, folder: Path, cuts: Sequence[tuple[float, float]], params: Params):
    """A command for each clip, by an accurate seek."""
    how = params.preprocess
    for k, (start, end) in enumerate(cuts):
        run(
            *(*PLAIN, "-threads", "1", "-ss", str(start), "-t", str(end - start), "-i", str(film)),
            *("-vf", f"fps={how.fps},scale=-2:{how.short_side}", "-an", *encoder(params)),
            *(str(folder / f"{k}.mp4"), "-vn", "-ar", str(how.audio_hz), "-ac", "1"),
            str(folder / f"{k}.wav"),
        )


def ours(films: Sequence[Path], folder: Path, params: Params, seconds: float) -> None:
    """The complete stage: plan, probe, cut, tars, index and ledger; one process per film."""
    clips = [
        Clip(f"film{k}", "bench", f"folder:{film.name}", 0.0, None, "train", {}, (), None)
        for k, film in enumerate(films)
    ]
    entries = {
        clip.clip_id: Entry(clip.clip_id, "ok", "download", seconds=seconds) for clip in clips
    }
    workers = len(films) if len(films) > 1 else 0
    counts = write_shards(
        clips,
        entries,
        params.preprocess.model_copy(
            update={"samples_per_shard": len(spans(seconds, params)), "vocabulary": 8}
        ),
        params.data.model_copy(update={"min_clips": 1, "require": (), "location": films[0].parent}),
        machine=params.machine.model_copy(update={"workers": workers}),
        media=folder,
        folder=folder / "shards",
        ledger=folder / "ledger.jsonl",
        seed=0,
    )
    assert counts == {"ok": len(films)}, counts


def timed(work: Callable[[Path], Any], cores: Sequence[int]) -> float:
    """Seconds of work on these cores, in its own folder."""
    os.sched_setaffinity(0, cores)
    with tempfile.TemporaryDirectory() as name:
        begun = time.perf_counter()
        work(Path(name))
        return time.perf_counter() - begun


def at_once(work: Callable[[Path], Any], folder: Path) -> None:
    """The same work twice at the same time."""
    folders = [folder / str(k) for k in range(2)]
    for one in folders:
        one.mkdir()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, folders))


def main() -> None:
    """Measure alternately and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="a film; default: a generated one")
    parser.add_argument("--seconds", type=int, default=120, help="of the film")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file too")
    options = parser.parse_args()
    params = load_params(ROOT / "presets" / "paper.yaml")
    cores = sorted(os.sched_getaffinity(0))[:2]
    with tempfile.TemporaryDirectory() as name:
        films = [Path(name) / f"film{k}.mp4" for k in range(2)]
        if options.source:
            shutil.copy(options.source, films[0])
        else:
            make_film(films[0], options.seconds)
        shutil.copy(films[0], films[1])
        length, cuts = options.seconds, spans(options.seconds, params)

        def plain(folder: Path) -> None:
            split_and_trim(films[0], folder, cuts, params)

        rows: dict[str, tuple[float, Callable[[Path], Any], Sequence[int]]] = {
            "vattctl": (length, lambda to: ours(films[:1], to, params, length), cores[:1]),
            "plain": (length, plain, cores[:1]),
            "a call a clip": (
                length, lambda to: one_call_a_clip(films[0], to, cuts, params), cores[:1]
            ),
            "vattctl, 2 processes": (2 * length, lambda to: ours(films, to, params, length), cores),
            "plain, 2 processes": (2 * length, lambda to: at_once(plain, to), cores),
        }  # fmt: skip
        timed(rows["vattctl, 2 processes"][1], cores)  # starts the worker server and fills caches
        speeds: dict[str, list[float]] = {row: [] for row in rows}
        for _ in range(options.rounds):
            for row, (work_seconds, work, where) in rows.items():
                speeds[row].append(work_seconds / timed(work, where))
    report(speeds, options.json)


def report(speeds: dict[str, list[float]], file: Path | None) -> None:
    """A line for each: median, lowest and highest; then the ratios, round by round."""
    for row, values in speeds.items():
        print(
            f"{row:22} {statistics.median(values):6.2f} s/s  ({min(values):.2f}-{max(values):.2f})"
        )
    wanted = {
        ("vattctl", "plain"): 0.95,
        ("vattctl", "a call a clip"): 1.12,
        ("vattctl, 2 processes", "vattctl"): 1.8,
        ("plain, 2 processes", "plain"): None,
    }
    ratios = {}
    for (one, other), least in wanted.items():
        each = [a / b for a, b in zip(speeds[one], speeds[other], strict=True)]
        ratios[f"{one} / {other}"] = each
        goal = f"  wanted: {least}" if least else ""
        spread = f"({min(each):.2f}-{max(each):.2f})"
        print(f"{one} / {other}: {statistics.median(each):.2f} {spread}{goal}")
    if file:
        file.write_text(
            json.dumps({"speeds": speeds, "ratios": ratios}, indent=2), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
