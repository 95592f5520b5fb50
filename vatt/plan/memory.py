"""Peak memory of a pre-training step by formula, part by part; bytes throughout.

n tokens of a clip (kept ones and AGG), D width, M width of the MLP, h heads, I heads x head_dim,
c bytes of a computed number (2 in bf16, 4 in fp32). Weights, gradients and optimiser are fp32:
bf16 means autocast.

An encoder block keeps for its backward pass, per clip:
  norms      2 n D 4 + 4 n 4    their inputs (the residual stream) in fp32; mean and deviation
  linears    n (2 D + I + M) c  their inputs: of q k v, of the attention's output, of the MLP's two
  activation n M c              the input of GELU
  attention  3 n I c            q, k, v; also the scores, h n n c, if no fused operator is used
                                and they are few enough to keep
Dropout adds a mask for each place where it acts. With activation checkpointing only the input of a
block (n D 4) stays, and one block at a time has everything. Only the output of AGG is used of the
last block: its first norm and q k v are computed for all tokens, the rest for one.

Where a block merges tokens, all of it counts with those that enter it, and the shares of the merged
ones are kept, too: r n / 2 c. A block with X experts keeps, in place of what belongs to its MLP,
the router's input in fp32, four tables n X 4 of its probabilities, and (2 D + 2 M) c and five whole
numbers for each of the k n choices.
"""

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from vatt.config import (
    ExpertsParams,
    FinetuneTaskParams,
    ModelParams,
    PretrainParams,
    SizeParams,
)
from vatt.flops import num_video_tokens, signals_of
from vatt.model.experts import has_experts
from vatt.model.merging import num_merged, token_counts
from vatt.model.patches import num_kept, num_tokens, patch_values
from vatt.model.transformer import resolve
from vatt.senses import SENSES
from vatt.senses.form import Cutting
from vatt.training.gradient_cache import micro_batch_sizes

if TYPE_CHECKING:
    from torch import nn

FP32, INT64 = 4, 8
COLOUR_FLOATS = 20 / 3  # copies of the frames while vatt.senses.video changes colours
MEANS_FLOATS, PATCHES_FLOATS = 17 / 3, 1.27  # of all frames, and of kept patches, when some drop
MIXED_FLOATS = 4  # copies of clips while pairs of them are mixed
ADAM_STATES, SGD_STATES = 2, 1  # numbers kept for each weight
BUCKET = 50_000_000  # numbers that ZeRO reduces at once (vatt.training.engine)
FALLBACK_BUCKET = 500_000_000  # numbers that DeepSpeed joins at stage 0, also in a single process
SCORE_BYTES = 6 * FP32 + 2  # per pair: both directions, masked, with gradients; two masks
RUNTIME = {
    False: 0.6e9,
    True: 1.0e9,
}  # Python, torch, DeepSpeed; on a GPU also its context and NCCL
KERNELS = 44e6  # kept by oneDNN for bf16 products of one number of clips (bench/plan.py)


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """How a batch is computed; it does not change any result."""

    processes: int = 1
    micro_batch_size: int | None = None
    kept_micro_batches: int = 1  # whose activations are kept, of those that are computed twice
    zero_stage: int = 1
    offload: str = "none"
    activation_checkpointing: bool = False
    on_gpu: bool = False

    def rows(self, batch_size: int) -> int:
        """Clips of one process."""
        return math.ceil(batch_size / self.processes)

    def is_cached(self, batch_size: int) -> bool:
        """Whether the clips of a process are computed in micro-batches, each twice."""
        return self.micro_batch_size is not None and self.micro_batch_size < self.rows(batch_size)

    def at_once(self, batch_size: int) -> int:
        """Clips that are encoded at once."""
        return self.micro_batches(batch_size)[-1]

    def micro_batches(self, batch_size: int) -> list[int]:
        """Clips of each micro-batch, in order; at stage 3 one more clip comes first."""
        rows = self.rows(batch_size)
        if not self.is_cached(batch_size):
            return [rows]
        assert self.micro_batch_size is not None
        return micro_batch_sizes(rows - (self.zero_stage == 3), self.micro_batch_size)

    def kept_clips(self, batch_size: int) -> int:
        """Clips whose activations are kept until the way back."""
        if not self.is_cached(batch_size):
            return self.rows(batch_size)
        kept = self.micro_batches(batch_size)[::-1][: self.kept_micro_batches]
        return sum(kept) + (self.zero_stage == 3)

    def passes(self, batch_size: int) -> int:
        """How often the encoders run, forward or backward."""
        number, is_cached = len(self.micro_batches(batch_size)), self.is_cached(batch_size)
        return 2 * number + max(0, number - self.kept_micro_batches) * is_cached

    def repeated(self, batch_size: int) -> float:
        """The share of the clips that are encoded a second time."""
        return 1 - self.kept_clips(batch_size) / self.rows(batch_size)

    def clip_counts(self, batch_size: int) -> int:
        """How many different numbers of clips are encoded at once."""
        if not self.is_cached(batch_size):
            return 1
        return len({*self.micro_batches(batch_size), *([1] if self.zero_stage == 3 else [])})


@dataclass(frozen=True, slots=True)
class Counts:
    """How many numbers a model has."""

    trained: int
    frozen: int
    encoders: int  # trained ones outside the heads
    linear: int  # in the matrices of linear layers, which are cast

    @property
    def all(self) -> int:
        """Trained or not."""
        return self.trained + self.frozen


@dataclass(frozen=True, slots=True)
class MemoryPeak:
    """The parts of a process's peak memory, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    inputs: float
    runtime: float  # measured once on a CPU; a rule of thumb on a GPU

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))


def count(model: ModelParams) -> Counts:
    """Count the weights of a model without allocating them."""
    from vatt.checkpoint import build, without_memory

    with without_memory():
        return count_weights(build(model))


def count_weights(built: "nn.Module") -> Counts:
    """Count the weights of a model that is built."""
    from torch import nn

    from vatt.model.experts import ExpertLinear

    weights = dict(built.named_parameters())
    trained = {name: value.numel() for name, value in weights.items() if value.requires_grad}
    return Counts(
        trained=sum(trained.values()),
        frozen=sum(value.numel() for value in weights.values()) - sum(trained.values()),
        encoders=sum(size for name, size in trained.items() if not name.startswith("heads.")),
        linear=sum(
            m.weight.numel() for m in built.modules() if isinstance(m, nn.Linear | ExpertLinear)
        ),
    )


# --- activations ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NumberKind:
    """How activations are computed and stored."""

    number: int  # bytes of a computed number
    dropout: float
    on_gpu: bool
    checkpointing: bool
    clips: int  # at once


def block_bytes(size: SizeParams, tokens: int, kind: NumberKind, *, masked: bool = False) -> int:
    """What an encoder block keeps for one clip; `masked` attention has a bias."""
    inner = size.heads * size.head_dim
    kept = 2 * tokens * size.dim * FP32 + 4 * tokens * FP32
    kept += tokens * (2 * size.dim + inner + 2 * size.mlp_dim) * kind.number
    kept += attention_bytes(size, tokens, kind, masked=masked)
    if kind.dropout > 0:  # a mask takes a byte on a GPU
        places = tokens * (2 * size.dim + size.mlp_dim)
        kept += places if kind.on_gpu else places * kind.number
    return kept


def experts_bytes(size: SizeParams, tokens: int, kind: NumberKind, experts: ExpertsParams) -> int:
    """How much more a block keeps for one clip with experts in place of its MLP."""
    choices = experts.top_k * tokens
    kept = tokens * size.dim * FP32 + 4 * tokens * experts.number * FP32
    kept += choices * (2 * (size.dim + size.mlp_dim) * kind.number + 5 * INT64)
    if kind.dropout > 0:
        kept += (choices - tokens) * size.mlp_dim * (1 if kind.on_gpu else kind.number)
    return kept - tokens * (size.dim + 2 * size.mlp_dim) * kind.number


def attention_bytes(size: SizeParams, tokens: int, kind: NumberKind, *, masked: bool) -> int:
    """Queries, keys and values, and the scores if the operator keeps them."""
    from vatt.model.operators import KEPT

    three, scores = 3 * tokens * size.heads * size.head_dim, size.heads * tokens**2
    if kind.dropout > 0 and not kind.on_gpu:  # torch's plain attention, which is fp32
        return (three + 3 * scores) * FP32
    if kind.number == 2 and not masked and not kind.on_gpu:  # a few heads at a time
        return (three + scores * (kind.clips * scores <= KEPT)) * kind.number
    return three * kind.number + size.heads * tokens * FP32  # a fused one


def last_block_bytes(size: SizeParams, tokens: int, kind: NumberKind, *, masked: bool) -> int:
    """What the last block keeps for one clip, including the norm after it."""
    inner = size.heads * size.head_dim
    norm = size.dim * FP32 + 2 * FP32
    of_all = norm + (size.dim + 3 * inner) * kind.number
    of_agg = block_bytes(size, 1, kind, masked=masked)  # including its share of the above
    return tokens * of_all + of_agg


def encoder_bytes(
    size: SizeParams,
    tokens: int,
    kind: NumberKind,
    *,
    masked: bool = False,
    merge_rate: float = 0.0,
    experts: ExpertsParams | None = None,
) -> int:
    """What an encoder keeps for one clip, including its last norm."""
    *counts, last = token_counts(tokens, merge_rate, size.depth)
    blocks = [
        block_bytes(size, count, kind, masked=masked or count < tokens)
        + num_merged(count, merge_rate) * (count // 2) * kind.number
        for count in counts
    ]
    for place, count in enumerate(counts):
        if experts is not None and has_experts(place + 1, size.depth, experts):
            blocks[place] += experts_bytes(size, count, kind, experts)
    if kind.checkpointing:
        largest = max(blocks, default=block_bytes(size, last, kind, masked=masked))
        return (sum(counts) + last) * size.dim * FP32 + largest
    masked = masked or last < tokens
    return sum(blocks) + last_block_bytes(size, last, kind, masked=masked)


def clip_bytes(model: ModelParams, params: PretrainParams, setting: BatchSettings) -> int:
    """What the three towers keep for one clip from the forward to the backward pass."""
    kind = number_kind(model, params, setting)
    signals = sum(
        tower_bytes(model, name, params.drop_rate, kind, params.merge_rate)
        for name in signals_of(model)
    )
    words = model.text.words
    sentence = words * INT64
    sentence += encoder_bytes(
        resolve(model.text.size), words + 1, kind, masked=True, experts=model.experts
    )
    return signals + params.text_candidates * sentence


def number_kind(
    model: ModelParams, params: PretrainParams | FinetuneTaskParams, setting: BatchSettings
) -> NumberKind:
    """How a training's activations are computed and stored."""
    return NumberKind(
        2 if params.precision == "bf16" else FP32,
        model.dropout,
        setting.on_gpu,
        setting.activation_checkpointing,
        setting.at_once(params.batch_size),
    )


def tower_bytes(
    model: ModelParams, tower: str, drop_rate: float, kind: NumberKind, merge_rate: float = 0.0
) -> int:
    """What the tower of a signal keeps for one clip."""
    section = SENSES[tower].section(model)
    cutting, size = SENSES[tower].tokens(section), resolve(section.size)
    assert isinstance(cutting, Cutting)
    kept = num_kept(num_tokens(cutting), drop_rate)
    total = kept * patch_values(cutting) * kind.number  # the patches, projected
    if model.dropout > 0:
        total += kept * size.dim * (1 if kind.on_gpu else FP32)
    return total + encoder_bytes(size, kept + 1, kind, merge_rate=merge_rate, experts=model.experts)


def signal_values(model: ModelParams) -> tuple[int, int]:
    """How many numbers the picture and the sound of a clip have."""
    size = model.video.frame_size
    height, width = size if isinstance(size, tuple) else (size, size)
    return model.video.frames * height * width * 3, model.audio.samples * (
        model.audio.mel_bins or 1
    )


# --- heads and loss -------------------------------------------------------------------------------


def feature_values(model: ModelParams, candidates: int) -> int:
    """How many numbers the features of a clip have: of each signal, and each candidate text."""
    from vatt.checkpoint import feature_dims

    dims = feature_dims(model)
    return sum(dims.values()) + (candidates - 1) * dims["text"]


def loss_bytes(model: ModelParams, params: PretrainParams) -> int:
    """Features of all processes, what the heads keep, and the scores of the current block."""
    from vatt.losses import MAX_SCORES

    batch, candidates = params.batch_size, params.text_candidates
    features = 2 * feature_values(model, candidates)  # with their gradient
    # A projection keeps centred rows, scaled rows and a unit vector, each with a gradient.
    rows = 1 + len(signals_of(model))  # of the space va: the video's head has two layers
    projected = 6 * (rows * model.va_dim + (1 + candidates) * model.vt_dim)
    # Blocks of anchors are computed again in the backward pass; one at a time has its scores.
    scores = min(batch * batch * candidates, max(MAX_SCORES, batch * candidates))
    return batch * FP32 * (features + projected) + scores * SCORE_BYTES


# --- weights, gradients, optimiser ----------------------------------------------------------------


def optimizer_bytes(
    counts: Counts, params: PretrainParams | FinetuneTaskParams, setting: BatchSettings
) -> float:
    """Adam's moments and ZeRO's copy of the weights; divided over processes from stage 1."""
    states = ADAM_STATES if params.optimizer.name == "adam" else SGD_STATES
    if setting.offload != "none" and setting.on_gpu:
        return 0.0
    if setting.zero_stage == 0:
        return counts.trained * FP32 * states
    return counts.trained * FP32 * (states + 1) / setting.processes


def weights_bytes(counts: Counts, setting: BatchSettings) -> float:
    """The weights themselves; stage 3 divides them over the processes."""
    if setting.offload == "all" and setting.on_gpu:
        return 0.0
    shared = setting.processes if setting.zero_stage == 3 else 1
    return (counts.trained / shared + counts.frozen) * FP32


def memory(
    model: ModelParams,
    params: PretrainParams,
    setting: BatchSettings,
    counts: Counts | None = None,
    *,
    batches: int = 1,
) -> MemoryPeak:
    """The parts at the peak of a step; `batches` are held at once, including the loader's.

    The peak is one of four moments. At the end of the forward pass: all that it keeps, and either
    its inputs as floats or the loss. With cached gradients, in a second pass: the summed gradients
    of the encoders and one micro-batch. At the start of the optimiser: the gradients and ZeRO's
    copies. And while the colours of a micro-batch are changed.
    """
    counts = counts or count(model)
    clip, clips = clip_bytes(model, params, setting), setting.at_once(params.batch_size)
    picture, sound = signal_values(model)
    share = picture_share(model, params)
    floats = clips * FP32 * (share * picture + sound)
    loss = loss_bytes(model, params)
    copies = counts.linear * 2 if params.precision == "bf16" else 0
    batch, is_cached = params.batch_size, setting.is_cached(params.batch_size)
    kept = (setting.kept_clips(batch) if is_cached else clips) * clip + copies
    # The floats are freed after the encoders, before the loss.
    forward = (0.0, kept, loss, 0.0) if loss > floats else (0.0, kept, 0.0, 1.0 * floats)
    moments = [forward, (update_bytes(counts, setting), 0.0, 0.0, 0.0)]
    waiting = max(0, setting.kept_clips(batch) - clips) * clip  # kept ones, without the last
    if is_cached:
        encoders, first = counts.encoders * FP32, clip if setting.zero_stage == 3 else 0
        moments.append((encoders, max(clips * clip + copies + first, waiting), 0.0, 1.0 * floats))
        moments.append((2.0 * encoders, waiting + first, 0.0, 0.0))
    if changes_colour(params):  # before the encoders, also in the second pass
        coloured = colour_copies(share) * clips * FP32 * picture
        moments.append((counts.encoders * FP32 * is_cached, copies, 0.0, coloured))
        moments.append((0.0, copies + waiting, 0.0, coloured))
    gradients, activations, loss_work, signals = max(moments, key=sum)
    return MemoryPeak(
        weights=weights_bytes(counts, setting),
        gradients=gradients,
        optimizer=optimizer_bytes(counts, params, setting),
        activations=activations,
        loss=loss_work,
        inputs=batches * batch_bytes(model, params, setting) + signals,
        runtime=RUNTIME[setting.on_gpu] + kernels_bytes(params, setting),
    )


def finetuning_memory(
    model: ModelParams, task: FinetuneTaskParams, setting: BatchSettings, counts: Counts
) -> MemoryPeak:
    """The same for a step of fine-tuning: one tower, and all clips of a process as floats.

    On a GPU the clips of the next step are prepared while this one trains.
    """
    tower, batch = "audio" if task.modality == "audio" else "video", task.batch_size
    kind, is_cached = number_kind(model, task, setting), setting.is_cached(batch)
    clip = tower_bytes(model, tower, task.drop_rate, kind)
    picture, sound = signal_values(model)
    floats = setting.rows(batch) * FP32 * (picture + sound)
    prepared = floats * (COLOUR_FLOATS if changes_colour(task) else MIXED_FLOATS)
    copies = counts.linear * 2 if task.precision == "bf16" else 0
    clips = max(setting.kept_clips(batch), setting.at_once(batch))
    summed = counts.trained * FP32
    gradients, activations, signals = max(
        (0.0, 0.0, prepared),
        (summed * is_cached, clips * clip + copies, floats + prepared * setting.on_gpu),
        (summed * (1 + is_cached), 1.0 * clip, floats + prepared * setting.on_gpu),
        (update_bytes(counts, setting), 0.0, floats + prepared * setting.on_gpu),
        key=sum,
    )
    return MemoryPeak(
        weights=weights_bytes(counts, setting),
        gradients=gradients,
        optimizer=optimizer_bytes(counts, task, setting),
        activations=activations,
        loss=0.0,
        inputs=signals + 2 * floats / FP32,  # and two batches as loaded
        runtime=RUNTIME[setting.on_gpu] + kernels_bytes(task, setting),
    )


def kernels_bytes(params: PretrainParams | FinetuneTaskParams, setting: BatchSettings) -> float:
    """What oneDNN keeps on a CPU for bf16 products, in addition to their results."""
    if setting.on_gpu or params.precision != "bf16":
        return 0.0
    return KERNELS * setting.clip_counts(params.batch_size)


def changes_colour(params: PretrainParams | FinetuneTaskParams) -> bool:
    """Whether colours are changed on the training device."""
    change = params.augmentation
    return any((change.brightness, change.contrast, change.saturation, change.hue))


def picture_share(model: ModelParams, params: PretrainParams) -> float:
    """The share of a clip's pixels that become floats: those of the patches that are kept.

    All of them where a patch is partial, because clips are then scaled before they are cut.
    """
    tokens = num_video_tokens(model.video)
    are_whole = tokens * math.prod(model.video.patch) * 3 == signal_values(model)[0]
    return num_kept(tokens, params.drop_rate) / tokens if are_whole else 1.0


def colour_copies(share: float) -> float:
    """Copies of the frames, as floats, while colours are changed."""
    return COLOUR_FLOATS if share == 1 else MEANS_FLOATS + PATCHES_FLOATS * share


def update_bytes(counts: Counts, setting: BatchSettings) -> float:
    """Gradients at the start of the optimiser, and DeepSpeed's copies to reduce and update."""
    gradient = counts.trained * FP32
    own = gradient / setting.processes
    bucket = min(gradient, BUCKET * FP32) * (2 if setting.on_gpu else 0)  # two, used alternately
    if setting.zero_stage == 0:
        return gradient + min(gradient, FALLBACK_BUCKET * FP32)
    if setting.zero_stage == 1:
        return gradient + own + bucket
    return 2 * own + bucket


def batch_bytes(model: ModelParams, params: PretrainParams, setting: BatchSettings) -> float:
    """The clips of a process as loaded: uint8 frames, int16 sound, int64 words."""
    picture, sound = signal_values(model)
    words = params.text_candidates * model.text.words * INT64
    more = sum(
        FP32 * math.prod(cutting.sizes) * (cutting.channels or 1)
        for name, section in signals_of(model).items()
        if SENSES[name].places and isinstance(cutting := SENSES[name].tokens(section), Cutting)
    )
    return setting.rows(params.batch_size) * (picture + 2 * sound + words + more)
