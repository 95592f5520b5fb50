"""Settings of small models for tests."""

from typing import Any

import torch
from torch import Tensor

from vatt.config import ModelParams

SIZE = {"depth": 2, "dim": 12, "mlp_dim": 24, "heads": 2, "head_dim": 4}  # 2 x 4 is not 12


def small_params(**changes: Any) -> ModelParams:
    """A model of two layers, 12 wide, on clips of 4 frames of 32 x 32."""
    settings: dict[str, Any] = {
        "recipe": "paper",
        "backbone": "specific",
        "video": {"size": SIZE, "frames": 4, "frame_size": 32, "patch": (2, 16, 16)},
        "audio": {
            "size": SIZE,
            "input": "waveform",
            "samples": 64,
            "patch": 16,
            "mel_bins": None,
        },
        "text": {"size": SIZE, "words": 6, "vocabulary": 20},
        "va_dim": 8,
        "vt_dim": 6,
        "dropout": 0.1,
        "release": {"word_dim": 10, "post_dim": 14},
    }
    return ModelParams.model_validate(settings | changes)


def spectrogram_params(**changes: Any) -> ModelParams:
    """The same, its audio a spectrogram of 32 frames and 20 mel bins."""
    audio = {
        "size": SIZE,
        "input": "spectrogram",
        "samples": 32,
        "patch": (16, 5),
        "mel_bins": 20,
    }
    return small_params(audio=audio, **changes)


def small_inputs(clips: int = 3, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Video, audio and two texts for each clip, some of them shorter or absent."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.rand(clips, 4, 32, 32, 3, generator=generator) * 2 - 1
    audio = torch.rand(clips, 64, generator=generator) * 2 - 1
    text = torch.randint(1, 20, (clips, 2, 6), generator=generator)
    text[0, 0, 3:] = 0
    text[-1, -1] = 0
    return video, audio, text
