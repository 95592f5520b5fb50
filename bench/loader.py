"""Speed of loading compared with bare decoding of the same clips, and its memory.

    python bench/loader.py                      # speed: both stored forms, in turn, several rounds
    python bench/loader.py --memory 20000       # the same, then memory over so many samples

A sample is that of the paper: 3.2 s of a stored clip of 10 s, 32 frames of short side 256, a crop
of them resized to 224 x 224, mirrored half of the time, 153,600 samples of sound, the five
nearest captions. Clips are drawn shapes that move under noise, made by ffmpeg so that their size is
that of real video (about 350 kB of H.264 in 10 s), and stored by the project's own preprocessing.

"bare" only decodes the frames of the same windows of the same clips, one after the other: to the
decoder's own frames, and to RGB arrays, which every loader needs. All candidates alternate within a
round, so that a busy machine slows all of them; one thread per process.
"""

import argparse
import gc
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import av
import numpy as np
import psutil
import simplejpeg
import torch
from av.video.reformatter import VideoReformatter

from vatt.config import Params, load_params
from vatt.data.clips.ledger import Entry
from vatt.data.clips.manifest import Caption, Clip
from vatt.data.clips.media import find_ffmpeg
from vatt.data.loading.batches import (
    Batch,
    Loading,
    Sampling,
    TrainingOrder,
    model_inputs,
    train_batches,
)
from vatt.data.loading.loader import AHEAD
from vatt.data.loading.reader import WINDOW, ShardIndex, ShardReader
from vatt.data.sharding.shards import write_shards
from vatt.senses.video import frame_indices, generator_for

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))


PAPER = Path(__file__).parents[1] / "presets" / "paper.yaml"
SECONDS, BATCH = 10, 16
FORMS = {"H.264": "h264", "JPEG": "jpeg"}


def make_corpus(folder: Path, count: int, params: Params) -> None:
    """Encode sources and store them in both forms."""
    media = folder / "media"
    media.mkdir(parents=True, exist_ok=True)
    program = find_ffmpeg(None)
    spoken = [Caption(k, k + 1.8, f"sentence {k} has nine words of one caption") for k in range(9)]
    clips, entries = [], {}
    for number in range(count):
        clip = Clip(
            f"clip-{number:03d}", "bench", f"urls:{number}.mp4", 0.0, float(SECONDS), "train", {},
            tuple(spoken), None,
        )  # fmt: skip
        picture = f"testsrc2=size=456x256:rate=10:duration={SECONDS}"
        noise = f"hue=h={number * 17},gblur=sigma=1,noise=alls=1:allf=t:all_seed={number}"
        sound = f"anoisesrc=sample_rate=48000:duration={SECONDS}:seed={number}:amplitude=0.3"
        subprocess.run(
            [program, "-v", "error", "-y", "-f", "lavfi", "-i", picture, "-f", "lavfi",
             "-i", sound, "-vf", noise, "-pix_fmt", "yuv420p", "-c:v", "libx264", "-crf", "12",
             "-preset", "veryfast", "-threads", "1", "-ac", "1", "-f", "mp4",
             str(media / clip.media_name)],
            check=True,
        )  # fmt: skip
        clips.append(clip)
        entries[clip.clip_id] = Entry(clip.clip_id, "ok", "download", seconds=float(SECONDS))
    data = params.data.model_copy(update={"location": None, "min_clips": 1, "min_share": 0.0})
    for form in FORMS.values():
        write_shards(
            clips, entries,
            params.preprocess.model_copy(
                update={"video_storage": form, "audio_storage": "pcm", "samples_per_shard": 8}
            ),
            data, machine=params.machine.model_copy(update={"workers": 0}), media=media,
            folder=folder / form, ledger=folder / f"{form}.ledger.jsonl", seed=0,
        )  # fmt: skip


class Bare:
    """Bare decoding of windows of clips."""

    def __init__(self, shards: Path, sampling: Sampling) -> None:
        self.index = ShardIndex.load(shards, split="train")
        self.reader = ShardReader(self.index)
        self.sampling = sampling
        self.codec = av.CodecContext.create("mjpeg", "r")
        self.codec.thread_count = 1
        self.step = 0

    def windows(self, count: int) -> Iterator[tuple[bytes | list[bytes], list[int]]]:
        """The stored bytes of random clips, and the frames of a random window of each."""
        for _ in range(count):
            self.step += 1
            draw = generator_for(1, self.step)
            row = self.index.rows[int(torch.randint(len(self.index.rows), (1,), generator=draw))]
            room = row.num_frames - self.sampling.frames + 1
            first = int(torch.randint(room, (1,), generator=draw))
            wanted = frame_indices(first, row.num_frames, frames=self.sampling.frames, stride=1)
            if self.index.storage.video == "jpeg":
                yield [bytes(one) for one in self.reader._pictures(row, wanted)], wanted
            else:
                assert row.video is not None
                yield self.reader._read(row, row.video), wanted

    def decode(self, count: int, *, rgb: bool) -> None:
        """Decode `count` windows."""
        for data, wanted in self.windows(count):
            if isinstance(data, list):
                for picture in data:
                    if rgb:
                        simplejpeg.decode_jpeg(picture)
                    else:
                        self.codec.decode(av.Packet(picture))
            else:
                self.decode_h264(data, wanted, rgb=rgb)

    def decode_h264(self, data: bytes, wanted: list[int], *, rgb: bool) -> None:
        """PyAV as in its documentation, but with one thread and one converter."""
        scaler = VideoReformatter()
        with av.open(io.BytesIO(data), format="mp4") as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            fps = self.index.storage.fps
            if wanted[0] >= fps:
                container.seek(int(wanted[0] / fps / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                number = round(frame.time * fps)
                if rgb and number >= wanted[0]:
                    scaler.reformat(frame, format="rgb24", threads=1).to_ndarray()
                if number >= wanted[-1]:
                    break


def batches(shards: Path, sampling: Sampling, workers: int) -> Iterator[Batch]:
    """Batches of a training without end."""
    return train_batches(
        ShardIndex.load(shards, split="train"),
        sampling,
        batch_size=BATCH,
        steps=range(10**6),
        seed=0,
        loading=Loading(workers, prefetch_gb=1.0),
    )


def rate(count: int, work: Callable[[], object]) -> float:
    """Samples per second."""
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


def loader_rate(shards: Path, sampling: Sampling, workers: int, count: int) -> float:
    """Samples per second after the start, with all memory allocated: the consumer waits."""
    source = batches(shards, sampling, workers)
    for _ in islice(source, AHEAD + 4):
        pass
    found = rate(count, lambda: [None for _ in islice(source, count // BATCH)])
    source.close()
    return found


def with_colour(shards: Path, sampling: Sampling, count: int) -> float:
    """The same in this process, with colours changed and values scaled on the CPU too."""
    source = batches(shards, sampling, 0)
    next(source)
    found = rate(count, lambda: [model_inputs(batch) for batch in islice(source, count // BATCH)])
    source.close()
    return found


def speed(folder: Path, sampling: Sampling, rounds: int, count: int) -> None:
    """All rates in turn, and their ratios."""
    cases: dict[str, dict[str, Callable[[], float]]] = {}
    for name, form in FORMS.items():
        shards = folder / form
        bare = Bare(shards, sampling)
        cases[name] = {
            "bare, decoder's frames": lambda b=bare: rate(
                count, lambda: b.decode(count, rgb=False)
            ),
            "bare, RGB arrays": lambda b=bare: rate(count, lambda: b.decode(count, rgb=True)),
            "training samples": lambda s=shards: loader_rate(s, sampling, 0, count),
            "  and colour on the CPU": lambda s=shards: with_colour(s, sampling, count // 4),
            "1 worker": lambda s=shards: loader_rate(s, sampling, 1, count),
            "2 workers": lambda s=shards: loader_rate(s, sampling, 2, 2 * count),
        }
    found = {name: {case: [] for case in group} for name, group in cases.items()}
    for _ in range(rounds):
        for name, group in cases.items():
            for case, measure in group.items():
                found[name][case].append(measure())
    for name, group in found.items():
        shards = folder / FORMS[name]
        rows = ShardIndex.load(shards, split="train").rows
        size = statistics.mean(row.video[1] for row in rows if row.video)
        print(f"\n{name}, {size / 1e3:.0f} kB of video per clip of {SECONDS} s; samples per second")
        for case, values in group.items():
            print(
                f"  {case:26} median {statistics.median(values):7.1f}"
                f"  ({min(values):.1f} to {max(values):.1f})"
            )
        pairs = {
            "samples / bare RGB": ("training samples", "bare, RGB arrays"),
            "samples / bare frames": ("training samples", "bare, decoder's frames"),
            "2 workers / 1 worker": ("2 workers", "1 worker"),
        }
        for label, (over, under) in pairs.items():
            ratios = [a / b for a, b in zip(group[over], group[under], strict=True)]
            print(
                f"  {label:26} median {statistics.median(ratios):7.2f}"
                f"  ({min(ratios):.2f} to {max(ratios):.2f})"
            )


def memory(shards: Path, sampling: Sampling, total: int) -> None:
    """Memory of this process and its two workers; shared pages count once."""
    print(f"\nmemory over {total} samples, 2 workers (proportional set size, MB)")
    began, seen, sizes = time.perf_counter(), 0, []
    source = batches(shards, sampling, 2)
    for batch in source:
        seen += len(batch.clip_ids)
        del batch
        if seen % 2000 < BATCH:
            gc.collect()
            main = psutil.Process()
            processes = [main, *main.children(recursive=True)]
            parts = [process.memory_full_info().pss / 1e6 for process in processes]
            sizes.append(sum(parts))
            print(f"  after {seen:6}: {sizes[-1]:7.0f}  (this process {parts[0]:.0f})", flush=True)
        if seen >= total:
            break
    source.close()
    print(f"  {total / (time.perf_counter() - began):.1f} samples per second")
    print(f"  growth after the first 2,000: {max(sizes[1:]) - sizes[0]:+.0f} MB at most, "
          f"{sizes[-1] - sizes[0]:+.0f} MB at the end")  # fmt: skip


def seeks() -> None:
    """Jumps on the disk in the order of training, compared with a shuffle of everything."""
    shards, rows = 400, 1000
    order = TrainingOrder([str(row // rows) for row in range(shards * rows)], seed=0)
    taken = np.array([order.row_at(position) for position in range(shards * rows)])

    def jumps(window: np.ndarray) -> int:
        return 1 + int(np.count_nonzero(np.diff(np.sort(window)) != 1))

    ahead = sum(jumps(taken[first : first + WINDOW]) for first in range(0, len(taken), WINDOW))
    mixed = np.random.default_rng(0).permutation(len(taken))
    other = sum(jumps(mixed[first : first + WINDOW]) for first in range(0, len(taken), WINDOW))
    print(f"\nseeks per 1,000 samples, {shards} shards of {rows}, read ahead by {WINDOW}: "
          f"{ahead * 1000 / len(taken):.0f}; shuffled over all shards "
          f"{other * 1000 / len(taken):.0f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="0: no speed")
    parser.add_argument("--count", type=int, default=96, help="samples in each measurement")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--memory", type=int, default=0, metavar="SAMPLES")
    parser.add_argument("--corpus", type=Path, help="keep the clips here, and use them again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    params = load_params(PAPER)
    sampling = replace(
        Sampling.for_pretraining(params.model, params.pretrain), candidates=5, words=16
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.corpus or Path(scratch)
        if not (folder / "jpeg" / "index.jsonl").exists():
            make_corpus(folder, options.clips, params)
        if options.rounds:
            speed(folder, sampling, options.rounds, options.count)
        if options.memory:
            memory(folder / "jpeg", sampling, options.memory)
    seeks()


if __name__ == "__main__":
    main()
