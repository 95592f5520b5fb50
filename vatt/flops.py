"""Floating-point operations of one forward pass, by formula, in two conventions.

"paper" is what TensorFlow's profiler counted for the published tables:

- two operations for a multiply-add in the patch projection, the dense layers and the product of
  attention weights and values;
- nothing for the product of queries and keys, which the profiler did not see;
- 6 for each score (softmax and scaling), and 36 for each token, channel and layer (element-wise
  work);
- N is the number of kept tokens + 2.

The 36 and the + 2 are fitted to the published figures; with them the formula is within 0.06 % of
every one (docs/model.md, "Counting operations"). Figures with DropToken, and all of table 5, are of
the training graph: 3 more for every element that dropout may set to zero.

"true" counts two operations for a multiply-add in the projections, the dense layers and *both*
products of attention, and nothing else. Tokens are those that our model computes: the kept ones (it
drops before it projects) and the AGG token. All of the last block is counted, although our model
computes only AGG's output there. Where tokens are merged, the products of that are counted as well;
only this convention knows it. A block with experts counts its router and the experts that a token
takes: as many as there are, or as many as have room.
"""

from dataclasses import dataclass
from typing import Any, Literal

from vatt.config import (
    AudioParams,
    ExpertsParams,
    ModelParams,
    SizeParams,
    TextParams,
    TowerParams,
    VideoParams,
)
from vatt.model.experts import has_experts, most_choices
from vatt.model.merging import num_merged, token_counts
from vatt.model.patches import num_kept, num_tokens, patch_values
from vatt.model.transformer import resolve
from vatt.senses import SENSES, senses_of
from vatt.senses.form import Cutting

Convention = Literal["paper", "true"]

# What the profiler counted in VATT-MBS without the two large towers: text tower and heads.
PAPER_TEXT_FLOPS = 1.374e9
PAPER_HEADS_FLOPS = 0.003e9


def num_video_tokens(video: VideoParams) -> int:
    """Patches of a clip; a partial patch counts as one."""
    return num_signal_tokens("video", video)


def num_audio_tokens(audio: AudioParams) -> int:
    """Segments of a waveform, or patches of a spectrogram."""
    return num_signal_tokens("audio", audio)


def num_signal_tokens(name: str, section: TowerParams) -> int:
    """Patches of a clip of any sense that is cut into them."""
    return num_tokens(SENSES[name].tokens(section))


def signal_flops(
    name: str,
    section: TowerParams,
    *,
    drop_rate: float = 0.0,
    merge_rate: float = 0.0,
    training: bool = False,
    experts: ExpertsParams | None = None,
    convention: Convention,
) -> float:
    """One clip of a sense that is cut into patches through its tower."""
    tokens = SENSES[name].tokens(section)
    assert isinstance(tokens, Cutting)
    return _tower(
        resolve(section.size),
        num_tokens(tokens),
        patch_values=patch_values(tokens),
        drop_rate=drop_rate,
        merge_rate=merge_rate,
        training=training,
        experts=experts,
        convention=convention,
    )


def video_flops(video: VideoParams, **how: Any) -> float:
    """One clip through the video tower; options as for `signal_flops`."""
    return signal_flops("video", video, **how)


def audio_flops(audio: AudioParams, **how: Any) -> float:
    """One waveform or spectrogram through the audio tower; options as for `signal_flops`."""
    return signal_flops("audio", audio, **how)


def text_flops(
    text: TextParams, *, experts: ExpertsParams | None = None, convention: Convention
) -> float:
    """One sentence through the text tower; in the paper's counting always the published 1.374 G."""
    if convention == "paper":
        return PAPER_TEXT_FLOPS
    return _products(resolve(text.size), text.words + 1, experts)


def multimodal_flops(
    model: ModelParams,
    *,
    drop_rate: float = 0.0,
    merge_rate: float = 0.0,
    training: bool = False,
    convention: Convention,
) -> float:
    """One clip, its sound and one sentence through the whole pre-training model."""
    more = {"training": training, "experts": model.experts}
    how: Any = {"drop_rate": drop_rate, "merge_rate": merge_rate, **more}
    signals = sum(
        signal_flops(name, section, convention=convention, **how)
        for name, section in signals_of(model).items()
    )
    words = text_flops(model.text, experts=model.experts, convention=convention)
    return signals + words + _heads(model, convention)


def signals_of(model: ModelParams) -> dict[str, TowerParams]:
    """The sections of the senses that are cut into patches: all but text."""
    sections = {sense.name: sense.section(model) for sense in senses_of(model)}
    return {
        name: section
        for name, section in sections.items()
        if isinstance(SENSES[name].tokens(section), Cutting)
    }


def _tower(
    size: SizeParams,
    num_tokens: int,
    *,
    patch_values: int,
    drop_rate: float,
    merge_rate: float,
    training: bool,
    experts: ExpertsParams | None,
    convention: Convention,
) -> float:
    kept = num_kept(num_tokens, drop_rate)
    if convention == "true":
        products = _products(size, kept + 1, experts, merge_rate)
        return 2.0 * kept * patch_values * size.dim + products
    assert merge_rate == 0, "the paper merges no tokens"
    n = kept + 2
    scores = size.depth * size.heads * n**2
    counted = 2.0 * num_tokens * patch_values * size.dim
    counted += _products(size, n, experts) - 2 * scores * size.head_dim
    counted += 6 * scores + 36 * size.depth * size.dim * n
    if training:
        elements = size.depth * n * (2 * size.dim + size.mlp_dim)
        counted += 3 * (scores + elements + num_tokens * size.dim)
    return counted


@dataclass(frozen=True, slots=True)
class EncoderWork:
    """What one forward pass of encoders takes, by the limits that a GPU has for each part."""

    dense: float = 0.0  # operations of the linear layers
    attention: float = 0.0  # operations of both products of attention, and of merging
    values: float = 0.0  # numbers of the residual stream, over all blocks

    def __add__(self, other: "EncoderWork") -> "EncoderWork":
        return EncoderWork(
            self.dense + other.dense,
            self.attention + other.attention,
            self.values + other.values,
        )

    def times(self, count: float) -> "EncoderWork":
        """The same for `count` inputs."""
        return EncoderWork(count * self.dense, count * self.attention, count * self.values)


def encoder_work(
    size: SizeParams, n: int, experts: ExpertsParams | None = None, merge_rate: float = 0.0
) -> EncoderWork:
    """An encoder over n tokens, two operations a multiply-add."""
    inner = size.heads * size.head_dim
    entering = token_counts(n, merge_rate, size.depth)
    leaving = [*entering[1:], entering[-1]]  # their MLP has these
    matching = 0
    for tokens in entering[:-1]:
        if merged := num_merged(tokens, merge_rate):
            second = (tokens - 1) // 2
            matching += second * ((tokens - 1 - second) * size.head_dim + merged * size.dim)
    linear = 4 * size.dim * inner * sum(entering) + 2 * size.dim * size.mlp_dim * sum(leaving)
    for number, tokens in enumerate(leaving, start=1):
        if experts is not None and has_experts(number, size.depth, experts):
            linear += 2 * (most_choices(tokens, experts) - tokens) * size.dim * size.mlp_dim
            linear += tokens * size.dim * experts.number
    return EncoderWork(
        dense=2.0 * linear,
        attention=4.0 * inner * sum(tokens**2 for tokens in entering) + 2.0 * matching,
        values=size.dim * (sum(entering) + sum(leaving)) / 2,
    )


def expert_weights(model: ModelParams) -> tuple[int, int]:
    """The weights of all experts of a model, and of those that one token of each encoder takes."""
    if model.experts is None:
        return 0, 0
    sizes = [resolve(section.size) for section in model.towers().values()]
    one = 0
    for size in sizes[:1] if model.backbone == "agnostic" else sizes:
        blocks = sum(has_experts(n, size.depth, model.experts) for n in range(1, size.depth + 1))
        one += blocks * (2 * size.dim * size.mlp_dim + size.mlp_dim + size.dim)
    return model.experts.number * one, model.experts.top_k * one


def clip_work(
    model: ModelParams, *, drop_rate: float, candidates: int, merge_rate: float = 0.0
) -> EncoderWork:
    """The encoders over one clip, its sound and its candidate texts, in pre-training."""
    experts = model.experts
    words = encoder_work(resolve(model.text.size), model.text.words + 1, experts)
    total = words.times(candidates)
    for name, section in signals_of(model).items():
        kept = num_kept(num_signal_tokens(name, section), drop_rate)
        total += encoder_work(resolve(section.size), kept + 1, experts, merge_rate)
    return total


def _products(
    size: SizeParams, n: int, experts: ExpertsParams | None, merge_rate: float = 0.0
) -> float:
    work = encoder_work(size, n, experts, merge_rate)
    return work.dense + work.attention


def _heads(model: ModelParams, convention: Convention) -> float:
    if convention == "paper":
        return PAPER_HEADS_FLOPS
    va, vt = model.va_dim, model.vt_dim
    total = 2.0 * (va * va + va * vt)  # the anchor's second layer, and from one space to the other
    for sense in senses_of(model):
        total += 2.0 * resolve(sense.section(model).size).dim * (va if sense.space == "va" else vt)
    return total
