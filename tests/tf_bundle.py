"""A plain writer of TensorFlow checkpoints, for tests of the reader; shares no code with it."""

import struct
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

ROOT, ENDING = "model/layer_with_weights-0/", "/.ATTRIBUTES/VARIABLE_VALUE"
TYPES = {"float32": 1, "float64": 2, "int64": 9, "float16": 19}


def crc32c(data: bytes) -> int:
    """Bit by bit, as the polynomial says."""
    table = _table()
    register = 0xFFFFFFFF
    for byte in data:
        register = table[(register ^ byte) & 0xFF] ^ register >> 8
    return register ^ 0xFFFFFFFF


@cache
def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


def masked(data: bytes) -> int:
    value = crc32c(data)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def entry(kind: int, shape: tuple[int, ...], shard: int, offset: int, size: int, crc: int) -> bytes:
    dims = b"".join(field(2, field(1, dim)) for dim in shape)
    message = field(1, kind) + field(2, dims) + field(3, shard) + field(4, offset) + field(5, size)
    return message + varint(6 << 3 | 5) + struct.pack("<I", crc)


def snappy_literals(data: bytes) -> bytes:
    """Valid Snappy without any copy."""
    out = varint(len(data))
    for start in range(0, len(data), 60):
        part = data[start : start + 60]
        out += bytes([(len(part) - 1) << 2]) + part
    return out


def block(records: list[tuple[bytes, bytes]], *, restart: int = 16) -> bytes:
    out, restarts, last = b"", [], b""
    for index, (key, value) in enumerate(records):
        shared = 0
        if index % restart == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value))
        out += key[shared:] + value
        last = key
    restarts = restarts or [0]
    return out + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def table(
    records: list[tuple[bytes, bytes]], *, per_block: int = 20, snappy: bool = False
) -> bytes:
    out, index = b"", []

    def add(content: bytes, kind: int) -> bytes:
        nonlocal out
        handle = varint(len(out)) + varint(len(content))
        trailer = bytes([kind])
        out += content + trailer + struct.pack("<I", masked(content + trailer))
        return handle

    for start in range(0, len(records), per_block):
        part = records[start : start + per_block]
        content = block(part)
        content = snappy_literals(content) if snappy else content
        index.append((part[-1][0], add(content, int(snappy))))
    meta = add(block([]), 0)
    footer = meta + add(block(index, restart=1), 0)
    return out + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def write(
    prefix: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    shards: int = 1,
    snappy: bool = False,
    graph: bytes | None = b"a graph",
) -> None:
    """Tensors by their full keys, dealt to the shards in turn."""
    files = [bytearray() for _ in range(shards)]
    values: dict[bytes, bytes] = {}
    for index, (key, array) in enumerate(tensors.items()):
        shard, data = index % shards, np.ascontiguousarray(array).tobytes()
        values[key.encode()] = entry(
            TYPES[str(array.dtype)],
            array.shape,
            shard,
            len(files[shard]),
            len(data),
            masked(data),
        )
        files[shard] += data
    if graph is not None:
        data, crc = strings([graph])
        values[b"_CHECKPOINTABLE_OBJECT_GRAPH"] = entry(7, (), 0, len(files[0]), len(data), crc)
        files[0] += data
    header = field(1, shards) + field(3, field(1, 1))
    records = [(b"", header), *sorted(values.items())]
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_name(f"{prefix.name}.index").write_bytes(table(records, snappy=snappy))
    for shard, content in enumerate(files):
        name = f"{prefix.name}.data-{shard:05d}-of-{shards:05d}"
        prefix.with_name(name).write_bytes(content)


def strings(texts: list[bytes]) -> tuple[bytes, int]:
    """A tensor of texts, and its checksum."""
    lengths = b"".join(struct.pack("<I", len(text)) for text in texts)
    own = struct.pack("<I", masked(lengths))
    data = b"".join(map(varint, map(len, texts))) + own + b"".join(texts)
    return data, masked(lengths + own + b"".join(texts))


def golden_tensors(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The `w:<key>` arrays of a golden file by full key, with a slot and a counter beside them."""
    tensors = {}
    for name in weights:
        if name.startswith("w:"):
            tensors[name[2:] + ENDING] = weights[name]
    first = next(iter(tensors))
    tensors[first.removesuffix(ENDING) + "/.OPTIMIZER_SLOT/optimizer/m" + ENDING] = tensors[first]
    tensors["save_counter" + ENDING] = np.array(1, dtype=np.int64)
    tensors["optimizer/iter" + ENDING] = np.array(7, dtype=np.int64)
    return tensors
