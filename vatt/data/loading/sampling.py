"""Which part of a stored sample a model is shown: one window in time for all senses.

What each sense shows of it is in vatt/senses. B clips, T H W frames, height, width, S audio
samples, K candidate texts, L words.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from vatt.config import (
    AugmentationParams,
    EvaluateParams,
    FinetuneTaskParams,
    ModelParams,
    PretrainParams,
)
from vatt.data.clips.samples import IndexRow
from vatt.data.clips.storage import Storage
from vatt.data.loading.reader import BrokenSampleError
from vatt.errors import SettingsError
from vatt.senses import SENSES, senses_of
from vatt.senses.audio import audio_seconds
from vatt.senses.form import CENTRE, ArrayShapes, SampleSource, Showing, View
from vatt.senses.video import generator_for, pair, uniform

ALIGNED = 64  # bytes; each array of a batch begins at a multiple


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
    more: Mapping[str, Any] = field(default_factory=dict)  # settings of the other senses by name

    @classmethod
    def for_pretraining(cls, model: ModelParams, pretrain: PretrainParams) -> Self:
        """All senses of the model."""
        return cls(
            frames=model.video.frames,
            fps=pretrain.fps,
            frame_size=pair(model.video.frame_size),
            samples=model.audio.samples,
            audio_hz=None,
            candidates=pretrain.text_candidates,
            words=model.text.words,
            augmentation=pretrain.augmentation,
            mel_bins=model.audio.mel_bins,
            more=_more(model),
        )

    @classmethod
    def for_evaluation(
        cls, model: ModelParams, evaluate: EvaluateParams, *, vocabulary: Path | None
    ) -> Self:
        """All senses of the model; text only with the vocabulary that it was trained with."""
        return cls(
            frames=model.video.frames,
            fps=evaluate.fps,
            frame_size=pair(model.video.frame_size),
            samples=model.audio.samples,
            audio_hz=None,
            candidates=0 if vocabulary is None else evaluate.captions,
            words=model.text.words,
            augmentation=None,
            mel_bins=model.audio.mel_bins,
            vocabulary=vocabulary,
            more=_more(model),
        )

    @classmethod
    def for_task(cls, model: ModelParams, task: FinetuneTaskParams) -> Self:
        """The one modality of a task; an image is one frame, repeated to fill a video patch."""
        audio, still = task.modality == "audio", task.modality == "image"
        frames = model.video.patch[0] if still else task.frames or model.video.frames
        return cls(
            frames=0 if audio else frames,
            fps=task.fps or 1,
            frame_size=pair(task.frame_size or model.video.frame_size),
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
            name: form for sense in SENSES.values() for name, form in sense.arrays(self).items()
        }


def _more(model: ModelParams) -> dict[str, Any]:
    """The settings of the senses that have a member of their own in the shards."""
    return {sense.name: sense.section(model) for sense in senses_of(model) if sense.places}


class Arrays(dict[str, np.ndarray]):
    """The arrays of a batch, one row for each clip, all in one piece of memory."""

    @classmethod
    def over(cls, memory: np.ndarray, clips: int, shapes: ArrayShapes) -> Self:
        """Lay the arrays of `clips` rows over bytes."""
        views = cls()
        offset = 0
        for name, (shape, kind) in shapes.items():
            size = clips * prod(shape) * np.dtype(kind).itemsize
            part = memory[offset : offset + size]
            views[name] = part.view(kind).reshape(clips, *shape)
            offset += _aligned(size)
        return views

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
class Request:
    """What one row of a batch shows: a sample, and the keys of its random draw or its view."""

    row: IndexRow
    draw: tuple[int, ...] | None  # training; None: evaluation shows `view`
    view: View = CENTRE
    position: int = 0  # in the order of training
    attempt: int = 0  # how many samples were broken before this one


Requests = dict[int, Request]  # by their row of the batch


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
    generator = generator_for(*request.draw) if request.draw is not None else None
    start, end = _window(request, source, generator)
    shown = Showing(request.row, source, start, end, request.view, generator)
    for sense in SENSES.values():
        own = {name: arrays[name][number, ...] for name in sense.arrays(source.sampling)}
        if own:
            sense.fill(own, shown)


def _window(
    request: Request, source: SampleSource, generator: torch.Generator | None
) -> tuple[float, float]:
    """Start and end of what is shown, in seconds of the clip."""
    row, sampling = request.row, source.sampling
    fps, audio_hz = source.storage.fps, source.storage.audio_hz
    sound = audio_seconds(sampling, sampling.audio_hz or audio_hz)
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
        return min(int(uniform(0, last + 1, generator)), last)
    if view.windows == 1:
        return last // 2
    return int(last * view.window / (view.windows - 1))


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
    for name, section in sampling.more.items():
        SENSES[name].check(section, storage)
