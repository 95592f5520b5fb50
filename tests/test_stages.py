"""The real pipeline, small: real DVC, yt-dlp, ffmpeg, DeepSpeed and MLflow in its own project."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.test_architecture import ROOT

SMALL = {  # settings that make every stage take seconds
    "data.demo.train_clips": 96,
    "data.demo.test_clips": 48,
    "data.demo.dead_links": 2,
    "data.min_clips": 20,
    "preprocess.samples_per_shard": 32,
    "pretrain.batch_size": 16,
    "pretrain.steps": 12,
    "pretrain.optimizer.warmup_steps": 2,
    "pretrain.save_every": 4,
    "pretrain.report_every": 2,
    "finetune.run": ["audio"],
    "finetune.tasks.audio.train_labels": 32,
    "finetune.tasks.audio.steps": 4,
    "evaluate.retrieval_pool": 32,
    "evaluate.bootstrap": 50,
    "report.tsne_clips": 40,
}
STAGES = ("download", "preprocess", "pretrain", "finetune@audio-scratch", "evaluate", "report")


def environment() -> dict[str, str]:
    """This interpreter, without a system ffmpeg or compiler on PATH, one thread."""
    tools = Path(shutil.which("git") or "git").parent
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{tools}", "OMP_NUM_THREADS": "1"}


def vattctl(project: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vattctl.cli", *arguments]
    done = subprocess.run(
        command, cwd=project, env=environment(), capture_output=True, text=True, check=False
    )
    assert not check or done.returncode == 0, f"{arguments}:\n{done.stdout}\n{done.stderr}"
    return done


def sets(settings: dict[str, Any]) -> list[str]:
    return [
        part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")
    ]


def new_project(folder: Path) -> Path:
    """The files that git tracks here, in a repository of their own."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/images/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for command in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "start"],
    ):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose whole pipeline has run once."""
    project = new_project(tmp_path_factory.mktemp("project"))
    vattctl(project, "repro", *sets(SMALL))
    return project


def metrics(project: Path, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((project / "reports/metrics" / f"{name}.json").read_text())
    return loaded


def ledger_states(project: Path, name: str) -> list[str]:
    lines = (project / f"data/{name}.ledger.jsonl").read_text().splitlines()
    return [json.loads(line)["state"] for line in lines]


def test_every_stage_leaves_its_files(finished: Path) -> None:
    for name in ("download", "preprocess", "pretrain", "finetune-audio-pretrained", "evaluate"):
        assert metrics(finished, name)
    html = (finished / "reports/report/report.html").read_text()
    assert "<html" in html
    assert (finished / "reports/report/report.md").stat().st_size > 1000
    weights = finished / "runs/checkpoints/pretrained/model.safetensors"
    assert weights.stat().st_size > 1_000_000
    said = json.loads((weights.parent / "config.json").read_text())["clips"]
    assert (said["fps"], said["audio_hz"], said["short_side"]) == (10, 8000, 72)


def test_every_clip_ends_in_one_state_and_dead_links_are_known(finished: Path) -> None:
    states = ledger_states(finished, "download")
    clips = (finished / "data/manifest.jsonl").read_text().splitlines()
    assert len(states) == len(clips) == 96 + 48 + 2
    assert states.count("not-found") == 2
    assert states.count("ok") == 96 + 48


def test_a_second_repro_does_nothing(finished: Path) -> None:
    done = vattctl(finished, "repro")
    assert "up to date" in done.stdout + done.stderr
    assert "Running stage" not in done.stdout + done.stderr


def test_status_names_each_stage_and_its_run(finished: Path) -> None:
    rows = json.loads(vattctl(finished, "status", "--json").stdout)["stages"]
    assert {row["stage"] for row in rows} >= set(STAGES)
    assert {row["state"] for row in rows} == {"up to date"}
    assert all(len(row["run_id"]) == 32 for row in rows)


def test_a_second_status_starts_no_dvc_and_takes_less_than_a_second(finished: Path) -> None:
    first = vattctl(finished, "status", "--json").stdout
    before = os.times()
    assert vattctl(finished, "status", "--json").stdout == first
    after = os.times()
    used = after.children_user - before.children_user
    assert used + after.children_system - before.children_system < 1.0  # CPU seconds


def test_runs_are_in_mlflow_with_status_metrics_and_provenance(finished: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{finished}/mlflow.db")
    run_id = json.loads((finished / "reports/runs/pretrain.json").read_text())["run_id"]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["pretrain.steps"] == "12"
    steps = [m.step for m in client.get_metric_history(run_id, "loss")]
    assert steps == sorted(set(steps))
    assert {"mlflow.source.git.commit", "vatt.data_hash", "vatt.stage_hash"} <= run.data.tags.keys()
    parents = {
        json.loads(f.read_text())["run_id"]: f for f in (finished / "reports/runs").iterdir()
    }
    groups = {client.get_run(r).data.tags["mlflow.parentRunId"] for r in parents}
    assert len(groups) == 1
    (model,) = run.outputs.model_outputs
    kept = [file.path for file in client.list_logged_model_artifacts(model.model_id)]
    assert {"MLmodel", "config.json", "model.safetensors"} <= set(kept)
    (version,) = client.search_model_versions(f"run_id = '{run_id}'")
    assert version.source == f"models:/{model.model_id}"


def test_a_changed_setting_reruns_only_what_depends_on_it(finished: Path, tmp_path: Path) -> None:
    project = tmp_path / "copy"
    shutil.copytree(finished, project, symlinks=True)
    done = vattctl(project, "pretrain", "--set", "pretrain.steps=8")
    text = done.stdout + done.stderr
    assert "Running stage 'pretrain'" in text
    assert "Running stage 'download'" not in text
    assert "Running stage 'preprocess'" not in text
    assert metrics(project, "pretrain")["step"] == 8
    after = stages_to_run(project)
    assert "evaluate" in after
    assert "preprocess" not in after


def stages_to_run(project: Path) -> list[str]:
    """What `vattctl repro` would run now."""
    plan = json.loads(vattctl(project, "repro", "--dry-run", "--json").stdout)
    return [stage["stage"] for stage in plan["stages"] if stage["runs"]]


@pytest.mark.slow
def test_torchrun_s_processes_train_together_and_one_drives_dvc(
    finished: Path, tmp_path: Path
) -> None:
    project = tmp_path / "copy"
    shutil.copytree(finished, project, symlinks=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc_per_node", "2", "-m", "vattctl.cli", "pretrain"]
    done = subprocess.run(
        command, cwd=project, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    state = json.loads((project / "runs/pretrain-state/step-00000012/meta.json").read_text())
    assert state["engine"].endswith("processes: 2")
    one, two = metrics(finished, "pretrain"), metrics(project, "pretrain")
    assert two["loss"] == pytest.approx(one["loss"], rel=0.02)  # bf16
    status = json.loads(vattctl(project, "status", "--json").stdout)["stages"]
    assert next(row for row in status if row["stage"] == "pretrain")["state"] == "up to date"


@pytest.mark.parametrize(
    ("number", "processes", "code"),
    [
        (signal.SIGUSR1, 1, 75),
        (signal.SIGINT, 1, 130),
        pytest.param(signal.SIGTERM, 2, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 2, 130, marks=pytest.mark.slow),
    ],
)
def test_a_stop_signal_to_vattctl_saves_the_last_step(
    number: signal.Signals, processes: int, code: int, finished: Path, tmp_path: Path
) -> None:
    project = tmp_path / "copy"
    shutil.copytree(finished, project, symlinks=True)
    longer = {"pretrain.steps": 2000, "machine.processes": processes}
    command = [sys.executable, "-m", "vattctl.cli", "pretrain", *sets(longer)]
    states = project / "runs/pretrain-state"
    curve = (states / "history.jsonl").read_text()
    with subprocess.Popen(
        command, cwd=project, env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        while (states / "history.jsonl").read_text() == curve and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    last = max(states.glob("step-*")).name.removeprefix("step-")
    assert f"stopped after step {int(last)} of 2000; what is done is saved. To continue: " in errors


def signal_stage(stage: str, project: Path, number: signal.Signals) -> None:
    """Wait until the stage's own process runs, let it work a little, send it the signal."""
    import psutil

    for _ in range(600):
        for process in psutil.process_iter(["cmdline", "cwd"]):
            words = process.info["cmdline"] or []
            if f"stages.{stage}" in words[:3] and process.info["cwd"] == str(project):
                time.sleep({"report": 0, "pretrain": 4.5}.get(stage, 2.5))
                process.send_signal(number)
                return
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
@pytest.mark.parametrize(
    "stage", ["download", "preprocess", "pretrain", "finetune", "evaluate", "report"]
)
def test_a_signal_to_any_stage_stops_it_with_its_code_and_it_goes_on(
    stage: str, number: signal.Signals, code: int, finished: Path, tmp_path: Path
) -> None:
    project = tmp_path / "copy"
    shutil.copytree(finished, project, symlinks=True)
    target = "finetune@audio-scratch" if stage == "finetune" else stage
    with subprocess.Popen(
        [sys.executable, "-m", "vattctl.cli", "repro", target, "--force"],
        cwd=project, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        signal_stage(stage, project, number)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert errors.count("error: ") == 1
    assert "Traceback" not in errors
    vattctl(project, "repro", target)
    if stage != "report":
        file = target.replace("@", "-")
        assert metrics(project, file) == metrics(finished, file)


def test_a_batch_that_does_not_divide_ends_with_2_and_one_message(
    finished: Path, tmp_path: Path
) -> None:
    project = tmp_path / "copy"
    shutil.copytree(finished, project, symlinks=True)
    odd = {"pretrain.batch_size": 15, "machine.processes": 2}
    done = vattctl(project, "pretrain", *sets(odd), check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "pretrain.batch_size 15 is not divisible by 2 processes" in done.stderr


def test_a_folder_that_may_not_be_written_ends_with_4(finished: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    project = tmp_path / "copy"
    shutil.copytree(finished, project, symlinks=True)
    (project / "reports/metrics").chmod(0o555)
    done = vattctl(project, "report", "--force", check=False)
    assert done.returncode == 4, done.stderr
    assert "no permission: " in done.stderr


@pytest.mark.parametrize("stage", ["download", "preprocess", "pretrain", "finetune", "evaluate"])
def test_a_killed_stage_goes_on_with_nothing_lost_or_doubled(
    stage: str, finished: Path, tmp_path: Path
) -> None:
    project = tmp_path / "copy"
    shutil.copytree(finished, project, symlinks=True)
    target = "finetune@audio-scratch" if stage == "finetune" else stage
    if stage == "download":  # as in a fresh clone
        shutil.rmtree(project / "data")
    command = [sys.executable, "-m", "vattctl.cli", "repro", target, "--force"]
    with subprocess.Popen(
        command,
        cwd=project,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        signal_stage(stage, project, signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    assert process.returncode != 0, errors
    vattctl(project, "repro", target)
    file = target.replace("@", "-")
    assert metrics(project, file) == metrics(finished, file)
