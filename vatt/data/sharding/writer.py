"""Clips -> shards: the plan of which samples are in which shard, and writing a shard.

The plan is a pure function of manifest, ledger, settings and seed.
"""

import errno
import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import av

from vatt.config import DataParams, PreprocessParams, fingerprint
from vatt.data.clips.ledger import Entry
from vatt.data.clips.manifest import Caption, Clip, media_path, sense_path
from vatt.data.clips.media import BrokenMediaError, Media, ffmpeg_version, find_ffmpeg, probe
from vatt.data.clips.samples import (
    FORMAT,
    Extent,
    IndexRow,
    ShardWriter,
    Window,
    nearest,
    windows_of,
)
from vatt.data.clips.storage import Storage, encode_sound, scaled
from vatt.data.sharding.cut import Cut, Piece, cut
from vatt.errors import DataError, MachineError
from vatt.files import atomic_write
from vatt.senses import SENSES, storage_of
from vatt.senses.form import Cutout

STAGE = "preprocess"


@dataclass(frozen=True, slots=True)
class ClipJob:
    """A clip's windows that go into one shard."""

    clip: Clip
    source: Path
    windows: tuple[tuple[str, Window], ...]  # key and span
    sha256: str | None
    senses: tuple[tuple[str, Path], ...] = ()  # with files of their own
    is_deadly: bool = False  # the worker that cut it was killed: it is not tried again now


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard to write."""

    name: str
    split: str
    jobs: tuple[ClipJob, ...]
    one_by_one: bool = False  # each source in a call of its own: a worker has died

    @property
    def num_samples(self) -> int:
        """As planned; broken clips make it fewer."""
        return sum(len(job.windows) for job in self.jobs)


def plan_shards(
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
    jobs: list[ClipJob] = []
    for clip in clips:
        before = downloads.get(clip.clip_id)
        if before is None:
            raise DataError(
                f"the download ledger lacks clip {clip.clip_id}",
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
        source = media_path(
            clip, media=media, location=data.location, absolute=data.allow_absolute_paths
        )
        senses = _sense_files(clip, preprocess, data, media)
        jobs.append(ClipJob(clip, source, tuple(_keyed(clip, windows)), before.sha256, senses))

    def order(job: ClipJob) -> tuple[str, str, float, str]:
        mixed = hashlib.sha256(f"{seed}:{job.clip.url}".encode()).hexdigest()
        return job.clip.split, mixed, job.clip.start, job.clip.clip_id

    jobs.sort(key=order)  # the clips of one file stay together: it is decoded once
    shards = []
    for split, group in groupby(jobs, key=lambda job: job.clip.split):
        for number, part in enumerate(_fill(list(group), preprocess.samples_per_shard)):
            shards.append(Shard(f"{split}-{number:05d}.tar", split, tuple(part)))
    return shards, entries


def _sense_files(
    clip: Clip, preprocess: PreprocessParams, data: DataParams, media: Path
) -> tuple[tuple[str, Path], ...]:
    """The files of the senses that the shards shall hold, where the clip has them."""
    absolute = data.allow_absolute_paths
    return tuple(
        (
            name,
            sense_path(clip.senses[name], media=media, location=data.location, absolute=absolute),
        )
        for name in storage_of(preprocess).senses
        if name in clip.senses
    )


def _keyed(clip: Clip, windows: Sequence[Window]) -> list[tuple[str, Window]]:
    if len(windows) == 1:
        return [(clip.clip_id, windows[0])]
    return [(f"{clip.clip_id}+{number:04d}", window) for number, window in enumerate(windows)]


def _fill(jobs: Sequence[ClipJob], size: int) -> list[list[ClipJob]]:
    """Deal the windows out in order, `size` to a shard; a long clip may stand in several."""
    shards: list[list[ClipJob]] = []
    room = 0
    for job in jobs:
        windows = job.windows
        while windows:
            if room == 0:
                shards.append([])
                room = size
            shards[-1].append(replace(job, windows=windows[:room]))
            taken = min(room, len(windows))
            windows, room = windows[taken:], room - taken
    return shards


PARTS = "parts"  # folder of the part files
WINDOWS_A_CALL = 32  # outputs of one ffmpeg call
SOURCES_A_CALL = 16  # starting ffmpeg costs more than a second of small video
SECONDS_A_CALL = 64.0  # of sources that share a call
SHOWN = 3  # complaints about a clip in the ledger; the others are counted
KILLED = "the process that cut it was killed, perhaps because memory ran out"
NEIGHBOURS = 32  # captions kept with a sample in addition to those within it


@dataclass(frozen=True, slots=True)
class WriterSettings:
    """What a worker needs in addition to its shard."""

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
            [
                asdict(job.clip),
                job.windows,
                job.sha256 or str(job.source),
                *([name, _hash(self.root / path)] for name, path in job.senses),
            ]
            for job in shard.jobs
        ]
        deadly = [job.clip.clip_id for job in shard.jobs if job.is_deadly]
        made_from = (FORMAT, self.version, self.params, self.require, shard.split, jobs)
        return fingerprint(*made_from, *([deadly] if deadly else []))

    def here(self) -> Self:
        """For this machine; another vattctl or ffmpeg on it would write other bytes."""
        program = self.program if Path(self.program).is_file() else find_ffmpeg(None)
        if made_by(program) != self.version:
            raise MachineError(
                f"vattctl or ffmpeg on {platform.node()} differs from the one that began this run",
                hint="install the same version on every machine",
            )
        folder, work = self.root / self.folder, self.root / self.work
        return replace(self, program=program, folder=folder, work=work)


@lru_cache(maxsize=4)
def made_by(program: str) -> str:
    """Names what writes shards; when it changes they are written again."""
    digest = hashlib.sha256(av.__version__.encode())
    package = Path(__file__).parents[2]
    for source in (
        "data/clips/media",
        "data/clips/samples",
        "data/clips/storage",
        "data/sharding/cut",
        "data/sharding/writer",
        *(f"senses/{name}" for name, sense in SENSES.items() if sense.places),
    ):
        digest.update((package / f"{source}.py").read_bytes())
    return f"{ffmpeg_version(program)} {digest.hexdigest()}"


@dataclass(slots=True)
class Tally:
    """What became of a job's windows."""

    rows: list[IndexRow] = field(default_factory=list)
    has: set[str] = field(default_factory=set)
    losses: Counter[str] = field(default_factory=Counter)
    complaints: dict[str, None] = field(default_factory=dict)  # each once, in order

    def lose(self, count: int, complaint: str) -> None:
        """Note windows that cannot be cut, and why."""
        self.losses["corrupt"] += count
        self.complaints[complaint] = None

    def entry(self, clip: Clip) -> Entry:
        """The clip's state, as far as this shard knows it."""
        lost = sum(self.losses.values())
        complaints = list(self.complaints)
        more = len(complaints) - SHOWN
        said = [*complaints[:SHOWN], *([f"{more} more complaints"] if more > 0 else [])]
        if not self.rows:
            state = self.losses.most_common(1)[0][0]
            return Entry(clip.clip_id, state, STAGE, "; ".join(said))
        reason = "; ".join([*([f"{lost} of its windows are lost"] if lost else []), *said])
        names = tuple(name for name in SENSES if name in self.has)
        return Entry(clip.clip_id, "ok", STAGE, reason, names, samples=len(self.rows))


def write_shard(shard: Shard, setting: WriterSettings) -> dict[str, Any]:
    """Write a shard and then its part file; returns the content of the part file."""
    setting = setting.here()
    path = setting.folder / shard.name
    tallies = [Tally() for _ in shard.jobs]
    try:
        with atomic_write(path) as temporary:
            writer = ShardWriter(temporary, name=shard.name)
            note = setting.work / _note_name(shard)
            for call in _calls(shard, tallies, setting.root, note):
                clips = {
                    shard.jobs[number].clip.clip_id for _, owners in call for number, _ in owners
                }
                note.write_text("\n".join(clips), encoding="utf-8")
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


def without_deadly(shard: Shard, setting: WriterSettings) -> list[Shard]:
    """What to write instead of a shard whose worker died, by the note of what it worked on."""
    try:
        noted = (setting.work / _note_name(shard)).read_text(encoding="utf-8").split("\n")
    except OSError:
        noted = []
    sources = {job.source for job in shard.jobs if job.clip.clip_id in noted}
    if len(sources) > 1 and not shard.one_by_one:
        return [replace(shard, one_by_one=True)]
    if len(sources) != 1 or all(job.is_deadly for job in shard.jobs if job.source in sources):
        raise MachineError(
            f"the process that wrote {shard.name} was killed, and not because of a clip",
            hint="look for its reason in the system's log (dmesg); what is finished is kept",
        )
    jobs = tuple(
        replace(job, is_deadly=job.is_deadly or job.source in sources) for job in shard.jobs
    )
    return [replace(shard, jobs=jobs, one_by_one=True)]


def _note_name(shard: Shard) -> str:
    """Of the file in which a worker notes the clips that it works on."""
    return f"{shard.name}.now"


def _calls(shard: Shard, tallies: Sequence[Tally], root: Path, note: Path) -> Iterator[Call]:
    """Group the jobs in calls of ffmpeg: several short sources in one, a long one in several."""
    call: Call = []
    room, seconds = WINDOWS_A_CALL, SECONDS_A_CALL
    most = 1 if shard.one_by_one else SOURCES_A_CALL
    for item, owners in _cuts(shard.jobs, tallies, root, note):
        length = item.media.seconds
        fits = len(owners) <= room and length <= seconds and len(call) < most
        if call and (not fits or call[-1][0].source == item.source):
            yield call
            call, room, seconds = [], WINDOWS_A_CALL, SECONDS_A_CALL
        call.append((item, owners))
        room, seconds = room - len(owners), seconds - length
    if call:
        yield call


def _cuts(
    jobs: Sequence[ClipJob], tallies: Sequence[Tally], root: Path, note: Path
) -> Iterator[tuple[Cut, list[Owner]]]:
    """The windows of each source, those of all its clips together: it is decoded once."""
    for source, group in groupby(enumerate(jobs), key=lambda item: item[1].source):
        members = list(group)
        source = root / source
        media = _media_of(source, members, tallies, note)
        if media is None:
            continue
        wanted = []
        for number, job in members:
            for key, window in job.windows:
                if _is_in_pause(window, media):
                    tallies[number].lose(1, media.remark)
                else:
                    wanted.append((window, (number, key)))
        for first in range(0, len(wanted), WINDOWS_A_CALL):
            part = wanted[first : first + WINDOWS_A_CALL]
            windows = tuple(window for window, _ in part)
            yield Cut(source, media, windows), [owner for _, owner in part]


def _check_content(source: Path, job: ClipJob) -> None:
    """Stop at a file that is not what was downloaded: its clips are damaged, not unusable."""
    if job.sha256 is None or not source.is_file():
        return
    with source.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == job.sha256:
            return
    again = "run `vattctl download` again"
    if not job.clip.url.startswith("folder:"):
        again = "delete it, then `vattctl download --retry missing` fetches it, and only it"
    raise DataError(f"{source} has changed since it was downloaded or found", hint=again)


def _media_of(
    source: Path, members: Sequence[tuple[int, ClipJob]], tallies: Sequence[Tally], note: Path
) -> Media | None:
    """What a source holds; None, and its clips are lost, where nobody can say."""
    why = KILLED
    if not any(job.is_deadly for _, job in members):
        note.write_text(members[0][1].clip.clip_id, encoding="utf-8")
        _check_content(source, members[0][1])
        try:
            return probe(source)
        except BrokenMediaError as error:
            why = str(error)
    for number, job in members:
        tallies[number].lose(len(job.windows), why)
    return None


def _is_in_pause(window: Window, media: Media) -> bool:
    """Whether nothing was recorded in a tenth of a window or more."""
    lost = sum(max(0.0, min(end, window[1]) - max(begin, window[0])) for begin, end in media.pauses)
    return lost > 0.1 * (window[1] - window[0])


def _add(
    call: Call, tallies: Sequence[Tally], shard: Shard, setting: WriterSettings, writer: ShardWriter
) -> None:
    """Cut the windows of a call and write the complete samples."""
    params = setting.params
    items = [item for item, _ in call]
    results = cut(items, params, program=setting.program, work=setting.work)
    for (item, owners), result in zip(call, results, strict=True):
        others = _other_senses(item, owners, tallies, shard, setting)
        for (number, key), window, piece, own in zip(
            owners, item.windows, result.pieces, others, strict=True
        ):
            clip, tally = shard.jobs[number].clip, tallies[number]
            tally.complaints |= dict.fromkeys(result.complaints)
            captions = _nearby(clip.captions, window)
            has = (*_has(piece, captions), *own)
            loss = _loss(piece, has, setting, picture=item.media.video is not None)
            if loss:
                tally.losses[loss] += 1
                continue
            tally.has.update(has)
            row = _add_sample(key, piece, captions, window, clip, params, writer)
            tally.rows.append(replace(row, senses=_add_senses(key, own, writer)))


def _other_senses(
    item: Cut,
    owners: Sequence[Owner],
    tallies: Sequence[Tally],
    shard: Shard,
    setting: WriterSettings,
) -> list[dict[str, Cutout]]:
    """What each window holds of the senses that lie in files of their own."""
    groups: dict[tuple[str, Path], list[int]] = {}
    for place, (number, _) in enumerate(owners):
        for name, path in shard.jobs[number].senses:
            groups.setdefault((name, setting.root / path), []).append(place)
    found: list[dict[str, Cutout]] = [{} for _ in owners]
    for (name, path), places in groups.items():
        windows = [item.windows[place] for place in places]
        pieces, complaint = SENSES[name].cut(path, windows, setting.params)
        for place, piece in zip(places, pieces, strict=True):
            found[place] |= {} if piece is None else {name: piece}
            if complaint:
                tallies[owners[place][0]].complaints[complaint] = None
    return found


def _add_senses(
    key: str, own: Mapping[str, Cutout], writer: ShardWriter
) -> dict[str, tuple[int, int, int]]:
    """Write the members of these senses; where each lies, and how many values it has."""
    return {
        name: (*writer.add(SENSES[name].member(key), part.data), part.count)
        for name, part in own.items()
    }


def _hash(path: Path) -> str:
    """The content of a sense's file, or of a folder of files."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stamps = [(file, stat.st_size, stat.st_mtime_ns) for file in files if (stat := _stat(file))]
    return _hash_of(tuple(stamps))


def _stat(path: Path) -> os.stat_result | None:
    return path.stat() if path.is_file() else None


@lru_cache(maxsize=1024)  # many clips of a long video share a file
def _hash_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _has(piece: Piece, captions: Sequence[Caption]) -> tuple[str, ...]:
    present = {
        "video": bool(piece.video),
        "audio": piece.audio is not None,
        "text": bool(captions),
    }
    return tuple(name for name, there in present.items() if there)


def _loss(
    piece: Piece, has: Sequence[str], setting: WriterSettings, *, picture: bool
) -> str | None:
    """The state of a window that is not kept; None when it is."""
    params = setting.params
    if picture and piece.num_frames < int(params.min_clip_seconds * params.fps + 1e-6):
        return "too-short" if piece.num_frames else "corrupt"
    for name, sense in SENSES.items():
        if name in setting.require and name not in has:
            return sense.lacking
    return None if "video" in has or "audio" in has else "corrupt"


def _add_sample(
    key: str,
    piece: Piece,
    captions: Sequence[Caption],
    window: Window,
    clip: Clip,
    params: PreprocessParams,
    writer: ShardWriter,
) -> IndexRow:
    storage = Storage.of(params)
    facts: dict[str, Any] = {
        "clip_id": clip.clip_id,
        "source": clip.source,
        "url": clip.url,
        "start": window[0],
        "end": window[1],
        "labels": clip.labels,
        "licence": clip.licence,
        "captions": [_caption(caption, window[0]) for caption in captions],
    }
    if storage.video == "jpeg":
        facts["frame_bytes"] = [len(picture) for picture in piece.video]
    text = json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()
    where_json = writer.add(f"{key}.json", text)
    where_video = _add_picture(key, piece, storage, writer)
    where_audio = None
    if piece.audio is not None:
        wave = piece.audio if params.audio_peak is None else scaled(piece.audio, params.audio_peak)
        sound = encode_sound(wave, storage, kbps=params.aac_kbps)
        where_audio = writer.add(storage.audio_name(key), sound)
    return IndexRow(
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


def _caption(caption: Caption, zero: float) -> list[Any]:
    """As it is stored: with its score where it has one."""
    times = [round(time - zero, 4) for time in (caption.start, caption.end)]
    return [*times, caption.text, *([] if caption.quality is None else [caption.quality])]


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
    """The error to raise for an OSError: a full disk is not our bug."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return MachineError(f"the disk of {folder} is full", hint="free some space, run it again")
