"""Requests to stop (queues send SIGTERM or SIGUSR1): noticed at once, obeyed at a step's end."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Truthy once this process was asked to stop, or has lost the one that started it."""

    def __init__(self) -> None:
        self.asked = False
        self.parent = os.getppid()

    def __bool__(self) -> bool:
        return self.asked or os.getppid() != self.parent

    def note(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: remember, so that the running step can end."""
        self.asked = True


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn the stop signals into a flag while the body runs."""
    request = StopRequest()
    before = {number: signal.signal(number, request.note) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
