"""Every sense has the same form: model, loss, gradient and retrieval go through the list."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.evaluation.test_retrieval import clips as retrieval_clips
from tests.training import tiny
from tests.training.test_gradient_cache import gradients
from vatt import checkpoint
from vatt.config import ModelParams
from vatt.data.loading.sampling import Sampling
from vatt.errors import SettingsError
from vatt.evaluation.retrieval import similarities
from vatt.flops import multimodal_flops
from vatt.losses import nce
from vatt.model.patches import num_tokens
from vatt.senses import ANCHOR, SENSES, senses_of
from vatt.training.pretrain import Pretraining, fingerprint, pretraining_inputs

MORE = tuple(tiny.SENSES)
BACKBONES = ("specific", "agnostic")


def with_senses(backbone="specific", senses=MORE):
    return tiny.make_model(tiny.model_params(backbone=backbone, senses=senses))


def test_the_papers_senses_come_first_and_one_is_the_anchor():
    assert list(SENSES)[:3] == ["video", "audio", "text"]
    assert [name for name, sense in SENSES.items() if sense.is_anchor] == ["video"]
    assert [sense.name for sense in senses_of(tiny.model_params())] == ["video", "audio", "text"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_other_senses_add_weights_and_change_no_name(backbone):
    plain, more = (with_senses(backbone, senses) for senses in ((), MORE))
    added = more.state_dict().keys() - plain.state_dict().keys()
    assert plain.state_dict().keys() == more.state_dict().keys() - added
    heads = {name for name in added if name.startswith("heads.")}
    assert {name.split(".")[0] for name in added - heads} == set(MORE)
    assert {name.split(".")[1] for name in heads} == {f"{name}_to_va" for name in MORE}


def test_settings_without_other_senses_are_written_as_before():
    params = tiny.model_params()
    assert params.model_dump().keys() == {
        "recipe", "backbone", "video", "audio", "text", "va_dim", "vt_dim", "dropout", "release",
    }  # fmt: skip
    identity = fingerprint(tiny.pretrain_params(), params, data_hash="x", seed=0)
    assert not any("motion" in key or "senses" in key for key in identity)


def test_settings_with_other_senses_are_checked():
    plain = tiny.model_params().model_dump()
    motion = tiny.SENSES["motion"]
    with pytest.raises(ValueError, match="release has no motion"):
        ModelParams.model_validate(plain | {"recipe": "release", "motion": motion})
    other = plain | {"backbone": "agnostic", "motion": motion | {"size": "tiny"}}
    with pytest.raises(ValueError, match=r"model\.text\.size and model\.motion\.size must be"):
        ModelParams.model_validate(other)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_checkpoint_with_other_senses_comes_back(backbone, tmp_path):
    model = with_senses(backbone).eval()
    checkpoint.save(model, model.params, tmp_path / "saved")
    again = checkpoint.load(tmp_path / "saved")
    values = torch.randn(2, *tiny.SHAPES["motion"])
    torch.testing.assert_close(again(motion=values).motion_va, model(motion=values).motion_va)
    assert again(motion=values).video_va is None
    with pytest.raises(AttributeError):
        _ = again(motion=values).smell_va
    with pytest.raises(SettingsError, match="the model has no motion; it has video, audio, text"):
        with_senses(senses=())(motion=values)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_gradient_caching_equals_the_whole_batch_with_every_sense(backbone, micro_batch_size):
    batch = tiny.make_batch(0, senses=MORE)
    whole_losses, whole = gradients(with_senses(backbone).double(), batch, micro_batch_size=None)
    losses, found = gradients(
        with_senses(backbone).double(), batch, micro_batch_size=micro_batch_size
    )
    assert losses.keys() == {"loss", "nce", "mil_nce", *(SENSES[name].loss for name in MORE)}
    for name, value in losses.items():
        torch.testing.assert_close(value, whole_losses[name], rtol=1e-6, atol=1e-9)
    for name, value in found.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", MORE)
def test_a_clip_without_a_sense_has_no_part_in_what_needs_it(name):
    """Neither in the loss nor in the statistics of batch norm: its values do not matter."""
    batch = tiny.make_batch(0, senses=MORE)
    absent = ~batch.present[name]
    found = []
    for value in (0.0, 100.0):
        batch.signals[name] = batch.signals[name].clone()
        batch.signals[name][absent] = value
        model = with_senses()
        losses, weights = gradients(model, batch, micro_batch_size=None, drop_rate=0.0)
        found.append({**losses, **weights, **dict(model.named_buffers())})
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], msg=key)


@pytest.mark.parametrize("name", MORE)
def test_each_sense_has_an_nce_with_video_over_the_clips_that_have_both(name):
    batch, model = tiny.make_batch(0, senses=MORE), with_senses().eval()
    params = tiny.pretrain_params(drop_rate=0.0, senses_weight=0.5)
    module = Pretraining(model, params)
    losses = module(*pretraining_inputs(model, batch, 0, drop_rate=0.0, seed=0))
    there = batch.present[name].nonzero().flatten()
    video = model(video=ANCHOR.scaled(batch.signals["video"], batch.changes["video"])).video_va
    own = model(**{name: SENSES[name].scaled(batch.signals[name], None)}).va[name]
    alone = nce(video[there], own[there], params.temperature)
    torch.testing.assert_close(losses[SENSES[name].loss], alone)
    more = sum(losses[SENSES[one].loss] for one in MORE)
    torch.testing.assert_close(losses["loss"], losses["nce"] + losses["mil_nce"] + 0.5 * more)


@pytest.mark.parametrize("name", MORE)
def test_nobody_with_a_sense_trains_nothing_of_it(name):
    batch = tiny.make_batch(0, senses=MORE)
    batch.present[name][:] = False
    model = with_senses()
    before = model.get_submodule(f"heads.{name}_to_va").norm.running_mean.clone()
    losses, found = gradients(model, batch, micro_batch_size=3)
    assert losses[SENSES[name].loss] == 0
    assert not any(value.any() for key, value in found.items() if f".{name}." in key)
    assert torch.equal(before, model.get_submodule(f"heads.{name}_to_va").norm.running_mean)


def test_drop_token_draws_for_each_sense_by_its_name():
    batch, model = tiny.make_batch(0, senses=MORE), with_senses()
    (inputs,) = pretraining_inputs(model, batch, 3, drop_rate=0.5, seed=0)
    plain, small = tiny.make_batch(0), with_senses(senses=())
    (without,) = pretraining_inputs(small, plain, 3, drop_rate=0.5, seed=0)
    for name, kept in inputs.kept.items():
        tokens = num_tokens(SENSES[name].tokens(SENSES[name].section(model.params)))
        assert kept.shape == (tiny.BATCH_SIZE, tokens // 2)
        if name in without.kept:  # another sense changes no draw
            assert torch.equal(kept, without.kept[name])


def test_operations_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    from vatt.verify.counts import _every_token

    plain, more = (tiny.model_params(senses=senses) for senses in ((), MORE))
    counted = {}
    for params in (plain, more):
        with checkpoint.without_memory():
            model = checkpoint.build(params).eval()
        shapes = Sampling.for_pretraining(params, tiny.pretrain_params(text_candidates=1)).shapes()
        given = {name: torch.ones(1, *shapes[name][0], device="meta") for name in model.senses}
        given["text"] = given["text"].long()
        encoders = [getattr(model, name).encoder for name in model.senses]
        hooks = [e.register_forward_pre_hook(_every_token, with_kwargs=True) for e in encoders]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**given)
        for hook in hooks:
            hook.remove()
        counted[len(model.senses)] = counter.get_total_flops()
    assert counted[3] == multimodal_flops(plain, convention="true")
    assert counted[3 + len(MORE)] == multimodal_flops(more, convention="true")


# --- retrieval between every pair -----------------------------------------------------------------


def sensed(n=40):
    """Clips of which every sense sees the same vector, with noise; some lack a sense."""
    found = retrieval_clips(n, noise=0.3)
    generator = np.random.default_rng(1)
    for number, name in enumerate(MORE):
        for space in ("va", "vt"):
            clean = found.arrays["video"]
            found.arrays[f"{name}_{space}"] = clean + 0.3 * generator.normal(size=clean.shape)
        found.arrays[f"has_{name}"] = np.arange(n) % (number + 3) > 0
    found.arrays["audio_vt"] = found.arrays["audio_va"]
    return found


def directions(names):
    return {f"{a}_to_{b}" for a, b in itertools.permutations(names, 2)}


def plain(searches):
    return {name for name in searches if not name.endswith("_averaged")}


def test_every_sense_is_compared_with_video_and_with_every_pair_each_with_each():
    found = sensed()
    trained = similarities(found, pool=30, caption_queries="averaged")
    others = [name for name in SENSES if name != "video" and f"has_{name}" in found.arrays]
    assert plain(trained) == set().union(*(directions(("video", name)) for name in others))
    every = similarities(found, pool=30, caption_queries="averaged", every_pair=True)
    assert plain(every) == directions(["video", *others])
    for name in trained:
        np.testing.assert_array_equal(trained[name].table, every[name].table)


def test_a_pair_is_searched_among_the_clips_that_have_both():
    found = sensed()
    every = similarities(found, pool=999, caption_queries="averaged", every_pair=True)
    has = {name: found.arrays[f"has_{name}"] for name in ("audio", *MORE)}
    search = every["motion_to_audio"]
    assert len(search.clips.clip_ids) == (has["motion"] & has["audio"]).sum()
    rows = [int(name.split("-")[1]) for name in search.clips.clip_ids]
    one, other = (found.arrays[f"{name}_va"][rows, 0] for name in ("motion", "audio"))
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (one, other)]
    np.testing.assert_allclose(search.table, unit[0] @ unit[1].T)
    text = every["motion_to_text"]  # in vt, where the video's head has led it
    rows = [int(name.split("-")[1]) for name in text.clips.clip_ids]
    one = found.arrays["motion_vt"][rows, 0]
    other = np.stack([found.arrays["text_vt"][row][found.has_text[row]].mean(0) for row in rows])
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (one, other)]
    np.testing.assert_allclose(text.table, unit[0] @ unit[1].T)


def test_motion_reaches_text_by_the_videos_own_head():
    model = with_senses().eval()
    features = model.encode(motion=torch.randn(2, *tiny.SHAPES["motion"]))
    va = model.heads.into(SENSES["motion"], features["motion"])
    expected = torch.nn.functional.normalize(model.heads.va_to_vt(va), dim=-1)
    torch.testing.assert_close(model.project(features, bridged=True).vt["motion"], expected)
    assert model.project(features).vt == {}  # in training, it would move the video's statistics


def test_what_lists_clips_and_writes_shards_imports_no_torch():
    code = (
        "import sys, vatt.data.sources.choice, vatt.data.sharding.writer; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
