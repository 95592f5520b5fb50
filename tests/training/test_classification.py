"""Labels, mixtures and losses of fine-tuning."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from vatt.training.finetune import (
    balanced_sigmoid_loss,
    draw_mix,
    mix,
    neighbours,
    one_hot,
    softmax_loss,
)


def test_one_hot_marks_each_class_of_a_clip():
    targets = one_hot(["b", "a|c"], ["a", "b", "c"])
    assert targets.tolist() == [[0, 1, 0], [1, 0, 1]]


def test_softmax_loss_is_the_cross_entropy_with_smoothed_labels():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 1, 1])
    targets = torch.nn.functional.one_hot(labels, 4).float()
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(softmax_loss(logits, targets, smoothing=0.1), expected)


def test_balanced_sigmoid_loss_weighs_clips_by_the_rarity_of_their_labels():
    torch.manual_seed(0)
    logits = torch.randn(4, 3)
    targets = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 0, 0], [0, 1, 1]])
    expected = 0.0
    counts = targets.sum(0).tolist()
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        weight = sum(y / n for y, n in zip(target, counts, strict=True)) / sum(target)
        each = [
            -y * math.log(1 / (1 + math.exp(-x))) - (1 - y) * math.log(1 / (1 + math.exp(x)))
            for x, y in zip(row, target, strict=True)
        ]
        expected += weight * sum(each) / 4
    assert balanced_sigmoid_loss(logits, targets, smoothing=0).item() == pytest.approx(expected)


def test_a_class_or_clip_without_labels_keeps_the_balanced_loss_finite():
    logits = torch.zeros(2, 3, requires_grad=True)
    loss = balanced_sigmoid_loss(logits, torch.tensor([[1.0, 0, 0], [0, 0, 0]]), smoothing=0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_the_losses_are_the_release_s():
    golden = np.load(Path(__file__).parents[1] / "golden" / "finetune_losses.npz")
    for kind, loss, smoothing in (
        ("video", softmax_loss, 0.1),
        ("audio", balanced_sigmoid_loss, 0),
    ):
        logits, targets = (torch.tensor(golden[f"{kind}/{name}"]) for name in ("logits", "targets"))
        # The video's labels are stored smoothed: start from the hard ones.
        found = loss(logits, (targets > 0.5).float(), smoothing=smoothing)
        assert found.item() == pytest.approx(float(golden[f"{kind}/loss"]), rel=1e-5), kind


def test_a_mixture_is_a_weighted_sum_with_the_partner():
    values = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    mixed = mix(values, torch.tensor([0.25, 1.0]), torch.tensor([1, 0]))
    assert mixed.tolist() == [[0.25 * 1 + 0.75 * 3, 0.25 * 2 + 0.75 * 6], [3.0, 6.0]]


def test_mixtures_are_the_release_s():
    golden = np.load(Path(__file__).parents[1] / "golden" / "data.npz")
    own = torch.tensor(golden["mixup/lambda(one per example)"])[:, 0]
    partners = torch.tensor(golden["mixup/perm"]).long()
    for name in ("", "_label"):
        mixed = mix(torch.tensor(golden[f"mixup/in{name}"]), own, partners)
        torch.testing.assert_close(mixed, torch.tensor(golden[f"mixup/out{name}"]))


def test_labels_are_smoothed_as_the_release_does():
    golden = np.load(Path(__file__).parents[1] / "golden" / "data.npz")
    hard, smooth = (torch.tensor(golden[f"label/{name}"]) for name in ("onehot", "smoothed_0.1"))
    logits = torch.linspace(-2, 2, hard.numel()).view(hard.shape)
    expected = -(smooth * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(softmax_loss(logits, hard, smoothing=0.1), expected)


def test_a_mixture_s_share_depends_on_seed_step_and_sample_only():
    whole = draw_mix(5.0, seed=1, step=2, samples=range(8))
    assert torch.equal(whole[4:], draw_mix(5.0, seed=1, step=2, samples=range(4, 8)))
    assert not torch.equal(whole, draw_mix(5.0, seed=1, step=3, samples=range(8)))
    many = draw_mix(5.0, seed=0, step=0, samples=range(4000))
    assert many.mean().item() == pytest.approx(0.5, abs=0.01)
    assert many.var().item() == pytest.approx(1 / 44, rel=0.1)  # of Beta(5, 5)


def test_neighbours_stay_in_pairs_so_that_a_split_batch_mixes_the_same():
    assert neighbours(4).tolist() == [1, 0, 3, 2]
    values, own = torch.randn(8, 3), torch.rand(8)
    whole = mix(values, own, neighbours(8))
    halves = [mix(values[rows], own[rows], neighbours(4)) for rows in (slice(4), slice(4, 8))]
    torch.testing.assert_close(whole, torch.cat(halves))
