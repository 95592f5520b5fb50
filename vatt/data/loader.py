"""Requests -> samples, in order: decoded by worker processes, from memory where all of it fits."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from vatt.data.background import Background
from vatt.data.pool import worker_pool
from vatt.data.samples import VOCABULARY, Decoded, Facts, Row, ShardIndex, ShardReader, decode_clips
from vatt.data.sampling import Request, Sample, Sampling, Stored, make_sample
from vatt.data.storage import Storage
from vatt.data.text import Vocabulary
from vatt.errors import MachineError

Loaded = tuple[list[Request], list[Sample]]

AHEAD = 2  # batches made before they are asked for
CHUNK = 16  # clips that a worker decodes at a time


def load_samples(
    index: ShardIndex,
    requests: Iterable[list[Request]],
    sampling: Sampling,
    *,
    first_needed: Iterable[int],
    workers: int,
    cache_bytes: int,
) -> Iterator[Loaded]:
    """The samples of each batch of requests; content does not depend on workers or cache."""
    if decoded_bytes(index.rows, sampling) <= cache_bytes:
        made = _from_memory(index, requests, sampling, first_needed, workers)
    else:
        made = _from_shards(index, requests, sampling, workers)
    if workers == 0:
        yield from made
        return
    with Background(made, ahead=AHEAD) as ready:
        try:
            yield from ready
        except BrokenProcessPool:
            raise MachineError(
                "a worker process died, perhaps for want of memory",
                hint="lower machine.workers or machine.cache_gb",
            ) from None


def decoded_bytes(rows: Sequence[Row], sampling: Sampling) -> int:
    """What the decoded clips take in memory."""
    frames = sum(row.num_frames * row.height * row.width * 3 for row in rows)
    samples = sum(row.num_samples * 2 for row in rows)
    return frames * (sampling.frames > 0) + samples * (sampling.samples > 0)


class Memory:
    """Clips decoded once and kept; reads like the shards."""

    def __init__(
        self, index: ShardIndex, sampling: Sampling, order: Sequence[int], pool: Executor | None
    ) -> None:
        self._index = replace(index, rows=[])
        self._wanted = (sampling.frames > 0, sampling.samples > 0)
        self._clips: dict[str, Decoded] = {}
        self._pending: dict[str, tuple[list[Row], Future[list[Decoded]]]] = {}
        for first in range(0, len(order) if pool is not None else 0, CHUNK):
            assert pool is not None
            rows = [index.rows[number] for number in order[first : first + CHUNK]]
            future = pool.submit(decode_clips, self._index, rows, *self._wanted)
            self._pending.update((row.key, (rows, future)) for row in rows)

    def facts(self, row: Row) -> Facts:
        """Labels and captions."""
        return self._clip(row).facts

    def frames(self, row: Row, indices: Sequence[int]) -> np.ndarray:
        """(T, H, W, C)."""
        video = self._clip(row).video
        assert video is not None
        return video[list(indices)]

    def audio(self, row: Row, first: int, last: int) -> np.ndarray:
        """(S,), fewer where the clip ends."""
        wave = self._clip(row).audio
        assert wave is not None
        return wave[max(first, 0) : last]

    def _clip(self, row: Row) -> Decoded:
        if row.key not in self._clips:
            rows, future = self._pending.get(row.key, ([row], None))
            decoded = (
                decode_clips(self._index, rows, *self._wanted)
                if future is None
                else future.result()
            )
            for done, clip in zip(rows, decoded, strict=True):
                self._clips[done.key] = clip
                self._pending.pop(done.key, None)
        return self._clips[row.key]


def _from_memory(
    index: ShardIndex,
    requests: Iterable[list[Request]],
    sampling: Sampling,
    first_needed: Iterable[int],
    workers: int,
) -> Iterator[Loaded]:
    """Decode every clip once, those needed first at first; then everything comes from memory."""
    order = list(dict.fromkeys(islice(first_needed, len(index.rows))))
    with worker_pool(workers, preload=["vatt.data.samples"]) as pool:
        memory = Memory(index, sampling, order, pool if workers else None)
        for asked in requests:
            rows = [index.rows[request.row] for request in asked]
            yield asked, _make(memory, index, rows, asked, sampling)


def _from_shards(
    index: ShardIndex, requests: Iterable[list[Request]], sampling: Sampling, workers: int
) -> Iterator[Loaded]:
    """Decode the window that is asked for, each time anew, a few batches ahead."""
    bare = replace(index, rows=[])
    waiting: deque[tuple[list[Request], list[Future[list[Sample]]]]] = deque()
    with worker_pool(workers, preload=[__name__]) as pool:
        for asked in requests:
            futures = []
            for first in range(0, len(asked), CHUNK):
                part = asked[first : first + CHUNK]
                rows = [index.rows[request.row] for request in part]
                futures.append(pool.submit(make_samples, bare, rows, part, sampling))
            waiting.append((asked, futures))
            if workers == 0 or len(waiting) > AHEAD:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())


def _result(ready: tuple[list[Request], list[Future[list[Sample]]]]) -> Loaded:
    asked, futures = ready
    return asked, [sample for future in futures for sample in future.result()]


def make_samples(
    index: ShardIndex, rows: Sequence[Row], asked: Sequence[Request], sampling: Sampling
) -> list[Sample]:
    """What a worker does: decode and show."""
    return _make(_reader(index.folder, index.storage), index, rows, asked, sampling)


def _make(
    stored: Stored,
    index: ShardIndex,
    rows: Sequence[Row],
    asked: Sequence[Request],
    sampling: Sampling,
) -> list[Sample]:
    vocabulary = _vocabulary(index) if sampling.candidates else None
    return [
        make_sample(
            stored,
            row,
            sampling,
            fps=index.fps,
            audio_hz=index.audio_hz,
            vocabulary=vocabulary,
            request=request,
        )
        for row, request in zip(rows, asked, strict=True)
    ]


def _vocabulary(index: ShardIndex) -> Vocabulary:
    path = index.folder / VOCABULARY
    return _load_vocabulary(path, path.stat().st_mtime_ns if path.exists() else 0)


@lru_cache(maxsize=2)
def _load_vocabulary(path: Path, changed: int) -> Vocabulary:
    return Vocabulary.load(path)


@lru_cache(maxsize=1)
def _reader(folder: Path, storage: Storage) -> ShardReader:
    torch.set_num_threads(1)
    return ShardReader(ShardIndex(folder, storage, []))
