"""Fine-tuned classifiers on the test split, and the choice of checkpoints to evaluate.

n clips, V views a clip, C classes.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vatt.checkpoint import VOCABULARY, WEIGHTS, load_config
from vatt.config import FinetuneParams, PathsParams, Precision
from vatt.data.clips.manifest import LABEL_SEPARATOR
from vatt.data.loading.batches import Batch, model_inputs
from vatt.errors import DataError, SettingsError
from vatt.evaluation.features import ALONE, ProcessShare, computing_in
from vatt.metrics import (
    Floats,
    Metric,
    correct_at_k,
    majority_share,
    measured,
    measured_difference,
    measured_multi_label,
    measured_multi_label_difference,
)
from vatt.model.vatt import Classifier, tower_of

TOP = (1, 5)


@dataclass(frozen=True, slots=True)
class Predictions:
    """The outputs of a classifier for the labelled clips of a split."""

    clip_ids: NDArray[np.str_]  # (n,)
    labels: NDArray[np.str_]  # (n,)
    logits: Floats  # (n, C), averaged over the views
    classes: tuple[str, ...]

    def targets(self) -> NDArray[np.int64]:
        """The column of each clip's label; -1 for a label that was not in the train split."""
        columns = {name: column for column, name in enumerate(self.classes)}
        return np.asarray([columns.get(str(label), -1) for label in self.labels], dtype=np.int64)

    def truth(self) -> NDArray[np.bool_]:
        """Which classes each clip has, if clips may have several: (n, C)."""
        several = [set(str(label).split(LABEL_SEPARATOR)) for label in self.labels]
        return np.asarray([[name in own for name in self.classes] for own in several])

    def has_several(self) -> bool:
        """Whether any clip has more than one label."""
        return any(LABEL_SEPARATOR in str(label) for label in self.labels)

    def correct(self, k: int) -> NDArray[np.bool_]:
        """Whether the label is among the k highest logits; never for an unknown label."""
        targets = self.targets()
        return correct_at_k(self.logits, np.maximum(targets, 0), k) & (targets >= 0)

    def confusion(self) -> NDArray[np.int64]:
        """Counts: rows are true classes, columns predicted ones (C, C)."""
        counts = np.zeros((len(self.classes), len(self.classes)), dtype=np.int64)
        targets = self.targets()
        known = targets >= 0
        np.add.at(counts, (targets[known], self.logits.argmax(axis=1)[known]), 1)
        return counts


@torch.inference_mode()
def predict(
    classifier: Classifier,
    batches: Iterable[Batch],
    *,
    modality: str,
    label: str,
    classes: Sequence[str],
    progress: Callable[[int], None],
    precision: Precision = "fp32",
    share: ProcessShare = ALONE,
) -> Predictions | None:
    """Predictions for every clip that has the label; logits are averaged over a clip's views.

    With several processes, the first returns the predictions of all batches, the others None.
    """
    classifier.eval()
    device = next(classifier.parameters()).device
    parts = []
    for batch in batches:
        inputs = model_inputs(batch.to(device))[tower_of(modality)]
        with computing_in(precision, classifier):
            answers = classifier(inputs)
        logits = answers.double().cpu().numpy()
        present = batch.present[tower_of(modality)].tolist()
        names = batch.labels.get(label, [""] * len(batch.clip_ids))
        parts.append(
            [
                (clip, name, row)
                for clip, name, row, shown in zip(
                    batch.clip_ids, names, logits, present, strict=True
                )
                if name and shown
            ]
        )
        progress(len(set(batch.clip_ids)) * share.world_size)
    joined = share.joined(parts)
    if joined is None:
        return None
    views: dict[str, list[Floats]] = {}
    labels: dict[str, str] = {}
    for clip, name, row in (answer for part in joined for answer in part):
        views.setdefault(clip, []).append(row)
        labels[clip] = name
    averaged = [np.mean(rows, axis=0) for rows in views.values()]
    return Predictions(
        clip_ids=np.asarray(list(views), dtype=np.str_),
        labels=np.asarray([labels[clip] for clip in views], dtype=np.str_),
        logits=np.asarray(averaged).reshape(len(views), len(classes)),
        classes=tuple(classes),
    )


def classification_metrics(
    predictions: Predictions, *, resamples: int, seed: int
) -> dict[str, Metric]:
    """Top-1 and top-5 accuracy; chance is always predicting the most frequent class.

    If clips have several labels: mean average precision, AUC and d'.
    """
    if predictions.has_several():
        return measured_multi_label(
            predictions.logits, predictions.truth(), resamples=resamples, seed=seed
        )
    counts = np.sort(np.unique(predictions.labels, return_counts=True)[1])[::-1]
    chances = {1: majority_share(predictions.labels.tolist())}
    return {
        f"top_{k}": measured(
            predictions.correct(k),
            chance=chances.get(k, float(counts[:k].sum() / counts.sum())),
            resamples=resamples,
            seed=seed,
        )
        for k in TOP
        if k < len(predictions.classes)
    }


def compare(
    runs: Mapping[str, Predictions], *, resamples: int, seed: int
) -> dict[str, dict[str, Metric] | Metric]:
    """The metrics of each start, and pre-trained minus scratch on the clips of both.

    The difference is in top-1 accuracy, or in mAP if clips have several labels.
    """
    found: dict[str, dict[str, Metric] | Metric] = {
        init: classification_metrics(answers, resamples=resamples, seed=seed)
        for init, answers in runs.items()
    }
    if {"pretrained", "scratch"} <= runs.keys():
        ours, theirs = runs["pretrained"], runs["scratch"]
        _, mine, their = np.intersect1d(ours.clip_ids, theirs.clip_ids, return_indices=True)
        if ours.has_several():
            differences = measured_multi_label_difference(
                ours.logits[mine], theirs.logits[their], ours.truth()[mine],
                resamples=resamples, seed=seed,
            )  # fmt: skip
            found["difference"] = differences["mean_ap"]
        else:
            found["difference"] = measured_difference(
                ours.correct(1)[mine], theirs.correct(1)[their], resamples=resamples, seed=seed
            )
    return found


Task = tuple[str, str]  # name, start


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """An encoder, fine-tuned classifiers, or both, and the reasons for what is skipped."""

    encoder: Path | None
    classifiers: Mapping[Task, Path] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def named(self, answers: Predictions, known: Collection[str]) -> Predictions:
        """The predictions with the labels of the data in place of numbered classes.

        The released checkpoints only number their classes; they are taken in alphabetical order.
        """
        numbers = tuple(str(place) for place in range(len(answers.classes)))
        labels = sorted({name for one in known for name in one.split(LABEL_SEPARATOR)})
        if answers.classes != numbers or set(labels) <= set(numbers):
            return answers
        if len(labels) != len(numbers):
            raise DataError(
                f"the checkpoint numbers {len(numbers)} classes, the clips have "
                f"{len(labels)} labels: the names of its classes are unknown",
                hint="write their names, in order, into classifier.classes of its config.json",
            )
        return replace(answers, classes=tuple(labels))


def choose(paths: PathsParams, finetune: FinetuneParams) -> Checkpoints:
    """The checkpoint at paths.pretrained (encoder or classifier), and those fine-tuned from it.

    Raises DataError if there is no checkpoint.
    """
    found: dict[Task, Path] = {
        (task, init): paths.finetuned / f"{task}-{init}"
        for task in finetune.run
        for init in finetune.init
        if (paths.finetuned / f"{task}-{init}" / WEIGHTS).exists()
    }
    start = paths.pretrained
    if not (start / WEIGHTS).exists():
        if not found:
            raise DataError(
                f"there is no checkpoint in {start}",
                hint="run `vattctl pretrain`, or name one: `vattctl evaluate --from FOLDER`",
            )
        return Checkpoints(None, found)
    given = load_config(start).get("classifier")
    if given is not None:
        return Checkpoints(None, found | {(_task_of(start, given, finetune), "pretrained"): start})
    without_words = {"text": f"the checkpoint has no {VOCABULARY}: import it with --vocab FILE"}
    return Checkpoints(start, found, {} if (start / VOCABULARY).exists() else without_words)


def _task_of(folder: Path, given: Mapping[str, Any], finetune: FinetuneParams) -> str:
    """The task in finetune.run on which a classifier was trained."""
    label = given.get("label")
    tasks = [
        name
        for name in finetune.run
        if finetune.tasks[name].modality == given["modality"]
        and label in (None, finetune.tasks[name].label)
    ]
    if len(tasks) != 1:
        raise SettingsError(
            f"{folder} is a classifier of {given['modality']}, and finetune.run has {len(tasks)} "
            f"tasks that fit: {', '.join(tasks) or 'none'}",
            hint="name the task of its training, for example --set finetune.run=[kinetics400]",
        )
    return tasks[0]
