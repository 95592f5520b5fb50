"""An engine proves in its first step that it computes in the precision of the settings."""

import subprocess
import sys

import pytest
import torch

from tests.test_architecture import ROOT
from tests.training import tiny
from vatt.config import ModelParams
from vatt.errors import MachineError
from vatt.training.engine import LocalEngine, ProvenPrecision, apply_options
from vatt.training.finetune import Finetuning, finetuning_inputs
from vatt.training.pretrain import Pretraining, pretraining_inputs

OPTIMIZER = tiny.pretrain_params().optimizer
TOWERS = ("video", "audio", "text")


class Careless(Pretraining):
    """Loses autocast on the way to the encoders, as a wrapper might."""

    def _encode(self, *inputs):
        with torch.autocast("cpu", enabled=False):
            return super()._encode(*inputs)


def module(kind=Pretraining, *, backbone="specific", recipe="paper", **more):
    params = tiny.model_params(backbone=backbone).model_copy(update={"recipe": recipe})
    return kind(tiny.make_model(params), tiny.pretrain_params(), **more)


def inputs(pretraining):
    batch = tiny.make_batch(0)
    return pretraining_inputs(pretraining.model, batch, 0, drop_rate=0.5, seed=0)


def hooks(parts):
    return [hook for part in parts.modules() for hook in part._forward_hooks]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backbone", ["specific", "agnostic"])
@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_each_tower_is_in_the_precision_and_everything_else_in_fp32(recipe, backbone, precision):
    training = module(recipe=recipe, backbone=backbone, micro_batch_size=3)
    engine = LocalEngine(training, OPTIMIZER, precision)
    assert engine.facts == {}
    engine(*inputs(training))
    assert engine.facts.pop("attention.kernel")
    assert engine.facts == {
        **{f"precision.encoder.{tower}": precision for tower in TOWERS},
        **{f"precision.{part}": "fp32" for part in ("heads", "loss", "norms", "weights")},
    }
    assert not hooks(training)


def test_a_lost_precision_stops_the_training_and_names_the_tower():
    engine = LocalEngine(module(Careless), OPTIMIZER, "bf16")
    message = r"precision\.encoder\.audio should be bf16 at precision bf16, but is fp32"
    with pytest.raises(MachineError, match=message):
        engine(*inputs(engine.module))
    assert not hooks(engine.module)


def test_an_autocast_around_fp32_does_not_reach_it():
    engine = LocalEngine(module(), OPTIMIZER, "fp32")
    with torch.autocast("cpu", torch.bfloat16):
        engine(*inputs(engine.module))
    kinds = {fact for name, fact in engine.facts.items() if name.startswith("precision.")}
    assert kinds == {"fp32"}


def test_compiled_and_checkpointed_blocks_are_looked_at_too():
    training = module()
    apply_options(training, tiny.machine_params(activation_checkpointing=True))
    for compiled in (False, True):
        proven = ProvenPrecision(training, "bf16", compiled=compiled)
        proven(*inputs(training))["loss"].backward()
        assert {proven.facts[f"precision.encoder.{tower}"] for tower in TOWERS} == {"bf16"}
        assert proven.facts["precision.norms"] == "fp32"


@pytest.mark.parametrize("compiled", [False, True])
def test_blocks_with_experts_are_looked_at_as_well(compiled):
    model = tiny.make_model(tiny.model_params(backbone="agnostic", experts={"number": 4}))
    training = Pretraining(model, tiny.pretrain_params(), micro_batch_size=3)
    apply_options(training, tiny.machine_params(activation_checkpointing=True))
    proven = ProvenPrecision(training, "bf16", compiled=compiled)
    proven(*inputs(training))["loss"].backward()
    assert {proven.facts[f"precision.encoder.{tower}"] for tower in TOWERS} == {"bf16"}
    assert proven.facts["precision.loss"] == "fp32"


def test_the_kernels_of_attention_are_named_with_their_towers(monkeypatch):
    def kernels(training):
        engine = LocalEngine(training, OPTIMIZER, "bf16")
        engine(*inputs(training))
        return engine.facts["attention.kernel"]

    # Ours in bf16, but for masked words and for the one query of the last block.
    deep = tiny.model_params().model_dump()
    for tower in TOWERS:
        deep[tower]["size"]["depth"] = 2
    model = tiny.make_model(ModelParams.model_validate(deep))
    found = kernels(Pretraining(model, tiny.pretrain_params()))
    assert "chunked (audio, video)" in found and "flash (audio, text, video)" in found
    # With sdpa_kernel, torch's choice is another one, and the name follows.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert "math (audio, text, video)" in kernels(module())


def test_naming_the_kernels_prints_nothing():
    code = "import tests.training.test_precision as here; m = here.module(); "
    code += "here.LocalEngine(m, here.OPTIMIZER, 'fp32')(*here.inputs(m))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_classifier_is_proven_as_well():
    task = tiny.DEMO.finetune.tasks["action"].model_copy(update={"label": "digit"})
    model = tiny.make_classifier("video")
    engine = LocalEngine(Finetuning(model, task), task.optimizer, "bf16")
    classes = ["0", "1", "2"]
    engine(*finetuning_inputs(model, tiny.make_batch(0), 0, params=task, classes=classes, seed=0))
    assert engine.facts["precision.encoder.backbone"] == "bf16"
    assert engine.facts["precision.classifier"] == "bf16"
    assert engine.facts["precision.loss"] == "fp32"
