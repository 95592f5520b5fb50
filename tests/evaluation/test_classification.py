"""Fine-tuned classifiers: views averaged, every labelled clip once, starts compared in pairs."""

import numpy as np
import pytest
import torch

from tests.evaluation.clips import CLASSES, MODEL, batches
from tests.model import golden
from tests.model.test_golden import FINETUNED, available, finetuned, signal
from vatt.evaluation.classification import Predictions, classification_metrics, compare, predict
from vatt.model.vatt import Classifier


@pytest.fixture(scope="module")
def classifier():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return Classifier(MODEL, modality="video", num_classes=3, head_dropout=0.5)


def answers(classifier, found, *, modality="video", label="shade", classes=CLASSES):
    return predict(
        classifier,
        found,
        modality=modality,
        label=label,
        classes=classes,
        progress=lambda clips: None,
    )


def test_logits_in_bf16_are_those_of_fp32_rounded(classifier):
    exact, half = (
        predict(
            classifier,
            batches(),
            modality="video",
            label="shade",
            classes=CLASSES,
            progress=lambda clips: None,
            precision=precision,
        ).logits
        for precision in ("fp32", "bf16")
    )
    assert not np.array_equal(half, exact)
    np.testing.assert_allclose(half, exact, atol=0.03 * np.abs(exact).max())


def predictions(right, *, n=200, seed=0, first=0):
    """Answers of which about a share `right` is correct, for the clips from `first` on."""
    generator = np.random.default_rng(seed)
    targets = np.arange(first, first + n) % 3
    correct = generator.random(n) < right
    given = np.where(correct, targets, (targets + 1) % 3)
    return Predictions(
        clip_ids=np.array([f"clip-{i:04d}" for i in range(first, first + n)]),
        labels=np.array(CLASSES)[targets],
        logits=np.eye(3)[given],
        classes=CLASSES,
    )


def test_logits_are_averaged_over_the_views_of_a_clip(classifier):
    found = answers(classifier, batches(clips=4, views=3, batch_size=2))
    (batch,) = batches(clips=4, views=3, batch_size=4)
    with torch.inference_mode():
        each = classifier.eval()(batch.video.float() / 255 * 2 - 1).double().numpy()
    naive = np.stack([(each[3 * i] + each[3 * i + 1] + each[3 * i + 2]) / 3 for i in range(4)])
    np.testing.assert_allclose(found.logits, naive, atol=1e-6)


def test_every_labelled_clip_is_answered_once(classifier):
    found = answers(classifier, batches(clips=11, batch_size=4))
    assert found.clip_ids.tolist() == [f"clip-{i:03d}" for i in range(11)]
    assert found.labels.tolist() == [CLASSES[i % 3] for i in range(11)]


def test_clips_without_the_label_or_the_modality_are_not_counted():
    torch.manual_seed(0)
    hears = Classifier(MODEL, modality="audio", num_classes=3, head_dropout=0.0)
    assert len(answers(hears, batches(), modality="audio", label="rare").clip_ids) == 0
    heard = answers(hears, batches(), modality="audio")
    assert "clip-006" not in heard.clip_ids
    assert len(heard.clip_ids) == 11


def test_dropout_is_off_while_predicting(classifier):
    classifier.train()
    first, second = (answers(classifier, batches()).logits for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_accuracy_chance_and_confusion_are_counted_right():
    found = Predictions(
        clip_ids=np.array(["a", "b", "c", "d"]),
        labels=np.array(["dark", "dark", "bright", "red"]),
        logits=np.array([[3, 1, 2], [0, 5, 1], [0, 1, 0], [0, 2, 1]], float),
        classes=CLASSES,
    )
    metrics = classification_metrics(found, resamples=20, seed=0)
    assert metrics["top_1"]["value"] == 0.5
    assert metrics["top_1"]["chance"] == 0.5
    assert metrics["top_1"]["n"] == 4
    assert "top_5" not in metrics  # of three classes it would always be 1
    assert found.confusion().tolist() == [[1, 1, 0], [0, 1, 0], [0, 1, 0]]


def test_a_label_that_training_never_showed_counts_as_wrong():
    found = Predictions(np.array(["a"]), np.array(["yak"]), np.array([[9.0, 0, 0]]), CLASSES)
    assert not found.correct(1).any()
    assert found.confusion().sum() == 0


def test_the_difference_is_paired_over_the_clips_that_both_answered():
    runs = {"pretrained": predictions(0.9), "scratch": predictions(0.6, seed=1, first=50)}
    found = compare(runs, resamples=200, seed=0)
    assert found["difference"]["n"] == 150
    ours, theirs = runs["pretrained"].correct(1)[50:], runs["scratch"].correct(1)[:150]
    expected = sum(int(a) - int(b) for a, b in zip(ours, theirs, strict=True)) / 150
    assert found["difference"]["value"] == pytest.approx(expected, abs=1e-6)
    assert found["difference"]["low"] > 0


def test_a_start_that_was_not_run_has_no_difference():
    assert compare({"scratch": predictions(0.5)}, resamples=20, seed=0).keys() == {"scratch"}


def test_clips_with_several_labels_are_judged_by_mean_average_precision():
    generator = np.random.default_rng(0)
    labels = np.array(["a", "b", "a|b", "c", "b|c"] * 20)
    truth = np.array([[name in label.split("|") for name in "abc"] for label in labels])
    runs = {
        start: Predictions(
            clip_ids=np.array([f"clip-{i}" for i in range(100)]),
            labels=labels,
            logits=truth * help_ + generator.normal(size=truth.shape),
            classes=("a", "b", "c"),
        )
        for start, help_ in (("pretrained", 2.0), ("scratch", 0.5))
    }
    assert (runs["scratch"].truth() == truth).all()
    found = compare(runs, resamples=50, seed=0)
    assert found["pretrained"].keys() == {"mean_ap", "auc", "d_prime"}
    assert found["difference"]["low"] > 0
    gap = found["pretrained"]["mean_ap"]["value"] - found["scratch"]["mean_ap"]["value"]
    assert found["difference"]["value"] == pytest.approx(gap, abs=2e-6)


EACH = dict.fromkeys(FINETUNED, 2) | {"ft_video_interp": 1}  # clips a video


@pytest.mark.parametrize("name", available(FINETUNED))
def test_averaging_the_clips_of_a_video_equals_the_reference(name):
    """Several clips a video, their logits averaged: the reference's inputs to its logits."""
    wanted, views = golden.arrays(f"{name}_eval")["out/logits"], signal(f"{name}_eval")
    modality = "video" if "video" in name else "audio"
    each = len(views) // len(wanted)
    assert each == EACH[name]
    batch = next(batches(clips=len(wanted), views=each, batch_size=len(wanted)))
    shown = Shown(finetuned(name), views)
    found = answers(shown, [batch], modality=modality, classes=tuple("abcdefg"))
    np.testing.assert_allclose(found.logits, wanted, rtol=1e-4, atol=1e-5)


class Shown(torch.nn.Module):
    """A classifier that gets given clips: those of the reference are not stored bytes."""

    def __init__(self, model, views):
        super().__init__()
        self.model, self.views = model, views

    def forward(self, given):
        assert len(given) == len(self.views)
        return self.model(self.views)
