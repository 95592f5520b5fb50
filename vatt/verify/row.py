"""One row of `vattctl verify`: a published number, the expected one, and ours."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import yaml

from vatt.paper import TABLES_FILE

State = Literal["pass", "fail", "not run"]


@dataclass(frozen=True, slots=True)
class Check:
    """A row. `paper` is the published number, None where there is none; all are in `unit`."""

    name: str
    source: str
    unit: str
    paper: float | None
    expected: float | None
    ours: float | None
    tolerance: float | None  # of |ours - expected|
    state: State
    reason: str | None

    @property
    def difference(self) -> float | None:
        """ours - expected."""
        if self.ours is None or self.expected is None:
            return None
        return self.ours - self.expected


def compare(
    name: str,
    *,
    source: str,
    unit: str,
    ours: float,
    expected: float,
    tolerance: float,
    paper: float | None = None,
    reason: str | None = None,
) -> Check:
    """A row that passes when ours is within `tolerance` of the expected number."""
    passes = math.isfinite(ours) and abs(ours - expected) <= tolerance
    if not passes:
        reason = f"ours differs by {ours - expected:+.6g}" + (f"; {reason}" if reason else "")
    return Check(
        name=name,
        source=source,
        unit=unit,
        paper=paper,
        expected=expected,
        ours=ours,
        tolerance=tolerance,
        state="pass" if passes else "fail",
        reason=reason,
    )


def not_run(
    name: str, *, source: str, unit: str, paper: float, ours: float | None, reason: str
) -> Check:
    """A published number that cannot be compared, and why."""
    return Check(
        name=name,
        source=source,
        unit=unit,
        paper=paper,
        expected=None,
        ours=ours,
        tolerance=None,
        state="not run",
        reason=reason,
    )


def published(table: str, row: str, column: str) -> float:
    """A number of paper_tables.yaml."""
    content = _tables()[table]
    return float(content["rows"][row][content["columns"].index(column)])


def published_whole_model(name: str) -> float:
    """The paper's parameters of a whole model, in millions."""
    return float(_tables()["table7_sizes"]["whole_models_params_millions"][name])


@cache
def _tables() -> dict[str, Any]:
    return yaml.safe_load(TABLES_FILE.read_text(encoding="utf-8"))
