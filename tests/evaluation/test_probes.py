"""Probes over official splits: every fold is trained and tested; mean and deviation by hand."""

import numpy as np
import pytest

from tests.data.corpus import demo_params, needs_data
from tests.data.sources.test_downstream_lists import FILES
from tests.data.sources.test_official_lists import place
from vatt.config import ProbeParams
from vatt.data.sources.choice import READERS
from vatt.evaluation.features import FeatureSet
from vatt.evaluation.probes import official_folds, passes_for, run_probes, svm_correct

CLASSES = np.array(["cat", "dog", "owl"])


def features(n, labels, *, windows, seed, signal=1.0):
    """Clips whose picture shows the class, with noise of its own in each window."""
    generator = np.random.default_rng(seed)
    wanted = np.arange(n) % 3
    video = signal * np.eye(3, 6)[wanted][:, None] + generator.normal(size=(n, windows, 6))
    nothing = np.zeros((n, windows, 0))
    return FeatureSet(
        clip_ids=np.array([f"clip-{seed}-{i:03d}" for i in range(n)]),
        labels={"animal": CLASSES[wanted], **labels},
        arrays={
            "video": video.astype(np.float32), "audio": nothing, "video_va": nothing,
            "audio_va": nothing, "video_vt": nothing, "text_vt": nothing,
            "text": np.zeros((n, 0, 0), int), "has_video": np.ones(n, bool),
            "has_audio": np.zeros(n, bool), "has_text": np.zeros((n, 0), bool),
        },
    )  # fmt: skip


def settings(folds, *, clips=2):
    probe = ProbeParams(modality="video", label="animal", train_labels=None, folds=folds)
    return demo_params().evaluate.model_copy(
        update={"probes": {"pets": probe}, "clips": clips, "low_rank_steps": 20, "bootstrap": 50}
    )


def passes(n, folds_of, *, clips=2):
    """Train and test clips with their folds, shown with one window and with several."""
    found = {}
    for seed, split in enumerate(("train", "test")):
        for windows in (1, clips):
            found[split, windows] = {
                encoder: features(n, folds_of(seed, n), windows=windows, seed=seed, signal=signal)
                for encoder, signal in (("pretrained", 2.0), ("untrained", 0.5))
            }
    return found


def test_each_value_of_one_label_is_tested_once():
    values = np.array(["1", "2", "1", "", "3"])
    folds = official_folds({"fold": values})
    assert list(folds) == ["1", "2", "3"]
    train, test = folds["1"]
    assert train.tolist() == [False, True, False, False, True]
    assert test.tolist() == [True, False, True, False, False]


def test_each_of_several_labels_is_a_split_and_val_is_neither():
    told = {"fold1": np.array(["train", "test", "val"]), "fold2": np.array(["test", "", "train"])}
    folds = official_folds(told)
    assert [side.tolist() for side in folds["fold1"]] == [
        [True, False, False],
        [False, True, False],
    ]
    assert [side.tolist() for side in folds["fold2"]] == [
        [False, False, True],
        [True, False, False],
    ]


def test_the_mean_and_deviation_are_those_of_the_folds():
    def five(seed, n):
        return {"fold": np.array([str(1 + (i // 3) % 5) for i in range(n)])}

    given = passes(30, five)
    found = run_probes(settings(("fold",)), given, seed=0)
    metric = found.metrics["pets"]["svm"]["pretrained"]
    centre = {s: given[s, 1]["pretrained"] for s in ("train", "test")}
    many = {s: given[s, 2]["pretrained"] for s in ("train", "test")}
    labels = np.concatenate([centre[s].labels["animal"] for s in centre])
    fold = np.concatenate([centre[s].labels["fold"] for s in centre])
    one = np.concatenate([centre[s].video[:, 0] for s in centre])
    several = np.concatenate([many[s].video for s in centre])
    accuracies = []
    for tested in "12345":
        trained = fold != tested
        answers = svm_correct(
            (one[trained], labels[trained]), (several[~trained], labels[~trained])
        )
        accuracies.append(answers.mean())
    assert metric["value"] == pytest.approx(np.mean(accuracies), abs=1e-6)
    assert metric["deviation"] == pytest.approx(np.std(accuracies, ddof=1), abs=1e-6)
    assert (metric["folds"], metric["n"]) == (5, 60)
    assert metric["low"] <= metric["value"] <= metric["high"]
    each = found.metrics["pets"]["svm"]["pretrained_by_fold"]
    assert [fold["value"] for fold in each.values()] == pytest.approx(accuracies, abs=1e-6)
    difference = found.metrics["pets"]["svm"]["difference"]["value"]
    untrained = found.metrics["pets"]["svm"]["untrained"]["value"]
    assert difference == pytest.approx(metric["value"] - untrained, abs=2e-6)


def test_a_clip_that_two_splits_ask_counts_in_both():
    def two(seed, n):
        split = ("train", "test")[seed]
        other = np.where(np.arange(n) % 2 == 0, "train", "test")
        return {"fold1": np.full(n, split), "fold2": other}

    found = run_probes(settings(("fold1", "fold2")), passes(30, two), seed=0)
    correct = found.arrays["probe-pets-svm"]["correct"]
    assert (~np.isnan(correct)).sum(axis=0).tolist() == [30, 30]
    assert len(correct) == 45  # the train clips that no split asks are absent
    metric = found.metrics["pets"]["svm"]["pretrained"]
    assert metric["value"] == pytest.approx(np.nanmean(correct, axis=0).mean(), abs=1e-6)


def test_without_folds_train_and_test_are_the_one_split():
    found = run_probes(settings(()), passes(30, lambda seed, n: {}), seed=0)
    metric = found.metrics["pets"]["svm"]["pretrained"]
    assert "deviation" not in metric
    assert metric["n"] == 30
    assert found.arrays["probe-pets-svm"]["correct"].dtype == bool


def test_a_fold_without_its_label_says_so():
    found = run_probes(settings(("fold",)), passes(9, lambda seed, n: {}), seed=0)
    assert found.skipped == {"probe pets": "no clip has a label named fold"}


def test_the_passes_are_those_that_the_probes_need_and_no_more():
    splits = {"train": 5, "val": 2, "test": 3}
    assert passes_for(settings(()), splits) == [("test", 2), ("train", 1)]
    assert passes_for(settings((), clips=1), splits) == [("test", 1), ("train", 1)]
    every = {(split, windows) for split in splits for windows in (1, 2)}
    assert set(passes_for(settings(("fold",)), splits)) == every
    bare = settings(()).model_copy(update={"probes": {}})
    assert passes_for(bare, splits) == [("test", 2)]


@needs_data
def test_the_official_lists_give_the_official_splits(tmp_path):
    """UCF101 and HMDB51 three splits, ESC-50 five folds: train clips, test clips."""
    names = [f"{split}list0{k}.txt" for split in ("train", "test") for k in (1, 2, 3)]
    places = {
        "ucf101": place(tmp_path / "u", {name: FILES / "UCF101" / name for name in names}),
        "hmdb51": FILES / "HMDB51" / "testTrainMulti_7030_splits",
        "esc50": place(tmp_path / "e", {"esc50.csv": next(FILES.glob("ESC-50/**/esc50.csv"))}),
    }
    found = {}
    for name, labels in (
        ("ucf101", ("fold1", "fold2", "fold3")),
        ("hmdb51", ("fold1", "fold2", "fold3")),
        ("esc50", ("fold",)),
    ):
        clips = list(READERS[name](places[name], demo_params().data))
        told = {k: np.array([clip.labels.get(k, "") for clip in clips]) for k in labels}
        folds = official_folds(told).values()
        found[name] = [(int(train.sum()), int(test.sum())) for train, test in folds]
    assert found == {
        "ucf101": [(9537, 3783), (9586, 3734), (9624, 3696)],
        "hmdb51": [(3570, 1530)] * 3,
        "esc50": [(1600, 400)] * 5,
    }
