"""Micro-batches give the gradient of the whole batch."""

import pytest
import torch

from tests.training import tiny
from vatt.training.gradient_cache import micro_batch_sizes
from vatt.training.loop import seed_dropout
from vatt.training.pretrain import Pretraining, pretraining_inputs


def double(params):
    """A model that computes in fp64."""
    return tiny.make_model(params).double()


def gradients(
    model, batch, *, micro_batch_size, drop_rate=0.5, kept=1, precision=None, weighting=None
):
    params = tiny.pretrain_params(text_weighting=weighting)
    module = Pretraining(
        model, params, micro_batch_size=micro_batch_size, kept_micro_batches=kept
    ).train()
    inputs = pretraining_inputs(model, batch, 3, drop_rate=drop_rate, seed=0)
    seed_dropout(0, 3)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        losses = module(*inputs, weighs_text=weighting is not None)
    losses["loss"].backward()
    return losses, {name: weight.grad for name, weight in module.named_parameters()}


@pytest.mark.parametrize("backbone", ["specific", "agnostic"])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
@pytest.mark.parametrize("textless", [range(0), range(1, 3), range(8)], ids=["all", "some", "none"])
def test_gradients_equal_the_whole_batch_s(backbone, micro_batch_size, textless):
    batch = tiny.make_batch(0, textless=textless)
    model = double(tiny.model_params(backbone=backbone))
    whole_losses, whole = gradients(model, batch, micro_batch_size=None)
    running = {name: value.clone() for name, value in model.named_buffers()}
    again = double(tiny.model_params(backbone=backbone))
    losses, found = gradients(again, batch, micro_batch_size=micro_batch_size)
    for name, value in losses.items():
        torch.testing.assert_close(value, whole_losses[name], rtol=1e-6, atol=1e-9)
    for name, value in found.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-6, atol=1e-9, msg=name)
    for name, value in again.named_buffers():
        torch.testing.assert_close(value, running[name], rtol=1e-6, atol=1e-9, msg=name)


EXPERTS = {
    "dropless": {"number": 4},
    "capacity": {"number": 4, "top_k": 2, "capacity": 0.6, "least_experts": 3.9},
}


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("backbone", ["specific", "agnostic"])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_gradients_with_experts_equal_the_whole_batch_s(micro_batch_size, backbone, experts):
    params = tiny.model_params(backbone=backbone, experts=EXPERTS[experts])
    batch = tiny.make_batch(0)
    whole_losses, whole = gradients(double(params), batch, micro_batch_size=None)
    losses, found = gradients(double(params), batch, micro_batch_size=micro_batch_size)
    assert losses["experts.loss"].item() > 0
    assert (losses["experts.dropped"] > 0) == (experts == "capacity")
    for name, value in losses.items():
        torch.testing.assert_close(value, whole_losses[name], rtol=1e-6, atol=1e-9)
    for name, value in found.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-6, atol=1e-9, msg=name)
    assert all(found[name].abs().sum() > 0 for name in found if "router" in name)


def test_every_sense_has_its_own_routing():
    both = ("motion", "depth")
    params = tiny.model_params(backbone="agnostic", experts=EXPERTS["capacity"], senses=both)
    batch = tiny.make_batch(0, senses=both)
    whole, _ = gradients(double(params), batch, micro_batch_size=None)
    losses, _ = gradients(double(params), batch, micro_batch_size=3)
    used = {name for name in losses if name.startswith("experts.used.")}
    assert used == {f"experts.used.{name}" for name in ("video", "audio", "text", *both)}
    for name, value in losses.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kept_micro_batches_change_no_bit_with_experts(precision):
    found = []
    for kept in (0, 2, 4):
        model = tiny.make_model(tiny.model_params(dropout=0.3, experts=EXPERTS["capacity"]))
        size = {"micro_batch_size": 2, "kept": kept, "precision": precision}
        losses, weights = gradients(model, tiny.make_batch(0), **size)
        found.append(losses | weights)
    for other in found[1:]:
        assert all(torch.equal(value, found[0][name]) for name, value in other.items())


def test_what_a_clip_lacks_is_not_routed_in_the_losses():
    params = tiny.model_params(backbone="agnostic", experts=EXPERTS["dropless"])
    batch = tiny.make_batch(0)
    other = batch.mapped(torch.clone)
    other.audio[2] = 12345  # of a clip without sound
    results = [gradients(double(params), each, micro_batch_size=None)[0] for each in (batch, other)]
    assert torch.equal(results[0]["experts.loss"], results[1]["experts.loss"])
    other = batch.mapped(torch.clone)
    other.audio[3] = 12345
    changed, _ = gradients(double(params), other, micro_batch_size=None)
    assert not torch.equal(results[0]["experts.loss"], changed["experts.loss"])


@pytest.mark.parametrize("kind", ["drop", "weight"])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_candidates_are_weighted_over_the_whole_batch(kind, micro_batch_size):
    weighting = {"kind": kind, "least": 0.5, "warmup_steps": 0}
    found = []
    for size in (None, micro_batch_size):
        model = double(tiny.model_params())
        given = {"micro_batch_size": size, "weighting": weighting}
        losses, weights = gradients(model, tiny.make_batch(0), **given)
        found.append({**losses, **weights})
    assert 0 < found[0]["text_dropped_share"] < 1
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])  # torch's kernels differ; its state must be exact
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backbone", ["specific", "agnostic"])
def test_kept_micro_batches_change_no_bit(backbone, precision, dropout):
    batch, found = tiny.make_batch(0), []
    for kept in (0, 1, 2, 4):  # of four
        model = tiny.make_model(tiny.model_params(backbone=backbone, dropout=dropout))
        size = {"micro_batch_size": 2, "kept": kept, "precision": precision}
        losses, weights = gradients(model, batch, **size)
        drawn = torch.rand(1)  # what a later draw would be
        found.append({"drawn": drawn, **losses, **weights})
    for other in found[1:]:
        assert all(torch.equal(value, found[0][name]) for name, value in other.items())


@pytest.mark.parametrize(("clips", "parts"), [(8, 4), (7, 4), (3, 2)])
def test_each_kept_micro_batch_saves_one_of_the_second_passes(clips, parts):
    def passes(kept):
        model = tiny.make_model(tiny.model_params())
        seen = []
        model.video.register_forward_hook(lambda _, inputs, out: seen.append(len(out)))
        gradients(model, tiny.make_batch(0, size=clips), micro_batch_size=2, kept=kept)
        return seen

    for kept in range(parts + 2):
        again = max(0, parts - kept)
        assert len(passes(kept)) == parts + again
    assert sum(passes(0)) == 2 * clips and sum(passes(parts)) == clips


@pytest.mark.parametrize("most", range(1, 9))
@pytest.mark.parametrize("rows", range(1, 30))
def test_micro_batches_are_few_and_as_equal_as_they_can_be(rows, most):
    sizes = micro_batch_sizes(rows, most)
    assert sum(sizes) == rows and max(sizes) <= most and len(sizes) == -(-rows // most)
    assert sizes == sorted(sizes) and sizes[-1] - sizes[0] <= 1


def test_dropout_is_replayed_for_the_second_computation():
    # Were it drawn anew, the gradient would not be that of the loss: compare a small move.
    model = double(tiny.model_params(dropout=0.3))
    batch = tiny.make_batch(0)
    losses, found = gradients(model, batch, micro_batch_size=2)
    weight = model.video.encoder.norm.weight
    direction = found["model.video.encoder.norm.weight"].clone()
    with torch.no_grad():
        weight += 1e-4 * direction
    moved, _ = gradients(model, batch, micro_batch_size=2)
    slope = (moved["loss"] - losses["loss"]).item() / 1e-4
    assert slope == pytest.approx(direction.square().sum().item(), rel=0.02)


def test_fewer_activations_are_kept_than_for_the_whole_batch():
    def kept_bytes(micro_batch_size):
        model = tiny.make_model(tiny.model_params())
        module = Pretraining(model, tiny.pretrain_params(), micro_batch_size=micro_batch_size)
        inputs = pretraining_inputs(model, tiny.make_batch(0), 0, drop_rate=0.5, seed=0)
        held = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(*inputs)
        return sum(held.values())

    assert kept_bytes(2) < 0.5 * kept_bytes(None)
