"""The script for a short visit to a GPU runs here in tiny form, so that it cannot break unseen."""

import json
import subprocess
import sys

import pytest

from tests.test_architecture import ROOT

SPEED = ("encoder", "plain", "cached", "finetuning", "features")
RUN = "import sys; sys.path.insert(0, 'bench'); import gpu; gpu.run_parts(sys.argv[1:], tiny=True)"


def rows_of(*parts: str, environment: dict[str, str] | None = None) -> dict[str, list[dict]]:
    command = [sys.executable, "-c", RUN, *parts]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {part: [row for row in rows if row["part"] == part] for part in parts}


def test_every_part_gives_its_figures():
    rows = rows_of("precision", "indices", "colours", "auto", *SPEED)
    assert len(rows["precision"]) == 4
    assert all("precision.encoder.video=bf16" in row["note"] for row in rows["precision"])
    assert "784 of 1568 tokens of 2048 clips" in rows["indices"][0]["note"]
    for part in SPEED:
        assert rows[part] and all(row["low"] <= row["seconds"] <= row["high"] for row in rows[part])
        assert all(row["clips_per_second"] > 0 < row["mfu_measured"] for row in rows[part])
    assert {"plan_seconds", "plan_gib"} <= rows["cached"][0].keys()
    assert [row["what"].split(", ", 2)[2] for row in rows["cached"]] == [
        *("ZeRO-1, eager, 1 kept", "ZeRO-2, eager, 1 kept", "ZeRO-3, eager, 1 kept"),
        "ZeRO-1, eager, 0 kept",
    ]
    assert all("video" in row["attention"] for row in rows["cached"] + rows["plain"])
    assert rows["colours"][0]["seconds"] > 0
    choice, step = rows["auto"]
    assert choice["note"] == "all of 4 clips at once, 1 kept" and "4 clips, plain" in step["what"]


def test_a_part_that_fails_is_named_and_the_others_go_on(tmp_path):
    command = [sys.executable, "bench/gpu.py", "--tiny", "--only", "indices", "stage"]
    command += ["--shards", str(tmp_path), "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert done.returncode == 1 and "not ok: stage" in done.stdout
    assert found["indices"]["state"] == "ok" and found["stage"]["state"].startswith("failed")


def test_without_a_gpu_only_the_tiny_form_starts():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    command = [sys.executable, "bench/gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--tiny tries every part" in done.stderr
