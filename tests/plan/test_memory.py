"""The memory formula against what autograd keeps, and against sums done by hand."""

import itertools

import pytest
import torch

from tests.training import tiny
from vatt.config import ExpertsParams, SizeParams
from vatt.model.patches import draw_kept
from vatt.model.vatt import VATT
from vatt.plan.memory import (
    BatchSettings,
    Counts,
    NumberKind,
    block_bytes,
    clip_bytes,
    colour_copies,
    count,
    kernels_bytes,
    memory,
    optimizer_bytes,
    picture_share,
    update_bytes,
    weights_bytes,
)
from vatt.training.pretrain import Visible

PARAMS = tiny.DEMO.pretrain
CLIPS = 3


def kept_by_autograd(model, params, precision):
    """Bytes in the graph of the encoders, without weights and their casts."""
    torch.manual_seed(0)
    built = VATT(model).train()
    held = {p.untyped_storage().data_ptr() for p in built.parameters()}
    shapes = {tuple(p.shape) for p in built.parameters()} | {
        tuple(reversed(p.shape)) for p in built.parameters()
    }
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        storage = tensor.untyped_storage().data_ptr()
        if storage not in held and tuple(tensor.shape) not in shapes:
            kept[storage] = tensor
        return tensor

    def tokens(number, stream):
        samples = list(range(CLIPS))
        return draw_kept(number, params.drop_rate, seed=0, step=0, samples=samples, stream=stream)

    video = torch.rand(CLIPS, model.video.frames, *[model.video.frame_size] * 2, 3)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        features = built.encode(
            video,
            torch.rand(CLIPS, model.audio.samples),
            torch.randint(2, 30, (CLIPS, params.text_candidates, model.text.words)),
            kept_video=tokens(built.token_counts["video"], "video"),
            kept_audio=tokens(built.token_counts["audio"], "audio"),
        )
    assert features.keys() == {"video", "audio", "text"}
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backbone", ["specific", "agnostic"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_are_what_autograd_keeps(precision, backbone, dropout):
    model = tiny.DEMO.model.model_copy(update={"dropout": dropout, "backbone": backbone})
    params = PARAMS.model_copy(update={"precision": precision})
    formula = CLIPS * clip_bytes(model, params, BatchSettings())
    assert formula == pytest.approx(kept_by_autograd(model, params, precision), rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("experts", [{"number": 4}, {"number": 8, "top_k": 2, "capacity": 1.0}])
def test_activations_with_experts_are_what_autograd_keeps(precision, dropout, experts):
    model = tiny.DEMO.model.model_copy(
        update={"dropout": dropout, "experts": ExpertsParams.model_validate(experts)}
    )
    params = PARAMS.model_copy(update={"precision": precision})
    formula = CLIPS * clip_bytes(model, params, BatchSettings())
    assert formula == pytest.approx(kept_by_autograd(model, params, precision), rel=0.05)


def test_a_block_by_hand():
    size = SizeParams(depth=1, dim=4, mlp_dim=8, heads=2, head_dim=2)
    # 3 tokens: norms 2*3*4*4 + 4*3*4, linears 3*(8+4+8)*2, GELU 3*8*2, q k v 3*3*4*2, scores 2*9*2
    by_hand = 96 + 48 + 120 + 48 + 72 + 36
    assert block_bytes(size, 3, NumberKind(2, 0.0, False, False, clips=1)) == by_hand
    # Of so many clips at a time, the scores would be too many to keep.
    assert block_bytes(size, 3, NumberKind(2, 0.0, False, False, clips=10**6)) == by_hand - 36


def test_adam_in_mixed_precision_takes_twelve_bytes_a_weight():
    counts = Counts(trained=100, frozen=10, encoders=90, linear=80)
    alone, eight = BatchSettings(), BatchSettings(processes=8)
    assert optimizer_bytes(counts, PARAMS, alone) == 1200
    assert optimizer_bytes(counts, PARAMS, eight) == 150
    assert optimizer_bytes(counts, PARAMS, BatchSettings(zero_stage=0)) == 800
    assert weights_bytes(counts, eight) == 440
    assert weights_bytes(counts, BatchSettings(processes=8, zero_stage=3)) == 90
    assert update_bytes(counts, alone) == 800 and update_bytes(counts, eight) == 450
    assert update_bytes(counts, BatchSettings(processes=8, zero_stage=2)) == 100


@pytest.mark.parametrize("experts", [None, {"number": 4}])
def test_counts_are_the_model_s(experts):
    model = tiny.model_params(experts=experts)
    built = tiny.make_model(model)
    assert count(model).all == sum(weight.numel() for weight in built.parameters())


def test_caching_makes_activations_independent_of_the_batch():
    def activations(batch_size, micro):
        params = PARAMS.model_copy(update={"batch_size": batch_size})
        found = memory(tiny.DEMO.model, params, BatchSettings(micro_batch_size=micro))
        return found.activations

    assert activations(512, 64) == activations(256, 64)
    assert activations(512, None) > 4 * activations(512, 64)


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.5, 0.9])
def test_changing_colours_takes_as_many_copies_of_the_frames_as_forecast(rate):
    video = torch.randint(256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    colour = torch.tensor([0.1, 1.2, 0.8, 0.1]).repeat(2, 1)
    size = {"frames": 4, "frame_size": 32, "patch": (2, 8, 8)}
    model = tiny.DEMO.model
    model = model.model_copy(update={"video": model.video.model_copy(update=size)})
    embed = tiny.make_model(model).video.embed
    kept = draw_kept(32, rate, seed=0, step=0, samples=range(2)) if rate else None
    with torch.profiler.profile(profile_memory=True) as found:
        Visible(embed)(video, colour, kept, torch.float32)
    assert found.profiler is not None
    events = found.profiler.kineto_results.events()
    grown = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = max(itertools.accumulate(nbytes for _, nbytes in grown))
    share = picture_share(model, PARAMS.model_copy(update={"drop_rate": rate}))
    assert peak / (video.numel() * 4) == pytest.approx(colour_copies(share), rel=0.02)


def test_colours_count_where_the_settings_change_them():
    change = PARAMS.augmentation.model_copy(update={"hue": 0.1})
    setting, clips = BatchSettings(micro_batch_size=64, activation_checkpointing=True), 64
    still = memory(tiny.DEMO.model, PARAMS, setting)
    moving = memory(tiny.DEMO.model, PARAMS.model_copy(update={"augmentation": change}), setting)
    video = tiny.DEMO.model.video
    assert isinstance(video.frame_size, int)
    pictures = clips * video.frames * video.frame_size**2 * 3 * 4
    copies = colour_copies(picture_share(tiny.DEMO.model, PARAMS))
    assert moving.inputs - still.inputs >= (copies - 1.1) * pictures
    assert moving.total > still.total


def test_activation_checkpointing_keeps_less():
    model, params = tiny.DEMO.model, PARAMS
    less = clip_bytes(model, params, BatchSettings(activation_checkpointing=True))
    assert less < 0.5 * clip_bytes(model, params, BatchSettings())


def test_a_cpu_s_bf16_library_keeps_something_for_each_number_of_clips():
    """Cached, the encoders see one or two sizes of micro-batches, at stage 3 also one clip."""
    assert BatchSettings().clip_counts(64) == 1
    assert BatchSettings(micro_batch_size=16).clip_counts(64) == 1
    assert BatchSettings(micro_batch_size=16).clip_counts(65) == 1  # five of 13
    assert BatchSettings(micro_batch_size=16).clip_counts(66) == 2  # 13 and 14
    assert BatchSettings(micro_batch_size=16, zero_stage=3).clip_counts(64) == 3  # 1, 15 and 16
    params = PARAMS.model_copy(update={"precision": "bf16"})
    fp32 = params.model_copy(update={"precision": "fp32"})
    assert kernels_bytes(params, BatchSettings()) > 0
    assert (
        kernels_bytes(fp32, BatchSettings())
        == kernels_bytes(params, BatchSettings(on_gpu=True))
        == 0
    )
