"""The hash of what a stage was made from: settings, code and data, as dvc.yaml declares them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from vatt.provenance import stage_hash

PIPELINE = {
    "stages": {
        "train": {
            "cmd": "true",
            "params": ["seed", "tasks.${item.task}"],
            "deps": ["train.py", "${paths.shards}"],
        }
    }
}
PARAMS: dict[str, Any] = {
    "seed": 1,
    "tasks": {"a": {"steps": 1}, "b": {"steps": 2}},
    "paths": {"shards": "data/shards"},
    "machine": {"workers": 1},
}


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
    other = {**PARAMS, "machine": {"workers": 8}}
    assert stage_hash("train", PARAMS, item={"task": "a"}) == stage_hash(
        "train", other, item={"task": "a"}
    )


def test_settings_code_and_data_each_change_it(project: Path) -> None:
    hashes = [stage_hash("train", PARAMS, item={"task": "a"})]
    hashes.append(stage_hash("train", PARAMS, item={"task": "b"}))
    hashes.append(stage_hash("train", {**PARAMS, "seed": 2}, item={"task": "a"}))
    (project / "train.py").write_text("x = 2")
    hashes.append(stage_hash("train", PARAMS, item={"task": "a"}))
    write_lock(project, "bbb.dir")
    hashes.append(stage_hash("train", PARAMS, item={"task": "a"}))
    assert len(set(hashes)) == len(hashes)
