"""Sorted string tables as LevelDB and TensorFlow write them, read as untrusted input.

A table is a row of blocks (records with shared key prefixes, restart points), each followed by its
compression type and its CRC-32C checksum; an index block names them, and a footer names the index
block.
"""

import struct
from collections.abc import Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

from vatt.errors import DataError

Words = NDArray[np.uint32]

_POLYNOMIAL = np.uint32(0x82F63B78)  # reflected
_LANES = 4096  # a power of two
_MASK_DELTA = 0xA282EAD8


def crc32c(data: bytes | memoryview, start: int = 0) -> int:
    """The checksum of `data`, continuing from `start`, the checksum of what came before."""
    buffer = np.frombuffer(data, dtype=np.uint8)
    lane = len(buffer) // _LANES & ~1
    body = buffer[: lane * _LANES].reshape(_LANES, lane)
    register = np.uint32(start ^ 0xFFFFFFFF)
    if lane:
        sums = np.zeros(_LANES, dtype=np.uint32)
        sums[0] = register
        register = _join(_advance(sums, body), lane)
    return int(_advance_bytes(int(register), buffer[body.size :].tobytes())) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | memoryview, start: int = 0) -> int:
    """The form that tables and bundles store, so that sums of sums stay useful."""
    return mask(crc32c(data, start))


def mask(checksum: int) -> int:
    """Rotate and offset a checksum, as LevelDB does before it writes one."""
    return (((checksum >> 15) | (checksum << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def _advance(sums: Words, lanes: NDArray[np.uint8]) -> Words:
    table = _table(16)
    columns = np.ascontiguousarray(lanes).view("<u2").T  # (steps, lanes)
    for column in columns:
        sums = table[(sums ^ column) & np.uint32(0xFFFF)] ^ (sums >> np.uint32(16))
    return sums


def _advance_bytes(register: int, tail: bytes) -> int:
    table = _byte_table()
    for byte in tail:
        register = table[(register ^ byte) & 0xFF] ^ (register >> 8)
    return register


def _join(sums: Words, lane: int) -> np.uint32:
    carry = _carry_over_zeros(lane)
    while len(sums) > 1:
        sums = _apply(carry, sums[0::2]) ^ sums[1::2]
        carry = _apply(carry, carry)
    return np.uint32(sums[0])


@cache
def _table(bits: int) -> Words:
    table = np.arange(1 << bits, dtype=np.uint32)
    for _ in range(bits):
        table = (table >> np.uint32(1)) ^ np.where(table & np.uint32(1), _POLYNOMIAL, np.uint32(0))
    return table


@cache
def _byte_table() -> tuple[int, ...]:
    return tuple(int(entry) for entry in _table(8))


def _carry_over_zeros(length: int) -> Words:
    """The linear map (one column a bit) of a register that runs over `length` zero bytes."""
    one_byte = np.array([_advance_bytes(1 << bit, b"\0") for bit in range(32)], dtype=np.uint32)
    result = np.uint32(1) << np.arange(32, dtype=np.uint32)
    while length:
        if length & 1:
            result = _apply(one_byte, result)
        one_byte = _apply(one_byte, one_byte)
        length >>= 1
    return result


def _apply(columns: Words, vectors: Words) -> Words:
    """Each vector times the matrix over GF(2)."""
    result = np.zeros_like(vectors)
    for bit, column in enumerate(columns):
        result ^= np.where(vectors >> np.uint32(bit) & np.uint32(1), column, np.uint32(0))
    return result


_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES = 48
_TRAILER_BYTES = 5
_STORED, _SNAPPY = 0, 1
_MAX_BLOCK_BYTES = 64 << 20  # TensorFlow writes blocks of 256 KiB
_MAX_VARINT_BYTES = 10


class MalformedTableError(DataError):
    """The bytes are not what the format prescribes: cut short, changed, or something else."""


def read_table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield every (key, value) of a table in order, checking every checksum on the way."""
    if len(data) < _FOOTER_BYTES:
        raise MalformedTableError(
            f"a table has at least {_FOOTER_BYTES} bytes, this one {len(data)}"
        )
    footer = data[-_FOOTER_BYTES:]
    if int.from_bytes(footer[-8:], "little") != _MAGIC:
        raise MalformedTableError("the last 8 bytes are not the mark of a table")
    _, _, position = _handle(footer, 0)  # the meta-index: filters, which TensorFlow does not write
    offset, size, _ = _handle(footer, position)
    last = b""
    for separator, handle in _records(_block(data, offset, size)):
        block_offset, block_size, end = _handle(handle, 0)
        if end != len(handle):
            raise MalformedTableError(
                "the index of the table holds something other than block positions"
            )
        for key, value in _records(_block(data, block_offset, block_size)):
            if (key <= last and last) or key > separator:
                raise MalformedTableError(f"the keys are not in order at {key[:80]!r}")
            last = key
            yield key, value


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The base-128 number at `position`, and the position after it."""
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        if position + index >= len(data):
            raise MalformedTableError("a number runs past the end of its block")
        byte = data[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            if value >> 64:
                break
            return value, position + index + 1
    raise MalformedTableError("a number is longer than 64 bits")


def _handle(data: bytes, position: int) -> tuple[int, int, int]:
    offset, position = read_varint(data, position)
    size, position = read_varint(data, position)
    return offset, size, position


def _block(data: bytes, offset: int, size: int) -> bytes:
    end = offset + size
    if end + _TRAILER_BYTES > len(data) - _FOOTER_BYTES:
        raise MalformedTableError(
            f"a block of {size} bytes at {offset} does not lie inside the table"
        )
    (stored,) = struct.unpack_from("<I", data, end + 1)
    if masked_crc32c(data[offset : end + 1]) != stored:
        raise MalformedTableError(f"the checksum of the block at {offset} is wrong")
    content, kind = data[offset:end], data[end]
    if kind == _SNAPPY:
        return uncompress_snappy(content)
    if kind != _STORED:
        raise MalformedTableError(f"the block at {offset} has the unknown compression {kind}")
    return content


def _records(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(block) < 4:
        raise MalformedTableError("a block is too short to name its restart points")
    (restarts,) = struct.unpack_from("<I", block, len(block) - 4)
    end = len(block) - 4 * (restarts + 1)
    if end < 0:
        raise MalformedTableError(f"a block of {len(block)} bytes claims {restarts} restart points")
    position, key = 0, b""
    while position < end:
        shared, position = read_varint(block, position)
        unshared, position = read_varint(block, position)
        length, position = read_varint(block, position)
        if shared > len(key) or position + unshared + length > end:
            raise MalformedTableError("a record runs past the end of its block")
        key = key[:shared] + block[position : position + unshared]
        position += unshared
        yield key, block[position : position + length]
        position += length


def uncompress_snappy(data: bytes) -> bytes:
    """The content of one raw Snappy block."""
    size, position = read_varint(data, 0)
    if size > _MAX_BLOCK_BYTES:
        raise MalformedTableError(
            f"a compressed block claims {size} bytes, more than {_MAX_BLOCK_BYTES}"
        )
    out = bytearray()
    while position < len(data):
        tag = data[position]
        if tag & 3 == 0:
            length, position = _literal_length(data, position)
            if position + length > len(data):
                raise MalformedTableError("a compressed block ends inside a literal")
            out += data[position : position + length]
            position += length
        else:
            length, offset, position = _copy(data, position)
            _repeat(out, length, offset)
        if len(out) > size:
            break
    if len(out) != size:
        raise MalformedTableError(
            f"a compressed block holds {len(out)} bytes where it claims {size}"
        )
    return bytes(out)


def _literal_length(data: bytes, position: int) -> tuple[int, int]:
    """Lengths up to 60 stand in the tag, longer ones in the 1 to 4 bytes after it."""
    length, position = data[position] >> 2, position + 1
    if length < 60:
        return length + 1, position
    extra = length - 59
    if position + extra > len(data):
        raise MalformedTableError("a compressed block ends inside a length")
    return int.from_bytes(data[position : position + extra], "little") + 1, position + extra


def _copy(data: bytes, position: int) -> tuple[int, int, int]:
    """(length, distance back, next position); the tag's kind says how long the distance is."""
    tag = data[position]
    extra = {1: 1, 2: 2, 3: 4}[tag & 3]
    if position + 1 + extra > len(data):
        raise MalformedTableError("a compressed block ends inside a copy")
    offset = int.from_bytes(data[position + 1 : position + 1 + extra], "little")
    if tag & 3 == 1:
        return (tag >> 2 & 7) + 4, (tag >> 5) << 8 | offset, position + 2
    return (tag >> 2) + 1, offset, position + 1 + extra


def _repeat(out: bytearray, length: int, offset: int) -> None:
    if not 0 < offset <= len(out):
        raise MalformedTableError("a compressed block copies from before its start")
    pattern = bytes(out[-offset:])
    out += (pattern * (length // offset + 1))[:length]
