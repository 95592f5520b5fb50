"""Balanced choices of labelled samples."""

from itertools import pairwise

import numpy as np

from vatt.data.loading.batches import balanced

CLASSES = np.array(["a", "b", "c"])


def test_balanced_rows_take_equally_many_of_each_class_whatever_the_order() -> None:
    ids = np.array([f"clip-{i}" for i in range(100)])
    labels = np.where(np.arange(100) < 80, "often", "seldom")
    rows = balanced(list(ids), list(labels), 30)
    assert sorted(labels[rows].tolist()) == ["often"] * 15 + ["seldom"] * 15
    order = np.random.default_rng(0).permutation(100)
    again = balanced(list(ids[order]), list(labels[order]), 30)
    assert set(ids[order][again]) == set(ids[rows])


def test_more_labels_never_take_a_clip_away() -> None:
    ids = np.array([f"clip-{i}" for i in range(60)])
    labels = CLASSES[np.arange(60) % 3]
    chosen = [set(balanced(list(ids), list(labels), count)) for count in (9, 21, 45, None)]
    assert all(fewer < more for fewer, more in pairwise(chosen))
    assert len(chosen[-1]) == 60


def test_clips_without_the_label_are_left_out() -> None:
    ids = np.array(["a", "b", "c"])
    assert balanced(list(ids), ["x", "", "y"], None) == [0, 2]
