"""Shards -> batches: which sample is where is a pure function of (seed, epoch, position).

Every epoch shows each row once. Shards are opened in a shuffled order, OPEN_SHARDS at a time; short
runs of neighbours come from all open shards in turn, and rows are mixed within a window. B clips,
T H W C frames, height, width, channels, S audio samples, K candidate texts, L words.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from vatt.data.clips.ledger import Entry, Ledger
from vatt.data.clips.manifest import LABEL_SEPARATOR
from vatt.data.clips.samples import INDEX, read_index
from vatt.data.loading.loader import HERE, LoadedBatch, Loading, load, open_index
from vatt.data.loading.reader import OPEN_SHARDS, WINDOW, BrokenSampleError, ShardIndex
from vatt.data.loading.sampling import Request, Sampling, check_rates
from vatt.errors import DataError
from vatt.senses import SENSES
from vatt.senses.form import View

__all__ = [
    "Batch",
    "Loading",
    "Sampling",
    "eval_batches",
    "model_inputs",
    "open_index",
    "train_batches",
]

RUN = 8  # rows

log = logging.getLogger(__name__)


@dataclass
class Batch:
    """The input of a training step, by sense; the training device changes colours and scales."""

    clip_ids: list[str]
    signals: dict[str, Tensor]  # as the shards store them, e.g. video (B, T, H, W, C) uint8
    present: dict[str, Tensor]  # (B,) bool: which clips have it; a text says so itself
    labels: dict[str, list[str]]  # "" where a clip has no label of that name
    changes: dict[str, Tensor] = field(default_factory=dict)  # what the device changes of each clip

    def __getattr__(self, name: str) -> Tensor:
        """`batch.video` is the signal of that name; `batch.has_video` says which clips have it."""
        sense = name.removeprefix("has_")
        group: dict[str, Tensor] = self.__dict__.get("signals" if sense == name else "present", {})
        if sense not in group:
            raise AttributeError(f"the batch has no {name}")
        return group[sense]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The batch with each of its tensors changed."""
        groups: dict[str, Any] = {
            name: {key: change(value) for key, value in getattr(self, name).items()}
            for name in ("signals", "present", "changes")
        }
        return replace(self, **groups)

    def to(self, device: torch.device | str) -> Self:
        """The batch with its tensors on a device."""
        return self.mapped(lambda value: value.to(device, non_blocking=True))

    def tensors(self) -> list[Tensor]:
        """All tensors of the batch."""
        groups = (self.signals, self.present, self.changes)
        return [value for group in groups for value in group.values()]

    def has(self) -> dict[str, Tensor]:
        """Which clips have each sense: (B,), or (B, K) for several candidates."""
        return {
            name: SENSES[name].present(values, self.present.get(name))
            for name, values in self.signals.items()
        }


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """Each sense as the model takes it, on the batch's device; one that was not read is left out.

    Video (B, T, H, W, C) and audio (B, S) are in [-1, 1], text (B, K, L) has word ids.
    """
    return {
        name: SENSES[name].scaled(values, batch.changes.get(name))
        for name, values in batch.signals.items()
        if values.numel()
    }


def train_batches(
    index: ShardIndex,
    sampling: Sampling,
    *,
    batch_size: int,
    steps: range,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    loading: Loading = HERE,
) -> Iterator[Batch]:
    """This process's part of the batches of `steps`; the same for any number of workers."""
    check_rates(sampling, index.storage)
    order = TrainingOrder([row.shard for row in index.rows], seed=seed)
    first = batch_size * rank // world_size
    last = batch_size * (rank + 1) // world_size

    def requests(step: int) -> list[Request]:
        start = step * batch_size
        return [
            Request(
                index.rows[order.row_at(start + place)],
                draw=(seed, step, place),
                position=start + place,
            )
            for place in range(first, last)
        ]

    loaded = load(
        index,
        map(requests, steps),
        sampling,
        replace(loading, cache_gb=loading.cache_gb / world_size),
        first_needed=(
            index.rows[order.row_at(steps.start * batch_size + number)]
            for number in range(len(order))
        ),
        replacement=Replacements(index, order, loading),
    )
    yield from _as_batches(index, loaded)


def eval_batches(
    index: ShardIndex,
    sampling: Sampling,
    *,
    batch_size: int,
    views: tuple[int, int] = (1, 1),
    rank: int = 0,
    world_size: int = 1,
    loading: Loading = HERE,
) -> Iterator[Batch]:
    """Every clip once, in the order of ids; its `views` (windows, crops) are adjacent rows.

    The batches are the same for any number of processes; each process gets every n-th, complete.
    """
    check_rates(sampling, index.storage)
    windows, crops = views
    shown = [
        View(window, windows, crop, crops) for window in range(windows) for crop in range(crops)
    ]
    rows = sorted(index.rows, key=lambda row: row.key)
    clips = max(batch_size // len(shown), 1)
    own = [rows[first : first + clips] for first in range(0, len(rows), clips)][rank::world_size]
    loaded = load(
        index,
        ([Request(row, None, view) for row in batch for view in shown] for batch in own),
        replace(sampling, augmentation=None),
        loading,
        first_needed=(row for batch in own for row in batch),
        replacement=refuse,
    )
    yield from _as_batches(index, loaded)


def _as_batches(index: ShardIndex, loaded: Iterable[LoadedBatch]) -> Iterator[Batch]:
    names = sorted({name for row in index.rows for name in row.labels})
    for requests, arrays in loaded:
        rows = [request.row for request in requests]
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        yield Batch(
            clip_ids=[row.key for row in rows],
            signals={name: tensors[name] for name in SENSES if name in tensors},
            present={name: tensors[f"has_{name}"] for name in SENSES if f"has_{name}" in tensors},
            labels={name: [row.labels.get(name, "") for row in rows] for name in names},
            changes=_changes(arrays, tensors),
        )


def _changes(arrays: Mapping[str, np.ndarray], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the training device changes, by sense; nothing where that would change no clip.

    Decided here: on a GPU the question would make the host wait.
    """
    found = {}
    for name, sense in SENSES.items():
        if sense.change is not None and sense.change[0] in arrays:
            key, identity = sense.change
            if not (arrays[key] == np.array(identity, arrays[key].dtype)).all():
                found[name] = tensors[key]
    return found


class TrainingOrder:
    """Which row of the index is at which position of a training."""

    def __init__(self, shard_of_row: Sequence[str], *, seed: int) -> None:
        self._seed = seed
        numbers: dict[str, int] = {}
        self._shard = np.array([numbers.setdefault(name, len(numbers)) for name in shard_of_row])
        self._num_shards = len(numbers)
        self._epochs: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """The rows in an epoch."""
        return len(self._shard)

    def row_at(self, position: int) -> int:
        """The row at a position, counted through all epochs."""
        epoch, within = divmod(position, len(self))
        if epoch not in self._epochs:
            for past in [known for known in self._epochs if known < epoch - 1]:
                del self._epochs[past]
            self._epochs[epoch] = self._shuffle(epoch)
        return int(self._epochs[epoch][within])

    def replacement(self, position: int, attempt: int) -> int:
        """The row to show instead of a broken one; `attempt` counts the broken ones before."""
        random = np.random.Generator(np.random.PCG64([self._seed, position, attempt + 1]))
        return int(random.integers(len(self)))

    def _shuffle(self, epoch: int) -> np.ndarray:
        random = np.random.Generator(np.random.PCG64([self._seed, epoch]))
        opened = random.permutation(self._num_shards)  # when each shard is opened
        rows = np.argsort(opened[self._shard], kind="stable")
        runs = (np.arange(len(rows)) + random.integers(RUN)) // RUN
        # The runs of a shard are spread over the time that it is open. Part of the runs of the last
        # shards go to the beginning, so that as many shards are open there as later.
        open_for = min(OPEN_SHARDS, self._num_shards)
        when = opened[self._shard[rows]] + random.random(runs[-1] + 1)[runs] * open_for
        rows = rows[np.argsort(when % self._num_shards, kind="stable")]
        window = np.arange(len(rows)) // WINDOW
        return rows[np.lexsort((random.random(len(rows)), window))]


class Replacements:
    """Chooses the sample to show instead of a broken one, and counts the broken ones.

    The choice is a pure function of seed and position: the same in every process.
    """

    def __init__(self, index: ShardIndex, order: TrainingOrder, loading: Loading) -> None:
        self._rows, self._order = index.rows, order
        self._limit = loading.max_broken_share * len(index.rows)
        self._ledger = loading.ledger
        self._broken: set[str] = set()

    def __call__(self, request: Request, error: BrokenSampleError) -> Request:
        """The request for the sample to show instead."""
        if request.row.key not in self._broken:
            self._broken.add(request.row.key)
            self._note(request.row.clip_id, error)
        row = self._rows[self._order.replacement(request.position, request.attempt)]
        return replace(request, row=row, attempt=request.attempt + 1)

    def _note(self, clip_id: str, error: BrokenSampleError) -> None:
        log.warning("%s; another sample is shown instead", error.problem)
        if self._ledger is not None:
            with Ledger(self._ledger) as ledger:
                ledger.record(Entry(clip_id, "corrupt", "load", error.problem))
        if len(self._broken) > self._limit:
            raise DataError(
                f"{len(self._broken)} of {len(self._rows)} samples are broken, more than "
                f"machine.max_broken_share; the last: {error.problem}",
                hint=f"{self._ledger or 'the log'} names them; delete their shards and run "
                "`vattctl preprocess`, or raise machine.max_broken_share",
            )


def refuse(request: Request, error: BrokenSampleError) -> Request:
    """A broken sample of a test set is not replaced: it ends the evaluation."""
    raise error


@dataclass(frozen=True, slots=True)
class LabelledSamples:
    """Samples chosen for training on a label, and all classes of that label, sorted."""

    keys: list[str]
    classes: list[str]


def labelled_samples(shards: Path, *, split: str, label: str, count: int | None) -> LabelledSamples:
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
    return LabelledSamples([rows[place].key for place in chosen], classes)


def labels_of(shards: Path, label: str) -> set[str]:
    """All values of a label in any split; the labels of a clip that has several are joined."""
    return {row.labels[label] for row in read_index(shards / INDEX)[1] if row.labels.get(label)}


def balanced(keys: Sequence[str], labels: Sequence[str], count: int | None) -> list[int]:
    """Places of `count` labelled samples, equally many of each class, chosen by their keys' hash.

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
