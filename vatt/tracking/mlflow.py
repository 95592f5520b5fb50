"""What happened, in MLflow: one run a stage, written by rank 0, continued when the stage resumes.

Runs with equal settings (except `machine`) are children of one parent run.
"""

import fcntl
import hashlib
import json
import logging
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from vatt import process
from vatt.config import MachineParams, Params, fingerprint
from vatt.errors import DataError, MachineError, Stopped, redact
from vatt.tracking.records import MetricLog, MetricValue, Record
from vatt.training import distributed
from vatt.training.state import flatten

SECRET = {"machine": {"proxy", "cookies", "mlflow_uri"}}  # may hold secrets
ARTIFACTS = "mlartifacts"  # the folder beside the database
PIPELINE_TAG, PROCESS_TAG = "vatt.pipeline", "vatt.process"
CHUNK = 100  # params in one call, MLflow's limit

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
    ) -> None:
        self.run_id = run_id
        self._record = record
        self._client = client
        self._metrics = metrics
        self._machine = machine

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Note metrics of a step; a step that the run already has is not logged again."""
        if self._metrics is not None:
            self._metrics.add(step, metrics)
        if self._record is not None and "power_watts" in metrics:
            self._record.drew(metrics["power_watts"])

    def flush(self) -> None:
        """Return when all metrics are stored."""
        if self._metrics is not None:
            self._metrics.flush()

    def tag(self, name: str, value: str) -> None:
        """Set a tag of the run."""
        if self._client is not None:
            self._client.set_tag(self.run_id, name, value)

    def artifact(self, path: Path) -> None:
        """Store a file or folder with the run; of a large one, only its path."""
        if self._client is None:
            return
        self._client.set_tag(self.run_id, f"{path.name}.path", str(path))
        files = [file for file in (path, *path.rglob("*")) if file.is_file()]
        if sum(file.stat().st_size for file in files) / 1e6 > self._machine.max_artifact_mb:
            return
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), path.name)
        else:
            self._client.log_artifact(self.run_id, str(path))

    def checkpoint(self, folder: Path) -> None:
        """Store a checkpoint with the run; of a large one, only its path and hashes."""
        if self._client is None:
            return
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        client, run_id = self._client, self.run_id
        client.set_tag(run_id, "checkpoint.path", str(folder))
        client.set_tag(run_id, "checkpoint.dvc", _dvc_hash(folder, files))
        for file in files:
            name = f"checkpoint.sha256.{file.relative_to(folder)}"
            client.set_tag(run_id, name, _digest(file, "sha256"))
        megabytes = sum(file.stat().st_size for file in files) / 1e6
        if megabytes <= self._machine.max_artifact_mb:
            client.log_artifacts(run_id, str(folder), "checkpoint")


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
    mark_dead_runs(params)
    client = _connect(params.machine)
    record = Record.read(params.paths.runs / f"{stage}.json")
    run_id = record.unfinished(stage_hash)
    if run_id is None or not _exists(client, run_id):
        run_id = _create(client, stage, params, stage_hash, data_hash)
    client.update_run(run_id, status="RUNNING")
    client.set_tag(run_id, PROCESS_TAG, process.myself())
    device, devices = distributed.hardware()
    record.begin(stage, run_id, stage_hash, device=device, devices=devices)
    metrics = MetricLog(partial(_send, client, run_id), _last_steps(client, run_id))
    status = "FAILED"
    try:
        yield Run(client, run_id, metrics, params.machine, record)
        status = "FINISHED"
    except (Stopped, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        metrics.close()
        client.set_terminated(run_id, status)
        record.end(status)


def mark_dead_runs(params: Params) -> list[str]:
    """Mark runs as KILLED when their process on this machine is gone; returns their ids."""
    client = _connect(params.machine)
    experiment = _experiment(client, params.machine.experiment, params.machine)
    running = client.search_runs([experiment], "attributes.status = 'RUNNING'")
    dead = [one for one in running if process.is_dead(one.data.tags.get(PROCESS_TAG, ""))]
    for one in dead:
        client.set_terminated(one.info.run_id, "KILLED")
    for path in sorted(params.paths.runs.glob("*.json")):
        Record.read(path).bury()
    return [one.info.run_id for one in dead]


def artifact_of(params: Params, run_id: str, stage: str, name: str) -> Path:
    """A folder that a stage's run has kept; `run_id` may be shortened, or be its pipeline's.

    Raises DataError when there is no such run, several, or it kept no such folder.
    """
    client = _connect(params.machine)
    experiment = _experiment(client, params.machine.experiment, params.machine)
    runs = client.search_runs([experiment], f"tags.`vatt.stage` = '{stage}'", max_results=10_000)
    mine = [one for one in runs if one.info.run_id.startswith(run_id)]
    mine = (
        mine
        or [one for one in runs if one.data.tags.get("mlflow.parentRunId", "").startswith(run_id)][
            :1
        ]
    )  # newest first
    if len(mine) != 1:
        many = f"{len(mine)} runs begin" if mine else f"no {stage} run begins"
        raise DataError(
            f"{many} with '{run_id}'", hint="`vattctl status` and `vattctl ui` show the runs' ids"
        )
    if name not in {found.path for found in client.list_artifacts(mine[0].info.run_id)}:
        raise DataError(
            f"run {mine[0].info.run_id} has no {name}: it did not end, or was larger than"
            " machine.max_artifact_mb",
            hint=f"give the {name} folder itself",
        )
    return Path(client.download_artifacts(mine[0].info.run_id, name))


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


def _connect(machine: MachineParams) -> Any:
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = store_uri(machine)
    try:
        with _one_at_a_time(uri):  # two that make the same new database spoil it
            _check_database(uri)
            _keep_artifacts_beside(uri)
            client = MlflowClient(uri)
            _experiment(client, machine.experiment, machine)
    except (MlflowException, OSError, sqlite3.Error) as error:
        raise MachineError(
            f"the MLflow store does not answer: {error}", hint="look at machine.mlflow_uri"
        ) from None
    return client


def _experiment(client: Any, name: str, machine: MachineParams) -> str:
    known = client.get_experiment_by_name(name)
    if known is not None:
        return known.experiment_id
    uri = store_uri(machine)
    location = _artifacts_of(uri, name) if uri.startswith("sqlite:///") else None
    return client.create_experiment(name, artifact_location=location)


def _artifacts_of(uri: str, experiment: str) -> str:
    """Where an experiment's artifacts are: beside the database."""
    return (Path(uri.removeprefix("sqlite:///")).parent / ARTIFACTS / experiment).as_uri()


def _create(client: Any, stage: str, params: Params, stage_hash: str, data_hash: str | None) -> str:
    from mlflow.entities import Param

    experiment = _experiment(client, params.machine.experiment, params.machine)
    tags = {"vatt.stage": stage, "vatt.stage_hash": stage_hash, **_git_tags()}
    if data_hash is not None:
        tags["vatt.data_hash"] = data_hash
    tags["mlflow.parentRunId"] = _parent(client, experiment, params)
    run_id: str = client.create_run(experiment, run_name=stage, tags=tags).info.run_id
    flat = flatten(params.model_dump(mode="json", exclude=SECRET))
    entities = [
        Param(key, redact(json.dumps(value), every_query=True)[:6000])
        for key, value in flat.items()
    ]
    for start in range(0, len(entities), CHUNK):
        client.log_batch(run_id, params=entities[start : start + CHUNK])
    return run_id


def _send(client: Any, run_id: str, measured: list[MetricValue]) -> bool:
    """Store metrics; False when the store is away, which must not end a training."""
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    metrics = [Metric(one.name, one.value, one.milliseconds, one.step) for one in measured]
    try:
        client.log_batch(run_id, metrics=metrics)
    except MlflowException as error:
        log.warning("MLflow does not answer; metrics wait in memory: %s", error)
        return False
    return True


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
    if found:
        return found[0].info.run_id
    tags = {PIPELINE_TAG: pipeline, **_git_tags()}
    name = f"{Path.cwd().name} {pipeline[:8]}"  # a stage runs in the folder of its project
    made = client.create_run(experiment, run_name=name, tags=tags)
    client.set_terminated(made.info.run_id)  # a group has no process that could die
    return made.info.run_id


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


def _check_database(uri: str) -> None:
    """Fail at once where MLflow would try again for minutes."""
    if uri.startswith("sqlite:///"):
        with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
            database.execute("PRAGMA schema_version")


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
            database.execute(
                "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?)"
                " WHERE experiment_id = ? AND substr(artifact_uri, 1, ?) = ?",
                (new, len(old) + 1, number, len(old) + 1, f"{old}/"),
            )
            database.execute(
                "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?",
                (new, number),
            )


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
