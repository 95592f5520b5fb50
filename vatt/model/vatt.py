"""The model of the paper (section 3): three towers, or one for all, and the heads behind them.

B clips, K candidate texts of a clip, T H W C frames, height, width, channels, S waveform samples,
L words, D feature width, E common-space width.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vatt.config import ModelParams, SizeParams
from vatt.model.operators import Linear, full_precision
from vatt.model.patches import (
    AudioEmbedding,
    PatchEmbedding,
    audio_grid,
    audio_patch,
    check_input,
    video_grid,
)
from vatt.model.positions import AxisPositions
from vatt.model.projection import Heads
from vatt.model.recipe import RECIPES
from vatt.model.transformer import Attention, Encoder, TextTower, Tower, resolve


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


MODALITIES = ("video", "audio", "text")


def build_towers(params: ModelParams) -> dict[str, nn.Module]:
    """A tower for each modality; agnostic ones hold the same encoder."""
    return _shared_towers(params) if params.backbone == "agnostic" else _own_towers(params)


def build_heads(params: ModelParams) -> Heads:
    """The projections into the common spaces."""
    return RECIPES[params.recipe].heads(params, feature_dims(params))


def feature_dims(params: ModelParams) -> dict[str, int]:
    """The width of each tower's answer."""
    dims = {name: size.dim for name, size in _sizes(params).items()}
    if params.backbone == "specific":
        return dims
    width = RECIPES[params.recipe].shared_width
    return {name: width(dim, params) for name, dim in dims.items()}


def _own_towers(params: ModelParams) -> dict[str, nn.Module]:
    recipe, sizes, dropout = RECIPES[params.recipe], _sizes(params), params.dropout
    audio_bias = params.audio.input == "waveform" or recipe.spectrogram_bias
    encoders = {
        "video": Encoder(sizes["video"], dropout=dropout),
        "audio": Encoder(sizes["audio"], dropout=dropout, bias=audio_bias),
        "text": recipe.text_encoder(sizes["text"], dropout),
    }
    return {
        "video": Tower(
            video_embedding(params, nn.Identity()),
            encoders["video"],
            dim=sizes["video"].dim,
            post=nn.Identity(),
        ),
        "audio": Tower(
            audio_embedding(params, nn.Identity()),
            encoders["audio"],
            dim=sizes["audio"].dim,
            post=nn.Identity(),
        ),
        "text": recipe.text_tower(params, sizes["text"], encoders["text"]),
    }


def _shared_towers(params: ModelParams) -> dict[str, nn.Module]:
    recipe, size = RECIPES[params.recipe], _sizes(params)["video"]
    encoder = Encoder(size, dropout=params.dropout)
    return {
        "video": Tower(
            video_embedding(params, recipe.shared_lift(size.dim)),
            encoder,
            dim=size.dim,
            post=recipe.shared_post(size.dim, params),
        ),
        "audio": Tower(
            audio_embedding(params, recipe.shared_lift(size.dim)),
            encoder,
            dim=size.dim,
            post=recipe.shared_post(size.dim, params),
        ),
        "text": recipe.shared_text_tower(params, size, encoder),
    }


def video_embedding(params: ModelParams, lift: nn.Module) -> PatchEmbedding:
    """Voxels of t x h x w, with three tables of positions."""
    recipe, dim = RECIPES[params.recipe], resolve(params.video.size).dim
    positions = AxisPositions(
        ("temporal", "vertical", "horizontal"),
        video_grid(params.video),
        dim,
        norm=recipe.position_norm(dim),
        resize=recipe.resize,
    )
    return PatchEmbedding(
        ("frames", "height", "width"),
        params.video.patch,
        channels=3,
        lift=lift,
        dim=dim,
        positions=positions,
        dropout=params.dropout,
    )


def audio_embedding(params: ModelParams, lift: nn.Module) -> AudioEmbedding:
    """Segments of a waveform, or patches of a spectrogram."""
    recipe, dim = RECIPES[params.recipe], resolve(params.audio.size).dim
    grid = audio_grid(params.audio)
    kind = AxisPositions if len(grid) == 1 else recipe.spectrogram_positions(params)
    positions = kind(
        ("temporal", "spectral")[: len(grid)],
        grid,
        dim,
        norm=recipe.position_norm(dim),
        resize=recipe.resize,
    )
    return AudioEmbedding(
        ("samples", "mel bins")[: len(grid)],
        audio_patch(params.audio),
        channels=1,
        lift=lift,
        dim=dim,
        positions=positions,
        dropout=params.dropout,
    )


def _sizes(params: ModelParams) -> dict[str, SizeParams]:
    return {name: resolve(getattr(params, name).size) for name in MODALITIES}


def initialise(model: nn.Module) -> None:
    """Draw every weight of a model anew from torch's global generator."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            _glorot(module)
        elif isinstance(module, nn.Embedding):
            nn.init.uniform_(module.weight, -0.05, 0.05)
        elif isinstance(module, AxisPositions | Tower | TextTower):
            for parameter in module.parameters(recurse=False):
                _truncated_normal(parameter)
    for module in model.modules():
        if isinstance(module, Attention):
            _glorot_each(module.qkv.weight.chunk(3))  # three layers, kept as one


def _glorot_each(weights: Iterable[Tensor]) -> None:
    for weight in weights:
        nn.init.xavier_uniform_(weight)


def _glorot(linear: nn.Linear) -> None:
    nn.init.xavier_uniform_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def _truncated_normal(tensor: Tensor) -> None:
    """Cut at two standard deviations of dim^-0.5."""
    std = 1 / math.sqrt(tensor.shape[-1])
    nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)


Medium = Literal["video", "audio", "image"]


class Classifier(nn.Module):
    """Logits from a video, an audio signal, or an image repeated to the depth of one voxel."""

    def __init__(
        self, params: ModelParams, *, modality: Medium, num_classes: int, head_dropout: float
    ) -> None:
        super().__init__()
        self.params, self.modality = params, modality
        tower = "audio" if modality == "audio" else "video"
        self.backbone = build_towers(params)[tower]
        self.dropout = nn.Dropout(head_dropout)
        self.head = Linear(feature_dims(params)[tower], num_classes)
        self.num_tokens = math.prod(
            audio_grid(params.audio) if tower == "audio" else video_grid(params.video)
        )
        initialise(self)
        if modality == "audio":
            # Every class starts out as rare as one among C.
            nn.init.constant_(self.head.bias, -math.log(max(num_classes - 1, 1)))
        else:
            nn.init.xavier_normal_(self.head.weight)

    def forward(self, inputs: Tensor, kept: Tensor | None = None) -> Tensor:
        """Video (B, T, H, W, 3) or audio (B, S), floats in [-1, 1] -> logits (B, C), fp32."""
        return full_precision(self.head(self.dropout(self.backbone(inputs, kept))))
