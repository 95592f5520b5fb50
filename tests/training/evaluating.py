"""A tiny pre-training that is evaluated on the way, in one process or several."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.training import tiny
from vatt.data.loading.batches import Batch
from vatt.tracking.mlflow import Run
from vatt.tracking.session import Session
from vatt.training import distributed
from vatt.training.engine import DeepSpeedEngine, LocalEngine
from vatt.training.pretrain import pretrain

WORDS = Path("vocabulary.txt")


def session(folder: Path) -> tuple[Session, dict[str, str]]:
    """The hooks of a stage, with a run that only remembers its tags."""
    tags: dict[str, str] = {}
    run = Run(None, "", None, tiny.machine_params())
    run.tag = tags.__setitem__  # type: ignore[method-assign]
    return Session(run, folder, lambda done, total, note="": None), tags


def trained(
    folder: Path,
    *,
    evaluate_every: int | None,
    scores: list[float] | None = None,
    interrupted_at: int | None = None,
    report_every: int = 1,
) -> dict[str, Any]:
    """Train six steps; each evaluation takes the next score and disturbs every random stream."""
    folder.mkdir(exist_ok=True)
    (folder / WORDS).write_text("word\t1\n")
    model = tiny.make_model(tiny.model_params(dropout=0.1))
    asked: list[int] = []
    told: dict[str, float] = {}
    hooks, tags = session(folder)

    def measure(weights: Any) -> dict[str, float]:
        torch.rand(7), random.random(), np.random.rand()
        tiny.make_model(model.params, seed=9).load_state_dict(weights)
        return {"val.score": (scores or [0.0] * 9)[len(asked) - 1]}

    keeping = hooks.keeping_best(
        measure, model.params, score="val.score", vocabulary=folder / WORDS
    )
    assert keeping is not None

    def evaluate(step: int, weights: Any) -> dict[str, float]:
        asked.append(step)
        return keeping(step, weights)

    def batches_from(first: int) -> Iterator[Batch]:
        for step in range(first, 6):
            if step == interrupted_at:
                raise KeyboardInterrupt
            whole = tiny.make_batch(step)
            yield tiny.part_of(whole, distributed.rank(), distributed.world_size())

    def report(step: int, metrics: dict[str, float]) -> None:
        told.update(metrics)
        hooks.report(step, metrics)

    one = distributed.world_size() == 1
    weights = pretrain(
        model,
        batches_from,
        tiny.pretrain_params(evaluate_every=evaluate_every, report_every=report_every),
        machine=tiny.machine_params(zero_stage=3),
        seed=0,
        state=folder,
        data_hash="none",
        **{**hooks.hooks(), "report": report},
        evaluate=evaluate,
        engine_of=(
            lambda module, optimizer, precision, machine: LocalEngine(module, optimizer, precision)
        )
        if one
        else DeepSpeedEngine,
    )
    return {
        "hash": tiny.hash_of(weights),
        "weights": weights,
        "asked": asked,
        "tags": tags,
        "told": told,
    }
