"""Evaluation in several processes: each encodes whole batches, the first puts them together.

A batch has the same members whoever gets it, so what comes out is the same to the last bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

_NOTHING = object()


@dataclass(frozen=True, slots=True)
class Share:
    """Which process this is, and how processes talk."""

    rank: int
    world_size: int
    gather: Callable[[Any], list[Any] | None]  # all processes' values, by rank; None but in rank 0
    from_rank_0: Callable[[Any], Any]

    def joined(self, parts: Sequence[Any]) -> list[Any] | None:
        """The parts of all batches in the batches' order; None but in rank 0."""
        every = self.gather(list(parts))
        if every is None:
            return None
        turns = zip_longest(*every, fillvalue=_NOTHING)
        return [part for turn in turns for part in turn if part is not _NOTHING]


ALONE = Share(rank=0, world_size=1, gather=lambda value: [value], from_rank_0=lambda value: value)
