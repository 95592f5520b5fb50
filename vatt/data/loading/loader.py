"""Requests -> arrays, in order: decoded by worker processes, or from memory where all fits.

The settings here change the speed of loading, never its result.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from queue import Full, Queue
from threading import Event, Thread
from types import TracebackType
from typing import Generic, Self, TypeVar

import numpy as np
import torch

from vatt.config import MachineParams
from vatt.data.clips.samples import INDEX, VOCABULARY, IndexRow
from vatt.data.clips.storage import Box, FrameStream, Storage
from vatt.data.clips.text import Vocabulary
from vatt.data.loading.arrays import Arrays, MemoryBlock, MemoryBlocks, attach, bytes_of
from vatt.data.loading.reader import (
    OPEN_SHARDS,
    WINDOW,
    BrokenSampleError,
    DecodedSample,
    SampleFacts,
    ShardCache,
    ShardIndex,
    ShardReader,
    decode_clips,
    extents,
    place,
)
from vatt.data.loading.sampling import (
    Broken,
    Request,
    SampleSource,
    SampleStore,
    Sampling,
    fill_all,
)
from vatt.data.workers import worker_pool
from vatt.errors import MachineError, SettingsError


@dataclass(frozen=True, slots=True)
class Loading:
    """Where samples are made and kept."""

    workers: int = 0
    cache_gb: float = 0.0  # decoded clips kept in memory
    prefetch_gb: float = 1.0  # batches made before they are asked for; one always is
    max_broken_share: float = 0.0  # more broken samples than this stop a training
    ledger: Path | None = None  # where broken samples are noted
    shards_url: str | None = None  # where shards lie that are not beside their index
    shard_cache: Path = Path()  # and where they are kept
    shard_cache_gb: float = 0.0

    @classmethod
    def of(cls, machine: MachineParams) -> Self:
        """As the settings want it."""
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


HERE = Loading()  # in this process, from local shards, no sample broken


def open_index(
    shards: Path, how: Loading, *, split: str, keys: Collection[str] | None = None
) -> ShardIndex:
    """The index of a split, and where its shards come from."""
    index = ShardIndex.load(shards, split=split, keys=keys)
    if how.shards_url is None:
        return index
    cache = ShardCache.of(
        how.shards_url, shards / INDEX, folder=how.shard_cache, gigabytes=how.shard_cache_gb
    )
    needed = largest(index.rows, OPEN_SHARDS + 1)
    if needed > cache.limit:
        raise SettingsError(
            f"machine.shard_cache_gb: {how.shard_cache_gb} holds too few shards: {OPEN_SHARDS} "
            "are read at a time",
            hint=f"raise it to {needed / 1e9 + 0.1:.1f} or more",
        )
    return replace(index, remote=cache)


def largest(rows: Sequence[IndexRow], count: int) -> int:
    """Bytes of the `count` largest shards."""
    ends: dict[str, int] = {}
    for shard, first, size in extents(rows):
        ends[shard] = max(ends.get(shard, 0), first + size)
    return sum(sorted(ends.values())[-count:])


T = TypeVar("T")


class Background(Generic[T]):
    """The items of a generator, made by a thread; what it raises comes out of the iteration."""

    def __init__(self, made: Iterator[T], *, ahead: int) -> None:
        self._made = made
        self._ready: Queue[tuple[T | None, BaseException | None]] = Queue(maxsize=ahead)
        self._stop = Event()
        self._thread = Thread(target=self._work, daemon=True, name="background")

    def _work(self) -> None:
        try:
            for item in self._made:
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
        close = getattr(self._made, "close", None)
        if close is not None:
            close()  # its worker processes end here


CHUNK = 16  # clips that a worker decodes at a time


class ClipCache:
    """Clips decoded once and kept, those of `order` at once; reads like the shards."""

    def __init__(
        self, index: ShardIndex, sampling: Sampling, order: Sequence[int], pool: Executor
    ) -> None:
        self._bare = replace(index, rows=[])
        self._wanted = (sampling.frames > 0, sampling.samples > 0)
        self._pool = pool
        self._clips: dict[str, DecodedSample | BrokenSampleError] = {}
        self._pending: dict[
            str, tuple[list[IndexRow], Future[list[DecodedSample | BrokenSampleError]]]
        ] = {}
        for first in range(0, len(order), CHUNK):
            self._submit([index.rows[number] for number in order[first : first + CHUNK]])

    def _submit(self, rows: list[IndexRow]) -> None:
        future = self._pool.submit(decode_rows, self._bare, rows, *self._wanted)
        self._pending.update((row.key, (rows, future)) for row in rows)

    def facts(self, row: IndexRow) -> SampleFacts:
        """Labels and captions."""
        return self._clip(row).facts

    def each_frame(self, row: IndexRow, indices: Sequence[int], box: Box) -> FrameStream:
        """The part of the frames in the box, each (H, W, C) with its place in `indices`."""
        video = self._clip(row).video
        assert video is not None
        top, left, height, width = box
        for number, index in enumerate(indices):
            yield number, video[index, top : top + height, left : left + width]

    def audio(self, row: IndexRow, first: int, last: int) -> np.ndarray:
        """(S,), fewer where the clip ends."""
        wave = self._clip(row).audio
        assert wave is not None
        return wave[max(first, 0) : last]

    def _clip(self, row: IndexRow) -> DecodedSample:
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
    index: ShardIndex, rows: Sequence[IndexRow], with_video: bool, with_audio: bool
) -> list[DecodedSample | BrokenSampleError]:
    """What a worker does."""
    reader = ShardReader(index)
    try:
        return decode_clips(reader, rows, with_video, with_audio)
    finally:
        reader.close()


LoadedBatch = tuple[list[Request], Arrays]
# Takes a request, its broken sample and why; returns what to show instead.
StandIn = Callable[[Request, BrokenSampleError], Request]

AHEAD = 16  # batches made before they are asked for, at most
CHUNK = 16  # clips that a worker shows at a time, at most


def load(
    index: ShardIndex,
    requests: Iterable[list[Request]],
    sampling: Sampling,
    how: Loading,
    *,
    first_needed: Iterable[int],
    stand_in: StandIn,
) -> Iterator[LoadedBatch]:
    """The arrays of each batch of requests, and the requests that they show in the end."""
    try:
        if decoded_bytes(index.rows, sampling) <= int(how.cache_gb * 1e9):
            yield from _from_memory(index, requests, sampling, how, first_needed, stand_in)
        else:
            yield from _from_shards(index, requests, sampling, how, stand_in)
    except BrokenProcessPool:
        raise MachineError(
            "a worker process died, perhaps for want of memory",
            hint="lower machine.workers, machine.prefetch_gb or machine.cache_gb",
        ) from None


def decoded_bytes(rows: Sequence[IndexRow], sampling: Sampling) -> int:
    """What the decoded clips take in memory."""
    frames = sum(row.num_frames * row.height * row.width * 3 for row in rows)
    samples = sum(row.num_samples * 2 for row in rows)
    return frames * (sampling.frames > 0) + samples * (sampling.samples > 0)


def _from_memory(
    index: ShardIndex,
    requests: Iterable[list[Request]],
    sampling: Sampling,
    how: Loading,
    first_needed: Iterable[int],
    stand_in: StandIn,
) -> Iterator[LoadedBatch]:
    """Decode every clip once, those needed first at first; then everything comes from memory."""
    order = list(dict.fromkeys(islice(first_needed, len(index.rows))))
    with worker_pool(how.workers, preload=["vatt.data.loading.reader"]) as pool:
        source = _source(
            ClipCache(index, sampling, order if how.workers else (), pool), index, sampling
        )

        blocks, shapes = MemoryBlocks(), sampling.shapes()

        def made() -> Iterator[LoadedBatch]:
            for asked in requests:
                _, memory = blocks.take(bytes_of(len(asked), shapes))
                arrays = Arrays.over(memory, len(asked), shapes)
                todo = list(range(len(asked)))
                while todo:
                    rows = [index.rows[asked[number].row] for number in todo]
                    wanted = [asked[number] for number in todo]
                    broken = fill_all(arrays, todo, rows, wanted, source, sampling)
                    for number, error in broken:
                        asked[number] = stand_in(asked[number], error)
                    todo = [number for number, _ in broken]
                yield asked, arrays

        if how.workers == 0:
            yield from made()
            return
        with Background(made(), ahead=2) as ready:
            yield from ready


@dataclass(slots=True)
class PendingBatch:
    """A batch in the making."""

    asked: list[Request]
    arrays: Arrays
    block: MemoryBlock  # where the arrays lie, for other processes
    parts: list[Future[list[Broken]]]


class Maker:
    """Decodes the windows that are asked for, each time anew, straight into their batch."""

    def __init__(self, index: ShardIndex, sampling: Sampling, how: Loading, pool: Executor) -> None:
        self._index, self._sampling, self._how, self._pool = index, sampling, how, pool
        self._blocks = MemoryBlocks()
        self._bare = replace(index, rows=[])
        self._reader, self._scout = ShardReader(index), ShardReader(index)

    def ahead(self, clips: int) -> int:
        """How many batches to make before they are asked for."""
        if self._how.workers == 0:
            return 0
        fitting = int(self._how.prefetch_gb * 1e9) // bytes_of(clips, self._sampling.shapes())
        return min(max(fitting, 1), AHEAD)

    def begin(self, asked: list[Request]) -> PendingBatch:
        """Have a batch made."""
        shapes, clips = self._sampling.shapes(), len(asked)
        block, memory = self._blocks.take(bytes_of(clips, shapes))
        job = PendingBatch(asked, Arrays.over(memory, clips, shapes), block, [])
        self._submit(job, list(range(clips)))
        return job

    def end(self, job: PendingBatch, stand_in: StandIn) -> LoadedBatch:
        """Wait for a batch; what is broken in it is made again from another sample."""
        while job.parts:
            broken = [entry for part in job.parts for entry in part.result()]
            job.parts.clear()
            for number, error in sorted(broken, key=lambda entry: entry[0]):
                job.asked[number] = stand_in(job.asked[number], error)
            self._submit(job, [number for number, _ in broken])
        return job.asked, job.arrays

    def announce(self, asked: Iterable[Request]) -> None:
        """Get near what is asked for soon."""
        self._scout.announce([self._index.rows[request.row] for request in asked])

    def stop(self) -> None:
        """End an announcement that is under way."""
        self._scout.stop()

    def close(self) -> None:
        """Close the shards."""
        self._reader.close()
        self._scout.close()

    def _submit(self, job: PendingBatch, numbers: list[int]) -> None:
        """Deal rows of a batch out to the workers, each to be read in sequence."""
        row_of = {number: self._index.rows[job.asked[number].row] for number in numbers}
        numbers = sorted(numbers, key=lambda number: place(row_of[number]))
        size = min(CHUNK, -(-len(numbers) // max(self._how.workers, 1)))
        for first in range(0, len(numbers), max(size, 1)):
            part = numbers[first : first + size]
            what = part, [row_of[n] for n in part], [job.asked[n] for n in part]
            if self._how.workers == 0:
                source = _source(self._reader, self._index, self._sampling)
                future = self._pool.submit(fill_all, job.arrays, *what, source, self._sampling)
            else:
                future = self._pool.submit(
                    show_in_worker, job.block, len(job.asked), *what, self._bare, self._sampling
                )
            job.parts.append(future)


def _from_shards(
    index: ShardIndex,
    requests: Iterable[list[Request]],
    sampling: Sampling,
    how: Loading,
    stand_in: StandIn,
) -> Iterator[LoadedBatch]:
    """Decode a few batches ahead, and let the disk or the network run further ahead."""
    waiting: deque[PendingBatch] = deque()
    with worker_pool(how.workers, preload=[__name__]) as pool, ThreadPoolExecutor(1) as helper:
        maker = Maker(index, sampling, how, pool)
        try:
            for asked in _announced(requests, lambda soon: helper.submit(maker.announce, soon)):
                waiting.append(maker.begin(asked))
                if len(waiting) > maker.ahead(len(asked)):
                    yield maker.end(waiting.popleft(), stand_in)
            while waiting:
                yield maker.end(waiting.popleft(), stand_in)
        finally:
            maker.stop()
            helper.shutdown(cancel_futures=True)
            maker.close()


def _announced(
    requests: Iterable[list[Request]], announce: Callable[[list[Request]], object]
) -> Iterator[list[Request]]:
    """The same batches, after each WINDOW of requests has been announced a WINDOW ahead."""
    before: list[list[Request]] = []
    soon: list[list[Request]] = []
    for asked in requests:
        soon.append(asked)
        if sum(map(len, soon)) >= WINDOW:
            announce([request for batch in soon for request in batch])
            yield from before
            before, soon = soon, []
    yield from before
    yield from soon


def show_in_worker(
    block: MemoryBlock,
    clips: int,
    numbers: Sequence[int],
    rows: Sequence[IndexRow],
    asked: Sequence[Request],
    index: ShardIndex,
    sampling: Sampling,
) -> list[Broken]:
    """What a worker does: decode and show, into memory that the parent reads."""
    arrays = Arrays.over(attach(block), clips, sampling.shapes())
    source = _source(_worker_reader(index.folder, index.storage, index.remote), index, sampling)
    return fill_all(arrays, numbers, rows, asked, source, sampling)


def _source(stored: SampleStore, index: ShardIndex, sampling: Sampling) -> SampleSource:
    path = sampling.vocabulary or index.folder / VOCABULARY
    vocabulary = None
    if sampling.candidates:
        changed = path.stat().st_mtime_ns if path.exists() else 0
        vocabulary = _load_vocabulary(path, changed)
    return SampleSource(stored, index.fps, index.audio_hz, vocabulary)


@lru_cache(maxsize=2)
def _load_vocabulary(path: Path, changed: int) -> Vocabulary:
    return Vocabulary.load(path)


@lru_cache(maxsize=1)
def _worker_reader(folder: Path, storage: Storage, remote: ShardCache | None) -> ShardReader:
    torch.set_num_threads(1)  # in a worker only: the parent trains with its own number
    return ShardReader(ShardIndex(folder, storage, [], remote))
