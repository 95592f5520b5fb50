"""The curve of a training, kept beside its state, so that a resumed run's curve has no gap.

Only numbers that an identical run repeats: no speeds, no times.
"""

import json
from pathlib import Path
from typing import Any

from vatt.files import atomic_write

VALIDATION = "val."  # what an evaluation on the way measures begins so
REPEATABLE = ("loss", "nce", "mil_nce", "accuracy", "learning_rate", "gradient_norm")
FILE, SPIKES = "history.jsonl", "spikes.jsonl"


class History:
    """Appends a line a report; a step that comes again replaces itself and all after it."""

    def __init__(self, folder: Path, file: str = FILE) -> None:
        self.path = folder / file

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Note a step's metrics."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        repeatable = {
            name: value
            for name, value in metrics.items()
            if name in REPEATABLE or name.startswith(VALIDATION)
        }
        row = {"step": step, **repeatable}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """The curve, by step."""
        if not self.path.exists():
            return []
        rows: list[dict[str, Any]] = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # killed in the middle of this line; its step was reported again
                continue
            while rows and rows[-1]["step"] >= row["step"]:
                rows.pop()
            rows.append(row)
        return rows

    def export(self, *, curve: Path, metrics: Path, **more: Any) -> None:
        """Write the curve, and its last row and `more` as the stage's metrics file."""
        rows = self.rows()
        for path, content in ((curve, rows), (metrics, {**rows[-1], **more})):
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
