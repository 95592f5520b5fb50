"""Stage evaluate: checkpoints + test clips -> metrics with intervals, arrays for the report."""

from pathlib import Path

from vatt.config import load_params
from vatt.evaluation.evaluate import evaluate, flatten, save_results
from vatt.outcome import run_stage
from vatt.progress import progress
from vatt.provenance import data_hash, stage_hash
from vatt.training import tracking

FEATURE_CACHE = Path("runs/feature-cache")  # by checkpoint and data; safe to delete


def main() -> None:
    """Measure retrieval, probes and fine-tuned accuracy on the test split."""
    params = load_params()
    paths = params.paths
    made_from, data = stage_hash("evaluate", params), data_hash(paths.shards)
    with (
        tracking.run("evaluate", params, stage_hash=made_from, data_hash=data) as run,
        progress("evaluate", "clips") as tick,
    ):
        metrics, arrays = evaluate(
            params.evaluate,
            pretrained=paths.pretrained,
            finetuned=paths.finetuned,
            finetune=params.finetune,
            pretrain=params.pretrain,
            shards=paths.shards,
            cache=FEATURE_CACHE,
            machine=params.machine,
            seed=params.seed,
            progress=tick,
        )
        run.log(0, flatten(metrics))
        save_results(metrics, arrays, file=paths.metrics / "evaluate.json", folder=paths.evaluation)
        run.artifact(paths.evaluation)


if __name__ == "__main__":
    run_stage("evaluate", main)
