"""Reading shards: the facts, frames and sound of a sample by its row.

T H W C: frames, height, width, channels; S samples.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vatt.data.manifest import Caption
from vatt.data.media import BrokenMediaError
from vatt.data.remote import ShardCache
from vatt.data.samples import INDEX, Extent, Row, read_index, tar_bytes
from vatt.data.storage import (
    WAV_HEADER_BYTES,
    Box,
    Shown,
    Storage,
    decode_frames,
    decode_jpegs,
    decode_sound,
    whole,
)
from vatt.errors import DataError

HANDLES = 48  # more than the shards that are read at a time


class BrokenSampleError(DataError):
    """A sample whose bytes are not what the index promises."""


@dataclass(frozen=True)
class ShardIndex:
    """The samples of a split (or of some of its clips), in the order of shards."""

    folder: Path
    storage: Storage
    rows: list[Row]
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
class Facts:
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

    def facts(self, row: Row) -> Facts:
        """Labels and captions."""
        record = self._record_of(row)
        try:
            captions = tuple(
                Caption(float(start), float(end), str(text))
                for start, end, text in record["captions"]
            )
            return Facts(dict(record["labels"]), captions)
        except (ValueError, TypeError, KeyError) as error:
            raise self._broken(row, f"its JSON is not as it should be: {error}") from None

    def origin(self, row: Row) -> tuple[str, float, float]:
        """Where a sample was cut from: its source's address, from and to, in seconds."""
        record = self._record_of(row)
        try:
            return str(record["url"]), float(record["start"]), float(record["end"])
        except (ValueError, TypeError, KeyError) as error:
            raise self._broken(row, f"its JSON is not as it should be: {error}") from None

    def frames(self, row: Row, indices: Sequence[int], box: Box | None = None) -> np.ndarray:
        """The frames at `indices`, in any order, or `box` of them: (T, H, W, C)."""
        return whole(self.each_frame(row, indices, box), len(indices))

    def each_frame(self, row: Row, indices: Sequence[int], box: Box | None = None) -> Shown:
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

    def _pictures(self, row: Row, indices: Sequence[int]) -> list[memoryview]:
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

    def audio(self, row: Row, first: int, last: int) -> np.ndarray:
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

    def announce(self, rows: Iterable[Row]) -> None:
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

    def _record_of(self, row: Row) -> dict[str, Any]:
        if self._record[0] != row.key:
            try:
                record = json.loads(self._read(row, row.json))
            except (ValueError, RecursionError) as error:
                raise self._broken(row, f"its JSON cannot be read: {error}") from None
            if not isinstance(record, dict):
                raise self._broken(row, "its JSON is no object")
            self._record = (row.key, record)
        return self._record[1]

    def _broken(self, row: Row, why: str) -> BrokenSampleError:
        return BrokenSampleError(
            f"sample {row.key} of {self.index.folder / row.shard} is broken: {why}",
            hint="delete that shard and run `vattctl preprocess`",
        )

    def _read(self, row: Row, extent: Extent) -> bytes:
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


def place(row: Row) -> tuple[str, int]:
    """Where a sample lies: rows in this order are read in sequence."""
    return row.shard, row.json[0]


def extents(rows: Iterable[Row]) -> list[tuple[str, int, int]]:
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
class Decoded:
    """A whole sample in memory; a modality that nobody asked for, or that is not there, is None."""

    video: np.ndarray | None  # (T, H, W, C) uint8
    audio: np.ndarray | None  # (S,) int16
    facts: Facts


def decode_clips(
    reader: ShardReader, rows: Sequence[Row], with_video: bool, with_audio: bool
) -> list[Decoded | BrokenSampleError]:
    """Decode whole samples; a broken one gives its error."""

    def decode(row: Row) -> Decoded | BrokenSampleError:
        try:
            return Decoded(
                reader.frames(row, range(row.num_frames)) if with_video and row.video else None,
                reader.audio(row, 0, row.num_samples) if with_audio and row.audio else None,
                reader.facts(row),
            )
        except BrokenSampleError as error:
            return error

    return [decode(row) for row in rows]
