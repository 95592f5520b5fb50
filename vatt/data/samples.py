"""Samples in shards: plain tars (WebDataset's layout) and an index of where each member lies.

A shards folder holds <split>-00000.tar, ..., index.jsonl, vocabulary.txt. A sample is <key>.mp4
(H.264, constant frame rate), <key>.wav (mono, 16 bit) and <key>.json (labels, captions, source).
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
from vatt.data.media import WAV_HEADER_BYTES, BrokenMediaError, decode_frames
from vatt.errors import DataError

INDEX = "index.jsonl"
VOCABULARY = "vocabulary.txt"
FORMAT = 1
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
    fps: int
    audio_hz: int
    rows: list[Row]

    @classmethod
    def load(cls, folder: Path, *, split: str, keys: Collection[str] | None = None) -> "ShardIndex":
        """Read the index; with `keys` only those samples, all of which must be there."""
        header, rows = _read_index(folder / INDEX)
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
        return cls(folder, header["fps"], header["audio_hz"], rows)


def splits_of(folder: Path) -> dict[str, int]:
    """The splits that have samples, and how many."""
    counts: dict[str, int] = {}
    for row in _read_index(folder / INDEX)[1]:
        counts[row.split] = counts.get(row.split, 0) + 1
    return counts


def write_index(path: Path, rows: Sequence[Row], *, header: dict[str, Any]) -> None:
    """Write the header and one line a sample."""
    lines = [json.dumps({"format": FORMAT, **header}, sort_keys=True)]
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


def _read_index(path: Path) -> tuple[dict[str, Any], list[Row]]:
    try:
        with path.open(encoding="utf-8") as file:
            header = json.loads(next(file))
            rows = [row_of(json.loads(line)) for line in file]
    except FileNotFoundError:
        raise DataError(f"{path} is missing", hint="run `vattctl preprocess`") from None
    except (ValueError, TypeError, KeyError, StopIteration) as error:
        raise DataError(f"{path} is broken: {error}", hint="run `vattctl preprocess`") from None
    if header.get("format") != FORMAT:
        raise DataError(
            f"{path} has format {header.get('format')}, not {FORMAT}",
            hint="run `vattctl preprocess`",
        )
    return header, rows


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
        """The frames at ascending or repeating `indices`: (T, H, W, C)."""
        assert row.video is not None
        data = self._read(row.shard, row.video)
        try:
            return decode_frames(data, indices, fps=self.index.fps)
        except BrokenMediaError as error:
            raise DataError(
                f"sample {row.key} of {self.index.folder / row.shard} is broken: {error}",
                hint="delete that shard and run `vattctl preprocess`",
            ) from None

    def audio(self, row: Row, first: int, last: int) -> np.ndarray:
        """Samples first to last (exclusive), as far as there are: (S,)."""
        assert row.audio is not None
        offset, _ = row.audio
        first, last = max(first, 0), min(last, row.num_samples)
        span = (offset + WAV_HEADER_BYTES + 2 * first, 2 * max(last - first, 0))
        return np.frombuffer(self._read(row.shard, span), dtype="<i2")

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
