"""Sizes of a model's inputs, in patches."""

from vatt.config import AudioParams, VideoParams
from vatt.model.patches import num_patches


def video_grid(params: VideoParams) -> tuple[int, ...]:
    """Voxels along time, height and width."""
    size = params.frame_size
    height, width = (size, size) if isinstance(size, int) else size
    return num_patches((params.frames, height, width), params.patch)


def audio_grid(params: AudioParams) -> tuple[int, ...]:
    """Segments along time, and along mel bins for a spectrogram."""
    sizes = (params.samples,) if params.mel_bins is None else (params.samples, params.mel_bins)
    return num_patches(sizes, audio_patch(params))


def audio_patch(params: AudioParams) -> tuple[int, ...]:
    """The patch as one number for each axis."""
    return (params.patch,) if isinstance(params.patch, int) else params.patch
