"""A fine-tuning task put together: the model at the task's input size, from the chosen start."""

from collections.abc import Sequence
from pathlib import Path

import torch

from vatt.checkpoint import load, load_config
from vatt.config import FinetuneTaskParams, ModelParams
from vatt.model.classifier import Classifier
from vatt.training.finetune import load_backbone


def task_model(model: ModelParams, task: FinetuneTaskParams) -> ModelParams:
    """The model's settings with the input size of the task; tables are resized to it."""
    video = {"frames": task.frames, "frame_size": task.frame_size}
    if task.modality == "image":
        video["frames"] = model.video.patch[0]  # one voxel deep
    audio = {"samples": task.audio_samples}
    return model.model_copy(
        update={
            "video": model.video.model_copy(update=_given(video)),
            "audio": model.audio.model_copy(update=_given(audio)),
        }
    )


def start(
    task: FinetuneTaskParams, *, classes: Sequence[str], init: str, pretrained: Path, seed: int
) -> Classifier:
    """A classifier as training begins: fresh, or with the pre-trained tower."""
    params = ModelParams.model_validate(load_config(pretrained)["model"])
    torch.manual_seed(seed)
    model = Classifier(
        task_model(params, task),
        modality=task.modality,
        num_classes=len(classes),
        head_dropout=task.head_dropout,
    )
    if init == "pretrained":
        load_backbone(model, load(pretrained).state_dict())
    return model


def _given(values: dict[str, int | None]) -> dict[str, int]:
    return {key: value for key, value in values.items() if value is not None}
