"""Floating-point operations of one forward pass, by formula, in two conventions.

"paper": what TensorFlow's profiler counted for the published tables. Two operations a multiply-add
in the patch projection, the dense layers and attention x values; *none* for queries x keys, which
the profiler did not see; 6 a score for softmax and scaling; element-wise work as 36 a token,
channel and layer; N is the kept tokens + 2. The 36 and the + 2 are fitted to the published figures
(SPEC section 5), which the formula then meets within 0.06 %. Figures with DropToken, and all of
table 5, are of the training graph: 3 more for every element that may drop out.

"true": two operations a multiply-add in the projections, the dense layers and *both* products of
attention, over the tokens that our model computes: the kept ones (it drops before it projects) and
the AGG token; nothing else. It counts all of the last block, where our model leaves out what AGG's
answer does not need.
"""

import math
from typing import Literal

from vatt.config import AudioParams, ModelParams, SizeParams, TextParams, VideoParams
from vatt.model.patches import num_kept, num_patches
from vatt.model.transformer import resolve

Convention = Literal["paper", "true"]

# What the profiler saw beside the two large towers of VATT-MBS: the text tower and the heads.
PAPER_TEXT_FLOPS = 1.374e9
PAPER_HEADS_FLOPS = 0.003e9


def num_video_tokens(video: VideoParams) -> int:
    """Patches of a clip; a remainder counts as a whole one."""
    size = video.frame_size
    height, width = size if isinstance(size, tuple) else (size, size)
    return math.prod(num_patches((video.frames, height, width), video.patch))


def num_audio_tokens(audio: AudioParams) -> int:
    """Segments of a waveform, or patches of a spectrogram."""
    if isinstance(audio.patch, tuple):
        assert audio.mel_bins is not None
        return math.prod(num_patches((audio.samples, audio.mel_bins), audio.patch))
    return math.prod(num_patches((audio.samples,), (audio.patch,)))


def video_flops(
    video: VideoParams, *, drop_rate: float = 0.0, training: bool = False, convention: Convention
) -> float:
    """One clip through the video tower."""
    time, vertical, horizontal = video.patch
    return _tower(
        resolve(video.size),
        num_video_tokens(video),
        patch_values=time * vertical * horizontal * 3,
        drop_rate=drop_rate,
        training=training,
        convention=convention,
    )


def audio_flops(
    audio: AudioParams, *, drop_rate: float = 0.0, training: bool = False, convention: Convention
) -> float:
    """One waveform or spectrogram through the audio tower."""
    values = audio.patch[0] * audio.patch[1] if isinstance(audio.patch, tuple) else audio.patch
    return _tower(
        resolve(audio.size),
        num_audio_tokens(audio),
        patch_values=values,
        drop_rate=drop_rate,
        training=training,
        convention=convention,
    )


def text_flops(text: TextParams, *, convention: Convention) -> float:
    """One sentence through the text tower; in the paper's counting always the published 1.374 G."""
    if convention == "paper":
        return PAPER_TEXT_FLOPS
    return _products(resolve(text.size), text.words + 1)


def multimodal_flops(
    model: ModelParams, *, drop_rate: float = 0.0, training: bool = False, convention: Convention
) -> float:
    """One clip, its sound and one sentence through the whole pre-training model."""
    return (
        video_flops(model.video, drop_rate=drop_rate, training=training, convention=convention)
        + audio_flops(model.audio, drop_rate=drop_rate, training=training, convention=convention)
        + text_flops(model.text, convention=convention)
        + _heads(model, convention)
    )


def _tower(
    size: SizeParams,
    num_tokens: int,
    *,
    patch_values: int,
    drop_rate: float,
    training: bool,
    convention: Convention,
) -> float:
    kept = num_kept(num_tokens, drop_rate)
    if convention == "true":
        return 2.0 * kept * patch_values * size.dim + _products(size, kept + 1)
    n = kept + 2
    scores = size.depth * size.heads * n**2
    counted = 2.0 * num_tokens * patch_values * size.dim
    counted += _products(size, n) - 2 * scores * size.head_dim
    counted += 6 * scores + 36 * size.depth * size.dim * n
    if training:
        elements = size.depth * n * (2 * size.dim + size.mlp_dim)
        counted += 3 * (scores + elements + num_tokens * size.dim)
    return counted


def _products(size: SizeParams, n: int) -> float:
    """The matrix products of an encoder over n tokens, two operations a multiply-add."""
    inner = size.heads * size.head_dim
    dense = 4 * size.dim * inner + 2 * size.dim * size.mlp_dim
    return 2.0 * size.depth * n * dense + 4.0 * size.depth * inner * n**2


def _heads(model: ModelParams, convention: Convention) -> float:
    if convention == "paper":
        return PAPER_HEADS_FLOPS
    video, audio, text = (resolve(part.size).dim for part in (model.video, model.audio, model.text))
    va, vt = model.va_dim, model.vt_dim
    return 2.0 * (video * va + va * va + va * vt + audio * va + text * vt)
