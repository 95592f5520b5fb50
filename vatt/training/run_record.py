"""reports/runs/<stage>.json: which MLflow run a stage's last start wrote, and how long it took."""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from vatt.files import atomic_write
from vatt.training import processes


class Record:
    """The facts of one file; an unreadable one is as good as none."""

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
        """Note that this process works on the run, and on how many devices of which kind."""
        if run_id != self.facts.get("run_id"):
            self.facts = {"stage": stage, "run_id": run_id, "stage_hash": stage_hash}
            self.facts |= {"began": _now(), "starts": 0, "seconds": 0.0}
        self._write(
            status="RUNNING",
            process=processes.myself(),
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
        """Note how it went; `seconds` sums the starts that could tell."""
        seconds = self.facts["seconds"] + time.monotonic() - self._clock
        self._write(status=status, ended=_now(), seconds=round(seconds, 3))

    def bury(self) -> None:
        """Note it when the process is gone that the record takes for running."""
        running = self.facts.get("status") == "RUNNING"
        if running and processes.is_dead(self.facts.get("process", "")):
            self._write(status="KILLED")

    def _write(self, **facts: Any) -> None:
        self.facts |= facts
        with atomic_write(self.path) as path:
            path.write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
