"""One command for each table of the paper: its runs, their cost, and their results."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from vatt.errors import SettingsError, Stopped, VattError
from vatt.process import INTERRUPTED
from vattctl.dvc import StageFailed
from vattctl.experiments import run_experiment
from vattctl.params import enter_project, print_rich
from vattctl.table_runs import VERSION, RunState, experiment_of, gather, missing, plan

if TYPE_CHECKING:
    from vatt.config import Params
    from vatt.studies import Scale, StudyRun

NUMBERS = tuple(str(number) for number in range(1, 11))
RESUMABLE = (Stopped.exit_code, INTERRUPTED)


@click.command(
    "table",
    epilog="""\b
Examples:
  vattctl table                 all tables, a line each: what is done, what is missing, its cost
  vattctl table 5 --dry-run     the runs behind table 5 (DropToken while pre-training)
  vattctl table 5               run those that are missing
  vattctl table all --seeds     three seeds for DropToken and the two backbones
  vattctl table 1 --dry-run --device h100-80gb --gpus 64""",
)
@click.argument("number", required=False, type=click.Choice([*NUMBERS, "all"]))
@click.option("--dry-run", is_flag=True, help="List the runs, their state and cost; run nothing.")
@click.option(
    "--seeds",
    is_flag=True,
    help="Only the runs on DropToken and the two backbones, with three seeds.",
)
@click.option("--device", help="Forecast for a GPU by its data sheet, e.g. h100-80gb.")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def table(
    context: click.Context,
    number: str | None,
    dry_run: bool,
    seeds: bool,
    device: str | None,
    gpus: int,
    as_json: bool,
) -> None:
    """Run what a table of the paper needs, each run an experiment in a folder of its own.

    On the demo corpus the tables are scaled down; with the paper's settings, on the data sets
    in sets/ (`vattctl finetune SET --data DIR` makes them). A run that several tables need is run
    once; a killed one continues. The report shows the results next to the published numbers.
    """
    from vatt.config import load_params

    enter_project(context)
    params = load_params()
    numbers = [int(one) for one in (NUMBERS if number in (None, "all") else [number])]
    scale = _scale(params)
    runs = _runs(numbers, scale, seeds=seeds)
    if number is None or dry_run:
        planned = plan(runs, scale, device=device, gpus=gpus)
        if as_json:
            click.echo(json.dumps(_plain(numbers, planned, scale), indent=2))
        elif number is None:
            _print_tables(numbers, planned, scale)
        else:
            _print_runs(planned)
        return
    lacking = [lack for run in runs for lack in missing(run)]
    if lacking:
        raise SettingsError(
            f"missing: {', '.join(dict.fromkeys(lacking))}",
            hint="make each with `vattctl finetune SET --data DIR`; --dry-run lists the runs",
        )
    failed = _run_all(runs, scale, params, quiet=context.obj["quiet"])
    gathered = gather(scale, params)
    if as_json:
        click.echo(
            json.dumps({"version": VERSION, "scale": scale.name, "runs": gathered}, indent=2)
        )
    else:
        _print_results(numbers)
    if failed:
        raise VattError(f"failed: {', '.join(failed)}", hint="their messages are above")


def _scale(params: "Params") -> "Scale":
    from vatt.studies import SCALES

    return SCALES["demo" if params.data.source == "demo" else "paper"]


def _runs(numbers: Sequence[int], scale: "Scale", *, seeds: bool) -> "list[StudyRun]":
    """The runs of some tables, shared ones once, each after the one whose weights it takes."""
    from vatt.studies import BASE, SEEDED, SEEDS, study, with_seed

    found = {run.name: run for number in numbers for run in study(number, scale).runs}
    runs = list(found.values())
    if seeds:
        # the base first: it brings the corpus that its seed makes
        again = sorted((r for r in runs if r.name in SEEDED), key=lambda run: run.name != BASE)
        runs = [with_seed(run, seed) for seed in SEEDS for run in again]
    return runs


def _run_all(
    runs: "Sequence[StudyRun]", scale: "Scale", params: "Params", *, quiet: bool
) -> list[str]:
    """Run each. A failed run does not stop the others; a stopped one does."""
    failed = []
    for place, run in enumerate(runs, start=1):
        click.echo(f"{place} of {len(runs)}: {run.name}", err=True)
        try:
            run_experiment(experiment_of(run, scale), quiet=quiet)
        except StageFailed as error:
            if error.exit_code in RESUMABLE:
                raise
            click.echo(f"{run.name}: {error}", err=True)
            failed.append(run.name)
        gather(scale, params)  # also when a later run fails
    return failed


def _plain(numbers: Sequence[int], planned: Sequence[RunState], scale: "Scale") -> dict[str, Any]:
    from vatt.studies import study

    return {
        "version": VERSION,
        "scale": scale.name,
        "tables": {number: [run.name for run in study(number, scale).runs] for number in numbers},
        "runs": [
            {
                "run": one.run.name,
                "state": one.state,
                "missing": list(one.missing),
                "settings": dict(one.run.settings),
                "start": one.run.start,
                "data": one.run.data,
                "measured_seconds": one.measured,
                "forecast_seconds": one.forecast,
            }
            for one in planned
        ],
    }


def _print_runs(planned: Sequence[RunState]) -> None:
    from rich.table import Table

    lines = Table(box=None, pad_edge=False)
    for column in ("run", "state", "cost", "differs in", "missing"):
        lines.add_column(column, overflow="fold")
    for one in planned:
        lines.add_row(
            one.run.name, one.state, _cost(one), _differs(one.run), "; ".join(one.missing)
        )
    print_rich(lines)
    print_rich(_total(planned))


def _differs(run: "StudyRun") -> str:
    from vatt.studies import DEMO, PAPER

    usual = {**DEMO.settings, **PAPER.settings}
    words = [f"{k}={v}" for k, v in run.settings.items() if usual.get(k) != v]
    words += [f"weights of {run.start}"] if run.start else []
    words += [f"on {run.data}"] if run.data else []
    words += [f"fine-tuned: {', '.join(task.name for task in run.tasks)}"] if run.tasks else []
    return "; ".join(words)


def _cost(one: RunState) -> str:
    from vatt.progress import duration

    if one.state == "done" and one.measured is not None:
        return f"{duration(one.measured)}, measured"
    if one.forecast is None:
        return "not known"
    return f"{duration(one.forecast)}, forecast" if one.forecast else "evaluation alone"


def _total(planned: Sequence[RunState]) -> str:
    """How much is left."""
    from vatt.progress import duration

    left = [one for one in planned if one.state != "done"]
    known = [one.forecast for one in left if one.forecast is not None]
    if not left:
        return "every run is done: vattctl report shows them"
    cost = f"about {duration(sum(known))} of training" if known else "cost not known here"
    note = "" if known else ": run one first, or name a --device"
    return f"{len(left)} of {len(planned)} runs are left, {cost}{note}"


def _print_tables(numbers: Sequence[int], planned: Sequence[RunState], scale: "Scale") -> None:
    from rich.table import Table

    from vatt.paper import paper_tables
    from vatt.studies import study

    by_name = {one.run.name: one for one in planned}
    captions = {one.number: one.caption for one in paper_tables()}
    lines = Table(box=None, pad_edge=False)
    for column in ("table", "what", "runs done", "left"):
        lines.add_column(column, overflow="fold")
    for number in numbers:
        runs = [by_name[run.name] for run in study(number, scale).runs]
        done = sum(one.state == "done" for one in runs)
        words = "by formula, nothing to run" if not runs else _total(runs)
        lines.add_row(str(number), captions[number], f"{done} of {len(runs)}", words)
    print_rich(lines)
    print_rich(f"all together: {_total(planned)}")


def _print_results(numbers: Sequence[int]) -> None:
    from rich.table import Table

    from vatt.config import load_params
    from vatt.report.inputs import read_inputs
    from vatt.report.studies import study_table

    inputs = read_inputs(load_params().paths)
    for number in numbers:
        found = study_table(number, inputs)
        if found is None:
            continue
        lines = Table(box=None, pad_edge=False, title=f"Table {number}, scaled down")
        for heading in found.headings:
            lines.add_column(heading, overflow="fold")
        for row in found.rows:
            cells = (f"{cell.text} {cell.detail}".strip() for cell in row.cells)
            lines.add_row(f"{row.head} ({row.note})" if row.note else row.head, *cells)
        print_rich(lines)
    print_rich("next: vattctl report")


COMMANDS = (table,)
