"""Projects without a clone: the wheel, `vattctl init`, and code that changes in its environment."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import vatt
from tests.test_architecture import ROOT
from tests.test_stages import SMALL, new_project, sets
from vatt.tracking.provenance import write_marks
from vattctl.experiments import Experiment, inside, write_experiment
from vattctl.project import project_pipeline

TINY = {**SMALL, "finetune.run": [], "evaluate.probes": {}, "pretrain.steps": 6}
PIPELINE = (ROOT / "dvc.yaml").read_text(encoding="utf-8")


def run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A command in the environment of its interpreter: no clone, no other Python on PATH."""
    tools = Path(shutil.which("git") or "git").parent
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PATH": f"{Path(command[0]).parent}:{tools}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not check or done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done


# --- dvc.yaml -------------------------------------------------------------------------------------


def is_code(dep: str) -> bool:
    return dep.startswith(("stages/", "vatt/"))


def test_a_project_has_the_stages_of_the_clone_with_marks_in_place_of_code() -> None:
    clone = yaml.safe_load(PIPELINE)["stages"]
    made = yaml.safe_load(project_pipeline(PIPELINE))["stages"]
    code = made.pop("code")
    assert code["always_changed"]
    assert list(made) == list(clone)
    assert [next(iter(out)) for out in code["outs"]] == [f".vattctl/code/{name}" for name in made]
    for name, stage in clone.items():
        others = [dep for dep in stage["deps"] if not is_code(dep)]
        assert made[name] == {**stage, "deps": [f".vattctl/code/{name}", *others]}


def test_marks_hold_every_file_that_a_stage_depends_on(tmp_path: Path) -> None:
    write_marks(ROOT / "dvc.yaml", tmp_path)
    for name, stage in yaml.safe_load(PIPELINE)["stages"].items():
        lines = (tmp_path / ".vattctl/code" / name).read_text(encoding="utf-8").splitlines()
        marked = [line.partition("  ")[2] for line in lines]
        for dep in filter(is_code, stage["deps"]):
            assert any(file == dep or file.startswith(f"{dep}/") for file in marked), dep
        assert not [file for file in marked if file.endswith(".pyc")]


# --- init -----------------------------------------------------------------------------------------


def vattctl(folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vattctl.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that `init` has made, with nothing run."""
    folder = tmp_path_factory.mktemp("init") / "films"
    vattctl(folder.parent, "init", "films", "--preset", "one-gpu")
    return folder


@pytest.mark.parametrize(
    ("preset", "command"), [("demo", "demo"), ("beyond", "repro"), ("small", "ingest DIR")]
)
def test_init_names_the_command_that_fits_the_preset(
    tmp_path: Path, preset: str, command: str
) -> None:
    said = vattctl(tmp_path, "init", "new", "--preset", preset, "--json").stdout
    assert json.loads(said)["next"].startswith(f"cd new && vattctl {command}")


def test_init_makes_a_repository_of_git_and_dvc(made: Path) -> None:
    names = {".git", ".dvc", ".gitignore", ".dvcignore", "params.yaml", "dvc.yaml", "README.md"}
    assert {path.name for path in made.iterdir()} == names | {".vattctl"}
    assert (made / "params.yaml").read_bytes() == (ROOT / "presets/one-gpu.yaml").read_bytes()
    assert (made / ".dvc/config").read_bytes() == (ROOT / ".dvc/config").read_bytes()


def test_all_that_git_should_keep_is_staged(made: Path) -> None:
    done = subprocess.run(
        ["git", "status", "--porcelain"], cwd=made, capture_output=True, text=True, check=True
    )
    states = {line[3:]: line[:2] for line in done.stdout.splitlines()}
    assert {"params.yaml", "dvc.yaml", ".gitignore", ".dvc/config", "README.md"} <= set(states)
    assert set(states.values()) == {"A "}


def test_an_experiment_depends_on_the_marks_of_its_project(made: Path) -> None:
    with inside(made):
        write_experiment(Experiment(Path("experiments/a/b"), stages=("pretrain", "evaluate")))
    written = yaml.safe_load((made / "experiments/a/b/dvc.yaml").read_text(encoding="utf-8"))
    for name, stage in written["stages"].items():
        assert stage["deps"][0] == f"../../../.vattctl/code/{name}"
    shutil.rmtree(made / "experiments")


def test_every_command_finds_presets_sets_and_tables_without_a_clone(made: Path) -> None:
    assert "did you mean 'paper'?" in vattctl(made, "config", "use", "papr", check=False).stderr
    lost = vattctl(made, "finetune", "ucf101", "--data", ".", "--dry-run", check=False)
    assert lost.returncode == 3  # the set is known; a checkpoint to start from is missing
    assert "vattctl pretrain" in lost.stderr
    vattctl(made, "config", "use", "demo")
    assert "DropToken" in vattctl(made, "table").stdout
    vattctl(made, "config", "use", "one-gpu")


def test_init_leaves_a_folder_with_files_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    done = vattctl(tmp_path, "init", ".", check=False)
    assert done.returncode == 2
    assert f"{tmp_path} is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_init_in_a_project_names_the_next_command(made: Path) -> None:
    done = vattctl(made.parent, "init", "films", check=False)
    assert done.returncode == 2
    assert "it is a project already" in done.stderr


def test_init_leaves_nothing_behind_for_an_unknown_preset(tmp_path: Path) -> None:
    done = vattctl(tmp_path, "init", "films", "--preset", "dmo", check=False)
    assert done.returncode == 2
    assert "did you mean 'demo'?" in done.stderr
    assert not list(tmp_path.iterdir())


def test_inside_a_repository_no_second_one_is_made(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    vattctl(tmp_path, "init", "films")
    assert not (tmp_path / "films/.git").exists()
    assert (tmp_path / "films/.dvc/config").is_file()


def test_without_git_dvc_works_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    vattctl(tmp_path, "init", "films")
    assert not (tmp_path / "films/.git").exists()
    status = [sys.executable, "-m", "dvc", "status", "--json"]
    done = subprocess.run(status, cwd=tmp_path / "films", capture_output=True, text=True)
    assert "download" in json.loads(done.stdout), done.stderr


def test_an_update_brings_the_pipeline_and_keeps_the_settings(made: Path) -> None:
    wanted, settings = ((made / name).read_bytes() for name in ("dvc.yaml", "params.yaml"))
    (made / "dvc.yaml").write_bytes(wanted + b"# of an older version\n")
    assert "would be written" in vattctl(made, "init", "--update", ".", "--dry-run").stdout
    assert "written again" in vattctl(made, "init", "--update", ".").stdout
    assert "fits this version" in vattctl(made, "init", "--update", ".").stdout
    assert (made / "dvc.yaml").read_bytes() == wanted
    assert (made / "params.yaml").read_bytes() == settings


def test_outside_a_project_a_command_names_init(tmp_path: Path) -> None:
    done = vattctl(tmp_path, "repro", check=False)
    assert done.returncode == 2
    assert "vattctl init DIR" in done.stderr


# --- the wheel ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the files that git knows."""
    source = new_project(tmp_path_factory.mktemp("source"))
    out = tmp_path_factory.mktemp("dist")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out)
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=source)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The interpreter of an environment with the wheel, which borrows the other packages.

    Python reads no .pth file of a folder that a .pth file names, so an editable install of the
    clone stays outside.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    site = next(folder.glob("lib/python*/site-packages"))
    borrowed = Path(yaml.__file__).parents[1]
    (site / "borrowed.pth").write_text(f"{borrowed}\n", encoding="utf-8")
    options = ("--no-deps", "--no-index", "--target", site)
    run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=folder)
    return python


def test_the_wheel_carries_presets_pipeline_and_templates(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in sorted((ROOT / "presets").rglob("*.yaml")):
        assert f"vattctl/shipped/{file.relative_to(ROOT).as_posix()}" in names
    for page in sorted((ROOT / "docs").glob("*.md")):  # errors name them
        assert f"vattctl/shipped/docs/{page.name}" in names
    assert {"vattctl/shipped/dvc.yaml", "vattctl/shipped/.dvc/config"} <= names
    assert {"vatt/report/page.html.j2", "vatt/paper_tables.yaml", "stages/pretrain.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "bench/", "docs/"))]


def test_the_wheel_names_a_page_of_the_documentation_where_it_lies(
    installed: Path, tmp_path: Path
) -> None:
    code = "from vattctl.params import with_pages; print(with_pages('docs/own-data.md says it'))"
    place, _, rest = run(installed, "-c", code, cwd=tmp_path).stdout.partition(" ")
    assert rest == "says it\n"
    assert Path(place).read_text(encoding="utf-8").startswith("# Your own videos")


def changed(project: Path, python: Path) -> dict[str, Any]:
    """What a bare `dvc status` finds changed, after the stage that marks the code has run."""
    run(python, "-m", "dvc", "repro", "code", cwd=project)
    done = run(python, "-m", "dvc", "status", "--json", cwd=project)
    found: dict[str, Any] = json.loads(done.stdout)
    found.pop("code")  # always
    return found


@pytest.mark.slow
def test_a_project_of_the_wheel_runs_and_sees_when_installed_code_changes(
    installed: Path, tmp_path: Path
) -> None:
    place = run(installed, "-c", "import vatt; print(vatt.__file__)", cwd=tmp_path).stdout.strip()
    assert Path(place).is_relative_to(installed.parents[1])
    assert place != vatt.__file__
    run(installed, "-m", "vattctl.cli", "init", "films", cwd=tmp_path)
    project, code = tmp_path / "films", Path(place).parent
    run(installed, "-m", "vattctl.cli", "repro", *sets(TINY), cwd=project)
    assert (project / "reports/report/report.html").is_file()

    again = run(installed, "-m", "dvc", "repro", cwd=project).stdout
    assert again.count("didn't change, skipping") == 5
    assert again.count("Running stage") == 1  # `code`
    assert changed(project, installed) == {}

    with (code / "losses.py").open("a", encoding="utf-8") as file:
        file.write("# another version\n")
    assert set(changed(project, installed)) == {"pretrain"}
    rows = run(installed, "-m", "vattctl.cli", "status", "--json", cwd=project).stdout
    states = {row["stage"]: row for row in json.loads(rows)["stages"]}
    assert states["pretrain"]["changes"] == ["modified: the installed code"]
    assert states["download"]["state"] == "up to date"
    assert "code" not in states
    planned = run(installed, "-m", "dvc", "repro", "--dry", "pretrain", cwd=project).stdout
    assert "Running stage 'pretrain'" in planned
    assert "Stage 'preprocess' didn't change" in planned
