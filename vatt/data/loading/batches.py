"""Shards -> batches: which clip stands where is a pure function of (seed, epoch, position).

Every epoch shows each row once. Shards are opened in a shuffled order, OPEN_SHARDS at a time; short
runs of neighbours come from all open shards in turn, and rows are mixed within a window. B clips,
T H W C frames, height, width, channels, S samples, K candidate texts, L words.
"""

import hashlib
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from vatt.data.clips.ledger import Entry, Ledger
from vatt.data.clips.manifest import LABEL_SEPARATOR
from vatt.data.clips.samples import INDEX, read_index
from vatt.data.loading import augment
from vatt.data.loading.loader import HERE, Loading, StandIn, load, open_index
from vatt.data.loading.reader import OPEN_SHARDS, WINDOW, BrokenSampleError, ShardIndex
from vatt.data.loading.sampling import Request, Sampling, View, check_rates
from vatt.errors import DataError

RUN = 8  # rows


class TrainingOrder:
    """Which row stands at which position."""

    def __init__(self, shard_of_row: Sequence[str], *, seed: int) -> None:
        self._seed = seed
        numbers: dict[str, int] = {}
        self._shard = np.array([numbers.setdefault(name, len(numbers)) for name in shard_of_row])
        self._num_shards = len(numbers)
        self._epochs: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """The rows of an epoch."""
        return len(self._shard)

    def row_at(self, position: int) -> int:
        """The row at a position, counted through all epochs."""
        epoch, within = divmod(position, len(self))
        if epoch not in self._epochs:
            for past in [known for known in self._epochs if known < epoch - 1]:
                del self._epochs[past]
            self._epochs[epoch] = self._shuffle(epoch)
        return int(self._epochs[epoch][within])

    def stand_in(self, position: int, attempt: int) -> int:
        """The row to show instead of a broken one, and of broken stand-ins before this one."""
        random = np.random.Generator(np.random.PCG64([self._seed, position, attempt + 1]))
        return int(random.integers(len(self)))

    def _shuffle(self, epoch: int) -> np.ndarray:
        random = np.random.Generator(np.random.PCG64([self._seed, epoch]))
        opened = random.permutation(self._num_shards)  # when, by the number of the shard
        rows = np.argsort(opened[self._shard], kind="stable")
        runs = (np.arange(len(rows)) + random.integers(RUN)) // RUN
        # A shard's runs lie anywhere in the time that it is open; the last shards' in part at the
        # epoch's beginning, so that it begins with as many open ones as it goes on with.
        open_for = min(OPEN_SHARDS, self._num_shards)
        when = opened[self._shard[rows]] + random.random(runs[-1] + 1)[runs] * open_for
        rows = rows[np.argsort(when % self._num_shards, kind="stable")]
        window = np.arange(len(rows)) // WINDOW
        return rows[np.lexsort((random.random(len(rows)), window))]


log = logging.getLogger(__name__)


class StandIns:
    """Stand-ins are a pure function of seed and position, whoever finds the sample broken."""

    def __init__(
        self, index: ShardIndex, order: TrainingOrder, *, max_share: float, ledger: Path | None
    ) -> None:
        self._rows, self._order = index.rows, order
        self._most = max_share * len(index.rows)
        self._ledger = ledger
        self._broken: set[int] = set()

    def __call__(self, request: Request, error: BrokenSampleError) -> Request:
        """The request for the sample to show instead."""
        if request.row not in self._broken:
            self._broken.add(request.row)
            self._note(request.row, error)
        row = self._order.stand_in(request.position, request.attempt)
        return replace(request, row=row, attempt=request.attempt + 1)

    def _note(self, number: int, error: BrokenSampleError) -> None:
        log.warning("%s; another one is shown instead", error.problem)
        if self._ledger is not None:
            with Ledger(self._ledger) as ledger:
                ledger.record(Entry(self._rows[number].clip_id, "corrupt", "load", error.problem))
        if len(self._broken) > self._most:
            raise DataError(
                f"{len(self._broken)} of {len(self._rows)} samples are broken, more than "
                f"machine.max_broken_share; the last: {error.problem}",
                hint=f"{self._ledger or 'the log'} names them; delete their shards and run "
                "`vattctl preprocess`, or raise machine.max_broken_share",
            )


def refuse(request: Request, error: BrokenSampleError) -> Request:
    """In a test set there is no stand-in."""
    raise error


__all__ = [
    "Batch",
    "Loading",
    "Sampling",
    "eval_batches",
    "model_inputs",
    "scaled",
    "train_batches",
]


@dataclass
class Batch:
    """What a training step is given; colour and scaling are left to the training device."""

    clip_ids: list[str]
    video: Tensor  # (B, T, H, W, C) uint8
    audio: Tensor  # (B, S) int16, or (B, frames, mel bins) float
    text: Tensor  # (B, K, L) int64, 0 pads
    has_video: Tensor  # (B,) bool
    has_audio: Tensor  # (B,) bool
    colour: Tensor  # (B, 4) brightness, contrast, saturation, hue
    labels: dict[str, list[str]]  # "" where a clip has none of that name

    def to(self, device: torch.device | str) -> Self:
        """The batch with its tensors on a device."""
        return replace(
            self,
            video=self.video.to(device, non_blocking=True),
            audio=self.audio.to(device, non_blocking=True),
            text=self.text.to(device, non_blocking=True),
            has_video=self.has_video.to(device, non_blocking=True),
            has_audio=self.has_audio.to(device, non_blocking=True),
            colour=self.colour.to(device, non_blocking=True),
        )


def model_inputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Video (B, T, H, W, C) and audio (B, S) in [-1, 1], and text, on the batch's device."""
    return *scaled(batch.video, batch.audio, batch.colour), batch.text


def scaled(video: Tensor, audio: Tensor, colour: Tensor) -> tuple[Tensor, Tensor]:
    """A batch's video, its colours changed, and waveforms in [-1, 1]; a spectrogram as it is."""
    clips = video.float() / 255
    identity = torch.tensor(augment.IDENTITY, device=colour.device)
    if (colour != identity).any():
        clips = augment.change_colour(clips, colour)
    return clips * 2 - 1, audio if audio.is_floating_point() else audio.float() / 32768


def train_batches(
    shards: Path,
    *,
    split: str,
    batch_size: int,
    steps: int,
    first_step: int,
    seed: int,
    sampling: Sampling,
    rank: int = 0,
    world_size: int = 1,
    loading: Loading = HERE,
    clip_ids: Collection[str] | None = None,
) -> Iterator[Batch]:
    """This process's part of the batches first_step to steps; the same for any worker number."""
    index = open_index(shards, loading, split=split, keys=clip_ids)
    check_rates(sampling, fps=index.fps, audio_hz=index.audio_hz)
    order = TrainingOrder([row.shard for row in index.rows], seed=seed)
    first = batch_size * rank // world_size
    last = batch_size * (rank + 1) // world_size

    def requests(step: int) -> list[Request]:
        start = step * batch_size
        return [
            Request(order.row_at(start + place), draw=(seed, step, place), position=start + place)
            for place in range(first, last)
        ]

    yield from _batches(
        index,
        (requests(step) for step in range(first_step, steps)),
        sampling,
        replace(loading, cache_gb=loading.cache_gb / world_size),
        first_needed=(
            order.row_at(first_step * batch_size + number) for number in range(len(order))
        ),
        stand_in=StandIns(index, order, max_share=loading.max_broken_share, ledger=loading.ledger),
    )


def eval_batches(
    shards: Path,
    *,
    split: str,
    batch_size: int,
    sampling: Sampling,
    views: tuple[int, int] = (1, 1),
    rank: int = 0,
    world_size: int = 1,
    loading: Loading = HERE,
    clip_ids: Collection[str] | None = None,
) -> Iterator[Batch]:
    """Every clip once, in the order of ids; the windows x crops of `views` stand side by side.

    The batches are the same for any number of processes; each gets every so-manyth, whole.
    """
    index = open_index(shards, loading, split=split, keys=clip_ids)
    check_rates(sampling, fps=index.fps, audio_hz=index.audio_hz)
    order = sorted(range(len(index.rows)), key=lambda number: index.rows[number].key)
    windows, crops = views
    shown = [
        View(window, windows, crop, crops) for window in range(windows) for crop in range(crops)
    ]
    clips = max(batch_size // len(shown), 1)
    whole = [order[first : first + clips] for first in range(0, len(order), clips)]
    own = whole[rank::world_size]
    requests = ([Request(row, None, view) for row in rows for view in shown] for rows in own)
    yield from _batches(
        index,
        requests,
        replace(sampling, augmentation=None),
        loading,
        first_needed=[row for rows in own for row in rows],
        stand_in=refuse,
    )


def _batches(
    index: ShardIndex,
    requests: Iterable[list[Request]],
    sampling: Sampling,
    loading: Loading,
    *,
    first_needed: Iterable[int],
    stand_in: StandIn,
) -> Iterator[Batch]:
    names = sorted({name for row in index.rows for name in row.labels})
    for asked, arrays in load(
        index, requests, sampling, loading, first_needed=first_needed, stand_in=stand_in
    ):
        rows = [index.rows[request.row] for request in asked]
        yield Batch(
            clip_ids=[row.key for row in rows],
            labels={name: [row.labels.get(name, "") for row in rows] for name in names},
            **{name: torch.from_numpy(getattr(arrays, name)) for name in arrays.__slots__},
        )


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
