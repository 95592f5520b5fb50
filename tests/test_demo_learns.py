"""The demo learns: the whole pipeline at its own settings, for three seeds (minutes each)."""

from pathlib import Path
from typing import Any

import pytest

from tests.test_stages import metrics, new_project, vattctl

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[0, 1, 2], ids="seed{}".format)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """evaluate.json of a full demo."""
    project: Path = new_project(tmp_path_factory.mktemp("demo"))
    vattctl(project, "demo", "--set", f"seed={request.param}")
    return metrics(project, "evaluate")


def test_retrieval_is_far_above_chance(results: Any) -> None:
    """Pool of 256, only a clip's own text or sound counts: chance of R@10 is 3.9 %."""
    retrieval = results["retrieval"]["pretrained"]
    assert retrieval["text_to_video"]["recall_at_10"]["n"] == 256
    assert retrieval["text_to_video"]["recall_at_10"]["value"] >= 0.45
    assert retrieval["video_to_audio"]["recall_at_10"]["value"] >= 0.40
    # a model that knows motions alone reaches 10 %
    assert retrieval["text_to_video"]["class_at_1"]["value"] >= 0.25


def test_frozen_features_know_the_digit(results: Any) -> None:
    assert results["probes"]["digit"]["svm"]["difference"]["value"] >= 0.12


def test_pretraining_helps_fine_tuning_on_every_task(results: Any) -> None:
    differences = {name: task["difference"] for name, task in results["classification"].items()}
    assert differences.keys() == {"action", "audio", "image"}
    assert differences["image"]["value"] >= 0.08  # the digit, 150 labels
    assert all(difference["low"] > 0 for difference in differences.values()), differences
