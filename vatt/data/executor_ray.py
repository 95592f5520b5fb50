"""Work on a Ray cluster, whose machines share a file system and have the same vattctl installed.

A task whose worker or machine is lost is done again elsewhere: tasks must give the same result, and
write whole files or none.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from vatt.errors import MachineError

PATIENCE = 10.0  # seconds
RETRIES = 5  # a task that loses more workers than that is itself the reason

P = ParamSpec("P")
T = TypeVar("T")


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
    """Give the result or what went wrong, in our own words."""
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
    """Knock at the door: Ray itself waits for minutes where nobody answers."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()


@contextmanager
def cluster(address: str | None) -> Iterator[tuple[Executor, int]]:
    """Join a cluster; also how many cores it has. Without an address one is started here."""
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
            hint="start one by `ray start --head`, and set machine.ray_address to what it says",
        ) from None
    try:
        yield RayExecutor(), max(int(ray.cluster_resources().get("CPU", 1)), 1)
    finally:
        ray.shutdown()  # ends what is still running for us
