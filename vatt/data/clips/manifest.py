"""The list of clips: JSON lines or Parquet, one record a clip, read and written as a stream.

The list is never held in memory: writing takes 8 bytes a clip, reading none.
"""

import hashlib
import json
import os
import re
import reprlib
import resource
import subprocess
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vatt.errors import DataError
from vatt.files import atomic_write

SPLITS = ("train", "val", "test")
LABEL_SEPARATOR = "|"  # between the labels of a clip that has several of one name
# A clip id becomes a name inside a tar and a WebDataset key, where a dot or a slash would cut it.
CLIP_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,69}")
PLAIN_NAME = re.compile(r"[\w-][\w.-]*", re.ASCII)  # of a file, without a folder
LONGEST_TIME = 1e7  # seconds, 115 days: a larger number is a damaged one
LONGEST_LINE = 2**25  # bytes of a record: in memory it may take 35 times as much


@dataclass(frozen=True, slots=True)
class Caption:
    """Words and the span in which they are said, in seconds of the source."""

    start: float
    end: float
    text: str
    quality: float | None = None  # of 1, where preprocess.text_quality has judged it; shards only


@dataclass(frozen=True, slots=True)
class CaptionFaults:
    """What was wrong with the captions of a clip when they were read or prepared."""

    dropped: int = 0  # captions that could not be read, or were not good enough
    repaired: int = 0  # captions that were used after a correction
    encoding: str = ""  # of their file, where it had to be guessed

    def __bool__(self) -> bool:
        return bool(self.dropped or self.repaired or self.encoding)


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
    caption_faults: CaptionFaults = field(default_factory=CaptionFaults)
    senses: dict[str, str] = field(default_factory=dict)  # address of a sense's own file, by sense

    @property
    def media_name(self) -> str:
        """The file name of its media: the same for all clips of one url, safe on any disk."""
        return media_name(self.url)


def media_name(url: str) -> str:
    """The file name for the media of a url."""
    return hashlib.sha256(url.encode()).hexdigest()[:24]


def media_path(clip: Clip, *, media: Path, location: Path | None, absolute: bool = False) -> Path:
    """The path of the clip's media: a folder's own files stay in place, others are in `media`."""
    if not clip.url.startswith("folder:"):
        return media / clip.media_name
    return path_in_folder(clip.url, location, absolute=absolute)


def sense_path(url: str, *, media: Path, location: Path | None, absolute: bool = False) -> Path:
    """The path of a sense's own file: in the folder of the media, or in the demo's corpus."""
    if url.startswith("folder:"):
        return path_in_folder(url, location, absolute=absolute)
    name = url.removeprefix("demo:")
    if not PLAIN_NAME.fullmatch(name):
        raise DataError(f"{url} is not a file on this disk", hint="run `vattctl download` again")
    return media.with_name("corpus") / name


def path_in_folder(url: str, location: Path | None, *, absolute: bool = False) -> Path:
    """The file of a url `folder:...`, which must lie in the folder or, if allowed, be absolute.

    Links in the folder are its owner's and may lead out of it; the url's own path may not.
    """
    if location is None:
        raise DataError(
            f"{url} is a file of a folder, but data.location is not set",
            hint="run `vattctl ingest FOLDER` again",
        )
    if location.is_file():  # a list, with the files next to it
        location = location.parent
    name = Path(os.path.normpath(url.removeprefix("folder:")))
    if name.is_absolute() and absolute:
        return name
    if name.is_absolute() or name.parts[:1] == (os.pardir,) or "\0" in url:
        raise DataError(
            f"a clip points out of {location}: {url}",
            hint="run `vattctl ingest FOLDER` again; for absolute paths of your own list set "
            "data.allow_absolute_paths",
        )
    return location / name


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest on disk, read again whenever it is iterated over."""

    path: Path

    def __iter__(self) -> Iterator[Clip]:
        return read_manifest(self.path)


@dataclass(frozen=True, slots=True)
class Corpus:
    """What a manifest lists."""

    clips: int
    splits: dict[str, int]
    sources: dict[str, int]
    hash: str  # names exactly this set of clips, in any order
    captions: int
    captions_dropped: int
    captions_repaired: int
    encodings: dict[str, int]  # that were guessed, and the clips whose captions are in them


def write_manifest(path: Path, clips: Iterable[Clip]) -> int:
    """Write all clips or no file; returns their number. An id that appears twice is refused."""
    marks = array("Q")

    def records() -> Iterator[dict[str, Any]]:
        for clip in clips:
            marks.append(mark_of(clip.clip_id))
            yield _to_record(clip)

    is_parquet = path.suffix == ".parquet"
    with atomic_write(path) as temporary:
        if is_parquet:
            write_parquet(temporary, records())
        else:
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(_to_line(record) + "\n" for record in records())
        _refuse_twins(temporary, np.asarray(marks), is_parquet=is_parquet)
    return len(marks)


def read_manifest(path: Path) -> Iterator[Clip]:
    """The clips in the file's order; a bad line is named with its number."""
    if not path.exists():
        raise DataError(f"{path} is missing", hint="run `vattctl download`")
    for number, record in enumerate(_records(path, is_parquet=path.suffix == ".parquet"), start=1):
        if record is not None:
            yield _from_record(record, where=f"{path}:{number}")


def describe_manifest(path: Path) -> Corpus:
    """Count the clips and compute their hash, in one pass."""
    splits: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    encodings: Counter[str] = Counter()
    captions = dropped = repaired = 0
    name = SetName()
    for clip in read_manifest(path):
        splits[clip.split] += 1
        sources[clip.source] += 1
        captions += len(clip.captions)
        dropped += clip.caption_faults.dropped
        repaired += clip.caption_faults.repaired
        encodings[clip.caption_faults.encoding] += 1
        name.add(clip)
    encodings.pop("", None)
    return Corpus(
        splits.total(), dict(splits), dict(sources.most_common()), name.hexdigest(),
        captions, dropped, repaired, dict(encodings.most_common()),
    )  # fmt: skip


class SetName:
    """The sha256 that names a set of clips; the order in which they are added does not count."""

    def __init__(self) -> None:
        self._total = 0

    def add(self, clip: Clip) -> None:
        """Add a clip to the set."""
        line = _to_line(_to_record(clip))
        self._total += int.from_bytes(hashlib.sha256(line.encode()).digest(), "big")

    def hexdigest(self) -> str:
        """The name."""
        return hashlib.sha256((self._total % 2**256).to_bytes(32, "big")).hexdigest()


def manifest_hash(path: Path) -> str:
    """The sha256 that names the set of clips."""
    return describe_manifest(path).hash


def drawn_split(url: str, test_share: float, val_share: float) -> str:
    """The split of a clip whose list names none: by its video, so that its clips stay together."""
    place = int(hashlib.sha256(url.encode()).hexdigest()[:8], 16) / 16**8
    if place < test_share:
        return "test"
    return "val" if place < test_share + val_share else "train"


def mark_of(clip_id: str) -> int:
    """64 bits that represent an id where many are held at once."""
    return int.from_bytes(hashlib.blake2b(clip_id.encode(), digest_size=8).digest(), "big")


def _refuse_twins(path: Path, marks: np.ndarray, *, is_parquet: bool) -> None:
    """Look for equal marks first, then compare the ids that have them."""
    ordered = np.sort(marks)
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    seen: set[str] = set()
    for record in _records(path, is_parquet=is_parquet) if suspects else ():
        assert record is not None  # we wrote it
        name = record["clip_id"]
        if name in seen:
            raise DataError(f"two clips are called {name}", hint="give each its own id")
        if mark_of(name) in suspects:
            seen.add(name)


def _records(path: Path, *, is_parquet: bool) -> Iterator[Any]:
    """The record of each line (or row), not yet checked; None for an empty line."""
    if is_parquet:
        yield from read_parquet(path)
        return
    with path.open("rb") as file:
        lines = iter(lambda: file.readline(LONGEST_LINE + 1), b"")
        for number, line in enumerate(lines, start=1):
            try:
                yield _parsed(line)
            except (ValueError, RecursionError) as error:
                raise _no_clip(f"{path}:{number}", _reason(error)) from None


def _parsed(line: bytes) -> Any:
    if len(line) > LONGEST_LINE:
        raise ValueError(f"longer than {LONGEST_LINE:,} bytes")
    return json.loads(line.decode(), object_pairs_hook=_once) if line.strip() else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; two values under one name are an error."""
    record = dict(pairs)
    if len(record) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {reprlib.repr(name)} appears twice")
    return record


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "brackets are nested too deeply"
    if "int_max_str_digits" in str(error):
        return "a number has thousands of digits"
    return str(error)


def _to_record(clip: Clip) -> dict[str, Any]:
    record = {
        "clip_id": clip.clip_id,
        "source": clip.source,
        "url": clip.url,
        "start": clip.start,
        "end": clip.end,
        "split": clip.split,
        "labels": {_writable(name): _writable(value) for name, value in clip.labels.items()},
        "captions": [[c.start, c.end, _writable(c.text)] for c in clip.captions],
        "licence": clip.licence,
    }
    if clip.caption_faults:  # rare; without it, hashes of older manifests stay the same
        record["caption_faults"] = asdict(clip.caption_faults)
    if clip.senses:  # the same
        record["senses"] = {name: _writable(url) for name, url in clip.senses.items()}
    return record


def _writable(text: str) -> str:
    """Half of a surrogate pair, as a JSON escape may give, is not a character and has no bytes."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _to_line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, sort_keys=True, allow_nan=False)


def _from_record(record: Any, *, where: str) -> Clip:
    try:
        clip = Clip(
            clip_id=_text(record["clip_id"]),
            source=sys.intern(_text(record["source"])),
            url=_text(record["url"]),
            start=_seconds(record["start"]),
            end=None if record["end"] is None else _seconds(record["end"]),
            split=sys.intern(_text(record["split"])),
            labels={
                sys.intern(_text(name)): _text(value) for name, value in record["labels"].items()
            },
            captions=tuple(
                Caption(_seconds(start), _seconds(end), _text(text))
                for start, end, text in record["captions"]
            ),
            licence=None if record["licence"] is None else _text(record["licence"]),
            caption_faults=_faults(record.get("caption_faults")),
            senses={
                sys.intern(_text(name)): _text(url)
                for name, url in (record.get("senses") or {}).items()
            },
        )
        _check(clip)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise _no_clip(where, reason) from None
    return clip


def _no_clip(where: str, reason: str) -> DataError:
    return DataError(f"{where}: not a clip: {reason}", hint="run `vattctl download`")


def _check(clip: Clip) -> None:
    if not CLIP_ID.fullmatch(clip.clip_id):
        raise ValueError(f"clip_id {reprlib.repr(clip.clip_id)} may hold letters, digits, - and _")
    if clip.split not in SPLITS:
        raise ValueError(f"split {reprlib.repr(clip.split)} is not one of {', '.join(SPLITS)}")
    if clip.start < 0 or (clip.end is not None and clip.end <= clip.start):
        raise ValueError(f"span {clip.start} to {clip.end} is empty")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{reprlib.repr(value)} is not a text")
    if not value.isascii():
        value.encode()  # ValueError for half a surrogate pair, as a JSON escape may give
    return value


def _seconds(value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= LONGEST_TIME:  # nor is NaN
        raise TypeError(f"{reprlib.repr(value)} is not a time in seconds")
    return float(value)


def _faults(record: Any) -> CaptionFaults:
    if record is None:
        return CaptionFaults()
    dropped, repaired = record["dropped"], record["repaired"]
    if type(dropped) is not int or type(repaired) is not int or min(dropped, repaired) < 0:
        raise TypeError(f"{reprlib.repr(record)} is not a count of captions")
    return CaptionFaults(dropped, repaired, sys.intern(_text(record["encoding"])))


ROWS = 1024  # of a row group; captions make a row some kilobytes
BATCH = 256
LARGEST_GROUP = 2**29  # bytes, unpacked, as the file says
LARGEST_BATCH = 2**27  # bytes; as Python's objects it takes ten times as much
MEMORY = 2**30  # bytes that the unpacking of a Parquet file may take
_DAMAGED = 3  # exit code


def write_parquet(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write the records as a stream, one row group at a time."""
    import pyarrow  # slow to import, and seldom needed
    import pyarrow.parquet

    schema = _schema()
    waiting = iter(records)
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while rows := list(islice(waiting, ROWS)):
            for row in rows:
                row["captions"] = [dict(zip(_CAPTION, c, strict=True)) for c in row["captions"]]
                row["labels"] = sorted(row["labels"].items())
                row["senses"] = sorted(row.get("senses", {}).items())
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The records in the file's order; other columns are passed over."""
    number = 0
    try:
        facts = path.stat()
        _try_apart(path, facts.st_size, facts.st_mtime_ns)
        for batch in _batches(path):
            for row in batch.to_pylist():
                number += 1
                row["captions"] = [tuple(c[name] for name in _CAPTION) for c in row["captions"]]
                row["labels"] = _once(row["labels"])
                row["senses"] = _once(row.get("senses") or [])
                yield row
    except _faults_of_parquet() as error:
        reason = str(error)[:200]
        problem = f"is damaged after row {number}" if number else "is not a Parquet manifest"
        raise DataError(f"{path} {problem}: {reason}", hint="run `vattctl download`") from None


def _batches(path: Path) -> Iterator[Any]:
    """The rows of a file, some at a time."""
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, **_BOUNDS) as file:
        names = set(file.schema_arrow.names)
        missing = set(_schema().names) - names - {_FAULTS, _SENSES}
        if missing:
            raise DataError(
                f"{path} has no column {', '.join(sorted(missing))}",
                hint="run `vattctl download`",
            )
        _check_sizes(file.metadata)
        columns = [name for name in _schema().names if name in names]
        for batch in file.iter_batches(BATCH, columns=columns, use_threads=False):
            if batch.nbytes > LARGEST_BATCH:
                raise ValueError(f"{batch.num_rows} rows unpack to {batch.nbytes:,} bytes")
            yield batch


def _faults_of_parquet() -> tuple[type[Exception], ...]:
    """What reading a damaged file may raise."""
    import pyarrow

    return (
        pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError,
        OverflowError, MemoryError,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _try_apart(path: Path, size: int, changed: int) -> None:
    """Unpack a file in a process that may take little memory: its pages may lie about their size.

    A file of the same size and time is not tried again.
    """
    found = {"PYTHONPATH": os.pathsep.join(sys.path), "ARROW_DEFAULT_MEMORY_POOL": "system"}
    env = {**os.environ, **found}
    command = [sys.executable, "-m", "vatt.data.clips.manifest", str(path)]
    done = subprocess.run(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
    )
    said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    if done.returncode == _DAMAGED:
        raise ValueError(said)
    if done.returncode:
        raise ValueError(f"it does not unpack in {MEMORY / 2**30:g} GiB of memory")


def main(path: str) -> None:
    """Unpack a Parquet file under a limit of memory; ends with _DAMAGED if that is impossible."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    try:
        for _ in _batches(Path(path)):
            pass
    except _faults_of_parquet() as error:
        sys.stderr.write(" ".join(str(error).split())[:300] or type(error).__name__)
        raise SystemExit(_DAMAGED) from None
    except DataError:
        pass  # the reader itself will say it


def _check_sizes(metadata: Any) -> None:
    """A file of a few kilobytes may unpack to more than the memory holds."""
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).total_byte_size
        if not 0 <= size <= LARGEST_GROUP:
            raise ValueError(f"row group {group} unpacks to {size:,} bytes")


_CAPTION = ("start", "end", "text")
_FAULTS, _SENSES = "caption_faults", "senses"  # columns that older files lack
_BOUNDS = {"thrift_string_size_limit": 2**26, "thrift_container_size_limit": 2**20}


def _schema() -> Any:
    import pyarrow

    text, seconds = pyarrow.string(), pyarrow.float64()
    caption = pyarrow.struct([("start", seconds), ("end", seconds), ("text", text)])
    count = pyarrow.int64()
    faults = pyarrow.struct([("dropped", count), ("repaired", count), ("encoding", text)])
    return pyarrow.schema(
        [
            ("clip_id", text), ("source", text), ("url", text), ("start", seconds),
            ("end", seconds), ("split", text), ("labels", pyarrow.map_(text, text)),
            ("captions", pyarrow.list_(caption)), ("licence", text), (_FAULTS, faults),
            (_SENSES, pyarrow.map_(text, text)),
        ]
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
