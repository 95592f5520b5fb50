"""What each of several processes does in test_many_processes.py; started by `launch`.

Rank 0 leaves what it found in the file that VATT_TEST_RESULTS names.
"""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from tests.training import evaluating, tiny
from vatt.training import distributed
from vatt.training.engine import DeepSpeedEngine
from vatt.training.loop import seed_dropout
from vatt.training.pretrain import Pretraining, pretraining_inputs

STEPS = 20
LEARNING_RATE = 1e-3
OPTIMIZER = tiny.pretrain_params(optimizer={"clip_norm": 5.0}).optimizer
TEXTLESS = range(4, 8)  # the whole part of rank 1
CASES = [  # ZeRO stage, backbone, micro-batch size
    (0, "specific", 1),
    (1, "specific", None),
    (2, "specific", 1),
    (3, "specific", None),
    (3, "specific", 1),
    (1, "agnostic", 1),
    (3, "agnostic", 1),
]


def main() -> None:
    machine = tiny.machine_params()
    results: dict[object, object] = {}
    with distributed.process_group(machine):
        results["gather"] = gathered()
        folder = Path(os.environ["VATT_TEST_RESULTS"]).parent
        results["evaluated"] = [
            evaluating.trained(folder / str(every), evaluate_every=every) for every in (2, None)
        ]
        for zero, backbone, micro in CASES:
            results[zero, backbone, micro] = trained(zero, backbone, micro)
        if distributed.rank() == 0:
            torch.save(results, Path(os.environ["VATT_TEST_RESULTS"]))
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


def trained(zero: int, backbone: str, micro: int | None) -> tuple[list[tuple[float, float]], dict]:
    """Losses, norms and weights of STEPS updates."""
    machine = tiny.machine_params(zero_stage=zero)
    params = tiny.pretrain_params()
    model = tiny.make_model(tiny.model_params(backbone=backbone))
    module = Pretraining(model, params, micro_batch_size=micro)
    engine = DeepSpeedEngine(module, OPTIMIZER, "fp32", machine)
    history = []
    for step in range(STEPS):
        batch = tiny.make_batch(step, textless=TEXTLESS)
        own = tiny.part_of(batch, distributed.rank(), distributed.world_size())
        seed_dropout(0, step)
        losses = engine(*pretraining_inputs(model, own, step, drop_rate=0.5, seed=0))
        norm = engine.update(losses["loss"], learning_rate=LEARNING_RATE)
        history.append((losses["loss"].item(), norm))
    return history, engine.weights()


if __name__ == "__main__":
    main()
