"""The hash of what a stage was made from: settings, code and data, as dvc.yaml declares them."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_architecture import ROOT
from vatt.config import Params, parse_params
from vatt.tracking.provenance import git_commit, stage_hash

PIPELINE = {
    "stages": {
        "train": {
            "cmd": "true",
            "params": ["seed", "finetune.tasks.${item.task}.label"],
            "deps": ["train.py", "${paths.shards}"],
        }
    }
}


def settings(**more: Any) -> Params:
    raw: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    return parse_params({**raw, **more}, source=ROOT / "params.yaml")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(PIPELINE))
    (tmp_path / "train.py").write_text("x = 1")
    write_lock(tmp_path, "aaa.dir")
    return tmp_path


def write_lock(project: Path, md5: str) -> None:
    outs = [{"path": "data/shards", "md5": md5}]
    (project / "dvc.lock").write_text(yaml.safe_dump({"stages": {"prepare": {"outs": outs}}}))


def test_equal_inputs_give_equal_hashes_and_machine_does_not_count() -> None:
    machine = settings().machine.model_copy(update={"workers": 7})
    other = settings().model_copy(update={"machine": machine})
    assert stage_hash("train", settings(), task="audio") == stage_hash("train", other, task="audio")


def test_settings_code_and_data_each_change_it(project: Path) -> None:
    hashes = [stage_hash("train", settings(), task="audio")]
    hashes.append(stage_hash("train", settings(), task="image"))
    hashes.append(stage_hash("train", settings(seed=99), task="audio"))
    (project / "train.py").write_text("x = 2")
    hashes.append(stage_hash("train", settings(), task="audio"))
    write_lock(project, "bbb.dir")
    hashes.append(stage_hash("train", settings(), task="audio"))
    assert len(set(hashes)) == len(hashes)


def test_a_folder_of_several_outputs_counts_by_what_is_in_it(project: Path) -> None:
    (project / "dvc.yaml").write_text(
        yaml.safe_dump({"stages": {"judge": {"params": [], "deps": ["data"]}}})
    )
    before = stage_hash("judge", settings())
    write_lock(project, "bbb.dir")
    assert stage_hash("judge", settings()) != before


def test_a_folder_of_code_counts_by_its_files_less_the_compiled_ones(project: Path) -> None:
    (project / "dvc.yaml").write_text(
        yaml.safe_dump({"stages": {"judge": {"params": [], "deps": ["code"]}}})
    )
    (project / "code" / "__pycache__").mkdir(parents=True)
    (project / "code" / "one.py").write_text("1")
    before = stage_hash("judge", settings())
    (project / "code" / "__pycache__" / "one.cpython-311.pyc").write_bytes(b"compiled")
    assert stage_hash("judge", settings()) == before
    (project / "code" / "one.py").write_text("2")
    assert stage_hash("judge", settings()) != before


def test_a_repository_without_a_commit_has_none_to_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    (tmp_path / "file").write_text("x")
    subprocess.run(["git", "add", "file"], check=True)
    assert git_commit() == ""
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", *identity, "commit", "-qm", "one"], check=True)
    assert re.fullmatch("[0-9a-f]{12}", git_commit())
    (tmp_path / "file").write_text("y")
    assert re.fullmatch("[0-9a-f]{12}, with changes", git_commit())
