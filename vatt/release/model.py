"""The model of the published weights, built from the paper's parts and from some of its own.

docs/model.md lists what differs from the paper. B clips, L words, N tokens, D width,
E common-space width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vatt.config import ModelParams, SizeParams
from vatt.errors import SettingsError
from vatt.model.operators import Linear, full_precision
from vatt.model.patches import AxisPositions, Patches, WordEmbedding
from vatt.model.transformer import (
    Encoder,
    RelativeBias,
    SignalTower,
    Tower,
    layer_norm,
    pad_mask,
    resolve,
)
from vatt.model.vatt import Heads, NormalisedLinear, Parts, signal_tokens


def release_parts(params: ModelParams) -> Parts:
    """Towers and heads as in the released code, whose DropToken draws once for a whole batch."""
    towers = release_towers(params)
    widths = {name: tower.width for name, tower in towers.items()}
    return Parts(towers, release_heads(params, widths), drops_alike=True)


def release_towers(params: ModelParams) -> dict[str, Tower]:
    """A tower for each modality; the modality-agnostic ones hold the same encoder."""
    return _shared_towers(params) if params.backbone == "agnostic" else _own_towers(params)


def _own_towers(params: ModelParams) -> dict[str, Tower]:
    """The paper's towers of video and audio; only a waveform's has biases. Text is T5's."""
    sizes = {name: resolve(section.size) for name, section in params.towers().items()}
    is_waveform = params.audio.input == "waveform"
    video = signal_tokens("video", params, NormedPositions)
    audio = signal_tokens("audio", params, _audio_positions(params))
    return {
        "video": SignalTower(
            video, Encoder(sizes["video"], dropout=params.dropout), dim=sizes["video"].dim
        ),
        "audio": SignalTower(
            audio,
            Encoder(sizes["audio"], dropout=params.dropout, bias=is_waveform),
            dim=sizes["audio"].dim,
        ),
        "text": T5Tower(params, sizes["text"]),
    }


def _shared_towers(params: ModelParams) -> dict[str, Tower]:
    """One encoder; each modality has its own dense layers before and after it."""
    size, width = resolve(params.video.size), params.release.post_dim
    encoder, dim = Encoder(size, dropout=params.dropout), size.dim
    video = signal_tokens("video", params, NormedPositions, lift=DenseGelu(dim, dim))
    audio = signal_tokens("audio", params, _audio_positions(params), lift=DenseGelu(dim, dim))
    words = PositionedWords(
        frozen_words(params),
        lift=DenseGelu(params.release.word_dim, dim),
        positions=WordPositions(("temporal",), (params.text.words,), dim),
        dropout=params.dropout,
    )
    return {
        "video": SharedTower(video, encoder, dim=dim, width=width),
        "audio": SharedTower(audio, encoder, dim=dim, width=width),
        "text": SharedTextTower(words, encoder, dim=dim, width=width),
    }


# --- tokens and positions -------------------------------------------------------------------------


class DenseGelu(nn.Module):
    """A linear layer and a GELU: before and after the shared encoder."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear = Linear(in_dim, out_dim)
        self.activation = nn.GELU()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.activation(self.linear(inputs))


class PositionedWords(nn.Module):
    """Look each word up, lift it to the encoder's width, add its position."""

    def __init__(
        self, table: nn.Embedding, *, lift: nn.Module, positions: nn.Module, dropout: float
    ) -> None:
        super().__init__()
        self.table = table
        self.lift = lift
        self.positions = positions
        self.dropout = nn.Dropout(dropout)

    def forward(self, text: Tensor) -> Tensor:  # (B, L) -> (B, L, D)
        return self.dropout(self.lift(self.table(text)) + self.positions((text.shape[1],)))


def frozen_words(params: ModelParams) -> nn.Embedding:
    """The word table, which the release does not train."""
    table = nn.Embedding(params.text.vocabulary, params.release.word_dim)
    table.weight.requires_grad_(False)
    return table


class NormedPositions(AxisPositions):
    """The sum goes through a layer norm; another size is interpolated by a spline."""

    def __init__(self, axes: Sequence[str], grid: Sequence[int], dim: int) -> None:
        super().__init__(axes, grid, dim)
        self.norm = layer_norm(dim)

    def forward(self, grid: Sequence[int]) -> Tensor:  # -> (N, D)
        return self.norm(super().forward(grid))

    def resize(self, table: Tensor, size: int) -> Tensor:  # (n, D) -> (size, D)
        """A table for an axis of another size."""
        return spline(table, size)


class ScrambledPositions(NormedPositions):
    """The release's fault, for its spectrogram weights: time runs fastest, unlike in tokens."""

    def __init__(self, axes: Sequence[str], grid: Sequence[int], dim: int) -> None:
        super().__init__(axes[::-1], grid[::-1], dim)

    def forward(self, grid: Sequence[int]) -> Tensor:  # -> (N, D)
        return super().forward(grid[::-1])


class WordPositions(NormedPositions):
    """A shorter text takes the first positions."""

    def resize(self, table: Tensor, size: int) -> Tensor:  # (n, D) -> (size, D)
        """The first rows: a shorter text does not have its words further apart."""
        if size > len(table):
            raise SettingsError(
                f"the input's words are {size}; allowed are 1 to {len(table)}, "
                "the model's positions",
                hint="cut the text",
            )
        return table[:size]


def _audio_positions(params: ModelParams) -> type[NormedPositions]:
    """The released fault only where the settings ask for it: those of imported weights do."""
    is_spectrogram = params.audio.input == "spectrogram"
    scrambled = is_spectrogram and params.release.scrambled_spectrogram
    return ScrambledPositions if scrambled else NormedPositions


def spline(table: Tensor, size: int) -> Tensor:  # (n, D) -> (size, D)
    """Resize a table as the release does: a polyharmonic spline of order 3 with an affine term.

    Its nodes are i / n, its queries j / size. The small linear system is solved in fp64.
    """
    num = len(table)
    if num == size:
        return table
    nodes = torch.arange(num, dtype=torch.float64, device=table.device)[:, None] / num
    queries = torch.arange(size, dtype=torch.float64, device=table.device)[:, None] / size
    affine = torch.cat([nodes, torch.ones_like(nodes)], dim=1)
    corner = torch.zeros(2, 2, dtype=torch.float64, device=table.device)
    system = torch.cat(
        [
            torch.cat([(nodes - nodes.T).abs() ** 3, affine], dim=1),
            torch.cat([affine.T, corner], dim=1),
        ]
    )
    values = torch.cat([table.double(), table.new_zeros(2, table.shape[1], dtype=torch.float64)])
    basis = torch.cat([(queries - nodes.T).abs() ** 3, queries, torch.ones_like(queries)], dim=1)
    # A table of one row has no slope; the least-squares inverse then leaves it constant.
    return (basis @ torch.linalg.pinv(system) @ values).to(table.dtype)


# --- towers ---------------------------------------------------------------------------------------


class T5Tower(Tower):
    """Frozen words and AGG in the words' width, then T5's encoder.

    T5 has RMS norms (our MLP keeps its ordinary layer norm), no biases, scores that are not scaled,
    and the relative bias in every layer.
    """

    def __init__(self, params: ModelParams, size: SizeParams) -> None:
        word_dim, dropout = params.release.word_dim, params.dropout
        super().__init__(word_dim, width=size.dim)
        self.embed = WordEmbedding(frozen_words(params), dropout=0.0)
        self.lift = nn.Sequential(
            Linear(word_dim, size.dim, bias=False), nn.GELU(), nn.Dropout(dropout)
        )
        self.relative = RelativeBias(size.heads)
        self.encoder = Encoder(size, dropout=dropout, norm=_rms_norm, bias=False, scaled=False)
        self.post = nn.Dropout(dropout)

    def forward(self, text: Tensor) -> Tensor:  # (B, L) word ids, 0 pads -> (B, D), fp32
        tokens = full_precision(self.lift(self.prepend_agg(self.embed(text))))
        bias = pad_mask(text) + self.relative(tokens.shape[1])
        encoded = self.encoder(tokens, [bias] * len(self.encoder.blocks), wanted=1)
        return full_precision(self.post(encoded[:, 0]))


def _rms_norm(dim: int) -> nn.Module:
    return nn.RMSNorm(dim, eps=1e-6)


class SharedTower(SignalTower):
    """Video or audio around the shared encoder; a dense layer makes the features."""

    def __init__(self, embed: nn.Module, encoder: Encoder, *, dim: int, width: int) -> None:
        super().__init__(embed, encoder, dim=dim, width=width)
        self.post = DenseGelu(dim, width)

    def forward(self, inputs: Tensor | Patches, kept: Tensor | None = None) -> Tensor:
        """Raw input -> features (B, width), fp32; `kept` (B, K) names the tokens that go on."""
        return full_precision(self.post(super().forward(inputs, kept)))


class SharedTextTower(Tower):
    """Words around the shared encoder, pads masked; a dense layer makes the features."""

    def __init__(self, embed: nn.Module, encoder: Encoder, *, dim: int, width: int) -> None:
        super().__init__(dim, width=width)
        self.embed = embed
        self.encoder = encoder
        self.post = DenseGelu(dim, width)

    def forward(self, text: Tensor) -> Tensor:  # (B, L) word ids, 0 pads -> (B, width), fp32
        tokens = self.prepend_agg(self.embed(text))
        biases = [pad_mask(text)] * len(self.encoder.blocks)
        return full_precision(self.post(self.encoder(tokens, biases, wanted=1)[:, 0]))


# --- heads ----------------------------------------------------------------------------------------


class PlainLinear(nn.Module):
    """A linear layer with a bias; it has no statistics from which texts could be left out."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear = Linear(in_dim, out_dim)

    def forward(self, rows: Tensor, valid: Tensor | None = None) -> Tensor:
        return full_precision(self.linear(rows))


def release_heads(params: ModelParams, widths: dict[str, int]) -> Heads:
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
