"""What each of several processes does in test_many_processes.py, which starts it.

Rank 0 leaves what it found in the folder that VATT_TEST_RESULTS names. VATT_TEST_CASES chooses
which engines are tried; VATT_TEST_START holds states to go on from, by backbone.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from tests.plan.test_micro_batch import small
from tests.training import evaluating, tiny
from vatt.data.loading.batches import Batch
from vatt.model import operators
from vatt.model.vatt import VATT
from vatt.plan.trial import Job, chosen
from vatt.training import distributed
from vatt.training.distributed import read_shares
from vatt.training.engine import DeepSpeedEngine, Engine, make_engine
from vatt.training.loop import seed_dropout
from vatt.training.pretrain import Pretraining, pretraining_inputs

STEPS, RESUMED_STEPS = 20, 5
LEARNING_RATE = 1e-3
OPTIMIZER = tiny.pretrain_params(optimizer={"clip_norm": 5.0}).optimizer
BACKBONES = ("specific", "agnostic", "experts")  # the last: agnostic, with experts
WEIGHTINGS = {kind: {"kind": kind, "least": 0.5, "warmup_steps": 0} for kind in ("drop", "weight")}
TEXTLESS = (range(0), range(4, 8), range(8))  # none; the whole part of the last ranks; all
Case = tuple[int, str, bool]  # ZeRO stage, backbone, whether gradients are cached
CASES: dict[str, list[Case]] = {
    "all": [
        (zero, name, cached) for zero in range(4) for name in BACKBONES for cached in (False, True)
    ],
    "quick": [
        (0, "agnostic", True),
        (1, "specific", False),
        (2, "specific", True),
        (0, "experts", False),
        (2, "experts", True),
    ],
    "one": [(3, "agnostic", True), (3, "experts", True)],
}
CASES["quick"] += CASES["one"]
FEWER_TOKENS: dict[str, Any] = {"depth": 3, "drop_by": "content", "merge_rate": 0.25}
FIVE_SENSES: dict[str, Any] = {"senses": ("motion", "depth"), "drop_by": "content"}
EXACT: dict[str, dict[str, Any]] = {
    "exact": {},
    "fewer tokens": FEWER_TOKENS,
    "five senses": FIVE_SENSES,
    **{kind: {"text_weighting": setting} for kind, setting in WEIGHTINGS.items()},
}
OPTIONS: dict[str, dict[str, Any]] = {  # settings of `machine`
    "checkpointed": {"activation_checkpointing": True, "zero_stage": 3},
    "optimizer offloaded": {"offload": "optimizer", "zero_stage": 2},
    "all offloaded": {"offload": "all", "zero_stage": 3},
}
COMPILED = {"compiled, checkpointed": {"compile": True, "activation_checkpointing": True}}


def main() -> None:
    folder = Path(os.environ["VATT_TEST_RESULTS"])
    results: dict[object, object] = {}
    with distributed.process_group(tiny.machine_params()):
        results["gather"] = gathered()
        if os.environ["VATT_TEST_CASES"] == "quick":
            results["evaluated"] = [
                evaluating.trained(folder / f"every-{every}", evaluate_every=every)
                for every in (2, None)
            ]
            job = Job(small(), folder / "chosen")
            machine, kept = chosen(job)
            results["chosen"] = distributed.from_all((machine.micro_batch_size, kept))
            results["spoiled"] = [spoiled(zero) for zero in range(4)]
            results["bf16"] = [in_bf16(zero) for zero in range(4)]
        results["types as on a GPU"] = [types_as_on_a_gpu(zero) for zero in range(4)]
        for kind, changes in exact_of(os.environ["VATT_TEST_CASES"]).items():
            for backbone in BACKBONES:
                results[kind, backbone] = exact_gradients(backbone, **changes)
        for number, case in enumerate(CASES[os.environ["VATT_TEST_CASES"]]):
            results[case] = trained(*case, folder / str(number))
        for name, options in options_of(os.environ["VATT_TEST_CASES"]).items():
            results[name] = tried(options)
        if distributed.rank() == 0:
            torch.save(results, folder / "results.pt")
    sys.exit(int(os.environ.get("VATT_TEST_EXIT", "0")))


def gathered() -> tuple[Tensor, Tensor]:
    """The gather of ranks' rows, and the gradient of a sum that weighs them differently."""
    rank, processes = distributed.rank(), distributed.world_size()
    part = (torch.arange(6.0).view(2, 3) + 10 * rank).requires_grad_()
    whole = distributed.gather(part)
    weights = torch.arange(6.0 * processes).view(3, 2 * processes)
    # The transposition makes the incoming gradient non-contiguous.
    (whole.T * weights).sum().backward()
    assert part.grad is not None
    return whole.detach(), distributed.gather(part.grad)


class Root(torch.nn.Module):
    """A finite loss whose gradient is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def forward(self) -> dict[str, Tensor]:
        """The slope of a square root at zero."""
        return {"loss": self.weight.sum().sqrt()}


def spoiled(zero: int) -> tuple[float, float]:
    """The loss, and the norm of a gradient that is not finite."""
    engine = DeepSpeedEngine(Root(), OPTIMIZER, "fp32", tiny.machine_params(zero_stage=zero))
    loss = engine()["loss"]
    return loss.item(), float(engine.update(loss, learning_rate=LEARNING_RATE))


def in_bf16(zero: int) -> tuple[float, float]:
    """Loss and norm of an update whose linear layers all cast their weights twice."""
    model = tiny.make_model(tiny.model_params(backbone="agnostic"))
    module = Pretraining(model, tiny.pretrain_params(), micro_batch_size=1)
    engine = DeepSpeedEngine(module, OPTIMIZER, "bf16", tiny.machine_params(zero_stage=zero))
    with patch.object(operators, "_WORTH_IT", 0):
        return update(engine, model, 0)


class TorchOnGpu:
    """torch, which answers a question about autocast that names no device as it does on a GPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def is_autocast_enabled(device: str = "cpu") -> bool:
        """For the device that trains here; torch itself would answer for a GPU."""
        return torch.is_autocast_enabled(device)


def types_as_on_a_gpu(zero: int) -> list[str]:
    """The types of the encoders' linear layers, in bf16, where DeepSpeed sees any autocast."""
    model = tiny.make_model(tiny.model_params())
    module = Pretraining(model, tiny.pretrain_params())
    engine = DeepSpeedEngine(module, OPTIMIZER, "bf16", tiny.machine_params(zero_stage=zero))
    seen = set()
    for tower in (model.video, model.audio, model.text):
        for layer in tower.modules():
            if isinstance(layer, operators.Linear):
                layer.register_forward_hook(lambda *call: seen.add(str(call[-1].dtype)))
    with patch.object(sys.modules["deepspeed.runtime.torch_autocast"], "torch", TorchOnGpu()):
        update(engine, model, 0)
    return sorted(seen)


def model_of(backbone: str, depth: int = 1, senses: Sequence[str] = ()) -> VATT:
    """The model that is trained."""
    if backbone == "experts":
        experts = {"number": 4, "top_k": 2, "capacity": 0.8}
        params = tiny.model_params(backbone="agnostic", depth=depth, experts=experts, senses=senses)
        return tiny.make_model(params)
    return tiny.make_model(tiny.model_params(backbone=backbone, depth=depth, senses=senses))


def batch_of(step: int, senses: Sequence[str] = ()) -> Batch:
    """A step's global batch."""
    return tiny.make_batch(step, textless=TEXTLESS[step % len(TEXTLESS)], senses=senses)


def exact_gradients(
    backbone: str,
    micro_batch_size: int | None = 1,
    *,
    depth: int = 1,
    senses: Sequence[str] = (),
    **changes: Any,
) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Losses and gradients of a few batches in fp64 and plain torch, averaged over processes."""
    model = model_of(backbone, depth, senses).double()
    params = tiny.pretrain_params(**changes)
    module = Pretraining(model, params, micro_batch_size=micro_batch_size)
    found = []
    for step in range(len(TEXTLESS)):
        own = tiny.part_of(batch_of(step, senses), distributed.rank(), distributed.world_size())
        drawn = params.random_share
        inputs = pretraining_inputs(model, own, step, drop_rate=0.5, seed=0, random_share=drawn)
        module.zero_grad()
        losses = module(*inputs, weighs_text=params.text_weighting is not None)
        losses["loss"].backward()
        gradients = {name: weight.grad.clone() for name, weight in module.named_parameters()}
        for gradient in gradients.values():
            if distributed.world_size() > 1:
                dist.all_reduce(gradient)
                gradient /= distributed.world_size()
        found.append(({name: value.detach() for name, value in losses.items()}, gradients))
    return found


def trained(zero: int, backbone: str, cached: bool, folder: Path) -> dict[str, object]:
    """What `follow` notes of STEPS updates."""
    micro = max(1, tiny.BATCH_SIZE // distributed.world_size() // 2) if cached else None
    params = tiny.pretrain_params()
    model = model_of(backbone)
    module = Pretraining(model, params, micro_batch_size=micro)
    engine = DeepSpeedEngine(module, OPTIMIZER, "fp32", tiny.machine_params(zero_stage=zero))
    found = follow(engine, model, folder)
    engine.load(Path(os.environ["VATT_TEST_START"]) / backbone / state_name(len(TEXTLESS)))
    steps = range(len(TEXTLESS), len(TEXTLESS) + RESUMED_STEPS)
    return found | {"resumed": [update(engine, model, step) for step in steps]}


def exact_of(cases: str) -> dict[str, dict[str, Any]]:
    """The settings whose gradients are computed in fp64."""
    return {"exact": EXACT["exact"]} if cases == "one" else EXACT


def options_of(cases: str) -> dict[str, dict[str, Any]]:
    """What of `machine` is tried with these cases; compiling takes long."""
    return {"one": {}, "quick": OPTIONS, "all": OPTIONS | COMPILED}[cases]


def tried(options: dict[str, Any]) -> list[tuple[float, float]]:
    """Losses and norms of a few updates, with settings of `machine`."""
    micro = max(1, tiny.BATCH_SIZE // distributed.world_size() // 2)
    machine = tiny.machine_params(micro_batch_size=micro, **options)
    model = tiny.make_model(tiny.model_params())
    module = Pretraining(model, tiny.pretrain_params(), micro_batch_size=micro)
    engine = make_engine(module, OPTIMIZER, "fp32", machine)
    return [update(engine, model, step) for step in range(RESUMED_STEPS)]


def state_name(updates: int) -> str:
    """The folder of a state after so many updates."""
    return f"after-{updates}"


def follow(engine: Engine, model: torch.nn.Module, folder: Path) -> dict[str, object]:
    """Losses, norms, the mean gradients of the first steps (Adam's first moments), weights."""
    history, moments = [], []
    for step in range(STEPS):
        history.append(update(engine, model, step))
        if step < len(TEXTLESS):
            moments.append(first_moments(engine, folder / state_name(step + 1)))
    return {"history": history, "moments": moments, "weights": engine.weights()}


def update(engine: Engine, model: torch.nn.Module, step: int) -> tuple[float, float]:
    """Make a step's update; its loss and gradient norm."""
    own = tiny.part_of(batch_of(step), distributed.rank(), distributed.world_size())
    seed_dropout(0, step)
    losses = engine(*pretraining_inputs(model, own, step, drop_rate=0.5, seed=0))
    norm = engine.update(losses["loss"], learning_rate=LEARNING_RATE)
    return losses["loss"].item(), float(norm)


def first_moments(engine: Engine, folder: Path) -> dict[str, Tensor]:
    """Adam's running mean of each gradient, as a state holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    engine.save(folder)
    distributed.barrier()
    _, entries = read_shares(folder)
    return {name: entry["exp_avg"] for name, entry in entries.items() if "exp_avg" in entry}


if __name__ == "__main__":
    main()
