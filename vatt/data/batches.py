"""Shards -> batches: which clip stands where is a pure function of (seed, epoch, position).

B clips, T H W C frames, height, width, channels, S samples, K candidate texts, L words.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from vatt.data import augment
from vatt.data.loader import StandIn, load
from vatt.data.loading import HERE, Loading, open_index
from vatt.data.order import Order
from vatt.data.reader import ShardIndex
from vatt.data.sampling import Request, Sampling, View, check_rates
from vatt.data.stand_ins import StandIns, refuse

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
    order = Order([row.shard for row in index.rows], seed=seed)
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
