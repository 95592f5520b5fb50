"""The two recipes and the parts in which they differ; `assembly.py` puts them together.

`paper` is the paper's model; where it is silent, the release's value is taken. `release` is the
model whose weights were published (SPEC section 3).
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from vatt.config import ModelParams, SizeParams
from vatt.model.operators import Linear
from vatt.model.patches import PositionedWords, WordEmbedding
from vatt.model.positions import (
    AxisPositions,
    ReleasedSpectrogramPositions,
    Resize,
    bicubic,
    first,
    spline,
)
from vatt.model.projection import Heads, NormalisedLinear, PlainLinear
from vatt.model.transformer import Encoder, RelativeBias, TextTower, layer_norm

Widths = dict[str, int]  # modality -> width


class DenseGelu(nn.Module):
    """A linear layer and a GELU: the release's way in and out of its shared encoder."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear = Linear(in_dim, out_dim)
        self.activation = nn.GELU()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.activation(self.linear(inputs))


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a recipe chooses."""

    position_norm: Callable[[int], nn.Module]  # applied to the summed tables
    resize: Resize  # of a position table
    spectrogram_positions: Callable[[ModelParams], type[AxisPositions]]
    spectrogram_bias: bool  # biases in the spectrogram tower's attention and MLP
    shared_lift: Callable[[int], nn.Module]  # agnostic: patches -> shared encoder
    shared_post: Callable[[int, ModelParams], nn.Module]  # agnostic: shared encoder -> features
    shared_width: Callable[[int, ModelParams], int]  # agnostic: width of the features
    text_encoder: Callable[[SizeParams, float], Encoder]
    text_tower: Callable[[ModelParams, SizeParams, Encoder], TextTower]
    shared_text_tower: Callable[[ModelParams, SizeParams, Encoder], TextTower]
    heads: Callable[[ModelParams, Widths], Heads]
    drops_alike: bool  # DropToken keeps the same tokens of every clip in a batch


def no_change(*_: object) -> nn.Module:
    """The part that does nothing."""
    return nn.Identity()


# --- paper ----------------------------------------------------------------------------------------


def paper_text_tower(params: ModelParams, size: SizeParams, encoder: Encoder) -> TextTower:
    """Learned words; relative positions in the first layer."""
    table = nn.Embedding(params.text.vocabulary, size.dim)
    return TextTower(
        WordEmbedding(table, dropout=params.dropout),
        encoder,
        dim=size.dim,
        lift=nn.Identity(),
        relative=RelativeBias(size.heads),
        relative_layers=1,
        post=nn.Identity(),
    )


def paper_heads(params: ModelParams, widths: Widths) -> Heads:
    """Batch norm after each linear layer."""
    va, vt = params.va_dim, params.vt_dim
    return Heads(
        video_to_va=nn.Sequential(
            NormalisedLinear(widths["video"], va), nn.ReLU(), NormalisedLinear(va, va)
        ),
        audio_to_va=NormalisedLinear(widths["audio"], va),
        va_to_vt=NormalisedLinear(va, vt),
        text_to_vt=NormalisedLinear(widths["text"], vt),
    )


# --- release --------------------------------------------------------------------------------------


def t5_encoder(size: SizeParams, dropout: float) -> Encoder:
    """T5's: RMS norms, no biases, unscaled scores; only the MLP has an ordinary layer norm."""
    return Encoder(
        size,
        dropout=dropout,
        norm=lambda dim: nn.RMSNorm(dim, eps=1e-6),
        bias=False,
        scaled=False,
    )


def release_text_tower(params: ModelParams, size: SizeParams, encoder: Encoder) -> TextTower:
    """Frozen words and AGG in the words' width; relative positions in every layer."""
    word_dim = params.release.word_dim
    return TextTower(
        WordEmbedding(frozen_words(params), dropout=0.0),
        encoder,
        dim=word_dim,
        lift=nn.Sequential(
            Linear(word_dim, size.dim, bias=False), nn.GELU(), nn.Dropout(params.dropout)
        ),
        relative=RelativeBias(size.heads),
        relative_layers=size.depth,
        post=nn.Dropout(params.dropout),
    )


def release_shared_text_tower(params: ModelParams, size: SizeParams, encoder: Encoder) -> TextTower:
    """Frozen words with learned positions into the shared encoder; no relative bias."""
    positions = AxisPositions(
        ("temporal",), (params.text.words,), size.dim, norm=layer_norm(size.dim), resize=first
    )
    return TextTower(
        PositionedWords(
            frozen_words(params),
            lift=DenseGelu(params.release.word_dim, size.dim),
            positions=positions,
            dropout=params.dropout,
        ),
        encoder,
        dim=size.dim,
        lift=nn.Identity(),
        relative=None,
        relative_layers=0,
        post=release_post(size.dim, params),
    )


def frozen_words(params: ModelParams) -> nn.Embedding:
    """The word table that the release never trained."""
    table = nn.Embedding(params.text.vocabulary, params.release.word_dim)
    table.weight.requires_grad_(False)
    return table


def release_lift(dim: int) -> nn.Module:
    """Patches -> the shared encoder's width."""
    return DenseGelu(dim, dim)


def release_post(dim: int, params: ModelParams) -> nn.Module:
    """The shared encoder's answer -> features."""
    return DenseGelu(dim, params.release.post_dim)


def release_heads(params: ModelParams, widths: Widths) -> Heads:
    """Batch norm for video alone, and a ReLU on the way from va to vt."""
    va, vt = params.va_dim, params.vt_dim
    return Heads(
        video_to_va=nn.Sequential(
            NormalisedLinear(widths["video"], va), nn.ReLU(), NormalisedLinear(va, va)
        ),
        audio_to_va=PlainLinear(widths["audio"], va),
        va_to_vt=nn.Sequential(nn.ReLU(), NormalisedLinear(va, vt)),
        text_to_vt=PlainLinear(widths["text"], vt),
    )


def release_spectrogram_positions(params: ModelParams) -> type[AxisPositions]:
    """Correct ones, unless the weights were trained with the release's order."""
    return ReleasedSpectrogramPositions if params.release.scrambled_spectrogram else AxisPositions


# --- both, side by side ---------------------------------------------------------------------------

RECIPES = {
    "paper": Recipe(
        position_norm=no_change,
        resize=bicubic,
        spectrogram_positions=lambda params: AxisPositions,
        spectrogram_bias=True,
        shared_lift=no_change,
        shared_post=no_change,
        shared_width=lambda dim, params: dim,
        text_encoder=lambda size, dropout: Encoder(size, dropout=dropout),
        text_tower=paper_text_tower,
        shared_text_tower=paper_text_tower,
        heads=paper_heads,
        drops_alike=False,
    ),
    "release": Recipe(
        position_norm=layer_norm,
        resize=spline,
        spectrogram_positions=release_spectrogram_positions,
        spectrogram_bias=False,
        shared_lift=release_lift,
        shared_post=release_post,
        shared_width=lambda dim, params: params.release.post_dim,
        text_encoder=t5_encoder,
        text_tower=release_text_tower,
        shared_text_tower=release_shared_text_tower,
        heads=release_heads,
        drops_alike=True,
    ),
}
