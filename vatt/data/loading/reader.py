"""Shards -> decoded samples: the facts, frames and sound of a sample by its row.

Shards that are not beside their index are fetched by range and kept in a cache. T H W C: frames,
height, width, channels; S samples.
"""

import fcntl
import hashlib
import json
import logging
import os
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from vatt.data.clips.manifest import Caption
from vatt.data.clips.media import BrokenMediaError
from vatt.data.clips.samples import INDEX, Extent, IndexRow, read_index, tar_bytes
from vatt.data.clips.storage import (
    WAV_HEADER_BYTES,
    Box,
    FrameStream,
    Storage,
    decode_frames,
    decode_jpegs,
    decode_sound,
    whole,
)
from vatt.errors import DataError, MachineError, SettingsError
from vatt.files import atomic_write

OPEN_SHARDS = 32
WINDOW = 2048  # rows

PROTOCOLS = ("s3", "gs", "gcs", "http", "https", "memory", "file")
RANGE_BYTES = 16 * 2**20  # of one request: what a broken connection costs at most
ATTEMPTS = 6
PAUSE_SECONDS = 0.5  # before the second attempt; doubled each time

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShardCache:
    """The shards of a folder at `url`, as far as they fit `limit` bytes of a local one."""

    url: str
    folder: Path
    limit: int  # finished shards; those under way come on top

    @classmethod
    def of(cls, url: str, index: Path, *, folder: Path, gigabytes: float) -> Self:
        """The cache of the shards of one index: those of another may have the same names."""
        with index.open("rb") as file:
            key = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return cls(url, folder / key, int(gigabytes * 1e9))

    def open(self, shard: str) -> int:
        """A handle of a shard, fetched when it is not there."""
        path = self.folder / shard
        while True:
            with suppress(FileNotFoundError):
                handle = os.open(path, os.O_RDONLY)
                now = time.time_ns()
                os.utime(handle, ns=(now, now))  # the least recently opened shard goes first
                return handle
            self._fetch(shard, path)

    def fetch(self, shard: str) -> None:
        """Have a shard here before it is needed."""
        os.close(self.open(shard))

    def _fetch(self, shard: str, path: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with _waiting_lock(self.folder / f".{shard}.lock"):
            if path.exists():
                return  # another process was faster
            for left in self.folder.glob(f".{shard}.*.tmp"):  # by a process that was killed
                left.unlink()
            with atomic_write(path) as temporary:
                download(f"{self.url.rstrip('/')}/{shard}", temporary)
                self._make_room(temporary.stat().st_size)

    def _make_room(self, needed: int) -> None:
        with _waiting_lock(self.folder / ".room.lock"):
            there = [(path.stat(), path) for path in self.folder.glob("*.tar")]
            there.sort(key=lambda entry: entry[0].st_mtime_ns)
            total = needed + sum(stat.st_size for stat, _ in there)
            for stat, path in there:
                if total <= self.limit:
                    return
                path.unlink()  # who has it open goes on reading it
                total -= stat.st_size


def download(url: str, target: Path) -> None:
    """Copy one remote file, range by range, each tried again when the connection fails."""
    filesystem, remote = _open_url(url)
    size = int(_retry(url, lambda: filesystem.info(remote)["size"] or 0))
    log.info("fetching %s, %.1f MB", url, size / 1e6)
    with target.open("wb") as out:
        while out.tell() < size:
            first, last = out.tell(), min(out.tell() + RANGE_BYTES, size)
            part = _retry(url, lambda: _range(filesystem, remote, first, last))  # noqa: B023
            if len(part) == size:  # all of it: the server knows no ranges
                out.seek(0)
            out.write(part)


def _range(filesystem: Any, remote: str, first: int, last: int) -> bytes:
    part = filesystem.cat_file(remote, start=first, end=last)
    if len(part) < last - first:
        raise OSError("the connection ended early")
    return part


def _open_url(url: str) -> tuple[Any, str]:
    import fsspec  # slow to import, and seldom needed

    protocol = url.partition("://")[0]
    if protocol not in PROTOCOLS or "::" in url:
        raise SettingsError(
            f"machine.shards_url: {protocol}:// is not fetched",
            hint=f"allowed are {', '.join(PROTOCOLS[:-2])}",
        )
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = {"s3": "s3fs"}.get(protocol, "gcsfs")
        raise MachineError(f"{url}: {error}", hint=f"pip install {package}") from None


def _retry(url: str, ask: Callable[[], T]) -> T:
    from aiohttp import ClientError

    for attempt in range(ATTEMPTS):
        try:
            return ask()
        except (OSError, ClientError, TimeoutError) as error:
            if _is_final(error):
                raise DataError(
                    f"{url} is not there: {error.__cause__ or error!r}",
                    hint="check machine.shards_url, and that the index belongs to it",
                ) from None
            if attempt == ATTEMPTS - 1:
                raise MachineError(
                    f"{url} cannot be fetched: {error.__cause__ or error!r}",
                    hint="run the same command again to continue",
                ) from None
            # Many processes meet the same trouble: they should not come back all at once.
            time.sleep(PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def _is_final(error: BaseException) -> bool:
    """Whether asking again is useless; fsspec calls every failed first request 'not found'."""
    status = getattr(error.__cause__ or error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, FileNotFoundError | PermissionError) and error.__cause__ is None


@contextmanager
def _waiting_lock(path: Path) -> Iterator[None]:
    with path.open("a", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


HANDLES = 48  # more than the shards that are read at a time


class BrokenSampleError(DataError):
    """A sample whose bytes are not what the index promises."""


@dataclass(frozen=True)
class ShardIndex:
    """The samples of a split (or of some of its clips), in the order of shards."""

    folder: Path
    storage: Storage
    rows: list[IndexRow]
    remote: ShardCache | None = None  # where shards come from that do not lie in the folder

    @property
    def fps(self) -> int:
        """Frames a second, as stored."""
        return self.storage.fps

    @property
    def audio_hz(self) -> int:
        """Samples a second, as stored."""
        return self.storage.audio_hz

    @classmethod
    def load(cls, folder: Path, *, split: str, keys: Collection[str] | None = None) -> "ShardIndex":
        """Read the index; with `keys` only those samples, all of which must be there."""
        storage, rows = read_index(folder / INDEX)
        rows = [row for row in rows if row.split == split]
        if keys is not None:
            wanted = set(keys)
            rows = [row for row in rows if row.key in wanted]
            missing = wanted.difference(row.key for row in rows)
            if missing:
                raise DataError(
                    f"{folder} has no sample {min(missing)} in split '{split}'",
                    hint="run `vattctl repro`",
                )
        if not rows:
            raise DataError(
                f"no sample of split '{split}' in {folder}", hint="run `vattctl preprocess`"
            )
        return cls(folder, storage, rows)


@dataclass(frozen=True, slots=True)
class SampleFacts:
    """What a sample says of itself beside picture and sound; caption times count from its start."""

    labels: dict[str, str]
    captions: tuple[Caption, ...]


class ShardReader:
    """Reads and decodes samples by their rows; keeps a few shards open."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._open: OrderedDict[str, int] = OrderedDict()
        self._stopped = False
        self._record: tuple[str, dict[str, Any]] = ("", {})  # the last one read, and whose it is

    def facts(self, row: IndexRow) -> SampleFacts:
        """Labels and captions."""
        record = self._record_of(row)
        try:
            captions = tuple(
                Caption(float(start), float(end), str(text))
                for start, end, text in record["captions"]
            )
            return SampleFacts(dict(record["labels"]), captions)
        except (ValueError, TypeError, KeyError) as error:
            raise self._broken(row, f"its JSON is not as it should be: {error}") from None

    def origin(self, row: IndexRow) -> tuple[str, float, float]:
        """Where a sample was cut from: its source's address, from and to, in seconds."""
        record = self._record_of(row)
        try:
            return str(record["url"]), float(record["start"]), float(record["end"])
        except (ValueError, TypeError, KeyError) as error:
            raise self._broken(row, f"its JSON is not as it should be: {error}") from None

    def frames(self, row: IndexRow, indices: Sequence[int], box: Box | None = None) -> np.ndarray:
        """The frames at `indices`, in any order, or `box` of them: (T, H, W, C)."""
        return whole(self.each_frame(row, indices, box), len(indices))

    def each_frame(
        self, row: IndexRow, indices: Sequence[int], box: Box | None = None
    ) -> FrameStream:
        """The same one by one, as they are decoded, each with its place in `indices`."""
        assert row.video is not None
        try:
            if self.index.storage.video == "jpeg":
                pictures = self._pictures(row, indices)
                yield from decode_jpegs(pictures, height=row.height, width=row.width, box=box)
            else:
                data = self._read(row, row.video)
                yield from decode_frames(data, indices, fps=self.index.fps, box=box)
        except BrokenMediaError as error:
            raise self._broken(row, str(error)) from None

    def _pictures(self, row: IndexRow, indices: Sequence[int]) -> list[memoryview]:
        """The JPEGs at `indices`, by one read: they stand in the tar one after the other."""
        assert row.video is not None
        sizes = self._record_of(row).get("frame_bytes", ())
        if len(sizes) <= max(indices):
            raise BrokenMediaError(f"it has {len(sizes)} frames")
        begins = [0]
        for size in sizes[:-1]:
            begins.append(begins[-1] + tar_bytes(size))
        first, last = min(indices), max(indices)
        span = (row.video[0] + begins[first], begins[last] + sizes[last] - begins[first])
        data = memoryview(self._read(row, span))
        begins = [begin - begins[first] for begin in begins]
        return [data[begins[index] : begins[index] + sizes[index]] for index in indices]

    def audio(self, row: IndexRow, first: int, last: int) -> np.ndarray:
        """Samples first to last (exclusive), as far as there are: (S,)."""
        assert row.audio is not None
        offset, _ = row.audio
        first = max(first, 0)
        last = max(min(last, row.num_samples), first)
        if self.index.storage.audio == "pcm":
            span = (offset + WAV_HEADER_BYTES + 2 * first, 2 * (last - first))
            return np.frombuffer(self._read(row, span), dtype="<i2")
        try:
            return decode_sound(self._read(row, row.audio), first, last, self.index.storage)
        except BrokenMediaError as error:
            raise self._broken(row, str(error)) from None

    def announce(self, rows: Iterable[IndexRow]) -> None:
        """Have the disk read samples that are needed soon, in the order in which they lie."""
        for shard, first, size in extents(rows):
            if self._stopped:
                return
            handle = self._handle(shard)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, first, size, os.POSIX_FADV_WILLNEED)

    def stop(self) -> None:
        """End an announcement that goes on in another thread."""
        self._stopped = True

    def _record_of(self, row: IndexRow) -> dict[str, Any]:
        if self._record[0] != row.key:
            try:
                record = json.loads(self._read(row, row.json))
            except (ValueError, RecursionError) as error:
                raise self._broken(row, f"its JSON cannot be read: {error}") from None
            if not isinstance(record, dict):
                raise self._broken(row, "its JSON is no object")
            self._record = (row.key, record)
        return self._record[1]

    def _broken(self, row: IndexRow, why: str) -> BrokenSampleError:
        return BrokenSampleError(
            f"sample {row.key} of {self.index.folder / row.shard} is broken: {why}",
            hint="delete that shard and run `vattctl preprocess`",
        )

    def _read(self, row: IndexRow, extent: Extent) -> bytes:
        offset, size = extent
        data = os.pread(self._handle(row.shard), size, offset)
        if len(data) != size:
            raise self._broken(row, "the shard is cut off")
        return data

    def _handle(self, shard: str) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        path = self.index.folder / shard
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            if self.index.remote is None:
                raise DataError(f"{path} is missing", hint="run `vattctl preprocess`") from None
            handle = self.index.remote.open(shard)
        self._open[shard] = handle
        if len(self._open) > HANDLES:
            os.close(self._open.popitem(last=False)[1])
        return handle

    def close(self) -> None:
        """Close the shards."""
        while self._open:
            os.close(self._open.popitem()[1])


def place(row: IndexRow) -> tuple[str, int]:
    """Where a sample lies: rows in this order are read in sequence."""
    return row.shard, row.json[0]


def extents(rows: Iterable[IndexRow]) -> list[tuple[str, int, int]]:
    """Shard, offset and size of what samples take up; neighbours are one extent."""
    found: list[tuple[str, int, int]] = []
    for row in sorted(rows, key=place):
        members = [extent for extent in (row.json, row.video, row.audio) if extent is not None]
        first = min(offset for offset, _ in members)
        end = max(offset + tar_bytes(size) for offset, size in members)
        if found and found[-1][0] == row.shard and first <= sum(found[-1][1:]):
            first, end = found[-1][1], max(end, sum(found[-1][1:]))
            found.pop()
        found.append((row.shard, first, end - first))
    return found


@dataclass(frozen=True, slots=True)
class DecodedSample:
    """A whole sample in memory; a modality that nobody asked for, or that is not there, is None."""

    video: np.ndarray | None  # (T, H, W, C) uint8
    audio: np.ndarray | None  # (S,) int16
    facts: SampleFacts


def decode_clips(
    reader: ShardReader, rows: Sequence[IndexRow], with_video: bool, with_audio: bool
) -> list[DecodedSample | BrokenSampleError]:
    """Decode whole samples; a broken one gives its error."""

    def decode(row: IndexRow) -> DecodedSample | BrokenSampleError:
        try:
            return DecodedSample(
                reader.frames(row, range(row.num_frames)) if with_video and row.video else None,
                reader.audio(row, 0, row.num_samples) if with_audio and row.audio else None,
                reader.facts(row),
            )
        except BrokenSampleError as error:
            return error

    return [decode(row) for row in rows]
