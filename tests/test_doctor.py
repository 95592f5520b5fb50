"""`vattctl doctor`: each line judges what is really there, by what params.yaml needs."""

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.test_architecture import ROOT
from vatt.config import Params, parse_params
from vatt.files import lock
from vattctl import doctor
from vattctl.doctor import Finding

LINES = {
    "project", "python", "torch", "device", "fp32", "bf16", "fp16", "deepspeed", "gloo", "ffmpeg",
    "pyav", "yt-dlp", "disk", "memory", "git", "dvc", "mlflow", "ports", "clock", "pipeline",
}  # fmt: skip


def params(**changes: Any) -> Params:
    """The demo's settings with some values changed: machine__offload="optimizer"."""
    tree = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    return parse_params(tree, source=Path("params.yaml"))


def only(found: Any) -> Finding:
    (finding,) = found
    return finding


def run(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vattctl.cli", "--project", str(project), *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the project's settings and pipeline, and nothing made yet."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".dvc").mkdir()
    return tmp_path


def test_every_line_is_there_and_no_heavy_package_is_imported(project: Path) -> None:
    code = (
        "import sys, vattctl.cli\n"
        "try: vattctl.cli.main(['doctor', '--json'])\n"
        "except SystemExit as end: print(end.code, file=sys.stderr)\n"
        "heavy = {'deepspeed', 'mlflow', 'dvc', 'yt_dlp', 'ray', 'torch._dynamo'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert done.stderr.split() == ["0", "[]"], done.stdout
    assert found["version"] == 1
    names = {check["name"] for check in found["checks"]}
    assert names == LINES - {"gloo"} | {"nccl" if torch.cuda.is_available() else "gloo"}
    assert sum(found["counts"].values()) == len(found["checks"])


def test_what_params_need_and_fails_ends_with_4_and_names_the_remedy(project: Path) -> None:
    text = (project / "params.yaml").read_text(encoding="utf-8")
    (project / "params.yaml").write_text(text.replace("ffmpeg: null", "ffmpeg: /no/ffmpeg"))
    done = run(project, "doctor")
    assert done.returncode == 4
    assert "fail  ffmpeg       no ffmpeg at /no/ffmpeg" in done.stdout
    assert "-> set machine.ffmpeg to null" in done.stdout
    assert "0 warnings, 1 failure\n" in done.stdout


def test_a_wrong_setting_is_a_line_and_the_machine_is_still_checked(project: Path) -> None:
    text = (project / "params.yaml").read_text(encoding="utf-8")
    (project / "params.yaml").write_text(text.replace("batch_size: 64", "batch_size: 0", 1))
    done = run(project, "doctor", "--json")
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 4
    assert found["project"]["state"] == "fail"
    assert "pretrain.batch_size" in found["project"]["detail"]
    assert found["fp32"]["state"] == "ok"


def test_outside_a_project_the_machine_alone_is_checked(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "vattctl.cli", "doctor"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "`vattctl init DIR` makes a project" in done.stdout
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_machine_names_doctor(project: Path) -> None:
    with lock(project / ".vattctl/settings.lock", shared=True):
        done = run(project, "config", "use", "paper")
    assert done.returncode == 4
    assert done.stderr.splitlines()[-1] == "`vattctl doctor` checks the machine and the project"


def test_the_precision_lines_show_that_each_type_rounds_as_it_should() -> None:
    found = {one.name: one for one in doctor._precision(ROOT, params())}
    errors = {name: float(one.detail.rpartition(" ")[2]) for name, one in found.items()}
    # 24, 11 and 8 bits of mantissa; a GPU may use TF32, with 11
    assert errors["fp32"] <= errors["fp16"] < errors["bf16"] < 2**-6
    assert errors["fp32"] < 2**-10


def test_slow_bf16_is_a_warning_where_params_want_it() -> None:
    speeds = {"fp32": 100.0, "bf16": 50.0}
    assert doctor._judge("bf16", speeds, "", is_needed=True).state == "warn"
    assert doctor._judge("bf16", speeds, "", is_needed=False).state == "ok"


def test_offloading_without_a_compiler_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert only(doctor._deepspeed(ROOT, params())).state == "ok"
    lost = only(doctor._deepspeed(ROOT, params(machine__offload="optimizer")))
    assert lost.state == "fail"
    assert "finds no g++" in lost.detail


def program(folder: Path, name: str, output: str) -> None:
    """A program on PATH that prints one line."""
    (folder / name).write_text(f"#!/bin/sh\necho '{output}'\n", encoding="utf-8")
    (folder / name).chmod(0o755)


def test_youtube_needs_deno_and_its_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = params(data__allow_youtube=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert only(doctor._yt_dlp(ROOT, params())).state == "ok"
    assert "no JavaScript" in only(doctor._yt_dlp(ROOT, asked)).detail
    program(tmp_path, "deno", "deno 1.46.3 (stable)")
    assert "deno 2.3.0 or newer" in (only(doctor._yt_dlp(ROOT, asked)).remedy or "")
    program(tmp_path, "deno", "deno 2.5.1 (stable)")
    found = only(doctor._yt_dlp(ROOT, asked))
    assert "JavaScript: deno 2.5.1" in found.detail
    assert found.state != "fail" or "vattctl[youtube]" in (found.remedy or "")


def test_a_program_that_is_no_ffmpeg_fails(tmp_path: Path) -> None:
    program(tmp_path, "ffmpeg", "not an ffmpeg")
    found = only(doctor._ffmpeg(ROOT, params(machine__ffmpeg=str(tmp_path / "ffmpeg"))))
    assert found.state == "fail"
    assert "cannot encode libx264" in found.detail


def test_a_model_that_does_not_fit_fails_and_names_plan() -> None:
    fits = only(doctor._memory(ROOT, params()))
    assert "a pre-training needs about" in fits.detail
    tree = yaml.safe_load((ROOT / "presets/paper.yaml").read_text(encoding="utf-8"))
    tree["machine"]["micro_batch_size"] = None
    lost = only(doctor._memory(ROOT, parse_params(tree, source=Path("params.yaml"))))
    assert lost.state == "fail"
    assert "vattctl plan" in (lost.remedy or "")


def test_the_disk_must_hold_shards_states_and_checkpoints(tmp_path: Path) -> None:
    tree = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    empty = {name: str(tmp_path / place) for name, place in tree["paths"].items()}
    demo = tree["data"]["demo"]
    small = sum(need for _, need in doctor._needed_disk(_at(empty, demo)))
    assert 0.1e9 < small < 5e9
    lost = only(doctor._disk(tmp_path, _at(empty, demo | {"train_clips": 10**9})))
    assert lost.state == "fail"
    assert "another disk in `paths`" in (lost.remedy or "")


def test_paths_on_another_disk_get_a_line_of_their_own(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second disk here")
    tree = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    places = {name: str(tmp_path / place) for name, place in tree["paths"].items()}
    found = list(
        doctor._disk(tmp_path, _at(places | {"shards": "/dev/shm/x"}, tree["data"]["demo"]))
    )
    assert len(found) == 2
    assert "at /dev/shm" in found[0].detail


def _at(paths: dict[str, str], demo: dict[str, Any]) -> Params:
    tree = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    tree["paths"] = paths
    tree["data"]["demo"] = demo
    return parse_params(tree, source=Path("params.yaml"))


@pytest.mark.parametrize(
    ("revision", "state"), [("newest", "ok"), ("first", "warn"), ("0123456789ab", "fail")]
)
def test_the_schema_of_the_database_is_compared_with_mlflow(
    tmp_path: Path, revision: str, state: str
) -> None:
    known, newest = doctor._revisions()
    assert newest is not None
    written = {"newest": newest, "first": min(known - {newest})}.get(revision, revision)
    file = tmp_path / "mlflow.db"
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute("INSERT INTO alembic_version VALUES (?)", (written,))
    database.close()
    assert doctor._database(file, "store").state == state


def test_the_newest_schema_is_the_one_that_mlflow_writes(tmp_path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path / "artifacts"))
    assert doctor._database(tmp_path / "mlflow.db", "store").state == "ok"


def test_a_file_that_is_no_database_fails(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database at all" * 100)
    found = doctor._database(tmp_path / "mlflow.db", "store")
    assert found.state == "fail"
    assert "move" in (found.remedy or "")


def test_a_server_that_is_away_is_a_warning_without_its_password() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://me:secret@127.0.0.1:{probe.getsockname()[1]}"
        found = only(doctor._mlflow(ROOT, params(machine__mlflow_uri=uri)))
    assert found.state == "warn"
    assert "secret" not in found.detail + (found.remedy or "")


def test_a_busy_port_of_the_page_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setattr(doctor, "UI_PORT", server.getsockname()[1])
        assert only(doctor._ports(ROOT, None)).state == "warn"


def test_files_of_the_future_are_a_warning(project: Path) -> None:
    assert only(doctor._clock(project, None)).state == "ok"
    later = (project / "dvc.yaml").stat().st_mtime + 3600
    os.utime(project / "dvc.yaml", (later, later))
    found = only(doctor._clock(project, None))
    assert found.state == "warn"
    assert "in the future" in found.detail


def test_a_running_stage_and_an_older_pipeline_are_named(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    assert [one.state for one in doctor._pipeline(project, params())] == ["ok"]
    (project / "dvc.yaml").write_text("stages:\n  pretrain:\n    deps:\n    - .vattctl/code/x\n")
    with lock(project / ".vattctl/settings.lock", shared=True):
        found = list(doctor._pipeline(project, params()))
    assert [one.name for one in found] == ["pipeline", "stages"]
    assert {one.state for one in found} == {"warn"}
    assert "vattctl init --update" in (found[0].remedy or "")


def test_an_extra_that_params_ask_for_is_named() -> None:
    assert list(doctor._extras(ROOT, params())) == []
    asked = params(machine__shards_url="gs://bucket/shards", machine__executor="ray")
    found = {one.name: one for one in doctor._extras(ROOT, asked)}
    assert set(found) == {"ray", "gs"}
    if doctor._version("gcsfs") is None:
        assert found["gs"].state == "fail"


def test_the_cache_is_linked_without_a_copy_where_the_disk_can(project: Path) -> None:
    found = only(doctor._dvc(project, params()))
    assert any(word in found.detail for word in ("reflink", "hardlink", "copy"))
    assert [path.name for path in (project / ".dvc").iterdir()] == []
