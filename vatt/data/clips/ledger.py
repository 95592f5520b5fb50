"""What happened to each clip: every clip ends in exactly one state.

While a stage works it appends to a journal (`Ledger`), one line a fact, safe against SIGKILL and
several writers. When it is done it writes the final ledger (`write_ledger`): the last word on
each clip, sorted and without times, so that the file changes only when a state does.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vatt.errors import DataError
from vatt.files import atomic_write

STATES = (
    "ok",
    "removed",
    "private",
    "geo",
    "age",
    "needs-login",
    "rate-limited",
    "not-found",
    "network",
    "corrupt",
    "too-short",
    "filtered",
    "no-video",
    "no-audio",
    "no-caption",
)
RETRYABLE = frozenset({"rate-limited", "network"})
JOURNAL = "download.journal.jsonl"  # beside the media; it also says when, and with which tools


@dataclass(frozen=True, slots=True)
class Entry:
    """A clip's state: after which stage, and why."""

    clip_id: str
    state: str
    stage: str
    reason: str = ""
    has: tuple[str, ...] = ()  # of video, audio, text
    seconds: float | None = None  # length of the media
    sha256: str | None = None  # of the media
    samples: int = 0  # cut from the clip
    tools: str | None = None  # and their versions, that got the media
    time: str | None = None  # UTC; in the journal only

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"state {self.state!r} is none of {', '.join(STATES)}")


class Ledger:
    """A journal that only grows; one `write` a line, so that writers do not mix theirs."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._file).st_size
        # A writer that died in the middle of a line must not spoil the next one.
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")

    def record(self, *entries: Entry) -> None:
        """Append; entries given together are written together."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        lines = "".join(_to_line(replace(entry, time=now)) + "\n" for entry in entries).encode()
        while lines:  # at once, unless the disk is full or a signal comes between
            lines = lines[os.write(self._file, lines) :]

    def close(self) -> None:
        """Flush to disk."""
        os.fsync(self._file)
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_entries(path: Path) -> Iterator[Entry]:
    """All entries of a journal or a final ledger, in the file's order; none when there is none."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            entry = _from_line(line)
            if entry is not None:
                yield entry


def read_ledger(path: Path) -> dict[str, Entry]:
    """The last word on each clip, of a journal or of a final ledger; empty when there is none."""
    return {entry.clip_id: entry for entry in read_entries(path)}


def forget(journal: Path, states: Collection[str]) -> int:
    """Have the clips whose last state is one of these tried again; returns their number."""
    chosen = [entry for entry in read_ledger(journal).values() if entry.state in states]
    settled = [entry for entry in chosen if entry.state not in RETRYABLE]
    if settled:
        with Ledger(journal) as file:
            for entry in settled:
                file.record(Entry(entry.clip_id, "network", entry.stage, "to be tried again"))
    return len(chosen)


def write_ledger(path: Path, entries: Iterable[Entry]) -> dict[str, int]:
    """Write the final ledger, sorted by clip; returns the number of clips in each state."""
    final = sorted(entries, key=lambda entry: entry.clip_id)
    for before, after in pairwise(final):
        if before.clip_id == after.clip_id:
            raise DataError(
                f"clip {after.clip_id} has two states", hint="two lines of the manifest share an id"
            )
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for entry in final:
            file.write(_to_line(replace(entry, time=None)) + "\n")
    return summary(final)


def summary(entries: Iterable[Entry]) -> dict[str, int]:
    """The number of clips in each state that occurs, in the order of STATES."""
    counts = Counter(entry.state for entry in entries)
    return {state: counts[state] for state in STATES if counts[state]}


def _to_line(entry: Entry) -> str:
    empty = {None, "", (), 0}
    record = {name: value for name, value in asdict(entry).items() if value not in empty}
    return json.dumps(record, ensure_ascii=False, sort_keys=True)


def _from_line(line: str) -> Entry | None:
    """The entry, or None for a line that a dying writer left unfinished."""
    known = {field.name for field in fields(Entry)}
    try:
        record: dict[str, Any] = json.loads(line)
        record["has"] = tuple(record.get("has", ()))
        for name in {"state", "stage", "reason", "tools"} & record.keys():
            record[name] = sys.intern(record[name])  # a few texts, millions of times
        return Entry(**{name: value for name, value in record.items() if name in known})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
