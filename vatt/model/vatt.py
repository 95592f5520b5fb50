"""The model of the paper: a tower for each modality, or one for all, and the heads behind them.

In the order of the paper's section 3: tokens and positions (patches.py), the Transformer
(transformer.py), and, here, the common spaces. What each modality is made of, vatt/senses
says. Where the paper is silent, the value of the released code is taken. The released model itself
is put together in vatt/release/model.py from the same parts; docs/model.md says where they differ.

B clips, K candidate texts of a clip, T H W C frames, height, width, channels, S waveform samples,
L words, D feature width, E common-space width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vatt.config import ModelParams
from vatt.errors import SettingsError
from vatt.model.experts import ExpertLinear
from vatt.model.operators import FusedFunction, Linear, full_precision
from vatt.model.patches import (
    AxisPositions,
    PatchEmbedding,
    Patches,
    WordEmbedding,
    check_input,
    choose_kept,
    grid_of,
    num_tokens,
)
from vatt.model.transformer import (
    Attention,
    Encoder,
    RelativeBias,
    SignalTower,
    TextTower,
    Tower,
    resolve,
)
from vatt.senses import ANCHOR, SENSES, senses_of
from vatt.senses.form import Cutting, Sense, Words

Features = Mapping[str, Tensor]  # what the heads receive, by sense: (B, D), text (B, K, D)
Group = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Unit vectors in the common spaces, by sense: (B, E), text (B, K, E).

    `embeddings.video_va` is `embeddings.va["video"]`, or None for a sense that was not given.
    """

    va: Group = field(default_factory=dict)
    vt: Group = field(default_factory=dict)

    def __getattr__(self, name: str) -> Tensor | None:
        sense, _, group = name.rpartition("_")
        if sense not in SENSES or group not in {one.name for one in fields(self)}:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        values: Group = getattr(self, group)
        return values.get(sense)

    def named(self) -> dict[str, Tensor]:
        """Everything that was computed, by the names of its attributes."""
        return {
            f"{sense}_{group.name}": value
            for group in fields(self)
            for sense, value in getattr(self, group.name).items()
        }


@dataclass(frozen=True, slots=True)
class Output(Embeddings):
    """Embeddings and the features they come from: `output.video_features`."""

    features: Features = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a model is made of."""

    towers: dict[str, Tower]  # by sense
    heads: "Heads"
    drops_alike: bool = False  # DropToken keeps the same tokens of every clip in a batch


class VATT(nn.Module):
    """The whole model, from raw signals to unit vectors that can be compared."""

    video: Tower
    audio: Tower
    text: Tower

    def __init__(self, params: ModelParams, parts: Parts | None = None) -> None:
        """Without `parts`, the paper's model; `vatt.checkpoint.build` builds any recipe's."""
        super().__init__()
        parts = parts or paper_parts(params)
        self.params = params
        self.senses = tuple(parts.towers)
        for name, tower in parts.towers.items():
            self.add_module(name, tower)
        self.heads = parts.heads
        self.units = FusedFunction(_units)
        self.choose = FusedFunction(choose_kept)
        self.drops_alike = parts.drops_alike
        self.token_counts = {  # before DropToken, of the senses whose tokens it may drop
            sense.name: num_tokens(tokens)
            for sense in senses_of(params)
            if isinstance(tokens := sense.tokens(sense.section(params)), Cutting)
        }
        initialise(self)

    def forward(
        self,
        video: Tensor | Patches | None = None,
        audio: Tensor | None = None,
        text: Tensor | None = None,
        **more: Tensor | None,
    ) -> Output:
        """Embed whatever is given.

        video (B, T, H, W, 3) and audio (B, S) are floats in [-1, 1] (a spectrogram model takes
        audio (B, frames, mel bins)); text (B, K, L) holds word ids, 0 for a pad. Other senses are
        given by their names, as `scaled` in their files makes them. `kept_video`, `kept_audio` and
        so on (B, kept) name the tokens that DropToken keeps; only training gives them.
        Raises SettingsError for an input of another type or shape.
        """
        features = self.encode(video, audio, text, **more)
        present = {} if text is None else {"text": (text != 0).any(-1)}
        embeddings = self.project(features, present)
        return Output(embeddings.va, embeddings.vt, features)

    def encode(
        self,
        video: Tensor | Patches | None = None,
        audio: Tensor | None = None,
        text: Tensor | None = None,
        **more: Tensor | None,
    ) -> Features:
        """Raw signals -> features; arguments as in `forward`, or a video that is cut already."""
        given: dict[str, Any] = {"video": video, "audio": audio, "text": text, **more}
        kept = {name: given.pop(f"kept_{name}", None) for name in self.senses}
        unknown = given.keys() - set(self.senses)
        if unknown:
            raise SettingsError(
                f"the model has no {min(unknown)}; it has {', '.join(self.senses)}",
                hint="load a checkpoint that was trained with it",
            )
        features = {}
        for name in self.senses:
            value, tower = given.get(name), self.get_submodule(name)
            if value is None:
                continue
            if isinstance(SENSES[name].tokens(SENSES[name].section(self.params)), Words):
                check_input(value, ("candidates", "words"), ids=True)
                features[name] = tower(value.flatten(0, 1)).unflatten(0, value.shape[:2])
            else:
                features[name] = tower(value, kept[name])
        return features

    def project(
        self, features: Features, present: Group | None = None, *, bridged: bool = False
    ) -> Embeddings:
        """Features -> unit vectors; in training, batch norm sees just the rows of this call.

        `present` says which clips have a sense (B,), and which texts have words (B, K): what is
        not there does not count in the statistics of batch norm. With `bridged`, every sense of
        the space va is led on to vt, not only the anchor: for comparisons that were not trained.
        """
        present = present or {}
        spaces: dict[str, dict[str, Tensor]] = {"va": {}, "vt": {}}
        for name, values in features.items():
            sense = SENSES[name]
            valid = present.get(name) if sense.skips_absent else None
            rows = self.heads.into(sense, values, valid)
            spaces[sense.space][name] = rows
            if sense.space == "va" and (sense.is_anchor or bridged):
                spaces["vt"][name] = self.heads.va_to_vt(rows)
        return Embeddings(**self.units(spaces))


def _units(spaces: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """All vectors L2-normalised; a lower bound on the norm keeps a zero vector finite."""
    return {
        space: {name: F.normalize(rows, dim=-1, eps=1e-6) for name, rows in vectors.items()}
        for space, vectors in spaces.items()
    }


# --- heads: features -> common spaces -------------------------------------------------------------


class BatchNorm(nn.Module):
    """Batch norm whose statistics can leave rows out; if no row is left, it uses the running ones.

    The running variance is updated with the biased variance of the batch, as in the release.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, rows: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, E) -> (B, E), fp32; statistics come from rows where `valid` (B,) holds."""
        rows = full_precision(rows)
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = self._observe(rows, valid)
        return (rows - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias

    def _observe(self, rows: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        if valid is None:
            mean = rows.sum(0) / len(rows)
            var = (rows - mean).square().sum(0) / len(rows)
        else:
            weights = valid[:, None].to(rows.dtype)
            count = weights.sum()
            mean = (rows * weights).sum(0) / count.clamp(min=1)
            var = ((rows - mean).square() * weights).sum(0) / count.clamp(min=1)
            mean = torch.where(count > 0, mean, self.running_mean)
            var = torch.where(count > 0, var, self.running_var)
        with torch.no_grad():
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(var.detach(), self.momentum)
        return mean, var


class NormalisedLinear(nn.Module):
    """A linear layer and its batch norm; the norm has a bias, so the layer needs none."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear = Linear(in_dim, out_dim, bias=False)
        self.norm = BatchNorm(out_dim)

    def forward(self, rows: Tensor, valid: Tensor | None = None) -> Tensor:
        return self.norm(self.linear(rows), valid)


class Heads(nn.Module):
    """g_v->va, g_a->va, g_v->vt (which starts from the va vector) and g_t->vt.

    A head is called <sense>_to_<space>; `va_to_vt` leads from one space to the other.
    """

    va_to_vt: nn.Module

    def __init__(self, **heads: nn.Module) -> None:
        super().__init__()
        for name, head in heads.items():
            self.add_module(name, head)

    def into(self, sense: Sense, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """Features (B, D) or (B, K, D) in the space that the sense joins, not yet of length 1.

        Statistics of batch norm come from the rows where `valid` holds, if that is known.
        """
        head = self.get_submodule(f"{sense.name}_to_{sense.space}")
        rows, several = features.flatten(0, -2), features.shape[:-1]
        known = () if valid is None else (valid.flatten(),)
        projected: Tensor = head(rows, *known)
        return projected.unflatten(0, several)


# --- the paper's parts ----------------------------------------------------------------------------


def paper_parts(params: ModelParams) -> Parts:
    """Towers and heads as in the paper."""
    towers = paper_towers(params)
    widths = {name: tower.width for name, tower in towers.items()}
    return Parts(towers, paper_heads(params, widths))


def paper_towers(params: ModelParams) -> dict[str, Tower]:
    """A tower for each sense; the modality-agnostic ones hold the same encoder."""
    if params.recipe != "paper":
        raise SettingsError(
            f"this builds the paper's model, and model.recipe is {params.recipe}",
            hint="vatt.checkpoint.build and build_classifier build the model of either recipe",
        )
    senses = senses_of(params)
    sizes = {sense.name: resolve(sense.section(params).size) for sense in senses}
    if params.backbone == "agnostic":
        shared = Encoder(sizes[ANCHOR.name], dropout=params.dropout, experts=params.experts)
        encoders = dict.fromkeys(sizes, shared)
    else:
        encoders = {
            name: Encoder(size, dropout=params.dropout, experts=params.experts)
            for name, size in sizes.items()
        }
    return {sense.name: _tower(sense, params, encoders[sense.name]) for sense in senses}


def _tower(sense: Sense, params: ModelParams, encoder: Encoder) -> Tower:
    """Patches or words, and the encoder behind them."""
    tokens, size = sense.tokens(sense.section(params)), resolve(sense.section(params).size)
    if isinstance(tokens, Cutting):
        return SignalTower(signal_tokens(sense.name, params), encoder, dim=size.dim)
    # Learned words; the first layer sees how far apart two words are.
    words = WordEmbedding(nn.Embedding(tokens.vocabulary, size.dim), dropout=params.dropout)
    return TextTower(words, encoder, dim=size.dim, relative=RelativeBias(size.heads))


def signal_tokens(
    name: str,
    params: ModelParams,
    positions: type[AxisPositions] = AxisPositions,
    lift: nn.Module | None = None,
) -> PatchEmbedding:
    """The patches of a sense; the position of a patch is the sum of one for each axis."""
    section = SENSES[name].section(params)
    cutting, dim = SENSES[name].tokens(section), resolve(section.size).dim
    assert isinstance(cutting, Cutting)
    return PatchEmbedding(
        cutting.axes,
        cutting.patch,
        channels=cutting.channels,
        positions=positions(cutting.positions, grid_of(cutting), dim),
        dim=dim,
        dropout=params.dropout,
        lift=lift,
    )


def paper_heads(params: ModelParams, widths: dict[str, int]) -> Heads:
    """Batch norm after each linear layer; `widths` are those of the features."""
    va, vt = params.va_dim, params.vt_dim
    spaces = {"va": va, "vt": vt}
    heads: dict[str, nn.Module] = {}
    for name, width in widths.items():
        sense = SENSES[name]
        if sense.is_anchor:
            heads[f"{name}_to_va"] = nn.Sequential(
                NormalisedLinear(width, va), nn.ReLU(), NormalisedLinear(va, va)
            )
        else:
            if sense.space == "vt" and "va_to_vt" not in heads:
                heads["va_to_vt"] = NormalisedLinear(va, vt)
            heads[f"{name}_to_{sense.space}"] = NormalisedLinear(width, spaces[sense.space])
    return Heads(**heads)


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
        sense = SENSES[tower_of(modality)]
        self.choose = FusedFunction(choose_kept)
        self.num_tokens = num_tokens(sense.tokens(sense.section(params)))
        initialise(self)
        if not sense.is_anchor:
            # At first, each class has the probability 1 / C.
            nn.init.constant_(self.head.bias, -math.log(max(num_classes - 1, 1)))
        else:
            nn.init.xavier_normal_(self.head.weight)

    def forward(self, inputs: Tensor, kept: Tensor | None = None) -> Tensor:
        """Video (B, T, H, W, 3) or audio (B, S), floats in [-1, 1] -> logits (B, C), fp32."""
        return full_precision(self.head(self.dropout(self.backbone(inputs, kept))))


def tower_of(modality: str) -> str:
    """The tower that reads this input; an image is a video one voxel deep."""
    return "audio" if modality == "audio" else "video"
