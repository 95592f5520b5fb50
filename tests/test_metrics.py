"""Every measure equals the reference arrays and a naive loop written from its definition."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vatt import metrics

GOLDEN = np.load(Path(__file__).parent / "golden" / "measures.npz")


def naive_rank(row, target):
    higher = sum(score > row[target] for score in row)
    equal = sum(score == row[target] for score in row) - 1
    return 1 + higher + equal / 2


def naive_average_precision(scores, truth):
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    hits, total = 0, 0.0
    for place, i in enumerate(order, start=1):
        if truth[i]:
            hits += 1
            total += hits / place
    return total / hits


def naive_auc(scores, truth):
    positive = [s for s, t in zip(scores, truth, strict=True) if t]
    negative = [s for s, t in zip(scores, truth, strict=True) if not t]
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


def test_ranks_of_the_diagonal_equal_the_reference_retrieval():
    similarities = GOLDEN["retrieval/sim"]
    own = metrics.ranks(similarities, np.arange(len(similarities)))
    for k in (1, 5, 10):
        assert (own <= k).mean() == pytest.approx(GOLDEN[f"retrieval/R{k}"])
    assert np.median(own) == GOLDEN["retrieval/MedianRank"]


def test_top_k_accuracy_equals_the_reference():
    scores, labels = GOLDEN["accuracy/pred"], GOLDEN["accuracy/labels"][:, 0]
    for k in (1, 5):
        correct = metrics.correct_at_k(scores, labels, k)
        assert correct.mean() == pytest.approx(GOLDEN[f"accuracy/top{k}"])


def values(scores, truth):
    """mAP, AUC and d' of all clips, each drawn once."""
    found = metrics.resampled(scores, truth, np.ones((1, len(scores))))
    return {name: draws[0] for name, draws in found.items()}


def test_multilabel_measures_equal_the_reference():
    found = values(GOLDEN["multilabel/pred"], GOLDEN["multilabel/true"])
    assert found["mean_ap"] == pytest.approx(GOLDEN["multilabel/mAP"], rel=1e-6)
    assert found["auc"] == pytest.approx(GOLDEN["multilabel/AUC"], rel=1e-6)
    assert found["d_prime"] == pytest.approx(GOLDEN["multilabel/d-prime"], rel=1e-4)


def test_multilabel_measures_equal_naive_loops():
    generator = np.random.default_rng(3)
    scores, truth = generator.random((25, 4)), generator.random((25, 4)) < 0.3
    columns = list(zip(scores.T, truth.T, strict=True))
    found = values(scores, truth)
    naive = np.mean([naive_average_precision(s, t) for s, t in columns])
    assert found["mean_ap"] == pytest.approx(naive)
    assert found["auc"] == pytest.approx(np.mean([naive_auc(*c) for c in columns]))


def test_a_class_that_never_occurs_leaves_the_average():
    scores = np.random.default_rng(0).random((10, 2))
    truth = np.stack([np.arange(10) % 2, np.zeros(10)], axis=1)
    assert values(scores, truth) == values(scores[:, :1], truth[:, :1])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_ranks_equal_a_naive_loop_ties_included(rows, columns, seed):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 4, size=(rows, columns))
    targets = generator.integers(0, columns, size=rows)
    naive = [naive_rank(row, target) for row, target in zip(scores, targets, strict=True)]
    assert metrics.ranks(scores, targets).tolist() == naive


def test_a_collapsed_model_gets_chance_and_not_first_place():
    own = metrics.ranks(np.ones((100, 100)), np.arange(100))
    assert not (own <= 10).any()
    assert np.median(own) == 50.5


def test_scores_with_nan_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        metrics.ranks(np.full((2, 2), np.nan), [0, 1])


def test_bootstrap_interval_equals_a_naive_loop_and_the_same_seed_gives_the_same():
    values = np.random.default_rng(1).random(40)
    generator = np.random.default_rng(7)
    means = []
    for _ in range(200):
        picks = [values[generator.integers(40)] for _ in range(40)]
        means.append(sum(picks) / 40)
    naive = np.quantile(means, [0.025, 0.975])
    ours = metrics.bootstrap_interval(values, 200, seed=7)
    assert ours == pytest.approx(tuple(naive), abs=0.02)
    assert ours == metrics.bootstrap_interval(values, 200, seed=7)


def test_the_interval_of_a_share_has_the_width_of_the_normal_approximation():
    correct = np.repeat([1.0, 0.0], [300, 700])
    low, high = metrics.bootstrap_interval(correct, 4000, seed=0)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.004)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = metrics.bootstrap_interval(generator.random(100) < 0.4, 300, seed=trial)
        covered += low <= 0.4 <= high
    assert 180 <= covered <= 198


def test_pairing_narrows_the_interval_of_a_difference():
    generator = np.random.default_rng(2)
    theirs = generator.random(500) < 0.5
    ours = theirs | (generator.random(500) < 0.1)
    low, high = metrics.paired_difference_interval(ours, theirs, 1000, seed=0)
    assert low > 0.0
    unpaired = 2 * 1.96 * np.sqrt(2 * 0.25 / 500)
    assert high - low < unpaired / 2


def test_unpaired_results_are_refused():
    with pytest.raises(ValueError, match="not paired"):
        metrics.measured_difference([1.0], [1.0, 0.0], resamples=10, seed=0)


def test_a_metric_says_its_interval_chance_and_number_of_clips():
    metric = metrics.measured([1, 0, 1, 1], chance=0.25, resamples=500, seed=0)
    assert metric["value"] == 0.75
    assert metric["low"] <= 0.75 <= metric["high"]
    assert (metric["chance"], metric["n"]) == (0.25, 4)


def test_chance_is_the_share_of_the_most_frequent_label():
    assert metrics.majority_share(["a", "b", "a", "c"]) == 0.5


def test_the_mean_of_folds_and_its_draws_equal_a_naive_loop():
    """Clips are drawn once for all folds; one that a fold did not ask counts nowhere in it."""
    generator = np.random.default_rng(0)
    values = np.where(generator.random((30, 3)) < 0.6, generator.random((30, 3)) < 0.7, np.nan)

    def naive(rows):
        folds = []
        for fold in range(3):
            asked = [values[row, fold] for row in rows if not np.isnan(values[row, fold])]
            folds.append(sum(asked) / len(asked))
        return sum(folds) / 3

    draws = np.random.default_rng(5).integers(30, size=(100, 30))
    expected = np.quantile([naive(rows) for rows in draws], [0.025, 0.975])
    ours = metrics.bootstrap_interval(values, 100, 5, metrics.over_folds(3))
    assert ours == pytest.approx(tuple(expected))
    metric = metrics.measured(
        values, chance=0.1, resamples=100, seed=5, statistic=metrics.over_folds(3)
    )
    assert metric["value"] == pytest.approx(naive(range(30)), abs=1e-6)
    assert metric["n"] == 30


def test_a_clip_is_drawn_with_all_its_queries():
    owners = np.array([0, 2, 2, 1, 2, 0])
    values = np.array([1.0, 5.0, 7.0, 2.0, 9.0, 3.0])
    table = metrics.by_clip(values, owners, 3)
    np.testing.assert_array_equal(
        table, [[1.0, 3.0, np.nan], [2.0, np.nan, np.nan], [5.0, 7.0, 9.0]]
    )
    draws = np.random.default_rng(2).integers(3, size=(60, 3))
    naive = [
        np.median([v for row in rows for v, o in zip(values, owners, strict=True) if o == row])
        for rows in draws
    ]
    ours = metrics.bootstrap_interval(table, 60, 2, np.nanmedian)
    assert ours == pytest.approx(tuple(np.quantile(naive, [0.025, 0.975])))


def test_draws_are_the_same_however_many_are_made_at_once(monkeypatch):
    values = np.random.default_rng(0).random(17)
    whole = metrics.bootstrap_interval(values, 250, 3)
    monkeypatch.setattr(metrics, "DRAWS_AT_ONCE", 7)
    assert metrics.bootstrap_interval(values, 250, 3) == whole
