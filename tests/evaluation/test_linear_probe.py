"""Linear probes: they find what is there, nothing where nothing is, and the same twice."""

import numpy as np
import pytest
import torch
from sklearn.svm import LinearSVC

from vatt.evaluation.probes import (
    BATCH_SIZE,
    COMPONENTS,
    LEARNING_RATE,
    LowRankClassifier,
    held_out_rows,
    low_rank_correct,
    num_sampled,
    svm_correct,
)

CLASSES = np.array(["cat", "dog", "owl"])


def features(n, *, signal, seed):
    generator = np.random.default_rng(seed)
    classes = np.arange(n) % 3
    return np.float32(signal * np.eye(3, 6)[classes] + generator.normal(size=(n, 6))), CLASSES[
        classes
    ]


def one_window(train, test):
    return train, (test[0][:, None], test[1])


def svm(train, test):
    return svm_correct(*one_window(train, test))


def low_rank(train, test):
    return low_rank_correct(*one_window(train, test), steps=200, seed=0)


@pytest.mark.parametrize("probe", [svm, low_rank])
def test_a_label_that_the_features_show_is_found(probe):
    correct = probe(features(150, signal=6.0, seed=0), features(90, signal=6.0, seed=1))
    assert correct.mean() > 0.9


@pytest.mark.parametrize("probe", [svm, low_rank])
def test_a_label_that_they_do_not_show_is_guessed(probe):
    correct = probe(features(150, signal=0.0, seed=0), features(300, signal=0.0, seed=1))
    assert correct.mean() == pytest.approx(1 / 3, abs=0.1)


@pytest.mark.parametrize("probe", [svm, low_rank])
def test_a_probe_answers_the_same_twice(probe):
    train, test = features(60, signal=1.0, seed=0), features(60, signal=1.0, seed=1)
    np.testing.assert_array_equal(probe(train, test), probe(train, test))


@pytest.mark.parametrize("probe", [svm, low_rank])
def test_the_scale_of_a_feature_does_not_matter(probe):
    (train, labels), (test, wanted) = (features(90, signal=4.0, seed=s) for s in (0, 1))
    scale = np.float32([1, 1e3, 1e-3, 1, 1, 1])
    plain = probe((train, labels), (test, wanted)).mean()
    scaled = probe((train * scale, labels), (test * scale, wanted)).mean()
    assert scaled == pytest.approx(plain, abs=0.03)


def test_a_test_label_that_training_never_showed_is_never_right():
    train, (test, _) = features(60, signal=6.0, seed=0), features(30, signal=6.0, seed=1)
    assert not svm(train, (test, np.full(30, "yak"))).any()


def test_the_held_out_fifth_holds_every_class_of_a_corpus_made_in_turns():
    for classes in range(2, 12):
        held_out = held_out_rows(400)
        assert held_out.sum() == 80
        assert set(np.arange(400)[held_out] % classes) == set(range(classes))


def test_the_low_rank_classifier_is_that_of_the_paper():
    """C = U V, 128 components, a tenth of them a step, Adam at 5e-4, 64 clips a step."""
    model = LowRankClassifier(6, 3, torch.Generator().manual_seed(0))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == {"down.weight": (128, 6), "up.weight": (3, 128), "up.bias": (3,)}
    assert (COMPONENTS, num_sampled(), LEARNING_RATE, BATCH_SIZE) == (128, 13, 5e-4, 64)


def test_low_rank_training_equals_a_naive_loop_with_the_same_draws():
    """Gradients of a softmax by hand, Adam by its formula, whole matrices with a mask."""
    (train, labels), (test, _) = (features(90, signal=1.0, seed=s) for s in (0, 1))
    windows = np.stack([test, test + 1, test - 0.5], axis=1)
    classes, targets = np.unique(labels, return_inverse=True)
    mean, deviation = train.mean(axis=0, dtype=float), train.std(axis=0, dtype=float)
    given, asked = (train - mean) / deviation, (windows - mean) / deviation

    draws = torch.Generator().manual_seed(5)
    start = LowRankClassifier(6, 3, draws)
    weights = [p.detach().double().numpy().copy() for p in (start.down.weight, start.up.weight)]
    weights.append(np.zeros(3))
    first, second = ([np.zeros_like(w) for w in weights] for _ in range(2))
    for step in range(1, 31):
        rows = torch.randint(len(given), (64,), generator=draws).numpy()
        kept = np.zeros(128)
        kept[torch.randperm(128, generator=draws)[:13].numpy()] = 128 / 13
        u, v, bias = weights
        hidden = given[rows] @ u.T * kept
        logits = hidden @ v.T + bias
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        error = (shares - np.eye(3)[targets[rows]]) / 64
        gradients = [((error @ v) * kept).T @ given[rows], error.T @ hidden, error.sum(axis=0)]
        for w, g, m, s in zip(weights, gradients, first, second, strict=True):
            m[:] = 0.9 * m + 0.1 * g
            s[:] = 0.999 * s + 0.001 * g * g
            w -= 5e-4 * (m / (1 - 0.9**step)) / (np.sqrt(s / (1 - 0.999**step)) + 1e-8)
    u, v, bias = weights
    logits = asked @ u.T @ v.T + bias
    shares = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    naive = classes[shares.mean(axis=1).argmax(axis=1)]
    for wanted in CLASSES:  # what is right tells what was answered
        ours = low_rank_correct((train, labels), (windows, np.full(90, wanted)), steps=30, seed=5)
        np.testing.assert_array_equal(ours, naive == wanted)
    assert len(set(naive.tolist())) > 1


def test_the_svm_equals_one_chosen_and_averaged_by_hand():
    (train, labels), (test, _) = (features(90, signal=1.5, seed=s) for s in (0, 1))
    windows = np.stack([test, test + 1.5, test - 0.5], axis=1)
    mean, deviation = train.mean(axis=0, dtype=float), train.std(axis=0, dtype=float)
    given = (train - mean) / deviation
    out = held_out_rows(90)
    scores = {}
    for c in (0.001, 0.01, 0.1, 1.0):
        model = LinearSVC(C=c, dual=False, tol=1e-3).fit(given[~out], labels[~out])
        scores[c] = np.mean(model.predict(given[out]) == labels[out])
    model = LinearSVC(C=max(scores, key=scores.get), dual=False, tol=1e-3).fit(given, labels)
    naive = []
    for clip in windows:
        margins = [(w - mean) / deviation @ model.coef_.T + model.intercept_ for w in clip]
        naive.append(model.classes_[np.mean(margins, axis=0).argmax()])
    for wanted in CLASSES:
        ours = svm_correct((train, labels), (windows, np.full(90, wanted)))
        np.testing.assert_array_equal(ours, np.array(naive) == wanted)


def test_of_two_classes_the_svm_has_one_margin():
    train, labels = features(60, signal=6.0, seed=0)
    two = labels != "owl"
    assert svm((train[two], labels[two]), (train[two], labels[two])).mean() > 0.9
