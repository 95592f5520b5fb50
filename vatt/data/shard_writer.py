"""One shard: its clips cut, and written with what became of each."""

import errno
import hashlib
import json
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import av

from vatt.config import PreprocessParams, fingerprint
from vatt.data.cut import Cut, Piece, Window, cut, ffmpeg_version, find_ffmpeg
from vatt.data.ledger import Entry
from vatt.data.manifest import Caption, Clip
from vatt.data.media import BrokenMediaError, probe
from vatt.data.plan import STAGE, Job, Shard
from vatt.data.samples import FORMAT, Extent, Row, ShardWriter, nearest
from vatt.data.storage import Storage, encode_sound
from vatt.errors import MachineError
from vatt.files import atomic_write

PARTS = "parts"  # folder of the part files
WINDOWS_A_CALL = 32  # outputs of one ffmpeg call
SOURCES_A_CALL = 16  # starting ffmpeg costs more than a second of small video
SECONDS_A_CALL = 64.0  # of sources that share a call
NEIGHBOURS = 32  # captions kept with a sample beside those within it


@dataclass(frozen=True, slots=True)
class Setting:
    """What a worker needs beside its shard."""

    params: PreprocessParams
    require: tuple[str, ...]
    program: str
    version: str  # of all that writes: ffmpeg, PyAV and our code
    folder: Path
    work: Path
    root: Path  # what relative paths count from: another machine starts elsewhere

    def stamp(self, shard: Shard) -> str:
        """Names everything that the bytes of a shard depend on."""
        jobs = [
            [asdict(job.clip), job.windows, job.sha256 or str(job.source)] for job in shard.jobs
        ]
        return fingerprint(FORMAT, self.version, self.params, self.require, shard.split, jobs)

    def here(self) -> Self:
        """For this machine; another vattctl or ffmpeg on it would write other bytes."""
        program = self.program if Path(self.program).is_file() else find_ffmpeg(None)
        if made_by(program) != self.version:
            raise MachineError(
                f"vattctl or ffmpeg on {platform.node()} is not the one that began this run",
                hint="install the same version on every machine",
            )
        folder, work = self.root / self.folder, self.root / self.work
        return replace(self, program=program, folder=folder, work=work)


@lru_cache(maxsize=4)
def made_by(program: str) -> str:
    """Names what writes shards; when it changes they are written again."""
    digest = hashlib.sha256(av.__version__.encode())
    for name in ("cut", "limits", "media", "samples", "shard_writer", "storage"):
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return f"{ffmpeg_version(program)} {digest.hexdigest()}"


@dataclass(slots=True)
class Tally:
    """What became of a job's windows."""

    rows: list[Row] = field(default_factory=list)
    has: set[str] = field(default_factory=set)
    losses: Counter[str] = field(default_factory=Counter)
    complaint: str = ""

    def entry(self, clip: Clip) -> Entry:
        """The clip's state, as far as this shard knows it."""
        lost = sum(self.losses.values())
        if not self.rows:
            return Entry(clip.clip_id, self.losses.most_common(1)[0][0], STAGE, self.complaint)
        reason = f"{lost} of its windows lost; {self.complaint}" if lost else self.complaint
        names = tuple(name for name in ("video", "audio", "text") if name in self.has)
        return Entry(
            clip.clip_id, "ok", STAGE, reason.removesuffix("; "), names, samples=len(self.rows)
        )


def write_shard(shard: Shard, setting: Setting) -> dict[str, Any]:
    """Write a shard and, when it stands, its part file; returns what that holds."""
    setting = setting.here()
    path = setting.folder / shard.name
    tallies = [Tally() for _ in shard.jobs]
    try:
        with atomic_write(path) as temporary:
            writer = ShardWriter(temporary, name=shard.name)
            for call in _calls(shard.jobs, tallies, setting.root):
                _add(call, tallies, shard, setting, writer)
            writer.close()
        entries = [tally.entry(job.clip) for job, tally in zip(shard.jobs, tallies, strict=True)]
        part = {
            "stamp": setting.stamp(shard),
            "bytes": path.stat().st_size,
            "rows": [asdict(row) for tally in tallies for row in tally.rows],
            "entries": [asdict(entry) for entry in entries],
        }
        with atomic_write(setting.folder / PARTS / part_name(shard.name)) as temporary:
            temporary.write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise no_space(error, setting.folder) from None
    return part


Owner = tuple[int, str]  # number of the job, key of the sample
Call = list[tuple[Cut, list[Owner]]]  # what one run of ffmpeg cuts, and for whom, window by window


def _calls(jobs: Sequence[Job], tallies: Sequence[Tally], root: Path) -> Iterator[Call]:
    """Group the jobs in calls of ffmpeg: several short sources in one, a long one in several."""
    call: Call = []
    room, seconds = WINDOWS_A_CALL, SECONDS_A_CALL
    for item, owners in _cuts(jobs, tallies, root):
        length = item.media.seconds
        fits = len(owners) <= room and length <= seconds and len(call) < SOURCES_A_CALL
        if call and (not fits or call[-1][0].source == item.source):
            yield call
            call, room, seconds = [], WINDOWS_A_CALL, SECONDS_A_CALL
        call.append((item, owners))
        room, seconds = room - len(owners), seconds - length
    if call:
        yield call


def _cuts(
    jobs: Sequence[Job], tallies: Sequence[Tally], root: Path
) -> Iterator[tuple[Cut, list[Owner]]]:
    """The windows of each source, those of all its clips together: it is decoded once."""
    for source, group in groupby(enumerate(jobs), key=lambda item: item[1].source):
        members = list(group)
        source = root / source
        try:
            media = probe(source)
        except BrokenMediaError as error:
            for number, job in members:
                tallies[number].losses["corrupt"] += len(job.windows)
                tallies[number].complaint = str(error)
            continue
        wanted = [(window, (number, key)) for number, job in members for key, window in job.windows]
        for first in range(0, len(wanted), WINDOWS_A_CALL):
            part = wanted[first : first + WINDOWS_A_CALL]
            windows = tuple(window for window, _ in part)
            yield Cut(source, media, windows), [owner for _, owner in part]


def _add(
    call: Call, tallies: Sequence[Tally], shard: Shard, setting: Setting, writer: ShardWriter
) -> None:
    """Cut what a call holds and write the samples that are whole."""
    params = setting.params
    items = [item for item, _ in call]
    results = cut(items, params, program=setting.program, work=setting.work)
    for (item, owners), result in zip(call, results, strict=True):
        for (number, key), window, piece in zip(owners, item.windows, result.pieces, strict=True):
            clip, tally = shard.jobs[number].clip, tallies[number]
            tally.complaint = tally.complaint or result.complaint
            captions = _nearby(clip.captions, window)
            has = _has(piece, captions)
            loss = _loss(piece, has, setting, picture=item.media.video is not None)
            if loss:
                tally.losses[loss] += 1
                continue
            tally.has.update(has)
            tally.rows.append(_add_sample(key, piece, captions, window, clip, params, writer))


def _has(piece: Piece, captions: Sequence[Caption]) -> tuple[str, ...]:
    present = {
        "video": bool(piece.video),
        "audio": piece.audio is not None,
        "text": bool(captions),
    }
    return tuple(name for name, there in present.items() if there)


def _loss(piece: Piece, has: Sequence[str], setting: Setting, *, picture: bool) -> str | None:
    """The state of a window that is not kept; None when it is."""
    params = setting.params
    if picture and piece.num_frames < int(params.min_clip_seconds * params.fps + 1e-6):
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
    params: PreprocessParams,
    writer: ShardWriter,
) -> Row:
    storage = Storage.of(params)
    facts: dict[str, Any] = {
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
    if storage.video == "jpeg":
        facts["frame_bytes"] = [len(picture) for picture in piece.video]
    text = json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()
    where_json = writer.add(f"{key}.json", text)
    where_video = _add_picture(key, piece, storage, writer)
    where_audio = None
    if piece.audio is not None:
        sound = encode_sound(piece.audio, storage, kbps=params.aac_kbps)
        where_audio = writer.add(storage.audio_name(key), sound)
    return Row(
        key=key,
        clip_id=clip.clip_id,
        media=clip.media_name,
        split=clip.split,
        shard=writer.name,
        labels=clip.labels,
        json=where_json,
        video=where_video,
        audio=where_audio,
        num_frames=piece.num_frames,
        height=piece.height,
        width=piece.width,
        num_samples=0 if piece.audio is None else len(piece.audio),
    )


def _add_picture(key: str, piece: Piece, storage: Storage, writer: ShardWriter) -> Extent | None:
    """Write the picture's members; returns the span from the first one to the end of the last."""
    names = storage.video_names(key, len(piece.video))
    spans = [writer.add(name, data) for name, data in zip(names, piece.video, strict=True)]
    return (spans[0][0], sum(spans[-1]) - spans[0][0]) if spans else None


def _nearby(captions: Sequence[Caption], window: Window) -> list[Caption]:
    """The captions within a window and those nearest to it, in the order of time."""
    start, end = window
    within = [caption for caption in captions if caption.start < end and caption.end > start]
    near = nearest(captions, start=start, end=end, count=len(within) + NEIGHBOURS)
    return sorted(near, key=lambda caption: (caption.start, caption.end, caption.text))


def part_name(shard: str) -> str:
    """The name of a shard's part file."""
    return shard.removesuffix(".tar") + ".json"


def no_space(error: OSError, folder: Path) -> Exception:
    """The error to raise for an OSError: a full disk is no bug of ours."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return MachineError(f"the disk of {folder} is full", hint="free some space, run it again")
