"""A batch's arrays, laid over one piece of memory that worker processes write and this one reads.

B clips, T H W C frames, height, width, channels, S samples, K candidate texts, L words.
"""

import mmap
import os
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import count
from math import prod
from pathlib import Path
from typing import Self

import numpy as np

ArrayShapes = Mapping[str, tuple[tuple[int, ...], type]]  # of one clip: name -> shape, type
ALIGNED = 64  # bytes


@dataclass(slots=True)
class Arrays:
    """One row a clip; what is not filled is zero."""

    video: np.ndarray  # (B, T, H, W, C) uint8
    audio: np.ndarray  # (B, S) int16, or (B, frames, mel bins) float32
    text: np.ndarray  # (B, K, L) int64
    colour: np.ndarray  # (B, 4) float32
    has_video: np.ndarray  # (B,) bool
    has_audio: np.ndarray  # (B,) bool

    @classmethod
    def over(cls, memory: np.ndarray, clips: int, shapes: ArrayShapes) -> Self:
        """Lay the arrays of `clips` rows over bytes."""
        views: dict[str, np.ndarray] = {}
        offset = 0
        for field in fields(cls):
            shape, kind = shapes[field.name]
            size = clips * prod(shape) * np.dtype(kind).itemsize
            part = memory[offset : offset + size]
            views[field.name] = part.view(kind).reshape(clips, *shape)
            offset += _aligned(size)
        return cls(**views)

    @classmethod
    def empty(cls, clips: int, shapes: ArrayShapes) -> Self:
        """Arrays in this process's own memory."""
        return cls.over(np.empty(bytes_of(clips, shapes), np.uint8), clips, shapes)


def bytes_of(clips: int, shapes: ArrayShapes) -> int:
    """What the arrays of so many clips take."""
    sizes = (prod(shape) * np.dtype(kind).itemsize for shape, kind in shapes.values())
    return sum(_aligned(clips * size) for size in sizes)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


@dataclass(frozen=True, slots=True)
class MemoryBlock:
    """Shared memory by the name under which another process of this machine can open it."""

    path: str
    number: int  # a name may come back, a number does not
    size: int


class MemoryBlocks:
    """Shared memory that is used again when the last array over it is gone."""

    def __init__(self) -> None:
        self._free: list[tuple[MemoryBlock, mmap.mmap]] = []
        self._numbers = count()

    def take(self, size: int) -> tuple[MemoryBlock, np.ndarray]:
        """Memory of at least `size` bytes; it stays taken as long as a view of the array lives."""
        fitting = next((entry for entry in self._free if entry[0].size >= size), None)
        if fitting is not None:
            self._free.remove(fitting)
        block, memory = fitting or self._make(size)
        # A new array each time: its end is the end of all tensors that were made from it.
        array = np.frombuffer(memory, np.uint8)
        weakref.finalize(array, self._free.append, (block, memory)).atexit = False
        return block, array

    def _make(self, size: int) -> tuple[MemoryBlock, mmap.mmap]:
        if hasattr(os, "memfd_create"):  # needs no /dev/shm, which containers keep small
            file = os.memfd_create("batch")
            path = f"/proc/{os.getpid()}/fd/{file}"
        else:
            file, path = tempfile.mkstemp(prefix="vatt-batch-")
            weakref.finalize(self, Path(path).unlink)
        weakref.finalize(self, os.close, file)
        os.ftruncate(file, size)
        block = MemoryBlock(path, next(self._numbers), size)
        return block, _map(block)


@lru_cache(maxsize=256)
def attach(block: MemoryBlock) -> np.ndarray:
    """Another process's block, as bytes; mapped once, until this process ends."""
    return np.frombuffer(_map(block), np.uint8)


def _map(block: MemoryBlock) -> mmap.mmap:
    file = os.open(block.path, os.O_RDWR)
    try:
        return mmap.mmap(file, block.size)
    finally:
        os.close(file)
