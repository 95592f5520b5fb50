"""An engine proves in its first step that it computes in the precision of the settings."""

import pytest
import torch

from tests.training import tiny
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
    assert set(engine.facts.values()) == {"fp32"}


def test_compiled_and_checkpointed_blocks_are_looked_at_too():
    training = module()
    apply_options(training, tiny.machine_params(activation_checkpointing=True))
    for compiled in (False, True):
        proven = ProvenPrecision(training, "bf16", compiled=compiled)
        proven(*inputs(training))["loss"].backward()
        assert {proven.facts[f"precision.encoder.{tower}"] for tower in TOWERS} == {"bf16"}
        assert proven.facts["precision.norms"] == "fp32"


def test_a_classifier_is_proven_as_well():
    task = tiny.DEMO.finetune.tasks["action"].model_copy(update={"label": "digit"})
    model = tiny.make_classifier("video")
    engine = LocalEngine(Finetuning(model, task), task.optimizer, "bf16")
    classes = ["0", "1", "2"]
    engine(*finetuning_inputs(model, tiny.make_batch(0), 0, params=task, classes=classes, seed=0))
    assert engine.facts["precision.encoder.backbone"] == "bf16"
    assert engine.facts["precision.classifier"] == "bf16"
    assert engine.facts["precision.loss"] == "fp32"
