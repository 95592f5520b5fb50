"""Audio: segments of a waveform, or patches of a log-mel spectrogram.

S samples. A spectrogram model gets log-mel frames, 42.7 ms long, one every 21.3 ms.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import gcd
from typing import TYPE_CHECKING

import numpy as np

from vatt.config import AudioParams
from vatt.senses.form import ArrayShapes, Cutting, SamplingLike, Sense, Showing

if TYPE_CHECKING:
    from torch import Tensor

WINDOW_SECONDS = 2048 / 48000
STEP_SECONDS = 1024 / 48000
LOWEST_HZ, HIGHEST_HZ = 80.0, 7600.0  # of the mel filters; never above half the sample rate
LEVELS = 4096  # steps of 1 in a spectrogram, whose sums are then exact
LOUDNESS = 1e4  # log(1 + LOUDNESS x)


class Audio(Sense):
    """The sound."""

    name, loss, lacking = "audio", "nce", "no-audio"
    skips_absent = False  # as in the paper and the release

    def tokens(self, section: AudioParams) -> Cutting:
        """Segments of a waveform; or patches of a spectrogram, to which table 10 compares them."""
        bins = () if section.mel_bins is None else (section.mel_bins,)
        axes = 1 + len(bins)
        return Cutting(
            axes=("samples", "mel bins")[:axes],
            positions=("temporal", "spectral")[:axes],
            sizes=(section.samples, *bins),
            patch=(section.patch,) if isinstance(section.patch, int) else section.patch,
            channels=None,
        )

    def arrays(self, sampling: SamplingLike) -> ArrayShapes:
        """A waveform as it is stored, or a spectrogram."""
        bins, kind = ((sampling.mel_bins,), np.float32) if sampling.mel_bins else ((), np.int16)
        return {"audio": ((sampling.samples, *bins), kind), "has_audio": ((), np.bool_)}

    def fill(self, out: Mapping[str, np.ndarray], shown: Showing) -> None:
        """The waveform (S,), or the spectrogram (frames, mel bins), from the start on."""
        row, sampling = shown.row, shown.source.sampling
        out["audio"][:] = 0
        out["has_audio"][()] = sampling.samples > 0 and row.audio is not None
        if not out["has_audio"]:
            return
        audio, stored_hz = out["audio"], shown.source.storage.audio_hz
        hz = sampling.audio_hz or stored_hz
        first = round(shown.start * stored_hz)
        last = first + round(audio_seconds(sampling, hz) * stored_hz)
        wave = resample(shown.source.stored.audio(row, first, last), stored_hz, hz)
        if sampling.mel_bins is None:
            wave = wave[: sampling.samples]
            audio[: len(wave)] = wave
        else:
            frames, bins = audio.shape
            audio[:] = log_mel(wave / np.float32(32768), hz=hz, frames=frames, bins=bins)

    def scaled(self, values: Tensor, change: Tensor | None) -> Tensor:
        """A waveform in [-1, 1]; a spectrogram is unchanged."""
        return values if values.is_floating_point() else values.float() / 32768

    def energy(self, values: Tensor) -> Tensor:
        """Of int16 samples, the square; of a spectrogram, how far above the clip's lowest value."""
        if values.is_floating_point():
            levels = (values * LEVELS).round().long()
            return levels - levels.amin(dim=(1, 2), keepdim=True)
        return values.long().square()


def audio_seconds(sampling: SamplingLike, hz: int) -> float:
    """The length of the sound shown, at a sample rate of `hz`."""
    if sampling.mel_bins is None:
        return sampling.samples / hz
    return sampling.samples * STEP_SECONDS


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
