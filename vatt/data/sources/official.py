"""Published lists: what their readers share, the published counts, and what of them is lost."""

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from vatt.data.clips.files import copied_link, skipped_as
from vatt.data.clips.ledger import STATES, Entry, read_entries
from vatt.data.clips.manifest import LABEL_SEPARATOR, Clip, SetName, mark_of, read_manifest
from vatt.errors import DataError

_VIDEO_ID = re.compile(r"[A-Za-z0-9_-]{11}")

# Clips of the published lists, by split, as their files or papers count them. What Kinetics,
# Moments in Time and ImageNet call val is `test` here: their readers say why.
COUNTS: dict[str, dict[str, int]] = {
    "audioset": {"train": 22_160 + 2_041_789, "test": 20_371},
    "esc50": {"train": 1_600, "test": 400},
    "hmdb51": {"train": 3_570, "val": 1_666, "test": 1_530},
    "howto100m": {"train": 1_220_000},  # videos; published to this precision
    "imagenet": {"train": 1_281_167, "test": 50_000},
    "kinetics400": {"train": 246_534, "test": 19_906},
    "kinetics600": {"train": 392_622, "test": 30_000},
    "kinetics700": {"train": 545_317, "test": 35_000},  # the list of 2019
    "moments": {"train": 802_264, "test": 33_900},  # version 1
    "msrvtt": {"train": 9_000, "test": 1_000},
    "ucf101": {"train": 9_537, "test": 3_783},
    "vggsound": {"train": 183_730, "test": 15_446},
    "youcook2": {"test": 3_350},
}
# The label that is learned from each, and how many classes it has.
CLASSES: dict[str, tuple[str, int]] = {
    "audioset": ("sound", 527),
    "esc50": ("sound", 50),
    "hmdb51": ("action", 51),
    "imagenet": ("class", 1_000),
    "kinetics400": ("action", 400),
    "kinetics600": ("action", 600),
    "kinetics700": ("action", 700),
    "moments": ("action", 339),
    "ucf101": ("action", 101),
    "vggsound": ("sound", 309),
}


def official_counts(sources: Iterable[str]) -> dict[str, int]:
    """Clips of each split in the published lists of all these sources; none when one has none."""
    known = [COUNTS.get(source) for source in sources]
    totals: Counter[str] = Counter()
    for counts in known:
        if counts is None:
            return {}
        totals.update(counts)
    return dict(totals)


def youtube_url(video_id: str) -> str:
    """The address of a video; ValueError when it is not the id of a video."""
    if not _VIDEO_ID.fullmatch(video_id):
        raise ValueError(f"'{video_id}' is not a YouTube id")
    return f"https://www.youtube.com/watch?v={video_id}"


def file_clip(name: str, source: str, split: str, labels: dict[str, str]) -> Clip:
    """All of a file that lies in the person's own folder, data.location."""
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", Path(name).stem).strip("-")[:40] or "clip"
    short = hashlib.sha256(name.encode()).hexdigest()[:10]
    return Clip(
        clip_id=f"{readable}-{short}",
        source=source,
        url=f"folder:{name}",
        start=0.0,
        end=None,
        split=split,
        labels=labels,
        captions=(),
        licence=None,
    )


def listed_files(folder: Path, pattern: str) -> list[Path]:
    """Files of a pattern, in order; it is an error if there are none."""
    found = sorted(path for path in folder.glob(pattern) if skipped_as(path.name) is None)
    if not found:
        raise DataError(
            f"no {pattern} in {folder}", hint="docs/data-sources.md says where to get it"
        )
    for path in found:
        if (target := copied_link(path)) is not None:
            raise DataError(
                f"{path} is not the list but a link to {target} that was copied as text",
                hint="copy the list itself; for git on Windows set core.symlinks to true",
            )
    return found


def youtube_span(
    video_id: str, start: float, end: float, *, sections: bool
) -> tuple[str, float, float]:
    """Address and span of a part of a video.

    With `sections` the address names that part alone (a media fragment, as browsers know it), so
    the file that is fetched for it begins at 0.
    """
    if end <= start or start < 0:
        raise ValueError(f"the span from {start:g} to {end:g} is empty")
    url = youtube_url(video_id)
    return (f"{url}#t={start:g},{end:g}", 0.0, end - start) if sections else (url, start, end)


# --- what was lost on the way: clips by state, for each source, split and class ---------------

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
