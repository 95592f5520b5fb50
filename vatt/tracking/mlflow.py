"""What happened, in MLflow: one run a stage, written by rank 0, continued when the stage resumes.

Runs with equal settings (except `machine`) are children of one parent run, the pipeline: it shows
their settings, their main metrics and the worst of their states. A store that is away never stops
a stage: what it did not get is kept next to the results and sent later.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from vatt import process
from vatt.config import MachineParams, Params, fingerprint
from vatt.data.clips.samples import INDEX, splits_of
from vatt.errors import DataError, MachineError, Stopped, redact
from vatt.files import UNREADABLE, atomic_write
from vatt.tracking.records import Line, MetricLog, MetricValue, Record, Unsent, first_line
from vatt.training import distributed
from vatt.training.state import flatten

SECRET = {"machine": {"proxy", "cookies", "mlflow_uri"}}  # may hold secrets
ARTIFACTS = "mlartifacts"  # the folder beside the database
CHECKPOINT = "checkpoint"  # the name of a run's model
PIPELINE_TAG, PROCESS_TAG, STAGE_TAG = "vatt.pipeline", "vatt.process", "vatt.stage"
PARENT_TAG, DATA_TAG = "mlflow.parentRunId", "vatt.data_hash"
NAME_VARIABLES = (process.RUN_NAME_VARIABLE, "DVC_EXP_NAME")  # `dvc exp run` sets the second
VIEW = "vattctl"  # the name of the view of the table of runs
FETCHED = Path("runs/fetched")  # checkpoints from a server, by address; safe to delete
CHUNK = 100  # params in one call, MLflow's limit
METRICS = 60  # of a pipeline
# Settings that a stage's run shows: those that it reads, and the model that it is about.
SHOWN = {
    "download": ("seed", "data"),
    "preprocess": ("seed", "data", "preprocess"),
    "pretrain": ("seed", "model", "pretrain", "machine"),
    "finetune": ("seed", "model", "machine"),  # and its own task
    "evaluate": ("seed", "model", "evaluate", "machine"),
    "report": ("seed", "report"),
}
SPLITS = {"pretrain": "train", "finetune": "train", "evaluate": "test"}  # that a stage reads
CONTEXTS = {"train": "training", "test": "testing", "all": "preprocessing"}
# MLflow's client would try for minutes, while a training waits: what fails is sent later anyway.
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
QUIET |= {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}

log = logging.getLogger(__name__)


class Run:
    """What a stage logs; in every process but rank 0 it does nothing."""

    def __init__(
        self,
        client: Any,
        run_id: str,
        metrics: MetricLog | None,
        machine: MachineParams,
        record: Record | None = None,
        *,
        line: Line | None = None,
        params: Params | None = None,
    ) -> None:
        self.run_id = run_id
        self.unsent_tags: dict[str, str] = {}
        self._record, self._client, self._metrics = record, client, metrics
        self._machine, self._params = machine, params
        self.line = line or Line(_is_away)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Note metrics of a step; a step that the run already has is not logged again."""
        if self._metrics is not None:
            self._metrics.add(step, metrics)
        if self._record is not None and "power_watts" in metrics:
            self._record.drew(metrics["power_watts"])

    def flush(self) -> None:
        """Return when all metrics are stored, or wait because the store is away."""
        if self._metrics is not None:
            self._metrics.flush()

    def tag(self, name: str, value: str) -> None:
        """Set a tag of the run."""
        if self._client is not None and not self.line.attempt(
            self._client.set_tag, self.run_id, name, value
        ):
            self.unsent_tags[name] = value

    def artifact(self, path: Path) -> None:
        """Store a file or folder with the run; of a large one, only its path."""
        if self._client is None:
            return
        self.tag(f"{path.name}.path", str(path))
        files = [file for file in (path, *path.rglob("*")) if file.is_file()]
        if sum(file.stat().st_size for file in files) / 1e6 > self._machine.max_artifact_mb:
            return
        if path.is_dir():
            self.line.attempt(self._client.log_artifacts, self.run_id, str(path), path.name)
        else:
            self.line.attempt(self._client.log_artifact, self.run_id, str(path))

    def artifacts(self, *paths: Path) -> None:
        """Store several files or folders with the run."""
        for path in paths:
            self.artifact(path)

    def checkpoint(self, folder: Path) -> None:
        """Store a checkpoint as a model, registered; of a large one, only its path and hashes."""
        if self._client is None:
            return
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        self.tag("checkpoint.path", str(folder))
        self.tag("checkpoint.dvc", _dvc_hash(folder, files))
        for file in files:
            name = f"checkpoint.sha256.{file.relative_to(folder)}"
            self.tag(name, _digest(file, "sha256"))
        megabytes = sum(file.stat().st_size for file in files) / 1e6
        if megabytes > self._machine.max_artifact_mb:
            return
        if self._params is not None and (folder / "config.json").is_file():
            self.line.attempt(self._log_model, folder)
        else:
            self.line.attempt(self._client.log_artifacts, self.run_id, str(folder), CHECKPOINT)

    def _log_model(self, folder: Path) -> None:
        from vatt.tracking.models import log_model

        assert self._params is not None
        stage = self._client.get_run(self.run_id).data.tags[STAGE_TAG]
        with _default_store(self._client.tracking_uri):
            log_model(self._client, self.run_id, folder, self._params, stage=stage, name=CHECKPOINT)


@contextmanager
def run(
    stage: str, params: Params, *, stage_hash: str, data_hash: str | None = None
) -> Iterator[Run]:
    """The MLflow run of a stage (`finetune-action-pretrained` for one item of a matrix).

    `stage_hash` stands for the stage's settings, code and inputs: a start with the same hash
    continues a run that did not finish. Leaves the run FINISHED, FAILED or KILLED.
    """
    if distributed.rank() > 0:
        yield Run(None, "", None, params.machine)
        return
    record = Record.read(params.paths.runs / f"{stage}.json")
    line = Line(_is_away)
    opened = _open(stage, params, record.unfinished(stage_hash), (stage_hash, data_hash))
    client, run_id, last = opened or (None, "", {})
    device, devices = distributed.hardware()
    record.begin(stage, run_id, stage_hash, device=device, devices=devices)
    metrics = MetricLog(partial(_send, client, line, run_id), last) if client else None
    made = Run(client, run_id, metrics, params.machine, record, line=line, params=params)
    status = "FAILED"
    try:
        yield made
        status = "FINISHED"
    except (Stopped, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        record.end(status)
        if metrics is not None:
            made.log(record.facts["starts"], {"seconds": record.facts["seconds"]})
            _end(client, made, metrics, params, status)


def _open(
    stage: str, params: Params, known: str | None, hashes: tuple[str, str | None]
) -> tuple[Any, str, dict[str, int]] | None:
    """The store, the run and its last steps; None and a warning when a server is away."""
    try:
        client = _connect(params.machine)
        _look_after(client, params)
        run_id = known if known and _exists(client, known) else None
        run_id = run_id or _create(client, stage, params, hashes)
        _set_running(client, run_id)
        return client, run_id, _last_steps(client, run_id)
    except Exception as error:
        is_away = isinstance(error, MachineError) or _is_away(error)
        if not is_away or not _is_server(store_uri(params.machine)):
            raise
        why = first_line(error)
        log.warning("%s runs without MLflow (see machine.mlflow_uri): %s", stage, why)
        return None


def _end(client: Any, made: Run, metrics: MetricLog, params: Params, status: str) -> None:
    """Store the rest of a run, its state and its pipeline's; keep what the store does not take."""
    line = made.line
    line.try_again()
    tags, made.unsent_tags = made.unsent_tags, {}
    for name, value in tags.items():
        made.tag(name, value)
    unsent = Unsent(made.run_id, metrics.close(), made.unsent_tags, status)
    complete = not unsent.metrics and not unsent.tags
    if complete and line.attempt(client.set_terminated, made.run_id, status):
        line.attempt(_update_pipeline, client, made.run_id, params)
    else:
        file = unsent.keep(params.paths.runs)
        log.warning("MLflow lacks a part of run %s; it is kept in %s", made.run_id, file)


def mark_dead_runs(params: Params) -> list[str]:
    """Mark runs as KILLED when their process on this machine is gone; returns their ids."""
    return _look_after(_connect(params.machine), params)


def _look_after(client: Any, params: Params) -> list[str]:
    """Send what an earlier run could not, and mark dead runs."""
    line = Line(_is_away)
    for unsent in Unsent.kept_in(params.paths.runs):
        if line.attempt(_deliver, client, unsent):
            unsent.forget(params.paths.runs)
            line.attempt(_update_pipeline, client, unsent.run_id, params)
    experiment = _experiment(client, params.machine)
    running = client.search_runs([experiment], "attributes.status = 'RUNNING'")
    dead = [one for one in running if process.is_dead(one.data.tags.get(PROCESS_TAG, ""))]
    for one in dead:
        client.set_terminated(one.info.run_id, "KILLED")
    for path in sorted(params.paths.runs.glob("*.json")):
        Record.read(path).bury()
    return [one.info.run_id for one in dead if PIPELINE_TAG not in one.data.tags]


def _deliver(client: Any, unsent: Unsent) -> None:
    if not _exists(client, unsent.run_id):
        return
    for name, value in unsent.tags.items():
        client.set_tag(unsent.run_id, name, value)
    _log_batch(client, unsent.run_id, unsent.metrics)
    client.set_terminated(unsent.run_id, unsent.status)


# --- reading ------------------------------------------------------------------------------------


def artifact_of(params: Params, run_id: str, stage: str, name: str) -> Path:
    """A folder that a stage's run has kept; `run_id` may be shortened, or be its pipeline's.

    Raises DataError when there is no such run, several, or it kept no such folder.
    """
    client = _connect(params.machine)
    found = _run_of(client, params, run_id, stage).info.run_id
    if name not in {item.path for item in client.list_artifacts(found)}:
        raise DataError(
            f"run {found} has no {name}: it did not end, or was larger than"
            " machine.max_artifact_mb",
            hint=f"give the {name} folder itself",
        )
    return Path(client.download_artifacts(found, name))


def _run_of(client: Any, params: Params, run_id: str, stage: str | None) -> Any:
    """The run of a stage by its id, or the newest of a pipeline, by its id or name.

    Ids may be shortened. Of several pipelines with one name, the newest with such a run counts.
    """
    experiment = _experiment(client, params.machine)
    query = f"tags.`{STAGE_TAG}` = '{stage}'" if stage else ""
    runs = client.search_runs([experiment], query, max_results=10_000)  # newest first
    mine = [one for one in runs if one.info.run_id.startswith(run_id)]
    if not mine:
        query = f"tags.`{STAGE_TAG}` = 'pipeline'"
        above = client.search_runs([experiment], query, max_results=10_000)
        named = {one.info.run_id for one in above if one.info.run_name == run_id}
        parents = [(one, one.data.tags.get(PARENT_TAG, "")) for one in runs]
        mine = [one for one, it in parents if it.startswith(run_id) or it in named][:1]
        if stage is None:  # the pipeline itself
            mine = [one for one in runs if one.info.run_id in named][:1] or mine
    if len(mine) != 1:
        many = f"{len(mine)} runs begin" if mine else f"no {stage or 'stage'} run begins"
        raise DataError(
            f"{many} with '{run_id}'", hint="`vattctl runs` shows the ids and names of pipelines"
        )
    return mine[0]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A pipeline's run: what `vattctl runs` lists."""

    run_id: str
    name: str
    status: str
    began: str  # UTC
    settings: dict[str, str]
    metrics: dict[str, float]


def pipelines(params: Params, *, count: int) -> list[Pipeline]:
    """The last pipelines, newest first."""
    client = _connect(params.machine)
    experiment = _experiment(client, params.machine)
    query = f"tags.`{STAGE_TAG}` = 'pipeline'"
    return [
        Pipeline(
            run_id=one.info.run_id,
            name=one.info.run_name,
            status=one.info.status,
            began=datetime.fromtimestamp(one.info.start_time / 1000, UTC).isoformat(" ", "minutes"),
            settings=dict(one.data.params),
            metrics=dict(one.data.metrics),
        )
        for one in client.search_runs([experiment], query, max_results=count)
    ]


def settings_behind(params: Params, run_id: str) -> dict[str, str]:
    """All settings of the pipeline that an evaluation belongs to; empty for runs before 0.2."""
    client = _connect(params.machine)
    parent = _run_of(client, params, run_id, "evaluate").data.tags[PARENT_TAG]
    return dict(client.get_run(parent).data.params)


def checkpoint_of(params: Params, address: str) -> Path:
    """The folder of a checkpoint named `runs:/RUN`, `models:/NAME/VERSION` or `models:/NAME@ALIAS`.

    A run may be that of a training or its pipeline's (then the pre-training counts), shortened.
    """
    from mlflow import artifacts
    from mlflow.exceptions import MlflowException

    client, uri = _connect(params.machine), store_uri(params.machine)
    if address.startswith("runs:/"):
        run_id, _, path = address.removeprefix("runs:/").partition("/")
        trained = _run_of(client, params, run_id, None)
        address = f"runs:/{trained.info.run_id}/{path or CHECKPOINT}"
        if trained.data.tags[STAGE_TAG] == "pipeline":
            trained = _run_of(client, params, run_id, "pretrain")
            address = f"runs:/{trained.info.run_id}/{path or CHECKPOINT}"
    place = FETCHED / re.sub(r"[^\w.-]+", "-", address.partition(":/")[2].strip("/"))
    is_fixed = address.startswith("runs:/") or address.rpartition("/")[2].isdecimal()
    if is_fixed and (place / "model.safetensors").is_file():
        return place.absolute()
    FETCHED.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FETCHED) as work:
        wanted = Path(work) / "model"
        wanted.mkdir()
        try:
            with _default_store(uri):
                kept = artifacts.download_artifacts(address, dst_path=str(wanted), tracking_uri=uri)
        except (MlflowException, OSError) as error:
            raise DataError(
                f"{address} cannot be read: {first_line(error)}",
                hint="`vattctl runs` lists runs, `vattctl ui` the models",
            ) from None
        if not (Path(kept) / "model.safetensors").is_file():
            raise DataError(
                f"{address} holds no checkpoint",
                hint="name a pretrain or finetune run, whose model was not larger than"
                " machine.max_artifact_mb",
            )
        shutil.rmtree(place, ignore_errors=True)
        Path(kept).rename(place)
    return place.absolute()


def runs_page(params: Params) -> str:
    """The address of this project's pipelines within MLflow's page, sorted, with their columns.

    MLflow keeps a view of its table of runs as a tag of the experiment.
    """
    client = _connect(params.machine)
    experiment = _experiment(client, params.machine)
    query = f"tags.`{STAGE_TAG}` = 'pipeline'"
    names = {
        name: None
        for one in client.search_runs([experiment], query, max_results=20)
        for name in one.data.metrics
    }
    shown = [*filter(names.__contains__, ("text_to_video.recall_at_10",))]
    shown += [name for name in names if name.endswith("svm.accuracy")][:1]
    shown += [name for name in names if name.endswith(("-pretrained.top_1", ".mean_ap"))][:2]
    columns = [f"params.`{name}`" for name in ("model.video.size", "model.backbone")]
    columns += [f"metrics.`{name}`" for name in [*shown, "seconds"]]
    view = {
        "searchFilter": "", "orderByKey": "attributes.start_time", "orderByAsc": False,
        "startTime": "ALL", "lifecycleFilter": "Active", "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [f"tags.`{STAGE_TAG}`", *columns, "attributes.`Duration`"],
    }  # fmt: skip
    client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{VIEW}", json.dumps(view))
    return f"#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"


def metric_values(params: Params, run_id: str, name: str) -> list[float]:
    """A run's metric at all its steps, in their order; empty for an unknown run."""
    client = _connect(params.machine)
    if not _exists(client, run_id):
        return []
    return [metric.value for metric in client.get_metric_history(run_id, name)]


def store_uri(machine: MachineParams) -> str:
    """The tracking store; a relative sqlite path counts from the project's root."""
    scheme = "sqlite:///"
    uri = machine.mlflow_uri
    if not uri.startswith(scheme) or uri.startswith(scheme + "/"):
        return uri
    return scheme + str((_project_root() / uri.removeprefix(scheme)).resolve())


@contextmanager
def _default_store(uri: str) -> Iterator[None]:
    """Make this MLflow's default store for a moment: MLflow looks up `models:/...` there only.

    Without it that store is mlflow.db in the working folder, a wrong one in an experiment.
    """
    import mlflow

    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # None: as if never set


def _connect(machine: MachineParams) -> Any:
    os.environ |= QUIET
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("models", "pyfunc", "utils.environment"):  # advice on a model's folder
        logging.getLogger(f"mlflow.{name}").setLevel(logging.ERROR)
    # It prints the traceback of an error that it raises, too: a full disk, a locked database.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    uri = store_uri(machine)
    try:
        with _one_at_a_time(uri):  # two that make the same new database spoil it
            _make_database(uri)
            _keep_artifacts_beside(uri)
            client = MlflowClient(uri)
            _experiment(client, machine)
    except (MlflowException, OSError, sqlite3.Error, SQLAlchemyError) as error:
        if process.stop_under(error) is not None:
            raise
        raise MachineError(
            f"the MLflow store does not answer: {error}", hint="look at machine.mlflow_uri"
        ) from None
    return client


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://", "databricks"))


def _is_away(error: Exception) -> bool:
    """Whether a store failed, not this program; a signal that a library took for that is none."""
    import requests
    from mlflow.exceptions import MlflowException

    away: tuple[type, ...] = (MlflowException, requests.RequestException, ConnectionError)
    if "botocore" in sys.modules:  # where artifacts are in S3
        from botocore.exceptions import BotoCoreError, ClientError

        away += (BotoCoreError, ClientError)
    return isinstance(error, (*away, TimeoutError)) and process.stop_under(error) is None


def _experiment(client: Any, machine: MachineParams) -> str:
    name = machine.experiment
    known = client.get_experiment_by_name(name)
    if known is not None:
        return known.experiment_id
    uri = store_uri(machine)
    location = _artifacts_of(uri, name) if uri.startswith("sqlite:///") else None
    return client.create_experiment(name, artifact_location=location)


def _artifacts_of(uri: str, experiment: str) -> str:
    """Where an experiment's artifacts are: beside the database."""
    return (Path(uri.removeprefix("sqlite:///")).parent / ARTIFACTS / experiment).as_uri()


def _create(client: Any, stage: str, params: Params, hashes: tuple[str, str | None]) -> str:
    """A run of a stage with its hash and that of its data, its settings, data set and parent."""
    experiment, (stage_hash, data_hash) = _experiment(client, params.machine), hashes
    tags = {STAGE_TAG: stage, "vatt.stage_hash": stage_hash, **_git_tags()}
    if data_hash is not None:
        tags[DATA_TAG] = data_hash
    tags[PARENT_TAG] = _parent(client, experiment, params)
    run_id: str = client.create_run(experiment, run_name=stage, tags=tags).info.run_id
    kind, _, variant = stage.partition("-")
    sections = params.model_dump(mode="json", exclude=SECRET)
    shown = {name: sections[name] for name in SHOWN.get(kind, sections)}
    task = variant.rpartition("-")[0]
    if kind == "finetune" and task in sections["finetune"]["tasks"]:
        shown["finetune"] = {"tasks": {task: sections["finetune"]["tasks"][task]}}
    _log_params(client, run_id, shown)
    if data_hash is not None:
        for one in (run_id, tags[PARENT_TAG]):
            _log_data(client, one, kind, params, data_hash)
    return run_id


def _log_params(client: Any, run_id: str, sections: dict[str, Any]) -> None:
    from mlflow.entities import Param

    entities = [
        Param(key, redact(_readable(value), every_query=True)[:6000])
        for key, value in flatten(sections).items()
    ]
    for start in range(0, len(entities), CHUNK):
        client.log_batch(run_id, params=entities[start : start + CHUNK])


def _readable(value: Any) -> str:
    """`specific`, `0.0008`, `[4, 16, 16]`, `null`."""
    return value if isinstance(value, str) and value else json.dumps(value)


def _log_data(client: Any, run_id: str, kind: str, params: Params, data_hash: str) -> None:
    """The clips that a stage reads, as a data set of MLflow: its name, hash, size and use."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source, shards = params.data.source, params.paths.shards
    split, place = SPLITS.get(kind, "all"), shards
    if split == "all":
        counts, place = _listed_clips(params), params.paths.manifest
    else:
        counts = splits_of(shards) if (shards / INDEX).exists() else {}
    made_of = "+".join(params.data.mix or ()) if source == "mix" else str(source)
    profile = json.dumps({"clips": counts.get(split), "split": split})
    known = Dataset(
        f"{made_of}/{split}",
        data_hash[:16],
        "local",
        json.dumps({"uri": str(place)}),
        profile=profile,
    )
    context = InputTag("mlflow.data.context", CONTEXTS[split])
    client.log_inputs(run_id, [DatasetInput(known, [context])])


def _listed_clips(params: Params) -> dict[str, int]:
    try:
        text = (params.paths.metrics / "download.json").read_text(encoding="utf-8")
        return {"all": json.loads(text)["corpus"]["clips"]}
    except UNREADABLE:
        return {}


def _send(client: Any, line: Line, run_id: str, measured: list[MetricValue]) -> bool:
    """Store metrics; False when the store is away, which must not end a training."""
    return line.attempt(_log_batch, client, run_id, measured)


def _log_batch(client: Any, run_id: str, measured: list[MetricValue]) -> None:
    from mlflow.entities import Metric

    metrics = [Metric(one.name, one.value, one.milliseconds, one.step) for one in measured]
    for start in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[start : start + 1000])


def _last_steps(client: Any, run_id: str) -> dict[str, int]:
    names = client.get_run(run_id).data.metrics
    return {
        name: max(metric.step for metric in client.get_metric_history(run_id, name))
        for name in names
    }


def _parent(client: Any, experiment: str, params: Params) -> str:
    """The run that groups the stages of one pipeline: those made from equal settings."""
    sections = params.model_dump(mode="json", exclude={"machine"})
    pipeline = fingerprint(sections)
    found = client.search_runs([experiment], f"tags.`{PIPELINE_TAG}` = '{pipeline}'")
    wanted = next((os.environ[one] for one in NAME_VARIABLES if os.environ.get(one)), None)
    if found:
        run_id = str(found[0].info.run_id)
        if wanted is not None and wanted != found[0].info.run_name:
            client.update_run(run_id, name=wanted)
        return run_id
    tags = {PIPELINE_TAG: pipeline, STAGE_TAG: "pipeline", **_git_tags()}
    name = wanted or f"{Path.cwd().name} {pipeline[:8]}"  # a stage runs in its project's folder
    run_id = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    del sections["paths"], sections["report"]
    finetune = sections["finetune"]
    finetune["tasks"] = {name: finetune["tasks"][name] for name in finetune["run"]}
    _log_params(client, run_id, sections)
    return run_id


def _set_running(client: Any, run_id: str) -> None:
    """A run and its pipeline; both belong to this process, and are KILLED when it dies."""
    parent = client.get_run(run_id).data.tags.get(PARENT_TAG)
    for one in filter(None, (run_id, parent)):
        client.update_run(one, status="RUNNING")
        client.set_tag(one, PROCESS_TAG, process.myself())


def _update_pipeline(client: Any, run_id: str, params: Params) -> None:
    """Give a pipeline the worst state of its stages' last runs, and their main metrics."""
    own = client.get_run(run_id)
    parent = own.data.tags.get(PARENT_TAG)
    if parent is None:
        return
    query = f"tags.`{PARENT_TAG}` = '{parent}'"
    last: dict[str, Any] = {}
    for one in client.search_runs([own.info.experiment_id], query):  # newest first
        last.setdefault(one.data.tags[STAGE_TAG], one)
    worst = max((one.info.status for one in last.values()), key=STATES.index)
    for stage in _stages_of(params):  # not run again because nothing that they need has changed
        record = Record.read(params.paths.runs / f"{stage}.json").facts
        is_done = stage not in last and record.get("status") == "FINISHED"
        if is_done and _exists(client, record.get("run_id")):
            last[stage] = client.get_run(record["run_id"])
        if stage == own.data.tags[STAGE_TAG]:
            break
    now = own.info.end_time or own.info.start_time
    found = _main_metrics(last).items()
    _log_batch(client, parent, [MetricValue(name, value, now, 0) for name, value in found])
    client.set_terminated(parent, worst)


STATES = ("FINISHED", "SCHEDULED", "KILLED", "FAILED", "RUNNING")  # from good to bad


def _stages_of(params: Params) -> list[str]:
    tuned = [f"finetune-{task}-{init}" for task in params.finetune.run
             for init in params.finetune.init]  # fmt: skip
    return ["download", "preprocess", "pretrain", *tuned, "evaluate", "report"]


def _main_metrics(stages: Mapping[str, Any]) -> dict[str, float]:
    """All of the evaluation, the last loss of each training, the seconds of all stages."""
    metrics = {stage: dict(one.data.metrics) for stage, one in stages.items()}
    seconds = {"seconds": sum(found.pop("seconds", 0.0) for found in metrics.values())}
    found = seconds | metrics.get("evaluate", {})
    for stage in sorted(metrics, key=lambda name: name != "pretrain"):
        if "loss" in metrics[stage]:
            found[f"{stage}.loss"] = metrics[stage]["loss"]
    return dict(islice(found.items(), METRICS))


def _exists(client: Any, run_id: str | None) -> bool:
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return False
    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException:
        return False


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    if not uri.startswith("sqlite:///"):
        yield
        return
    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f".{database.name}.lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _make_database(uri: str) -> None:
    """Make a new SQLite store under another name: a kill would leave half of MLflow's tables.

    Such a half is made again, too; it fails for ever. Errors of SQLite come at once, where MLflow
    would try again for minutes.
    """
    if not uri.startswith("sqlite:///"):
        return
    from mlflow import MlflowClient

    path = Path(uri.removeprefix("sqlite:///"))
    for leftover in path.parent.glob(f".{path.name}.*.tmp*"):
        leftover.unlink(missing_ok=True)
    if path.exists():
        with closing(sqlite3.connect(path)) as database:
            names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            tables = {name for (name,) in names.fetchall()} - EMPTY_TABLES
            if any(database.execute(f'SELECT 1 FROM "{name}" LIMIT 1').fetchone()
                   for name in sorted(tables)):  # fmt: skip
                return
    with atomic_write(path) as temporary:
        MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)


EMPTY_TABLES = {"alembic_version", "workspaces"}  # with rows of MLflow's own, before any experiment


def _keep_artifacts_beside(uri: str) -> None:
    """Where a project was copied or moved, lead its experiments to the artifacts that came along.

    MLflow stores absolute places only: without this, a copy writes into the original.
    """
    if not uri.startswith("sqlite:///"):
        return
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database, database:
        if not database.execute("PRAGMA table_info(experiments)").fetchall():
            return
        known = database.execute("SELECT experiment_id, name, artifact_location FROM experiments")
        for number, name, old in known.fetchall():
            new = _artifacts_of(uri, name)
            ours = f"/{ARTIFACTS}/{new.rpartition('/')[2]}"
            if old == new or not str(old).endswith(ours) or _is_same_folder(old, new):
                continue
            for table, column in PLACES.items():
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                    f" WHERE substr({column}, 1, ?) = ?",
                    (new, len(old) + 1, len(old) + 1, f"{old}/"),
                )
            database.execute(
                "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?",
                (new, number),
            )


PLACES = {  # tables and columns that name folders below an experiment's
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}


def _is_same_folder(one: str, other: str) -> bool:
    """Whether two addresses are one folder, as where two machines mount it differently."""
    first, second = (Path(url2pathname(urlsplit(uri).path)) for uri in (one, other))
    try:
        return first.samefile(second)
    except OSError:
        return False


def _git_tags() -> dict[str, str]:
    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    except FileNotFoundError:
        return {}
    return (
        {} if not commit else {"mlflow.source.git.commit": commit, "vatt.dirty": str(bool(changes))}
    )


def _project_root() -> Path:
    """The working folder; for an experiment that DVC runs in a copy, the folder it copied."""
    here = Path.cwd()
    return next((p.parent for p in (here, *here.parents) if p.name == ".dvc"), here)


def _dvc_hash(folder: Path, files: list[Path]) -> str:
    """The hash by which DVC will know this folder."""
    entries = [
        {"md5": _digest(file, "md5"), "relpath": file.relative_to(folder).as_posix()}
        for file in files
    ]
    entries.sort(key=lambda entry: tuple(entry["relpath"].split("/")))
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() + ".dir"


def _digest(file: Path, algorithm: str) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, algorithm).hexdigest()
