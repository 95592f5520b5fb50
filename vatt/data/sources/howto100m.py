"""HowTo100M's list and captions -> clips: one for each video, with all that is said in it.

Files, under their official names: HowTo100M_v1.csv, and the captions: raw_caption.json or
caption.json (the same without stop words), else a folder `captions` of <video_id>.csv files.
Gigabytes of captions are read as a stream, one video at a time.
"""

import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from vatt.config import DataParams
from vatt.data.clips.manifest import Caption, Clip, drawn_split
from vatt.data.sources.official import MANGLED, Faults, csv_rows, youtube_url
from vatt.errors import DataError

SOURCE = "howto100m"
VIDEOS = "HowTo100M_v1.csv"
CAPTIONS = ("raw_caption.json", "caption.json", "captions")  # the first that is there
PIECE = 2**22  # characters read at once
MAX_MEMBER = 2**26  # characters of one video's captions: more is a broken file
_SPACE = re.compile(r"[ \t\r\n]*")

VideoFacts = tuple[tuple[str, str], ...]  # labels; equal ones are one object, as there are millions
log = logging.getLogger(__name__)


def read_howto100m(folder: Path, data: DataParams) -> Iterator[Clip]:
    """Every listed video; those without captions come last, with none."""
    captions = next((folder / name for name in CAPTIONS if (folder / name).exists()), None)
    if captions is None:
        raise DataError(
            f"none of {', '.join(CAPTIONS)} in {folder}",
            hint="docs/data-sources.md says where to get them",
        )
    videos = read_videos(folder / VIDEOS)
    unlisted = dropped = 0
    for video_id, spoken in _spoken(captions, videos):
        facts = videos.pop(video_id, None)
        if facts is None:
            unlisted += 1
            continue
        kept = _captions(spoken)
        dropped += len(spoken) - len(kept)
        yield _clip(video_id, facts, kept, data)
    log.info(
        "howto100m: %d videos without captions, %d captioned but not listed, %d captions unusable",
        len(videos), unlisted, dropped,
    )  # fmt: skip
    for video_id, facts in videos.items():
        yield _clip(video_id, facts, (), data)


def read_videos(path: Path) -> dict[str, VideoFacts]:
    """The videos of the list, in its order; one that is listed for two tasks keeps the first."""
    videos: dict[str, VideoFacts] = {}
    known: dict[VideoFacts, VideoFacts] = {}
    faults = Faults(path, hint=MANGLED)
    for line, row in csv_rows(path, ("video_id", "category_1", "category_2", "task_id")):
        try:
            youtube_url(row["video_id"])
        except ValueError as error:
            faults.add(line, str(error))
            continue
        names = {"category": row["category_1"], "subcategory": row["category_2"]}
        facts = tuple((k, v) for k, v in (names | {"task": row["task_id"]}).items() if v)
        videos.setdefault(row["video_id"], known.setdefault(facts, facts))
    faults.check()
    return videos


def _spoken(path: Path, videos: dict[str, VideoFacts]) -> Iterator[tuple[str, list[Any]]]:
    """Video ids and rows of start, end, text, in the order of the file or the list."""
    if path.is_dir():
        for video_id in list(videos):
            file = path / f"{video_id}.csv"
            if file.is_file():
                named = csv_rows(file, ("start", "end", "text"))
                yield video_id, [(row["start"], row["end"], row["text"]) for _, row in named]
        return
    for video_id, columns in stream_object(path):
        try:
            rows = list(zip(columns["start"], columns["end"], columns["text"], strict=True))
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{path}: the captions of {video_id} are no start, end and text of equal length",
                hint=MANGLED,
            ) from None
        yield video_id, rows


def _captions(rows: list[Any]) -> tuple[Caption, ...]:
    """The usable rows: with words (pandas wrote NaN for none), and lasting some time."""
    kept = []
    for start, end, text in rows:
        try:
            first, last = float(start), float(end)
        except (TypeError, ValueError):
            continue
        usable = isinstance(text, str) and text.strip() and math.isfinite(first + last)
        if usable and last > first:
            kept.append(Caption(first, last, text.strip()))
    return tuple(kept)


def _clip(
    video_id: str, facts: VideoFacts, captions: tuple[Caption, ...], data: DataParams
) -> Clip:
    url = youtube_url(video_id)
    return Clip(
        clip_id=f"ht_{video_id}",
        source=SOURCE,
        url=url,
        start=0.0,
        end=None,
        split=drawn_split(url, data.test_share, data.val_share),
        labels=dict(facts),
        captions=captions,
        licence=None,
    )


def stream_object(path: Path) -> Iterator[tuple[str, Any]]:
    """The members of a file that is one JSON object, one at a time, however large the file is."""
    with path.open(encoding="utf-8") as file:
        text = _Text(path, file)
        text.expect("{")
        while not text.skips("}"):
            key = text.value()
            text.expect(":")
            yield key, text.value()
            if not text.skips(","):
                text.expect("}")
                return


class _Text:
    """A window into a JSON file."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file
        self._decoder = json.JSONDecoder()
        self._text, self._at, self._before = "", 0, 0

    def value(self) -> Any:
        """The value that begins here."""
        self._seek()
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
                return value
            except RecursionError as error:
                raise self._broken(str(error)) from None
            except ValueError as error:
                if len(self._text) - self._at > MAX_MEMBER or not self._more():
                    raise self._broken(str(error)) from None

    def skips(self, mark: str) -> bool:
        """Pass over a character if it comes next."""
        self._seek()
        there = self._text.startswith(mark, self._at)
        self._at += there
        return there

    def expect(self, mark: str) -> None:
        """Pass over a character that must come next."""
        if not self.skips(mark):
            raise self._broken(f"expected '{mark}'")

    def _seek(self) -> None:
        """Go to the next character that is no space, reading on where needed."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text) or not self._more():
                return

    def _more(self) -> bool:
        try:
            piece = self._file.read(PIECE)
        except UnicodeDecodeError as error:
            raise self._broken(str(error)) from None
        self._before += self._at
        self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)

    def _broken(self, why: str) -> DataError:
        place = f"{self._path}: character {self._before + self._at}"
        return DataError(f"{place}: broken JSON: {why}", hint="it was cut off: get it again")
