"""A csv of addresses -> clips. Columns: url (or path, or youtube_id); start, end, split, id, text,
licence if there are any; every other column is a label."""

import hashlib
import logging
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from urllib.parse import urlsplit

import numpy as np

from vatt.config import DataParams
from vatt.data.clips.files import LONGEST_PATH, MEDIA, composed, find_file
from vatt.data.clips.manifest import (
    CLIP_ID,
    LABEL_SEPARATOR,
    SPLITS,
    Caption,
    Clip,
    drawn_split,
    mark_of,
)
from vatt.data.sources.folder import split_word
from vatt.data.sources.textfiles import (
    UNICODE,
    Faults,
    encoding_of_file,
    number,
    read_rows,
    split_row,
    text_lines,
)
from vatt.errors import DataError
from vatt.senses import files_beside

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
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_LOOKS_LIKE = {  # a row has it; the second line of a sentence does not
    "url": re.compile(r"\s*[a-z]+://\S+\s*", re.IGNORECASE),
    "path": re.compile(r"\s*\S.{0,255}\.\w{2,5}\s*"),
    "youtube_id": re.compile(r"\s*[\w-]{11}\s*", re.ASCII),
}
_YOUTUBE = re.compile(
    r"https?://(?:(?:www\.|m\.|music\.)?youtube(?:-nocookie)?\.com/"
    r"(?:watch/?\?(?:[^#]*&)?v=|shorts/|embed/|live/|v/)|youtu\.be/)([\w-]{11})(?:[?&/#].*)?",
    re.ASCII | re.IGNORECASE,
)
_NO_TEXT = (b"PK\x03\x04", b"\x1f\x8b", b"\xd0\xcf\x11\xe0", b"SQLi", b"PAR1", b"%PDF")
_TIME_WORDS = {"start", "end", "begin", "stop", "from", "to", "time", "duration", "length", "onset"}
log = logging.getLogger(__name__)


def read_urls(path: Path, data: DataParams, *, announces: bool = True) -> Iterator[Clip]:
    """The clips of the list, as a stream; bad rows are named with their lines, all at once."""
    listing, guesses = _open(path)
    faults = Faults(path, hint="correct or delete these lines")
    test_share, val_share, num_open = _open_shares(listing, data)
    if num_open and test_share < data.test_share:
        guesses.append(
            f"{num_open} rows name no split: they are not for testing, as other rows are"
        )
    for guess in guesses if announces else ():
        log.warning("%s: %s", path, guess)
    marks = array("Q")
    for line, row in listing.rows(faults):
        try:
            clip = _clip(row, path.parent, data)
        except ValueError as error:
            faults.add(line, str(error))
            continue
        marks.append(mark_of(clip.clip_id))
        if not row.get("split"):
            clip = replace(clip, split=drawn_split(clip.url, test_share, val_share))
        yield clip
    if not marks:
        faults.check()
        raise DataError(f"{path} lists no clip", hint="a header line and one line a clip")
    _add_twins(listing, data, marks, faults)
    faults.check()


def _open_shares(listing: "_List", data: DataParams) -> tuple[float, float, int]:
    """The shares of test and val among the rows without a split, and how many these are.

    A split that other rows name is not drawn again.
    """
    if "split" not in listing.columns:
        return data.test_share, data.val_share, 0
    given: set[str | None] = set()
    num_open = 0
    for _, row in listing.rows(Faults(listing.path, hint="")):  # bad rows are named later
        given |= {split_word(row["split"])} if row["split"] else set()
        num_open += not row["split"]
    test_share = 0.0 if "test" in given else data.test_share
    return test_share, 0.0 if "val" in given else data.val_share, num_open


def _add_twins(listing: "_List", data: DataParams, marks: "array[int]", faults: Faults) -> None:
    """Name the lines that list a clip once more."""
    ordered = np.sort(np.asarray(marks))
    twins = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    first: dict[str, int] = {}
    known = Faults(listing.path, hint="")  # named before
    for line, row in listing.rows(known) if twins else ():
        try:
            name = _clip(row, listing.path.parent, data).clip_id
        except ValueError:
            continue
        if mark_of(name) in twins and first.setdefault(name, line) != line:
            faults.add(line, f"the same clip as in line {first[name]}")


@dataclass(frozen=True, slots=True)
class _List:
    """A csv file, the line of its column names, and what separates its fields."""

    path: Path
    line: int
    columns: list[str]
    delimiter: str
    encoding: str

    def rows(self, faults: Faults) -> Iterator[tuple[int, dict[str, str]]]:
        """The rows with their lines."""
        lines = (
            (line, text.removeprefix("\ufeff"))  # of a list that was appended to this one
            for line, text in text_lines(self.path, self.encoding)
            if line > self.line
        )
        rows = read_rows(lines, faults, delimiter=self.delimiter, begins_row=self._begins_row)
        for line, fields in rows:
            row = dict(zip(self.columns, (value.strip() for value in fields), strict=False))
            if len(fields) != len(self.columns):
                faults.add(line, f"{len(fields)} fields under {len(self.columns)} column names")
            elif self._names_columns(row):
                faults.add(line, "the column names once more")
            elif row.get(""):
                faults.add(line, f"'{row[''][:40]}' is in a column without a name")
            else:
                yield line, row

    def _names_columns(self, row: dict[str, str]) -> bool:
        """Whether it is the first line of another list, which was appended to this one."""
        return all(_known_name(value) == _known_name(name) for name, value in row.items())

    def _begins_row(self, line: str, opener: str) -> bool:
        """Whether a line is a row, and not the rest of the one that `opener` begins."""
        try:
            fields = split_row(line, self.delimiter)
        except ValueError:
            fields = line.split(self.delimiter)
        row = dict(zip(self.columns, fields, strict=False))
        found = [_LOOKS_LIKE[name].fullmatch(row[name]) for name in PLACES if row.get(name)]
        if not any(found) and len(fields) == len(self.columns) and "path" in row:
            first = dict(zip(self.columns, opener.split(self.delimiter), strict=False)).get(
                "path", ""
            )
            bare = '"' not in first and not _LOOKS_LIKE["path"].fullmatch(first)
            found = [re.fullmatch(r"\s*\S+\s*", row["path"]) if bare else None]
        return len(fields) >= min(len(self.columns), 2) and any(found)


def _open(path: Path) -> tuple[_List, list[str]]:
    """The list by its column names and by what separates them, and what was guessed of it."""
    encoding = _encoding_of_list(path)
    lines = text_lines(path, encoding)
    line, names = next((found for found in lines if found[1].strip()), (1, ""))
    forced = re.fullmatch(r"sep=(.)", names.strip(" \r\n"))  # as Excel writes it
    if forced:
        line, names = next((found for found in lines if found[1].strip()), (line, ""))
    delimiters = [forced[1]] if forced else list(DELIMITERS)
    delimiter = next((mark for mark in delimiters if _names_a_place(names, mark)), delimiters[0])
    columns = _columns(names, delimiter, path, line)
    if not any(columns):
        raise DataError(f"{path} is empty", hint="a header line and one line a clip")
    if not {*PLACES} & {*columns}:
        raise DataError(
            f"{path}:{line}: no column named {', '.join(PLACES)}", hint="name the columns in line 1"
        )
    twice = next((name for name in columns if name and columns.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}:{line}: two columns are called {twice}", hint="keep one of them")
    listing = _List(path, line, columns, delimiter, encoding)
    return listing, _guesses(listing)


def _encoding_of_list(path: Path) -> str:
    try:
        with path.open("rb") as file:
            head = file.read(4)
        if path.suffix.lower() in MEDIA or head.startswith(_NO_TEXT):
            raise DataError(
                f"{path} is not a csv file",
                hint="name a folder with media, or a list: a spreadsheet saved as csv, unpacked",
            )
        return encoding_of_file(path)
    except FileNotFoundError:
        raise DataError(f"{path} is missing", hint="set data.location to a csv file") from None


def _guesses(listing: _List) -> list[str]:
    """What was guessed of the list."""
    found = []
    if listing.encoding not in UNICODE:
        found.append(f"it is read as {listing.encoding}: save it as UTF-8 if words are wrong")
    timed = [name for name in listing.columns if name not in KNOWN and _speaks_of_time(name)]
    if timed:
        found.append(
            f"read as labels: {', '.join(timed)}; a span is read from the columns start and end, "
            "in seconds"
        )
    if listing.delimiter != ",":
        named = DELIMITERS.get(listing.delimiter, f"'{listing.delimiter}'")
        found.append(f"the fields are separated by {named}")
    return found


def _speaks_of_time(name: str) -> bool:
    return not _TIME_WORDS.isdisjoint(re.split(r"[\W\d_]+", name.lower()))


def _names_a_place(names: str, delimiter: str) -> bool:
    """Whether a column says where the clips are, with this delimiter."""
    try:
        return not {*PLACES}.isdisjoint(_columns(names, delimiter, Path(), 1))
    except DataError:  # names in quotes are a line of csv with the right delimiter only
        return False


def _columns(names: str, delimiter: str, path: Path, line: int) -> list[str]:
    try:
        fields = [name.strip() for name in split_row(names, delimiter)]
    except ValueError as error:
        raise DataError(f"{path}:{line}: {error}", hint="correct the column names") from None
    known = map(_known_name, fields)
    return [plain if plain in KNOWN else name for plain, name in zip(known, fields, strict=True)]


def _known_name(name: str) -> str:
    """A column as we call it, if it is one of ours: `Start Seconds` is start."""
    plain = re.sub(r"[\s_-]+", "_", name.lower())
    return ALIASES.get(plain, plain)


def _clip(row: dict[str, str], home: Path, data: DataParams) -> Clip:
    url = _url(row, home, data)
    start = number(row["start"], "start") if row.get("start") else 0.0
    end = number(row["end"], "end") if row.get("end") else None
    if start < 0 or (end is not None and end <= start):
        raise ValueError(f"the span from {start} to {end} is empty")
    split = split_word(row["split"]) if row.get("split") else "train"
    if split is None:
        raise ValueError(f"split '{row['split']}' is not one of {', '.join(SPLITS)}")
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
        labels={key: _label(value) for key, value in row.items() if key not in KNOWN and value},
        captions=(Caption(start, end if end is not None else start + 1.0, text),) if text else (),
        licence=row.get("licence") or None,
        senses=_senses(url, home),
    )


def _label(value: str) -> str:
    """A label, or several; nothing between two marks is no label."""
    parts = (part.strip() for part in composed(value).split(LABEL_SEPARATOR))
    return LABEL_SEPARATOR.join(filter(None, parts)) or value


def _senses(url: str, home: Path) -> dict[str, str]:
    """The files of other senses next to a file of the list."""
    name = url.removeprefix("folder:")
    if name == url or Path(name).is_absolute():
        return {}
    return {sense: f"folder:{own}" for sense, own in files_beside(home, name).items()}


def _url(row: dict[str, str], home: Path, data: DataParams) -> str:
    """An address; a path is a file next to the list, or else on a mirror where there are any."""
    if row.get("youtube_id"):
        if not re.fullmatch(r"[\w-]{1,64}", row["youtube_id"], re.ASCII):
            raise ValueError(f"'{row['youtube_id']}' is not a YouTube id")
        return f"https://www.youtube.com/watch?v={row['youtube_id']}"
    if row.get("url"):
        return _checked_address(row["url"])
    if row.get("path"):
        return _path_url(row["path"], home, data)
    raise ValueError(f"nothing in the columns {', '.join(PLACES)}")


def _checked_address(url: str) -> str:
    if re.search(r"\s", url):  # it may stand in a password, so it is not shown
        raise ValueError("the address has a space in it: write %20")
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError as error:  # what follows may be a part of a password
        raise ValueError(f"{str(error).partition(' as ')[0]}: '{url}'") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError(f"'{url}' is not an http or https address")
    return _one_address(url)


def _one_address(url: str) -> str:
    """An address of a YouTube video in one form: by any other, a video would be two."""
    found = _YOUTUBE.fullmatch(url)
    if found is None:
        return url
    fragment = urlsplit(url).fragment
    return f"https://www.youtube.com/watch?v={found[1]}" + (f"#{fragment}" if fragment else "")


def _path_url(name: str, home: Path, data: DataParams) -> str:
    """A file by its path, relative to the list's folder; outside it only if the settings allow."""
    if re.match(r"[a-z][a-z0-9+.-]+://", name, re.IGNORECASE):
        scheme = name.partition(":")[0].lower()
        instead = "write the path alone" if scheme == "file" else "call the column url"
        raise ValueError(f"'{name}' is an address, not a path: {instead}")
    if name.startswith("~/"):
        name = str(Path(name).expanduser())
    if (
        len(os.fsencode(name)) > LONGEST_PATH
        or len(os.fsencode(max(name.split("/"), key=len))) > 255
    ):
        raise ValueError(f"the path {name[:40]}... is longer than a disk allows")
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


def _name(url: str, start: float, end: float | None) -> str:
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", Path(urlsplit(url).path).stem).strip("-")[:40]
    short = hashlib.sha256(f"{url} {start} {end}".encode()).hexdigest()[:10]
    return f"{readable or 'clip'}-{short}"
