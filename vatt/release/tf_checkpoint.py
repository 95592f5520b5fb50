"""TensorFlow object checkpoints, read without TensorFlow and as untrusted input.

`PREFIX.index` is a table from key to a small protocol message (type, shape, shard, offset, size,
checksum); `PREFIX.data-00000-of-00001` and so on hold the raw tensors. See tensor_bundle.proto.
"""

import hashlib
import itertools
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vatt.errors import DataError
from vatt.progress import Progress
from vatt.release.sstable import MalformedTableError, crc32c, mask, read_table, read_varint

INDEX_SUFFIX = ".index"
MAX_INDEX_BYTES = 64 << 20  # the largest released one has 0.2 MB
_MAX_SHARDS = 1000
_MAX_RANK = 16
_CHUNK_BYTES = 8 << 20
_STRING = 7
_HEADER_KEY = b""

# DataType of types.proto; the ones that checkpoints hold.
_TYPES = {
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    4: torch.uint8,
    6: torch.int8,
    9: torch.int64,
    10: torch.bool,
    14: torch.bfloat16,
    19: torch.float16,
}


@dataclass(frozen=True, slots=True)
class BundleEntry:
    """Where one tensor lies and what it is; `dtype` is None for strings."""

    key: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int  # bytes
    checksum: int  # masked CRC-32C of the tensor's bytes


class TensorFlowCheckpoint:
    """The entries of a checkpoint; a tensor is read, and its checksum compared, on demand."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index = index_path(prefix)
        if not index.is_file():
            raise DataError(f"{index} does not exist", hint=_other_prefixes(prefix))
        size = index.stat().st_size
        if size > MAX_INDEX_BYTES:
            raise DataError(f"{index} has {size} bytes; the index of a checkpoint is far smaller")
        try:
            self.num_shards, self.entries = parse_index(index.read_bytes())
            self._check_shards()
        except MalformedTableError as error:
            raise _named(error, index) from None

    def shard_path(self, shard: int) -> Path:
        """The file of one shard."""
        return shard_path(self.prefix, shard, self.num_shards)

    def read(self, key: str) -> Tensor:
        """One tensor, its checksum compared."""
        entry = self.entries[key]
        if entry.dtype is None:
            raise DataError(f"{key} holds text, not numbers")
        data = bytearray(self._bytes(entry))
        if mask(crc32c(memoryview(data))) != entry.checksum:
            raise self._changed(entry)
        if not data:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)

    def check_strings(self) -> None:
        """Compare the checksums of the text entries, such as the object graph."""
        for entry in self.entries.values():
            if (
                entry.dtype is None
                and _string_checksum(self._bytes(entry), entry) != entry.checksum
            ):
                raise self._changed(entry)

    def sha256(self, progress: Progress | None = None) -> dict[str, str]:
        """File name -> sha256 of the index and of every shard."""
        files = [index_path(self.prefix), *map(self.shard_path, range(self.num_shards))]
        total, done, sums = sum(file.stat().st_size for file in files), 0, {}
        for file in files:
            digest = hashlib.sha256()
            for chunk in _chunks(file):
                digest.update(chunk)
                done += len(chunk)
                if progress:
                    progress(done, total)
            sums[file.name] = digest.hexdigest()
        return sums

    def _bytes(self, entry: BundleEntry) -> bytes:
        with self.shard_path(entry.shard).open("rb") as shard:
            shard.seek(entry.offset)
            data = shard.read(entry.size)
        if len(data) != entry.size:
            raise DataError(f"{self.shard_path(entry.shard)} became shorter while it was read")
        return data

    def _changed(self, entry: BundleEntry) -> DataError:
        return DataError(
            f"the checksum of {entry.key} in {self.shard_path(entry.shard)} is wrong",
            hint="the file is damaged: fetch it again",
        )

    def _check_shards(self) -> None:
        sizes = {}
        for shard in range(self.num_shards):
            path = self.shard_path(shard)
            if not path.is_file():
                raise DataError(f"{path} does not exist", hint="a checkpoint needs all its shards")
            sizes[shard] = path.stat().st_size
        for entry in self.entries.values():
            if entry.offset + entry.size > sizes[entry.shard]:
                raise DataError(
                    f"{entry.key} ends at byte {entry.offset + entry.size} of "
                    f"{self.shard_path(entry.shard)}, which has {sizes[entry.shard]}",
                    hint="the file is incomplete: fetch it again",
                )


def index_path(prefix: Path) -> Path:
    """The index file of a prefix."""
    return prefix.with_name(prefix.name + INDEX_SUFFIX)


def shard_path(prefix: Path, shard: int, num_shards: int) -> Path:
    """The file of one shard of a prefix."""
    return prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{num_shards:05d}")


def parse_index(data: bytes) -> tuple[int, dict[str, BundleEntry]]:
    """The number of shards and the entries by key."""
    records = iter(read_table(data))
    key, header = next(records, (None, b""))
    if key != _HEADER_KEY:
        raise MalformedTableError("the first record is not the header of a checkpoint")
    fields = _message(header)
    num_shards = _number(fields, 1)
    if not 1 <= num_shards <= _MAX_SHARDS:
        raise MalformedTableError(f"{num_shards} shards")
    if _number(fields, 2) != 0:
        raise MalformedTableError("written on a big-endian machine")
    entries = [_entry(key, value, num_shards) for key, value in records]
    _check_apart(entries)
    return num_shards, {entry.key: entry for entry in entries}


def _entry(raw_key: bytes, value: bytes, num_shards: int) -> BundleEntry:
    try:
        key = raw_key.decode("utf-8")
    except UnicodeDecodeError:
        raise MalformedTableError(f"the key {raw_key[:80]!r} is not text") from None
    fields = _message(value)
    if 7 in fields:
        raise MalformedTableError(f"{key} is stored in slices, which no released checkpoint has")
    kind, shape = _number(fields, 1), _shape(key, fields)
    if kind not in _TYPES and kind != _STRING:
        raise MalformedTableError(f"{key} has the data type {kind}, which is not supported")
    entry = BundleEntry(
        key=key,
        dtype=_TYPES.get(kind),
        shape=shape,
        shard=_number(fields, 3),
        offset=_number(fields, 4),
        size=_number(fields, 5),
        checksum=_number(fields, 6),
    )
    if entry.shard >= num_shards:
        raise MalformedTableError(f"{key} lies in shard {entry.shard} of {num_shards}")
    if entry.dtype is not None and entry.size != math.prod(shape) * entry.dtype.itemsize:
        raise MalformedTableError(f"{key} has the shape {list(shape)} but {entry.size} bytes")
    return entry


def _check_apart(entries: list[BundleEntry]) -> None:
    """No byte belongs to two tensors, so a small file cannot claim to hold large ones."""
    ordered = sorted(entries, key=lambda entry: (entry.shard, entry.offset, entry.size))
    for one, after in itertools.pairwise(ordered):
        if one.shard == after.shard and one.offset + one.size > after.offset:
            raise MalformedTableError(f"{one.key} and {after.key} overlap")


def _shape(key: str, fields: dict[int, list[int | bytes]]) -> tuple[int, ...]:
    shape = []
    for message in fields.get(2, []):
        for dimension in _message(_as_bytes(message)).get(2, []):
            shape.append(_number(_message(_as_bytes(dimension)), 1))
    if len(shape) > _MAX_RANK or any(size >> 40 for size in shape):
        raise MalformedTableError(f"{key} has the shape {shape}")
    return tuple(shape)


def _message(data: bytes) -> dict[int, list[int | bytes]]:
    """A protocol message as field number -> values: numbers, or bytes for what has a length."""
    fields: dict[int, list[int | bytes]] = {}
    position = 0
    while position < len(data):
        tag, position = read_varint(data, position)
        value: int | bytes
        if tag & 7 == 0:
            value, position = read_varint(data, position)
        else:
            size = {1: 8, 5: 4}.get(tag & 7)
            if tag & 7 == 2:
                size, position = read_varint(data, position)
            if size is None or position + size > len(data):
                raise MalformedTableError(
                    "a message of the index is cut short or of an unknown kind"
                )
            value = data[position : position + size]
            value = value if tag & 7 == 2 else int.from_bytes(value, "little")
            position += size
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _number(fields: dict[int, list[int | bytes]], field: int) -> int:
    value = fields.get(field, [0])[-1]
    if isinstance(value, bytes) or value >> 63:
        raise MalformedTableError(f"field {field} of a message is not a number in range")
    return value


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise MalformedTableError("a number stands where a message of the index should")
    return value


def _string_checksum(data: bytes, entry: BundleEntry) -> int:
    """Of text, the sum runs over the lengths as 32-bit numbers, their own sum, then the bytes."""
    position, lengths = 0, []
    for _ in range(math.prod(entry.shape)):
        length, position = read_varint(data, position)
        lengths.append(length)
    if position + 4 + sum(lengths) != len(data) or any(length >> 32 for length in lengths):
        raise MalformedTableError(f"the text of {entry.key} does not fill its place")
    checksum = crc32c(b"".join(struct.pack("<I", length) for length in lengths))
    return mask(crc32c(data[position:], checksum))


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            yield chunk


def _named(error: MalformedTableError, index: Path) -> DataError:
    return DataError(
        f"{index} is not a readable TensorFlow checkpoint: {error.problem}",
        hint="it may be damaged or incomplete: fetch it again",
    )


def _other_prefixes(prefix: Path) -> str:
    folder = prefix if prefix.is_dir() else prefix.parent
    found = sorted(str(file).removesuffix(INDEX_SUFFIX) for file in folder.glob("*.index"))
    if found:
        return f"in that folder lies {', '.join(found[:5])}"
    return "give the part of the file name before '.index'"
