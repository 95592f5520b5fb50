"""What MLflow holds after stages that end well, fail, are stopped, killed or resumed."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from tests.training import tiny
from vatt import process
from vatt.errors import DataError, MachineError, Stopped
from vatt.tracking import mlflow
from vatt.tracking.records import MetricLog

ROOT = Path(__file__).parents[2]
PARAMS = tiny.DEMO


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A store made once: a new database takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        mlflow.mark_dead_runs(PARAMS)
    return folder / "mlflow.db"


@pytest.fixture
def project(database, tmp_path, monkeypatch):
    """A project's root with its own experiment in the store; the settings to use in it."""
    monkeypatch.chdir(tmp_path)
    machine = {"mlflow_uri": f"sqlite:///{database}", "experiment": tmp_path.name}
    return with_machine(PARAMS, **machine)


def with_machine(params, **changes):
    return params.model_copy(update={"machine": params.machine.model_copy(update=changes)})


def client_of(params):
    from mlflow import MlflowClient

    return MlflowClient(mlflow.store_uri(params.machine))


def record(stage="pretrain"):
    return json.loads((PARAMS.paths.runs / f"{stage}.json").read_text())


def steps(client, run_id, name="loss"):
    return [metric.step for metric in client.get_metric_history(run_id, name)]


def test_a_finished_run_holds_params_metrics_hashes_and_its_checkpoint(project, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    with mlflow.run("pretrain", project, stage_hash="h", data_hash="d") as run:
        for step in range(1, 4):
            run.log(step, {"loss": 1 / step, "nce": float("nan")})
        run.log(0, {"recall_at_10": 0.5})
        run.checkpoint(folder)
    client = client_of(project)
    stored = client.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert steps(client, run.run_id) == [1, 2, 3]
    assert stored.data.metrics["recall_at_10"] == 0.5
    assert "nce" not in stored.data.metrics
    assert stored.data.params["pretrain.optimizer.learning_rate"] == "0.0008"
    assert stored.data.params["model.video.patch"] == "[4, 16, 16]"
    assert stored.data.tags["vatt.stage_hash"] == "h"
    assert stored.data.tags["vatt.data_hash"] == "d"
    assert [a.path for a in client.list_artifacts(run.run_id, "checkpoint")] == [
        "checkpoint/model.safetensors"
    ]
    facts = record()
    assert facts["run_id"] == run.run_id and facts["status"] == "FINISHED"
    assert facts["seconds"] >= 0 and facts["began"] <= facts["ended"]


def test_a_large_checkpoint_is_named_not_copied(project, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    params = with_machine(project, max_artifact_mb=0)
    with mlflow.run("pretrain", params, stage_hash="h") as run:
        run.checkpoint(folder)
    client = client_of(params)
    tags = client.get_run(run.run_id).data.tags
    assert client.list_artifacts(run.run_id) == []
    assert tags["checkpoint.path"] == str(folder)
    expected = hashlib.sha256(b"weights").hexdigest()
    assert tags["checkpoint.sha256.model.safetensors"] == expected
    assert tags["checkpoint.dvc"].endswith(".dir")


@pytest.mark.parametrize(
    ("error", "status"),
    [(Stopped("x"), "KILLED"), (KeyboardInterrupt(), "KILLED"), (RuntimeError("x"), "FAILED")],
)
def test_the_status_tells_how_it_ended_and_a_rerun_continues(project, error, status):
    with (
        pytest.raises(type(error)),
        mlflow.run("pretrain", project, stage_hash="h") as run,
    ):
        run.log(1, {"loss": 1.0})
        run.log(2, {"loss": 0.5})
        raise error
    client = client_of(project)
    assert client.get_run(run.run_id).info.status == status
    assert record()["status"] == status
    with mlflow.run("pretrain", project, stage_hash="h") as again:
        for step in range(2, 5):  # the state was from before step 2
            again.log(step, {"loss": 1 / step})
    assert again.run_id == run.run_id
    assert steps(client, run.run_id) == [1, 2, 3, 4]
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert record()["starts"] == 2


def test_another_hash_or_a_finished_run_begins_a_new_one(project):
    ids = []
    for stage_hash in ("h", "h", "other"):
        with mlflow.run("pretrain", project, stage_hash=stage_hash) as run:
            ids.append(run.run_id)
    assert len(set(ids)) == 3


def test_stages_of_equal_settings_hang_under_one_parent_whatever_the_machine(project):
    parents = []
    more = with_machine(project, workers=7, zero_stage=3)
    other = project.model_copy(update={"seed": 5})
    for stage, params in (("pretrain", project), ("evaluate", more), ("evaluate", other)):
        with mlflow.run(stage, params, stage_hash=stage) as run:
            tags = client_of(params).get_run(run.run_id).data.tags
            parents.append(tags["mlflow.parentRunId"])
    assert parents[0] == parents[1] != parents[2]
    parent = client_of(project).get_run(parents[0]).info
    assert parent.status == "FINISHED"
    assert parent.run_name.startswith(f"{Path.cwd().name} ")  # tells one experiment from another


def test_a_killed_process_s_run_is_marked_killed(project):
    code = (
        "import sys, time, yaml; from vatt.config import parse_params; from vatt.tracking import "
        "mlflow; from pathlib import Path\n"
        "params = parse_params(yaml.safe_load(sys.stdin.read()), source=Path('stdin'))\n"
        "with mlflow.run('pretrain', params, stage_hash='h') as run:\n"
        "    run.log(1, {'loss': 1.0}); run.flush(); print(run.run_id, flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    process.stdin.write(json.dumps(project.model_dump(mode="json")))
    process.stdin.close()
    run_id = process.stdout.readline().strip()
    assert mlflow.mark_dead_runs(project) == []
    process.kill()
    process.wait()
    assert record()["status"] == "RUNNING"
    assert mlflow.mark_dead_runs(project) == [run_id]
    assert client_of(project).get_run(run_id).info.status == "KILLED"
    assert record()["status"] == "KILLED"
    with mlflow.run("pretrain", project, stage_hash="h") as again:
        again.log(1, {"loss": 1.0})
        again.log(2, {"loss": 1.0})
    assert again.run_id == run_id
    assert steps(client_of(project), run_id) == [1, 2]


def test_no_secret_reaches_the_store(project):
    params = with_machine(project, proxy="http://me:hunter2@proxy", cookies=Path("/cookies"))
    with mlflow.run("pretrain", params, stage_hash="h") as run:
        pass
    stored = client_of(params).get_run(run.run_id).data
    assert "hunter2" not in str(stored.params) + str(stored.tags)
    assert "machine.proxy" not in stored.params


def test_a_relative_store_lies_in_the_project_s_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    machine = tiny.machine_params(mlflow_uri="sqlite:///mlflow.db")
    assert mlflow.store_uri(machine) == f"sqlite:///{tmp_path}/mlflow.db"
    copied = tmp_path / ".dvc" / "tmp" / "exps" / "tmp1"
    copied.mkdir(parents=True)
    monkeypatch.chdir(copied)
    assert mlflow.store_uri(machine) == f"sqlite:///{tmp_path}/mlflow.db"
    for uri in ("sqlite:////data/mlflow.db", "http://127.0.0.1:5000"):
        assert mlflow.store_uri(tiny.machine_params(mlflow_uri=uri)) == uri


MAKE = "import sys; from vatt.tracking import mlflow; mlflow._make_database(sys.argv[1])"


def maker(uri: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", MAKE, uri], cwd=ROOT)


def experiments(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as database:
        (count,) = database.execute("SELECT count(*) FROM experiments").fetchone()
    return int(count)


def test_a_kill_while_the_database_is_made_leaves_none_and_the_next_start_makes_it(tmp_path):
    path = tmp_path / "mlflow.db"
    with maker(f"sqlite:///{path}") as first:
        while not any(part.stat().st_size > 2**16 for part in tmp_path.glob(".mlflow.db.*.tmp")):
            assert first.poll() is None
            time.sleep(0.005)
        first.kill()
    assert not path.exists()
    with maker(f"sqlite:///{path}") as second:
        assert second.wait() == 0
    assert experiments(path) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["mlflow.db"]


def test_half_a_database_is_made_again_and_others_are_left_alone(tmp_path):
    uri, path = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "mlflow.db"
    mlflow._make_database(uri)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        for change in ("DELETE FROM experiments", "DELETE FROM alembic_version", "DROP TABLE runs"):
            database.execute(change)  # as if killed amid the first migrations
    half = tmp_path / "half.db"
    shutil.copy(path, half)
    with pytest.raises(SQLAlchemyError, match="duplicate column"):
        MlflowClient(f"sqlite:///{half}").search_experiments()
    mlflow._make_database(uri)
    assert experiments(path) == 1
    whole = path.read_bytes()
    mlflow._make_database(uri)
    assert path.read_bytes() == whole
    with contextlib.closing(sqlite3.connect(tmp_path / "own.db")) as database, database:
        database.execute("CREATE TABLE own (name TEXT)")
        database.execute("INSERT INTO own VALUES ('kept')")
    own = (tmp_path / "own.db").read_bytes()
    mlflow._make_database(f"sqlite:///{tmp_path / 'own.db'}")
    assert (tmp_path / "own.db").read_bytes() == own


def test_a_store_that_cannot_be_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.db").mkdir()
    with (
        pytest.raises(MachineError, match=r"machine\.mlflow_uri"),
        mlflow.run("pretrain", PARAMS, stage_hash="h"),
    ):
        pass


def test_metrics_wait_while_the_store_is_away():
    away, stored = [True], []

    def send(batch):
        if not away[0]:
            stored.extend((one.name, one.step) for one in batch)
        return not away[0]

    metrics = MetricLog(send, {"loss": 1})
    metrics.add(1, {"loss": 1.0, "nce": 1.0})
    metrics.flush()
    metrics.add(2, {"loss": 1.0})
    away[0] = False
    metrics.close()
    assert stored == [("nce", 1), ("loss", 2)]


def test_a_process_is_dead_once_it_is_gone_or_its_number_is_another_s():
    assert not process.is_dead(process.myself())
    host, pid, started = json.loads(process.myself())
    assert process.is_dead(json.dumps([host, pid, started - 100]))
    assert not process.is_dead(json.dumps(["elsewhere", pid, started - 100]))
    assert not process.is_dead("")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = json.dumps([host, child.pid, time.time()])
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert process.is_dead(name)


def test_what_a_stage_kept_is_found_by_the_runs_or_the_pipelines_id(project, tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "arrays.npz").write_bytes(b"arrays")
    with mlflow.run("evaluate", project, stage_hash="1") as run:
        run.artifact(folder)
    parent = client_of(project).get_run(run.run_id).data.tags["mlflow.parentRunId"]
    name = client_of(project).get_run(parent).info.run_name
    for known_as in (run.run_id, run.run_id[:8], parent, name):
        found = mlflow.artifact_of(project, known_as, "evaluate", "evaluation")
        assert (found / "arrays.npz").read_bytes() == b"arrays"
    assert mlflow.settings_behind(project, name)["pretrain.steps"]
    with pytest.raises(DataError, match="no evaluate run begins with 'zz'"):
        mlflow.artifact_of(project, "zz", "evaluate", "evaluation")


def test_what_is_too_large_to_keep_is_named_by_its_place(project, tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "arrays.npz").write_bytes(bytes(2_000_000))
    small = with_machine(project, max_artifact_mb=1)
    with mlflow.run("evaluate", small, stage_hash="1") as run:
        run.artifact(folder)
    assert client_of(project).get_run(run.run_id).data.tags["evaluation.path"] == str(folder)
    with pytest.raises(DataError, match="has no evaluation"):
        mlflow.artifact_of(small, run.run_id, "evaluate", "evaluation")


@pytest.mark.parametrize("moved", [False, True])
def test_a_copied_or_moved_project_keeps_its_artifacts_to_itself(
    database, tmp_path, monkeypatch, moved
):
    first, second = tmp_path / "first", tmp_path / "second one"
    params = with_machine(PARAMS, mlflow_uri="sqlite:///mlflow.db")

    def log_artifact(folder, text):
        monkeypatch.chdir(folder)
        Path("kept").mkdir(exist_ok=True)
        Path("kept", "note").write_text(text)
        with mlflow.run("pretrain", params, stage_hash=text) as run:
            run.artifact(Path("kept"))
        return run.run_id

    first.mkdir()
    shutil.copy(database, first)
    old = log_artifact(first, "old")
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    shutil.copytree(first, second)
    if moved:
        first.rename(tmp_path / "gone")
    new = log_artifact(second, "new")
    assert (mlflow.artifact_of(params, new, "pretrain", "kept") / "note").read_text() == "new"
    assert (mlflow.artifact_of(params, old, "pretrain", "kept") / "note").read_text() == "old"
    for run_id in (old, new):
        assert client_of(params).get_run(run_id).info.artifact_uri.startswith(second.as_uri())
    if moved:
        assert not first.exists()
    else:
        assert before == {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}


def test_artifacts_of_an_experiment_that_lies_elsewhere_stay_there(database, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(database, tmp_path)
    params = with_machine(PARAMS, mlflow_uri="sqlite:///mlflow.db", experiment="own")
    elsewhere = (tmp_path / "elsewhere").as_uri()
    client_of(params).create_experiment("own", artifact_location=elsewhere)
    with mlflow.run("pretrain", params, stage_hash="h") as run:
        pass
    assert client_of(params).get_run(run.run_id).info.artifact_uri.startswith(elsewhere)


def pipeline_of(params, run_id):
    client = client_of(params)
    return client.get_run(client.get_run(run_id).data.tags["mlflow.parentRunId"])


def test_a_pipeline_shows_settings_metrics_and_data_of_its_stages(project, tmp_path):
    shards, metrics = project.paths.shards, project.paths.metrics
    for folder in (shards, metrics):
        folder.mkdir(parents=True)
    (metrics / "download.json").write_text(json.dumps({"corpus": {"clips": 7}}))
    with mlflow.run("preprocess", project, stage_hash="1", data_hash="d" * 64):
        pass
    with mlflow.run("pretrain", project, stage_hash="2") as run:
        run.log(1, {"loss": 2.0, "nce": 1.0})
        run.log(2, {"loss": 1.5, "nce": 0.5})
    with mlflow.run("evaluate", project, stage_hash="3") as run:
        run.log(0, {"text_to_video.recall_at_10": 0.5, "action-pretrained.top_1": 0.25})
    found = pipeline_of(project, run.run_id)
    assert found.data.metrics.pop("seconds") > 0
    assert found.data.metrics == {
        "text_to_video.recall_at_10": 0.5,
        "action-pretrained.top_1": 0.25,
        "pretrain.loss": 1.5,
    }
    assert found.data.params["model.backbone"] == "specific"  # without JSON's quotes
    assert found.data.params["model.video.patch"] == "[4, 16, 16]"
    assert found.data.params["preprocess.vocabulary_file"] == "null"
    assert not any(key.startswith(("machine", "paths")) for key in found.data.params)
    (data,) = found.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("demo/all", "d" * 16)
    assert json.loads(data.dataset.profile) == {"clips": 7, "split": "all"}
    assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "preprocessing")]


def test_a_stage_shows_only_settings_that_it_reads(project):
    with mlflow.run("finetune-audio-scratch", project, stage_hash="1") as run:
        pass
    known = client_of(project).get_run(run.run_id).data.params
    assert known["finetune.tasks.audio.steps"] == "150"
    assert not any(key.startswith(("data", "finetune.tasks.action", "evaluate")) for key in known)


def test_a_pipeline_has_the_worst_state_of_the_last_runs_of_its_stages(project):
    def state():
        return pipeline_of(project, run.run_id).info.status

    with pytest.raises(Stopped), mlflow.run("pretrain", project, stage_hash="1") as run:
        assert state() == "RUNNING"
        raise Stopped("x")
    assert state() == "KILLED"
    with mlflow.run("evaluate", project, stage_hash="2") as run:
        pass
    assert state() == "KILLED"  # not green over a child that was killed
    with pytest.raises(RuntimeError), mlflow.run("report", project, stage_hash="3") as run:
        raise RuntimeError("x")
    assert state() == "FAILED"
    for stage in ("pretrain", "report"):
        with mlflow.run(stage, project, stage_hash=stage) as run:
            pass
    assert state() == "FINISHED"


def test_a_pipeline_shows_what_its_unchanged_stages_had_measured(project):
    with mlflow.run("pretrain", project, stage_hash="1") as run:
        run.log(1, {"loss": 1.5})
    evaluate = project.evaluate.model_copy(update={"bootstrap": 7})
    changed = project.model_copy(update={"evaluate": evaluate})
    with mlflow.run("evaluate", changed, stage_hash="2") as run:
        run.log(0, {"text_to_video.recall_at_10": 0.5})
    found = pipeline_of(project, run.run_id).data.metrics
    assert (found["pretrain.loss"], found["text_to_video.recall_at_10"]) == (1.5, 0.5)


def test_a_pipeline_has_the_name_that_was_asked_for_last(project, monkeypatch):
    for variable, name in (("DVC_EXP_NAME", "shy-aunt"), ("VATTCTL_RUN_NAME", "wide")):
        monkeypatch.setenv(variable, name)
        with mlflow.run("evaluate", project, stage_hash="1") as run:
            pass
        assert pipeline_of(project, run.run_id).info.run_name == name


def serve(database, port, log):
    """A tracking server; returns once it answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"],
        env={
            **os.environ,
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{database}",
            "MLFLOW_ARTIFACTS_DESTINATION": str(database.parent / "served"),
            "MLFLOW_DISABLE_TELEMETRY": "true",
        },
        stdout=log.open("ab"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    for _ in range(600):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return process
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    raise AssertionError("the server does not answer")


@pytest.mark.slow
def test_a_server_that_dies_stops_no_training_and_gets_the_rest_later(
    database, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    shutil.copy(database, tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    params = with_machine(PARAMS, mlflow_uri=f"http://127.0.0.1:{port}", experiment="remote")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    server = serve(tmp_path / "mlflow.db", port, tmp_path / "server.log")
    try:
        with mlflow.run("pretrain", params, stage_hash="h") as run:
            run.log(1, {"loss": 2.0})
            run.flush()
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            run.log(2, {"loss": 1.0})
            run.flush()
            run.tag("vatt.note", "said while it was away")
            run.checkpoint(folder)
        assert record()["status"] == "FINISHED"
        assert "MLflow does not answer" in caplog.text
        assert "MLflow lacks a part of run" in caplog.text
        with mlflow.run("evaluate", params, stage_hash="e") as later:  # it is still away
            later.log(0, {"text_to_video.recall_at_10": 0.5})
        assert "evaluate runs without MLflow (see machine.mlflow_uri)" in caplog.text
        assert record("evaluate")["status"] == "FINISHED"
        server = serve(tmp_path / "mlflow.db", port, tmp_path / "server.log")
        mlflow.mark_dead_runs(params)
        client = client_of(params)
        stored = client.get_run(run.run_id)
        assert stored.info.status == "FINISHED"
        assert steps(client, run.run_id) == [1, 2]
        assert stored.data.tags["vatt.note"] == "said while it was away"
        assert not list((params.paths.runs / "unsent").iterdir())
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
