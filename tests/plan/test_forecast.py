"""Forecasts against sums done by hand; what fits, and what is cheapest."""

from pathlib import Path

import pytest

from tests.training import tiny
from vatt.config import ExpertsParams, SizeParams, load_params
from vatt.errors import SettingsError
from vatt.flops import clip_work
from vatt.model.transformer import resolve
from vatt.plan.forecast import (
    GIB,
    GpuSpeed,
    Place,
    Seconds,
    Trial,
    TrialSpeed,
    cheapest,
    forecast,
    forecast_memory,
    gather_bytes,
    gradient_bytes,
    largest_micro_batch,
    loss_flops,
    named_place,
    network_seconds,
    settings,
)
from vatt.plan.memory import BatchSettings, Counts, batch_bytes, count, memory
from vatt.plan.trial import shallow, step_parts, times_longer, tried_depths
from vatt.training.telemetry import GPUS, pretraining_work

PAPER = load_params(Path(__file__).parents[2] / "presets" / "paper.yaml")
COUNTS = Counts(trained=1000, frozen=0, encoders=900, linear=800)


def on(speed, place, **setting):
    return forecast(PAPER, BatchSettings(**setting), place, speed, COUNTS)


def test_features_and_gradients_that_travel_by_hand():
    # tiny model: features of 16 + 16 and two texts of 16, batch 8, fp32
    params = tiny.pretrain_params(batch_size=8, text_candidates=2)
    whole = 8 * (16 + 16 + 2 * 16) * 4
    assert gather_bytes(tiny.model_params(), params, 1) == 0
    assert gather_bytes(tiny.model_params(), params, 4) == 3 * whole * 3 / 4
    assert gradient_bytes(COUNTS, BatchSettings(processes=2)) == 2 * 4000 / 2
    assert (
        gradient_bytes(COUNTS, BatchSettings(processes=2, zero_stage=3), passes=4) == 5 * 4000 / 2
    )


def test_every_process_computes_heads_and_scores_of_the_whole_batch():
    params = tiny.pretrain_params(batch_size=8, text_candidates=2)
    heads = 16 * 12 + 12 * 12 + 12 * 8 + 16 * 12 + 2 * 16 * 8  # multiply-adds of a clip
    scores = 8 * 8 * (12 + 2 * 8)  # of all pairs, one direction
    assert loss_flops(tiny.model_params(), params) == 3 * 2 * 8 * heads + 4 * 2 * 2 * scores


def test_the_network_carries_features_gradients_and_offloaded_weights():
    gpu, batch = GPUS["h100-80gb"], PAPER.pretrain.batch_size

    def seconds(**setting):
        return network_seconds(gpu, PAPER.model, PAPER.pretrain, COUNTS, BatchSettings(**setting))

    assert seconds() == 0
    features = gather_bytes(PAPER.model, PAPER.pretrain, 16)
    sent = features + gradient_bytes(COUNTS, BatchSettings(processes=16))
    assert seconds(processes=16) == pytest.approx(sent / gpu.network)
    alone = {"zero_stage": 3, "offload": "all", "micro_batch_size": batch // 4}
    for kept in (0, 1):  # of four micro-batches, each with two or three passes
        found = seconds(**alone, kept_micro_batches=kept)
        assert found == pytest.approx((3 * 4 - kept) * 4000 / gpu.host)


# Seconds and GiB measured on one NVIDIA H200 with torch 2.11 (docs/benchmarks.md): batch,
# micro-batch, compiled, seconds on the GPU without the indices of DropToken, which a CPU then drew.
MEASURED_ON_H200 = (
    (64, None, False, 0.29 - 0.040, 43.9),
    (128, None, True, 0.50 - 0.080, 79.4),
    (2048, 64, False, 11.86 - 1.3, 60.4),
)


@pytest.mark.parametrize(("batch", "micro", "compiled", "seconds", "gib"), MEASURED_ON_H200)
def test_the_forecast_is_within_15_percent_of_what_an_h200_took(
    batch, micro, compiled, seconds, gib
):
    place, counts = named_place("h200-141gb"), count(PAPER.model)
    pretrain = PAPER.pretrain.model_copy(update={"batch_size": batch})
    params = PAPER.model_copy(update={"pretrain": pretrain})
    setting = BatchSettings(on_gpu=True, micro_batch_size=micro, kept_micro_batches=0)
    speed = GpuSpeed(place.device, PAPER.model, pretrain, counts, compiled=compiled)
    found = forecast(params, setting, place, speed, counts)
    assert found.seconds.total == pytest.approx(seconds, rel=0.15)
    assert found.memory.total / GIB == pytest.approx(gib, rel=0.15)


def test_counted_work_is_the_work_of_a_step():
    work = clip_work(PAPER.model, drop_rate=0.5, candidates=PAPER.pretrain.text_candidates)
    flops = pretraining_work(PAPER.model, PAPER.pretrain).flops / PAPER.pretrain.batch_size / 3
    assert work.dense + work.attention == pytest.approx(flops, rel=0.02)  # less patches and heads


def test_a_gpu_s_step_can_be_a_given_share_of_its_peak():
    gpu = GPUS["h100-80gb"]
    speed = GpuSpeed(gpu, PAPER.model, PAPER.pretrain, COUNTS, share=0.4)
    flops = pretraining_work(PAPER.model, PAPER.pretrain).flops
    plain = speed(BatchSettings(on_gpu=True)).compute
    assert plain == pytest.approx(flops / (gpu.bf16_flops * 0.4))
    for kept in (0, 1, 16, 64):  # of 64 micro-batches
        cached = BatchSettings(on_gpu=True, micro_batch_size=32, kept_micro_batches=kept)
        again = (64 - kept) / 64 / 3 * plain
        assert speed(cached).compute == pytest.approx(plain + again)
    eight = speed(BatchSettings(processes=8, on_gpu=True))
    assert eight.compute == pytest.approx(plain / 8) and eight.network > 0


def test_a_trial_s_step_is_its_clips_and_what_every_step_costs():
    trial = Trial(fixed=0.5, clip=0.01, cached_clip=0.013, losses={64: 0.1, 16: 0.01})
    assert trial.step(64, rows=64, cached=False) == pytest.approx(0.5 + 0.64 + 0.1)
    assert trial.step(128, rows=128, cached=True) == pytest.approx(0.5 + 1.664 + 0.4)
    speed = TrialSpeed(trial, tiny.pretrain_params(batch_size=64), loader=32.0)
    found = speed(BatchSettings())
    assert found.busy == pytest.approx(1.24) and found.total == 2.0 and found.bound == "loader"
    speed = TrialSpeed(trial, tiny.pretrain_params(batch_size=64), network=lambda setting: 0.3)
    assert speed(BatchSettings()).busy == pytest.approx(1.54)


def test_steps_of_models_with_few_blocks_give_those_of_the_whole_model():
    # 0.2 s in every step and 3 s for its other blocks; a clip takes 0.01 s and 0.4 s for them
    def seconds(share, clips):
        return 0.2 + 3.0 * share + clips * (0.01 + 0.4 * share)

    rows = [(share, clips, seconds(share, clips)) for share in (0.0, 0.1) for clips in (4, 16)]
    assert step_parts(rows) == pytest.approx([0.2, 3.0, 0.01, 0.4])
    assert step_parts(rows[:2])[::2] == pytest.approx([0.2, 0.01])  # a model of one block


def test_no_part_of_a_step_is_negative_on_a_busy_machine():
    rows = [(0.0, 4, 3.0), (0.0, 16, 2.4), (0.5, 4, 2.9), (0.5, 16, 2.2)]
    parts = step_parts(rows)
    assert min(parts) >= 0 and parts[0] + 4 * parts[2] == pytest.approx(2.6, abs=0.4)


def test_a_machine_so_busy_that_steps_seem_to_take_no_time_gives_a_forecast_all_the_same():
    rows = [(0.0, 8, -0.1), (0.0, 32, 0.0), (1.0, 8, 0.2), (1.0, 32, 0.2)]
    fixed, fixed_blocks, clip, clip_blocks = step_parts(rows)
    assert min(fixed, fixed_blocks, clip, clip_blocks) >= 0
    assert times_longer(0.3, 0.0) == 1.0 and times_longer(0.3, 0.1) == pytest.approx(3.0)


def test_a_tried_model_has_the_towers_of_the_whole_one_and_few_blocks():
    model = PAPER.model
    assert tried_depths(model) == (1, 3)
    for blocks in tried_depths(model):
        for name, section in shallow(model, blocks).towers().items():
            whole = resolve(model.towers()[name].size)
            assert section.size == whole.model_copy(update={"depth": blocks})
    one = SizeParams(depth=1, dim=8, mlp_dim=8, heads=1, head_dim=8)
    flat = shallow(model, 1).model_copy(
        update={name: s.model_copy(update={"size": one}) for name, s in model.towers().items()}
    )
    assert tried_depths(flat) == (1,)
    with_experts = model.model_copy(update={"experts": ExpertsParams(number=4)})
    assert tried_depths(with_experts) == (2, 4)


def test_days_hours_energy_by_hand():
    place = Place("x", 1e12, 500.0, True)
    found = on(lambda setting: Seconds(1.0, 0.0, 0.0, 0.728, 0.0), place, processes=4)
    assert found.days == pytest.approx(10.0)  # 500,000 steps of 1.728 s
    assert found.device_hours == pytest.approx(960) and found.kwh == pytest.approx(480)
    assert found.samples_per_second == pytest.approx(2048 / 1.728)
    assert found.seconds.bound == "compute"


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    place, counts = named_place("a100-40gb"), count(PAPER.model)
    found = largest_micro_batch(PAPER, BatchSettings(on_gpu=True), place, counts)
    assert found is not None

    def needed(size):
        setting = BatchSettings(on_gpu=True, micro_batch_size=size)
        return forecast_memory(PAPER, setting, place, counts).total

    assert needed(found) <= 0.92 * place.memory < needed(found + 1)
    tiny_place = Place("x", 1e9, 0.0, True)
    assert largest_micro_batch(PAPER, BatchSettings(on_gpu=True), tiny_place, counts) is None


def test_the_next_batch_skips_absent_where_it_is_brought_over_early():
    setting, counts = BatchSettings(on_gpu=True, micro_batch_size=1), count(PAPER.model)
    batch = batch_bytes(PAPER.model, PAPER.pretrain, setting)
    for gigabytes, batches in ((6.1 * batch, 2), (5.9 * batch, 1)):
        found = forecast_memory(PAPER, setting, Place("x", gigabytes, 0.0, True), counts)
        alone = memory(PAPER.model, PAPER.pretrain, setting, counts)
        assert found.total - alone.total == pytest.approx((batches - 1) * batch)


def test_the_cheapest_setting_fits_and_none_that_fits_is_faster():
    place, counts = named_place("rtx4090"), count(PAPER.model)
    assert place.device is not None
    speed = GpuSpeed(place.device, PAPER.model, PAPER.pretrain, counts)
    found = cheapest(PAPER, 1, place, speed, counts)
    assert found is not None and found.fits and found.setting.micro_batch_size is not None
    for setting in settings(2048, 1, place):
        other = forecast(PAPER, setting, place, speed, counts)
        assert not other.fits or other.seconds.total >= found.seconds.total
    assert cheapest(PAPER, 1, Place("x", 2 * GIB, 0.0, True), speed, counts) is None


def test_an_unknown_device_is_told_what_there_is():
    with pytest.raises(SettingsError, match="h100-80gb"):
        named_place("h1000")
