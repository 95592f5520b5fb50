"""`vattctl verify`: enough rows, all of them true, and able to fail."""

import json
import math
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import yaml

from vatt import paper
from vatt.verify.counts import token_rows
from vatt.verify.losses import loss_rows, schedule_rows
from vatt.verify.row import Check, compare, not_run, published
from vattctl.cli import main

KEYS = ["name", "source", "unit", "paper", "expected", "ours", "tolerance", "state", "reason"]


@pytest.fixture(scope="module")
def answer() -> dict[str, Any]:
    """What the command prints."""
    command = [sys.executable, "-m", "vattctl.cli", "verify", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def rows(answer: dict[str, Any]) -> list[Check]:
    return [Check(**row) for row in answer["rows"]]


def test_the_json_has_the_promised_form(answer: dict[str, Any]) -> None:
    assert answer["version"] == 1
    assert all(list(row) == KEYS for row in answer["rows"])
    assert {row["state"] for row in answer["rows"]} <= {"pass", "fail", "not run"}


def test_no_row_fails_and_there_are_enough(rows: list[Check]) -> None:
    assert [row for row in rows if row.state == "fail"] == []
    assert len(rows) >= 60
    assert Counter(row.name for row in rows).most_common(1)[0][1] == 1


def test_every_kind_of_quantity_has_rows(rows: list[Check]) -> None:
    names = "\n".join(row.name for row in rows)
    for kind in ("parameters", "views", "DropToken", "tokens", "learning rate", "MIL-NCE"):
        assert kind in names
    for table in ("table 1", "table 5", "table 6", "table 7"):
        assert any(row.source == table for row in rows)


def test_rows_not_run_say_why_and_rows_run_have_numbers(rows: list[Check]) -> None:
    for row in rows:
        if row.state == "not run":
            assert row.reason and row.paper is not None
        else:
            assert row.ours is not None and row.expected is not None and row.tolerance is not None
            assert abs(row.ours - row.expected) <= row.tolerance


def test_every_published_operation_count_stands_as_the_paper_gives_it(rows: list[Check]) -> None:
    tables = yaml.safe_load(paper.TABLES_FILE.read_text(encoding="utf-8"))
    table_1 = tables["table1_action_recognition"]["rows"]
    numbers = [values[-1] for name, values in table_1.items() if name.startswith("VATT")]
    numbers += tables["table5_droptoken_pretraining"]["rows"]["multimodal_gflops"]
    table_6 = tables["table6_droptoken_finetuning"]["rows"]
    numbers += [n for name, row in table_6.items() if "gflops" in name for n in row if n]
    shown = [row.paper for row in rows if row.unit in ("TFLOPs", "GFLOPs") and row.paper]
    assert sorted(shown) == sorted(numbers)
    for row in rows:
        if row.unit in ("TFLOPs", "GFLOPs") and row.paper and row.ours:
            assert row.ours == pytest.approx(row.paper, rel=1e-3)


def test_parameters_equal_the_reference_counts_to_the_integer(rows: list[Check]) -> None:
    ours = {row.name: row.ours for row in rows}
    # golden/param_counts.json
    assert ours["parameters, BBS, trainable"] == 193_877_292
    assert ours["parameters, LBS, video tower"] == 305_498_112
    assert ours["parameters, MA-Medium, trainable"] == 162_990_336
    assert ours["parameters, MA-Medium, shared encoder"] == 151_156_736
    assert ours["parameters, video large, 400 classes"] == 305_908_112
    assert ours["parameters, spectrogram base, 527 classes"] == 85_462_031


def test_a_number_off_by_more_than_the_tolerance_fails() -> None:
    common = {"source": "here", "unit": "1", "expected": 2.0, "tolerance": 0.5}
    assert compare("near", ours=2.5, **common).state == "pass"
    far = compare("far", ours=2.6, **common)
    assert (far.state, far.reason) == ("fail", "ours differs by +0.6")
    assert compare("nan", ours=math.nan, **common).state == "fail"
    assert not_run("x", source="y", unit="1", paper=1.0, ours=None, reason="z").state == "not run"


def test_published_numbers_come_from_the_tables() -> None:
    assert published("table6_droptoken_finetuning", "32x320x320 gflops", "drop_50") == 572.5


def test_a_fault_in_the_code_makes_rows_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vatt.verify.losses.learning_rate", lambda step, **_: 1e-4)
    monkeypatch.setattr("vatt.verify.losses.mil_nce", lambda video, *_, **__: video.sum() * 0)
    monkeypatch.setattr("vatt.verify.counts.cut", lambda inputs, patch: inputs[..., 0].flatten(1))
    for part in (schedule_rows, loss_rows, token_rows):
        assert any(row.state == "fail" for row in part())


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    return int(ended.value.code or 0)


def test_the_command_prints_a_line_a_row_and_ends_with_0(
    capsys: pytest.CaptureFixture[str], rows: list[Check]
) -> None:
    assert run("verify") == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == len(rows) + 1
    assert "0 fail" in err


def test_the_command_ends_with_1_when_a_row_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vatt.verify.losses.learning_rate", lambda step, **_: 1e-4)
    monkeypatch.setattr("vatt.verify.PARTS", (schedule_rows,))
    assert run("verify", "--json", "--failed") == 1
    found = json.loads(capsys.readouterr().out)["rows"]
    assert found and all(row["state"] == "fail" for row in found)


def test_help_needs_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", "--help") == 0
    assert "Exit code 1" in capsys.readouterr().out
