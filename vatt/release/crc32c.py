"""CRC-32C (Castagnoli) of large buffers, fast enough for checkpoints of gigabytes.

The buffer is cut in equal lanes that advance together, two bytes a step; the lanes' sums are then
joined pairwise: the sum of a concatenation is the left sum carried over zeros, xor the right sum.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

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
