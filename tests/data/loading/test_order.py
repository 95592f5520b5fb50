"""The order of training: every row once an epoch, shards read in sequence, well mixed."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vatt.data.loading.batches import RUN, TrainingOrder
from vatt.data.loading.reader import OPEN_SHARDS, WINDOW

SHARDS, ROWS = 100, 500  # a corpus whose row r is number r % ROWS of shard r // ROWS


def epoch(number: int, *, seed=0) -> np.ndarray:
    order = TrainingOrder([f"{row // ROWS:03d}" for row in range(SHARDS * ROWS)], seed=seed)
    return np.array([order.row_at(number * len(order) + place) for place in range(len(order))])


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=80),
    seed=st.integers(0, 2**32),
    places=st.lists(st.integers(0, 10_000), min_size=1, max_size=20),
)
def test_an_epoch_is_a_permutation_and_a_function_of_seed_epoch_and_position(sizes, seed, places):
    shard_of_row = [str(shard) for shard, size in enumerate(sizes) for _ in range(size)]
    order, count = TrainingOrder(shard_of_row, seed=seed), len(shard_of_row)
    rows = [order.row_at(position) for position in range(2 * count)]
    assert sorted(rows[:count]) == sorted(rows[count:]) == list(range(count))
    again = TrainingOrder(shard_of_row, seed=seed)
    assert [again.row_at(place % (2 * count)) for place in places] == [
        rows[place % (2 * count)] for place in places
    ]


def test_a_shard_is_read_in_one_stretch_and_few_are_open():
    shards = epoch(0) // ROWS
    first_half = shards[: len(shards) // 2]  # the last shards begin and end the epoch
    open_at = np.zeros(len(first_half) + 1, int)
    for shard in set(first_half[OPEN_SHARDS * ROWS :]):
        places = np.flatnonzero(first_half == shard)
        open_at[places[0]] += 1
        open_at[places[-1] + 1] -= 1
        assert places[-1] - places[0] < OPEN_SHARDS * ROWS + 2 * WINDOW
    assert open_at.cumsum().max() <= OPEN_SHARDS + 2 * WINDOW / ROWS + 1


def test_what_is_read_ahead_lies_in_runs():
    rows = epoch(1)
    for first in range(0, 10 * WINDOW, WINDOW):
        window = np.sort(rows[first : first + WINDOW])
        seeks = 1 + np.count_nonzero(np.diff(window) != 1)
        assert seeks <= 1.25 * WINDOW / RUN


def test_every_stretch_mixes_many_shards_also_the_first():
    shards = epoch(2) // ROWS
    for first in range(0, len(shards), 256):
        assert len(set(shards[first : first + 256])) >= 0.7 * OPEN_SHARDS
    rows = epoch(2)
    assert np.count_nonzero(np.abs(np.diff(rows)) == 1) < 0.01 * len(rows)


def test_seeds_and_epochs_give_other_orders():
    one, other, later = epoch(0), epoch(0, seed=1), epoch(1)
    assert (one == other).mean() < 0.001 and (one == later).mean() < 0.001


def test_a_replacement_depends_on_seed_position_and_attempt_alone():
    order, same = (TrainingOrder(["a"] * 1000, seed=4) for _ in range(2))
    same.row_at(0)
    keys = [(position, attempt) for position in range(20) for attempt in range(3)]
    found = [order.replacement(*key) for key in keys]
    assert found == [same.replacement(*key) for key in reversed(keys)][::-1]
    assert len(set(found)) > 50 and found != [
        TrainingOrder(["a"] * 1000, seed=5).replacement(*k) for k in keys
    ]
