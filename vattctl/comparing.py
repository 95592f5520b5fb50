"""Two runs side by side, on the clips they share."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vattctl.params import enter_project
from vattctl.terminal import show

if TYPE_CHECKING:
    from vatt.config import Params


@click.command(
    epilog="""\b
Examples:
  vattctl compare 3f2a91 runs/evaluation       an earlier run against the last evaluation
  vattctl compare 3f2a91 b81c04 --json""",
)
@click.argument("first")
@click.argument("second")
@click.option("--resamples", default=1000, show_default=True, type=click.IntRange(10))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def compare(context: click.Context, first: str, second: str, resamples: int, as_json: bool) -> None:
    """Compare two evaluations on the clips they share, with a paired bootstrap.

    A run is the id of an evaluate run or of its pipeline in MLflow (its first letters do), or a
    folder of an evaluation's arrays. A difference whose interval holds 0 may be chance.
    """
    given = [Path(run).resolve() for run in (first, second)]  # entering changes the folder
    enter_project(context)
    from vatt.config import load_params
    from vatt.evaluation.comparison import compare_evaluations

    params = load_params()
    folders = [
        path if path.is_dir() else _kept(params, run)
        for path, run in zip(given, (first, second), strict=True)
    ]
    rows = compare_evaluations(*folders, resamples=resamples, seed=params.seed)
    if as_json:
        content = {"version": 1, "first": first, "second": second, "rows": rows}
        click.echo(json.dumps(content, indent=2))
    else:
        _print(rows)


def _kept(params: "Params", run: str) -> Path:
    from vatt.training.tracking import artifact_of

    return artifact_of(params, run, "evaluate", params.paths.evaluation.name)


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("measure", "first", "second", "difference", "95 % interval", "clips", ""):
        table.add_column(column, justify="left" if column in ("measure", "") else "right")
    for row in rows:
        gap = row["difference"]
        clear = not gap["low"] <= 0 <= gap["high"]
        one, other, change, low, high = (
            _number(row["name"], value)
            for value in (row["first"]["value"], row["second"]["value"], *_span(gap))
        )
        table.add_row(
            row["name"], one, other, change, f"{low} to {high}", str(gap["n"]), "*" if clear else ""
        )
    show(table, "* the interval of the difference (first - second) leaves out 0")


def _span(gap: dict[str, Any]) -> tuple[float, float, float]:
    return gap["value"], gap["low"], gap["high"]


def _number(name: str, value: float) -> str:
    if name.endswith(("median_rank", "d_prime")):
        return f"{value:.2f}"
    return f"{100 * value:.1f} %"
