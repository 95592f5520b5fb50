"""Where work runs: in this process, in worker processes, or on a Ray cluster."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

from vatt.config import MachineParams
from vatt.data.pool import worker_pool
from vatt.errors import MachineError

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """Calls a function on many items at once."""

    def __init__(self, pool: Executor, *, ahead: int) -> None:
        self._pool = pool
        self._ahead = ahead  # items taken before their results are asked for

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
        """Each item and its result, as they come; items are taken when there is room for them."""
        left = iter(items)
        waiting: dict[Future[R], T] = {}
        try:
            while True:
                for item in islice(left, max(self._ahead - len(waiting), 0)):
                    waiting[self._pool.submit(function, item)] = item
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool:
            raise MachineError(
                "a worker process died, perhaps for want of memory",
                hint="lower machine.workers and run it again: what is finished is kept",
            ) from None


@contextmanager
def start_workers(
    machine: MachineParams, *, most: int | None = None, preload: Sequence[str] = ()
) -> Iterator[Workers]:
    """The workers that the settings name, at most so many; on an error they are ended at once."""
    if machine.executor == "ray":
        from vatt.data.executor_ray import cluster  # an extra: not everybody has it

        with cluster(machine.ray_address) as (pool, cores):
            yield Workers(pool, ahead=2 * cores)
    else:
        count = machine.workers if most is None else min(machine.workers, most)
        with worker_pool(count, preload=preload) as pool:
            yield Workers(pool, ahead=2 * count or 1)
