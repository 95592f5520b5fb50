"""DropToken keeps int(keep rate x tokens), drawn anew for each step and sample."""

import hashlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests.model.golden import DEVICES
from vatt.model.patches import (
    draw_kept,
    draw_kept_by_energy,
    drop_tokens,
    energy_share,
    num_kept,
)


def mixed(number):
    """The integer hash of vatt/model/patches.py on one Python number."""
    number ^= number >> 16
    number = number * 0x21F0AAAD % 2**32
    number ^= number >> 15
    number = number * 0x735A2D97 % 2**32
    return number ^ number >> 15


def numbers_of(tokens, *, seed, step, sample, stream):
    """The numbers that one row's tokens draw."""
    key = hashlib.blake2b(f"{seed}/{step}/{stream}/{tokens}".encode(), digest_size=8).digest()
    first = mixed(sample ^ int.from_bytes(key[:4], "big"))
    second = mixed(first ^ int.from_bytes(key[4:], "big"))
    return [mixed((mixed(index ^ first) + second) % 2**32) for index in range(tokens)]


def naive(tokens, kept, **draw):
    """One row, token by token."""
    return sorted(sorted(range(tokens), key=numbers_of(tokens, **draw).__getitem__)[:kept])


def naive_by_energy(energies, kept, random_share, **draw):
    """One row, token by token: the most energetic ones, then others by their numbers."""
    numbers = numbers_of(len(energies), **draw)
    drawn = math.ceil(round(random_share * kept, 6))
    left = sorted(range(len(energies)), key=lambda token: (-energies[token], numbers[token]))
    chosen, left = left[: kept - drawn], left[kept - drawn :]
    return sorted(chosen + sorted(left, key=numbers.__getitem__)[:drawn])


def uniformly(counts):
    """Whether a chi-square test finds nothing against equal chances; it is wrong 1 in 10,000."""
    return stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize(
    ("tokens", "rate", "kept"),
    [(1568, 0.5, 784), (1568, 0.75, 392), (1568, 0.25, 1176), (1200, 0.5, 600), (10, 0.9, 1)],
)
def test_counts_are_the_papers(tokens, rate, kept):
    assert num_kept(tokens, rate) == kept


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("tokens", "rate"), [(1568, 0.5), (1200, 0.75), (7, 0.0), (1, 0.9)])
def test_a_row_equals_the_same_hash_token_by_token_on_every_device(tokens, rate, device):
    samples, kept = [0, 1, 2047, 10**6], num_kept(tokens, rate)
    drawn = draw_kept(
        tokens, rate, seed=3, step=499_999, stream="video", samples=torch.tensor(samples).to(device)
    )
    assert drawn.device.type == device
    for row, sample in zip(drawn.tolist(), samples, strict=True):
        assert row == naive(tokens, kept, seed=3, step=499_999, sample=sample, stream="video")


def test_the_draw_stays_the_one_that_published_figures_used():
    """The SHA-256 of the indices, in more than one chunk of rows."""
    digest = hashlib.sha256()
    for seed, step, tokens, rate in ((0, 0, 1568, 0.5), (1, 499_999, 1200, 0.75), (2, 7, 64, 0.3)):
        drawn = draw_kept(tokens, rate, seed=seed, step=step, samples=range(300), stream="audio")
        digest.update(drawn.numpy().astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "7e8e35489fdb6041"


@given(tokens=st.integers(1, 60), rate=st.floats(0, 0.99), samples=st.lists(st.integers(0, 99)))
def test_kept_tokens_are_different_ones_that_exist(tokens, rate, samples):
    samples = [0, *samples]
    kept = draw_kept(tokens, rate, seed=0, step=0, samples=samples)
    assert kept.shape == (len(samples), num_kept(tokens, rate))
    assert kept.min() >= 0 and kept.max() < tokens
    for row in kept.tolist():
        assert row == sorted(set(row))


def test_a_draw_depends_on_seed_step_sample_and_stream_and_on_nothing_else():
    def draw(samples, seed=0, step=0, stream="video"):
        return draw_kept(50, 0.5, seed=seed, step=step, samples=samples, stream=stream)

    both = draw([4, 5])
    assert torch.equal(both[1:], draw([5]))
    assert not torch.equal(both[0], both[1])
    for other in (draw([4], seed=1), draw([4], step=1), draw([4], stream="audio")):
        assert not torch.equal(both[:1], other)


@given(cut=st.integers(1, 63), step=st.integers(0, 10**6))
def test_a_batch_in_two_parts_keeps_what_it_keeps_whole(cut, step):
    def draw(first, last):
        return draw_kept(40, 0.5, seed=1, step=step, samples=torch.arange(first, last))

    assert torch.equal(torch.cat([draw(0, cut), draw(cut, 64)]), draw(0, 64))


@pytest.mark.parametrize("vary", ["sample", "step"])
def test_every_token_and_every_pair_of_tokens_is_kept_with_the_same_chance(vary):
    rows, tokens = 4000, 20
    if vary == "sample":
        kept = draw_kept(tokens, 0.5, seed=0, step=0, samples=range(rows))
    else:
        draws = (draw_kept(tokens, 0.5, seed=0, step=step, samples=[7]) for step in range(rows))
        kept = torch.cat(list(draws))
    is_kept = torch.zeros(rows, tokens).scatter_(1, kept, 1.0)
    # Counts of a draw without replacement vary less than the test assumes: it errs on one side.
    assert uniformly(is_kept.sum(0).numpy())
    together = is_kept.T @ is_kept
    first, second = torch.triu_indices(tokens, tokens, offset=1)
    assert uniformly(together[first, second].numpy())


def test_neighbouring_rows_are_independent():
    """Rows of neighbouring samples share half of their tokens, as unrelated ones do."""
    rows, tokens = 4000, 64
    kept = draw_kept(tokens, 0.5, seed=0, step=0, samples=range(rows))
    is_kept = torch.zeros(rows, tokens).scatter_(1, kept, 1.0)
    for distance in (1, 2, 4, 64, 1024):
        shared = (is_kept[distance:] * is_kept[:-distance]).sum(1)
        # The number of shared tokens is hypergeometric: mean 16, variance 64 / 16 x 64 / 63.
        error = (4 * 64 / 63 / len(shared)) ** 0.5
        assert abs(shared.mean().item() - 16) < 4 * error
        assert shared.var().item() == pytest.approx(4 * 64 / 63, rel=0.1)


def test_dropping_takes_each_clips_own_rows_in_order():
    tokens = torch.arange(12.0).reshape(2, 3, 2)
    kept = torch.tensor([[2, 0], [1, 2]])
    assert drop_tokens(tokens, kept).tolist() == [[[4, 5], [0, 1]], [[8, 9], [10, 11]]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("largest", [0, 2, 10**12])  # none; many equal ones; hardly any equal
@pytest.mark.parametrize(
    ("tokens", "rate", "share"),
    [(1568, 0.5, 0.25), (98, 0.875, 0.0), (7, 0.0, 0.5), (50, 0.75, 1.0), (1, 0.9, 0.25)],
)
def test_a_row_by_energy_equals_the_same_choice_token_by_token(
    tokens, rate, share, largest, device
):
    samples, generator = torch.tensor([0, 3, 10**6]), torch.Generator().manual_seed(tokens)
    energies = torch.randint(0, largest + 1, (3, tokens), generator=generator)
    found = draw_kept_by_energy(
        energies.to(device), rate, random_share=share, seed=3, step=9, samples=samples.to(device)
    )
    assert found.device.type == device and found.shape == (3, num_kept(tokens, rate))
    for row, energy, sample in zip(
        found.tolist(), energies.tolist(), samples.tolist(), strict=True
    ):
        draw = {"seed": 3, "step": 9, "sample": sample, "stream": ""}
        assert row == naive_by_energy(energy, num_kept(tokens, rate), share, **draw)


@given(tokens=st.integers(1, 60), rate=st.floats(0, 0.99), share=st.floats(0, 1))
def test_without_energy_or_with_all_drawn_the_choice_is_drop_token_s(tokens, rate, share):
    samples, equal = torch.arange(4), torch.full((4, tokens), 7)
    energies = torch.randint(0, 9, (4, tokens), generator=torch.Generator().manual_seed(tokens))
    draw = {"seed": 1, "step": 2, "samples": samples, "stream": "audio"}
    drawn = draw_kept(tokens, rate, **draw)
    assert torch.equal(draw_kept_by_energy(equal, rate, random_share=share, **draw), drawn)
    assert torch.equal(draw_kept_by_energy(energies, rate, random_share=1.0, **draw), drawn)


def test_quiet_tokens_are_kept_as_often_as_the_random_share_says():
    energies = torch.tensor([*range(1, 11), *[0] * 30]).repeat(4000, 1)
    kept = draw_kept_by_energy(
        energies, 0.75, random_share=0.3, seed=0, step=0, samples=torch.arange(4000)
    )
    quiet = torch.zeros(4000, 40).scatter_(1, kept, 1.0)[:, 10:]
    # Seven of the ten loud ones are sure; three are drawn from the other three and the quiet ones.
    assert quiet.sum().item() / 4000 == pytest.approx(3 * 30 / 33, abs=0.05)
    assert uniformly(quiet.sum(0).numpy())


def test_the_share_of_the_energy_is_that_of_the_kept_tokens():
    energies = torch.tensor([[6, 0, 2], [0, 0, 0], [10**15, 10**15, 0]])
    kept = torch.tensor([[0, 1], [1, 2], [0, 2]])
    assert energy_share(energies, kept).tolist() == pytest.approx([0.75, 2 / 3, 0.5])
