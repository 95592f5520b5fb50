"""Periodic evaluation: it changes no weight, is seen in the curves, and keeps the best."""

import json
import logging

import pytest

from tests.training import evaluating, tiny
from vatt.checkpoint import load, load_config
from vatt.training.pretrain import fingerprint


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return evaluating.trained(tmp_path_factory.mktemp("without"), evaluate_every=None)


def test_weights_are_the_same_with_it_and_without(undisturbed, tmp_path):
    found = evaluating.trained(tmp_path, evaluate_every=2)
    assert found["asked"] == [2, 4, 6]
    assert found["hash"] == undisturbed["hash"]


def test_its_measures_join_the_curve_and_the_best_weights_are_kept(tmp_path):
    found = evaluating.trained(tmp_path, evaluate_every=2, report_every=4, scores=[0.1, 0.5, 0.5])
    curve = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [(row["step"], row.get("val.score")) for row in curve] == [(2, 0.1), (4, 0.5), (6, 0.5)]
    assert load_config(tmp_path / "best")["best"] == {"step": 4, "score": 0.5}
    assert load(tmp_path / "best").state_dict().keys() == found["weights"].keys()
    assert found["tags"]["vatt.best_step"] == "4"


def test_a_resumed_training_keeps_its_best_and_a_new_one_forgets_it(tmp_path):
    scores = [0.9, 0.1, 0.2]
    with pytest.raises(KeyboardInterrupt):
        evaluating.trained(tmp_path, evaluate_every=2, scores=scores, interrupted_at=5)
    evaluating.trained(tmp_path, evaluate_every=2, scores=[0.2])
    assert load_config(tmp_path / "best")["best"] == {"step": 2, "score": 0.9}
    evaluating.trained(tmp_path, evaluate_every=3, scores=[0.3, 0.2])
    assert load_config(tmp_path / "best")["best"] == {"step": 3, "score": 0.3}


def test_settings_of_the_evaluation_do_not_hinder_resuming():
    def identity(**changes):
        params = tiny.pretrain_params(**changes)
        return fingerprint(params, tiny.model_params(), data_hash="x", seed=0)

    assert identity(evaluate_every=7, evaluate_clips=5) == identity()


def test_spikes_are_logged_and_left_in_the_metrics(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    session = evaluating.Listening(tmp_path)
    session.begin(0)
    session.spike(7, 9.5)
    session.report(10, {"loss": 1.0, "data_wait_share": 0.0})
    (tmp_path / evaluating.WORDS).write_text("word\t1\n")
    session.export(tiny.make_model(tiny.model_params()).state_dict())
    assert json.loads((tmp_path / "metrics.json").read_text())["loss_spikes"] == [7]
    assert "loss spike at step 7: 9.5" in caplog.text
    assert session.run.tags["vatt.loss_spikes"] == "7"
