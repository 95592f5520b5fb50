"""A person with nothing but released weights evaluates them: no training, nothing replaced."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.model.golden import FOLDER
from tests.test_stages import SMALL, new_project, sets, vattctl

pytestmark = pytest.mark.slow
MOTIONS = ["circle", "down", "grow", "left", "right", "shake", "shrink"]  # the reference has seven


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, and nothing trained."""
    folder = new_project(tmp_path_factory.mktemp("project"))
    (folder / "released").mkdir()
    vattctl(folder, "repro", "preprocess", *sets(SMALL))
    return folder


def released(project: Path, name: str, heads: str, *more: str) -> Path:
    """A reference checkpoint, imported."""
    prefix = FOLDER / f"ckpt_{name}" / "ckpt-1"
    if not prefix.with_suffix(".index").exists():
        pytest.skip(f"{prefix}.index is not here")
    out = project / "released" / name
    vattctl(project, "import", str(prefix), "--out", str(out), "--heads", heads, *more)
    return out


def found(project: Path, name: str) -> dict[str, Any]:
    folder = project / "experiments" / f"evaluate-{name}" / "reports"
    assert "<html" in (folder / "report" / "report.html").read_text(encoding="utf-8")
    metrics: dict[str, Any] = json.loads((folder / "metrics" / "evaluate.json").read_text())
    return metrics


def test_an_imported_encoder_is_evaluated_without_training(project: Path) -> None:
    words = project / "data" / "shards" / "vocabulary.txt"
    heads = "video=4,audio=3,text=2"
    given = released(project, "fac_pretrain", heads, "--vocab", str(words))
    done = vattctl(project, "evaluate", "--from", os.path.relpath(given, project))
    assert "experiments/evaluate-fac_pretrain/reports/report/report.html" in done.stdout
    metrics = found(project, "fac_pretrain")
    directions = {"text_to_video", "video_to_text", "audio_to_video", "video_to_audio"}
    assert directions <= metrics["retrieval"]["pretrained"].keys()
    assert metrics["probes"].keys() == {"digit", "rhythm"}
    assert metrics["classification"] == {}
    assert not (project / "runs" / "checkpoints").exists()
    assert not (project / "reports" / "metrics" / "evaluate.json").exists()


def test_an_imported_classifier_is_evaluated_once_its_classes_have_names(project: Path) -> None:
    given = released(project, "ft_audio", "3")
    failed = vattctl(project, "evaluate", "--from", str(given), check=False)
    assert failed.returncode == 3
    assert "numbers 7 classes, the clips have 8 labels" in failed.stderr
    config = json.loads((given / "config.json").read_text())
    config["classifier"]["classes"] = MOTIONS
    (given / "config.json").write_text(json.dumps(config))
    vattctl(project, "evaluate", "--from", str(given))
    metrics = found(project, "ft_audio")
    assert metrics["classification"]["audio"]["pretrained"]["top_1"]["n"] == 48
    assert metrics["retrieval"] == {}


def test_what_is_no_checkpoint_is_named(project: Path) -> None:
    failed = vattctl(project, "evaluate", "--from", "data", check=False)
    assert failed.returncode == 3
    assert "has no model.safetensors" in failed.stderr
    assert "vattctl import --out" in failed.stderr
