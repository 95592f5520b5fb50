"""Clips decoded once and kept, where all of them fit in memory."""

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace

import numpy as np

from vatt.data.reader import (
    BrokenSampleError,
    Decoded,
    Facts,
    ShardIndex,
    ShardReader,
    decode_clips,
)
from vatt.data.samples import Row
from vatt.data.sampling import Sampling
from vatt.data.storage import Box, Shown

CHUNK = 16  # clips that a worker decodes at a time


class Memory:
    """Clips decoded once and kept, those of `order` at once; reads like the shards."""

    def __init__(
        self, index: ShardIndex, sampling: Sampling, order: Sequence[int], pool: Executor
    ) -> None:
        self._bare = replace(index, rows=[])
        self._wanted = (sampling.frames > 0, sampling.samples > 0)
        self._pool = pool
        self._clips: dict[str, Decoded | BrokenSampleError] = {}
        self._pending: dict[str, tuple[list[Row], Future[list[Decoded | BrokenSampleError]]]] = {}
        for first in range(0, len(order), CHUNK):
            self._submit([index.rows[number] for number in order[first : first + CHUNK]])

    def _submit(self, rows: list[Row]) -> None:
        future = self._pool.submit(decode_rows, self._bare, rows, *self._wanted)
        self._pending.update((row.key, (rows, future)) for row in rows)

    def facts(self, row: Row) -> Facts:
        """Labels and captions."""
        return self._clip(row).facts

    def each_frame(self, row: Row, indices: Sequence[int], box: Box) -> Shown:
        """The part of the frames in the box, each (H, W, C) with its place in `indices`."""
        video = self._clip(row).video
        assert video is not None
        top, left, height, width = box
        for place, index in enumerate(indices):
            yield place, video[index, top : top + height, left : left + width]

    def audio(self, row: Row, first: int, last: int) -> np.ndarray:
        """(S,), fewer where the clip ends."""
        wave = self._clip(row).audio
        assert wave is not None
        return wave[max(first, 0) : last]

    def _clip(self, row: Row) -> Decoded:
        if row.key not in self._clips:
            if row.key not in self._pending:
                self._submit([row])
            rows, future = self._pending[row.key]
            for done, clip in zip(rows, future.result(), strict=True):
                self._clips[done.key] = clip
                del self._pending[done.key]
        clip = self._clips[row.key]
        if isinstance(clip, BrokenSampleError):
            raise clip
        return clip


def decode_rows(
    index: ShardIndex, rows: Sequence[Row], with_video: bool, with_audio: bool
) -> list[Decoded | BrokenSampleError]:
    """What a worker does."""
    reader = ShardReader(index)
    try:
        return decode_clips(reader, rows, with_video, with_audio)
    finally:
        reader.close()
