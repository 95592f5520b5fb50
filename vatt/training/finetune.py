"""Fine-tuning on labels: one tower and a linear layer, from pre-trained weights or from scratch.

B clips of the global batch, C classes; targets (B, C) are shares in [0, 1]. As in pre-training the
loss sees the whole batch in every process: logits are gathered with their gradients.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vatt.checkpoint import build_classifier, load, load_config, load_weights
from vatt.config import FinetuneTaskParams, ModelParams, check_share
from vatt.data.clips.manifest import LABEL_SEPARATOR
from vatt.data.loading.batches import Batch, model_inputs
from vatt.model.operators import full_precision
from vatt.model.patches import draw_kept
from vatt.model.vatt import Classifier, tower_of
from vatt.training import distributed
from vatt.training.engine import Weights
from vatt.training.gradient_cache import encode_in_micro_batches
from vatt.training.loop import Objective, Training, train
from vatt.training.state import flatten
from vatt.training.telemetry import finetuning_work


def one_hot(labels: Sequence[str], classes: Sequence[str]) -> Tensor:  # -> (B, C)
    """1 for each class of a clip."""
    place = {name: number for number, name in enumerate(classes)}
    targets = torch.zeros(len(labels), len(classes))
    for row, label in enumerate(labels):
        for name in label.split(LABEL_SEPARATOR):
            targets[row, place[name]] = 1
    return targets


def softmax_loss(logits: Tensor, targets: Tensor, *, smoothing: float) -> Tensor:
    """Cross-entropy with smoothed labels, the mean over clips."""
    targets = targets * (1 - smoothing) + smoothing / targets.shape[1]
    return -(targets * F.log_softmax(full_precision(logits), dim=1)).sum(1).mean()


def balanced_sigmoid_loss(logits: Tensor, targets: Tensor, *, smoothing: float) -> Tensor:
    """Sigmoid cross-entropy summed over classes; clips with rare labels weigh more.

    w_i = sum_c(y_ic / n_c) / sum_c y_ic with n_c the count of class c in the batch.
    """
    logits, smoothed = full_precision(logits), targets * (1 - smoothing) + smoothing / 2
    each = F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none").sum(1)
    rarity = (targets / targets.sum(0).clamp(min=1e-12)).sum(1)
    weights = rarity / targets.sum(1).clamp(min=1e-12)
    return (weights * each).mean()


def draw_mix(alpha: float, *, seed: int, step: int, samples: Sequence[int]) -> Tensor:  # -> (B,)
    """Each clip's own share in its mixture, from Beta(alpha, alpha), by (seed, step, sample)."""

    def draw(sample: int) -> float:
        key = f"mixup/{seed}/{step}/{sample}".encode()
        number = int.from_bytes(hashlib.sha256(key).digest()[:8], "little")
        return float(np.random.default_rng(number).beta(alpha, alpha))

    return torch.tensor([draw(sample) for sample in samples])


def mix(values: Tensor, own: Tensor, partners: Tensor) -> Tensor:  # (B, ...), (B,), (B,)
    """Each row mixed with its partner's."""
    share = own.view(-1, *[1] * (values.dim() - 1)).to(values)
    return share * values + (1 - share) * values[partners]


def neighbours(count: int) -> Tensor:
    """Partners for `mix`: rows 0 and 1, 2 and 3, ...; both are always in the same process.

    Rows come in random order, so that a neighbour is as random as any other partner.
    """
    assert count % 2 == 0, "neighbours need an even number of rows"
    return torch.arange(count) ^ 1


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
    model = build_classifier(
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


# Settings that shape no weight: changing them does not make a saved state useless.
SHAPELESS = {"save_every", "report_every", "test_clips", "test_crops"}
LOSSES = {"softmax": softmax_loss, "balanced_sigmoid": balanced_sigmoid_loss}
KEPT_STATES = 2


class Finetuning(nn.Module):
    """A step's forward pass: this process's clips in, the whole batch's loss out."""

    def __init__(
        self,
        model: Classifier,
        params: FinetuneTaskParams,
        *,
        micro_batch_size: int | None = None,
        kept_micro_batches: int = 1,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = LOSSES[params.loss]
        self.smoothing = params.label_smoothing
        self.micro_batch_size = micro_batch_size
        self.kept_micro_batches = kept_micro_batches

    def forward(self, inputs: Tensor, kept: Tensor | None, targets: Tensor) -> dict[str, Tensor]:
        """The loss to minimise, and how many clips' first guess is one of their classes."""
        (own,) = encode_in_micro_batches(
            self._encode,
            *(inputs, kept),
            weights=self.model.parameters(),
            micro_batch_size=self.micro_batch_size,
            kept=self.kept_micro_batches,
        )
        logits, targets = distributed.gather(own), distributed.gather(targets)
        guessed = targets.gather(1, logits.argmax(1, keepdim=True))
        return {
            "loss": self.loss(logits, targets, smoothing=self.smoothing),
            "accuracy": (guessed == targets.amax(1, keepdim=True)).float().mean(),
        }

    def _encode(self, inputs: Tensor, kept: Tensor | None) -> tuple[Tensor]:
        return (full_precision(self.model(inputs, kept)),)


def finetune(
    model: Classifier, params: FinetuneTaskParams, training: Training, *, classes: Sequence[str]
) -> Weights:
    """Like `pretrain`; training starts from the weights of `model`."""
    check_share(
        params.batch_size,
        distributed.world_size(),
        setting="the task's batch_size",
        paired=params.mixup > 0,
    )
    seed = training.seed

    def inputs_of(batch: Batch, step: int) -> tuple[Any, ...]:
        return finetuning_inputs(model, batch, step, params=params, classes=classes, seed=seed)

    identity = {
        "task": params.model_dump(mode="json", exclude=SHAPELESS),
        "model": model.params.model_dump(mode="json"),
        "classes": list(classes),
        "start": hash_of_weights(model),
        "data": training.data_hash,
        "seed": seed,
    }
    objective = Objective(
        Finetuning(model, params, **training.micro_batches()),
        inputs_of,
        finetuning_work(model.params, params),
        flatten(identity),
        keep_states=KEPT_STATES,
    )
    return train(objective, params, training)


def finetuning_inputs(
    model: Classifier,
    batch: Batch,
    step: int,
    *,
    params: FinetuneTaskParams,
    classes: Sequence[str],
    seed: int,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A batch as `Finetuning.forward` takes it: mixed, and with the tokens that are kept."""
    targets = one_hot(batch.labels[params.label], classes)
    batch = batch.to(distributed.device())
    inputs = model_inputs(batch)[tower_of(params.modality)]
    first = distributed.rank() * len(inputs)
    samples = list(range(first, first + len(inputs)))
    targets = targets.to(inputs.device)
    if params.mixup > 0:
        own = draw_mix(params.mixup, seed=seed, step=step, samples=samples)
        partners = neighbours(len(inputs)).to(inputs.device)
        inputs, targets = mix(inputs, own, partners), mix(targets, own, partners)
    kept = None
    if params.drop_rate > 0:
        places = torch.arange(first, first + len(inputs), device=inputs.device)
        kept = draw_kept(
            model.num_tokens,
            params.drop_rate,
            seed=seed,
            step=step,
            samples=places,
            choose=model.choose.forward,
        )
    return inputs, kept, targets


def load_backbone(model: Classifier, pretrained: Weights) -> None:
    """Start from a pre-trained model's tower; its position tables are resized when they must be."""
    tower = f"{tower_of(model.modality)}."
    weights = {
        name.removeprefix(tower): value
        for name, value in pretrained.items()
        if name.startswith(tower)
    }
    load_weights(model.backbone, weights, source="the pre-trained checkpoint")


def hash_of_weights(model: nn.Module) -> str:
    """The sha256 of a model's weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
