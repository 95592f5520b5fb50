"""Stage finetune TASK INIT: shards + a start -> a classifier."""

import sys

from vatt.config import load_params
from vatt.data.clips.samples import check_clips, stages_to_come
from vatt.data.loading.batches import Sampling, labelled_samples
from vatt.process import run_stage
from vatt.progress import progress
from vatt.tracking import mlflow
from vatt.tracking.provenance import data_hash, stage_hash
from vatt.tracking.session import Outputs, Session, feed
from vatt.training import distributed
from vatt.training.finetune import finetune, start
from vatt.training.loop import Training


def main() -> None:
    """Fine-tune on a task of params.finetune.tasks, from `pretrained` or from `scratch`."""
    from vatt.plan.trial import Job, chosen  # changes no weight: no dependency

    name, init = sys.argv[1:]
    params = load_params()
    paths, machine, task = params.paths, params.machine, params.finetune.tasks[name]
    seed, variant = params.seed, f"{name}-{init}"
    check_clips(params, stages_to_come())
    if (code := distributed.launch("stages.finetune", machine, name, init)) is not None:
        sys.exit(code)
    made_from, data = stage_hash("finetune", params, task=name, init=init), data_hash(paths.shards)
    known = labelled_samples(paths.shards, split="train", label=task.label, count=task.train_labels)
    with (
        distributed.process_group(machine),
        mlflow.run(f"finetune-{variant}", params, stage_hash=made_from, data_hash=data) as run,
        progress(f"finetune {variant}", "steps", shown=distributed.rank() == 0) as tick,
    ):
        names, state = known.classes, paths.finetune_state / variant
        model = start(task, classes=names, init=init, pretrained=paths.pretrained, seed=seed)
        sampling = Sampling.for_task(model.params, task)
        batches = feed(paths.shards, sampling, task, seed=seed, machine=machine, keys=known.keys)
        described = {"modality": task.modality, "classes": names, "label": task.label}
        metrics, more = paths.metrics / f"finetune-{variant}.json", {"classifier": described}
        outputs = Outputs(model.params, paths.finetuned / variant, metrics, more=more)
        machine, kept = chosen(Job(params, state, name, len(names), model.params))
        session = Session(run, tick, state, outputs)
        training = Training(batches, machine, seed, state, data, session, kept_micro_batches=kept)
        finetune(model, task, training, classes=names)


if __name__ == "__main__":
    run_stage(f"finetune-{'-'.join(sys.argv[1:])}", main)
