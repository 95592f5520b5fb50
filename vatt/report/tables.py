"""Numbers -> tables of text. Each cell has a kind: published, ours, chance, not run, ..."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

CellKind = Literal[
    "published", "ours", "unsure", "computed", "baseline", "chance", "not_run", "none", "text"
]

NOT_RUN = "not run"
NO_BREAK = "\u00a0"


@dataclass(frozen=True, slots=True)
class Cell:
    """A value as text; `detail` is its interval or reason, in small print."""

    text: str
    kind: CellKind
    detail: str = ""


@dataclass(frozen=True, slots=True)
class TableRow:
    """A line of a table; its kind decides the colour."""

    head: str
    cells: tuple[Cell, ...]
    kind: CellKind
    note: str = ""
    starts: bool = False  # the first of a group of rows


@dataclass(frozen=True, slots=True)
class Table:
    """A table with its caption; `remark` is shown below it."""

    title: str
    headings: tuple[str, ...]  # the first one is above the row heads
    rows: tuple[TableRow, ...]
    remark: str = ""


def percent(share: float) -> str:
    """0.6836 -> `68.4 %`, never split over two lines."""
    return f"{100 * share:.1f}{NO_BREAK}%"


def number(value: Any) -> str:
    """A published number as printed in the paper."""
    return re.sub(r"(?<=\d)x(?=\d)", "×", str(value))


FEWEST_SEARCHED = 50  # clips: R@10 is 20 % by chance
FEWEST_TESTED = 30  # clips: below, an interval spans more than 30 points


def too_few(metric: dict[str, Any], *, searched: bool = False) -> int | None:
    """How many test clips are needed to say anything, if there are fewer."""
    number, fewest = metric.get("n"), FEWEST_SEARCHED if searched else FEWEST_TESTED
    return fewest if isinstance(number, int) and number < fewest else None


def tested_kind(metric: dict[str, Any]) -> CellKind:
    """How a probe's or a classifier's number is shown: muted where too few clips were tested."""
    return "unsure" if too_few(metric) else "ours"


def with_few(note: str, metric: dict[str, Any]) -> str:
    """The note of a row, with how many clips are needed where there are too few."""
    needed = too_few(metric)
    return f"{note}; {needed} or more clips are needed" if needed else note


def metric_cell(
    metric: dict[str, Any] | None, kind: CellKind | None = None, *, why: str = ""
) -> Cell:
    """A share with its interval; `not run` and the reason if there is no metric."""
    if metric is None:
        return Cell(NOT_RUN, "not_run", why)
    detail = f"{100 * metric['low']:.1f} – {100 * metric['high']:.1f}"
    if "deviation" in metric:  # between official splits
        detail += f", ± {100 * metric['deviation']:.1f}"
    return Cell(percent(metric["value"]), kind or tested_kind(metric), detail)


def main_measure(run: dict[str, Any] | None) -> dict[str, Any] | None:
    """The main measure of a classifier: top-1 accuracy, or mAP if clips have several labels."""
    return None if run is None else run.get("top_1", run.get("mean_ap"))


def rank_cell(metric: dict[str, Any] | None, kind: CellKind = "ours", *, why: str = "") -> Cell:
    """A median rank with its interval."""
    if metric is None:
        return Cell(NOT_RUN, "not_run", why)
    value, low, high = (f"{round(2 * metric[key]) / 2:g}" for key in ("value", "low", "high"))
    return Cell(value, kind, f"{low} – {high}")


def plain_cell(
    metric: dict[str, Any] | None, kind: CellKind | None = None, *, why: str = ""
) -> Cell:
    """A number that is not a share (d') with its interval."""
    if metric is None:
        return Cell(NOT_RUN, "not_run", why)
    value, low, high = (f"{metric[key]:.3f}" for key in ("value", "low", "high"))
    return Cell(value, kind or tested_kind(metric), f"{low} – {high}")


def difference_cell(metric: dict[str, Any] | None, *, why: str = "") -> Cell:
    """A difference of shares, in points with sign and interval."""
    if metric is None:
        return Cell(NOT_RUN, "not_run", why)
    value, low, high = (100 * metric[key] for key in ("value", "low", "high"))
    kind = tested_kind(metric) if low > 0 or high < 0 else "unsure"
    return Cell(f"{signed(value)}{NO_BREAK}points", kind, f"{signed(low)} to {signed(high)}")


def signed(points: float) -> str:
    """A difference with its sign, the minus sign as in print: `+8.4`, `−1.0`."""
    return f"{points:+.1f}".replace("-", "−")


def chance_cell(metric: dict[str, Any] | None, *, as_share: bool = True) -> Cell:
    """The level that chance reaches."""
    if metric is None or metric["chance"] is None:
        return Cell("–", "none")
    return Cell(percent(metric["chance"]) if as_share else f"{metric['chance']:g}", "chance")


def published_cells(values: Sequence[Any]) -> tuple[Cell, ...]:
    """Published numbers; a dash where the paper has no number."""
    return tuple(
        Cell("–", "none") if value is None else Cell(number(value), "published") for value in values
    )


def verdict(metric: dict[str, Any] | None) -> str:
    """What the interval of a difference shows, in words."""
    if metric is None:
        return ""
    if metric["low"] > 0:
        return "better: the interval lies above 0"
    if metric["high"] < 0:
        return "worse: the interval lies below 0"
    return "no significant difference: the interval contains 0"
