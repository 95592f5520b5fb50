"""Shards -> decoded samples: the captions, frames and sound of a sample by its row in the index.

Shards that are not next to their index are fetched by range and kept in a cache. Damage in a stored
sample is a BrokenSampleError, whatever the decoder raises. T H W C: frames, height, width,
channels; S audio samples.
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
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, Self, TypeVar

import av
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
    wav_header,
    whole,
)
from vatt.errors import DataError, MachineError, SettingsError
from vatt.files import atomic_write
from vatt.senses import SENSES

OPEN_SHARDS = 32
WINDOW = 2048  # rows
HANDLES = 48  # more than the shards that are read at a time

PROTOCOLS = ("s3", "gs", "gcs", "http", "https", "memory", "file")
RANGE_BYTES = 16 * 2**20  # of one request: a broken connection costs no more than this
ATTEMPTS = 6
PAUSE_SECONDS = 0.5  # before the second attempt; doubled each time

# What decoding damaged bytes may raise, in addition to our own BrokenMediaError.
DAMAGE = (
    BrokenMediaError,
    av.FFmpegError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    EOFError,
)

T = TypeVar("T")
log = logging.getLogger(__name__)


class BrokenSampleError(DataError):
    """A sample whose bytes are not what the index promises."""


@dataclass(frozen=True)
class ShardIndex:
    """The samples of a split (or of some of its clips), in the order of shards."""

    folder: Path
    storage: Storage
    rows: list[IndexRow]
    remote: "ShardCache | None" = None  # where shards come from that are not in the folder

    @classmethod
    def load(cls, folder: Path, *, split: str, keys: Collection[str] | None = None) -> Self:
        """Read the index; with `keys` only those samples, all of which must exist."""
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


class ShardReader:
    """Reads and decodes samples by their rows; keeps a few shards open."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._open: OrderedDict[str, int] = OrderedDict()
        self._stopped = False
        self._record: tuple[str, dict[str, Any]] = ("", {})  # the last one read, and its key

    def captions(self, row: IndexRow) -> tuple[Caption, ...]:
        """The captions; their times count from the start of the sample."""
        with self._broken_by_damage(row, "its captions cannot be read"):
            return tuple(_caption(*entry) for entry in self._record_of(row)["captions"])

    def origin(self, row: IndexRow) -> tuple[str, float, float]:
        """Where a sample was cut from: its source's address, start and end in seconds."""
        with self._broken_by_damage(row, "its origin cannot be read"):
            record = self._record_of(row)
            return str(record["url"]), float(record["start"]), float(record["end"])

    def frames(self, row: IndexRow, indices: Sequence[int], box: Box | None = None) -> np.ndarray:
        """The frames at `indices`, in any order, or `box` of them: (T, H, W, C)."""
        return whole(self.each_frame(row, indices, box), len(indices))

    def each_frame(
        self, row: IndexRow, indices: Sequence[int], box: Box | None = None
    ) -> FrameStream:
        """The same one by one, as they are decoded, each with its place in `indices`."""
        assert row.video is not None
        height, width = row.height, row.width
        with self._broken_by_damage(row, "its frames cannot be decoded"):
            if self.index.storage.video == "jpeg":
                jpegs = self._jpegs(row, indices)
                yield from decode_jpegs(jpegs, height=height, width=width, box=box)
            else:
                data, fps = self._read(row, row.video), self.index.storage.fps
                yield from decode_frames(data, indices, fps=fps, size=(height, width), box=box)

    def _jpegs(self, row: IndexRow, indices: Sequence[int]) -> list[memoryview]:
        """The JPEGs at `indices`, by one read: they lie in the tar one after the other."""
        assert row.video is not None
        sizes = self._record_of(row)["frame_bytes"]
        if len(sizes) <= max(indices):
            raise BrokenMediaError(f"it has {len(sizes)} frames")
        begins = [0]
        for size in sizes:
            begins.append(begins[-1] + tar_bytes(size))
        first, last = min(indices), max(indices)
        length = begins[last] + sizes[last] - begins[first]
        if min(sizes) <= 0 or begins[-2] + sizes[-1] != row.video[1]:
            raise BrokenMediaError("the sizes of its frames do not add up")
        data = memoryview(self._read(row, (row.video[0] + begins[first], length)))
        begins = [begin - begins[first] for begin in begins]
        return [data[begins[index] : begins[index] + sizes[index]] for index in indices]

    def audio(self, row: IndexRow, first: int, last: int) -> np.ndarray:
        """Samples first to last (exclusive), as far as there are any: (S,)."""
        assert row.audio is not None
        first = max(first, 0)
        last = max(min(last, row.num_samples), first)
        storage = self.index.storage
        with self._broken_by_damage(row, "its sound cannot be decoded"):
            if storage.audio != "pcm":
                return decode_sound(self._read(row, row.audio), first, last, storage)
            offset, size = row.audio
            header = self._read(row, (offset, WAV_HEADER_BYTES))
            if header != wav_header(row.num_samples, hz=storage.audio_hz):
                raise BrokenMediaError("its WAV header does not fit the index")
            if size != WAV_HEADER_BYTES + 2 * row.num_samples:
                raise BrokenMediaError(f"{size} bytes cannot hold {row.num_samples} samples")
            span = (offset + WAV_HEADER_BYTES + 2 * first, 2 * (last - first))
            return np.frombuffer(self._read(row, span), dtype="<i2")

    def signal(self, row: IndexRow, name: str) -> np.ndarray:
        """All that is stored of a sense with a member of its own."""
        offset, size, count = row.senses[name]
        with self._broken_by_damage(row, f"its {name} cannot be decoded"):
            return SENSES[name].decode(self._read(row, (offset, size)), count)

    def announce(self, rows: Iterable[IndexRow]) -> None:
        """Have the disk read samples that are needed soon, in the order in which they lie."""
        for shard, first, size in extents(rows):
            if self._stopped:
                return
            handle = self._handle(shard)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, first, size, os.POSIX_FADV_WILLNEED)

    def stop(self) -> None:
        """End an announcement that is running in another thread."""
        self._stopped = True

    def close(self) -> None:
        """Close the shards."""
        while self._open:
            os.close(self._open.popitem()[1])

    @contextmanager
    def _broken_by_damage(self, row: IndexRow, problem: str) -> Iterator[None]:
        """Turn whatever a decoder raises into the one error that a broken sample is."""
        try:
            yield
        except BrokenMediaError as error:
            raise self._broken(row, str(error)) from None
        except DAMAGE as error:
            raise self._broken(row, f"{problem}: {type(error).__name__}: {error}") from error

    def _broken(self, row: IndexRow, why: str) -> BrokenSampleError:
        return BrokenSampleError(
            f"sample {row.key} of {self.index.folder / row.shard} is broken: {why}",
            hint="delete that shard and run `vattctl preprocess`",
        )

    def _record_of(self, row: IndexRow) -> dict[str, Any]:
        if self._record[0] != row.key:
            record = json.loads(self._read(row, row.json))
            if not isinstance(record, dict):
                raise BrokenMediaError("its JSON is not an object")
            self._record = (row.key, record)
        return self._record[1]

    def _read(self, row: IndexRow, extent: Extent) -> bytes:
        offset, size = extent
        handle = self._handle(row.shard)
        try:
            # Asked first: reading reserves the memory for all that the index claims.
            there = os.fstat(handle).st_size - offset >= size
            data = os.pread(handle, size, offset) if there else b""
        except OSError as error:
            raise BrokenMediaError(f"the shard cannot be read: {error.strerror}") from None
        if len(data) != size:
            raise BrokenMediaError("the shard is cut off")
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
        except OSError as error:
            raise DataError(
                f"{path} cannot be opened: {error.strerror}", hint="check its permissions"
            ) from None
        self._open[shard] = handle
        if len(self._open) > HANDLES:
            os.close(self._open.popitem(last=False)[1])
        return handle


def _caption(start: float, end: float, text: str, quality: float | None = None) -> Caption:
    if not (isinstance(text, str) and isfinite(start) and isfinite(end)):
        raise BrokenMediaError("one of its captions has no text or no time")
    if quality is not None and not 0 <= quality <= 1:
        raise BrokenMediaError("the score of one of its captions is not between 0 and 1")
    return Caption(float(start), float(end), text, quality)


def place(row: IndexRow) -> tuple[str, int]:
    """Where a sample lies; rows sorted by it are read from front to back."""
    return row.shard, row.json[0]


def extents(rows: Iterable[IndexRow]) -> list[tuple[str, int, int]]:
    """Shard, offset and size of the bytes of samples; neighbours are joined."""
    found: list[tuple[str, int, int]] = []
    for row in sorted(rows, key=place):
        members = row.members()
        first = min(offset for offset, _ in members)
        end = max(offset + tar_bytes(size) for offset, size in members)
        if found and found[-1][0] == row.shard and first <= sum(found[-1][1:]):
            first, end = found[-1][1], max(end, sum(found[-1][1:]))
            found.pop()
        found.append((row.shard, first, end - first))
    return found


@dataclass(frozen=True, slots=True)
class DecodedSample:
    """A whole sample in memory; a part that is absent or not wanted is None."""

    video: np.ndarray | None  # (T, H, W, C) uint8
    audio: np.ndarray | None  # (S,) int16
    captions: tuple[Caption, ...] | None
    signals: dict[str, np.ndarray]  # of senses with members of their own


def decode_samples(
    reader: ShardReader, rows: Iterable[IndexRow], wanted: Collection[str]
) -> list[DecodedSample | None]:
    """Decode the senses of whole samples that are wanted; a broken sample is None."""

    def decode(row: IndexRow) -> DecodedSample | None:
        try:
            return DecodedSample(
                reader.frames(row, range(row.num_frames))
                if "video" in wanted and row.video
                else None,
                reader.audio(row, 0, row.num_samples) if "audio" in wanted and row.audio else None,
                reader.captions(row) if "text" in wanted else None,
                {name: reader.signal(row, name) for name in row.senses if name in wanted},
            )
        except BrokenSampleError:
            return None

    return [decode(row) for row in rows]


@dataclass(frozen=True, slots=True)
class ShardCache:
    """The shards of a folder at `url`; a local folder keeps up to `limit` bytes of them."""

    url: str
    folder: Path
    limit: int  # of finished shards; those being fetched come on top

    @classmethod
    def of(cls, url: str, index: Path, *, folder: Path, gigabytes: float) -> Self:
        """The cache of one index; another index may use the same names of shards."""
        with index.open("rb") as file:
            key = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return cls(url, folder / key, int(gigabytes * 1e9))

    def open(self, shard: str) -> int:
        """A handle of a shard, which is fetched first where needed."""
        path = self.folder / shard
        while True:
            with suppress(FileNotFoundError):
                handle = os.open(path, os.O_RDONLY)
                now = time.time_ns()
                os.utime(handle, ns=(now, now))  # the least recently opened shard goes first
                return handle
            self._fetch(shard, path)

    def fetch(self, shard: str) -> None:
        """Fetch a shard before it is needed."""
        os.close(self.open(shard))

    def _fetch(self, shard: str, path: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with _waiting_lock(self.folder / f".{shard}.lock"):
            if path.exists():
                return  # another process was faster
            for abandoned in self.folder.glob(
                f".{shard}.*.tmp"
            ):  # left by a process that was killed
                abandoned.unlink()
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
                path.unlink()  # a process that has it open can still read it
                total -= stat.st_size


def download(url: str, target: Path) -> None:
    """Copy one remote file, range by range, each tried again when the connection fails."""
    from vatt.data.fetching.network import guard_address

    guard = guard_address(url)
    filesystem, remote = _open_url(url)
    size = int(_retry(url, lambda: filesystem.info(remote)["size"] or 0, guard))
    log.info("fetching %s, %.1f MB", url, size / 1e6)
    with target.open("wb") as out:
        while out.tell() < size:
            first, last = out.tell(), min(out.tell() + RANGE_BYTES, size)
            ask = partial(_range, filesystem, remote, first, last)
            part = _retry(url, ask, guard)
            if len(part) == size:  # the whole file: the server ignores ranges
                out.seek(0)
            out.write(part)


def _range(filesystem: Any, remote: str, first: int, last: int) -> bytes:
    part = filesystem.cat_file(remote, start=first, end=last)
    if len(part) < last - first:
        raise OSError("the connection ended early")
    return part


def _open_url(url: str) -> tuple[Any, str]:
    import fsspec  # slow to import, and rarely needed

    protocol = url.partition("://")[0]
    if protocol not in PROTOCOLS or "::" in url:
        raise SettingsError(
            f"machine.shards_url: {protocol}:// is not supported",
            hint=f"use one of {', '.join(PROTOCOLS[:-2])}",
        )
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = {"s3": "s3fs"}.get(protocol, "gcsfs")
        raise MachineError(f"{url}: {error}", hint=f"pip install {package}") from None


def _retry(url: str, ask: Callable[[], T], guard: Any) -> T:
    from aiohttp import ClientError

    for attempt in range(ATTEMPTS):
        guard.refused = ""
        try:
            return ask()
        except (OSError, ClientError, TimeoutError) as error:
            if guard.refused:
                raise DataError(
                    f"{url} leads to another host: {guard.refused.partition(': ')[0]}",
                    hint="only the host of machine.shards_url itself may be a private one",
                ) from None
            if _is_final(error):
                raise DataError(
                    f"{url} does not exist: {error.__cause__ or error!r}",
                    hint="check machine.shards_url, and that it belongs to this index",
                ) from None
            if attempt == ATTEMPTS - 1:
                raise MachineError(
                    f"{url} cannot be fetched: {error.__cause__ or error!r}",
                    hint="run the same command again to continue",
                ) from None
            # Many processes fail at the same moment: they should not all retry at the same moment.
            time.sleep(PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def _is_final(error: BaseException) -> bool:
    """Whether a retry is useless; fsspec reports every failed first request as 'not found'."""
    status = getattr(error.__cause__ or error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, FileNotFoundError | PermissionError) and error.__cause__ is None


@contextmanager
def _waiting_lock(path: Path) -> Iterator[None]:
    with path.open("a", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
