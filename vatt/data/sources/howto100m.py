"""HowTo100M's list and captions -> clips: one for each video, with all that is said in it.

Files, under their official names: HowTo100M_v1.csv, and the captions: raw_caption.json or
caption.json (the same without stop words), else a folder `captions` of <video_id>.csv files.
Gigabytes of captions are read as a stream, one video at a time.
"""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from vatt.config import DataParams
from vatt.data.clips.manifest import LONGEST_TIME, Caption, CaptionFaults, Clip, drawn_split
from vatt.data.sources.official import youtube_url
from vatt.data.sources.textfiles import (
    MANGLED,
    Faults,
    csv_rows,
    number,
    read_rows,
    text_lines,
)
from vatt.errors import DataError

SOURCE = "howto100m"
VIDEOS = "HowTo100M_v1.csv"
COLUMNS = ("start", "end", "text")
CAPTIONS = ("raw_caption.json", "caption.json", "captions")  # the first that is there
PIECE = 2**22  # characters read at once
MAX_MEMBER = 2**25  # characters of one video's captions: more is a broken file
_SPACE = re.compile(r"[ \t\r\n]*")

VideoFacts = tuple[tuple[str, str], ...]  # labels; equal ones are one object, as there are millions
log = logging.getLogger(__name__)


def read_howto100m(folder: Path, data: DataParams) -> Iterator[Clip]:
    """Every listed video; those without captions come last, with none."""
    captions = next((folder / name for name in CAPTIONS if (folder / name).exists()), None)
    if captions is None:
        raise DataError(
            f"not one of {', '.join(CAPTIONS)} in {folder}",
            hint="docs/data-sources.md says where to get them",
        )
    videos = read_videos(folder / VIDEOS)
    unlisted = unusable = 0
    for video_id, spoken, lost in _spoken(captions, videos):
        facts = videos.pop(video_id, None)
        if facts is None:
            unlisted += 1
            continue
        kept = _captions(spoken)
        dropped = len(spoken) - len(kept) + lost
        unusable += dropped
        yield _clip(video_id, facts, kept, CaptionFaults(dropped), data)
    log.info(
        "howto100m: %d videos without captions, %d captioned but not listed, %d captions unusable",
        len(videos), unlisted, unusable,
    )  # fmt: skip
    for video_id, facts in videos.items():
        yield _clip(video_id, facts, (), CaptionFaults(), data)


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


Spoken = tuple[str, list[Any], int]  # a video, rows of start, end and text, and rows that are lost


def _spoken(path: Path, videos: dict[str, VideoFacts]) -> Iterator[Spoken]:
    """What is said in each video, in the order of the file or the list."""
    if path.is_dir():
        for video_id in list(videos):
            file = path / f"{video_id}.csv"
            if file.is_file():
                yield video_id, *_spoken_in(file)
        return
    for video_id, columns in stream_object(path):
        lists = [columns.get(key) for key in COLUMNS] if isinstance(columns, dict) else []
        lengths = [len(values) if isinstance(values, list) else 0 for values in lists]
        if len(set(lengths)) == 1 and all(isinstance(values, list) for values in lists):
            yield video_id, list(zip(*lists, strict=True)), 0
        else:  # the lists cannot be matched
            yield video_id, [], max([1, *lengths])


def _spoken_in(path: Path) -> tuple[list[Any], int]:
    """The rows of one video's csv file; a bad row does not lose the others."""
    faults = Faults(path, hint=MANGLED)
    rows = read_rows(text_lines(path), faults)
    header = [name.strip().casefold() for name in next(rows, (1, []))[1]]
    if not {*COLUMNS} <= {*header}:
        return [], 1
    places = [header.index(name) for name in COLUMNS]
    found = [row for _, row in rows]
    whole = [[row[place] for place in places] for row in found if len(row) == len(header)]
    return whole, len(found) - len(whole) + faults.count


def _captions(rows: list[Any]) -> tuple[Caption, ...]:
    """The usable rows, in the order of time: with words (pandas wrote NaN for none), and a span."""
    kept = []
    for start, end, text in rows:
        first, last = _seconds(start), _seconds(end)
        if first is None or last is None or not first < last:
            continue
        if isinstance(text, str) and text.strip():
            kept.append(Caption(first, last, text.strip()))
    return tuple(sorted(kept, key=lambda caption: caption.start))


def _seconds(value: Any) -> float | None:
    try:
        seconds = number(value, "time") if isinstance(value, str) else value
    except ValueError:
        return None
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    return float(seconds) if is_number and abs(seconds) <= LONGEST_TIME else None


def _clip(
    video_id: str,
    facts: VideoFacts,
    captions: tuple[Caption, ...],
    faults: CaptionFaults,
    data: DataParams,
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
        caption_faults=faults,
    )


def stream_object(path: Path) -> Iterator[tuple[str, Any]]:
    """The members of a file that is one JSON object, one at a time, however large the file is."""
    with path.open(encoding="utf-8-sig") as file:
        text = _Text(path, file)
        text.expect("{")
        while not text.skips("}"):
            key = text.value()
            if not isinstance(key, str):
                raise text.broken("a name must be in quotes")
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
                raise self.broken(str(error)) from None
            except ValueError as error:
                if len(self._text) - self._at > MAX_MEMBER or not self._more():
                    raise self.broken(str(error)) from None

    def skips(self, mark: str) -> bool:
        """Pass over a character if it comes next."""
        self._seek()
        there = self._text.startswith(mark, self._at)
        self._at += there
        return there

    def expect(self, mark: str) -> None:
        """Pass over a character that must come next."""
        if not self.skips(mark):
            raise self.broken(f"expected '{mark}'")

    def _seek(self) -> None:
        """Go to the next character that is not a space, reading on where needed."""
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
            raise self.broken(str(error)) from None
        self._before += self._at
        self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)

    def broken(self, why: str) -> DataError:
        """An error that names the place."""
        place = f"{self._path}: character {self._before + self._at}"
        return DataError(f"{place}: broken JSON: {why}", hint="it was cut off: get it again")
