"""Where work runs: in this process, in worker processes, or on a Ray cluster.

Worker processes end with their parent. The machines of a Ray cluster share a file system and have
the same vattctl installed. When a worker is lost, its task runs again elsewhere: a task must give
the same result each time, and write complete files or none.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
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


class Workers:
    """Calls a function on many items at once."""

    def __init__(self, pool: Executor, *, ahead: int) -> None:
        self._pool = pool
        self._ahead = ahead  # items taken before their results are needed

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
        """Each item with its result, as they complete; items are taken as there is room."""
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
                "a worker process died, perhaps because memory ran out",
                hint="lower machine.workers and run it again: what is finished is kept",
            ) from None


@contextmanager
def start_workers(
    machine: MachineParams, *, most: int | None = None, preload: Sequence[str] = ()
) -> Iterator[Workers]:
    """The workers of the settings, at most `most`; on an error they are ended at once."""
    if machine.executor == "ray":
        with cluster(machine.ray_address) as (pool, cores):
            yield Workers(pool, ahead=2 * cores)
    else:
        count = machine.workers if most is None else min(machine.workers, most)
        with worker_pool(count, preload=preload) as pool:
            yield Workers(pool, ahead=2 * count or 1)


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
        result.set_exception(MachineError(problem, hint=hint))
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
