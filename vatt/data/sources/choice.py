"""The source that the settings name: its clips, the files that are there, parts and mixtures."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, urlsplit

from vatt.config import OWN_SOURCES, DataParams
from vatt.data.clips.files import (
    MEDIA,
    ContentHashes,
    composed,
    find_file,
    list_files,
    why_missing,
)
from vatt.data.clips.manifest import Clip, path_in_folder
from vatt.data.clips.media import BrokenMediaError, probe
from vatt.data.sources.demo import make_demo, mark_of_voices, serve
from vatt.data.sources.folder import class_doubts, copies_in_test, scan, split_word
from vatt.data.sources.howto100m import read_howto100m
from vatt.data.sources.imagenet import read_imagenet
from vatt.data.sources.labelled import (
    read_audioset,
    read_esc50,
    read_hmdb51,
    read_kinetics,
    read_moments,
    read_msrvtt,
    read_ucf101,
    read_vggsound,
    read_youcook2,
)
from vatt.data.sources.urls import read_urls
from vatt.progress import Progress

log = logging.getLogger(__name__)

READERS: dict[str, Callable[[Path, DataParams], Iterator[Clip]]] = {
    "audioset": read_audioset,
    "esc50": read_esc50,
    "hmdb51": read_hmdb51,
    "howto100m": read_howto100m,
    "imagenet": read_imagenet,
    "kinetics400": partial(read_kinetics, source="kinetics400"),
    "kinetics600": partial(read_kinetics, source="kinetics600"),
    "kinetics700": partial(read_kinetics, source="kinetics700"),
    "moments": read_moments,
    "msrvtt": read_msrvtt,
    "ucf101": read_ucf101,
    "vggsound": read_vggsound,
    "youcook2": read_youcook2,
}


@dataclass(frozen=True, slots=True)
class Source:
    """Clips, and the settings with the servers that run while the source is open."""

    clips: Iterable[Clip]  # to be read once
    data: DataParams


@contextmanager
def open_source(
    data: DataParams,
    *,
    seed: int,
    corpus: Path,
    workers: int,
    progress: Progress,
) -> Iterator[Source]:
    """List the clips of `data.source`; the demo makes its corpus and serves it on loopback."""
    if data.source == "demo":
        clips = make_demo(corpus, data.demo, seed=seed, workers=workers, progress=progress)
        with serve(corpus) as base_url:
            mirrored = data.model_copy(update={"base_urls": (base_url,)})
            yield Source(sampled(clips, data.sample_share, seed), mirrored)
        return
    there = listed(data, seed, hashes=ContentHashes.beside(corpus))
    yield Source(sampled(there, data.sample_share, seed), data)


def listed(data: DataParams, seed: int, *, hashes: ContentHashes | None = None) -> Iterable[Clip]:
    """The clips of a folder, a list of addresses, or official lists in their ratio."""
    if data.source == "folder":
        assert data.location is not None  # the schema asks for it
        found = scan(data.location, data, hashes=hashes)
        for note in found.notes:
            log.warning("%s: %s", data.location, note)
        return found.clips
    if data.source == "urls":
        assert data.location is not None
        return read_urls(data.location, data)
    assert data.annotations is not None
    parts = {name: partial(READERS[name], data.annotations / name, data) for name in data.sources}
    clips = union(parts, data.mix, seed)
    return clips if data.location is None else placed(clips, data.location)


UNKNOWN_SECONDS = 390.0  # of a video without span and captions: HowTo100M's mean

ListPart = Callable[[], Iterator[Clip]]


def sampled(clips: Iterable[Clip], share: float, seed: int) -> Iterable[Clip]:
    """A share of the clips, each drawn by its own id: the rest of the list has no influence."""
    return clips if share == 1 else (c for c in clips if _place(f"part:{seed}:{c.clip_id}") < share)


def union(
    parts: Mapping[str, ListPart], mix: Mapping[str, float] | None, seed: int
) -> Iterator[Clip]:
    """The clips of all lists; with a mix, the share of each that gives this ratio of hours."""
    if mix is None:
        yield from chain.from_iterable(part() for part in parts.values())
        return
    hours = {name: sum(map(_seconds, part())) / 3600 for name, part in parts.items()}
    total = min(hours[name] / mix[name] for name in parts)
    for name, part in parts.items():
        share = mix[name] * total / hours[name] if hours[name] else 0.0
        for clip in part():
            if _place(f"mix:{seed}:{clip.clip_id}") < share:
                yield clip


def _place(name: str) -> float:
    """Where a name falls between 0 and 1."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _seconds(clip: Clip) -> float:
    if clip.end is not None:
        return clip.end - clip.start
    return clip.captions[-1].end if clip.captions else UNKNOWN_SECONDS


def mark_of_lists(data: DataParams, hashes: ContentHashes | None = None) -> str | None:
    """Changes with the content of any list; None where clips come from no list.

    The files that a csv names count too, where they lie on this machine, and the demo's voices.
    """
    if data.source == "demo" and data.demo.voices is not None:
        return mark_of_voices(data.demo.voices, hashes)
    if data.source == "urls":
        assert data.location is not None  # the schema asks for it
        named = [(data.location.name, data.location), *_files_of(data.location, data)]
    elif data.source in OWN_SOURCES:
        return None
    else:
        assert data.annotations is not None
        folders = [data.annotations / name for name in data.sources]
        named = [
            (name, folder / name) for folder in folders if folder.is_dir()
            for name in list_files(folder).files
        ]  # fmt: skip
    there = [path.is_file() for _, path in named]
    found = iter((hashes or ContentHashes()).of(path for _, path in named if path.is_file()))
    lines = [
        f"{name} {next(found) if is_file else 'absent'}\n"
        for (name, _), is_file in zip(named, there, strict=True)
    ]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _files_of(csv_file: Path, data: DataParams) -> Iterator[tuple[str, Path]]:
    """The files of this machine that a csv lists."""
    if not csv_file.is_file():
        return
    for clip in read_urls(csv_file, data, announces=False):
        if clip.url.startswith("folder:"):
            path = path_in_folder(clip.url, csv_file, absolute=data.allow_absolute_paths)
            yield clip.url, path


MOST_CLASSES = 0.5  # of the clips; a column with more values than that names no classes


def list_doubts(clips: Sequence[Clip], data: DataParams, hashes: ContentHashes) -> list[str]:
    """What a person may not have meant with a csv, as `scan` says it of a folder."""
    assert data.location is not None  # the schema asks for it
    files = {
        clip.url: path_in_folder(clip.url, data.location, absolute=data.allow_absolute_paths)
        for clip in clips
        if clip.url.startswith("folder:")
    }
    lost = [path for path in files.values() if not path.is_file()]
    notes = []
    if lost:
        notes.append(
            f"{len(lost)} of {len(files)} files of the list are not there, among them {lost[0]}: "
            f"{why_missing(lost[0])}"
        )
    if not any(clip.split == "test" for clip in clips):
        notes.append("no row is left for testing: add rows, or raise data.test_share")
    there = {url: path for url, path in files.items() if path.is_file()}
    digests = dict(zip(there, hashes.of(there.values()), strict=True))
    notes += copies_in_test((digests[c.url], c) for c in clips if c.url in digests)
    for label in dict.fromkeys(name for clip in clips for name in clip.labels):
        values = [clip.labels[label] for clip in clips if label in clip.labels]
        if label.lower() == "label" or len(set(values)) <= MOST_CLASSES * len(values):
            notes += [f"column {label}: {note}" for note in class_doubts(clips, label)]
    return notes


# --- files that are there already -----------------------------------------------------------------

SLACK = 1.0  # seconds by which a cut part may be longer than its span


def placed(clips: Iterable[Clip], location: Path) -> Iterator[Clip]:
    """Point clips to the files that are there; other YouTube videos keep their address.

    A file of an archive lies under its name, in any sub-folder. A video's file is <id>.mp4, or a
    part of it: <id>_<from>_<to>.mp4 or <id>_<from>.mp4, in whole seconds of six digits, as Kinetics
    and VGGSound are distributed; Y<id>.wav, as AudioSet is; any ending of media will do. A file
    <id>.mp4 that is not longer than the span is the part, too.
    """
    place = _Location(location)
    for clip in clips:
        yield place.archived(clip) if clip.url.startswith("folder:") else place.fetched(clip)


class _Location:
    """A folder of media; listed once, and only when needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._by_stem: dict[str, list[str]] | None = None

    def find(self, name: str) -> str | None:
        """The file of that name, in the most similar folder; its ending may be another."""
        if self._by_stem is None:
            self._by_stem = _files_by_stem(self._folder)
        there = self._by_stem.get(composed(PurePosixPath(name).stem), [])
        return max(there, key=lambda other: _alike(name, other), default=None)

    def archived(self, clip: Clip) -> Clip:
        """A file of a set that comes as an archive."""
        name = clip.url.removeprefix("folder:")
        if (there := find_file(self._folder, name)) is not None:
            return replace(clip, url=f"folder:{there}")
        there = self.find(name)
        return clip if there is None else replace(clip, url=f"folder:{there}")

    def fetched(self, clip: Clip) -> Clip:
        """A video, or the part of it that the clip is."""
        parts = urlsplit(clip.url)
        video_id = parse_qs(parts.query).get("v", [""])[0]
        begin, end = clip.start, clip.end
        if parts.fragment.startswith("t="):  # the span counts from the part's beginning
            begin, end = map(float, parts.fragment.removeprefix("t=").split(","))
        if end is not None:
            since = f"{video_id}_{int(begin):06d}"
            for name in (f"{since}_{int(end):06d}", since, f"Y{video_id}"):
                if (there := self.find(name)) is not None:
                    return _of_file(clip, there, 0.0, end - begin)
        there = self.find(video_id)
        if there is None:
            return clip
        if end is not None and begin > 0 and self._is_part(there, end - begin):
            begin, end = 0.0, end - begin
        return _of_file(clip, there, begin, end)

    def _is_part(self, name: str, seconds: float) -> bool:
        try:
            return probe(self._folder / name).seconds <= seconds + SLACK
        except BrokenMediaError:
            return False  # the ledger will say why


def _of_file(clip: Clip, name: str, start: float, end: float | None) -> Clip:
    """The clip as a span of a file; its captions move with it."""
    shift = start - clip.start
    captions = tuple(
        replace(said, start=said.start + shift, end=said.end + shift) for said in clip.captions
    )
    return replace(clip, url=f"folder:{name}", start=start, end=end, captions=captions)


def _files_by_stem(location: Path) -> dict[str, list[str]]:
    """Names below the folder, sorted, by what they are called without folder and ending."""
    found: dict[str, list[str]] = {}
    for name in list_files(location).files:
        path = PurePosixPath(name)
        if path.suffix.lower() in MEDIA:
            found.setdefault(composed(path.stem), []).append(name)
    return found


def _alike(one: str, other: str) -> int:
    """How many folders right above the file have the same names; Val equals validation."""
    pairs = zip(PurePosixPath(one).parents, PurePosixPath(other).parents, strict=False)
    count = 0
    for mine, theirs in pairs:
        if not mine.name or _plain(mine.name) != _plain(theirs.name):
            break
        count += 1
    return count


def _plain(folder: str) -> str:
    return split_word(folder) or composed(folder).casefold()
