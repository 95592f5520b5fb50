"""A csv of addresses -> clips. Columns: url (or path, or youtube_id); start, end, split, id, text,
licence if there are any; every other column is a label."""

import csv
import hashlib
import math
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from urllib.parse import urlsplit

import numpy as np

from vatt.config import DataParams
from vatt.data.clips.files import composed, find_file
from vatt.data.clips.manifest import CLIP_ID, SPLITS, Caption, Clip, drawn_split, mark_of
from vatt.data.sources.official import Faults
from vatt.errors import DataError

ALIASES = {
    "time_start": "start",
    "start_seconds": "start",
    "time_end": "end",
    "end_seconds": "end",
    "clip_id": "id",
    "caption": "text",
    "license": "licence",
}
KNOWN = ("url", "path", "youtube_id", "start", "end", "split", "id", "text", "licence")
PLACES = ("url", "path", "youtube_id")


def read_urls(path: Path, data: DataParams) -> Iterator[Clip]:
    """The clips of the list, as a stream; bad rows are named with their lines, all at once."""
    faults = Faults(path, hint="correct or delete these lines")
    marks = array("Q")
    for line, row in _rows(path):
        try:
            clip = _clip(row, path.parent, data)
        except ValueError as error:
            faults.add(line, str(error))
            continue
        marks.append(mark_of(clip.clip_id))
        if not row.get("split"):
            clip = replace(clip, split=drawn_split(clip.url, data.test_share, data.val_share))
        yield clip
    if not marks:
        faults.check()
        raise DataError(f"{path} lists no clip", hint="a header line and one line a clip")
    _add_twins(path, data, marks, faults)
    faults.check()


def _add_twins(path: Path, data: DataParams, marks: "array[int]", faults: Faults) -> None:
    """Name the lines that list a clip once more."""
    ordered = np.sort(np.asarray(marks))
    twins = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    first: dict[str, int] = {}
    for line, row in _rows(path) if twins else ():
        try:
            name = _clip(row, path.parent, data).clip_id
        except ValueError:
            continue
        if mark_of(name) in twins and first.setdefault(name, line) != line:
            faults.add(line, f"the same clip as in line {first[name]}")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = _header(next(reader, []), path)
            for row in reader:
                if row and len(row) != len(header):
                    raise DataError(
                        f"{path}:{reader.line_num}: {len(row)} fields under {len(header)} "
                        "column names",
                        hint='put fields that hold a comma in "quotes"',
                    )
                if row:
                    named = zip(header, (value.strip() for value in row), strict=True)
                    yield reader.line_num, dict(named)
    except FileNotFoundError:
        raise DataError(f"{path} is missing", hint="set data.location to a csv file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error}", hint="save it as UTF-8") from None


def _header(fields: list[str], path: Path) -> list[str]:
    names = [ALIASES.get(name.strip().lower(), name.strip()) for name in fields]
    if not names:
        raise DataError(f"{path} is empty", hint="a header line and one line a clip")
    if set(PLACES) & set(names):
        return names
    if any(mark in ",".join(names) for mark in (";", "\t")):
        raise DataError(f"{path}:1: fields must be separated by commas", hint="save it as csv")
    raise DataError(
        f"{path}:1: no column named {', '.join(PLACES)}", hint="name the columns in line 1"
    )


def _clip(row: dict[str, str], home: Path, data: DataParams) -> Clip:
    url = _url(row, home, data)
    start = _time(row.get("start", ""), "start") or 0.0
    end = _time(row.get("end", ""), "end")
    if start < 0 or (end is not None and end <= start):
        raise ValueError(f"the span from {start} to {end} is empty")
    split = row.get("split", "")
    split = {"validate": "val", "validation": "val", "valid": "val"}.get(split, split) or "train"
    if split not in SPLITS:
        raise ValueError(f"split '{split}' is none of {', '.join(SPLITS)}")
    name = row.get("id") or _name(url, start, end)
    if not CLIP_ID.fullmatch(name):
        raise ValueError(f"id '{name}' may hold letters, digits, - and _ only")
    text = row.get("text", "")
    return Clip(
        clip_id=name,
        source="urls",
        url=url,
        start=start,
        end=end,
        split=split,
        labels={key: composed(value) for key, value in row.items() if key not in KNOWN and value},
        captions=(Caption(start, end if end is not None else start + 1.0, text),) if text else (),
        licence=row.get("licence") or None,
    )


def _url(row: dict[str, str], home: Path, data: DataParams) -> str:
    """An address; a path is a file beside the list, or else on a mirror where there are any."""
    if row.get("youtube_id"):
        if not re.fullmatch(r"[\w-]{1,64}", row["youtube_id"], re.ASCII):
            raise ValueError(f"'{row['youtube_id']}' is no YouTube id")
        return f"https://www.youtube.com/watch?v={row['youtube_id']}"
    if row.get("url"):
        parts = urlsplit(row["url"])
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"'{row['url']}' is no http or https address")
        return row["url"]
    if row.get("path"):
        return _path_url(row["path"], home, data)
    raise ValueError("no address in it")


def _path_url(name: str, home: Path, data: DataParams) -> str:
    """A file by its path, which counts from the list's folder; others only where that is set."""
    path = Path(os.path.normpath(home.absolute() / name))
    base = next((b for b in (home.absolute(), home.resolve()) if path.is_relative_to(b)), None)
    outside = base is None or bool(PureWindowsPath(name).drive)
    if outside and data.allow_absolute_paths:
        return f"folder:{path}"
    if base is None or outside:
        raise ValueError(
            f"the path {name} does not lie below {home}, from where paths count: "
            "move the list, or set data.allow_absolute_paths: true"
        )
    name = path.relative_to(base).as_posix()
    there = find_file(home, name)
    if there is None and data.base_urls:
        return f"urls:{name}"
    return f"folder:{there or name}"


def _time(value: str, column: str) -> float | None:
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"{column} '{value}' is no number of seconds")
    return seconds


def _name(url: str, start: float, end: float | None) -> str:
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", Path(urlsplit(url).path).stem).strip("-")[:40]
    short = hashlib.sha256(f"{url} {start} {end}".encode()).hexdigest()[:10]
    return f"{readable or 'clip'}-{short}"
