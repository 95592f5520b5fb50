"""Stage evaluate: checkpoints + test clips -> metrics with intervals, arrays for the report."""

import sys
from contextlib import ExitStack
from pathlib import Path

from vatt.config import load_params
from vatt.evaluation.classification import choose
from vatt.evaluation.evaluate import EvaluationRequest, encode, measure, save_results, tracked
from vatt.evaluation.features import ProcessShare
from vatt.process import run_stage
from vatt.progress import progress
from vatt.tracking import mlflow
from vatt.tracking.provenance import data_hash, stage_hash
from vatt.training import distributed

FEATURE_CACHE = Path("runs/feature-cache")  # by checkpoint and data; safe to delete


def main() -> None:
    """Measure retrieval, probes and accuracy; all processes encode, the first measures."""
    params = load_params()
    paths, machine = params.paths, params.machine
    checkpoints = choose(paths, params.finetune)
    if (code := distributed.launch("stages.evaluate", machine)) is not None:
        sys.exit(code)
    made_from, data = stage_hash("evaluate", params), data_hash(paths.shards)
    request = EvaluationRequest(
        params.evaluate, checkpoints, params.finetune, paths.shards, machine, params.seed
    )
    with ExitStack() as processes:
        processes.enter_context(distributed.process_group(machine))
        share = ProcessShare(distributed.rank(), distributed.world_size(),
                      distributed.to_rank_0, distributed.from_rank_0)  # fmt: skip
        with mlflow.run("evaluate", params, stage_hash=made_from, data_hash=data) as run:
            with progress("evaluate", "clips", shown=share.rank == 0) as tick:
                outputs = encode(request, cache=FEATURE_CACHE, progress=tick, share=share)
            processes.close()  # only the first one measures
            if outputs is not None:
                with progress("probes", "classifiers") as tick:
                    metrics, arrays = measure(outputs, request, progress=tick)
                run.log(0, tracked(metrics, outputs))
                file = paths.metrics / "evaluate.json"
                save_results(metrics, arrays, file=file, folder=paths.evaluation)
                run.artifacts(paths.evaluation, file)


if __name__ == "__main__":
    run_stage("evaluate", main)
