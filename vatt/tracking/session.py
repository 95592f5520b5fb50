"""What a training stage reports while it runs and leaves when it ends.

It goes to MLflow, to the terminal, and to a history beside the state, so that the curve of a
resumed run has no gap; the best checkpoint is kept there too.
"""

import json
import logging
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypedDict

from torch import Tensor

from vatt import checkpoint
from vatt.config import FinetuneTaskParams, MachineParams, ModelParams, PretrainParams
from vatt.data.loading.batches import Batch, Loading, Sampling, open_index, train_batches
from vatt.errors import DataError
from vatt.files import atomic_write
from vatt.tracking.mlflow import Run
from vatt.training import distributed
from vatt.training.engine import Weights
from vatt.training.loop import Evaluate

VALIDATION = "val."  # what an evaluation on the way measures begins so
REPEATABLE = ("loss", "nce", "mil_nce", "accuracy", "learning_rate", "gradient_norm")
FILE, SPIKES = "history.jsonl", "spikes.jsonl"


class History:
    """Appends a line a report; a step that comes again replaces itself and all after it."""

    def __init__(self, folder: Path, file: str = FILE) -> None:
        self.path = folder / file

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Note a step's metrics."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        repeatable = {
            name: value
            for name, value in metrics.items()
            if name in REPEATABLE or name.startswith(VALIDATION)
        }
        row = {"step": step, **repeatable}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """The curve, by step."""
        if not self.path.exists():
            return []
        rows: list[dict[str, Any]] = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # killed in the middle of this line; its step was reported again
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


FOLDER = "best"  # in the state's folder


class Best:
    """Keeps a copy of the weights whose score is the highest; of equal ones the first."""

    def __init__(self, state: Path) -> None:
        self.folder = state / FOLDER

    def offer(
        self, best: dict[str, Any], weights: Weights, model: ModelParams, *, vocabulary: Path
    ) -> bool:
        """Keep the weights, with what `best` says, if no `score` before was as high."""
        known = self.known()
        if known is not None and best["score"] <= known["score"]:
            return False
        checkpoint.save(weights, model, self.folder, extra={"best": best}, vocabulary=vocabulary)
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


CURVE = "history.json"  # in the checkpoint's folder
TOLD_SPIKES = 20  # the last ones, in a tag

Measure = Callable[[Mapping[str, Tensor]], dict[str, float]]

log = logging.getLogger(__name__)


class Tick(Protocol):
    """Draws progress, with a note beside it."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


class Hooks(TypedDict):
    """The keyword arguments of `pretrain` and `finetune` that tell."""

    begin: Callable[[int], None]
    report: Callable[[int, dict[str, float]], None]
    spike: Callable[[int, float], None]
    progress: Callable[[int, int], None]
    before_save: Callable[[], None]


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


class Session:
    """The hooks that the training loops call; only rank 0 says anything."""

    def __init__(self, run: Run, state: Path, tick: Tick) -> None:
        self._run, self._history, self._tick = run, History(state), tick
        self._spikes, self._best = History(state, SPIKES), Best(state)
        self._note = ""

    def hooks(self) -> Hooks:
        """The keyword arguments of `pretrain` and `finetune` that tell."""
        return {
            "begin": self.begin,
            "report": self.report,
            "spike": self.spike,
            "progress": self.progress,
            "before_save": self.before_save,
        }

    def begin(self, first_step: int) -> None:
        """A training that starts anew forgets spikes and best checkpoint of another."""
        if first_step == 0 and distributed.rank() == 0:
            self._spikes.path.unlink(missing_ok=True)
            self._best.forget()

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Note a step's metrics everywhere."""
        self._run.log(step, metrics)
        self._note = f"loss {metrics['loss']:.3f}, data wait {metrics['data_wait_share']:.0%}"
        if distributed.rank() == 0:
            self._history.add(step, metrics)

    def spike(self, step: int, loss: float) -> None:
        """Point at a loss that jumped."""
        log.warning("loss spike at step %d: %.4g", step, loss)
        self._spikes.add(step, {"loss": loss})
        self._run.log(step, {"loss_spike": loss})
        self._run.tag("vatt.loss_spikes", ", ".join(map(str, self._spike_steps()[-TOLD_SPIKES:])))

    def _spike_steps(self) -> list[int]:
        return [int(row["step"]) for row in self._spikes.rows()]

    def keeping_best(
        self, measure: Measure | None, model: ModelParams, *, score: str, vocabulary: Path
    ) -> Evaluate | None:
        """An evaluation for the loop: what `measure` says, the best weights by `score` kept."""
        if measure is None:
            return None

        def evaluate(step: int, weights: Weights) -> dict[str, float]:
            metrics = measure(weights)
            best = {"step": step, "score": metrics[score]}
            if self._best.offer(best, weights, model, vocabulary=vocabulary):
                self._run.tag("vatt.best_step", str(step))
                self._run.tag("vatt.best_score", f"{score} = {metrics[score]:.4f}")
                self._run.tag("vatt.best_checkpoint", str(self._best.folder))
            return metrics

        return evaluate

    def progress(self, done: int, total: int) -> None:
        """Draw how far it is."""
        self._tick(done, total, self._note)

    def before_save(self) -> None:
        """A state must not be ahead of what was reported."""
        self._run.flush()

    def export(
        self,
        weights: Weights,
        model: ModelParams,
        folder: Path,
        *,
        metrics: Path,
        vocabulary: Path | None = None,
        **extra: Any,
    ) -> None:
        """Write checkpoint, curve and metrics file; `extra` joins config.json."""
        checkpoint.save(weights, model, folder, extra=extra, vocabulary=vocabulary)
        spikes = self._spike_steps()
        told = {"loss_spikes": spikes} if spikes else {}
        self._history.export(curve=folder / CURVE, metrics=metrics, **told)
        self._run.checkpoint(folder)
