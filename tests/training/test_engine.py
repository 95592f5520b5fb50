"""The engines beyond what test_many_processes.py compares: settings, saving, offloading."""

import pytest
import torch

from tests.training import tiny
from vatt.errors import MachineError, SettingsError
from vatt.training.engine import DeepSpeedEngine, LocalEngine, apply_options, compiles

OPTIMIZER = tiny.pretrain_params().optimizer


class Regression(torch.nn.Module):
    """A layer whose loss needs nothing but numbers."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, inputs):
        return {"loss": self.layer(inputs).square().mean()}


def engine(**changes):
    torch.manual_seed(0)
    optimizer = OPTIMIZER.model_copy(update=changes)
    return LocalEngine(Regression(), optimizer, "fp32")


def step(one, number=0):
    torch.manual_seed(number)
    loss = one(torch.randn(4, 3))["loss"]
    return loss.item(), float(one.update(loss, learning_rate=0.1))


def test_the_norm_is_the_one_before_clipping():
    _, free = step(engine(clip_norm=None))
    _, clipped = step(engine(clip_norm=1e-3))
    assert free == pytest.approx(clipped) and free > 1e-3


def test_clipping_scales_the_gradient_to_the_given_norm():
    one, other = engine(clip_norm=1e-3, name="sgd"), engine(clip_norm=None, name="sgd")
    before = other.weights()["layer.weight"].clone()
    _, norm = step(one)
    step(other)
    moves = [e.weights()["layer.weight"] - before for e in (one, other)]
    torch.testing.assert_close(moves[0], moves[1] * 1e-3 / norm, rtol=1e-2, atol=1e-8)


def test_a_loaded_engine_goes_on_bit_for_bit(tmp_path):
    calm, saved = engine(), engine()
    for number in range(3):
        step(calm, number), step(saved, number)
    saved.save(tmp_path)
    resumed = engine()
    resumed.load(tmp_path)
    assert [step(calm, n) for n in range(3, 6)] == [step(resumed, n) for n in range(3, 6)]


@pytest.mark.parametrize(("offload", "zero"), [("optimizer", 0), ("all", 2)])
def test_offloading_without_its_zero_stage_is_refused(offload, zero):
    machine = tiny.machine_params(offload=offload, zero_stage=zero)
    with pytest.raises(SettingsError, match=r"machine\.offload"):
        DeepSpeedEngine(Regression(), OPTIMIZER, "fp32", machine)


def test_compiling_says_what_it_needs(monkeypatch):
    with pytest.raises(SettingsError, match="zero_stage 3"):
        apply_options(Regression(), tiny.machine_params(compile=True, zero_stage=3))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MachineError, match=r"no-such-compiler\n.*machine\.compile=false"):
        apply_options(Regression(), tiny.machine_params(compile=True))


def test_compile_auto_is_on_for_gpus_with_a_compiler_below_zero_stage_3(monkeypatch):
    def auto(*, gpu=True, compiler="sh", zero_stage=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setenv("CC", compiler)
        return compiles(tiny.machine_params(compile="auto", zero_stage=zero_stage))

    assert auto() and not auto(gpu=False)
    assert not auto(compiler="no-such-compiler")
    assert not auto(zero_stage=3)
