"""Stage finetune TASK INIT: shards + a start -> a classifier."""

import sys

from vatt.config import load_params
from vatt.data.loading.batches import Sampling, labelled_samples
from vatt.process import run_stage
from vatt.progress import progress
from vatt.provenance import data_hash, stage_hash
from vatt.tracking import mlflow
from vatt.tracking.session import Session, feed
from vatt.training import distributed
from vatt.training.distributed import launch
from vatt.training.finetune import finetune, start


def main() -> None:
    """Fine-tune on a task of params.finetune.tasks, from `pretrained` or from `scratch`."""
    name, init = sys.argv[1:]
    variant = f"{name}-{init}"
    params = load_params()
    paths, machine, task = params.paths, params.machine, params.finetune.tasks[name]
    if (code := launch("stages.finetune", machine, name, init)) is not None:
        sys.exit(code)
    made_from = stage_hash("finetune", params, task=name, init=init)
    data, state = data_hash(paths.shards), paths.finetune_state / variant
    known = labelled_samples(paths.shards, split="train", label=task.label, count=task.train_labels)
    with (
        distributed.process_group(machine),
        mlflow.run(f"finetune-{variant}", params, stage_hash=made_from, data_hash=data) as run,
        progress(f"finetune {variant}", "steps", shown=distributed.rank() == 0) as tick,
    ):
        session = Session(run, state, tick)
        model = start(task, classes=known.classes, init=init,
                      pretrained=paths.pretrained, seed=params.seed)  # fmt: skip
        batches = feed(paths.shards, Sampling.for_task(model.params, task), task,
                       seed=params.seed, machine=machine, keys=known.keys)  # fmt: skip
        described = {"modality": task.modality, "classes": known.classes, "label": task.label}
        finetune(
            model, batches, task, classes=known.classes, machine=machine, seed=params.seed,
            state=state, data_hash=data, **session.hooks(), export=lambda weights: session.export(
                weights, model.params, paths.finetuned / variant, classifier=described,
                metrics=paths.metrics / f"finetune-{variant}.json",
            ),
        )  # fmt: skip


if __name__ == "__main__":
    run_stage(f"finetune-{'-'.join(sys.argv[1:])}", main)
