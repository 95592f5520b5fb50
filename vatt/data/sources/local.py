"""Clips whose media a person has already: found by name in the folder data.location."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, urlsplit

from vatt.data.manifest import Clip
from vatt.data.media import BrokenMediaError, probe
from vatt.data.sources.folder import MEDIA

SLACK = 1.0  # seconds by which a cut part may be longer than its span


def placed(clips: Iterable[Clip], location: Path) -> Iterator[Clip]:
    """Point clips to the files that are there; those of YouTube videos else keep their address.

    A file of an archive lies under its name, in whatever sub-folder. A video's is <id>.mp4, or a
    part of it: <id>_<from>_<to>.mp4 or <id>_<from>.mp4, in whole seconds of six digits, as Kinetics
    and VGGSound are handed on; Y<id>.wav, as AudioSet is; any media ending will do. A file <id>.mp4
    that is no longer than the span is the part too.
    """
    place = _Location(location)
    for clip in clips:
        yield place.archived(clip) if clip.url.startswith("folder:") else place.fetched(clip)


class _Location:
    """A folder of media; gone through once, and only when that is needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._by_stem: dict[str, list[str]] | None = None

    def find(self, name: str) -> str | None:
        """The file of that name, in the most similar folder; its ending may be another."""
        if self._by_stem is None:
            self._by_stem = _files(self._folder)
        there = self._by_stem.get(Path(name).stem, [])
        return max(there, key=lambda other: _alike(name, other), default=None)

    def archived(self, clip: Clip) -> Clip:
        """A file of a set that comes as an archive."""
        name = clip.url.removeprefix("folder:")
        if (self._folder / name).is_file():
            return clip
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
                    return replace(clip, url=f"folder:{there}", start=0.0, end=end - begin)
        there = self.find(video_id)
        if there is None:
            return clip
        if end is not None and begin > 0 and self._is_part(there, end - begin):
            begin, end = 0.0, end - begin
        return replace(clip, url=f"folder:{there}", start=begin, end=end)

    def _is_part(self, name: str, seconds: float) -> bool:
        try:
            return probe(self._folder / name).seconds <= seconds + SLACK
        except BrokenMediaError:
            return False  # the ledger will say why


def _files(location: Path) -> dict[str, list[str]]:
    """Names below the folder, sorted, by what they are called without folder and ending."""
    found: dict[str, list[str]] = {}
    for folder, folders, names in os.walk(location):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix.lower() in MEDIA:
                found.setdefault(path.stem, []).append(path.relative_to(location).as_posix())
    return found


def _alike(one: str, other: str) -> int:
    """How many folders right above the file have the same names."""
    pairs = zip(PurePosixPath(one).parents, PurePosixPath(other).parents, strict=False)
    count = 0
    for mine, theirs in pairs:
        if mine.name != theirs.name or not mine.name:
            break
        count += 1
    return count
