"""Checks of the installation itself: verify."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from vattctl.terminal import show

if TYPE_CHECKING:
    from vatt.verify.row import Row

VERIFY_VERSION = 1


@click.command(
    "verify",
    epilog="""\b
Examples:
  vattctl verify
  vattctl verify --failed                  only rows that do not pass
  vattctl verify --json > verify.json""",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--failed", is_flag=True, help="Show only rows that do not pass.")
@click.pass_context
def verify_command(context: click.Context, as_json: bool, failed: bool) -> None:
    """Compare parameters, operations, schedules, tokens and losses with the paper.

    Needs no data. Exit code 1 when a row fails.
    """
    from vatt.progress import progress
    from vatt.verify import verify

    with progress("verify", "parts") as tick:
        rows = verify(tick)
    shown = [row for row in rows if row.state != "pass"] if failed else rows
    if as_json:
        content = {"version": VERIFY_VERSION, "rows": [asdict(row) for row in shown]}
        click.echo(json.dumps(content, indent=2))
    else:
        _print(shown)
        states = [row.state for row in rows]
        counts = ", ".join(f"{states.count(s)} {s}" for s in ("pass", "fail", "not run"))
        click.echo(f"{len(rows)} rows: {counts}", err=True)
    if any(row.state == "fail" for row in rows):
        context.exit(1)


def _print(rows: list["Row"]) -> None:
    from rich.table import Table

    columns = ("state", "quantity", "source", "unit", "paper", "expected", "ours", "difference")
    table = Table(box=None, pad_edge=False)
    for column in columns:
        is_number = column in columns[4:]
        table.add_column(
            column, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold"
        )
    for row in rows:
        name = row.name if row.state == "pass" else f"{row.name} ({row.reason})"
        numbers = (row.paper, row.expected, row.ours, row.difference)
        table.add_row(row.state, name, row.source, row.unit, *map(_number, numbers))
    show(table)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.7g}"
