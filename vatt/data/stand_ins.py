"""What training does about a broken sample: note it, show another one, stop when there are many."""

import logging
from dataclasses import replace
from pathlib import Path

from vatt.data.ledger import Entry, Ledger
from vatt.data.order import Order
from vatt.data.reader import BrokenSampleError, ShardIndex
from vatt.data.sampling import Request
from vatt.errors import DataError

log = logging.getLogger(__name__)


class StandIns:
    """Stand-ins are a pure function of seed and position, whoever finds the sample broken."""

    def __init__(
        self, index: ShardIndex, order: Order, *, max_share: float, ledger: Path | None
    ) -> None:
        self._rows, self._order = index.rows, order
        self._most = max_share * len(index.rows)
        self._ledger = ledger
        self._broken: set[int] = set()

    def __call__(self, request: Request, error: BrokenSampleError) -> Request:
        """The request for the sample to show instead."""
        if request.row not in self._broken:
            self._broken.add(request.row)
            self._note(request.row, error)
        row = self._order.stand_in(request.position, request.attempt)
        return replace(request, row=row, attempt=request.attempt + 1)

    def _note(self, number: int, error: BrokenSampleError) -> None:
        log.warning("%s; another one is shown instead", error.problem)
        if self._ledger is not None:
            with Ledger(self._ledger) as ledger:
                ledger.record(Entry(self._rows[number].clip_id, "corrupt", "load", error.problem))
        if len(self._broken) > self._most:
            raise DataError(
                f"{len(self._broken)} of {len(self._rows)} samples are broken, more than "
                f"machine.max_broken_share; the last: {error.problem}",
                hint=f"{self._ledger or 'the log'} names them; delete their shards and run "
                "`vattctl preprocess`, or raise machine.max_broken_share",
            )


def refuse(request: Request, error: BrokenSampleError) -> Request:
    """In a test set there is no stand-in."""
    raise error
