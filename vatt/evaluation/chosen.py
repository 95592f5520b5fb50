"""Which checkpoints are evaluated: all that was trained, or one that somebody gave."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vatt.checkpoint import VOCABULARY, WEIGHTS, load_config
from vatt.config import FinetuneParams, PathsParams
from vatt.data.manifest import LABEL_SEPARATOR
from vatt.errors import DataError, SettingsError
from vatt.evaluation.classification import Predictions

Task = tuple[str, str]  # name, start


@dataclass(frozen=True, slots=True)
class Chosen:
    """An encoder, fine-tuned classifiers, or both; and why something cannot be measured."""

    encoder: Path | None
    classifiers: Mapping[Task, Path] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def named(self, answers: Predictions, known: Collection[str]) -> Predictions:
        """The answers with classes called by the labels of the data, where they only have numbers.

        The released checkpoints number them; their order is taken to be the alphabet's.
        """
        numbers = tuple(str(place) for place in range(len(answers.classes)))
        labels = sorted({name for one in known for name in one.split(LABEL_SEPARATOR)})
        if answers.classes != numbers or set(labels) <= set(numbers):
            return answers
        if len(labels) != len(numbers):
            raise DataError(
                f"the checkpoint numbers {len(numbers)} classes, the clips have "
                f"{len(labels)} labels: which is which cannot be told",
                hint="write their names into classifier.classes of its config.json, in order",
            )
        return replace(answers, classes=tuple(labels))


def choose(paths: PathsParams, finetune: FinetuneParams) -> Chosen:
    """What lies at paths.pretrained, encoder or classifier, and what was fine-tuned from it.

    Raises DataError when there is no checkpoint.
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
                f"no checkpoint is in {start}",
                hint="run `vattctl pretrain`, or give one: `vattctl evaluate --from FOLDER`",
            )
        return Chosen(None, found)
    given = load_config(start).get("classifier")
    if given is not None:
        return Chosen(None, found | {(_task_of(start, given, finetune), "pretrained"): start})
    without_words = {"text": f"the checkpoint has no {VOCABULARY}: import it with --vocab FILE"}
    return Chosen(start, found, {} if (start / VOCABULARY).exists() else without_words)


def _task_of(folder: Path, given: Mapping[str, Any], finetune: FinetuneParams) -> str:
    """The task of finetune.run that a classifier was trained on: its inputs, label and views."""
    told = given.get("label")
    tasks = [
        name
        for name in finetune.run
        if finetune.tasks[name].modality == given["modality"]
        and told in (None, finetune.tasks[name].label)
    ]
    if len(tasks) != 1:
        raise SettingsError(
            f"{folder} answers for {given['modality']}, and finetune.run has {len(tasks)} tasks of "
            f"it: {', '.join(tasks) or 'none'}",
            hint="name the one that it was trained on, as --set finetune.run=[kinetics400]",
        )
    return tasks[0]
