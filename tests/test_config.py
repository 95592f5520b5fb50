"""The settings' schema: unknown keys, wrong values, rules across fields, fingerprints."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.data.corpus import TEST_DATA, needs_data
from tests.test_architecture import ROOT
from vatt.config import (
    Params,
    Section,
    fingerprint,
    known_keys,
    load_params,
    may_be_missing,
    off,
    parse_params,
)
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


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "line 5: .* when aliases are expanded"),
        ("seed: " + "[" * 3000, "line 1: .* levels of nesting"),
        ("- " * 40 + "x", "levels of nesting"),
        ("seed: &s [1, *s]", r"line 1: \*s contains itself"),
        ("seed: 0\nx: &x {y: *x}", r"line 2: \*x contains itself"),
        ("seed: *nowhere", "unknown"),
        ("seed: 1\npaths: {}\nseed: 2", "line 3: seed is in this section twice"),
        ("seed: 1\n? [a, b]\n: 2", "a key is not a word"),
        ("seed: 0\nx: " + "9" * 5000, "line 2: "),
        ("seed: 2026-13-45", "line 1: '2026-13-45'"),
        ("seed: !!python/object/apply:os.system [ls]", "python/object"),
        ("seed: \x07", "cannot be read"),
        ("#" * 1_100_000, "larger than 1000 kB"),
        ("seed: [" + "1, " * 30_000 + "]", "more than 20000 values"),
    ],
)
def test_a_hostile_file_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=message) as caught:
        load_params(file)
    assert str(file) in str(caught.value) and len(str(caught.value)) < 1000


def test_bytes_that_are_no_text_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(b"seed: \xff\xfe")
    for path in (tmp_path / "params.yaml", tmp_path):
        with pytest.raises(SettingsError, match="cannot be read"):
            load_params(path)


def test_an_alias_that_repeats_a_section_is_fine(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text()
    assert "seed: 0" in text
    file = tmp_path / "params.yaml"
    file.write_text(
        text.replace("seed: 0", "seed: &zero 0").replace("dropout: 0.0", "dropout: *zero")
    )
    assert load_params(file).model.dropout == 0


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("pretrain", "steps", 10**30),
        ("pretrain", "batch_size", 10**12),
        ("pretrain", "temperature", float("inf")),
        ("pretrain", "temperature", float("nan")),
        ("pretrain", "fps", 1e300),
        ("machine", "cache_gb", 1e300),
        ("model", "va_dim", 10**9),
    ],
)
def test_absurd_numbers_are_named(raw: dict[str, Any], section: str, key: str, value: Any) -> None:
    raw[section][key] = value
    assert f"{section}.{key}" in problem(raw)


def test_a_value_of_any_size_is_shown_in_short(raw: dict[str, Any]) -> None:
    raw["report"]["title"] = [["x" * 10_000] * 10] * 10
    raw["machine"] |= {f"key{number}": 1 for number in range(1000)}
    text = problem(raw)
    assert len(text) < 5000 and "more problems" in text


@needs_data
@pytest.mark.parametrize(
    "name", sorted(path.name for path in Path(TEST_DATA or ".").glob("attack/params-*"))
)
def test_attacks_on_settings_are_clear_errors(name: str) -> None:
    with pytest.raises(SettingsError, match=rf"{name} cannot be read: line \d+: "):
        load_params(Path(TEST_DATA or ".") / "attack" / name)


class Beyond(Section):
    depth: int
    experts: int | None = off()
    noise: float = off(0.0)


def test_a_setting_that_is_off_may_be_missing_and_is_not_written() -> None:
    assert Beyond.model_validate({"depth": 2}).model_dump() == {"depth": 2}
    assert Beyond(depth=2, experts=None, noise=0.0).model_dump_json() == '{"depth":2}'
    assert Beyond(depth=2, experts=4).model_dump() == {"depth": 2, "experts": 4}
    assert fingerprint(Beyond(depth=2)) == fingerprint({"depth": 2})
    assert fingerprint(Beyond(depth=2, noise=0.1)) != fingerprint({"depth": 2})


def test_only_a_setting_that_is_off_or_lies_in_such_a_section_may_be_missing() -> None:
    assert may_be_missing(("pretrain", "text_weighting"))
    assert may_be_missing(("pretrain", "text_weighting", "kind"))
    assert may_be_missing(("data", "demo", "text_noise"))
    for path in ((), ("pretrain",), ("pretrain", "steps"), ("pretrain", "text_weighting", "x")):
        assert not may_be_missing(path)
