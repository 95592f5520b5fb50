"""Retrieval: only a clip's own partner counts; both ways of averaging equal the reference."""

from pathlib import Path

import numpy as np
import pytest

from vatt.evaluation.features import FeatureSet
from vatt.evaluation.retrieval import (
    average_embeddings,
    average_similarities,
    cosine,
    draw_pool,
    retrieval_metrics,
    similarities,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "measures.npz")
DIRECTIONS = {"text_to_video", "video_to_text", "audio_to_video", "video_to_audio"}


def clips(n=40, *, noise=0.0, seed=0, labels=None):
    """Clips of which every modality sees the same vector, with noise."""
    generator = np.random.default_rng(seed)
    truth = generator.normal(size=(n, 8))

    def seen(*shape):
        return (truth if len(shape) == 2 else truth[:, None]) + noise * generator.normal(size=shape)

    return FeatureSet(
        clip_ids=np.array([f"clip-{i}" for i in range(n)]),
        labels=labels or {"digit": np.array([str(i % 10) for i in range(n)])},
        video=truth,
        audio=truth,
        video_va=seen(n, 8),
        audio_va=seen(n, 8),
        video_vt=seen(n, 8),
        text_vt=seen(n, 3, 8),
        text=np.full((n, 3, 4), 2),
        has_video=np.ones(n, bool),
        has_audio=np.ones(n, bool),
        has_text=np.ones((n, 3), bool),
    )


def measure(table, found, class_labels=("digit",)):
    return retrieval_metrics(table, found, class_labels=class_labels, resamples=50, seed=0)


def test_both_averages_over_windows_equal_the_reference():
    texts = GOLDEN["similarity/text"]
    windows = GOLDEN["similarity/video(6*4 windows)"].reshape(6, 4, 8)
    everything = np.ones((6, 4), bool)
    np.testing.assert_allclose(
        average_embeddings(texts, windows, everything),
        GOLDEN["similarity/average_embeddings"],
        atol=1e-6,
    )
    np.testing.assert_allclose(
        average_similarities(texts, windows, everything),
        GOLDEN["similarity/average_similarities"],
        atol=1e-6,
    )


def test_averages_equal_naive_loops_over_the_valid_candidates():
    generator = np.random.default_rng(0)
    videos, texts = generator.normal(size=(4, 8)), generator.normal(size=(4, 3, 8))
    valid = np.array([[1, 1, 1], [1, 0, 0], [0, 1, 1], [1, 1, 0]], bool)
    for i in range(4):
        for j in range(4):
            kept = [texts[j, k] for k in range(3) if valid[j, k]]
            mean = sum(kept) / len(kept)
            angle = videos[i] @ mean / np.linalg.norm(videos[i]) / np.linalg.norm(mean)
            assert average_embeddings(videos, texts, valid)[i, j] == pytest.approx(angle)
            angles = [videos[i] @ t / np.linalg.norm(videos[i]) / np.linalg.norm(t) for t in kept]
            assert average_similarities(videos, texts, valid)[i, j] == pytest.approx(
                np.mean(angles)
            )


def test_a_zero_vector_is_similar_to_nothing_and_no_nan():
    assert cosine(np.zeros((1, 8)), np.ones((2, 8))).tolist() == [[0, 0]]


def test_clips_that_agree_are_found_first_in_every_direction():
    for table, found in similarities(clips(), pool=40).values():
        metrics = measure(table, found)
        assert metrics["recall_at_1"]["value"] == 1.0
        assert metrics["median_rank"]["value"] == 1.0


def test_unrelated_clips_are_found_at_chance():
    found = similarities(clips(400, noise=1e6), pool=400)
    for direction in DIRECTIONS:
        metrics = measure(*found[direction])
        assert metrics["recall_at_10"]["value"] == pytest.approx(10 / 400, abs=0.03)
        assert metrics["median_rank"]["value"] == pytest.approx(200.5, rel=0.2)
        assert metrics["class_at_1"]["value"] == pytest.approx(0.1, abs=0.06)


def test_chance_levels_follow_from_the_pool():
    metrics = measure(*similarities(clips(40), pool=40)["text_to_video"])
    assert metrics["recall_at_1"]["chance"] == 1 / 40
    assert metrics["recall_at_10"]["chance"] == 10 / 40
    assert metrics["median_rank"]["chance"] == 20.5
    assert metrics["class_at_1"]["chance"] == pytest.approx(0.1)
    assert metrics["recall_at_10"]["n"] == 40


def test_chance_is_never_above_one_in_a_pool_smaller_than_k():
    metrics = measure(*similarities(clips(4), pool=256)["text_to_video"])
    assert metrics["recall_at_10"]["chance"] == 1.0


def test_another_clip_of_the_same_class_is_no_hit_but_counts_for_class_at_1():
    found = clips(4, labels={"digit": np.array(["1", "1", "2", "2"])})
    swapped = np.eye(4)[[1, 0, 3, 2]]
    metrics = measure(swapped, found)
    assert metrics["recall_at_1"]["value"] == 0.0
    assert metrics["class_at_1"]["value"] == 1.0
    assert metrics["class_at_1"]["chance"] == 0.5


def test_class_at_1_wants_all_labels_to_agree():
    labels = {"digit": np.array(["1", "1", "2"]), "motion": np.array(["up", "down", "up"])}
    found = clips(3, labels=labels)
    swapped = np.eye(3)[[1, 0, 2]]
    assert measure(swapped, found, ("digit",))["class_at_1"]["value"] == 1.0
    both = measure(swapped, found, ("digit", "motion"))["class_at_1"]["value"]
    assert both == pytest.approx(1 / 3, abs=1e-6)


def test_equally_near_hits_share_the_first_place_of_class_at_1():
    found = clips(10)
    collapsed = measure(np.ones((10, 10)), found)
    assert collapsed["class_at_1"]["value"] == pytest.approx(collapsed["class_at_1"]["chance"])


def test_class_at_1_is_absent_without_such_labels():
    found = clips(4)
    assert "class_at_1" not in measure(np.eye(4), found, ())
    assert "class_at_1" not in measure(np.eye(4), found, ("species",))


def test_the_pool_holds_usable_clips_and_does_not_depend_on_the_order():
    ids = np.array([f"clip-{i}" for i in range(50)])
    usable = np.arange(50) % 2 == 0
    first = set(ids[draw_pool(ids, usable, 10)])
    shuffled = np.random.default_rng(0).permutation(50)
    assert set(ids[shuffled][draw_pool(ids[shuffled], usable[shuffled], 10)]) == first
    assert len(first) == 10
    assert all(int(clip.split("-")[1]) % 2 == 0 for clip in first)


def test_clips_without_sound_or_words_are_not_searched():
    found = clips(6)
    found.has_audio[:2] = False
    found.has_text[5] = False
    tables = similarities(found, pool=256)
    assert len(tables["audio_to_video"][0]) == 4
    assert len(tables["text_to_video"][0]) == 5
    found.has_audio[:] = False
    assert "audio_to_video" not in similarities(found, pool=256)
