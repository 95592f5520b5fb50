"""Size, quality and reading speed of each stored form.

    python bench/storage.py --films FOLDER           # a folder of videos
    python bench/storage.py --films FOLDER --tile    # small videos: four become one large picture

Films are cut with the settings of presets/paper.yaml (ten seconds, 10 frames per second, short side
256, sound of 48 kHz), once in each form. Then windows of 3.2 seconds (centre crops of 224 x 224)
are read by the project's reader at random places, alternating between the forms: one core, one
thread. PSNR is against frames stored with a crf of 1.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vatt.config import Params, load_params
from vatt.data.clips.ledger import Entry
from vatt.data.clips.manifest import Clip
from vatt.data.clips.media import find_ffmpeg, probe
from vatt.data.clips.samples import IndexRow
from vatt.data.loading.reader import ShardIndex, ShardReader
from vatt.data.sharding.shards import write_shards

ROOT = Path(__file__).parents[1]
REFERENCE = {"video_storage": "h264", "crf": 1, "gop": 1}
H264: dict[str, Any] = {"video_storage": "h264", "gop": 10, "fast_decode": True}
PICTURES: dict[str, dict[str, Any]] = {
    "h264, gop 10, fast_decode": H264,
    "h264, gop 32, fast_decode": {**H264, "gop": 32},
    "h264, gop 10": {**H264, "fast_decode": False},
    "jpeg, scale 3": {"video_storage": "jpeg", "jpeg_scale": 3},
    "jpeg, scale 4": {"video_storage": "jpeg", "jpeg_scale": 4},
    "jpeg, scale 6": {"video_storage": "jpeg", "jpeg_scale": 6},
}
SOUNDS = ("pcm", "flac", "aac")
TILE, TILED_SECONDS = (284, 160), 30


def tile(films: Sequence[Path], folder: Path) -> list[Path]:
    """Four films, repeated, as one of 568 x 320: with the detail of a film of that size."""
    folder.mkdir()
    size = "{}:{}".format(*TILE)
    shrunk = f"fps=30,scale={size}:force_original_aspect_ratio=increase,crop={size},setsar=1"
    made = []
    for first in range(0, len(films) - 3, 4):
        four = films[first : first + 4]
        heard = [k for k, film in enumerate(four) if probe(film).audio is not None]
        if not heard:
            continue
        graph = "".join(f"[{k}:v]{shrunk}[t{k}];" for k in range(4))
        graph += "[t0][t1][t2][t3]xstack=inputs=4:layout=0_0|w0_0|0_h0|w0_h0[v]"
        inputs = [part for film in four for part in ("-stream_loop", "-1", "-i", str(film))]
        made.append(folder / f"tiled{first:03d}.mp4")
        subprocess.run(
            [
                *(find_ffmpeg(None), "-v", "error", *inputs, "-filter_complex", graph),
                *("-map", "[v]", "-map", f"{heard[0]}:a", "-t", str(TILED_SECONDS)),
                *("-c:v", "libx264", "-crf", "12", "-preset", "veryfast", "-c:a", "aac"),
                *("-b:a", "192k", str(made[-1])),
            ],
            check=True,
        )
    return made


def store(films: Sequence[Path], folder: Path, params: Params, **how: Any) -> ShardReader:
    """Write the clips of the films in one form."""
    clips, entries = [], {}
    for number, film in enumerate(films):
        name = f"film{number:03d}"
        clips.append(Clip(name, "bench", f"folder:{film.name}", 0.0, None, "train", {}, (), None))
        entries[name] = Entry(name, "ok", "download", seconds=probe(film).seconds)
    write_shards(
        clips,
        entries,
        params.preprocess.model_copy(update={"vocabulary": 8, **how}),
        params.data.model_copy(
            update={"min_clips": 1, "min_share": 0, "require": (), "location": films[0].parent}
        ),
        machine=params.machine.model_copy(update={"workers": 2}),
        media=folder,
        folder=folder / "shards",
        ledger=folder / "ledger.jsonl",
        seed=0,
    )
    return ShardReader(ShardIndex.load(folder / "shards", split="train"))


def whole(reader: ShardReader, params: Params) -> list[IndexRow]:
    """The clips of full length with sound and picture, by key."""
    frames = round(params.preprocess.clip_seconds * params.preprocess.fps)
    rows = [row for row in reader.index.rows if row.num_frames == frames and row.audio]
    return sorted(rows, key=lambda row: row.key)


def kilobytes(rows: Sequence[IndexRow], member: str) -> float:
    """The mean size of a member."""
    return statistics.mean(getattr(row, member)[1] for row in rows) / 1000


def psnr(reader: ShardReader, reference: ShardReader, params: Params) -> float:
    """The mean over clips, of five frames each."""
    found = []
    for row, other in zip(whole(reader, params), whole(reference, params), strict=True):
        indices = range(0, row.num_frames, 20)
        error = reader.frames(row, indices).astype(float) - reference.frames(other, indices)
        found.append(10 * np.log10(255**2 / np.mean(error**2)))
    return float(np.mean(found))


def speeds(work: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Windows per second, alternating between the forms."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, read in work.items():
            begun = time.perf_counter()
            count = read()
            if turn:  # the first turn fills caches
                found[name].append(count / (time.perf_counter() - begun))
    return found


def reading(reader: ShardReader, params: Params, *, sound: bool) -> Callable[[], int]:
    """Reads a window of every clip, at the same random places in every form."""
    how, rows = params.preprocess, whole(reader, params)
    frames, side = params.model.video.frames, params.model.video.frame_size
    assert isinstance(side, int)
    stride, seconds = how.fps / params.pretrain.fps, frames / params.pretrain.fps

    def read() -> int:
        draw = random.Random(0)
        for row in rows:
            first = draw.randrange(row.num_frames - round(seconds * how.fps) + 1)
            if sound:
                begin = round(first / how.fps * how.audio_hz)
                reader.audio(row, begin, begin + round(seconds * how.audio_hz))
            else:
                reader.frames(row, [first + round(k * stride) for k in range(frames)])
        return len(rows)

    return read


def main() -> None:
    """Store, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--films", type=Path, required=True, help="a folder of videos")
    parser.add_argument("--tile", action="store_true", help="put four of them side by side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file too")
    options = parser.parse_args()
    params = load_params(ROOT / "presets" / "paper.yaml")
    films = sorted(options.films.resolve().glob("*.mp4"))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        films = tile(films, root / "tiled") if options.tile else films
        reference = store(films, root / "reference", params, **REFERENCE)
        pictures = {
            form: store(films, root / form, params, **how) for form, how in PICTURES.items()
        }
        sounds = {
            form: store(films, root / form, params, **H264, audio_storage=form) for form in SOUNDS
        }
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
        work = {form: reading(one, params, sound=False) for form, one in pictures.items()}
        work |= {form: reading(one, params, sound=True) for form, one in sounds.items()}
        found = speeds(work, options.rounds)
        table = []
        for form, values in found.items():
            reader = {**pictures, **sounds}[form]
            rows = whole(reader, params)
            is_picture = form in pictures
            table.append(
                {
                    "form": form,
                    "kilobytes": kilobytes(rows, "video" if is_picture else "audio"),
                    "psnr": psnr(reader, reference, params) if is_picture else None,
                    "windows_a_second": values,
                }
            )
        print(f"{len(whole(reference, params))} clips of ten seconds")
    for line in table:
        values = line["windows_a_second"]
        middle = statistics.median(values)
        near = f"{line['psnr']:5.1f} dB" if line["psnr"] else " " * 8
        print(
            f"{line['form']:27} {line['kilobytes']:7.0f} kB {near} {1000 / middle:7.2f} ms a window"
            f"  {middle:8.0f}/s ({min(values):.0f}-{max(values):.0f})"
        )
    if options.json:
        options.json.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
