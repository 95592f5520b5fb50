"""Our numbers next to every published number that needs no data, one row for each."""

from collections.abc import Callable

from vatt.progress import Progress
from vatt.verify.counts import drop_token_rows, operation_rows, parameter_rows, token_rows
from vatt.verify.losses import loss_rows, schedule_rows
from vatt.verify.row import Check

PARTS: tuple[Callable[[], list[Check]], ...] = (
    parameter_rows,
    operation_rows,
    token_rows,
    drop_token_rows,
    schedule_rows,
    loss_rows,
)


def verify(progress: Progress | None = None) -> list[Check]:
    """All rows; this takes seconds and little memory, because models are built without weights."""
    rows: list[Check] = []
    for done, part in enumerate(PARTS, start=1):
        rows += part()
        if progress:
            progress(done, len(PARTS))
    return rows
