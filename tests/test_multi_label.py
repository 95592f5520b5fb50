"""Measures of clips with several labels equal scikit-learn's, draw by draw."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from vatt.metrics import MEASURES, measured_multi_label, measured_multi_label_difference, resampled


def clips(seed, *, n=40, classes=5, levels=None):
    """Scores that know something of the truth; with `levels` many of them are equal."""
    generator = np.random.default_rng(seed)
    truth = generator.random((n, classes)) < 0.3
    scores = truth + generator.normal(size=(n, classes))
    return (scores if levels is None else np.rint(scores * levels)), truth


def naive(scores, truth, weights):
    """The measures of one draw, class by class, from scikit-learn's weighted functions."""
    found = {name: [] for name in MEASURES}
    for column in range(truth.shape[1]):
        drawn = weights > 0
        wanted = truth[drawn, column]
        if wanted.all() or not wanted.any():
            continue
        given_scores, count = scores[drawn, column], weights[drawn]
        area = roc_auc_score(wanted, given_scores, sample_weight=count)
        pairs = (count * wanted).sum() * (count * ~wanted).sum()
        inside = min(max(area, 0.5 / pairs), 1 - 0.5 / pairs)
        found["auc"].append(area)
        found["d_prime"].append(
            math.sqrt(2) * torch.special.ndtri(torch.tensor(inside, dtype=torch.float64)).item()
        )
        found["mean_ap"].append(average_precision_score(wanted, given_scores, sample_weight=count))
    return {name: np.mean(values) for name, values in found.items()}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([None, 1, 3]))
def test_every_draw_equals_scikit_learn_ties_included(seed, levels):
    scores, truth = clips(seed, levels=levels)
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(len(scores), np.full(len(scores), 1 / len(scores)), size=3)
    found = resampled(scores, truth, weights.astype(float))
    for row, drawn in enumerate(weights):
        expected = naive(scores, truth, drawn)
        for name in MEASURES:
            assert found[name][row] == pytest.approx(expected[name], abs=1e-9)


def test_the_values_are_those_of_the_undrawn_clips():
    scores, truth = clips(1)
    found = measured_multi_label(scores, truth, resamples=50, seed=0)
    expected = naive(scores, truth, np.ones(len(scores)))
    for name in MEASURES:
        assert found[name]["value"] == pytest.approx(expected[name], abs=1e-6)
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]


def test_random_scores_reach_chance():
    generator = np.random.default_rng(0)
    truth = generator.random((4000, 6)) < 0.2
    found = measured_multi_label(generator.random((4000, 6)), truth, resamples=50, seed=0)
    for metric in found.values():
        assert metric["value"] == pytest.approx(metric["chance"], abs=0.05)


def test_perfect_scores_have_a_finite_d_prime():
    _, truth = clips(2)
    found = measured_multi_label(truth.astype(float), truth, resamples=20, seed=0)
    assert found["mean_ap"]["value"] == found["auc"]["value"] == 1.0
    assert 3 < found["d_prime"]["value"] < 6


def test_a_run_does_not_differ_from_itself_and_pairing_narrows():
    scores, truth = clips(3, n=200)
    same = measured_multi_label_difference(scores, scores, truth, resamples=20, seed=0)
    assert all((m["value"], m["low"], m["high"]) == (0, 0, 0) for m in same.values())
    worse = scores + np.random.default_rng(0).normal(size=scores.shape) * 0.2
    gap = measured_multi_label_difference(scores, worse, truth, resamples=200, seed=0)["mean_ap"]
    alone = measured_multi_label(scores, truth, resamples=200, seed=0)["mean_ap"]
    assert gap["high"] - gap["low"] < alone["high"] - alone["low"]


def test_labels_that_all_clips_share_are_refused():
    with pytest.raises(ValueError, match="no class has both"):
        measured_multi_label(np.zeros((4, 1)), np.ones((4, 1), dtype=bool), resamples=5, seed=0)
