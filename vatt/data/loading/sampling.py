"""What a model is shown of a stored sample: which frames, which sound, which words.

B clips, T H W C frames, height, width, channels, S audio samples, K candidate texts, L words. A
spectrogram model gets log-mel frames, 42.7 ms long, one every 21.3 ms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from math import gcd, prod
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
from vatt.data.clips.manifest import Caption
from vatt.data.clips.samples import IndexRow, nearest
from vatt.data.clips.storage import Box, FrameStream, Storage
from vatt.data.clips.text import Vocabulary
from vatt.data.loading import augment
from vatt.data.loading.reader import BrokenSampleError
from vatt.errors import SettingsError

WINDOW_SECONDS = 2048 / 48000
STEP_SECONDS = 1024 / 48000
LOWEST_HZ, HIGHEST_HZ = 80.0, 7600.0  # of the mel filters; never above half the sample rate
LOUDNESS = 1e4  # log(1 + LOUDNESS x)
ALIGNED = 64  # bytes; each array of a batch begins at a multiple

ArrayShapes = Mapping[str, tuple[tuple[int, ...], type]]  # of one clip: name -> shape, type


@dataclass(frozen=True, slots=True)
class Sampling:
    """The size and form of a model's input; a modality of size 0 is not read."""

    frames: int  # T
    fps: float
    frame_size: tuple[int, int]  # H, W
    samples: int  # S; for a spectrogram, its number of frames
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
        """All three modalities; text only with the vocabulary that the model was trained with."""
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
        """The one modality of a task; an image is one frame, repeated to fill a video patch."""
        audio, still = task.modality == "audio", task.modality == "image"
        frames = model.video.patch[0] if still else task.frames or model.video.frames
        return cls(
            frames=0 if audio else frames,
            fps=task.fps or 1,
            frame_size=_pair(task.frame_size or model.video.frame_size),
            samples=(task.audio_samples or model.audio.samples) if audio else 0,
            audio_hz=task.audio_hz,
            candidates=0,
            words=0,
            augmentation=task.augmentation,
            still=still,
            mel_bins=model.audio.mel_bins,
        )

    def shapes(self) -> ArrayShapes:
        """The shape and type of each array of one clip."""
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

    def audio_seconds(self, hz: int) -> float:
        """The length of the sound shown, at a sample rate of `hz`."""
        return self.samples / hz if self.mel_bins is None else self.samples * STEP_SECONDS


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


@dataclass(slots=True)
class Arrays:
    """The arrays of a batch, one row for each clip, all in one piece of memory."""

    video: np.ndarray  # (B, T, H, W, C) uint8
    audio: np.ndarray  # (B, S) int16, or (B, frames, mel bins) float32
    text: np.ndarray  # (B, K, L) int64, 0 pads
    colour: np.ndarray  # (B, 4) float32
    has_video: np.ndarray  # (B,) bool
    has_audio: np.ndarray  # (B,) bool

    @classmethod
    def over(cls, memory: np.ndarray, clips: int, shapes: ArrayShapes) -> Self:
        """Lay the arrays of `clips` rows over bytes."""
        views: dict[str, np.ndarray] = {}
        offset = 0
        for field in fields(cls):
            shape, kind = shapes[field.name]
            size = clips * prod(shape) * np.dtype(kind).itemsize
            part = memory[offset : offset + size]
            views[field.name] = part.view(kind).reshape(clips, *shape)
            offset += _aligned(size)
        return cls(**views)

    @classmethod
    def empty(cls, clips: int, shapes: ArrayShapes) -> Self:
        """Arrays in this process's own memory; their content is undefined."""
        return cls.over(np.empty(bytes_of(clips, shapes), np.uint8), clips, shapes)


def bytes_of(clips: int, shapes: ArrayShapes) -> int:
    """The memory that the arrays of `clips` clips need."""
    sizes = (prod(shape) * np.dtype(kind).itemsize for shape, kind in shapes.values())
    return sum(_aligned(clips * size) for size in sizes)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


@dataclass(frozen=True, slots=True)
class View:
    """The part of a clip that evaluation shows: one of `windows` in time, one of `crops`."""

    window: int = 0
    windows: int = 1
    crop: int = 0
    crops: int = 1


@dataclass(frozen=True, slots=True)
class Request:
    """What one row of a batch shows: a sample, and the keys of its random draw or its view."""

    row: IndexRow
    draw: tuple[int, ...] | None  # training; None: evaluation shows `view`
    view: View = View()
    position: int = 0  # in the order of training
    attempt: int = 0  # how many samples were broken before this one


Requests = dict[int, Request]  # by their row of the batch


class SampleStore(Protocol):
    """Where samples are read from: the shards, or decoded samples kept in memory."""

    def captions(self, row: IndexRow) -> tuple[Caption, ...]:
        """The captions; their times count from the start of the sample."""

    def each_frame(self, row: IndexRow, indices: Sequence[int], box: Box) -> FrameStream:
        """The part of the frames in the box, each (H, W, C) with its place in `indices`."""

    def audio(self, row: IndexRow, first: int, last: int) -> np.ndarray:
        """(S,), shorter where the clip ends."""


@dataclass(frozen=True, slots=True)
class SampleSource:
    """Stored samples, and the form in which a model is shown all of them."""

    stored: SampleStore
    storage: Storage
    sampling: Sampling
    vocabulary: Vocabulary | None


def fill_all(
    arrays: Arrays, requests: Requests, source: SampleSource
) -> dict[int, BrokenSampleError]:
    """Fill the rows that are requested; returns the rows that could not be filled, and why."""
    broken = {}
    for number, request in requests.items():
        try:
            fill(arrays, number, request, source)
        except BrokenSampleError as error:
            broken[number] = error
    return broken


def fill(arrays: Arrays, number: int, request: Request, source: SampleSource) -> None:
    """Fill one row: a pure function of the request and of what is stored."""
    row, sampling = request.row, source.sampling
    has_video = sampling.frames > 0 and row.video is not None
    has_audio = sampling.samples > 0 and row.audio is not None
    generator = augment.generator_for(*request.draw) if request.draw is not None else None
    start, end = _window(request, source, generator)
    arrays.has_video[number], arrays.has_audio[number] = has_video, has_audio
    arrays.colour[number] = augment.IDENTITY
    if has_video:
        arrays.colour[number] = _fill_video(arrays.video[number], request, source, start, generator)
    else:
        arrays.video[number] = 0
    arrays.audio[number] = 0
    if has_audio:
        _fill_audio(arrays.audio[number], row, source, start)
    arrays.text[number] = 0
    if source.vocabulary is not None and sampling.candidates:
        captions = source.stored.captions(row)
        chosen = nearest(captions, start=start, end=end, count=sampling.candidates)
        for candidate, caption in enumerate(chosen):
            arrays.text[number, candidate] = source.vocabulary.encode(caption.text, sampling.words)


def _window(
    request: Request, source: SampleSource, generator: torch.Generator | None
) -> tuple[float, float]:
    """Start and end of what is shown, in seconds of the clip."""
    row, sampling = request.row, source.sampling
    fps, audio_hz = source.storage.fps, source.storage.audio_hz
    sound = sampling.audio_seconds(sampling.audio_hz or audio_hz)
    if sampling.frames > 0 and row.video is not None:
        frames = 1 if sampling.still else sampling.frames * fps / sampling.fps  # as stored
        start = _first(row.num_frames - frames, request.view, generator) / fps
        return start, start + max(frames / fps, sound)
    room = row.num_samples - round(sound * audio_hz)
    start = _first(room, request.view, generator) / audio_hz
    return start, start + sound


def _first(room: float, view: View, generator: torch.Generator | None) -> int:
    """The beginning of a window that leaves `room` frames or samples: drawn, or evenly spread."""
    last = max(int(room + 1e-6), 0)
    if generator is not None:
        return min(int(augment.uniform(0, last + 1, generator)), last)
    if view.windows == 1:
        return last // 2
    return int(last * view.window / (view.windows - 1))


def _fill_video(
    video: np.ndarray,  # (T, H, W, C)
    request: Request,
    source: SampleSource,
    start: float,
    generator: torch.Generator | None,
) -> augment.Colour:
    """Crop, resize and flip the frames; returns the colour change drawn for them."""
    row, sampling, fps = request.row, source.sampling, source.storage.fps
    stored = row.height, row.width
    change = None if generator is None else sampling.augmentation
    if generator is None or change is None:
        view = request.view
        box = augment.view_box(stored, sampling.frame_size, view=view.crop, views=view.crops)
        flip, colour = False, augment.IDENTITY
    else:
        box = augment.draw_box(
            stored, area=change.crop_area, aspect=change.crop_aspect, generator=generator
        )
        flip = augment.uniform(0, 1, generator) < 0.5 and change.flip
        colour = augment.draw_colour(change, generator)
    count = 1 if sampling.still else sampling.frames
    indices = frame_indices(
        round(start * fps), row.num_frames, frames=count, stride=fps / sampling.fps
    )
    augment.show(source.stored.each_frame(row, indices, box), video[:count], flip=flip)
    video[count:] = video[:1]
    return colour


def frame_indices(first: int, available: int, *, frames: int, stride: float) -> list[int]:
    """`frames` indices from `first` on, `stride` apart; a clip too short for them is repeated."""
    fitting = max(int(np.ceil((available - first) / stride - 1e-6)), 1)
    return [first + int(number % fitting * stride + 1e-6) for number in range(frames)]


def _fill_audio(audio: np.ndarray, row: IndexRow, source: SampleSource, start: float) -> None:
    """The waveform (S,), or the spectrogram (frames, mel bins), from `start` seconds on."""
    sampling, stored_hz = source.sampling, source.storage.audio_hz
    hz = sampling.audio_hz or stored_hz
    first = round(start * stored_hz)
    last = first + round(sampling.audio_seconds(hz) * stored_hz)
    wave = resample(source.stored.audio(row, first, last), stored_hz, hz)
    if sampling.mel_bins is None:
        wave = wave[: sampling.samples]
        audio[: len(wave)] = wave
    else:
        frames, bins = audio.shape
        audio[:] = log_mel(wave / np.float32(32768), hz=hz, frames=frames, bins=bins)


def resample(wave: np.ndarray, have: int, want: int) -> np.ndarray:
    """16-bit samples at another rate."""
    if have == want or not len(wave):
        return wave
    from scipy.signal import resample_poly  # slow to import, and rarely needed

    common = gcd(have, want)
    changed = resample_poly(wave.astype(np.float32), want // common, have // common)
    return np.clip(np.round(changed), -32768, 32767).astype(np.int16)


def log_mel(wave: np.ndarray, *, hz: int, frames: int, bins: int) -> np.ndarray:
    """Samples in [-1, 1] (S,) -> (frames, bins) in [0, 1]; a short wave is padded with silence."""
    width = round(WINDOW_SECONDS * hz)
    starts = np.round(np.arange(frames) * STEP_SECONDS * hz).astype(int)
    padded = np.zeros(starts[-1] + width, np.float32)
    wave = wave[: len(padded)]
    padded[: len(wave)] = wave
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)[starts] * _hann(width)
    loud = np.log1p(LOUDNESS * (np.abs(np.fft.rfft(windows, axis=1)) @ _filters(hz, width, bins)))
    low, high = loud.min(), loud.max()
    return ((loud - low) / max(high - low, 1e-12)).astype(np.float32)


@lru_cache(maxsize=2)
def _hann(width: int) -> np.ndarray:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / width)).astype(np.float32)


@lru_cache(maxsize=2)
def _filters(hz: int, width: int, bins: int) -> np.ndarray:  # -> (F, bins)
    """Triangles of equal width on the mel scale; frequency 0 is in no triangle."""
    edges = np.linspace(_mel(LOWEST_HZ), _mel(min(HIGHEST_HZ, hz / 2)), bins + 2)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    place = _mel(np.fft.rfftfreq(width, 1 / hz))[:, None]
    filters = np.minimum((place - low) / (centre - low), (high - place) / (high - centre)).clip(0)
    filters[0] = 0
    return filters


def _mel(frequency: np.ndarray | float) -> np.ndarray:
    return 1127 * np.log1p(np.asarray(frequency) / 700)


def check_rates(sampling: Sampling, storage: Storage) -> None:
    """Raise a SettingsError where a rate is higher than the rate of the shards."""
    fps, audio_hz = storage.fps, storage.audio_hz
    if sampling.frames and sampling.fps > fps:
        raise SettingsError(
            f"{sampling.fps} frames a second are requested, but the shards have {fps}",
            hint="lower the fps of the task, or raise preprocess.fps",
        )
    if sampling.samples and (sampling.audio_hz or audio_hz) > audio_hz:
        raise SettingsError(
            f"sound at {sampling.audio_hz} Hz is requested, but the shards have {audio_hz}",
            hint="lower audio_hz of the task, or raise preprocess.audio_hz",
        )
