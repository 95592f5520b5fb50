"""Experiments in folders of their own, with real DVC: what they share, and what stays apart."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_stages import SMALL, environment, metrics, new_project, sets, signal_stage, vattctl
from vatt.errors import SettingsError
from vatt.tracking.provenance import stage_hash
from vattctl.experiments import (
    Experiment,
    inside,
    run_experiment,
    settings_of,
    write_experiment,
)
from vattctl.params import edit

QUICK = {("finetune", "run"): [], ("evaluate", "probes"): {}, ("pretrain", "steps"): 6}
FOLDER = Path("experiments/quick")
TRAINS = Experiment(FOLDER, stages=("pretrain", "evaluate"), settings=QUICK)
PROBES = Experiment(
    Path("experiments/probes"),
    stages=("evaluate",),
    settings={("finetune", "run"): []},
    start=FOLDER / "runs/checkpoints/pretrained",
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with settings alone; nothing has been run."""
    folder = new_project(tmp_path_factory.mktemp("project"))
    subprocess.run(
        [sys.executable, "-m", "vattctl.cli", "download", *sets(SMALL)],
        cwd=folder,
        env=environment(),
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with inside(project):
        yield project


def test_an_experiment_finds_the_voices_where_the_project_has_them(tmp_path: Path) -> None:
    experiment = Experiment(Path("experiments/voices"), stages=("download",))
    with inside(new_project(tmp_path)):
        assert settings_of(experiment).data.demo.voices is None
        edit({("data", "demo", "voices"): "data/fsdd"}).write()
        assert settings_of(experiment).data.demo.voices == Path("../../data/fsdd")


def test_a_download_with_the_settings_of_another_brings_its_own_media(here: Path) -> None:
    twins = [Path("experiments/twin-1"), Path("experiments/twin-2")]
    for folder in twins:  # DVC has the results of the first one in its cache
        run_experiment(Experiment(folder, stages=("download",)), quiet=True)
    counts = [len(list((here / folder / "data/media").iterdir())) for folder in twins]
    assert counts[0] == counts[1] > 0


def dvc(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout + done.stderr


def listed(folder: Path) -> dict[Path, int]:
    """Every file of the project outside experiments, with its time of change."""
    return {
        file: file.stat().st_mtime_ns
        for top in ("runs", "reports")
        for file in sorted((folder / top).rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def trained(project: Path) -> dict[Path, int]:
    """What the project's own folders held before the first experiment, which has run then."""
    before = listed(project)
    os.environ["OMP_NUM_THREADS"] = "1"
    with inside(project):
        run_experiment(TRAINS, quiet=True)
    return before


def test_it_waits_for_the_project_s_shards_and_leaves_the_rest_of_it_alone(
    here: Path, trained: dict[Path, int]
) -> None:
    assert (here / "data/shards/index.jsonl").exists()  # made by the project's own stage
    assert metrics(here / FOLDER, "pretrain")["step"] == 6
    assert metrics(here / FOLDER, "evaluate")["retrieval"]["pretrained"]
    new = {file.relative_to(here) for file in listed(here).keys() - trained.keys()}
    assert new == {Path("reports/metrics/preprocess.json"), Path("reports/runs/preprocess.json")}
    assert all(file.stat().st_mtime_ns == time for file, time in trained.items())
    assert not (here / FOLDER / "data").exists()
    assert not (here / FOLDER / "mlflow.db").exists()


def test_it_is_a_project_like_any_other(here: Path, trained: dict[Path, int]) -> None:
    rows = json.loads(vattctl(here, "--project", str(FOLDER), "status", "--json").stdout)["stages"]
    assert [(row["stage"], row["state"]) for row in rows] == [
        ("pretrain", "up to date"),
        ("evaluate", "up to date"),
    ]
    above = json.loads(vattctl(here, "status", "--json").stdout)["stages"]
    assert {row["stage"]: row["state"] for row in above}["pretrain"] == "never run"
    assert "up to date" in dvc(here / FOLDER, "repro")


def test_writing_it_again_changes_nothing_and_git_sees_what_it_should(
    here: Path, trained: dict[Path, int]
) -> None:
    files = [here / FOLDER / name for name in ("params.yaml", "dvc.yaml")]
    before = [file.stat().st_mtime_ns for file in files]
    write_experiment(TRAINS)
    assert [file.stat().st_mtime_ns for file in files] == before
    command = ["git", "status", "--porcelain", "-uall", "experiments"]
    seen = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout
    found = {Path(line[3:]) for line in seen.splitlines()}
    assert found >= {FOLDER / name for name in ("dvc.lock", "dvc.yaml", "params.yaml")}
    assert {file.name for file in found} == {"dvc.lock", "dvc.yaml", "params.yaml"}


@pytest.mark.slow
def test_another_s_checkpoint_is_a_dependency_or_taken_as_it_is(
    here: Path, trained: dict[Path, int]
) -> None:
    from vatt.config import load_params

    run_experiment(PROBES, quiet=True)
    assert metrics(here / PROBES.folder, "evaluate")["probes"]["digit"]
    with inside(PROBES.folder):
        before = stage_hash("evaluate", load_params())
    changed = Experiment(FOLDER, TRAINS.stages, {**QUICK, ("pretrain", "steps"): 7})
    write_experiment(changed)
    run_experiment(PROBES, upstream=False, quiet=True)
    assert metrics(here / FOLDER, "pretrain")["step"] == 6
    run_experiment(PROBES, quiet=True)
    assert metrics(here / FOLDER, "pretrain")["step"] == 7
    with inside(PROBES.folder):
        assert stage_hash("evaluate", load_params()) != before  # the other folder's lock counts


@pytest.mark.slow
def test_a_killed_stage_goes_on_where_it_stopped(here: Path, trained: dict[Path, int]) -> None:
    longer = {**QUICK, ("pretrain", "steps"): 40, ("pretrain", "save_every"): 4}
    calm, killed = (
        Experiment(Path("experiments") / name, ("pretrain",), longer) for name in ("calm", "killed")
    )
    run_experiment(calm, quiet=True)
    write_experiment(killed)
    command = [sys.executable, "-m", "vattctl.cli", "repro", "pretrain"]
    with subprocess.Popen(
        command, cwd=killed.folder, env=environment(), stderr=subprocess.DEVNULL
    ) as process:
        signal_stage("pretrain", here / killed.folder, signal.SIGKILL)
        process.wait(timeout=120)
    assert process.returncode != 0
    assert not (killed.folder / "reports/metrics/pretrain.json").exists()
    run_experiment(killed, quiet=True)
    weights = "runs/checkpoints/pretrained/model.safetensors"
    assert (killed.folder / weights).read_bytes() == (calm.folder / weights).read_bytes()


def test_a_wrong_setting_or_stage_is_named_before_anything_is_written(here: Path) -> None:
    wrong = Experiment(Path("experiments/wrong"), ("pretrain",), {("pretrain", "stepz"): 1})
    with pytest.raises(SettingsError, match="stepz"):
        write_experiment(wrong)
    with pytest.raises(SettingsError, match="no stage 'train'"):
        write_experiment(Experiment(wrong.folder, ("train",)))
    assert not wrong.folder.exists()
