"""Two evaluations on the clips they share."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from vatt.errors import DataError
from vatt.evaluation.comparison import compare_evaluations

CLASSES = np.asarray(["cat", "dog", "owl"])


def write(folder, clips, *, seed):
    """An evaluation of made-up answers for `clips`; labels follow from the clip's name."""
    generator = np.random.default_rng(seed)
    ids = np.asarray([f"clip{clip}" for clip in clips])
    labels = CLASSES[np.asarray(clips) % 3]
    folder.mkdir()
    logits = generator.random((len(ids), 3)).astype(np.float32)
    np.savez(
        folder / "predictions-pets-scratch.npz",
        clip_ids=ids,
        labels=labels,
        logits=logits,
        classes=CLASSES,
    )
    correct = generator.random(len(ids)) < 0.5
    np.savez(folder / "probe-pets-svm.npz", clip_ids=ids, labels=labels, correct=correct)
    table = generator.random((len(ids), len(ids))).astype(np.float32)
    tables = {"text_to_video": table, "text_to_video/clip_ids": ids}
    np.savez(folder / "similarities.npz", **tables)
    return {"logits": logits, "correct": correct, "table": table}


def compared(first, second):
    rows = compare_evaluations(first, second, resamples=300, seed=0)
    return {row["name"]: row for row in rows}


def test_shared_clips_are_compared_as_a_naive_loop_does(tmp_path):
    ours = write(tmp_path / "a", range(30), seed=1)
    theirs = write(tmp_path / "b", range(12, 50), seed=2)
    rows = compared(tmp_path / "a", tmp_path / "b")

    def top_1(run, first):
        hits = [
            CLASSES[run["logits"][clip - first].argmax()] == CLASSES[clip % 3]
            for clip in range(12, 30)
        ]
        return np.mean(hits)

    row = rows["pets-scratch.top_1"]
    assert row["first"]["value"] == pytest.approx(top_1(ours, 0), abs=1e-6)
    assert row["second"]["value"] == pytest.approx(top_1(theirs, 12), abs=1e-6)
    assert row["difference"]["n"] == 18
    assert row["difference"]["value"] == pytest.approx(top_1(ours, 0) - top_1(theirs, 12), abs=2e-6)
    probe = rows["probe-pets-svm.accuracy"]["difference"]["value"]
    expected = ours["correct"][12:].mean() - theirs["correct"][:18].mean()
    assert probe == pytest.approx(expected, abs=2e-6)


def test_retrieval_is_ranked_again_among_the_common_clips(tmp_path):
    ours = write(tmp_path / "a", range(30), seed=1)
    theirs = write(tmp_path / "b", range(12, 50), seed=2)
    rows = compared(tmp_path / "a", tmp_path / "b")

    def own_ranks(table):
        return [1 + sum(other > row[i] for other in row) for i, row in enumerate(table)]

    left, right = own_ranks(ours["table"][12:, 12:]), own_ranks(theirs["table"][:18, :18])
    row = rows["text_to_video.recall_at_5"]
    assert row["first"]["value"] == pytest.approx(np.mean(np.asarray(left) <= 5), abs=1e-6)
    assert row["second"]["value"] == pytest.approx(np.mean(np.asarray(right) <= 5), abs=1e-6)
    middle = rows["text_to_video.median_rank"]["difference"]
    assert middle["value"] == np.median(left) - np.median(right)
    assert middle["low"] <= middle["value"] <= middle["high"]


def test_clips_with_several_labels_are_compared_by_mean_average_precision(tmp_path):
    truth = np.asarray([[True, False, True], [False, True, False], [True, True, False]] * 10)
    generator = np.random.default_rng(0)
    labels = np.asarray(["|".join(CLASSES[row]) for row in truth])
    ids = np.asarray([f"clip{i}" for i in range(30)])
    logits = {"a": truth + generator.normal(size=truth.shape), "b": generator.normal(size=(30, 3))}
    for name, scores in logits.items():
        (tmp_path / name).mkdir()
        np.savez(
            tmp_path / name / "predictions-sounds-scratch.npz",
            clip_ids=ids,
            labels=labels,
            logits=scores,
            classes=CLASSES,
        )
    rows = compared(tmp_path / "a", tmp_path / "b")
    row = rows["sounds-scratch.mean_ap"]
    assert row["first"]["value"] == pytest.approx(
        average_precision_score(truth, logits["a"]), abs=1e-6
    )
    assert row["second"]["value"] == pytest.approx(
        average_precision_score(truth, logits["b"]), abs=1e-6
    )
    assert row["difference"]["low"] > 0


def test_a_run_does_not_differ_from_itself(tmp_path):
    write(tmp_path / "a", range(9), seed=1)
    for row in compare_evaluations(tmp_path / "a", tmp_path / "a", resamples=50, seed=0):
        gap = row["difference"]
        assert (gap["value"], gap["low"], gap["high"]) == (0.0, 0.0, 0.0)


def test_clips_whose_label_has_changed_are_left_out(tmp_path):
    write(tmp_path / "a", range(9), seed=1)
    write(tmp_path / "b", range(9), seed=2)
    with np.load(tmp_path / "b" / "probe-pets-svm.npz") as file:
        arrays = dict(file)
    arrays["labels"][:4] = "elk"
    np.savez(tmp_path / "b" / "probe-pets-svm.npz", **arrays)
    rows = compared(tmp_path / "a", tmp_path / "b")
    assert rows["probe-pets-svm.accuracy"]["difference"]["n"] == 5


def test_runs_without_a_common_clip_are_one_clear_error(tmp_path):
    write(tmp_path / "a", range(5), seed=1)
    write(tmp_path / "b", range(5, 9), seed=1)
    with pytest.raises(DataError, match="have no measure in common"):
        compare_evaluations(tmp_path / "a", tmp_path / "b", resamples=10, seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there is no evaluation"):
        compare_evaluations(tmp_path / "a", tmp_path / "empty", resamples=10, seed=0)
