"""DropToken keeps int(keep rate x tokens), drawn anew for each step and sample."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vatt.model.patches import draw_kept, drop_tokens, num_kept


@pytest.mark.parametrize(
    ("tokens", "rate", "kept"),
    [(1568, 0.5, 784), (1568, 0.75, 392), (1568, 0.25, 1176), (1200, 0.5, 600), (10, 0.9, 1)],
)
def test_counts_are_the_papers(tokens, rate, kept):
    assert num_kept(tokens, rate) == kept


@given(tokens=st.integers(1, 60), rate=st.floats(0, 0.99), samples=st.lists(st.integers(0, 99)))
def test_kept_tokens_are_different_ones_that_exist(tokens, rate, samples):
    samples = [0, *samples]
    kept = draw_kept(tokens, rate, seed=0, step=0, samples=samples)
    assert kept.shape == (len(samples), num_kept(tokens, rate))
    assert kept.min() >= 0 and kept.max() < tokens
    for row in kept.tolist():
        assert len(set(row)) == len(row)


def test_a_draw_depends_on_seed_step_sample_and_stream_and_on_nothing_else():
    def draw(samples, seed=0, step=0, stream="video"):
        return draw_kept(50, 0.5, seed=seed, step=step, samples=samples, stream=stream)

    both = draw([4, 5])
    assert torch.equal(both[1:], draw([5]))
    assert not torch.equal(both[0], both[1])
    for other in (draw([4], seed=1), draw([4], step=1), draw([4], stream="audio")):
        assert not torch.equal(both[:1], other)


def test_every_token_is_kept_about_as_often():
    counts = draw_kept(20, 0.5, seed=0, step=0, samples=list(range(2000))).flatten().bincount()
    assert counts.min() > 900 and counts.max() < 1100


def test_dropping_takes_each_clips_own_rows_in_order():
    tokens = torch.arange(12.0).reshape(2, 3, 2)
    kept = torch.tensor([[2, 0], [1, 2]])
    assert drop_tokens(tokens, kept).tolist() == [[[4, 5], [0, 1]], [[8, 9], [10, 11]]]
