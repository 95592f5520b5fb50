"""Samples in shards: plain tars (WebDataset's layout) and an index of where each member lies.

A shards folder holds <split>-00000.tar, ..., index.jsonl, vocabulary.txt. A sample is <key>.json
(labels, captions, source), its picture (<key>.mp4, or <key>.0000.jpg and so on) at a constant frame
rate and its sound, mono (<key>.wav, .flac or .m4a): docs/data-format.md.
"""

import io
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vatt.data.manifest import Caption
from vatt.data.media import BrokenMediaError
from vatt.data.storage import (
    WAV_HEADER_BYTES,
    Storage,
    decode_frames,
    decode_jpegs,
    decode_sound,
)
from vatt.errors import DataError

INDEX = "index.jsonl"
VOCABULARY = "vocabulary.txt"
FORMAT = 2
OPEN_SHARDS = 32

Extent = tuple[int, int]  # offset and size in the tar


@dataclass(frozen=True, slots=True)
class Row:
    """Where a sample lies and what it holds."""

    key: str
    clip_id: str  # of the manifest; a long clip gives several samples
    media: str  # samples of one media share it
    split: str
    shard: str
    labels: dict[str, str]
    json: Extent
    video: Extent | None
    audio: Extent | None
    num_frames: int
    height: int
    width: int
    num_samples: int  # of the waveform


@dataclass(frozen=True)
class ShardIndex:
    """The samples of a split (or of some of its clips), in the order of shards."""

    folder: Path
    storage: Storage
    rows: list[Row]

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
        storage, rows = _read_index(folder / INDEX)
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


def splits_of(folder: Path) -> dict[str, int]:
    """The splits that have samples, and how many."""
    counts: dict[str, int] = {}
    for row in _read_index(folder / INDEX)[1]:
        counts[row.split] = counts.get(row.split, 0) + 1
    return counts


def write_index(path: Path, rows: Sequence[Row], *, storage: Storage) -> None:
    """Write the header and one line a sample."""
    lines = [json.dumps({"format": FORMAT, **asdict(storage)}, sort_keys=True)]
    lines += [json.dumps(asdict(row), ensure_ascii=False, sort_keys=True) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def row_of(record: dict[str, Any]) -> Row:
    """A row from its JSON form."""
    for name in ("json", "video", "audio"):
        if record[name] is not None:
            offset, size = record[name]
            record[name] = (int(offset), int(size))
    if "/" in record["shard"] or record["shard"].startswith("."):
        raise ValueError(f"{record['shard']!r} is no file of this folder")
    return Row(**record)


def _read_index(path: Path) -> tuple[Storage, list[Row]]:
    try:
        with path.open(encoding="utf-8") as file:
            header = json.loads(next(file))
            if header.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            storage = Storage(**header)
            rows = [row_of(json.loads(line)) for line in file]
    except FileNotFoundError:
        raise DataError(f"{path} is missing", hint="run `vattctl preprocess`") from None
    except (ValueError, TypeError, KeyError, StopIteration) as error:
        raise DataError(f"{path} is broken: {error}", hint="run `vattctl preprocess`") from None
    return storage, rows


def tar_bytes(size: int) -> int:
    """What a member takes in a tar: its header, and its content in whole blocks."""
    return tarfile.BLOCKSIZE * (1 + -(-size // tarfile.BLOCKSIZE))


class ShardWriter:
    """Writes one tar; the same members give the same bytes."""

    def __init__(self, path: Path, *, name: str) -> None:
        self.name = name  # the shard's, in the end
        self._file = path.open("wb")
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)

    def add(self, name: str, data: bytes) -> Extent:
        """Append a member; returns where its bytes lie."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        member.mode = 0o644
        offset = self._file.tell() + tarfile.BLOCKSIZE
        self._tar.addfile(member, io.BytesIO(data))
        return offset, len(data)

    def close(self) -> None:
        """End the tar."""
        self._tar.close()
        self._file.close()


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

    def facts(self, row: Row) -> Facts:
        """Labels and captions."""
        record = json.loads(self._read(row.shard, row.json))
        captions = tuple(Caption(*caption) for caption in record["captions"])
        return Facts(record["labels"], captions)

    def frames(self, row: Row, indices: Sequence[int]) -> np.ndarray:
        """The frames at `indices`, in any order: (T, H, W, C)."""
        assert row.video is not None
        try:
            if self.index.storage.video == "jpeg":
                pictures = self._pictures(row, indices)
                return decode_jpegs(pictures, height=row.height, width=row.width)
            return decode_frames(self._read(row.shard, row.video), indices, fps=self.index.fps)
        except BrokenMediaError as error:
            raise self._broken(row, error) from None

    def _pictures(self, row: Row, indices: Sequence[int]) -> list[bytes]:
        """The JPEGs at `indices`, by one read: they stand in the tar one after the other."""
        assert row.video is not None
        sizes = json.loads(self._read(row.shard, row.json))["frame_bytes"]
        if len(sizes) <= max(indices):
            raise BrokenMediaError(f"it has {len(sizes)} frames")
        begins = [0]
        for size in sizes[:-1]:
            begins.append(begins[-1] + tar_bytes(size))
        first, last = min(indices), max(indices)
        span = (row.video[0] + begins[first], begins[last] + sizes[last] - begins[first])
        data = self._read(row.shard, span)
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
            return np.frombuffer(self._read(row.shard, span), dtype="<i2")
        try:
            return decode_sound(self._read(row.shard, row.audio), first, last, self.index.storage)
        except BrokenMediaError as error:
            raise self._broken(row, error) from None

    def _broken(self, row: Row, error: BrokenMediaError) -> DataError:
        return DataError(
            f"sample {row.key} of {self.index.folder / row.shard} is broken: {error}",
            hint="delete that shard and run `vattctl preprocess`",
        )

    def _read(self, shard: str, extent: Extent) -> bytes:
        offset, size = extent
        data = os.pread(self._handle(shard), size, offset)
        if len(data) != size:
            raise DataError(
                f"{self.index.folder / shard} is cut off", hint="run `vattctl preprocess`"
            )
        return data

    def _handle(self, shard: str) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        try:
            handle = os.open(self.index.folder / shard, os.O_RDONLY)
        except FileNotFoundError:
            raise DataError(
                f"{self.index.folder / shard} is missing", hint="run `vattctl preprocess`"
            ) from None
        self._open[shard] = handle
        if len(self._open) > OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        return handle

    def close(self) -> None:
        """Close the shards."""
        while self._open:
            os.close(self._open.popitem()[1])


@dataclass(frozen=True, slots=True)
class Decoded:
    """A whole sample in memory; a modality that nobody asked for, or that is not there, is None."""

    video: np.ndarray | None  # (T, H, W, C) uint8
    audio: np.ndarray | None  # (S,) int16
    facts: Facts


def decode_clips(
    index: ShardIndex, rows: Sequence[Row], with_video: bool, with_audio: bool
) -> list[Decoded]:
    """Decode whole samples."""
    reader = ShardReader(index)
    try:
        return [
            Decoded(
                reader.frames(row, range(row.num_frames)) if with_video and row.video else None,
                reader.audio(row, 0, row.num_samples) if with_audio and row.audio else None,
                reader.facts(row),
            )
            for row in rows
        ]
    finally:
        reader.close()


def nearest(captions: Sequence[Caption], *, start: float, end: float, count: int) -> list[Caption]:
    """The captions nearest in time to a window, nearest first: by the gap, then by the centres."""
    centre = (start + end) / 2

    def distance(caption: Caption) -> tuple[float, float, float]:
        gap = max(caption.start - end, start - caption.end, 0.0)
        return gap, abs((caption.start + caption.end) / 2 - centre), caption.start

    return sorted(captions, key=distance)[:count]
