"""Shards -> batches: which clip stands where is a pure function of (seed, epoch, position).

B clips, T H W C frames, height, width, channels, S samples, K candidate texts, L words.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from vatt.data import augment
from vatt.data.loader import load_samples
from vatt.data.samples import ShardIndex
from vatt.data.sampling import Request, Sample, Sampling, View, check_rates

__all__ = ["Batch", "Sampling", "eval_batches", "model_inputs", "scaled", "train_batches"]

SHUFFLED_SHARDS = 8  # rows are mixed within so many shards at a time


@dataclass
class Batch:
    """What a training step is given; colour and scaling are left to the training device."""

    clip_ids: list[str]
    video: Tensor  # (B, T, H, W, C) uint8
    audio: Tensor  # (B, S) int16
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
    """A batch's video, its colours changed, and audio, both in [-1, 1]."""
    clips = video.float() / 255
    identity = torch.tensor(augment.IDENTITY, device=colour.device)
    if (colour != identity).any():
        clips = augment.change_colour(clips, colour)
    return clips * 2 - 1, audio.float() / 32768


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
    workers: int = 0,
    cache_gb: float = 0.0,
    clip_ids: Collection[str] | None = None,
) -> Iterator[Batch]:
    """This process's part of the batches first_step to steps; the same for any worker number."""
    index = ShardIndex.load(shards, split=split, keys=clip_ids)
    check_rates(sampling, fps=index.fps, audio_hz=index.audio_hz)
    order = Order([row.shard for row in index.rows], seed=seed)
    first = batch_size * rank // world_size
    last = batch_size * (rank + 1) // world_size

    def requests(step: int) -> list[Request]:
        positions = range(step * batch_size + first, step * batch_size + last)
        return [
            Request(order.row_at(position), draw=(seed, step, position - step * batch_size))
            for position in positions
        ]

    yield from _batches(
        index,
        (requests(step) for step in range(first_step, steps)),
        sampling,
        first_needed=(
            order.row_at(first_step * batch_size + number) for number in range(len(order))
        ),
        workers=workers,
        cache_gb=cache_gb / world_size,
    )


def eval_batches(
    shards: Path,
    *,
    split: str,
    batch_size: int,
    sampling: Sampling,
    views: tuple[int, int] = (1, 1),
    workers: int = 0,
    cache_gb: float = 0.0,
    clip_ids: Collection[str] | None = None,
) -> Iterator[Batch]:
    """Every clip once, in the order of ids; the windows x crops of `views` stand side by side."""
    index = ShardIndex.load(shards, split=split, keys=clip_ids)
    check_rates(sampling, fps=index.fps, audio_hz=index.audio_hz)
    order = sorted(range(len(index.rows)), key=lambda number: index.rows[number].key)
    windows, crops = views
    shown = [
        View(window, windows, crop, crops) for window in range(windows) for crop in range(crops)
    ]
    clips = max(batch_size // len(shown), 1)
    requests = (
        [Request(row, None, view) for row in order[first : first + clips] for view in shown]
        for first in range(0, len(order), clips)
    )
    yield from _batches(
        index,
        requests,
        replace(sampling, augmentation=None),
        first_needed=order,
        workers=workers,
        cache_gb=cache_gb,
    )


def _batches(
    index: ShardIndex,
    requests: Iterable[list[Request]],
    sampling: Sampling,
    *,
    first_needed: Iterable[int],
    workers: int,
    cache_gb: float,
) -> Iterator[Batch]:
    names = sorted({name for row in index.rows for name in row.labels})
    for asked, samples in load_samples(
        index,
        requests,
        sampling,
        first_needed=first_needed,
        workers=workers,
        cache_bytes=int(cache_gb * 1e9),
    ):
        yield _collate(index, asked, samples, names)


def _collate(
    index: ShardIndex, asked: Sequence[Request], samples: Sequence[Sample], names: Sequence[str]
) -> Batch:
    rows = [index.rows[request.row] for request in asked]
    return Batch(
        clip_ids=[row.key for row in rows],
        video=torch.from_numpy(np.stack([sample.video for sample in samples])),
        audio=torch.from_numpy(np.stack([sample.audio for sample in samples])),
        text=torch.from_numpy(np.stack([sample.text for sample in samples])),
        has_video=torch.tensor([sample.has_video for sample in samples]),
        has_audio=torch.tensor([sample.has_audio for sample in samples]),
        colour=torch.tensor([sample.colour for sample in samples], dtype=torch.float32),
        labels={name: [row.labels.get(name, "") for row in rows] for name in names},
    )


class Order:
    """The endless order of training: every epoch all rows once, shards read mostly in sequence.

    Shards are shuffled, then rows within each group of SHUFFLED_SHARDS shards.
    """

    def __init__(self, shard_of_row: Sequence[str], *, seed: int) -> None:
        self._seed = seed
        shards: dict[str, list[int]] = {}
        for row, shard in enumerate(shard_of_row):
            shards.setdefault(shard, []).append(row)
        self._shards = [np.array(rows) for rows in shards.values()]
        self._length = len(shard_of_row)
        self._epochs: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """The rows of an epoch."""
        return self._length

    def row_at(self, position: int) -> int:
        """The row at a position, counted through all epochs."""
        epoch, within = divmod(position, self._length)
        if epoch not in self._epochs:
            for past in [known for known in self._epochs if known < epoch - 1]:
                del self._epochs[past]
            self._epochs[epoch] = self._shuffle(epoch)
        return int(self._epochs[epoch][within])

    def _shuffle(self, epoch: int) -> np.ndarray:
        random = np.random.Generator(np.random.PCG64([self._seed, epoch]))
        shards = iter(random.permutation(len(self._shards)).tolist())
        groups = []
        while group := list(islice(shards, SHUFFLED_SHARDS)):
            groups.append(random.permutation(np.concatenate([self._shards[i] for i in group])))
        return np.concatenate(groups)
