"""The reader against a writer that shares no code with it, and against damaged files."""

import contextlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tf_bundle
from vatt.errors import DataError
from vatt.release.sstable import (
    MalformedTableError,
    crc32c,
    masked_crc32c,
    read_table,
    uncompress_snappy,
)
from vatt.release.tf_checkpoint import TensorFlowCheckpoint, parse_index

TENSORS = {
    "a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a/bias": np.array([1.5, -2.0], dtype=np.float32),
    "b/steps": np.array(7, dtype=np.int64),
    "b/half": np.linspace(0, 1, 5, dtype=np.float16),
    "b/nothing": np.zeros((0, 4), dtype=np.float32),
}


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    tf_bundle.write(tmp_path / "ckpt-3", TENSORS)
    return tmp_path / "ckpt-3"


# --- checksums and compression --------------------------------------------------------------------


def test_crc32c_has_the_values_of_the_standard() -> None:
    # RFC 3720, appendix B.4.
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


@pytest.mark.parametrize("size", [0, 1, 8191, 8192, 8193, 20_001, 65_537])
def test_crc32c_in_lanes_equals_bit_by_bit(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    assert crc32c(data) == tf_bundle.crc32c(data)
    assert masked_crc32c(data) == tf_bundle.masked(data)
    assert crc32c(data[size // 3 :], crc32c(data[: size // 3])) == crc32c(data)


def test_snappy_copies_of_each_kind() -> None:
    near = bytes([8 << 2 | 1, 3])  # no literal: a copy needs something before it
    literal = bytes([3 << 2]) + b"abcd"
    one = bytes([(5 - 4) << 2 | 1, 4])  # 5 bytes from 4 back: runs into itself
    two = bytes([(3 - 1) << 2 | 2, 9, 0])
    four = bytes([(2 - 1) << 2 | 3, 12, 0, 0, 0])
    assert uncompress_snappy(bytes([14]) + literal + one + two + four) == b"abcdabcdaabcab"
    long = bytes([60 << 2, 99]) + bytes(100)
    assert uncompress_snappy(bytes([100]) + long) == bytes(100)
    for broken in (near, literal, bytes([14]) + near, bytes([9]) + literal + one[:1], b""):
        with pytest.raises(MalformedTableError):
            uncompress_snappy(broken)


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_snappy_never_fails_in_another_way(data: bytes) -> None:
    with contextlib.suppress(MalformedTableError):
        uncompress_snappy(data)


# --- whole checkpoints ----------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("snappy", [False, True])
def test_what_was_written_is_read(tmp_path: Path, shards: int, snappy: bool) -> None:
    many = TENSORS | {f"many/{n:03d}": np.full(n, n, dtype=np.float32) for n in range(60)}
    tf_bundle.write(tmp_path / "ckpt", many, shards=shards, snappy=snappy)
    read = TensorFlowCheckpoint(tmp_path / "ckpt")
    read.check_strings()
    assert read.entries.keys() == many.keys() | {"_CHECKPOINTABLE_OBJECT_GRAPH"}
    for key, array in many.items():
        torch.testing.assert_close(read.read(key), torch.tensor(array), rtol=0, atol=0)


def test_a_changed_tensor_is_named(prefix: Path) -> None:
    data = prefix.with_name("ckpt-3.data-00000-of-00001")
    content = bytearray(data.read_bytes())
    content[2] ^= 1
    data.write_bytes(content)
    with pytest.raises(DataError, match="checksum of a/kernel"):
        TensorFlowCheckpoint(prefix).read("a/kernel")
    content[-1] ^= 1
    data.write_bytes(content)
    with pytest.raises(DataError, match="checksum of _CHECKPOINTABLE_OBJECT_GRAPH"):
        TensorFlowCheckpoint(prefix).check_strings()


def test_missing_and_short_files_are_named(prefix: Path) -> None:
    data = prefix.with_name("ckpt-3.data-00000-of-00001")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(DataError, match="incomplete"):
        TensorFlowCheckpoint(prefix)
    data.unlink()
    with pytest.raises(DataError, match=r"data-00000-of-00001 does not exist"):
        TensorFlowCheckpoint(prefix)
    with pytest.raises(DataError, match=r"in that folder lies .*ckpt-3"):
        TensorFlowCheckpoint(prefix.with_name("ckpt-4"))


def test_any_flipped_or_missing_byte_of_an_index_is_noticed(prefix: Path) -> None:
    index = prefix.with_name("ckpt-3.index").read_bytes()
    expected = parse_index(index)
    for place in range(len(index)):
        flipped = bytearray(index)
        flipped[place] ^= 0x55
        with contextlib.suppress(MalformedTableError):
            assert parse_index(bytes(flipped)) == expected  # the footer's padding and meta-index
        with pytest.raises(MalformedTableError):
            parse_index(index[:place])


@given(st.binary(max_size=80))
@settings(max_examples=300, deadline=None)
def test_blocks_of_anything_with_a_right_checksum_never_fail_in_another_way(data: bytes) -> None:
    for content in (
        data,
        data + struct.pack("<I", 0),
        tf_bundle.block([(b"", data), (b"k", data)]),
    ):
        with contextlib.suppress(MalformedTableError):
            parse_index(_table_of(content))


def _table_of(content: bytes) -> bytes:
    """A table of one block, checksums right."""

    def stored(block: bytes) -> bytes:
        return block + b"\0" + struct.pack("<I", tf_bundle.masked(block + b"\0"))

    handle = tf_bundle.varint(0) + tf_bundle.varint(len(content))
    index = tf_bundle.block([(b"\xff", handle)])
    footer = handle + tf_bundle.varint(len(content) + 5) + tf_bundle.varint(len(index))
    mark = struct.pack("<Q", 0xDB4775248B80FB57)
    return stored(content) + stored(index) + footer.ljust(40, b"\0") + mark


# --- hostile content with right checksums ---------------------------------------------------------


def _index(entry: bytes, *, key: bytes = b"k", shards: int = 1, header: bytes = b"") -> bytes:
    header = tf_bundle.field(1, shards) + header
    return tf_bundle.table([(b"", header), (key, entry)])


HOSTILE: dict[str, Callable[[], bytes]] = {
    "lies in shard 1 of 1": lambda: _index(tf_bundle.entry(1, (2,), 1, 0, 8, 0)),
    "not a number in range": lambda: _index(tf_bundle.entry(1, (2,), 0, 2**63, 8, 0)),
    "but 9 bytes": lambda: _index(tf_bundle.entry(1, (2,), 0, 0, 9, 0)),
    "but 8 bytes": lambda: _index(tf_bundle.entry(1, (2**39, 2**39), 0, 0, 8, 0)),
    "has the shape": lambda: _index(tf_bundle.entry(1, (2**40,), 0, 0, 8, 0)),
    r"has the shape \[1, 1": lambda: _index(tf_bundle.entry(1, (1,) * 17, 0, 0, 4, 0)),
    "data type 21": lambda: _index(tf_bundle.entry(21, (2,), 0, 0, 8, 0)),
    "slices": lambda: _index(tf_bundle.entry(1, (2,), 0, 0, 8, 0) + tf_bundle.field(7, b"slice")),
    "is not text": lambda: _index(tf_bundle.entry(1, (2,), 0, 0, 8, 0), key=b"\xff\xfe"),
    "100000 shards": lambda: _index(tf_bundle.entry(1, (2,), 0, 0, 8, 0), shards=100_000),
    "big-endian": lambda: _index(
        tf_bundle.entry(1, (2,), 0, 0, 8, 0), header=tf_bundle.field(2, 1)
    ),
    "overlap": lambda: tf_bundle.table(
        [
            (b"", tf_bundle.field(1, 1)),
            (b"a", tf_bundle.entry(1, (2,), 0, 0, 8, 0)),
            (b"b", tf_bundle.entry(1, (2,), 0, 4, 8, 0)),
        ]
    ),
    "not in order": lambda: tf_bundle.table(
        [
            (b"", tf_bundle.field(1, 1)),
            (b"b", tf_bundle.entry(1, (2,), 0, 0, 8, 0)),
            (b"a", tf_bundle.entry(1, (2,), 0, 8, 8, 0)),
        ]
    ),
    "cut short": lambda: _index(tf_bundle.field(2, b"abc")[:-1]),
    "not the header": lambda: tf_bundle.table([(b"k", tf_bundle.entry(1, (2,), 0, 0, 8, 0))]),
}


@pytest.mark.parametrize("message", HOSTILE)
def test_a_hostile_index_is_refused(message: str) -> None:
    with pytest.raises(MalformedTableError, match=message):
        parse_index(HOSTILE[message]())


def test_an_empty_table_has_no_records() -> None:
    assert list(read_table(_table_of(tf_bundle.block([])))) == []
