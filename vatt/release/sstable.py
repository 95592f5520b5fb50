"""Sorted string tables as LevelDB and TensorFlow write them, read as untrusted input.

A table is a row of blocks (records with shared key prefixes, restart points), each followed by its
compression type and checksum; an index block names them, and a footer names the index block.
"""

import struct
from collections.abc import Iterator

from vatt.errors import DataError
from vatt.release.crc32c import masked_crc32c

_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES = 48
_TRAILER_BYTES = 5
_STORED, _SNAPPY = 0, 1
_MAX_BLOCK_BYTES = 64 << 20  # TensorFlow writes blocks of 256 KiB
_MAX_VARINT_BYTES = 10


class Malformed(DataError):
    """The bytes are not what the format prescribes: cut short, changed, or something else."""


def read_table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield every (key, value) of a table in order, checking every checksum on the way."""
    if len(data) < _FOOTER_BYTES:
        raise Malformed(f"a table has at least {_FOOTER_BYTES} bytes, this one {len(data)}")
    footer = data[-_FOOTER_BYTES:]
    if int.from_bytes(footer[-8:], "little") != _MAGIC:
        raise Malformed("the last 8 bytes are not the mark of a table")
    _, _, position = _handle(footer, 0)  # the meta-index: filters, which TensorFlow does not write
    offset, size, _ = _handle(footer, position)
    last = b""
    for separator, handle in _records(_block(data, offset, size)):
        block_offset, block_size, end = _handle(handle, 0)
        if end != len(handle):
            raise Malformed("the index of the table holds something other than block positions")
        for key, value in _records(_block(data, block_offset, block_size)):
            if (key <= last and last) or key > separator:
                raise Malformed(f"the keys are not in order at {key[:80]!r}")
            last = key
            yield key, value


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The base-128 number at `position`, and the position after it."""
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        if position + index >= len(data):
            raise Malformed("a number runs past the end of its block")
        byte = data[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            if value >> 64:
                break
            return value, position + index + 1
    raise Malformed("a number is longer than 64 bits")


def _handle(data: bytes, position: int) -> tuple[int, int, int]:
    offset, position = read_varint(data, position)
    size, position = read_varint(data, position)
    return offset, size, position


def _block(data: bytes, offset: int, size: int) -> bytes:
    end = offset + size
    if end + _TRAILER_BYTES > len(data) - _FOOTER_BYTES:
        raise Malformed(f"a block of {size} bytes at {offset} does not lie inside the table")
    (stored,) = struct.unpack_from("<I", data, end + 1)
    if masked_crc32c(data[offset : end + 1]) != stored:
        raise Malformed(f"the checksum of the block at {offset} is wrong")
    content, kind = data[offset:end], data[end]
    if kind == _SNAPPY:
        return uncompress_snappy(content)
    if kind != _STORED:
        raise Malformed(f"the block at {offset} has the unknown compression {kind}")
    return content


def _records(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(block) < 4:
        raise Malformed("a block is too short to name its restart points")
    (restarts,) = struct.unpack_from("<I", block, len(block) - 4)
    end = len(block) - 4 * (restarts + 1)
    if end < 0:
        raise Malformed(f"a block of {len(block)} bytes claims {restarts} restart points")
    position, key = 0, b""
    while position < end:
        shared, position = read_varint(block, position)
        unshared, position = read_varint(block, position)
        length, position = read_varint(block, position)
        if shared > len(key) or position + unshared + length > end:
            raise Malformed("a record runs past the end of its block")
        key = key[:shared] + block[position : position + unshared]
        position += unshared
        yield key, block[position : position + length]
        position += length


def uncompress_snappy(data: bytes) -> bytes:
    """The content of one raw Snappy block."""
    size, position = read_varint(data, 0)
    if size > _MAX_BLOCK_BYTES:
        raise Malformed(f"a compressed block claims {size} bytes, more than {_MAX_BLOCK_BYTES}")
    out = bytearray()
    while position < len(data):
        tag = data[position]
        if tag & 3 == 0:
            length, position = _literal_length(data, position)
            if position + length > len(data):
                raise Malformed("a compressed block ends inside a literal")
            out += data[position : position + length]
            position += length
        else:
            length, offset, position = _copy(data, position)
            _repeat(out, length, offset)
        if len(out) > size:
            break
    if len(out) != size:
        raise Malformed(f"a compressed block holds {len(out)} bytes where it claims {size}")
    return bytes(out)


def _literal_length(data: bytes, position: int) -> tuple[int, int]:
    """Lengths up to 60 stand in the tag, longer ones in the 1 to 4 bytes after it."""
    length, position = data[position] >> 2, position + 1
    if length < 60:
        return length + 1, position
    extra = length - 59
    if position + extra > len(data):
        raise Malformed("a compressed block ends inside a length")
    return int.from_bytes(data[position : position + extra], "little") + 1, position + extra


def _copy(data: bytes, position: int) -> tuple[int, int, int]:
    """(length, distance back, next position); the tag's kind says how long the distance is."""
    tag = data[position]
    extra = {1: 1, 2: 2, 3: 4}[tag & 3]
    if position + 1 + extra > len(data):
        raise Malformed("a compressed block ends inside a copy")
    offset = int.from_bytes(data[position + 1 : position + 1 + extra], "little")
    if tag & 3 == 1:
        return (tag >> 2 & 7) + 4, (tag >> 5) << 8 | offset, position + 2
    return (tag >> 2) + 1, offset, position + 1 + extra


def _repeat(out: bytearray, length: int, offset: int) -> None:
    if not 0 < offset <= len(out):
        raise Malformed("a compressed block copies from before its start")
    pattern = bytes(out[-offset:])
    out += (pattern * (length // offset + 1))[:length]
