"""The list of clips: JSON lines, one clip each, read and written as a stream."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vatt.errors import DataError
from vatt.files import atomic_write

SPLITS = ("train", "val", "test")
# A clip id becomes a name inside a tar and a WebDataset key, where a dot or a slash would cut it.
CLIP_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,69}")


@dataclass(frozen=True, slots=True)
class Caption:
    """Words and the span in which they are said, in seconds of the source."""

    start: float
    end: float
    text: str


@dataclass(frozen=True, slots=True)
class Clip:
    """A span of a video, with what is said around it and what it shows."""

    clip_id: str
    source: str  # the data set: demo, folder, urls, ...
    url: str  # http(s), or <scheme>:<path> resolved by download and `media_path`
    start: float
    end: float | None  # None: to the end of the media
    split: str
    labels: dict[str, str]
    captions: tuple[Caption, ...]
    licence: str | None

    @property
    def media_name(self) -> str:
        """The file name of its media: the same for all clips of one url, safe on any disk."""
        return hashlib.sha256(self.url.encode()).hexdigest()[:24]


def media_path(clip: Clip, *, media: Path, location: Path | None) -> Path:
    """Where the clip's media lies: a folder's own files in place, anything else in `media`."""
    if not clip.url.startswith("folder:"):
        return media / clip.media_name
    if location is None:
        raise DataError(
            f"clip {clip.clip_id} lies in a folder, and data.location names none",
            hint="run `vattctl ingest FOLDER` again",
        )
    path = location / clip.url.removeprefix("folder:")
    if not path.parent.resolve().is_relative_to(location.resolve()):
        raise DataError(
            f"clip {clip.clip_id} points out of {location}: {clip.url}",
            hint="run `vattctl ingest FOLDER` again",
        )
    return path


def write_manifest(path: Path, clips: Iterable[Clip]) -> int:
    """Write the clips whole or not at all; returns their number. An id given twice is refused."""
    seen: set[bytes] = set()
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for clip in clips:
            short = hashlib.sha256(clip.clip_id.encode()).digest()[:12]
            if short in seen:
                raise DataError(f"two clips are called {clip.clip_id}", hint="give each its own id")
            seen.add(short)
            file.write(_to_line(clip) + "\n")
    return len(seen)


def read_manifest(path: Path) -> Iterator[Clip]:
    """The clips in the file's order; a bad line is named with its number."""
    try:
        file = path.open(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} is missing", hint="run `vattctl download`") from None
    with file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _from_line(line, where=f"{path}:{number}")


def manifest_hash(path: Path) -> str:
    """The sha256 that names the set of clips, whatever their order in the file."""
    total = 0
    for clip in read_manifest(path):
        total += int.from_bytes(hashlib.sha256(_to_line(clip).encode()).digest(), "big")
    return hashlib.sha256((total % 2**256).to_bytes(32, "big")).hexdigest()


def _to_line(clip: Clip) -> str:
    record = {
        "clip_id": clip.clip_id,
        "source": clip.source,
        "url": clip.url,
        "start": clip.start,
        "end": clip.end,
        "split": clip.split,
        "labels": clip.labels,
        "captions": [[caption.start, caption.end, caption.text] for caption in clip.captions],
        "licence": clip.licence,
    }
    return json.dumps(record, ensure_ascii=False, sort_keys=True, allow_nan=False)


def _from_line(line: str, *, where: str) -> Clip:
    try:
        record = json.loads(line)
        clip = Clip(
            clip_id=_text(record["clip_id"]),
            source=_text(record["source"]),
            url=_text(record["url"]),
            start=_seconds(record["start"]),
            end=None if record["end"] is None else _seconds(record["end"]),
            split=_text(record["split"]),
            labels={_text(name): _text(value) for name, value in record["labels"].items()},
            captions=tuple(
                Caption(_seconds(start), _seconds(end), _text(text))
                for start, end, text in record["captions"]
            ),
            licence=None if record["licence"] is None else _text(record["licence"]),
        )
        _check(clip)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{where}: not a clip: {reason}", hint="run `vattctl download`") from None
    return clip


def _check(clip: Clip) -> None:
    if not CLIP_ID.fullmatch(clip.clip_id):
        raise ValueError(f"clip_id {clip.clip_id!r} may hold letters, digits, - and _ only")
    if clip.split not in SPLITS:
        raise ValueError(f"split {clip.split!r} is none of {', '.join(SPLITS)}")
    if clip.start < 0 or (clip.end is not None and clip.end <= clip.start):
        raise ValueError(f"span {clip.start} to {clip.end} is empty")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"{value!r} is no time in seconds")
    return float(value)
