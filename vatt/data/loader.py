"""Requests -> arrays, in order: decoded by worker processes, from memory where all of it fits."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

import torch

from vatt.data.arrays import Arrays, Block, Blocks, attach, bytes_of
from vatt.data.background import Background
from vatt.data.loading import Loading
from vatt.data.memory import Memory
from vatt.data.order import WINDOW
from vatt.data.pool import worker_pool
from vatt.data.reader import BrokenSampleError, ShardIndex, ShardReader, place
from vatt.data.remote import ShardCache
from vatt.data.samples import VOCABULARY, Row
from vatt.data.sampling import Broken, Request, Sampling, Source, Stored, fill_all
from vatt.data.storage import Storage
from vatt.data.text import Vocabulary
from vatt.errors import MachineError

Loaded = tuple[list[Request], Arrays]
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
) -> Iterator[Loaded]:
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


def decoded_bytes(rows: Sequence[Row], sampling: Sampling) -> int:
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
) -> Iterator[Loaded]:
    """Decode every clip once, those needed first at first; then everything comes from memory."""
    order = list(dict.fromkeys(islice(first_needed, len(index.rows))))
    with worker_pool(how.workers, preload=["vatt.data.reader"]) as pool:
        source = _source(
            Memory(index, sampling, order if how.workers else (), pool), index, sampling
        )

        blocks, shapes = Blocks(), sampling.shapes()

        def made() -> Iterator[Loaded]:
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
class Job:
    """A batch in the making."""

    asked: list[Request]
    arrays: Arrays
    block: Block  # where the arrays lie, for other processes
    parts: list[Future[list[Broken]]]


class Maker:
    """Decodes the windows that are asked for, each time anew, straight into their batch."""

    def __init__(self, index: ShardIndex, sampling: Sampling, how: Loading, pool: Executor) -> None:
        self._index, self._sampling, self._how, self._pool = index, sampling, how, pool
        self._blocks = Blocks()
        self._bare = replace(index, rows=[])
        self._reader, self._scout = ShardReader(index), ShardReader(index)

    def ahead(self, clips: int) -> int:
        """How many batches to make before they are asked for."""
        if self._how.workers == 0:
            return 0
        fitting = int(self._how.prefetch_gb * 1e9) // bytes_of(clips, self._sampling.shapes())
        return min(max(fitting, 1), AHEAD)

    def begin(self, asked: list[Request]) -> Job:
        """Have a batch made."""
        shapes, clips = self._sampling.shapes(), len(asked)
        block, memory = self._blocks.take(bytes_of(clips, shapes))
        job = Job(asked, Arrays.over(memory, clips, shapes), block, [])
        self._submit(job, list(range(clips)))
        return job

    def end(self, job: Job, stand_in: StandIn) -> Loaded:
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

    def _submit(self, job: Job, numbers: list[int]) -> None:
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
) -> Iterator[Loaded]:
    """Decode a few batches ahead, and let the disk or the network run further ahead."""
    waiting: deque[Job] = deque()
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
    block: Block,
    clips: int,
    numbers: Sequence[int],
    rows: Sequence[Row],
    asked: Sequence[Request],
    index: ShardIndex,
    sampling: Sampling,
) -> list[Broken]:
    """What a worker does: decode and show, into memory that the parent reads."""
    arrays = Arrays.over(attach(block), clips, sampling.shapes())
    source = _source(_worker_reader(index.folder, index.storage, index.remote), index, sampling)
    return fill_all(arrays, numbers, rows, asked, source, sampling)


def _source(stored: Stored, index: ShardIndex, sampling: Sampling) -> Source:
    path = sampling.vocabulary or index.folder / VOCABULARY
    vocabulary = None
    if sampling.candidates:
        changed = path.stat().st_mtime_ns if path.exists() else 0
        vocabulary = _load_vocabulary(path, changed)
    return Source(stored, index.fps, index.audio_hz, vocabulary)


@lru_cache(maxsize=2)
def _load_vocabulary(path: Path, changed: int) -> Vocabulary:
    return Vocabulary.load(path)


@lru_cache(maxsize=1)
def _worker_reader(folder: Path, storage: Storage, remote: ShardCache | None) -> ShardReader:
    torch.set_num_threads(1)  # in a worker only: the parent trains with its own number
    return ShardReader(ShardIndex(folder, storage, [], remote))
