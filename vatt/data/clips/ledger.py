"""What happened to each clip: every clip ends in exactly one state.

While a stage works, it appends a line to a journal (`Ledger`) for each thing that happens to a
clip; several processes may write, and any may be killed. At its end the stage writes the final
ledger (`write_ledger`): the last state of each clip, sorted and without times, so that the file
changes only when a state does.
"""

import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any, Self

from vatt.config import DataParams
from vatt.data.clips.manifest import LONGEST_TIME, Clip, media_path
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
    "no-motion",
    "no-depth",
)
RETRYABLE = frozenset({"rate-limited", "network"})
LONGEST_LINE = 2**20  # bytes; we write a few hundred
JOURNAL = "download.journal.jsonl"  # next to the media; with times and tools


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """A clip's state: after which stage, and why."""

    clip_id: str
    state: str
    stage: str
    reason: str = ""
    has: tuple[str, ...] = ()  # of the senses
    seconds: float | None = None  # length of the media
    sha256: str | None = None  # of the media
    samples: int = 0  # cut from the clip
    captions_dropped: int = 0  # that could not be read
    captions_repaired: int = 0
    encoding: str | None = None  # of the captions, where it had to be guessed
    tools: str | None = None  # that got the media, with their versions
    time: str | None = None  # UTC; in the journal only

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"state {self.state!r} is not one of {', '.join(STATES)}")


def with_captions(entry: Entry, clip: Clip) -> Entry:
    """The entry, and what was wrong with the clip's captions when they were read."""
    faults = clip.caption_faults
    if not faults:
        return entry
    return replace(
        entry,
        captions_dropped=faults.dropped,
        captions_repaired=faults.repaired,
        encoding=faults.encoding or None,
    )


class Ledger:
    """A journal that only grows. Each line is one `write`, so that two writers do not mix."""

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
    """The entries of a journal or a final ledger, in the file's order; none without a file."""
    if not path.exists():
        return
    damaged = 0
    with path.open("rb") as file:
        for line in iter(lambda: file.readline(LONGEST_LINE), b""):
            entry = _from_line(line)
            if entry is not None:
                yield entry
            damaged += entry is None and bool(line.strip())
    if damaged:
        log.info("%s: %d damaged lines are left out", path, damaged)


def read_ledger(path: Path) -> dict[str, Entry]:
    """The last state of each clip, of a journal or of a final ledger; empty without a file."""
    return {entry.clip_id: entry for entry in read_entries(path)}


def forget(journal: Path, states: Collection[str]) -> int:
    """Mark clips whose last state is one of these to be tried again; returns their number."""
    chosen = [entry for entry in read_ledger(journal).values() if entry.state in states]
    settled = [entry for entry in chosen if entry.state not in RETRYABLE]
    if settled:
        with Ledger(journal) as file:
            for entry in settled:
                file.record(Entry(entry.clip_id, "network", entry.stage, "to be tried again"))
    return len(chosen)


def restore(journal: Path, ledger: Path) -> None:
    """Bring back what a journal has lost with its folder, from the ledger of the last download."""
    known = {entry.clip_id for entry in read_entries(journal)}
    lost = [entry for entry in read_ledger(ledger).values() if entry.clip_id not in known]
    if lost:
        journal.parent.mkdir(parents=True, exist_ok=True)
        with Ledger(journal) as file:
            file.record(*lost)


def missing_media(
    clips: Iterable[Clip], entries: Mapping[str, Entry], data: DataParams, media: Path
) -> list[Path]:
    """The files of clips that a download calls ok which are not there."""
    files = {
        media_path(clip, media=media, location=data.location, absolute=data.allow_absolute_paths)
        for clip in clips
        if clip.clip_id in entries and entries[clip.clip_id].state == "ok"
    }
    return sorted(path for path in files if not path.is_file())


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


def _from_line(line: bytes) -> Entry | None:
    """The entry, or None for a line that is damaged or was left unfinished."""
    try:
        record: dict[str, Any] = json.loads(line.decode("utf-8", "replace"))
        record["has"] = tuple(record.get("has", ()))
        for name in {"state", "stage", "reason", "tools"} & record.keys():
            record[name] = sys.intern(record[name])  # a few texts, millions of times
        entry = Entry(**{name: value for name, value in record.items() if name in _TYPES})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    is_sound = all(isinstance(getattr(entry, name), kinds) for name, kinds in _TYPES.items())
    is_sound = is_sound and all(isinstance(name, str) for name in entry.has)
    return entry if is_sound and 0 <= (entry.seconds or 0) <= LONGEST_TIME else None


_TEXT, _COUNT, _MAYBE = (str,), (int,), (str, NoneType)
_TYPES: dict[str, tuple[type, ...]] = {
    "clip_id": _TEXT, "state": _TEXT, "stage": _TEXT, "reason": _TEXT, "has": (tuple,),
    "seconds": (int, float, NoneType), "sha256": _MAYBE, "samples": _COUNT,
    "captions_dropped": _COUNT, "captions_repaired": _COUNT, "encoding": _MAYBE, "tools": _MAYBE,
    "time": _MAYBE,
}  # fmt: skip
