"""VATT: three towers (or one for all) and the heads into the common spaces.

B clips, K candidate texts of a clip, T H W C frames, height, width, channels, S waveform samples,
L words, D feature width, E common-space width.
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from vatt.config import ModelParams
from vatt.model.assembly import build_heads, build_towers
from vatt.model.initialise import initialise
from vatt.model.inputs import audio_grid, video_grid
from vatt.model.patches import check_input


@dataclass(frozen=True, slots=True)
class Features:
    """What the heads receive; None for a modality that was not given."""

    video: Tensor | None = None  # (B, D)
    audio: Tensor | None = None  # (B, D)
    text: Tensor | None = None  # (B, K, D)


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Unit vectors in the common spaces; None for a modality that was not given."""

    video_va: Tensor | None = None  # (B, E)
    audio_va: Tensor | None = None  # (B, E)
    video_vt: Tensor | None = None  # (B, E)
    text_vt: Tensor | None = None  # (B, K, E)


@dataclass(frozen=True, slots=True)
class Output(Embeddings):
    """Embeddings and the features they come from."""

    video_features: Tensor | None = None
    audio_features: Tensor | None = None
    text_features: Tensor | None = None


class VATT(nn.Module):
    """The model of the paper, from raw signals to unit vectors that can be compared."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.params = params
        towers = build_towers(params)
        self.video, self.audio, self.text = towers["video"], towers["audio"], towers["text"]
        self.heads = build_heads(params)
        self.num_video_tokens = math.prod(video_grid(params.video))  # before DropToken
        self.num_audio_tokens = math.prod(audio_grid(params.audio))
        initialise(self)

    def forward(
        self,
        video: Tensor | None = None,
        audio: Tensor | None = None,
        text: Tensor | None = None,
        *,
        kept_video: Tensor | None = None,
        kept_audio: Tensor | None = None,
    ) -> Output:
        """Embed whatever is given.

        video (B, T, H, W, 3) and audio (B, S) are floats in [-1, 1] (a spectrogram model takes
        audio (B, frames, mel bins)); text (B, K, L) holds word ids, 0 for a pad. `kept_video`
        and `kept_audio` (B, kept) name the tokens that DropToken leaves; only training gives them.
        Raises SettingsError for what is no such tensor.
        """
        features = self.encode(video, audio, text, kept_video=kept_video, kept_audio=kept_audio)
        has_text = None if text is None else (text != 0).any(-1)
        embeddings = self.project(features, has_text=has_text)
        return Output(
            video_va=embeddings.video_va,
            audio_va=embeddings.audio_va,
            video_vt=embeddings.video_vt,
            text_vt=embeddings.text_vt,
            video_features=features.video,
            audio_features=features.audio,
            text_features=features.text,
        )

    def encode(
        self,
        video: Tensor | None = None,
        audio: Tensor | None = None,
        text: Tensor | None = None,
        *,
        kept_video: Tensor | None = None,
        kept_audio: Tensor | None = None,
    ) -> Features:
        """Raw signals -> features; arguments as in `forward`."""
        if text is not None:
            check_input(text, ("candidates", "words"), ids=True)
        return Features(
            video=None if video is None else self.video(video, kept_video),
            audio=None if audio is None else self.audio(audio, kept_audio),
            text=None
            if text is None
            else self.text(text.flatten(0, 1)).unflatten(0, text.shape[:2]),
        )

    def project(self, features: Features, *, has_text: Tensor | None = None) -> Embeddings:
        """Features -> unit vectors; in training, batch norm sees just the rows of this call.

        `has_text` (B, K) says which texts are more than pads; the others leave its statistics.
        """
        va, vt = (None, None) if features.video is None else self.heads.video(features.video)
        audio = None if features.audio is None else self.heads.audio(features.audio)
        text = None if features.text is None else self.heads.text(features.text, has_text)
        return Embeddings(_unit(va), _unit(audio), _unit(vt), _unit(text))


def _unit(vectors: Tensor | None) -> Tensor | None:
    """L2-normalised; the norm's floor keeps a zero vector finite."""
    return None if vectors is None else F.normalize(vectors, dim=-1, eps=1e-6)
