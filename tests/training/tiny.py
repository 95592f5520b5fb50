"""A model of a few thousand weights and batches for it, made in memory."""

import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vatt.checkpoint import build, build_classifier
from vatt.config import MachineParams, ModelParams, PretrainParams, load_params
from vatt.data.loading.batches import Batch
from vatt.model.vatt import VATT, Classifier, ClassifierInput
from vatt.training.engine import Engine, LocalEngine
from vatt.training.loop import BatchesFrom, Reporter, Training

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")

SIZE = {"depth": 1, "dim": 16, "mlp_dim": 32, "heads": 2, "head_dim": 8}
BATCH_SIZE, CANDIDATES, WORDS = 8, 2, 4

DEMO = load_params(Path(__file__).parents[2] / "presets" / "demo.yaml")


SENSES = {
    "motion": {"size": SIZE, "samples": 20, "channels": 3, "patch": 5},
    "depth": {"size": SIZE, "frames": 4, "frame_size": 8, "patch": [2, 4, 4]},
}
SHAPES = {"motion": (20, 3), "depth": (4, 8, 8)}


def model_params(
    *,
    backbone: str = "specific",
    dropout: float = 0.0,
    depth: int = 1,
    experts: dict[str, Any] | None = None,
    senses: Iterable[str] = (),
) -> ModelParams:
    """Settings of a model that runs in a millisecond; with experts, of at least two blocks."""
    size = SIZE | {"depth": max(2, depth) if experts else depth}
    return ModelParams.model_validate(
        {
            "recipe": "paper",
            "backbone": backbone,
            "video": {"size": size, "frames": 4, "frame_size": 16, "patch": [2, 8, 8]},
            "audio": {
                "size": size,
                "input": "waveform",
                "samples": 128,
                "patch": 16,
                "mel_bins": None,
            },
            "text": {"size": size, "words": WORDS, "vocabulary": 32},
            "va_dim": 12,
            "vt_dim": 8,
            "dropout": dropout,
            "experts": experts,
            **{name: SENSES[name] | {"size": size} for name in senses},
        }
    )


def pretrain_params(*, optimizer: dict[str, Any] | None = None, **changes: Any) -> PretrainParams:
    """Settings of a training of a few steps."""
    base = {
        "batch_size": BATCH_SIZE,
        "steps": 6,
        "precision": "fp32",
        "text_candidates": CANDIDATES,
        "save_every": 2,
        "report_every": 1,
    }
    settings = DEMO.pretrain.model_dump() | base | changes
    settings["optimizer"] |= {"learning_rate": 1e-3, "warmup_steps": 2} | (optimizer or {})
    return PretrainParams.model_validate(settings)


def machine_params(**changes: Any) -> MachineParams:
    """One process of one thread."""
    settings = DEMO.machine.model_dump() | {"threads": 1, "workers": 0} | changes
    return MachineParams.model_validate(settings)


def make_model(params: ModelParams, seed: int = 0) -> VATT:
    """A model with weights from a seed."""
    torch.manual_seed(seed)
    return build(params)


def make_classifier(
    modality: ClassifierInput, *, params: ModelParams | None = None, seed: int = 0
) -> Classifier:
    """A classifier of three classes with weights from a seed."""
    torch.manual_seed(seed)
    params = params or model_params()
    return build_classifier(params, modality=modality, num_classes=3, head_dropout=0.0)


def make_batch(
    number: int,
    *,
    size: int = BATCH_SIZE,
    textless: range = range(1, 2),
    senses: Iterable[str] = (),
) -> Batch:
    """Random clips; those in `textless` have no words, one lacks a candidate, one its sound.

    Of the further senses, every third clip has none.
    """
    generator = torch.Generator().manual_seed(number)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    text = integers(1, 32, size, CANDIDATES, WORDS)
    text[list(textless)] = 0
    text[0, 1] = 0
    has_audio = torch.ones(size, dtype=torch.bool)
    has_audio[2] = False
    more = {name: torch.randn(size, *SHAPES[name], generator=generator) for name in senses}
    there = dict.fromkeys(senses, torch.arange(size) % 3 > 0)
    return Batch(
        clip_ids=[f"clip-{number}-{row}" for row in range(size)],
        signals={
            "video": integers(0, 256, size, 4, 16, 16, 3).to(torch.uint8),
            "audio": integers(-(2**15), 2**15, size, 128).to(torch.int16),
            "text": text,
            **more,
        },
        present={"video": torch.ones(size, dtype=torch.bool), "audio": has_audio, **there},
        changes={"video": torch.tensor([0.0, 1.0, 1.0, 0.0]).repeat(size, 1)},
        labels={"digit": [str(row % 3) for row in range(size)]},
    )


def part_of(batch: Batch, rank: int, world_size: int) -> Batch:
    """The rows that one process gets."""
    size = len(batch.clip_ids) // world_size
    rows = slice(rank * size, (rank + 1) * size)
    return replace(
        batch.mapped(lambda value: value[rows]),
        clip_ids=batch.clip_ids[rows],
        labels={name: values[rows] for name, values in batch.labels.items()},
    )


def batches_from(first_step: int) -> Iterator[Batch]:
    """One process's batches: a function of the step."""
    return (make_batch(step) for step in itertools.count(first_step))


class Recorder:
    """A reporter that remembers."""

    def __init__(self, evaluate: Callable[[int, Any], dict[str, float]] | None = None) -> None:
        self.first_step: int | None = None
        self.facts: Mapping[str, str] = {}
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.spikes: list[tuple[int, float]] = []
        self.done: list[int] = []
        self.exported: list[dict[str, torch.Tensor]] = []
        self._evaluate = evaluate

    def begin(self, first_step: int) -> None:
        self.first_step = first_step

    def describe(self, facts: Mapping[str, str]) -> None:
        self.facts = facts

    def report(self, step: int, metrics: dict[str, float]) -> None:
        self.rows.append((step, metrics))

    def spike(self, step: int, loss: float) -> None:
        self.spikes.append((step, loss))

    def progress(self, done: int, total: int) -> None:
        self.done.append(done)

    def evaluate(self, step: int, weights: dict[str, torch.Tensor]) -> dict[str, float]:
        assert self._evaluate is not None
        return self._evaluate(step, weights)

    def before_save(self) -> None:
        """Everything is stored at once."""

    def export(self, weights: dict[str, torch.Tensor]) -> None:
        self.exported.append(weights)


def local(module: Any, optimizer: Any, precision: Any, machine: MachineParams) -> Engine:
    """An engine without DeepSpeed."""
    return LocalEngine(module, optimizer, precision)


def training(
    state: Path,
    reporter: Reporter,
    batches: BatchesFrom | None = None,
    *,
    seed: int = 0,
    engine_of: Callable[..., Engine] = local,
) -> Training:
    """A training on this machine."""
    machine = machine_params()
    feed = batches or batches_from
    return Training(feed, machine, seed, state, "none", reporter, engine_of=engine_of)


def hash_of(weights: dict[str, torch.Tensor]) -> str:
    """One number for all weights, bit for bit."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
