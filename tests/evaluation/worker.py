"""One process of an evaluation; tests start several of it."""

import os
from pathlib import Path

from tests.evaluation.project import measure, settings
from vatt.evaluation.evaluate import save_results
from vatt.evaluation.features import ProcessShare
from vatt.training import distributed


def main() -> None:
    """Evaluate the project named in the environment, and save what the first process found."""
    project, out = Path(os.environ["VATT_TEST_PROJECT"]), Path(os.environ["VATT_TEST_OUT"])
    machine = settings().machine.model_copy(update={"threads": 1})
    with distributed.process_group(machine):
        share = ProcessShare(
            distributed.rank(),
            distributed.world_size(),
            distributed.to_rank_0,
            distributed.from_rank_0,
        )
        found = measure(
            project, cache=out / "cache", workers=int(os.environ["VATT_TEST_WORKERS"]), share=share
        )
        if found is not None:
            save_results(*found, file=out / "evaluate.json", folder=out / "arrays")


if __name__ == "__main__":
    main()
