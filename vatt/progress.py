"""Progress of long work on stderr: a live table on a terminal, plain lines elsewhere.

A stage that vattctl has started also notes its progress in a small file, for vattctl's table.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

Progress = Callable[[int, int], None]  # what library functions take: (done, total)

LINE_SECONDS = 10.0  # between two plain lines
FRAME_SECONDS = 0.15  # between two drawings of the table, and two notes in the file
PROGRESS_VARIABLE = "VATTCTL_PROGRESS"  # the file in which a stage notes its progress
WIDE, NARROW = 88, 66  # columns of a terminal: below, the table says less


def unseen(done: int, total: int, note: str = "") -> None:
    """Progress that nobody watches."""


@dataclass(slots=True)
class Counter:
    """Joins the progress of several pieces of work into one."""

    report: Progress
    total: int
    before: int = 0

    def add(self, number: int) -> None:
        """A piece of so many is done."""
        self.before += number
        self.report(min(self.before, self.total), self.total)

    def inside(self, done: int, _: int) -> None:
        """So many of the present piece are done."""
        self.report(min(self.before + done, self.total), self.total)


class Tick(Protocol):
    """Called often with what is done, the total, and a note to show next to them."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


def describe(done: int, total: int, seconds: float, unit: str, *, first: int = 0) -> str:
    """`120/700 steps, 6.3/s, 1 min 32 s left`; the rate leaves out work done before the start."""
    rate = (done - first) / seconds if seconds > 0 else 0.0
    text = f"{done}/{total} {unit}"
    if rate > 0 and done < total:
        text += f", {_rate(rate, unit)}, {duration((total - done) / rate)} left"
    elif rate > 0:
        text += f", {_rate(rate, unit)}, {duration(seconds)}"
    return text


def duration(seconds: float) -> str:
    """Seconds in words: `48 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _rate(rate: float, unit: str) -> str:
    return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"


@contextmanager
def progress(title: str, unit: str, *, shown: bool = True) -> Iterator[Tick]:
    """Draw the progress of one piece of work; yields the function to call with (done, total)."""
    if not shown:
        yield unseen
        return
    with _bar(title, unit) if sys.stderr.isatty() else _lines(title, unit) as tick:
        yield tick


@contextmanager
def _lines(title: str, unit: str) -> Iterator[Tick]:
    clock = _Clock()
    note_file = Path(os.environ[PROGRESS_VARIABLE]) if PROGRESS_VARIABLE in os.environ else None

    def tick(done: int, total: int, note: str = "") -> None:
        seconds = clock.start(done)
        text = describe(done, total, seconds, unit, first=clock.first)
        if note_file is not None and clock.is_time(done >= total):
            _note(note_file, title, done, total, text)
        if done >= total or time.monotonic() - clock.drawn >= LINE_SECONDS:
            if clock.finished:
                return
            clock.finished = done >= total
            clock.drawn = time.monotonic()
            sys.stderr.write(f"{title}: {text}{', ' + note if note else ''}\n")
            sys.stderr.flush()

    yield tick


def _note(file: Path, title: str, done: int, total: int, text: str) -> None:
    """Replace the file; a full disk must not stop the work."""
    with suppress(OSError):
        part = file.with_name(f".{file.name}.{os.getpid()}")
        content = {"title": title, "done": done, "total": total, "text": text}
        part.write_text(json.dumps(content), encoding="utf-8")
        part.replace(file)


class _Clock:
    """When the first tick came, with how much done by then, and when a line was last drawn."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.first = 0
        self.drawn = time.monotonic()
        self.framed = 0.0
        self.finished = False

    def start(self, done: int) -> float:
        if self.began is None:
            self.began, self.first = time.monotonic(), done
        return time.monotonic() - self.began

    def is_time(self, last: bool) -> bool:
        """Whether to draw again; the last state always."""
        now = time.monotonic()
        if now - self.framed < FRAME_SECONDS and not last:
            return False
        self.framed = now
        return True


@contextmanager
def _bar(title: str, unit: str) -> Iterator[Tick]:
    clock, row, board = _Clock(), Row(title, "running"), Board()
    try:

        def tick(done: int, total: int, note: str = "") -> None:
            seconds = clock.start(done)
            row.share = done / total if total else None
            row.text = describe(done, total, seconds, unit, first=clock.first)
            row.text += f"  {note}" if note else ""
            if clock.is_time(done >= total):
                board.draw([row])

        yield tick
    finally:
        board.close()


# --- the table on a terminal ----------------------------------------------------------------------


@dataclass(slots=True)
class Row:
    """One piece of work in the table."""

    name: str
    state: str
    share: float | None = None  # that is done; None: no bar
    text: str = ""  # counts, rate, time left


class Board:
    """A live table on stderr that stays correct when the terminal becomes narrower or wider."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._live: Live | None = None
        self._width = self._console.width

    def draw(self, rows: list[Row]) -> None:
        """Show these rows in place of the last ones."""
        from rich.live import Live

        width = self._console.width
        if self._live is not None and width != self._width:
            # The terminal has wrapped or cut the old lines: where they begin is not known.
            self.close()
            self._console.clear()
        self._width = width
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
            self._live.start()
        self._live.update(_table(rows, width), refresh=True)

    def say(self, line: str) -> None:
        """Print a line above the table."""
        self._console.print(line, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the table as it is, and go on below it."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _table(rows: list[Row], width: int) -> "Table":
    """Stage, state, bar and time left; a narrow terminal shows a short bar and no counts."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    bar = 24 if width >= WIDE else 12 if width >= NARROW else 8
    table = Table.grid(padding=(0, 1))
    names = min(max((len(row.name) for row in rows), default=0), max(width - bar - 30, 8))
    table.add_column(no_wrap=True, width=names, overflow="ellipsis")
    table.add_column(no_wrap=True, width=max(len(row.state) for row in rows) if rows else 0)
    table.add_column(no_wrap=True, width=bar)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for row in rows:
        drawn = "" if row.share is None else ProgressBar(1.0, row.share, width=bar)
        text = row.text if width >= WIDE else _shortened(row)
        state = Text(row.state, style=STYLES.get(row.state, "dim"))
        table.add_row(Text(row.name), state, drawn, Text(text))
    return table


STYLES = {"running": "bold", "done": "green", "up to date": "green", "failed": "red"}


def _shortened(row: Row) -> str:
    """The share done and the time left."""
    left = next((part for part in row.text.split(", ") if part.endswith(" left")), "")
    left = re.sub(r" \d+ (s|min) left$", " left", left)  # "1 min 14 s left": "1 min left"
    if row.share is None or row.share >= 1:
        return row.text.rpartition(", ")[2]
    return f"{row.share:.0%} {left}".strip()
