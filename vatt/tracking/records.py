"""The record of a run next to its results, and the queue of metrics on their way to MLflow."""

import json
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from vatt import process
from vatt.errors import redact
from vatt.files import UNREADABLE, atomic_write

SECONDS = 5.0  # between two batches
SILENT_SECONDS = 60.0  # before a store that was away is tried again
UNSENT = "unsent"  # in the folder of records

log = logging.getLogger(__name__)
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

    def close(self) -> list[MetricValue]:
        """Store what is left; returns what the store does not take."""
        self.flush()
        self._sender.shutdown()
        return self._waiting

    def _send_waiting(self) -> None:
        with self._guard:
            batch, self._waiting = self._waiting, []
        for start in range(0, len(batch), LARGEST_BATCH):
            if not self._send(batch[start : start + LARGEST_BATCH]):
                with self._guard:
                    self._waiting = batch[start:] + self._waiting
                return


class Line:
    """Calls to a store; while it is away, none is tried for a while, and nothing fails."""

    def __init__(self, is_away: Callable[[Exception], bool]) -> None:
        self._is_away = is_away
        self._silent_until = 0.0

    def try_again(self) -> None:
        """End the silence."""
        self._silent_until = 0.0

    def attempt(self, call: Callable[..., Any], *arguments: Any) -> bool:
        """Whether the store answered."""
        if time.monotonic() < self._silent_until:
            return False
        try:
            call(*arguments)
        except Exception as error:  # of many libraries; `is_away` knows them
            if not self._is_away(error):
                raise
            log.warning("MLflow does not answer; the run goes on: %s", first_line(error))
            self._silent_until = time.monotonic() + SILENT_SECONDS
            return False
        return True


def first_line(error: Exception) -> str:
    """The beginning of a message that may be long."""
    return redact(str(error)).partition("\n")[0][:200]


@dataclass(frozen=True, slots=True)
class Unsent:
    """What a store has not got of a run; a file keeps it until the store answers."""

    run_id: str
    metrics: list[MetricValue]
    tags: dict[str, str]
    status: str

    def keep(self, runs: Path) -> Path:
        """Write the file, next to the records."""
        with atomic_write(self._file(runs)) as path:
            path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        return self._file(runs)

    def forget(self, runs: Path) -> None:
        """The store has it now."""
        self._file(runs).unlink(missing_ok=True)

    @classmethod
    def kept_in(cls, runs: Path) -> list[Self]:
        """All that is kept; an unreadable file is left out."""
        found = []
        for file in sorted((runs / UNSENT).glob("*.json")):
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
                metrics = [MetricValue(**one) for one in content.pop("metrics")]
                found.append(cls(metrics=metrics, **content))
            except UNREADABLE:
                log.warning("%s cannot be read; it is left there", file)
        return found

    def _file(self, runs: Path) -> Path:
        return runs / UNSENT / f"{self.run_id}.json"


_KINDS: dict[str, tuple[type, ...]] = {
    "stage": (str,), "run_id": (str,), "stage_hash": (str,), "status": (str,), "starts": (int,),
    "seconds": (int, float),
}  # fmt: skip


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
            is_sound = all(isinstance(facts[name], kinds) for name, kinds in _KINDS.items())
        except UNREADABLE:
            is_sound = False
        return cls(path, facts if is_sound else {})

    def unfinished(self, stage_hash: str) -> str | None:
        """The run that a start with this hash continues."""
        same = self.facts.get("stage_hash") == stage_hash
        return self.facts.get("run_id") if same and self.facts["status"] != "FINISHED" else None

    def begin(self, stage: str, run_id: str, stage_hash: str, *, device: str, devices: int) -> None:
        """Note that this process works on the run, with the kind and number of its devices."""
        if not run_id or run_id != self.facts.get("run_id"):
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
