"""What a model is shown of a stored clip: which frames, which sound, which words.

T H W C: frames, height, width, channels; S samples; K candidate texts; L words. A spectrogram model
gets log-mel frames, 42.7 ms long, one every 21.3 ms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch

from vatt.config import (
    AugmentationParams,
    EvaluateParams,
    FinetuneTaskParams,
    ModelParams,
    PretrainParams,
)
from vatt.data.clips.samples import IndexRow, nearest
from vatt.data.clips.storage import Box, FrameStream
from vatt.data.clips.text import Vocabulary
from vatt.data.loading import augment
from vatt.data.loading.arrays import Arrays, ArrayShapes
from vatt.data.loading.reader import BrokenSampleError, SampleFacts
from vatt.errors import SettingsError

WINDOW_SECONDS = 2048 / 48000
STEP_SECONDS = 1024 / 48000
LOWEST_HZ, HIGHEST_HZ = 80.0, 7600.0  # of the filters; never above half the sample rate
LOUDNESS = 1e4  # log(1 + LOUDNESS x)


def log_mel(wave: np.ndarray, *, hz: int, frames: int, bins: int) -> np.ndarray:
    """Samples in [-1, 1] (S,) -> (M, bins) from 0 to 1; a wave that ends before goes on silent."""
    width = round(WINDOW_SECONDS * hz)
    starts = np.round(np.arange(frames) * STEP_SECONDS * hz).astype(int)
    padded = np.zeros(starts[-1] + width, np.float32)
    there = wave[: len(padded)]
    padded[: len(there)] = there
    seen = np.lib.stride_tricks.sliding_window_view(padded, width)[starts] * _hann(width)
    loud = np.log1p(LOUDNESS * (np.abs(np.fft.rfft(seen, axis=1)) @ _filters(hz, width, bins)))
    low, high = loud.min(), loud.max()
    return ((loud - low) / max(high - low, 1e-12)).astype(np.float32)


@lru_cache(maxsize=2)
def _hann(width: int) -> np.ndarray:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / width)).astype(np.float32)


@lru_cache(maxsize=2)
def _filters(hz: int, width: int, bins: int) -> np.ndarray:  # -> (F, bins)
    """Triangles that are of equal width on the mel scale; the frequency 0 is in none."""
    edges = np.linspace(_mel(LOWEST_HZ), _mel(min(HIGHEST_HZ, hz / 2)), bins + 2)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    place = _mel(np.fft.rfftfreq(width, 1 / hz))[:, None]
    filters = np.minimum((place - low) / (centre - low), (high - place) / (high - centre)).clip(0)
    filters[0] = 0
    return filters


def _mel(frequency: np.ndarray | float) -> np.ndarray:
    return 1127 * np.log1p(np.asarray(frequency) / 700)


@dataclass(frozen=True, slots=True)
class Sampling:
    """The input of a model; a modality of size 0 is neither read nor decoded."""

    frames: int  # T
    fps: float
    frame_size: tuple[int, int]  # H, W
    samples: int  # S; of a spectrogram its frames
    audio_hz: int | None  # None: as stored
    candidates: int  # K
    words: int  # L
    augmentation: AugmentationParams | None  # training only; None: centre crop, as stored
    still: bool = False  # one frame of the clip, T times
    mel_bins: int | None = None  # a spectrogram instead of the waveform
    vocabulary: Path | None = None  # None: the shards' own

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
            mel_bins=model.audio.mel_bins,
        )

    @classmethod
    def for_evaluation(
        cls, model: ModelParams, evaluate: EvaluateParams, *, vocabulary: Path | None
    ) -> Self:
        """All three modalities; no words without the vocabulary that the model learned."""
        return cls(
            frames=model.video.frames,
            fps=evaluate.fps,
            frame_size=_pair(model.video.frame_size),
            samples=model.audio.samples,
            audio_hz=None,
            candidates=0 if vocabulary is None else evaluate.captions,
            words=model.text.words,
            augmentation=None,
            mel_bins=model.audio.mel_bins,
            vocabulary=vocabulary,
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
            mel_bins=model.audio.mel_bins,
        )

    def shapes(self) -> ArrayShapes:
        """What one clip takes in a batch."""
        return {
            "video": ((self.frames, *self.frame_size, 3), np.uint8),
            "audio": self._audio_shape(),
            "text": ((self.candidates, self.words), np.int64),
            "colour": ((4,), np.float32),
            "has_video": ((), np.bool_),
            "has_audio": ((), np.bool_),
        }

    def _audio_shape(self) -> tuple[tuple[int, ...], type]:
        if self.mel_bins is None:
            return (self.samples,), np.int16
        return (self.samples, self.mel_bins), np.float32

    def heard(self, hz: int) -> float:
        """The seconds of sound that are shown."""
        return self.samples / hz if self.mel_bins is None else self.samples * STEP_SECONDS


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
    position: int = 0  # in the order of training
    attempt: int = 0  # stand-ins that were broken too


Broken = tuple[int, BrokenSampleError]  # a row of a batch, and why it is not filled


class SampleStore(Protocol):
    """Where samples come from: the shards, or decoded clips kept in memory."""

    def facts(self, row: IndexRow) -> SampleFacts:
        """Labels and captions."""

    def each_frame(self, row: IndexRow, indices: Sequence[int], box: Box) -> FrameStream:
        """The part of the frames in the box, each (H, W, C) with its place in `indices`."""

    def audio(self, row: IndexRow, first: int, last: int) -> np.ndarray:
        """(S,), fewer where the clip ends."""


@dataclass(frozen=True, slots=True)
class SampleSource:
    """Stored clips, and what is the same for all of them."""

    stored: SampleStore
    fps: int
    audio_hz: int
    vocabulary: Vocabulary | None


def fill_all(
    arrays: Arrays,
    numbers: Sequence[int],
    rows: Sequence[IndexRow],
    asked: Sequence[Request],
    source: SampleSource,
    sampling: Sampling,
) -> list[Broken]:
    """Show stored clips in the rows `numbers`; returns what could not be read."""
    broken = []
    for number, row, request in zip(numbers, rows, asked, strict=True):
        try:
            fill(arrays, number, source, row, sampling, request)
        except BrokenSampleError as error:
            broken.append((number, error))
    return broken


def fill(
    arrays: Arrays,
    number: int,
    source: SampleSource,
    row: IndexRow,
    sampling: Sampling,
    request: Request,
) -> None:
    """Show one stored clip in row `number`: a pure function of what is stored and the request."""
    stored, fps, audio_hz = source.stored, source.fps, source.audio_hz
    generator = augment.generator_for(*request.draw) if request.draw is not None else None
    has_video = sampling.frames > 0 and row.video is not None
    has_audio = sampling.samples > 0 and row.audio is not None
    hz = sampling.audio_hz or audio_hz
    heard = sampling.heard(hz)
    if has_video:
        seen = 1 if sampling.still else sampling.frames * fps / sampling.fps  # stored frames
        first = _first(row.num_frames - seen, request.view, generator)
        start, length = first / fps, max(seen / fps, heard)
    else:
        length = heard
        room = row.num_samples - round(heard * audio_hz)
        start = _first(room, request.view, generator) / audio_hz
    arrays.has_video[number], arrays.has_audio[number] = has_video, has_audio
    arrays.colour[number] = augment.IDENTITY
    if has_video:
        arrays.colour[number] = _show_picture(
            arrays.video[number], stored, row, sampling, start, fps, request.view, generator
        )
    else:
        arrays.video[number] = 0
    audio = arrays.audio[number]
    audio[:] = 0
    if has_audio:
        begin = round(start * audio_hz)
        wave = stored.audio(row, begin, begin + round(heard * audio_hz))
        wave = resample(wave, audio_hz, hz)
        if sampling.mel_bins is None:
            wave = wave[: sampling.samples]
            audio[: len(wave)] = wave
        else:
            frames, bins = audio.shape
            audio[:] = log_mel(wave / np.float32(32768), hz=hz, frames=frames, bins=bins)
    text = arrays.text[number]
    text[:] = 0
    if source.vocabulary is not None and sampling.candidates:
        captions = stored.facts(row).captions
        near = nearest(captions, start=start, end=start + length, count=sampling.candidates)
        for candidate, caption in enumerate(near):
            text[candidate] = source.vocabulary.encode(caption.text, sampling.words)


def _show_picture(
    video: np.ndarray,
    stored: SampleStore,
    row: IndexRow,
    sampling: Sampling,
    start: float,
    fps: int,
    view: View,
    generator: torch.Generator | None,
) -> augment.Colour:
    """Cut, resize and mirror the frames into `video`; returns the colour drawn for them."""
    size, inside = sampling.frame_size, (row.height, row.width)
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
    shown = 1 if sampling.still else sampling.frames
    indices = frame_indices(
        round(start * fps), row.num_frames, frames=shown, stride=fps / sampling.fps
    )
    augment.show(stored.each_frame(row, indices, box), video[:shown], flip=flip)
    video[shown:] = video[:1]
    return colour


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
