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
from vatt.tracking.session import Measure, Outputs, Session
from vatt.training import distributed
from vatt.training.engine import DeepSpeedEngine, Weights
from vatt.training.loop import Training
from vatt.training.pretrain import pretrain

WORDS = Path("vocabulary.txt")


class Tags(Run):
    """A run that only remembers its tags."""

    def __init__(self) -> None:
        super().__init__(None, "", None, tiny.machine_params())
        self.tags: dict[str, str] = {}

    def tag(self, name: str, value: str) -> None:
        self.tags[name] = value


class Listening(Session):
    """A stage's session that remembers what it hears, besides."""

    def __init__(self, folder: Path, measure: Measure | None = None) -> None:
        self.run, self.asked, self.metrics = Tags(), list[int](), dict[str, float]()
        model = tiny.model_params(dropout=0.1)
        outputs = Outputs(model, folder / "checkpoint", folder / "metrics.json", folder / WORDS)

        def tick(done: int, total: int, note: str = "") -> None:
            """Draw nothing."""

        super().__init__(self.run, tick, folder, outputs, measure=measure, score="val.score")

    def report(self, step: int, metrics: dict[str, float]) -> None:
        self.metrics |= metrics
        super().report(step, metrics)

    def evaluate(self, step: int, weights: Weights) -> dict[str, float]:
        self.asked.append(step)
        return super().evaluate(step, weights)


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

    def measure(weights: Any) -> dict[str, float]:
        torch.rand(7), random.random(), np.random.rand()
        tiny.make_model(model.params, seed=9).load_state_dict(weights)
        return {"val.score": (scores or [0.0] * 9)[len(session.asked) - 1]}

    def batches_from(first: int) -> Iterator[Batch]:
        for step in range(first, 6):
            if step == interrupted_at:
                raise KeyboardInterrupt
            whole = tiny.make_batch(step)
            yield tiny.part_of(whole, distributed.rank(), distributed.world_size())

    session = Listening(folder, measure)
    engine_of = tiny.local if distributed.world_size() == 1 else DeepSpeedEngine
    machine = tiny.machine_params(zero_stage=3)
    weights = pretrain(
        model,
        tiny.pretrain_params(evaluate_every=evaluate_every, report_every=report_every),
        Training(batches_from, machine, 0, folder, "none", session, engine_of=engine_of),
    )
    return {
        "hash": tiny.hash_of(weights),
        "weights": weights,
        "asked": session.asked,
        "tags": session.run.tags,
        "metrics": session.metrics,
    }
