"""The endless order of training: a pure function of (seed, epoch, position).

Every epoch shows each row once. Shards are opened in a shuffled order, OPEN_SHARDS at a time; runs
of neighbours, short enough to mix and long enough to be read in one go, come from all open shards
in turn, and rows are mixed within a window that reading runs ahead by.
"""

from collections.abc import Sequence

import numpy as np

OPEN_SHARDS = 32
RUN = 8  # rows
WINDOW = 2048  # rows


class Order:
    """Which row stands at which position."""

    def __init__(self, shard_of_row: Sequence[str], *, seed: int) -> None:
        self._seed = seed
        numbers: dict[str, int] = {}
        self._shard = np.array([numbers.setdefault(name, len(numbers)) for name in shard_of_row])
        self._num_shards = len(numbers)
        self._epochs: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """The rows of an epoch."""
        return len(self._shard)

    def row_at(self, position: int) -> int:
        """The row at a position, counted through all epochs."""
        epoch, within = divmod(position, len(self))
        if epoch not in self._epochs:
            for past in [known for known in self._epochs if known < epoch - 1]:
                del self._epochs[past]
            self._epochs[epoch] = self._shuffle(epoch)
        return int(self._epochs[epoch][within])

    def stand_in(self, position: int, attempt: int) -> int:
        """The row to show instead of a broken one, and of broken stand-ins before this one."""
        random = np.random.Generator(np.random.PCG64([self._seed, position, attempt + 1]))
        return int(random.integers(len(self)))

    def _shuffle(self, epoch: int) -> np.ndarray:
        random = np.random.Generator(np.random.PCG64([self._seed, epoch]))
        opened = random.permutation(self._num_shards)  # when, by the number of the shard
        rows = np.argsort(opened[self._shard], kind="stable")
        runs = (np.arange(len(rows)) + random.integers(RUN)) // RUN
        # A shard's runs lie anywhere in the time that it is open; the last shards' in part at the
        # epoch's beginning, so that it begins with as many open ones as it goes on with.
        open_for = min(OPEN_SHARDS, self._num_shards)
        when = opened[self._shard[rows]] + random.random(runs[-1] + 1)[runs] * open_for
        rows = rows[np.argsort(when % self._num_shards, kind="stable")]
        window = np.arange(len(rows)) // WINDOW
        return rows[np.lexsort((random.random(len(rows)), window))]
