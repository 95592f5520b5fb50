"""Requests -> arrays, in order: decoded by worker processes, or once and then kept in memory.

The settings here change the speed of loading, never its result.
"""

import mmap
import os
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from queue import Full, Queue
from threading import Event, Thread
from types import TracebackType
from typing import Generic, Self, TypeVar

import numpy as np
import torch

from vatt.config import MachineParams
from vatt.data.clips.manifest import Caption
from vatt.data.clips.samples import INDEX, VOCABULARY, IndexRow
from vatt.data.clips.storage import Box, FrameStream, Storage
from vatt.data.clips.text import Vocabulary
from vatt.data.loading.reader import (
    OPEN_SHARDS,
    WINDOW,
    BrokenSampleError,
    DecodedSample,
    ShardCache,
    ShardIndex,
    ShardReader,
    decode_samples,
    extents,
    place,
)
from vatt.data.loading.sampling import (
    Arrays,
    Request,
    Requests,
    Sampling,
    bytes_of,
    fill_all,
)
from vatt.data.workers import worker_pool
from vatt.errors import MachineError, SettingsError
from vatt.senses import SENSES
from vatt.senses.form import SampleSource, SampleStore, SamplingLike

AHEAD = 16  # batches made before they are needed, at most
CHUNK = 16  # samples that a worker decodes at a time, at most


@dataclass(frozen=True, slots=True)
class Loading:
    """Where samples are decoded and kept."""

    workers: int = 0
    cache_gb: float = 0.0  # decoded samples kept in memory
    prefetch_gb: float = 1.0  # batches made before they are needed; one always is
    max_broken_share: float = 0.0  # more broken samples than this stop a training
    ledger: Path | None = None  # lists broken samples
    shards_url: str | None = None  # of the shards that are not next to their index
    shard_cache: Path = Path()  # the folder that keeps them
    shard_cache_gb: float = 0.0

    @classmethod
    def of(cls, machine: MachineParams) -> Self:
        """From the settings."""
        return cls(
            workers=machine.workers,
            cache_gb=machine.cache_gb,
            prefetch_gb=machine.prefetch_gb,
            max_broken_share=machine.max_broken_share,
            ledger=machine.load_ledger,
            shards_url=machine.shards_url,
            shard_cache=machine.shard_cache,
            shard_cache_gb=machine.shard_cache_gb,
        )


HERE = Loading()  # in this process, from local shards, without a broken sample


def open_index(
    shards: Path, loading: Loading, *, split: str, keys: Collection[str] | None = None
) -> ShardIndex:
    """The index of a split, or of the samples `keys` in it, and where its shards come from."""
    index = ShardIndex.load(shards, split=split, keys=keys)
    if loading.shards_url is None:
        return index
    cache = ShardCache.of(
        loading.shards_url,
        shards / INDEX,
        folder=loading.shard_cache,
        gigabytes=loading.shard_cache_gb,
    )
    needed = largest(index.rows, OPEN_SHARDS + 1)
    if needed > cache.limit:
        raise SettingsError(
            f"machine.shard_cache_gb: {loading.shard_cache_gb} is too small: it must hold the "
            f"{OPEN_SHARDS} shards that are read at a time",
            hint=f"raise it to {needed / 1e9 + 0.1:.1f} or more",
        )
    return replace(index, remote=cache)


def largest(rows: Sequence[IndexRow], count: int) -> int:
    """Bytes of the `count` largest shards."""
    ends: dict[str, int] = {}
    for shard, first, size in extents(rows):
        ends[shard] = max(ends.get(shard, 0), first + size)
    return sum(sorted(ends.values())[-count:])


LoadedBatch = tuple[list[Request], Arrays]
# Takes the request for a broken sample and the reason; returns the request to fill instead.
Replacement = Callable[[Request, BrokenSampleError], Request]


def load(
    index: ShardIndex,
    batches: Iterable[list[Request]],
    sampling: Sampling,
    loading: Loading,
    *,
    first_needed: Iterable[IndexRow],
    replacement: Replacement,
) -> Iterator[LoadedBatch]:
    """The arrays of each batch of requests, and the requests that they show in the end."""
    try:
        if decoded_bytes(index.rows, sampling) <= int(loading.cache_gb * 1e9):
            order = list({row.key: row for row in islice(first_needed, len(index.rows))}.values())
            yield from _from_memory(index, batches, sampling, loading.workers, order, replacement)
        else:
            yield from _from_shards(index, batches, sampling, loading, replacement)
    except BrokenProcessPool:
        raise MachineError(
            "a worker process died, perhaps because memory ran out",
            hint="lower machine.workers, machine.prefetch_gb or machine.cache_gb",
        ) from None


def decoded_bytes(rows: Sequence[IndexRow], sampling: Sampling) -> int:
    """The memory that the decoded samples need."""
    frames = sum(row.num_frames * row.height * row.width * 3 for row in rows)
    samples = sum(row.num_samples * 2 for row in rows)
    more = sum(
        SENSES[name].decoded_bytes(row.senses[name])
        for row in rows
        for name in sampling.more
        if name in row.senses
    )
    return frames * (sampling.frames > 0) + samples * (sampling.samples > 0) + more


def _source(stored: SampleStore, index: ShardIndex, sampling: Sampling) -> SampleSource:
    path = sampling.vocabulary or index.folder / VOCABULARY
    vocabulary = None
    if sampling.candidates:
        changed = path.stat().st_mtime_ns if path.exists() else 0
        vocabulary = _load_vocabulary(path, changed)
    return SampleSource(stored, index.storage, sampling, vocabulary)


@lru_cache(maxsize=2)
def _load_vocabulary(path: Path, changed: int) -> Vocabulary:
    return Vocabulary.load(path)


# --- from the shards: decoded each time, by workers, straight into the batch ----------------------


def _from_shards(
    index: ShardIndex,
    batches: Iterable[list[Request]],
    sampling: Sampling,
    loading: Loading,
    replacement: Replacement,
) -> Iterator[LoadedBatch]:
    """Decode a few batches ahead, and let the disk or the network run further ahead."""
    pending: deque[PendingBatch] = deque()
    with worker_pool(loading.workers, preload=[__name__]) as pool, ThreadPoolExecutor(1) as helper:
        maker = BatchMaker(index, sampling, loading, pool)
        try:
            for requests in _announced(batches, lambda soon: helper.submit(maker.announce, soon)):
                pending.append(maker.begin(requests))
                if len(pending) > maker.ahead(len(requests)):
                    yield maker.end(pending.popleft(), replacement)
            while pending:
                yield maker.end(pending.popleft(), replacement)
        finally:
            maker.stop()
            helper.shutdown(cancel_futures=True)
            maker.close()


def _announced(
    batches: Iterable[list[Request]], announce: Callable[[list[Request]], object]
) -> Iterator[list[Request]]:
    """The same batches; each WINDOW of requests is announced a WINDOW before it is needed."""
    before: list[list[Request]] = []
    soon: list[list[Request]] = []
    for requests in batches:
        soon.append(requests)
        if sum(map(len, soon)) >= WINDOW:
            announce([request for batch in soon for request in batch])
            yield from before
            before, soon = soon, []
    yield from before
    yield from soon


@dataclass(slots=True)
class PendingBatch:
    """A batch that is being made."""

    requests: list[Request]
    arrays: Arrays
    block: "MemoryBlock"  # the memory of the arrays, for other processes
    parts: list[Future[dict[int, BrokenSampleError]]]


class BatchMaker:
    """Decodes only the windows that are requested, straight into the memory of their batch."""

    def __init__(
        self, index: ShardIndex, sampling: Sampling, loading: Loading, pool: Executor
    ) -> None:
        self._sampling, self._loading, self._pool = sampling, loading, pool
        self._blocks = MemoryBlocks()
        self._index = replace(index, rows=[])  # requests carry their rows
        self._reader, self._scout = ShardReader(index), ShardReader(index)

    def ahead(self, clips: int) -> int:
        """How many batches to make before they are needed."""
        if self._loading.workers == 0:
            return 0
        size = bytes_of(clips, self._sampling.shapes())
        return min(max(int(self._loading.prefetch_gb * 1e9) // size, 1), AHEAD)

    def begin(self, requests: list[Request]) -> PendingBatch:
        """Start a batch."""
        block, arrays = self._blocks.arrays(len(requests), self._sampling)
        batch = PendingBatch(requests, arrays, block, [])
        self._submit(batch, range(len(requests)))
        return batch

    def end(self, batch: PendingBatch, replacement: Replacement) -> LoadedBatch:
        """Wait for a batch; broken samples in it are replaced."""
        while batch.parts:
            broken = {number: e for part in batch.parts for number, e in part.result().items()}
            batch.parts.clear()
            for number in sorted(broken):
                batch.requests[number] = replacement(batch.requests[number], broken[number])
            self._submit(batch, broken)
        return batch.requests, batch.arrays

    def announce(self, requests: Iterable[Request]) -> None:
        """Have the disk or the network prepare what is needed soon."""
        self._scout.announce([request.row for request in requests])

    def stop(self) -> None:
        """End an announcement that is running."""
        self._scout.stop()

    def close(self) -> None:
        """Close the shards."""
        self._reader.close()
        self._scout.close()

    def _submit(self, batch: PendingBatch, numbers: Iterable[int]) -> None:
        """Deal rows of a batch out to the workers; each reads its shards from front to back."""
        numbers = sorted(numbers, key=lambda number: place(batch.requests[number].row))
        size = min(CHUNK, -(-len(numbers) // max(self._loading.workers, 1)))
        for first in range(0, len(numbers), max(size, 1)):
            part = {number: batch.requests[number] for number in numbers[first : first + size]}
            if self._loading.workers == 0:
                source = _source(self._reader, self._index, self._sampling)
                future = self._pool.submit(fill_all, batch.arrays, part, source)
            else:
                clips = len(batch.requests)
                future = self._pool.submit(
                    _fill_in_worker, batch.block, clips, part, self._index, self._sampling
                )
            batch.parts.append(future)


def _fill_in_worker(
    block: "MemoryBlock", clips: int, requests: Requests, index: ShardIndex, sampling: Sampling
) -> dict[int, BrokenSampleError]:
    """Fill rows of a batch whose memory the main process reads."""
    arrays = Arrays.over(attach(block), clips, sampling.shapes())
    reader = _worker_reader(index.folder, index.storage, index.remote)
    return fill_all(arrays, requests, _source(reader, index, sampling))


@lru_cache(maxsize=1)
def _worker_reader(folder: Path, storage: Storage, remote: ShardCache | None) -> ShardReader:
    torch.set_num_threads(1)  # in a worker only: the main process trains with its own number
    return ShardReader(ShardIndex(folder, storage, [], remote))


@dataclass(frozen=True, slots=True)
class MemoryBlock:
    """Shared memory, by the name under which another process of this machine can open it."""

    path: str
    number: int  # a path may be used again, a number is not
    size: int


class MemoryBlocks:
    """Shared memory that is used again once the last array over it is gone."""

    def __init__(self) -> None:
        self._free: list[tuple[MemoryBlock, mmap.mmap]] = []
        self._numbers = count()

    def arrays(self, clips: int, sampling: SamplingLike) -> tuple[MemoryBlock, Arrays]:
        """The arrays of a batch, and the block that they lie in."""
        shapes = sampling.shapes()
        block, memory = self.take(bytes_of(clips, shapes))
        return block, Arrays.over(memory, clips, shapes)

    def take(self, size: int) -> tuple[MemoryBlock, np.ndarray]:
        """Memory of at least `size` bytes; it stays taken as long as a view of the array lives."""
        fitting = next((entry for entry in self._free if entry[0].size >= size), None)
        if fitting is not None:
            self._free.remove(fitting)
        block, memory = fitting or self._make(size)
        # A new array each time: it lives as long as any tensor that was made from it.
        array = np.frombuffer(memory, np.uint8)
        weakref.finalize(array, self._free.append, (block, memory)).atexit = False
        return block, array

    def _make(self, size: int) -> tuple[MemoryBlock, mmap.mmap]:
        if hasattr(os, "memfd_create"):  # needs no /dev/shm, which is small in containers
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


# --- from memory: decoded once --------------------------------------------------------------------


def _from_memory(
    index: ShardIndex,
    batches: Iterable[list[Request]],
    sampling: Sampling,
    workers: int,
    order: Sequence[IndexRow],
    replacement: Replacement,
) -> Iterator[LoadedBatch]:
    """Decode every sample once, in `order`; then everything comes from memory."""
    with worker_pool(workers, preload=["vatt.data.loading.reader"]) as pool:
        cache = SampleCache(index, sampling, pool)
        cache.decode(order if workers else ())
        filled = _filled(batches, _source(cache, index, sampling), replacement)
        try:
            if workers == 0:
                yield from filled
                return
            with Background(filled, ahead=2) as ready:
                yield from ready
        finally:
            cache.close()


def _filled(
    batches: Iterable[list[Request]], source: SampleSource, replacement: Replacement
) -> Iterator[LoadedBatch]:
    blocks = MemoryBlocks()
    for requests in batches:
        _, arrays = blocks.arrays(len(requests), source.sampling)
        missing = dict(enumerate(requests))
        while missing:
            broken = fill_all(arrays, missing, source)
            missing = {number: replacement(missing[number], broken[number]) for number in broken}
            for number, request in missing.items():
                requests[number] = request
        yield requests, arrays


class SampleCache:
    """Samples that are decoded once and kept; reads like the shards."""

    def __init__(self, index: ShardIndex, sampling: Sampling, pool: Executor) -> None:
        self._index = replace(index, rows=[])
        self._reader = ShardReader(self._index)
        self._wanted = _wanted(sampling)
        self._pool = pool
        self._samples: dict[str, DecodedSample | None] = {}  # None: broken somewhere
        self._pending: dict[str, tuple[Sequence[IndexRow], Future[list[DecodedSample | None]]]] = {}

    def decode(self, rows: Sequence[IndexRow]) -> None:
        """Start to decode samples, a chunk at a time."""
        for first in range(0, len(rows), CHUNK):
            chunk = rows[first : first + CHUNK]
            future = self._pool.submit(_decode_in_worker, self._index, chunk, self._wanted)
            self._pending.update((row.key, (chunk, future)) for row in chunk)

    def captions(self, row: IndexRow) -> tuple[Caption, ...]:
        """The captions; their times count from the start of the sample."""
        sample = self._sample(row)
        if sample is None or sample.captions is None:
            return self._reader.captions(row)
        return sample.captions

    def each_frame(self, row: IndexRow, indices: Sequence[int], box: Box) -> FrameStream:
        """The part of the frames in the box, each (H, W, C) with its place in `indices`."""
        sample = self._sample(row)
        if sample is None or sample.video is None:
            yield from self._reader.each_frame(row, indices, box)
            return
        top, left, height, width = box
        for number, index in enumerate(indices):
            yield number, sample.video[index, top : top + height, left : left + width]

    def audio(self, row: IndexRow, first: int, last: int) -> np.ndarray:
        """(S,), shorter where the clip ends."""
        sample = self._sample(row)
        if sample is None or sample.audio is None:
            return self._reader.audio(row, first, last)
        return sample.audio[max(first, 0) : last]

    def signal(self, row: IndexRow, name: str) -> np.ndarray:
        """All that is stored of a sense with a member of its own."""
        sample = self._sample(row)
        if sample is None or name not in sample.signals:
            return self._reader.signal(row, name)
        return sample.signals[name]

    def close(self) -> None:
        """Close the shards."""
        self._reader.close()

    def _sample(self, row: IndexRow) -> DecodedSample | None:
        """A decoded sample; None if a part is broken: then the reader reads the other parts."""
        if row.key not in self._samples:
            if row.key not in self._pending:
                self.decode([row])
            rows, future = self._pending[row.key]
            for done, sample in zip(rows, future.result(), strict=True):
                self._samples[done.key] = sample
                del self._pending[done.key]
        return self._samples[row.key]


def _wanted(sampling: Sampling) -> set[str]:
    """The senses that are read."""
    shapes = sampling.shapes()
    return {name for name in SENSES if name in shapes and 0 not in shapes[name][0]}


def _decode_in_worker(
    index: ShardIndex, rows: Sequence[IndexRow], wanted: Collection[str]
) -> list[DecodedSample | None]:
    reader = ShardReader(index)
    try:
        return decode_samples(reader, rows, wanted)
    finally:
        reader.close()


T = TypeVar("T")


class Background(Generic[T]):
    """The items of an iterator, made by a thread; an error of it is raised to whoever iterates."""

    def __init__(self, items: Iterator[T], *, ahead: int) -> None:
        self._items = items
        self._ready: Queue[tuple[T | None, BaseException | None]] = Queue(maxsize=ahead)
        self._stop = Event()
        self._thread = Thread(target=self._work, daemon=True, name="background")

    def _work(self) -> None:
        try:
            for item in self._items:
                self._put(item, None)
                if self._stop.is_set():
                    return
            self._put(None, StopIteration())
        except BaseException as error:  # noqa: BLE001  raised in the thread that waits
            self._put(None, error)

    def _put(self, item: T | None, error: BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put((item, error), timeout=0.1)
            except Full:
                continue
            return

    def __iter__(self) -> Iterator[T]:
        while True:
            item, error = self._ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        close = getattr(self._items, "close", None)
        if close is not None:
            close()  # its worker processes end here
