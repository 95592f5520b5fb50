"""The parts of a model, put together: what the recipe, the backbone and the sizes choose."""

from torch import nn

from vatt.config import AudioParams, ModelParams, VideoParams
from vatt.model.patches import AudioEmbedding, PatchEmbedding, WordEmbedding, num_patches
from vatt.model.positions import AxisPositions, bicubic
from vatt.model.projection import Heads, NormalisedLinear
from vatt.model.sizes import resolve
from vatt.model.tower import TextTower, Tower
from vatt.model.transformer import Encoder, RelativeBias

MODALITIES = ("video", "audio", "text")


def video_grid(params: VideoParams) -> tuple[int, ...]:
    """Voxels along time, height and width."""
    height, width = _pair(params.frame_size)
    return num_patches((params.frames, height, width), params.patch)


def audio_grid(params: AudioParams) -> tuple[int, ...]:
    """Segments along time, and along mel bins for a spectrogram."""
    return num_patches(audio_sizes(params), audio_patch(params))


def audio_sizes(params: AudioParams) -> tuple[int, ...]:
    """The input's length, and its mel bins for a spectrogram."""
    return (params.samples,) if params.mel_bins is None else (params.samples, params.mel_bins)


def audio_patch(params: AudioParams) -> tuple[int, ...]:
    """The patch as one number for each axis."""
    return (params.patch,) if isinstance(params.patch, int) else params.patch


def build_towers(params: ModelParams) -> dict[str, nn.Module]:
    """Three towers; when agnostic they hold the same encoder."""
    sizes = {name: resolve(getattr(params, name).size) for name in MODALITIES}
    if params.backbone == "agnostic":
        shared = Encoder(sizes["video"], dropout=params.dropout)
        encoders = dict.fromkeys(MODALITIES, shared)
    else:
        encoders = {name: Encoder(sizes[name], dropout=params.dropout) for name in MODALITIES}
    dims = {name: size.dim for name, size in sizes.items()}
    return {
        "video": Tower(
            video_embedding(params, dims["video"]),
            encoders["video"],
            dim=dims["video"],
            post=nn.Identity(),
        ),
        "audio": Tower(
            audio_embedding(params, dims["audio"]),
            encoders["audio"],
            dim=dims["audio"],
            post=nn.Identity(),
        ),
        "text": TextTower(
            WordEmbedding(params.text.vocabulary, dims["text"], dropout=params.dropout),
            encoders["text"],
            dim=dims["text"],
            lift=nn.Identity(),
            relative=RelativeBias(sizes["text"].heads),
            relative_layers=1,
            post=nn.Identity(),
        ),
    }


def video_embedding(params: ModelParams, dim: int) -> PatchEmbedding:
    """Voxels of t x h x w, projected, with three tables of positions."""
    axes = ("temporal", "vertical", "horizontal")
    return PatchEmbedding(
        ("frames", "height", "width"),
        params.video.patch,
        channels=3,
        lift=nn.Identity(),
        dim=dim,
        positions=AxisPositions(
            axes, video_grid(params.video), dim, norm=nn.Identity(), resize=bicubic
        ),
        dropout=params.dropout,
    )


def audio_embedding(params: ModelParams, dim: int) -> AudioEmbedding:
    """Segments of a waveform, or patches of a spectrogram."""
    grid = audio_grid(params.audio)
    axes = ("temporal", "spectral")[: len(grid)]
    return AudioEmbedding(
        ("samples", "mel bins")[: len(grid)],
        audio_patch(params.audio),
        channels=1,
        lift=nn.Identity(),
        dim=dim,
        positions=AxisPositions(axes, grid, dim, norm=nn.Identity(), resize=bicubic),
        dropout=params.dropout,
    )


def feature_dims(params: ModelParams) -> dict[str, int]:
    """The width of each tower's answer."""
    return {name: resolve(getattr(params, name).size).dim for name in MODALITIES}


def build_heads(params: ModelParams) -> Heads:
    """The projections into the common spaces."""
    dims = feature_dims(params)
    return Heads(
        video_to_va=nn.Sequential(
            NormalisedLinear(dims["video"], params.va_dim),
            nn.ReLU(),
            NormalisedLinear(params.va_dim, params.va_dim),
        ),
        audio_to_va=NormalisedLinear(dims["audio"], params.va_dim),
        va_to_vt=NormalisedLinear(params.va_dim, params.vt_dim),
        text_to_vt=NormalisedLinear(dims["text"], params.vt_dim),
    )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
