"""Media -> tar shards. Shard by shard: a finished one is kept, an unfinished one is done again.

The plan (which samples stand in which shard) is a pure function of the manifest, the download
ledger, the settings and the seed. A shard is finished when its part file (index rows and ledger
entries) stands beside it and names the same plan.
"""

import errno
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from vatt.config import DataParams, MachineParams, PreprocessParams, fingerprint
from vatt.data.cut import Piece, Window, cut, ffmpeg_version, find_ffmpeg, windows_of
from vatt.data.ledger import Entry, write_ledger
from vatt.data.manifest import Caption, Clip, media_path
from vatt.data.media import BrokenMediaError, probe, wav_header
from vatt.data.pool import worker_pool
from vatt.data.samples import (
    FORMAT,
    INDEX,
    VOCABULARY,
    Row,
    ShardWriter,
    nearest,
    row_of,
    write_index,
)
from vatt.data.text import count_words, write_vocabulary
from vatt.errors import DataError, MachineError
from vatt.files import atomic_write, lock

STAGE = "preprocess"
PARTS = "parts"
WINDOWS_A_CALL = 32  # outputs of one ffmpeg call
NEIGHBOURS = 32  # captions kept with a sample beside those within it

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Job:
    """A clip's windows that go into one shard."""

    clip: Clip
    source: Path
    windows: tuple[tuple[str, Window], ...]  # key and span
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard to write."""

    name: str
    split: str
    jobs: tuple[Job, ...]

    @property
    def num_samples(self) -> int:
        """As planned; broken clips make it fewer."""
        return sum(len(job.windows) for job in self.jobs)


@dataclass(frozen=True, slots=True)
class Setting:
    """What a worker needs beside its shard."""

    params: PreprocessParams
    require: tuple[str, ...]
    program: str
    version: str
    folder: Path
    work: Path

    def stamp(self, shard: Shard) -> str:
        """Names everything that the bytes of a shard depend on."""
        jobs = [
            [asdict(job.clip), job.windows, job.sha256 or str(job.source)] for job in shard.jobs
        ]
        return fingerprint(FORMAT, self.version, self.params, self.require, shard.split, jobs)


def write_shards(
    clips: Iterable[Clip],
    downloads: Mapping[str, Entry],
    preprocess: PreprocessParams,
    data: DataParams,
    *,
    machine: MachineParams,
    media: Path,
    folder: Path,
    ledger: Path,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Cut all downloaded clips into shards; returns the number of clips in each state."""
    program = find_ffmpeg(machine.ffmpeg)
    work = folder.with_name(f".{folder.name}.work")
    setting = Setting(preprocess, data.require, program, ffmpeg_version(program), folder, work)
    with lock(folder.with_name(f".{folder.name}.lock")):
        clips = list(clips)
        shards, entries = _plan(clips, downloads, preprocess, data, media=media, seed=seed)
        _tidy(folder, shards, work)
        try:
            rows = _run(shards, setting, entries, machine.workers, progress or (lambda *_: None))
        except OSError as error:
            raise _no_space(error, folder) from None
        finally:
            shutil.rmtree(work, ignore_errors=True)
        counts = write_ledger(ledger, entries.values())
        _check(entries, downloads, num_samples=len(rows), preprocess=preprocess, data=data)
        _finish(clips, entries, rows, preprocess, folder)
    return counts


def _plan(
    clips: Sequence[Clip],
    downloads: Mapping[str, Entry],
    preprocess: PreprocessParams,
    data: DataParams,
    *,
    media: Path,
    seed: int,
) -> tuple[list[Shard], dict[str, Entry]]:
    """The shards, and the states that are known before any work."""
    entries: dict[str, Entry] = {}
    jobs: list[Job] = []
    for clip in clips:
        before = downloads.get(clip.clip_id)
        if before is None:
            raise DataError(
                f"the download ledger does not know clip {clip.clip_id}",
                hint="run `vattctl download`",
            )
        if before.state != "ok":
            entries[clip.clip_id] = before
            continue
        seconds = before.seconds or 0.0
        end = seconds if clip.end is None else min(clip.end, seconds)
        windows = windows_of(clip.start, end, preprocess)
        if not windows:
            reason = f"{max(end - clip.start, 0):.2f} s of {preprocess.min_clip_seconds} s"
            entries[clip.clip_id] = Entry(clip.clip_id, "too-short", STAGE, reason)
            continue
        source = media_path(clip, media=media, location=data.location)
        jobs.append(Job(clip, source, tuple(_keyed(clip, windows)), before.sha256))

    def order(job: Job) -> tuple[str, str, str, float]:
        mixed = hashlib.sha256(f"{seed}:{job.clip.url}".encode()).hexdigest()
        return job.clip.split, mixed, job.clip.clip_id, job.clip.start

    jobs.sort(key=order)  # the clips of one file stay together: it is decoded once
    shards = []
    for split, group in groupby(jobs, key=lambda job: job.clip.split):
        for number, part in enumerate(_fill(list(group), preprocess.samples_per_shard)):
            shards.append(Shard(f"{split}-{number:05d}.tar", split, tuple(part)))
    return shards, entries


def _keyed(clip: Clip, windows: Sequence[Window]) -> list[tuple[str, Window]]:
    if len(windows) == 1:
        return [(clip.clip_id, windows[0])]
    return [(f"{clip.clip_id}+{number:04d}", window) for number, window in enumerate(windows)]


def _fill(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """Deal the windows out in order, `size` to a shard; a long clip may stand in several."""
    shards: list[list[Job]] = []
    room = 0
    for job in jobs:
        windows = job.windows
        while windows:
            if room == 0:
                shards.append([])
                room = size
            shards[-1].append(Job(job.clip, job.source, windows[:room], job.sha256))
            taken = min(room, len(windows))
            windows, room = windows[taken:], room - taken
    return shards


def _tidy(folder: Path, shards: Sequence[Shard], work: Path) -> None:
    """Remove what is not of this plan, and what a killed run left half done."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    keep = {shard.name for shard in shards} | {INDEX, VOCABULARY, PARTS}
    keep |= {_part(shard.name) for shard in shards}
    for path in sorted([*folder.iterdir(), *(folder / PARTS).iterdir()]):
        if path.name not in keep:
            path.unlink()


def _run(
    shards: Sequence[Shard],
    setting: Setting,
    entries: dict[str, Entry],
    workers: int,
    progress: Progress,
) -> list[Row]:
    """Write the shards that are not finished; returns all rows and adds to the entries."""
    total = sum(shard.num_samples for shard in shards)
    done = 0
    parts: dict[str, dict[str, Any]] = {}
    with worker_pool(min(workers, len(shards)), preload=["vatt.data.shards"]) as pool:
        waiting = {}
        for shard in shards:
            part = _read_part(shard, setting)
            if part is None:
                waiting[pool.submit(write_shard, shard, setting)] = shard
            else:
                parts[shard.name] = part
                done += shard.num_samples
        progress(done, total)
        try:
            for future in as_completed(waiting):
                shard = waiting[future]
                parts[shard.name] = future.result()
                done += shard.num_samples
                progress(done, total)
        except BrokenProcessPool:
            raise MachineError(
                "a worker process died, perhaps for want of memory",
                hint="lower machine.workers and run it again: finished shards are kept",
            ) from None
    rows = []
    for shard in shards:
        rows += [row_of(record) for record in parts[shard.name]["rows"]]
        for record in parts[shard.name]["entries"]:
            entry = Entry(**{**record, "has": tuple(record["has"])})
            entries[entry.clip_id] = _merge(entries.get(entry.clip_id), entry)
    return rows


def _merge(first: Entry | None, second: Entry) -> Entry:
    """One state for a clip that stands in two shards: ok when any of its samples is."""
    if first is None:
        return second
    better, other = (first, second) if first.state == "ok" else (second, first)
    has = tuple(name for name in ("video", "audio", "text") if name in better.has + other.has)
    return Entry(
        better.clip_id, better.state, STAGE, better.reason or other.reason, has,
        samples=first.samples + second.samples,
    )  # fmt: skip


def write_shard(shard: Shard, setting: Setting) -> dict[str, Any]:
    """Write a shard and, when it stands, its part file; returns what that holds."""
    path = setting.folder / shard.name
    rows: list[Row] = []
    entries: list[Entry] = []
    try:
        with atomic_write(path) as temporary:
            writer = ShardWriter(temporary)
            for job in shard.jobs:
                made, entry = _add_clip(job, writer, shard, setting)
                rows += made
                entries.append(entry)
            writer.close()
        part = {
            "stamp": setting.stamp(shard),
            "bytes": path.stat().st_size,
            "rows": [asdict(row) for row in rows],
            "entries": [asdict(entry) for entry in entries],
        }
        with atomic_write(setting.folder / PARTS / _part(shard.name)) as temporary:
            temporary.write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise _no_space(error, setting.folder) from None
    return part


def _add_clip(
    job: Job, writer: ShardWriter, shard: Shard, setting: Setting
) -> tuple[list[Row], Entry]:
    clip, params = job.clip, setting.params
    rows: list[Row] = []
    losses: Counter[str] = Counter()
    complaint = ""
    heard: set[str] = set()
    try:
        media = probe(job.source)
        for first in range(0, len(job.windows), WINDOWS_A_CALL):
            windows = job.windows[first : first + WINDOWS_A_CALL]
            spans = [window for _, window in windows]
            result = cut(
                job.source, spans, params, media=media, program=setting.program, work=setting.work
            )
            complaint = complaint or result.complaint
            for (key, window), piece in zip(windows, result.pieces, strict=True):
                captions = _nearby(clip.captions, window)
                has = _has(piece, captions)
                loss = _loss(piece, has, setting, wanted_video=media.video is not None)
                if loss:
                    losses[loss] += 1
                    continue
                heard.update(has)
                rows.append(_add_sample(key, piece, captions, window, clip, writer, shard, params))
    except BrokenMediaError as error:
        losses["corrupt"] += 1
        complaint = str(error)
    if rows:
        names = tuple(name for name in ("video", "audio", "text") if name in heard)
        lost = f"{sum(losses.values())} of its windows lost: {complaint}" if losses else complaint
        return rows, Entry(clip.clip_id, "ok", STAGE, lost, names, samples=len(rows))
    state = losses.most_common(1)[0][0]
    return rows, Entry(clip.clip_id, state, STAGE, complaint)


def _has(piece: Piece, captions: Sequence[Caption]) -> tuple[str, ...]:
    present = {
        "video": piece.video is not None,
        "audio": piece.audio is not None,
        "text": bool(captions),
    }
    return tuple(name for name, there in present.items() if there)


def _loss(piece: Piece, has: Sequence[str], setting: Setting, *, wanted_video: bool) -> str | None:
    """The state of a window that is not kept; None when it is."""
    params = setting.params
    if wanted_video and piece.num_frames < int(params.min_clip_seconds * params.fps + 1e-6):
        return "too-short" if piece.num_frames else "corrupt"
    for name, state in (("video", "no-video"), ("audio", "no-audio"), ("text", "no-caption")):
        if name in setting.require and name not in has:
            return state
    return None if "video" in has or "audio" in has else "corrupt"


def _add_sample(
    key: str,
    piece: Piece,
    captions: Sequence[Caption],
    window: Window,
    clip: Clip,
    writer: ShardWriter,
    shard: Shard,
    params: PreprocessParams,
) -> Row:
    facts = {
        "clip_id": clip.clip_id,
        "source": clip.source,
        "url": clip.url,
        "start": window[0],
        "end": window[1],
        "labels": clip.labels,
        "licence": clip.licence,
        "captions": [
            [round(c.start - window[0], 4), round(c.end - window[0], 4), c.text] for c in captions
        ],
    }
    text = json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()
    where_json = writer.add(f"{key}.json", text)
    where_video = writer.add(f"{key}.mp4", piece.video) if piece.video is not None else None
    where_audio, num_samples = None, 0
    if piece.audio is not None:
        num_samples = len(piece.audio)
        header = wav_header(num_samples, hz=params.audio_hz)
        where_audio = writer.add(f"{key}.wav", header + piece.audio.astype("<i2").tobytes())
    return Row(
        key=key,
        clip_id=clip.clip_id,
        media=clip.media_name,
        split=shard.split,
        shard=shard.name,
        labels=clip.labels,
        json=where_json,
        video=where_video,
        audio=where_audio,
        num_frames=piece.num_frames,
        height=piece.height,
        width=piece.width,
        num_samples=num_samples,
    )


def _nearby(captions: Sequence[Caption], window: Window) -> list[Caption]:
    """The captions within a window and those nearest to it, in the order of time."""
    start, end = window
    within = [caption for caption in captions if caption.start < end and caption.end > start]
    near = nearest(captions, start=start, end=end, count=len(within) + NEIGHBOURS)
    return sorted(near, key=lambda caption: (caption.start, caption.end, caption.text))


def _read_part(shard: Shard, setting: Setting) -> dict[str, Any] | None:
    """What a finished shard holds; None when it must be written."""
    try:
        text = (setting.folder / PARTS / _part(shard.name)).read_text(encoding="utf-8")
        size = (setting.folder / shard.name).stat().st_size
        part = json.loads(text)
    except (OSError, ValueError):
        return None
    return part if (part["stamp"], part["bytes"]) == (setting.stamp(shard), size) else None


def _part(name: str) -> str:
    return name.removesuffix(".tar") + ".json"


def _check(
    entries: Mapping[str, Entry],
    downloads: Mapping[str, Entry],
    *,
    num_samples: int,
    preprocess: PreprocessParams,
    data: DataParams,
) -> None:
    """Stop when too many clips failed here, or too few are left in all."""
    tried = [entry for name, entry in entries.items() if downloads[name].state == "ok"]
    failed = Counter(entry.state for entry in tried if entry.state != "ok")
    lost = sum(failed.values())
    why = ", ".join(f"{count} {state}" for state, count in failed.most_common())
    if lost > preprocess.max_failed_share * len(tried):
        raise DataError(
            f"{lost} of {len(tried)} clips failed ({why}), more than preprocess.max_failed_share",
            hint="`vattctl ledger` says why; raise preprocess.max_failed_share to go on",
        )
    if num_samples < data.min_clips:
        raise DataError(
            f"{num_samples} clips are left, data.min_clips asks for {data.min_clips}"
            + (f" ({why})" if why else ""),
            hint="add data, or lower data.min_clips",
        )
    kept = len(tried) - lost
    if kept < data.min_share * len(entries):
        raise DataError(
            f"{kept} of {len(entries)} clips of the manifest are left, data.min_share asks for "
            f"{data.min_share:.0%}",
            hint="`vattctl ledger` says what was lost; lower data.min_share to go on",
        )


def _finish(
    clips: Sequence[Clip],
    entries: Mapping[str, Entry],
    rows: Sequence[Row],
    preprocess: PreprocessParams,
    folder: Path,
) -> None:
    """Write the vocabulary of the train captions and, last of all, the index."""
    counts = count_words(
        caption.text
        for clip in clips
        if clip.split == "train" and entries[clip.clip_id].state == "ok"
        for caption in clip.captions
    )
    write_vocabulary(folder / VOCABULARY, counts, size=preprocess.vocabulary)
    header = {"fps": preprocess.fps, "audio_hz": preprocess.audio_hz}
    with atomic_write(folder / INDEX) as temporary:
        write_index(temporary, rows, header=header)


def _no_space(error: OSError, folder: Path) -> Exception:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return MachineError(f"the disk of {folder} is full", hint="free some space, run it again")
