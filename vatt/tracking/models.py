"""A checkpoint as an MLflow model: `mlflow.pyfunc.load_model` embeds files and words, or labels.

Nothing is pickled: the file MLmodel names this module, whose `_load_pyfunc` reads the weights. The
model's folder is a checkpoint's folder, which `vatt.load` reads too, with MLmodel and params.json
next to the weights. E width of a common space, C classes.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vatt import __version__, checkpoint
from vatt.config import Params, parse_params
from vatt.data.loading.batches import Batch, Sampling, model_inputs
from vatt.errors import DataError
from vatt.model.vatt import Classifier, tower_of
from vatt.progress import unseen
from vatt.search import Embedder, Vectors, Window, clip_of, explained
from vatt.senses.audio import audio_seconds

if TYPE_CHECKING:
    import pandas as pd

PARAMS, HIDDEN = (
    "params.json",
    {"proxy": None, "cookies": None, "mlflow_uri": "sqlite:///mlflow.db"},
)
INPUTS = ("video", "audio", "text")
EXAMPLES = {"video": "clip.mp4", "audio": "clip.wav", "image": "picture.jpg", "text": "a dog jumps"}
FACTS = ("model.video.size", "model.backbone", "pretrain.steps", "seed")  # of a model, in lists
SCORED = 5  # labels with their probabilities in an answer


def log_model(
    client: Any, run_id: str, folder: Path, params: Params, *, stage: str, name: str
) -> None:
    """Store a checkpoint's folder as a model of a run, and register it under the project's name.

    The name is that of the MLflow experiment; a classifier's is longer: `vatt-action-pretrained`.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    run = client.get_run(run_id)
    kind, _, variant = stage.partition("-")
    task = variant.rpartition("-")[0] if kind == "finetune" else None
    facts = {key: run.data.params[key] for key in FACTS if key in run.data.params}
    made = client.create_logged_model(
        run.info.experiment_id, name, run_id, params=facts, model_type=kind
    )
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "model"
        describe(folder, params, task=task, out=out, model_id=made.model_id)
        client.log_model_artifacts(made.model_id, str(folder))
        client.log_model_artifacts(made.model_id, str(out))
    client.finalize_logged_model(made.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(made.model_id, step=0)])
    registered = "-".join(filter(None, (params.machine.experiment.replace("/", "-"), variant)))
    registered = registered.replace(":", "-")
    try:
        client.get_registered_model(registered)
    except MlflowException:
        client.create_registered_model(registered)
    tags = {"vatt.stage": stage, "vatt.project": Path.cwd().name}
    client.create_model_version(
        registered, f"models:/{made.model_id}", run_id, tags=tags, model_id=made.model_id
    )


class Answer(Protocol):
    """One row of the answer to one input."""

    def __call__(self, kind: str, given: str) -> dict[str, Any]: ...


def describe(folder: Path, params: Params, *, task: str | None, out: Path, model_id: str) -> None:
    """Write into `out` the files that make an MLflow model of a checkpoint's folder."""
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types.schema import Array, ColSpec, DataType, Schema

    config = checkpoint.load_config(folder)
    labels = config.get("classifier")
    inputs = (labels["modality"],) if labels else INPUTS
    numbers, words = Array(DataType.double), Array(DataType.string)
    columns: list[tuple[Any, str]] = [(numbers, "va"), (numbers, "vt")]
    if labels:
        columns = [("string", "label"), ("double", "probability"), (words, "labels")]
        columns.append((numbers, "probabilities"))
    example = "text" if "text" in inputs else inputs[0]
    save_model(
        out,
        loader_module=__name__,
        mlflow_model=Model(model_id=model_id),
        signature=ModelSignature(
            Schema([ColSpec("string", name, required=False) for name in inputs]),
            Schema([ColSpec(kind, name, required=False) for kind, name in columns]),
        ),
        input_example=[{example: EXAMPLES[example]}],
        pip_requirements=[f"vattctl=={__version__}"],
        metadata={"classes": labels["classes"]} if labels else {},
    )
    kept = params.model_dump(mode="json")
    kept["machine"] |= HIDDEN | {"workers": 0}
    content = {"task": task, "params": kept}
    (out / PARAMS).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _load_pyfunc(path: str) -> "CheckpointModel":
    """MLflow calls this."""
    folder = Path(path)
    content = json.loads((folder / PARAMS).read_text(encoding="utf-8"))
    params = parse_params(content["params"], source=folder / PARAMS)
    if content["task"] is None:
        return CheckpointModel(_Embeddings(folder, params), INPUTS)
    labels = _Labels(folder, params, content["task"])
    return CheckpointModel(labels, (labels.window.modality,))


class CheckpointModel:
    """What MLflow calls: a table with one input a row, to a table with its answers."""

    def __init__(self, answer: Answer, inputs: tuple[str, ...]) -> None:
        self._answer, self._inputs = answer, inputs

    def predict(
        self, model_input: "pd.DataFrame", params: Mapping[str, Any] | None = None
    ) -> "pd.DataFrame":
        """Answer each row; it holds the path of a file, or words, in one of the columns."""
        import pandas as pd

        rows = [
            {name: row[name] for name in self._inputs if isinstance(row.get(name), str)}
            for row in model_input.to_dict("records")
        ]
        for number, row in enumerate(rows):
            if len(row) != 1:
                raise DataError(
                    f"row {number} has {len(row)} inputs",
                    hint=f"give one of {', '.join(self._inputs)} in each row",
                )
        return pd.DataFrame([self._answer(*next(iter(row.items()))) for row in rows])


class _Embeddings:
    """The vectors of a file or sentence in the common spaces; None where it has none."""

    def __init__(self, folder: Path, params: Params) -> None:
        self._embedder = Embedder(folder)
        self._params = self._embedder.settings(params)

    @torch.inference_mode()
    def __call__(self, kind: str, given: str) -> dict[str, Any]:
        """`va` and `vt`: (E,), of length 1; of a long file, the mean direction of its moments."""
        found: dict[str, Any] = {"va": None, "vt": None}
        if kind == "text":
            return found | {"vt": self._embedder.text(given).astype(float).tolist()}
        model = self._embedder.model
        window = Window.of(model, self._params, kind)
        parts: dict[str, list[Vectors]] = {}
        for inputs in _inputs(Path(given), window, self._params, model):
            output = model(**{kind: inputs})
            for space in ("va", "vt") if kind == "video" else ("va",):
                parts.setdefault(space, []).append(getattr(output, f"{kind}_{space}").cpu().numpy())
        for space, several in parts.items():
            mean = np.concatenate(several).mean(axis=0, dtype=np.float64)
            found[space] = (mean / np.linalg.norm(mean)).tolist()
        return found


class _Labels:
    """The label of a file, and the most probable ones with their probabilities."""

    def __init__(self, folder: Path, params: Params, task: str) -> None:
        model = checkpoint.load(folder)
        assert isinstance(model, Classifier), f"{folder} has no classifier"
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._params, self._classes = (
            params,
            checkpoint.load_config(folder)["classifier"]["classes"],
        )
        settings = params.finetune.tasks[task]
        self._several = settings.loss == "balanced_sigmoid"  # a clip may have several labels
        sampling = Sampling.for_task(model.params, settings)
        hz = sampling.audio_hz or params.preprocess.audio_hz
        is_audio = settings.modality == "audio"
        seconds = audio_seconds(sampling, hz) if is_audio else sampling.frames / sampling.fps
        self.window = Window(settings.modality, sampling, seconds)

    @torch.inference_mode()
    def __call__(self, kind: str, given: str) -> dict[str, Any]:
        """The mean of the logits of all moments decides."""
        parts = [
            self._model(inputs).cpu()
            for inputs in _inputs(Path(given), self.window, self._params, self._model)
        ]
        logits = torch.cat(parts).double().mean(dim=0)
        scores = logits.sigmoid() if self._several else logits.softmax(dim=0)
        best = scores.argsort(descending=True, stable=True)[:SCORED].tolist()
        return {
            "label": self._classes[best[0]],
            "probability": float(scores[best[0]]),
            "labels": [self._classes[place] for place in best],
            "probabilities": scores[best].tolist(),
        }


def _inputs(file: Path, window: Window, params: Params, model: torch.nn.Module) -> Iterator[Tensor]:
    """The moments of one file as the model takes them, in batches."""
    if not file.is_file():
        raise DataError(f"{file} is missing", hint="give the path of a file")
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as work, explained(file, Path(work)):
        clips, folder = [clip_of(file)], Path(work)
        batches = window.batches(clips, file.parent, params, work=folder, progress=unseen)
        for _, batch in batches:
            yield _tensor(batch.to(device), window.modality)


def _tensor(batch: Batch, modality: str) -> Tensor:
    return model_inputs(batch)[tower_of(modality)]
