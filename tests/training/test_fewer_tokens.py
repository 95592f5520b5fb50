"""Tokens kept by content and merged tokens train exactly: in micro-batches, and after a stop."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.training import tiny
from vatt.config import ExpertsParams
from vatt.errors import VattError
from vatt.model.patches import cut, num_kept
from vatt.senses import SENSES
from vatt.training.pretrain import Pretraining, pretrain, pretraining_inputs
from vatt.training.telemetry import pretraining_work

CONTENT = {"drop_by": "content", "drop_random_share": 0.5}
FEWER = {**CONTENT, "merge_rate": 0.25}


def module_of(params, *, backbone="specific", experts=None, micro_batch_size=None):
    settings = tiny.model_params(backbone=backbone, depth=3)
    model = tiny.make_model(settings.model_copy(update={"experts": experts}))
    return Pretraining(model, params, micro_batch_size=micro_batch_size)


def inputs_of(model, batch, params, *, step=3, drop_rate=0.5):
    return pretraining_inputs(
        model, batch, step, drop_rate=drop_rate, seed=0, random_share=params.random_share
    )


def test_the_tokens_with_the_most_motion_and_sound_are_kept_and_a_share_of_others():
    params = tiny.pretrain_params(**CONTENT)
    model, batch = tiny.make_model(tiny.model_params()), tiny.make_batch(0)
    batch.audio[2] = 0  # this clip has no sound: its tokens are drawn
    (given,) = inputs_of(model, batch, params)
    energy = {name: SENSES[name].energy(batch.signals[name]) for name in ("video", "audio")}
    video, audio = cut(energy["video"], (2, 8, 8)), cut(energy["audio"][..., None], (16,))
    for name, energies in (("video", video.sum(-1)), ("audio", audio.sum(-1))):
        kept = given.kept[name]
        assert kept.shape == (8, num_kept(8, 0.5)) == (8, 4)
        for clip, (places, energy) in enumerate(zip(kept.tolist(), energies.tolist(), strict=True)):
            assert len(set(places)) == 4
            loudest = sorted(range(8), key=lambda place: -energy[place])[:2]
            assert sum(energy) == 0 or set(loudest) <= set(places)
            held = sum(energy[place] for place in places) / sum(energy) if sum(energy) else 0.5
            assert given.energy[name][clip].item() == pytest.approx(held)
    (random,) = inputs_of(model, batch, tiny.pretrain_params())
    assert torch.equal(random.kept["audio"][2], given.kept["audio"][2]) and not random.energy


@pytest.mark.parametrize("drop_rate", [0.875, 0.75, 0.5, 0.0])
def test_by_content_and_at_random_as_many_tokens_cost_as_much(drop_rate):
    found = []
    for changes in ({}, CONTENT):
        params = tiny.pretrain_params(drop_rate=drop_rate, **changes)
        module = module_of(params)
        inputs = inputs_of(module.model, tiny.make_batch(0), params, drop_rate=drop_rate)
        with FlopCounterMode(display=False) as counter:
            module(*inputs)
        shapes = {name: kept.shape for name, kept in inputs[0].kept.items()}
        found.append(
            (shapes, counter.get_total_flops(), pretraining_work(module.model.params, params))
        )
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("backbone", "experts"),
    [("specific", None), ("agnostic", None), ("agnostic", ExpertsParams(number=4))],
    ids=["specific", "agnostic", "experts"],
)
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_gradients_in_micro_batches_equal_the_whole_batch_s(backbone, experts, micro_batch_size):
    params, found = tiny.pretrain_params(**FEWER), []
    for size in (None, micro_batch_size):
        kind = {"backbone": backbone, "experts": experts}
        module = module_of(params, **kind, micro_batch_size=size).double()
        losses = module(*inputs_of(module.model, tiny.make_batch(0), params))
        losses["loss"].backward()
        weights = {name: weight.grad for name, weight in module.named_parameters()}
        found.append(losses | weights)
    for name, value in found[1].items():
        torch.testing.assert_close(value, found[0][name], rtol=1e-6, atol=1e-9, msg=name)


def run(folder, batches_from=tiny.batches_from, **changes):
    reporter = tiny.Recorder()
    training = tiny.training(folder, reporter, batches_from)
    model = tiny.make_model(tiny.model_params(depth=3))
    weights = pretrain(model, tiny.pretrain_params(**changes), training)
    return reporter.rows, tiny.hash_of(weights)


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path):
    rows, expected = run(tmp_path / "whole", **FEWER)
    assert all(0.5 < row["kept_energy.video"] < 1 for _, row in rows)
    assert all(0.5 < row["kept_energy.audio"] < 1 for _, row in rows)
    with pytest.raises(VattError, match="batches ended"):
        run(tmp_path / "again", lambda _: itertools.islice(tiny.batches_from(0), 3), **FEWER)
    resumed, weights = run(tmp_path / "again", **FEWER)
    assert resumed[0][0] == 3 and weights == expected


def test_each_setting_changes_the_weights_and_those_that_are_off_change_none(tmp_path):
    off = {"drop_by": "random", "drop_random_share": 0.9, "merge_rate": 0.0}
    plain, off, content, merged = (
        run(tmp_path / str(number), **changes)[1]
        for number, changes in enumerate([{}, off, CONTENT, {"merge_rate": 0.25}])
    )
    assert off == plain and len({plain, content, merged}) == 3
