"""A model's parts, put together as its settings say: recipe, backbone and sizes."""

from torch import nn

from vatt.config import ModelParams, SizeParams
from vatt.model.inputs import audio_grid, audio_patch, video_grid
from vatt.model.patches import AudioEmbedding, PatchEmbedding
from vatt.model.positions import AxisPositions
from vatt.model.projection import Heads
from vatt.model.recipe import RECIPES
from vatt.model.sizes import resolve
from vatt.model.tower import Tower
from vatt.model.transformer import Encoder

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
