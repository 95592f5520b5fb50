"""DVC as people use it next to vattctl: metrics, plots, experiments, remotes, a clone elsewhere."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_stages import environment, finished, metrics, sets, stages_to_run, vattctl

__all__ = ["finished"]  # the fixture: a project whose whole pipeline has run once
KEY = "evaluate.retrieval_pool"  # repeats evaluate and report only
COLUMNS = 120  # of a terminal
GIT = ("-c", "user.name=t", "-c", "user.email=t@t")


def run(folder: Path, *command: str, **variables: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**environment(), "PYTHONPATH": str(folder), **variables},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def dvc(folder: Path, *arguments: str, **variables: str) -> str:
    return run(folder, sys.executable, "-m", "dvc", *arguments, **variables)


def commit(folder: Path, message: str) -> None:
    run(folder, "git", "add", "-A")
    run(folder, "git", *GIT, "commit", "-qm", message)


@pytest.fixture(scope="module")
def project(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished project, committed."""
    folder = tmp_path_factory.mktemp("exp") / "project"
    shutil.copytree(finished, folder, symlinks=True)
    commit(folder, "ran")
    return folder


@pytest.mark.slow
def test_git_ignores_what_dvc_keeps_and_metrics_are_shown(project: Path) -> None:
    assert run(project, "git", "status", "--porcelain") == ""
    shown = json.loads(dvc(project, "metrics", "show", "--json"))[""]["data"]
    assert shown.keys() == {"reports/metrics/headline.json"}
    headline = shown["reports/metrics/headline.json"]["data"]
    assert headline == metrics(project, "headline")
    assert headline.items() <= metrics(project, "summary").items()
    assert max(map(len, dvc(project, "metrics", "show").splitlines())) <= COLUMNS


@pytest.mark.slow
def test_plots_show_the_loss_and_retrieval(project: Path) -> None:
    shown = json.loads(dvc(project, "plots", "show", "--json"))["data"]
    values = {name: one[0]["content"]["data"]["values"] for name, one in shown.items() if one}
    assert [row["step"] for row in values["loss"] if row["field"] == "loss"] == [2, 4, 6, 8, 10, 12]
    assert {row["field"] for row in values["retrieval"]} >= {"text_to_video", "video_to_audio"}


@pytest.mark.slow
def test_an_experiment_is_shown_compared_and_drawn(project: Path, tmp_path: Path) -> None:
    """On the spot, then from the queue."""
    dvc(project, "exp", "run", "-S", f"{KEY}=24", "--name", "small-pool")
    dvc(project, "exp", "run", "--queue", "-S", f"{KEY}=16", "--name", "smaller-pool")
    dvc(project, "exp", "run", "--run-all")
    shown = dvc(
        project, "exp", "show", "--only-changed", "--drop", ".*/", "--no-pager",
        COLUMNS=str(COLUMNS),
    )  # fmt: skip
    assert max(map(len, shown.splitlines())) <= COLUMNS, shown
    for word in ("small-pool", "smaller-pool", "24", "16", "text_to_video.recall_at_10"):
        assert word in shown, shown
    assert "vatt/" not in shown and "…" not in shown, shown
    changed = json.loads(dvc(project, "metrics", "diff", "--json", "HEAD", "small-pool"))
    assert "text_to_video.recall_at_10" in changed["reports/metrics/headline.json"]
    drawn = json.loads(dvc(project, "plots", "diff", "HEAD", "small-pool", "--json"))["data"]
    assert {row["rev"] for row in drawn["retrieval"][0]["content"]["data"]["values"]} == {
        "HEAD", "small-pool",
    }  # fmt: skip
    names = {
        row["name"] for row in json.loads(vattctl(project, "runs", "--json").stdout)["pipelines"]
    }
    assert {"small-pool", "smaller-pool"} <= names  # recorded in the project's own MLflow store


def clone_and_pull(project: Path, remote: str, folder: Path, **variables: str) -> Path:
    """Push to the remote, clone elsewhere, pull there."""
    dvc(project, "remote", "add", "-d", "-f", "kept", remote, **variables)
    for key, value in variables.items():
        if key == "AWS_ENDPOINT_URL":
            dvc(project, "remote", "modify", "kept", "endpointurl", value)
    if run(project, "git", "status", "--porcelain"):
        commit(project, "remote")
    dvc(project, "push", **variables)
    run(project.parent, "git", "clone", "-q", str(project), str(folder))
    dvc(folder, "pull", **variables)
    return folder


@pytest.mark.slow
def test_a_clone_that_pulls_is_up_to_date(project: Path, tmp_path: Path) -> None:
    clone = clone_and_pull(project, str(tmp_path / "remote"), tmp_path / "clone")
    assert json.loads(dvc(clone, "status", "--json")) == {}
    assert stages_to_run(clone) == []
    assert metrics(clone, "summary") == metrics(project, "summary")
    weights = "runs/checkpoints/pretrained/model.safetensors"
    assert (clone / weights).read_bytes() == (project / weights).read_bytes()


@pytest.mark.slow
def test_a_clone_reproduces_every_stage_bit_for_bit(project: Path, tmp_path: Path) -> None:
    clone = clone_and_pull(project, str(tmp_path / "remote"), tmp_path / "clone")
    shutil.rmtree(clone / ".dvc/cache")
    vattctl(clone, "repro", "--force", *sets({}))
    weights = "runs/checkpoints/pretrained/model.safetensors"
    assert (clone / weights).read_bytes() == (project / weights).read_bytes()
    assert metrics(clone, "evaluate") == metrics(project, "evaluate")


@pytest.fixture
def bucket() -> Iterator[dict[str, str]]:
    """A bucket of a local server that speaks S3; the variables that lead to it."""
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = server.ThreadedMotoServer(ip_address="127.0.0.1", port=port)
    started.start()
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client = boto3.client(
        "s3", endpoint_url=variables["AWS_ENDPOINT_URL"], aws_access_key_id="test",
        aws_secret_access_key="test", region_name="us-east-1",
    )  # fmt: skip
    client.create_bucket(Bucket="vatt")
    yield variables
    started.stop()


@pytest.mark.slow
def test_a_clone_pulls_from_s3(project: Path, tmp_path: Path, bucket: dict[str, str]) -> None:
    pytest.importorskip("dvc_s3", reason="dvc-s3 is not installed")
    clone = clone_and_pull(project, "s3://vatt/dvc", tmp_path / "clone", **bucket)
    assert json.loads(dvc(clone, "status", "--json", **bucket)) == {}


def test_artifacts_and_models_go_to_s3_and_come_back(
    tmp_path: Path, bucket: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow as library

    from tests.training import tiny
    from vatt.tracking import mlflow

    for name, value in bucket.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    machine = tiny.machine_params(mlflow_uri="sqlite:///mlflow.db", experiment="far")
    params = tiny.DEMO.model_copy(update={"machine": machine})
    library.MlflowClient(mlflow.store_uri(machine)).create_experiment(
        "far", artifact_location="s3://vatt/artifacts"
    )
    kept = tmp_path / "evaluation"
    kept.mkdir()
    (kept / "arrays.npz").write_bytes(b"arrays")
    with mlflow.run("evaluate", params, stage_hash="h") as made:
        made.artifact(kept)
    found = mlflow.artifact_of(params, made.run_id, "evaluate", "evaluation")
    assert (found / "arrays.npz").read_bytes() == b"arrays"
    assert not list(tmp_path.glob("mlartifacts/**/*.npz"))
    for name in ("AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with mlflow.run("evaluate", params, stage_hash="i") as made:  # a store that is away
        made.artifact(kept)
    assert json.loads((params.paths.runs / "evaluate.json").read_text())["status"] == "FINISHED"
