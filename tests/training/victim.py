"""A tiny pre-training or fine-tuning that tests kill; started as a process of its own.

Arguments: the state folder, the file for the losses, the file for the final weights' hash.
VATT_TEST_SLEEP makes a step last longer, VATT_TEST_DEEPSPEED chooses that engine.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.training import tiny
from vatt.data.batches import Batch
from vatt.errors import VattError
from vatt.training import distributed
from vatt.training.engine import LocalEngine, make_engine
from vatt.training.pretrain import pretrain

STEPS = 24


def main() -> None:
    state, losses, result = map(Path, sys.argv[1:4])
    pause = float(os.environ.get("VATT_TEST_SLEEP", "0"))
    machine = tiny.machine_params()

    def batches_from(first_step: int) -> Iterator[Batch]:
        for step in itertools.count(first_step):
            time.sleep(pause)
            batch = tiny.make_batch(step)
            yield tiny.part_of(batch, distributed.rank(), distributed.world_size())

    def report(step: int, metrics: dict[str, float]) -> None:
        with losses.open("a") as file:
            file.write(json.dumps([step, metrics["loss"], metrics["gradient_norm"]]) + "\n")

    def train() -> None:
        pretrain(
            tiny.make_model(tiny.model_params(dropout=0.1)),
            batches_from,
            tiny.pretrain_params(steps=STEPS, save_every=3),
            machine=machine,
            seed=0,
            state=state,
            data_hash="none",
            report=report,
            export=lambda weights: result.write_text(tiny.hash_of(weights)),
            engine_of=make_engine if "VATT_TEST_DEEPSPEED" in os.environ else local,
        )

    try:
        if "VATT_TEST_DEEPSPEED" in os.environ:
            with distributed.process_group(machine):
                train()
        else:
            train()
    except VattError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


def local(module, optimizer, precision, machine):  # type: ignore[no-untyped-def]
    return LocalEngine(module, optimizer, precision)


if __name__ == "__main__":
    main()
