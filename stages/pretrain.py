"""Stage pretrain: shards -> checkpoint."""

import sys

import torch

from vatt.checkpoint import build, trained_on
from vatt.config import load_params
from vatt.data.clips.samples import check_clips, stages_to_come
from vatt.data.loading.batches import Sampling
from vatt.process import run_stage
from vatt.progress import progress
from vatt.tracking import mlflow
from vatt.tracking.provenance import data_hash, stage_hash
from vatt.tracking.session import Outputs, Session, feed
from vatt.training import distributed
from vatt.training.loop import Training
from vatt.training.pretrain import pretrain


def main() -> None:
    """Pre-train in as many processes as `machine` says."""
    from vatt.evaluation.retrieval import SCORE, validation  # changes no weight: no dependency
    from vatt.plan.trial import Job, chosen  # the same

    params = load_params()
    paths, machine, settings, seed = params.paths, params.machine, params.pretrain, params.seed
    check_clips(params, stages_to_come())
    if (code := distributed.launch("stages.pretrain", machine)) is not None:
        sys.exit(code)
    made_from, data = stage_hash("pretrain", params), data_hash(paths.shards)
    sampling, state = Sampling.for_pretraining(params.model, settings), paths.pretrain_state
    batches = feed(paths.shards, sampling, settings, seed=seed, machine=machine)
    metrics, words = paths.metrics / "pretrain.json", paths.shards / "vocabulary.txt"
    outputs = Outputs(params.model, paths.pretrained, metrics, words, trained_on(params))
    with (
        distributed.process_group(machine),
        mlflow.run("pretrain", params, stage_hash=made_from, data_hash=data) as run,
        progress("pretrain", "steps", shown=distributed.rank() == 0) as tick,
    ):
        machine, kept = chosen(Job(params, state))
        measure = validation(params.model, settings, shards=paths.shards, machine=machine)
        session = Session(run, tick, state, outputs, measure=measure, score=SCORE)
        torch.manual_seed(seed)  # every process builds the same start
        training = Training(batches, machine, seed, state, data, session, kept_micro_batches=kept)
        pretrain(build(params.model), settings, training)


if __name__ == "__main__":
    run_stage("pretrain", main)
