"""Retrieval: only a clip's own partner counts; both ways of averaging equal the reference."""

from pathlib import Path

import numpy as np
import pytest

from vatt.evaluation.features import FeatureSet
from vatt.evaluation.retrieval import (
    Search,
    average_embeddings,
    average_similarities,
    cosine,
    draw_pool,
    retrieval_metrics,
    setup,
    similarities,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "measures.npz")
DIRECTIONS = {"text_to_video", "video_to_text", "audio_to_video", "video_to_audio"}


def clips(n=40, *, noise=0.0, seed=0, labels=None, captions=None):
    """Clips of which every modality sees the same vector, with noise; three captions, or fewer."""
    generator = np.random.default_rng(seed)
    truth = generator.normal(size=(n, 8))

    def seen(several):
        return truth[:, None] + noise * generator.normal(size=(n, several, 8))

    return FeatureSet(
        clip_ids=np.array([f"clip-{i}" for i in range(n)]),
        labels=labels or {"digit": np.array([str(i % 10) for i in range(n)])},
        arrays={
            "video": truth[:, None],
            "audio": truth[:, None],
            "video_va": seen(1),
            "audio_va": seen(1),
            "video_vt": seen(1),
            "text_vt": seen(3),
            "text": np.full((n, 3, 4), 2),
            "has_video": np.ones(n, bool),
            "has_audio": np.ones(n, bool),
            "has_text": np.arange(3) < np.asarray(captions or [3] * n)[:, None],
        },
    )


def measure(search, class_labels=("digit",)):
    return retrieval_metrics(search, class_labels=class_labels, resamples=50, seed=0)


def searched(found, pool=256):
    return similarities(found, pool=pool, caption_queries="averaged")


def table_of(table, found):
    """A table made by hand, as a search."""
    return Search(table, np.arange(len(table)), None, found, None)


def test_both_averages_over_windows_equal_the_reference():
    texts = GOLDEN["similarity/text"][:, None]
    windows = GOLDEN["similarity/video(6*4 windows)"].reshape(6, 4, 8)
    for name, average in (
        ("average_embeddings", average_embeddings),
        ("average_similarities", average_similarities),
    ):
        np.testing.assert_allclose(average(texts, windows), GOLDEN[f"similarity/{name}"], atol=1e-6)


def test_averages_equal_naive_loops_over_windows_and_the_captions_that_there_are():
    generator = np.random.default_rng(0)
    videos, texts = generator.normal(size=(4, 2, 8)), generator.normal(size=(4, 3, 8))
    texts[1, 1:] = texts[2, 0] = np.nan

    def angle(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    for i in range(4):
        kept = [text for text in texts[i] if not np.isnan(text).any()]
        for j in range(4):
            mean = angle(sum(kept) / len(kept), (videos[j, 0] + videos[j, 1]) / 2)
            assert average_embeddings(texts, videos)[i, j] == pytest.approx(mean)
            angles = [angle(text, window) for text in kept for window in videos[j]]
            assert average_similarities(texts, videos)[i, j] == pytest.approx(np.mean(angles))


def naive_rank(scores, own):
    """From 1; scores are a list, the own one by its place."""
    return 1 + sum(score > scores[own] for score in scores)


def test_where_each_caption_is_a_query_it_is_asked_alone_and_a_video_finds_its_nearest():
    found = clips(9, noise=2.0, captions=[3, 1, 2, 3, 3, 1, 2, 2, 3])
    searches = similarities(found, pool=9, caption_queries="each")
    pool = searches["text_to_video"].clips
    queries = [(row, k) for row in range(9) for k in range(3) if pool.has_text[row, k]]
    assert setup(searches["text_to_video"]) == {
        "pool": 9, "queries": 20, "captions_per_clip": pytest.approx(20 / 9)
    }  # fmt: skip
    videos = [v[0] / np.linalg.norm(v[0]) for v in pool.video_vt]
    said = {q: pool.text_vt[q] / np.linalg.norm(pool.text_vt[q]) for q in queries}
    ranks_there = [naive_rank([v @ said[q] for v in videos], q[0]) for q in queries]
    metrics = measure(searches["text_to_video"])
    assert metrics["recall_at_1"]["value"] == pytest.approx(
        np.mean([rank == 1 for rank in ranks_there]), abs=1e-6
    )
    assert metrics["median_rank"]["value"] == np.median(ranks_there)
    assert metrics["recall_at_1"]["n"] == 9  # clips are what is resampled
    back = [
        naive_rank([max(v @ said[q] for q in queries if q[0] == clip) for clip in range(9)], row)
        for row, v in enumerate(videos)
    ]
    assert measure(searches["video_to_text"])["median_rank"]["value"] == np.median(back)


def test_both_ways_of_averaging_are_told_where_they_differ():
    one = similarities(clips(5, captions=[1] * 5), pool=5, caption_queries="averaged")
    assert one.keys() == DIRECTIONS | {
        f"{name}_to_{other}_similarities_averaged"
        for name, other in (("text", "video"), ("video", "text"))
    }
    each = similarities(clips(5), pool=5, caption_queries="each")
    assert each.keys() == DIRECTIONS


def test_a_zero_vector_is_similar_to_nothing_and_no_nan():
    assert cosine(np.zeros((1, 8)), np.ones((2, 8))).tolist() == [[0, 0]]


def test_clips_that_agree_are_found_first_in_every_direction():
    for search in searched(clips(), pool=40).values():
        metrics = measure(search)
        assert metrics["recall_at_1"]["value"] == 1.0
        assert metrics["median_rank"]["value"] == 1.0


def test_unrelated_clips_are_found_at_chance():
    found = searched(clips(400, noise=1e6), pool=400)
    for direction in DIRECTIONS:
        metrics = measure(found[direction])
        assert metrics["recall_at_10"]["value"] == pytest.approx(10 / 400, abs=0.03)
        assert metrics["median_rank"]["value"] == pytest.approx(200.5, rel=0.2)
        assert metrics["class_at_1"]["value"] == pytest.approx(0.1, abs=0.06)


def test_chance_levels_follow_from_the_pool():
    metrics = measure(searched(clips(40), pool=40)["text_to_video"])
    assert metrics["recall_at_1"]["chance"] == 1 / 40
    assert metrics["recall_at_10"]["chance"] == 10 / 40
    assert metrics["median_rank"]["chance"] == 20.5
    assert metrics["class_at_1"]["chance"] == pytest.approx(0.1)
    assert metrics["recall_at_10"]["n"] == 40


def test_chance_is_never_above_one_in_a_pool_smaller_than_k():
    metrics = measure(searched(clips(4))["text_to_video"])
    assert metrics["recall_at_10"]["chance"] == 1.0


def test_another_clip_of_the_same_class_is_no_hit_but_counts_for_class_at_1():
    found = clips(4, labels={"digit": np.array(["1", "1", "2", "2"])})
    swapped = np.eye(4)[[1, 0, 3, 2]]
    metrics = measure(table_of(swapped, found))
    assert metrics["recall_at_1"]["value"] == 0.0
    assert metrics["class_at_1"]["value"] == 1.0
    assert metrics["class_at_1"]["chance"] == 0.5


def test_class_at_1_wants_all_labels_to_agree():
    labels = {"digit": np.array(["1", "1", "2"]), "motion": np.array(["up", "down", "up"])}
    found = clips(3, labels=labels)
    swapped = np.eye(3)[[1, 0, 2]]
    assert measure(table_of(swapped, found), ("digit",))["class_at_1"]["value"] == 1.0
    both = measure(table_of(swapped, found), ("digit", "motion"))["class_at_1"]["value"]
    assert both == pytest.approx(1 / 3, abs=1e-6)


def test_equally_near_hits_share_the_first_place_of_class_at_1():
    found = clips(10)
    collapsed = measure(table_of(np.ones((10, 10)), found))
    assert collapsed["class_at_1"]["value"] == pytest.approx(collapsed["class_at_1"]["chance"])


def test_class_at_1_is_absent_without_such_labels():
    found = clips(4)
    assert "class_at_1" not in measure(table_of(np.eye(4), found), ())
    assert "class_at_1" not in measure(table_of(np.eye(4), found), ("species",))


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
    tables = searched(found)
    assert len(tables["audio_to_video"].table) == 4
    assert len(tables["text_to_video"].table) == 5
    found.has_audio[:] = False
    assert "audio_to_video" not in searched(found)
