"""Learning rates: the released schedules' values, and the paper's shapes."""

from pathlib import Path

import numpy as np
import pytest

from tests.training.tiny import DEMO
from vatt.training.optimizer import learning_rate

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "optim.npz")


def settings(**changes):
    return DEMO.pretrain.optimizer.model_copy(update=changes)


def test_half_cosine_is_the_release_pretraining_schedule():
    params = settings(
        learning_rate=1e-4, final_learning_rate=5e-5, warmup_steps=5000, schedule="half_cosine"
    )
    expected = GOLDEN["schedule/pretrain_official"]
    got = [learning_rate(int(s), steps=500_000, params=params) for s in GOLDEN["schedule/steps"]]
    known = np.isfinite(expected)  # the release is NaN at its very last step
    assert known.sum() == len(expected) - 1
    np.testing.assert_allclose(np.array(got)[known], expected[known], rtol=2e-6, atol=1e-12)
    assert got[-1] == pytest.approx(5e-5)


def test_half_cosine_is_the_release_finetuning_schedule():
    params = settings(
        learning_rate=0.005, final_learning_rate=0.0, warmup_steps=2500, schedule="half_cosine"
    )
    expected = GOLDEN["schedule/finetune_official"]
    got = [learning_rate(int(s), steps=100_000, params=params) for s in GOLDEN["schedule/ft_steps"]]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-10)


def test_quarter_cosine_falls_slowly_first_and_fastest_at_its_end():
    params = settings(
        learning_rate=1e-4, final_learning_rate=5e-5, warmup_steps=100, schedule="quarter_cosine"
    )
    rates = [learning_rate(step, steps=1100, params=params) for step in (0, 50, 100, 600, 1100)]
    middle = 5e-5 + 5e-5 * np.cos(np.pi / 4)
    assert rates == pytest.approx([0, 5e-5, 1e-4, middle, 5e-5])
    falls = -np.diff([learning_rate(step, steps=1100, params=params) for step in range(100, 1101)])
    assert (np.diff(falls) > -1e-15).all()


def test_no_warm_up_starts_at_the_full_rate():
    params = settings(warmup_steps=0)
    assert learning_rate(0, steps=10, params=params) == params.learning_rate
