"""Which samples of a split carry a label, and a balanced few of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vatt.data.manifest import LABEL_SEPARATOR
from vatt.data.reader import ShardIndex
from vatt.data.samples import INDEX, read_index
from vatt.errors import DataError


@dataclass(frozen=True, slots=True)
class Labelled:
    """Samples chosen for training on a label, and all classes of that label, sorted."""

    keys: list[str]
    classes: list[str]


def labelled_samples(shards: Path, *, split: str, label: str, count: int | None) -> Labelled:
    """The labelled samples of a split, or `count` of them spread evenly over the classes."""
    rows = [row for row in ShardIndex.load(shards, split=split).rows if row.labels.get(label)]
    if not rows:
        raise DataError(
            f"no sample of split '{split}' has a label '{label}'",
            hint="take the task out of finetune.run, or label the data (docs/own-data.md)",
        )
    labels = [row.labels[label] for row in rows]
    chosen = balanced([row.key for row in rows], labels, count)
    classes = sorted({name for several in labels for name in several.split(LABEL_SEPARATOR)})
    return Labelled([rows[place].key for place in chosen], classes)


def labels_of(shards: Path, label: str) -> set[str]:
    """All values of a label, whichever split has them; several of one clip stand joined."""
    return {row.labels[label] for row in read_index(shards / INDEX)[1] if row.labels.get(label)}


def balanced(keys: Sequence[str], labels: Sequence[str], count: int | None) -> list[int]:
    """Places of `count` labelled samples, equally many a class, chosen by the hash of their keys.

    None takes all; a sample whose label is "" is never taken.
    """
    order = sorted(
        range(len(keys)), key=lambda place: hashlib.sha256(keys[place].encode()).digest()
    )
    by_class: dict[str, list[int]] = {}
    for place in order:
        if labels[place]:
            by_class.setdefault(labels[place], []).append(place)
    turns = [
        (turn, name, place)
        for name, places in by_class.items()
        for turn, place in enumerate(places)
    ]
    return sorted(place for _, _, place in sorted(turns)[:count])
