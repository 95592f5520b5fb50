"""The record of a run next to its results, and the queue of metrics on their way to MLflow."""

import json
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from vatt import process
from vatt.files import atomic_write

SECONDS = 5.0  # between two batches
LARGEST_BATCH = 1000  # MLflow's limit


@dataclass(frozen=True, slots=True)
class MetricValue:
    """One value of one metric."""

    name: str
    value: float
    milliseconds: int  # since 1970
    step: int


class MetricLog:
    """The metrics of one run; `send` stores some and says whether it could."""

    def __init__(self, send: Callable[[list[MetricValue]], bool], stored: dict[str, int]) -> None:
        self._send = send
        self._stored = stored  # the last step that is stored, by metric
        self._waiting: list[MetricValue] = []
        self._guard = threading.Lock()
        self._sender = ThreadPoolExecutor(max_workers=1)
        self._sent = time.monotonic()

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Note a step's metrics, unless the run has them from before an interruption."""
        now = int(time.time() * 1000)
        fresh = [
            MetricValue(name, value, now, step)
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


class Record:
    """The facts of one file; an unreadable one counts as empty."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        self._clock = self._metered = time.monotonic()

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record as it stands."""
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            facts = {}
        return cls(path, facts if isinstance(facts, dict) else {})

    def unfinished(self, stage_hash: str) -> str | None:
        """The run that a start with this hash continues."""
        same = self.facts.get("stage_hash") == stage_hash
        return self.facts.get("run_id") if same and self.facts["status"] != "FINISHED" else None

    def begin(self, stage: str, run_id: str, stage_hash: str, *, device: str, devices: int) -> None:
        """Note that this process works on the run, with the kind and number of its devices."""
        if run_id != self.facts.get("run_id"):
            self.facts = {"stage": stage, "run_id": run_id, "stage_hash": stage_hash}
            self.facts |= {"began": _now(), "starts": 0, "seconds": 0.0}
        self._write(
            status="RUNNING",
            process=process.myself(),
            starts=self.facts["starts"] + 1,
            ended=None,
            device=device,
            devices=devices,
        )

    def drew(self, watts: float) -> None:
        """Note the mean power of all devices since the last time, or since the start."""
        now = time.monotonic()
        joules = watts * (now - self._metered)
        self.facts["kwh"] = self.facts.get("kwh", 0.0) + joules / 3.6e6
        self._metered = now

    def end(self, status: str) -> None:
        """Note how it went; `seconds` is the sum over the starts that ended by themselves."""
        seconds = self.facts["seconds"] + time.monotonic() - self._clock
        self._write(status=status, ended=_now(), seconds=round(seconds, 3))

    def bury(self) -> None:
        """Mark a running record as KILLED when its process is gone."""
        running = self.facts.get("status") == "RUNNING"
        if running and process.is_dead(self.facts.get("process", "")):
            self._write(status="KILLED")

    def _write(self, **facts: Any) -> None:
        self.facts |= facts
        with atomic_write(self.path) as path:
            path.write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
