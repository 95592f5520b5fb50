"""Metrics on their way out: collected, sent in batches by a thread, no step twice."""

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

SECONDS = 5.0  # between two batches
LARGEST_BATCH = 1000  # MLflow's limit


@dataclass(frozen=True, slots=True)
class Measured:
    """One value of one metric."""

    name: str
    value: float
    milliseconds: int  # since 1970
    step: int


class MetricLog:
    """The metrics of one run; `send` stores some and says whether it could."""

    def __init__(self, send: Callable[[list[Measured]], bool], stored: dict[str, int]) -> None:
        self._send = send
        self._stored = stored  # the last step that is stored, by metric
        self._waiting: list[Measured] = []
        self._guard = threading.Lock()
        self._sender = ThreadPoolExecutor(max_workers=1)
        self._sent = time.monotonic()

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Note a step's metrics, unless the run has them from before an interruption."""
        now = int(time.time() * 1000)
        fresh = [
            Measured(name, value, now, step)
            for name, value in metrics.items()
            if step > self._stored.get(name, -1) and math.isfinite(value)
        ]
        self._stored |= {one.name: step for one in fresh}
        with self._guard:
            self._waiting += fresh
        if time.monotonic() - self._sent > SECONDS:
            self._sent = time.monotonic()
            self._sender.submit(self._send_waiting)

    def flush(self) -> None:
        """Return when all metrics are stored, or the store is found to be away."""
        self._sender.submit(self._send_waiting).result()

    def close(self) -> None:
        """Store what is left."""
        self.flush()
        self._sender.shutdown()

    def _send_waiting(self) -> None:
        with self._guard:
            batch, self._waiting = self._waiting, []
        for start in range(0, len(batch), LARGEST_BATCH):
            if not self._send(batch[start : start + LARGEST_BATCH]):
                with self._guard:
                    self._waiting = batch[start:] + self._waiting
                return
