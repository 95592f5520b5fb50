"""Where work runs: in this process, in worker processes, or on a Ray cluster.

Worker processes end with their parent. The machines of a Ray cluster share a file system and have
the same vattctl installed. When a worker dies, as when memory runs out, what it worked on runs
again, alone: a task must give the same result each time, and write complete files or none.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from itertools import islice
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

from vatt.config import MachineParams
from vatt.errors import MachineError, redact_logs

P = ParamSpec("P")
T = TypeVar("T")


class InProcess(Executor):
    """An executor that does the work at once, in the calling process."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Do it now; the future raises its errors, as it does for a worker."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001  the future hands it on
            future.set_exception(error)
        return future


@contextmanager
def worker_pool(workers: int, *, preload: Sequence[str] = ()) -> Iterator[Executor]:
    """An executor of `workers` processes; 0: this one. On an error they are ended at once."""
    if workers == 0:
        yield InProcess()
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    others = multiprocessing.active_children()
    with _without_main():
        for _ in range(workers):
            pool.submit(os.getpid)  # starts a worker
    try:
        yield pool
    except BaseException:
        for worker in multiprocessing.active_children():
            if worker not in others:
                worker.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep workers from importing the main module: they do not need it, and it is slow."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end when it ends, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    redact_logs()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


R = TypeVar("R")
MOST_DEATHS = 8  # of workers that did only one thing; after more, the machine is at fault


class LostWorkerError(MachineError):
    """The process that worked on an item is dead."""


class Workers:
    """Calls a function on many items at once."""

    def __init__(self, start: Callable[[], Executor], *, ahead: int) -> None:
        self._start = start
        self._pool = start()
        self._ahead = ahead  # items taken before their results are needed
        self._deaths = 0

    def map(
        self,
        function: Callable[[T], R],
        items: Iterable[T],
        *,
        instead: Callable[[T], Iterable[T]] | None = None,
    ) -> Iterator[tuple[T, R]]:
        """Each item with its result, as they complete; items are taken as there is room.

        `instead` says what to do in place of an item on which a worker died while no other worked.
        """
        left = iter(items)
        waiting: dict[Future[R], T] = {}
        while True:
            for item in islice(left, max(self._ahead - len(waiting), 0)):
                waiting[self._submit(function, item)] = item
            if not waiting:
                return
            ended = wait(waiting, return_when=FIRST_COMPLETED).done
            if any(map(_is_lost, ended)):  # all others end, or are lost with it
                ended = set(waiting)
            lost = []
            for future in ended:
                item = waiting.pop(future)
                if _is_lost(future):
                    lost.append(item)
                else:
                    yield item, future.result()
            if lost:
                yield from self._one_by_one(function, lost, instead)

    def _submit(self, function: Callable[[T], R], item: T) -> "Future[R]":
        try:
            return self._pool.submit(function, item)
        except BrokenProcessPool as error:
            future: Future[R] = Future()
            future.set_exception(error)
            return future

    def _one_by_one(
        self,
        function: Callable[[T], R],
        items: Iterable[T],
        instead: Callable[[T], Iterable[T]] | None,
    ) -> Iterator[tuple[T, R]]:
        """Do what was lost again, each item while no other worker needs memory."""
        left = deque(items)
        self._restart()
        while left:
            item = left.popleft()
            future = self._submit(function, item)
            if not _is_lost(future):
                yield item, future.result()
                continue
            self._deaths += 1
            if instead is None or self._deaths > MOST_DEATHS:
                error = future.exception()
                if isinstance(error, LostWorkerError):
                    raise error  # the cluster's, which says more
                raise LostWorkerError(
                    "a worker process died, perhaps because memory ran out",
                    hint="lower machine.workers and run it again: what is finished is kept",
                )
            left.extendleft(reversed(list(instead(item))))
            self._restart()

    def _restart(self) -> None:
        """Start new workers once the old ones have ended, which may hold memory and files."""
        self._pool.shutdown()
        self._pool = self._start()


def _is_lost(future: "Future[Any]") -> bool:
    """Whether the worker died; waits for the end."""
    return isinstance(future.exception(), BrokenProcessPool | LostWorkerError)


@contextmanager
def start_workers(
    machine: MachineParams, *, most: int | None = None, preload: Sequence[str] = ()
) -> Iterator[Workers]:
    """The workers of the settings, at most `most`; on an error they are ended at once."""
    if machine.executor == "ray":
        with cluster(machine.ray_address) as (executor, cores):
            yield Workers(lambda: executor, ahead=2 * cores)
        return
    count = machine.workers if most is None else min(machine.workers, most)
    with ExitStack() as pools:

        def start() -> Executor:
            return pools.enter_context(worker_pool(count, preload=preload))

        yield Workers(start, ahead=2 * count or 1)


PATIENCE = 10.0  # seconds
RETRIES = 5  # a task that loses more workers is itself the cause


class RayExecutor(Executor):
    """The standard interface, with a cluster behind it."""

    def __init__(self) -> None:
        import ray

        self._run = ray.remote(num_cpus=1, max_retries=RETRIES)(_call)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Send it to the cluster."""
        result: Future[T] = Future()
        result.set_running_or_notify_cancel()
        running: Future[T] = self._run.remote(fn, args, kwargs).future()
        running.add_done_callback(lambda done: _hand_on(done, result))
        return result


def _call(function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    return function(*args, **kwargs)


def _hand_on(done: "Future[T]", result: "Future[T]") -> None:
    """Pass on the result, or the error as one of ours."""
    from ray.exceptions import RayError, RayTaskError

    error = done.exception()
    if error is None:
        result.set_result(done.result())
    elif isinstance(error, RayTaskError):
        result.set_exception(error.cause)  # what the function raised there
    elif isinstance(error, RayError):
        problem = f"the cluster lost a task {RETRIES} times: {type(error).__name__}"
        hint = "look at `ray status`, and run it again: what is finished is kept"
        result.set_exception(LostWorkerError(problem, hint=hint))
    else:
        result.set_exception(error)


def _reach(address: str | None) -> None:
    """Try to connect first: Ray itself waits for minutes where nothing answers."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()


@contextmanager
def cluster(address: str | None) -> Iterator[tuple[Executor, int]]:
    """Join a cluster; yields its executor and its cores. Without an address one starts here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise MachineError(
            "machine.executor is ray, which is not installed",
            hint="pip install 'vattctl[ray]' on every machine, or set machine.executor to local",
        ) from None
    try:
        _reach(address)
        handler = signal.getsignal(signal.SIGTERM)
        ray.init(
            address=address,
            log_to_driver=False,
            include_dashboard=False,
            logging_level="warning",
        )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # ours, which ray.init replaces
    except (OSError, ValueError, RuntimeError) as error:
        raise MachineError(
            f"no Ray cluster at {address}: {str(error).splitlines()[0]}",
            hint="start one by `ray start --head`, and set machine.ray_address to the address "
            "that it prints",
        ) from None
    try:
        yield RayExecutor(), max(int(ray.cluster_resources().get("CPU", 1)), 1)
    finally:
        ray.shutdown()  # ends what is still running for us
