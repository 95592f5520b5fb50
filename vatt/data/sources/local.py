"""Clips whose media a person has already: found by name in the folder data.location."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from vatt.data.manifest import Clip
from vatt.data.sources.folder import MEDIA


def placed(clips: Iterable[Clip], location: Path) -> Iterator[Clip]:
    """Point clips of YouTube videos to files, where there is one; the others keep their address.

    A file is named <id>.mp4 (the whole video) or <id>_<from>_<to>.mp4 (a part, in whole seconds of
    six digits, as Kinetics' downloaders write them); any media ending and any sub-folder will do.
    """
    files = _files(location)
    for clip in clips:
        yield _in_folder(clip, files) if clip.url.startswith("folder:") else _placed(clip, files)


def _files(location: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for folder, _, names in os.walk(location):
        for name in names:
            path = Path(folder, name)
            if path.suffix.lower() in MEDIA:
                found.setdefault(path.stem, path.relative_to(location).as_posix())
    return found


def _in_folder(clip: Clip, files: dict[str, str]) -> Clip:
    """A file of a set that comes as an archive, in whatever sub-folder it was unpacked."""
    there = files.get(Path(clip.url.removeprefix("folder:")).stem)
    return clip if there is None else replace(clip, url=f"folder:{there}")


def _placed(clip: Clip, files: dict[str, str]) -> Clip:
    parts = urlsplit(clip.url)
    video_id = parse_qs(parts.query).get("v", [""])[0]
    begin, end = clip.start, clip.end
    if parts.fragment.startswith("t="):  # the span counts from the part's beginning
        begin, end = map(float, parts.fragment.removeprefix("t=").split(","))
    part = f"{video_id}_{int(begin):06d}_{int(end):06d}" if end is not None else ""
    if part in files:
        assert end is not None
        return replace(clip, url=f"folder:{files[part]}", start=0.0, end=end - begin)
    if video_id in files:
        return replace(clip, url=f"folder:{files[video_id]}", start=begin, end=end)
    return clip
