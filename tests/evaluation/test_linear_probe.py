"""Linear probes: they find what is there, nothing where nothing is, and the same twice."""

import numpy as np
import pytest

from vatt.evaluation.linear_probe import held_out_rows, low_rank_correct, svm_correct

CLASSES = np.array(["cat", "dog", "owl"])


def features(n, *, signal, seed):
    generator = np.random.default_rng(seed)
    classes = np.arange(n) % 3
    return np.float32(signal * np.eye(3, 6)[classes] + generator.normal(size=(n, 6))), CLASSES[
        classes
    ]


def low_rank(train, test):
    return low_rank_correct(train, test, steps=200, seed=0)


@pytest.mark.parametrize("probe", [svm_correct, low_rank])
def test_a_label_that_the_features_show_is_found(probe):
    correct = probe(features(150, signal=6.0, seed=0), features(90, signal=6.0, seed=1))
    assert correct.mean() > 0.9


@pytest.mark.parametrize("probe", [svm_correct, low_rank])
def test_a_label_that_they_do_not_show_is_guessed(probe):
    correct = probe(features(150, signal=0.0, seed=0), features(300, signal=0.0, seed=1))
    assert correct.mean() == pytest.approx(1 / 3, abs=0.1)


@pytest.mark.parametrize("probe", [svm_correct, low_rank])
def test_a_probe_answers_the_same_twice(probe):
    train, test = features(60, signal=1.0, seed=0), features(60, signal=1.0, seed=1)
    np.testing.assert_array_equal(probe(train, test), probe(train, test))


@pytest.mark.parametrize("probe", [svm_correct, low_rank])
def test_the_scale_of_a_feature_does_not_matter(probe):
    (train, labels), (test, wanted) = (features(90, signal=4.0, seed=s) for s in (0, 1))
    scale = np.float32([1, 1e3, 1e-3, 1, 1, 1])
    plain = probe((train, labels), (test, wanted)).mean()
    scaled = probe((train * scale, labels), (test * scale, wanted)).mean()
    assert scaled == pytest.approx(plain, abs=0.03)


def test_a_test_label_that_training_never_showed_is_never_right():
    train, (test, _) = features(60, signal=6.0, seed=0), features(30, signal=6.0, seed=1)
    assert not svm_correct(train, (test, np.full(30, "yak"))).any()


def test_the_held_out_fifth_holds_every_class_of_a_corpus_made_in_turns():
    for classes in range(2, 12):
        held_out = held_out_rows(400)
        assert held_out.sum() == 80
        assert set(np.arange(400)[held_out] % classes) == set(range(classes))
