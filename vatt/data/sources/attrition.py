"""What was lost on the way: clips by state, for each source, split and class."""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from vatt.data.clips.ledger import STATES, Entry, read_entries
from vatt.data.clips.manifest import LABEL_SEPARATOR, SetName, mark_of, read_manifest
from vatt.data.sources.official import CLASSES, COUNTS

PENDING = "pending"  # listed, but in no ledger yet
WORDS = (*STATES, PENDING)
MANY_CLASSES = 2000  # a label with more values names clips, not classes


@dataclass(slots=True)
class Loss:
    """Clips of one kind."""

    listed: int = 0
    official: int | None = None  # clips of that kind in the published list
    states: Counter[str] = field(default_factory=Counter)

    def add(self, state: str) -> None:
        """Count a clip."""
        self.listed += 1
        self.states[state] += 1

    def counts(self) -> dict[str, int]:
        """The states that occur, in their order."""
        return {state: self.states[state] for state in WORDS if self.states[state]}


@dataclass(frozen=True, slots=True)
class Attrition:
    """The whole account; every clip of the manifest is counted once in `total`."""

    total: Loss
    by_split: dict[tuple[str, str], Loss]  # source, split
    by_class: dict[tuple[str, str], Loss]  # label's name and value
    listed_hash: str  # names the clips of the manifest
    kept_hash: str  # names those that are ok


def account(manifest: Path, *, downloads: Sequence[Path], preprocess: Path) -> Attrition:
    """Read the manifest once; a clip's state is the last entry of the last stage that had it."""
    entries = chain.from_iterable(map(read_entries, downloads))
    # Entries that the second ledger only copied from the first may be out of date.
    cut = (entry for entry in read_entries(preprocess) if entry.stage != "download")
    known = _States(chain(entries, cut))
    total = Loss()
    by_split: dict[tuple[str, str], Loss] = {}
    by_class: dict[tuple[str, str], Loss] = {}
    listed, kept = SetName(), SetName()
    for clip in read_manifest(manifest):
        state = known.of(clip.clip_id)
        listed.add(clip)
        if state == "ok":
            kept.add(clip)
        total.add(state)
        by_split.setdefault((clip.source, clip.split), Loss()).add(state)
        for name, values in clip.labels.items():
            for value in values.split(LABEL_SEPARATOR):
                by_class.setdefault((name, value), Loss()).add(state)
    for (source, split), loss in by_split.items():
        loss.official = COUNTS.get(source, {}).get(split)
    sizes = Counter(name for name, _ in by_class)
    by_class = {key: loss for key, loss in by_class.items() if sizes[key[0]] <= MANY_CLASSES}
    return Attrition(total, by_split, by_class, listed.hexdigest(), kept.hexdigest())


def shares(found: Attrition) -> list[dict[str, Any]]:
    """What is left of each list: clips by split, and classes, next to the official numbers.

    `official` is None for a person's own clips.
    """
    rows: list[dict[str, Any]] = [
        {"source": source, "of": split, "official": loss.official, "listed": loss.listed,
         "kept": loss.states["ok"]}
        for (source, split), loss in sorted(found.by_split.items())
    ]  # fmt: skip
    for source in sorted({source for source, _ in found.by_split} & CLASSES.keys()):
        label, official = CLASSES[source]
        classes = [loss for (name, _), loss in found.by_class.items() if name == label]
        kept = sum(loss.states["ok"] > 0 for loss in classes)
        rows.append(
            {"source": source, "of": "classes", "official": official, "listed": len(classes),
             "kept": kept}
        )  # fmt: skip
    return rows


class _States:
    """Clip -> state in 9 bytes a clip: the ledgers of millions of clips fit a small machine."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        marks, states = array("Q"), array("B")
        for entry in entries:
            marks.append(mark_of(entry.clip_id))
            states.append(WORDS.index(entry.state))
        order = np.argsort(np.asarray(marks), kind="stable")
        self._marks = np.asarray(marks)[order]
        self._states = np.asarray(states)[order]

    def of(self, clip_id: str) -> str:
        """The latest state of a clip."""
        mark = np.uint64(mark_of(clip_id))
        place = int(np.searchsorted(self._marks, mark, side="right")) - 1
        found = place >= 0 and self._marks[place] == mark
        return WORDS[self._states[place]] if found else PENDING
