"""`vattctl table`: what it says before anything runs, and what it runs."""

import json
from pathlib import Path

import pytest

from tests.test_stages import SMALL, metrics, new_project, sets, vattctl
from vatt.beyond import beyond, named
from vatt.studies import DEMO, with_seed
from vattctl.tables import BEYOND, _lend_corpus, experiment_of


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_project(tmp_path_factory.mktemp("project"))


def test_a_dry_run_lists_the_runs_and_writes_nothing(project: Path) -> None:
    said = json.loads(vattctl(project, "table", "5", "--dry-run", "--json").stdout)
    assert (said["version"], said["scale"]) == (1, "demo")
    assert said["tables"] == {"5": ["drop-75", "base", "drop-25", "drop-0"]}
    assert {run["state"] for run in said["runs"]} == {"to run"}
    assert {run["forecast_seconds"] for run in said["runs"]} == {None}  # nothing to tell it by
    assert not (project / "experiments").exists()


def test_without_a_number_every_table_has_a_line_and_nothing_runs(project: Path) -> None:
    lines = vattctl(project, "table").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:11]] == [str(n) for n in range(1, 11)]
    assert "15 of 15 runs are left" in lines[-1]
    assert not (project / "experiments").exists()


def test_a_study_beyond_the_paper_lists_its_arms_with_three_seeds(project: Path) -> None:
    said = json.loads(vattctl(project, "table", "senses", "--dry-run", "--json").stdout)
    arms = {"base", "senses-three", "senses-both", "senses-motion", "senses-depth"}
    names = {f"{arm}{seed}" for arm in arms for seed in ("", "-seed-1", "-seed-2")}
    assert set(said["tables"]) == {"senses"}
    assert {run["run"] for run in said["runs"]} == names
    starts = {run["run"]: run["start"] for run in said["runs"]}
    assert starts["senses-three-seed-1"] == "base-seed-1"
    assert not (project / "experiments").exists()


def test_the_names_of_studies_lead_to_all_of_them() -> None:
    assert [study for name in BEYOND for study in named(name)] == list(beyond().values())


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_with_spoilt_captions_takes_the_videos_of_the_base(
    project: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.chdir(project)
    (text,) = named("text")
    run = with_seed(next(run for run in text.runs() if run.name == "text-80"), seed)
    base = Path("experiments/base-seed-1" if seed else "") / "data/corpus"
    base.mkdir(parents=True, exist_ok=True)
    video = base / f"demo1-{seed}-train-00000.mp4"
    video.write_bytes(b"a video")
    (base / ".half.tmp").write_bytes(b"not complete")
    experiment = experiment_of(run, DEMO)
    for _ in range(2):  # again after a kill
        _lend_corpus(experiment, run.seed)
    (taken,) = (experiment.folder / "data/corpus").iterdir()
    assert taken.name == video.name and taken.samefile(video)


def test_a_gpu_forecasts_what_nobody_has_measured(project: Path) -> None:
    command = ("table", "all", "--seeds", "--dry-run", "--json", "--device", "h100-80gb")
    runs = json.loads(vattctl(project, *command).stdout)["runs"]
    assert len(runs) == 3 * 5
    assert all(run["forecast_seconds"] > 0 for run in runs)
    cost = {run["run"]: run["forecast_seconds"] for run in runs}
    assert cost["drop-75"] < cost["drop-25"] < cost["drop-0"]


def test_at_the_paper_s_size_missing_data_sets_are_named_with_what_to_do(
    tmp_path: Path,
) -> None:
    project = new_project(tmp_path)
    vattctl(project, "config", "use", "paper")
    runs = json.loads(vattctl(project, "table", "3", "--dry-run", "--json").stdout)["runs"]
    assert [(run["run"], run["missing"]) for run in runs] == [
        ("bbs", []),
        ("bbs-imagenet", ["sets/imagenet"]),
    ]
    done = vattctl(project, "table", "3", check=False)
    assert done.returncode == 2
    assert "sets/imagenet" in done.stderr
    assert "vattctl finetune SET --data DIR" in done.stderr
    done = vattctl(project, "table", "tokens", "--dry-run", check=False)
    assert (done.returncode, "--preset demo" in done.stderr) == (2, True)


def test_tables_are_planned_with_every_preset_and_with_tasks_of_one_s_own(tmp_path: Path) -> None:
    """The paper's models and recipes do not depend on the size or the tasks of the project."""
    project = new_project(tmp_path)
    vattctl(project, "config", "use", "one-gpu")
    vattctl(project, "config", "set", "finetune.run=[]", "finetune.tasks={}")
    command = ("table", "1", "--dry-run", "--json", "--device", "h100-80gb")
    runs = {run["run"]: run for run in json.loads(vattctl(project, *command).stdout)["runs"]}
    sizes = {name: runs[name]["settings"]["model.video.size"] for name in ("bbs", "mbs", "ma")}
    assert sizes == {"bbs": "base", "mbs": "medium", "ma": "medium"}
    assert runs["mbs-kinetics600"]["forecast_seconds"] > 0


@pytest.mark.slow
def test_a_table_runs_what_is_missing_and_the_report_shows_it(project: Path) -> None:
    vattctl(project, "preprocess", *sets(SMALL))
    said = vattctl(project, "table", "3")
    assert "scaled down" in said.stdout
    studies = metrics(project, "studies")
    assert studies["runs"].keys() == {"base"}
    assert studies["runs"]["base"]["classification"]["image"]["scratch"]["top_1"]["n"] > 0
    planned = json.loads(vattctl(project, "table", "4", "--dry-run", "--json").stdout)["runs"]
    assert [run["state"] for run in planned] == ["done", "to run"]
    assert planned[1]["forecast_seconds"] > 0
    again = vattctl(project, "table", "3")
    assert "Running stage" not in again.stderr
