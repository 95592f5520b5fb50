"""A tiny pre-training that tests kill; started as a process of its own.

In VATT_TEST_FOLDER it keeps `state`, appends to `losses`, leaves the final weights' hash in
`result`. VATT_TEST_SLEEP makes a step last longer, VATT_TEST_DEEPSPEED chooses that engine,
VATT_TEST_PROCESSES starts several, VATT_TEST_DROPOUT sets its rate.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from tests.training import tiny
from vatt.data.loading.batches import Batch
from vatt.errors import VattError
from vatt.training import distributed
from vatt.training.distributed import launch
from vatt.training.engine import EngineMaker, make_engine
from vatt.training.loop import Training
from vatt.training.pretrain import pretrain

STEPS = 24


FOLDER = Path(os.environ["VATT_TEST_FOLDER"])
MACHINE = tiny.machine_params(processes=int(os.environ.get("VATT_TEST_PROCESSES", "1")))


def main() -> None:
    if (code := launch("tests.training.victim", MACHINE)) is not None:
        sys.exit(code)
    try:
        if "VATT_TEST_DEEPSPEED" in os.environ:
            with distributed.process_group(MACHINE):
                train(make_engine)
        else:
            train(tiny.local)
    except VattError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


def train(engine_of: EngineMaker) -> None:
    dropout = float(os.environ.get("VATT_TEST_DROPOUT", "0.1"))
    model = tiny.make_model(tiny.model_params(dropout=dropout))
    states = FOLDER / "state"
    training = Training(batches_from, MACHINE, 0, states, "none", ToFiles(), engine_of=engine_of)
    pretrain(model, tiny.pretrain_params(steps=STEPS, save_every=3), training)


def batches_from(first_step: int) -> Iterator[Batch]:
    for step in itertools.count(first_step):
        time.sleep(float(os.environ.get("VATT_TEST_SLEEP", "0")))
        batch = tiny.make_batch(step)
        yield tiny.part_of(batch, distributed.rank(), distributed.world_size())


class ToFiles(tiny.Recorder):
    """Leaves in files what another process looks at."""

    def report(self, step: int, metrics: dict[str, float]) -> None:
        with (FOLDER / "losses").open("a") as file:
            file.write(json.dumps([step, metrics["loss"], metrics["gradient_norm"]]) + "\n")

    def export(self, weights: dict[str, Tensor]) -> None:
        (FOLDER / "result").write_text(tiny.hash_of(weights))


if __name__ == "__main__":
    main()
