"""What a training stage reports while it runs and leaves when it ends.

It goes to MLflow, to the terminal, and to a history next to the state, so that the curve of a
resumed run has no gap; the best checkpoint is kept there too.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vatt import checkpoint
from vatt.config import FinetuneTaskParams, MachineParams, ModelParams, PretrainParams
from vatt.data.loading.batches import Batch, Loading, Sampling, open_index, train_batches
from vatt.errors import DataError
from vatt.files import atomic_write
from vatt.progress import Tick
from vatt.tracking.mlflow import Run
from vatt.training import distributed
from vatt.training.engine import Weights

REPEATABLE = ("loss", "nce", "mil_nce", "accuracy", "learning_rate", "gradient_norm")
# How names of metrics of an evaluation, of routers, and of the losses of further senses begin.
KINDS = ("val.", "experts.", "nce_")
HISTORY, SPIKES = "history.jsonl", "spikes.jsonl"  # in the state's folder, with what follows
BEST = "best"
CURVE = "history.json"  # in the checkpoint's folder
LISTED_SPIKES = 20  # the last ones, in a tag

DESCRIBED = {  # facts of the first step that the console shows
    "attention.kernel": "attention",
    "micro_batch.clips": "clips at once",
    "micro_batch.kept": "micro-batches kept",
}

Measure = Callable[[Mapping[str, Tensor]], dict[str, float]]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a training leaves, and what its checkpoint says of itself."""

    model: ModelParams
    checkpoint: Path
    metrics: Path
    vocabulary: Path | None = None
    more: dict[str, Any] = field(default_factory=dict)  # joins config.json


class Session:
    """The reporter of a stage's training: MLflow, the terminal, and the files that it leaves.

    `measure` is the evaluation on the way; the weights with the highest `score` are kept.
    """

    def __init__(
        self,
        run: Run,
        tick: Tick,
        state: Path,
        outputs: Outputs,
        *,
        measure: Measure | None = None,
        score: str = "",
    ) -> None:
        self._run, self._tick, self._outputs = run, tick, outputs
        self._measure, self._score = measure, score
        self._history, self._spikes = History(state), History(state, SPIKES)
        self._best = Best(state)
        self._note = ""

    def begin(self, first_step: int) -> None:
        """From step 0 on, spikes and the best checkpoint of an earlier training are forgotten."""
        if first_step == 0:
            self._spikes.path.unlink(missing_ok=True)
            self._best.forget()

    def describe(self, facts: Mapping[str, str]) -> None:
        """Tag the run with what the first step has shown, and print the parts that vary."""
        for name, value in facts.items():
            self._run.tag(name, value)
        shown = {DESCRIBED[name]: value for name, value in facts.items() if name in DESCRIBED}
        if shown:
            log.warning("%s", "; ".join(f"{words}: {value}" for words, value in shown.items()))

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Note a step's metrics everywhere."""
        self._run.log(step, metrics)
        self._history.add(step, metrics)
        self._note = f"loss {metrics['loss']:.3f}, data wait {metrics['data_wait_share']:.0%}"

    def spike(self, step: int, loss: float) -> None:
        """Point at a loss that jumped."""
        log.warning("loss spike at step %d: %.4g", step, loss)
        self._spikes.add(step, {"loss": loss})
        self._run.log(step, {"loss_spike": loss})
        self._run.tag("vatt.loss_spikes", ", ".join(map(str, self._spike_steps()[-LISTED_SPIKES:])))

    def progress(self, done: int, total: int) -> None:
        """Draw how far it is."""
        self._tick(done, total, self._note)

    def evaluate(self, step: int, weights: Weights) -> dict[str, float]:
        """What `measure` finds; the best weights are kept."""
        assert self._measure is not None
        metrics = self._measure(weights)
        best = {"step": step, "score": metrics[self._score]}
        if self._best.offer(best, weights, self._outputs):
            self._run.tag("vatt.best_step", str(step))
            self._run.tag("vatt.best_score", f"{self._score} = {metrics[self._score]:.4f}")
            self._run.tag("vatt.best_checkpoint", str(self._best.folder))
        return metrics

    def before_save(self) -> None:
        """Store what was reported: a state must not be ahead of it."""
        self._run.flush()

    def export(self, weights: Weights) -> None:
        """Write checkpoint, curve and metrics file."""
        outputs = self._outputs
        checkpoint.save(
            weights,
            outputs.model,
            outputs.checkpoint,
            extra=outputs.more,
            vocabulary=outputs.vocabulary,
        )
        spikes = self._spike_steps()
        more = {"loss_spikes": spikes} if spikes else {}
        self._history.export(curve=outputs.checkpoint / CURVE, metrics=outputs.metrics, **more)
        self._run.checkpoint(outputs.checkpoint)

    def _spike_steps(self) -> list[int]:
        return [int(row["step"]) for row in self._spikes.rows()]


class History:
    """Appends a line a report; a step that comes again replaces itself and all after it."""

    def __init__(self, folder: Path, file: str = HISTORY) -> None:
        self.path = folder / file

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Note a step's metrics."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        repeatable = {
            name: value
            for name, value in metrics.items()
            if name in REPEATABLE or name.startswith(KINDS)
        }
        row = {"step": step, **repeatable}
        with self.path.open("a+b") as file:
            # A writer that died in the middle of a line must not spoil the next one.
            is_torn = file.tell() > 0 and file.seek(-1, os.SEEK_END) and file.read(1) != b"\n"
            file.write(b"\n" * is_torn + json.dumps(row).encode() + b"\n")

    def rows(self) -> list[dict[str, Any]]:
        """The curve, by step."""
        if not self.path.exists():
            return []
        rows: list[dict[str, Any]] = []
        for line in self.path.read_bytes().splitlines():
            try:
                row = json.loads(line)
                is_row = type(row["step"]) is int
            except (ValueError, LookupError, TypeError, RecursionError):
                is_row = False
            if not is_row:  # killed in the middle of this line; its step was reported again
                continue
            while rows and rows[-1]["step"] >= row["step"]:
                rows.pop()
            rows.append(row)
        return rows

    def export(self, *, curve: Path, metrics: Path, **more: Any) -> None:
        """Write the curve, and its last row and `more` as the stage's metrics file."""
        rows = self.rows()
        for path, content in ((curve, rows), (metrics, {**rows[-1], **more})):
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class Best:
    """Keeps a copy of the weights whose score is the highest; of equal ones the first."""

    def __init__(self, state: Path) -> None:
        self.folder = state / BEST

    def offer(self, best: dict[str, Any], weights: Weights, outputs: Outputs) -> bool:
        """Keep the weights, with their step and score, if no earlier score was as high."""
        known = self.known()
        if known is not None and best["score"] <= known["score"]:
            return False
        extra = {**outputs.more, "best": best}
        checkpoint.save(
            weights, outputs.model, self.folder, extra=extra, vocabulary=outputs.vocabulary
        )
        return True

    def known(self) -> dict[str, Any] | None:
        """Step and score of what is kept."""
        try:
            found = checkpoint.load_config(self.folder).get("best")
        except DataError:
            return None
        return found if isinstance(found, dict) and "score" in found else None

    def forget(self) -> None:
        """Keep nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)


def feed(
    shards: Path,
    sampling: Sampling,
    settings: PretrainParams | FinetuneTaskParams,
    *,
    seed: int,
    machine: MachineParams,
    keys: Collection[str] | None = None,
) -> Callable[[int], Iterator[Batch]]:
    """This process's part of the train batches, as the loops take it: from any step on."""

    def batches_from(first_step: int) -> Iterator[Batch]:
        loading = Loading.of(machine)
        return train_batches(
            open_index(shards, loading, split="train", keys=keys),
            sampling,
            batch_size=settings.batch_size,
            steps=range(first_step, settings.steps),
            seed=seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            loading=loading,
        )

    return batches_from
