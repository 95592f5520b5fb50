"""Progress of long work on stderr: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

Progress = Callable[[int, int], None]  # what library functions take: (done, total)

LINE_SECONDS = 10.0  # between two plain lines


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
        yield lambda done, total, note="": None
        return
    with _bar(title, unit) if sys.stderr.isatty() else _lines(title, unit) as tick:
        yield tick


@contextmanager
def _lines(title: str, unit: str) -> Iterator[Tick]:
    clock = _Clock()

    def tick(done: int, total: int, note: str = "") -> None:
        seconds = clock.start(done)
        if done >= total or time.monotonic() - clock.drawn >= LINE_SECONDS:
            if clock.finished:
                return
            clock.finished = done >= total
            clock.drawn = time.monotonic()
            text = describe(done, total, seconds, unit, first=clock.first)
            sys.stderr.write(f"{title}: {text}{', ' + note if note else ''}\n")
            sys.stderr.flush()

    yield tick


class _Clock:
    """When the first tick came, with how much done by then, and when a line was last drawn."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.first = 0
        self.drawn = time.monotonic()
        self.finished = False

    def start(self, done: int) -> float:
        if self.began is None:
            self.began, self.first = time.monotonic(), done
        return time.monotonic() - self.began


@contextmanager
def _bar(title: str, unit: str) -> Iterator[Tick]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    clock = _Clock()
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(title, total=None, text="")

        def tick(done: int, total: int, note: str = "") -> None:
            seconds = clock.start(done)
            text = describe(done, total, seconds, unit, first=clock.first)
            text = f"{text}  {note}" if note else text
            bars.update(task, completed=done, total=total, text=text)

        yield tick
