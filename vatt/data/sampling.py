"""What a model is shown of a stored clip: which frames, which sound, which words.

T H W C: frames, height, width, channels; S samples; K candidate texts; L words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Protocol, Self

import numpy as np
import torch

from vatt.config import AugmentationParams, FinetuneTaskParams, ModelParams, PretrainParams
from vatt.data import augment
from vatt.data.samples import Facts, Row, nearest
from vatt.data.text import Vocabulary
from vatt.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Sampling:
    """The input of a model; a modality of size 0 is neither read nor decoded."""

    frames: int  # T
    fps: float
    frame_size: tuple[int, int]  # H, W
    samples: int  # S
    audio_hz: int | None  # None: as stored
    candidates: int  # K
    words: int  # L
    augmentation: AugmentationParams | None  # training only; None: centre crop, as stored
    still: bool = False  # one frame of the clip, T times

    @classmethod
    def for_pretraining(cls, model: ModelParams, pretrain: PretrainParams) -> Self:
        """All three modalities."""
        return cls(
            frames=model.video.frames,
            fps=pretrain.fps,
            frame_size=_pair(model.video.frame_size),
            samples=model.audio.samples,
            audio_hz=None,
            candidates=pretrain.text_candidates,
            words=model.text.words,
            augmentation=pretrain.augmentation,
        )

    @classmethod
    def for_task(cls, model: ModelParams, task: FinetuneTaskParams) -> Self:
        """The one modality of a task; an image is one frame, repeated to a voxel's depth."""
        sees, hears = task.modality != "audio", task.modality == "audio"
        still = task.modality == "image"
        frames = model.video.patch[0] if still else task.frames or model.video.frames
        return cls(
            frames=frames if sees else 0,
            fps=task.fps or 1,
            frame_size=_pair(task.frame_size or model.video.frame_size),
            samples=(task.audio_samples or model.audio.samples) if hears else 0,
            audio_hz=task.audio_hz,
            candidates=0,
            words=0,
            augmentation=task.augmentation,
            still=still,
        )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


@dataclass(frozen=True, slots=True)
class View:
    """The part of a clip that evaluation shows: one of `windows` and one of `crops`."""

    window: int = 0
    windows: int = 1
    crop: int = 0
    crops: int = 1


@dataclass(frozen=True, slots=True)
class Request:
    """One row of a batch: a stored sample, and the keys of its draw (training) or its view."""

    row: int
    draw: tuple[int, ...] | None
    view: View = View()


@dataclass(slots=True)
class Sample:
    """One row of a batch."""

    video: np.ndarray  # (T, H, W, C) uint8
    audio: np.ndarray  # (S,) int16
    text: np.ndarray  # (K, L) int64
    colour: augment.Colour
    has_video: bool
    has_audio: bool


class Stored(Protocol):
    """Where samples come from: the shards, or decoded clips kept in memory."""

    def facts(self, row: Row) -> Facts:
        """Labels and captions."""

    def frames(self, row: Row, indices: Sequence[int]) -> np.ndarray:
        """(T, H, W, C)."""

    def audio(self, row: Row, first: int, last: int) -> np.ndarray:
        """(S,), fewer where the clip ends."""


def make_sample(
    stored: Stored,
    row: Row,
    sampling: Sampling,
    *,
    fps: int,
    audio_hz: int,
    vocabulary: Vocabulary | None,
    request: Request,
) -> Sample:
    """Show one stored clip: a pure function of what is stored and of the request."""
    generator = augment.generator_for(*request.draw) if request.draw is not None else None
    has_video = sampling.frames > 0 and row.video is not None
    has_audio = sampling.samples > 0 and row.audio is not None
    hz = sampling.audio_hz or audio_hz
    heard = sampling.samples / hz  # seconds
    if has_video:
        seen = 1 if sampling.still else sampling.frames * fps / sampling.fps  # stored frames
        first = _first(row.num_frames - seen, request.view, generator)
        start, length = first / fps, max(seen / fps, heard)
    else:
        length = heard
        room = row.num_samples - round(heard * audio_hz)
        start = _first(room, request.view, generator) / audio_hz
    video, colour = _picture(stored, row, sampling, start, fps, request.view, generator, has_video)
    audio = np.zeros(sampling.samples, dtype=np.int16)
    if has_audio:
        begin = round(start * audio_hz)
        wave = stored.audio(row, begin, begin + round(heard * audio_hz))
        wave = resample(wave, audio_hz, hz)[: sampling.samples]
        audio[: len(wave)] = wave
    text = np.zeros((sampling.candidates, sampling.words), dtype=np.int64)
    if vocabulary is not None and sampling.candidates:
        captions = stored.facts(row).captions
        near = nearest(captions, start=start, end=start + length, count=sampling.candidates)
        for number, caption in enumerate(near):
            text[number] = vocabulary.encode(caption.text, sampling.words)
    return Sample(video, audio, text, colour, has_video, has_audio)


def _picture(
    stored: Stored,
    row: Row,
    sampling: Sampling,
    start: float,
    fps: int,
    view: View,
    generator: torch.Generator | None,
    has_video: bool,
) -> tuple[np.ndarray, augment.Colour]:
    """The frames cut, resized and mirrored, and the colour drawn for them."""
    size = sampling.frame_size
    if not has_video:
        return np.zeros((sampling.frames, *size, 3), dtype=np.uint8), augment.IDENTITY
    indices = frame_indices(
        round(start * fps),
        row.num_frames,
        frames=1 if sampling.still else sampling.frames,
        stride=fps / sampling.fps,
    )
    frames = stored.frames(row, indices)
    inside = (row.height, row.width)
    if generator is None or sampling.augmentation is None:
        box = augment.view_box(inside, size, view=view.crop, views=view.crops)
        flip, colour = False, augment.IDENTITY
    else:
        how = sampling.augmentation
        box = augment.draw_box(
            inside, area=how.crop_area, aspect=how.crop_aspect, generator=generator
        )
        flip = augment.uniform(0, 1, generator) < 0.5 and how.flip
        colour = augment.draw_colour(how, generator)
    video = augment.take(frames, box, size, flip=flip)
    return (np.repeat(video, sampling.frames, axis=0) if sampling.still else video), colour


def _first(room: float, view: View, generator: torch.Generator | None) -> int:
    """Where a window begins that leaves `room` frames or samples: drawn, or spread evenly."""
    last = max(int(room + 1e-6), 0)
    if generator is not None:
        return min(int(augment.uniform(0, last + 1, generator)), last)
    if view.windows == 1:
        return last // 2
    return int(last * view.window / (view.windows - 1))


def frame_indices(first: int, available: int, *, frames: int, stride: float) -> list[int]:
    """`frames` indices from `first` on, `stride` apart; a clip that ends before is begun again."""
    there = max(int(np.ceil((available - first) / stride - 1e-6)), 1)
    return [first + int(number % there * stride + 1e-6) for number in range(frames)]


def resample(wave: np.ndarray, have: int, want: int) -> np.ndarray:
    """16-bit samples at another rate."""
    if have == want or not len(wave):
        return wave
    from scipy.signal import resample_poly  # slow to import, and seldom needed

    common = gcd(have, want)
    changed = resample_poly(wave.astype(np.float32), want // common, have // common)
    return np.clip(np.round(changed), -32768, 32767).astype(np.int16)


def check_rates(sampling: Sampling, *, fps: int, audio_hz: int) -> None:
    """A rate that the shards do not hold cannot be shown."""
    if sampling.frames and sampling.fps > fps:
        raise SettingsError(
            f"{sampling.fps} frames a second are asked for, the shards hold {fps}",
            hint="lower the fps of the task, or raise preprocess.fps",
        )
    if sampling.samples and (sampling.audio_hz or audio_hz) > audio_hz:
        raise SettingsError(
            f"sound at {sampling.audio_hz} Hz is asked for, the shards hold {audio_hz}",
            hint="lower audio_hz of the task, or raise preprocess.audio_hz",
        )
