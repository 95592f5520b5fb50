"""Waveform -> log mel spectrogram, as the paper's ablation and the release make it.

S waveform samples, M frames, F frequencies. 42.7 ms are seen at a time, every 21.3 ms: at 48 kHz
2,048 samples and 1,024.
"""

from functools import lru_cache

import numpy as np

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
