"""The model of the paper: a tower for each modality, or one for all, and the heads behind them.

In the order of the paper's section 3: tokens and positions (patches.py, positions.py), the
Transformer (transformer.py), the common spaces (projection.py). Where the paper is silent, the
value of the released code is taken. The released model itself is put together in
vatt/release/model.py from the same parts; docs/model.md says where the two differ.

B clips, K candidate texts of a clip, T H W C frames, height, width, channels, S waveform samples,
L words, D feature width, E common-space width.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vatt.config import ModelParams, SizeParams
from vatt.errors import SettingsError
from vatt.model.experts import ExpertLinear
from vatt.model.operators import Linear, full_precision
from vatt.model.patches import (
    PatchEmbedding,
    Patches,
    WordEmbedding,
    audio_grid,
    audio_patch,
    check_input,
    video_grid,
)
from vatt.model.positions import AxisPositions
from vatt.model.projection import Heads, NormalisedLinear
from vatt.model.transformer import (
    Attention,
    Encoder,
    RelativeBias,
    SignalTower,
    TextTower,
    Tower,
    resolve,
)


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


@dataclass(frozen=True, slots=True)
class Parts:
    """What a model is made of."""

    towers: dict[str, Tower]  # by modality
    heads: Heads
    drops_alike: bool = False  # DropToken keeps the same tokens of every clip in a batch


class VATT(nn.Module):
    """The whole model, from raw signals to unit vectors that can be compared."""

    def __init__(self, params: ModelParams, parts: Parts | None = None) -> None:
        """Without `parts`, the paper's model; `vatt.checkpoint.build` builds any recipe's."""
        super().__init__()
        parts = parts or paper_parts(params)
        self.params = params
        self.video, self.audio, self.text = (parts.towers[name] for name in MODALITIES)
        self.heads = parts.heads
        self.drops_alike = parts.drops_alike
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
        and `kept_audio` (B, kept) name the tokens that DropToken keeps; only training gives them.
        Raises SettingsError for an input of another type or shape.
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
        video: Tensor | Patches | None = None,
        audio: Tensor | None = None,
        text: Tensor | None = None,
        *,
        kept_video: Tensor | None = None,
        kept_audio: Tensor | None = None,
    ) -> Features:
        """Raw signals -> features; arguments as in `forward`, or a video that is cut already."""
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

        `has_text` (B, K) says which texts have words; texts of pads alone do not count in the
        statistics of batch norm.
        """
        va, vt = (None, None) if features.video is None else self.heads.video(features.video)
        audio = None if features.audio is None else self.heads.audio(features.audio)
        text = None if features.text is None else self.heads.text(features.text, has_text)
        return Embeddings(_unit(va), _unit(audio), _unit(vt), _unit(text))


def _unit(vectors: Tensor | None) -> Tensor | None:
    """L2-normalised; a lower bound on the norm keeps a zero vector finite."""
    return None if vectors is None else F.normalize(vectors, dim=-1, eps=1e-6)


# --- the paper's parts ----------------------------------------------------------------------------

MODALITIES = ("video", "audio", "text")


def paper_parts(params: ModelParams) -> Parts:
    """Towers and heads as in the paper."""
    towers = paper_towers(params)
    widths = {name: tower.width for name, tower in towers.items()}
    return Parts(towers, paper_heads(params, widths))


def paper_towers(params: ModelParams) -> dict[str, Tower]:
    """A tower for each modality; the modality-agnostic ones hold the same encoder."""
    if params.recipe != "paper":
        raise SettingsError(
            f"this builds the paper's model, and model.recipe is {params.recipe}",
            hint="vatt.checkpoint.build and build_classifier build the model of either recipe",
        )
    sizes = {name: resolve(getattr(params, name).size) for name in MODALITIES}
    if params.backbone == "agnostic":
        shared = Encoder(sizes["video"], dropout=params.dropout, experts=params.experts)
        encoders = dict.fromkeys(MODALITIES, shared)
    else:
        encoders = {
            name: Encoder(sizes[name], dropout=params.dropout, experts=params.experts)
            for name in MODALITIES
        }
    return {
        "video": SignalTower(video_tokens(params), encoders["video"], dim=sizes["video"].dim),
        "audio": SignalTower(audio_tokens(params), encoders["audio"], dim=sizes["audio"].dim),
        "text": text_tower(params, sizes["text"], encoders["text"]),
    }


def video_tokens(
    params: ModelParams,
    positions: type[AxisPositions] = AxisPositions,
    lift: nn.Module | None = None,
) -> PatchEmbedding:
    """Voxels of t x h x w; a position is the sum of a temporal, vertical and horizontal one."""
    dim, axes = resolve(params.video.size).dim, ("temporal", "vertical", "horizontal")
    return PatchEmbedding(
        ("frames", "height", "width"),
        params.video.patch,
        channels=3,
        positions=positions(axes, video_grid(params.video), dim),
        dim=dim,
        dropout=params.dropout,
        lift=lift,
    )


def audio_tokens(
    params: ModelParams,
    positions: type[AxisPositions] = AxisPositions,
    lift: nn.Module | None = None,
) -> PatchEmbedding:
    """Segments of a waveform; or patches of a spectrogram, to which table 10 compares them."""
    dim, grid = resolve(params.audio.size).dim, audio_grid(params.audio)
    axes = ("temporal", "spectral")[: len(grid)]
    return PatchEmbedding(
        ("samples", "mel bins")[: len(grid)],
        audio_patch(params.audio),
        channels=None,
        positions=positions(axes, grid, dim),
        dim=dim,
        dropout=params.dropout,
        lift=lift,
    )


def text_tower(params: ModelParams, size: SizeParams, encoder: Encoder) -> TextTower:
    """Learned words; the first layer sees how far apart two words are."""
    table = nn.Embedding(params.text.vocabulary, size.dim)
    return TextTower(
        WordEmbedding(table, dropout=params.dropout),
        encoder,
        dim=size.dim,
        relative=RelativeBias(size.heads),
    )


def paper_heads(params: ModelParams, widths: dict[str, int]) -> Heads:
    """Batch norm after each linear layer; `widths` are those of the features."""
    va, vt = params.va_dim, params.vt_dim
    return Heads(
        video_to_va=nn.Sequential(
            NormalisedLinear(widths["video"], va), nn.ReLU(), NormalisedLinear(va, va)
        ),
        audio_to_va=NormalisedLinear(widths["audio"], va),
        va_to_vt=NormalisedLinear(va, vt),
        text_to_vt=NormalisedLinear(widths["text"], vt),
    )


# --- initial weights ------------------------------------------------------------------------------


def initialise(model: nn.Module) -> None:
    """Draw new values for every weight of a model from torch's global generator."""
    for module in model.modules():
        _draw(module)
    for module in model.modules():
        if isinstance(module, Attention):
            for weight in module.qkv.weight.chunk(3):  # three layers, kept as one
                nn.init.xavier_uniform_(weight)


def _draw(module: nn.Module) -> None:
    """Glorot's uniform draw for dense layers; norms keep their ones and zeros."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, ExpertLinear):
        for weight in module.weight.unbind():  # each expert as a layer of its own
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.uniform_(module.weight, -0.05, 0.05)
    elif isinstance(module, AxisPositions | Tower):  # position tables and AGG tokens
        for parameter in module.parameters(recurse=False):
            std = 1 / math.sqrt(parameter.shape[-1])
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)


# --- the classifier -------------------------------------------------------------------------------

ClassifierInput = Literal["video", "audio", "image"]


class Classifier(nn.Module):
    """Logits from a video, an audio signal, or an image repeated to the depth of one voxel."""

    def __init__(
        self,
        params: ModelParams,
        backbone: Tower | None = None,
        *,
        modality: ClassifierInput,
        num_classes: int,
        head_dropout: float,
    ) -> None:
        """Without `backbone`, a tower of the paper's model."""
        super().__init__()
        self.params, self.modality = params, modality
        self.backbone = backbone or paper_towers(params)[tower_of(modality)]
        self.dropout = nn.Dropout(head_dropout)
        self.head = Linear(self.backbone.width, num_classes)
        is_audio = modality == "audio"
        self.num_tokens = math.prod(
            audio_grid(params.audio) if is_audio else video_grid(params.video)
        )
        initialise(self)
        if is_audio:
            # At first, each class has the probability 1 / C.
            nn.init.constant_(self.head.bias, -math.log(max(num_classes - 1, 1)))
        else:
            nn.init.xavier_normal_(self.head.weight)

    def forward(self, inputs: Tensor, kept: Tensor | None = None) -> Tensor:
        """Video (B, T, H, W, 3) or audio (B, S), floats in [-1, 1] -> logits (B, C), fp32."""
        return full_precision(self.head(self.dropout(self.backbone(inputs, kept))))


def tower_of(modality: ClassifierInput) -> str:
    """The tower that reads this input; an image is a video one voxel deep."""
    return "audio" if modality == "audio" else "video"
