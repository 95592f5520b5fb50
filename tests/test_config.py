"""The settings' schema: unknown keys, wrong values, rules across fields, fingerprints."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_architecture import ROOT
from vatt.config import Params, fingerprint, known_keys, load_params, parse_params
from vatt.errors import SettingsError


@pytest.fixture
def raw() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    return loaded


def problem(raw: dict[str, Any]) -> str:
    with pytest.raises(SettingsError) as caught:
        parse_params(raw, source=ROOT / "params.yaml")
    return str(caught.value)


def test_unknown_key_suggests_the_near_one(raw: dict[str, Any]) -> None:
    raw["pretrain"]["batchsize"] = 3
    assert "unknown key pretrain.batchsize; did you mean 'batch_size'?" in problem(raw)


def test_unknown_key_inside_a_named_task_suggests_too(raw: dict[str, Any]) -> None:
    raw["finetune"]["tasks"]["audio"]["step"] = 3
    assert "unknown key finetune.tasks.audio.step; did you mean 'steps'?" in problem(raw)


def test_every_problem_is_named_at_once(raw: dict[str, Any]) -> None:
    raw["model"]["dropout"] = 2
    del raw["pretrain"]["steps"]
    text = problem(raw)
    assert "model.dropout" in text
    assert "pretrain.steps is missing" in text


def test_missing_section_and_empty_file_are_clear(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    with pytest.raises(SettingsError, match="is missing"):
        load_params(file)
    file.write_text("")
    with pytest.raises(SettingsError, match="must hold sections"):
        load_params(file)
    file.write_text("a: [1")
    with pytest.raises(SettingsError, match="cannot be read"):
        load_params(file)


def test_agnostic_wants_one_size(raw: dict[str, Any]) -> None:
    raw["model"]["backbone"] = "agnostic"
    raw["model"]["video"]["size"] = "base"
    assert "must be equal" in problem(raw)


def test_folder_source_wants_a_location(raw: dict[str, Any]) -> None:
    raw["data"]["source"] = "folder"
    assert "data.location is needed" in problem(raw)


def test_a_task_to_run_must_exist(raw: dict[str, Any]) -> None:
    raw["finetune"]["run"] = ["sing"]
    assert "finetune.run names 'sing'" in problem(raw)


def test_settings_are_frozen() -> None:
    params = load_params(ROOT / "params.yaml")
    with pytest.raises(ValueError, match="frozen"):
        params.seed = 4  # type: ignore[misc]


def test_fingerprint_ignores_order_and_sees_values(raw: dict[str, Any]) -> None:
    def parsed(settings: dict[str, Any]) -> Params:
        return parse_params(settings, source=ROOT / "params.yaml")

    turned = dict(reversed(copy.deepcopy(raw).items()))
    assert fingerprint(parsed(raw).model) == fingerprint(parsed(turned).model)
    raw["model"]["va_dim"] += 1
    assert fingerprint(parsed(raw).model) != fingerprint(parsed(turned).model)


def test_known_keys_walks_named_sections() -> None:
    assert "steps" in known_keys(("finetune", "tasks", "anything"))
    assert "patch" in known_keys(("model", "video"))
    assert known_keys(("seed",)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "audiosett"}, "did you mean 'audioset'?"),
        ({"source": "demo+audioset"}, "joined by +"),
        ({"source": "audioset"}, "data.annotations is needed"),
        ({"source": "ucf101", "annotations": "lists"}, "data.location is needed"),
        (
            {"source": "howto100m+audioset", "annotations": "lists", "mix": {"audioset": 0.5}},
            "data.mix must name exactly howto100m, audioset",
        ),
    ],
)
def test_sources_say_what_they_need(
    raw: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    raw["data"] |= change
    assert message in problem(raw)
