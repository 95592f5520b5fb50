"""What has run: status, results in one table, two runs compared, and the MLflow page."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vatt.errors import MachineError
from vattctl.dvc import STAGES, changed_stages, stages_here
from vattctl.params import enter_project, print_rich

if TYPE_CHECKING:
    from vatt.config import Params, PathsParams


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def status(context: click.Context, as_json: bool) -> None:
    """Show what has run, what has changed since, and how each stage ended.

    A run whose process has died is marked KILLED in MLflow.
    """
    enter_project(context)
    from vatt.config import load_params
    from vatt.tracking.mlflow import mark_dead_runs

    params = load_params()
    dead = mark_dead_runs(params) if params.paths.runs.exists() else []
    runs = _runs(params.paths.runs)
    changed = changed_stages()
    rows = [_row(name, runs.get(name), changed.get(name)) for name in _names(runs, changed)]
    if as_json:
        click.echo(json.dumps({"version": 1, "stages": rows, "marked_killed": dead}, indent=2))
        return
    for run_id in dead:
        click.echo(f"MLflow run {run_id} has died: marked KILLED", err=True)
    _print_rows(rows)


def _names(runs: dict[str, Any], changed: dict[str, list[str]]) -> list[str]:
    """Stages in the pipeline's order, each with its variants (`finetune@action-scratch`)."""
    known = {*stages_here(), *runs, *changed}
    if any(name.startswith("finetune@") for name in known):
        known.discard("finetune")
    return sorted(known, key=lambda name: (STAGES.index(name.partition("@")[0]), name))


def _row(name: str, run: dict[str, Any] | None, changes: list[str] | None) -> dict[str, Any]:
    if run is None:
        state = "never run"
    elif run.get("status") != "FINISHED":
        state = str(run.get("status", "unknown")).lower()
    else:
        state = "changed" if changes else "up to date"
    run = run or {}
    return {
        "stage": name,
        "state": state,
        "changes": changes or [],
        "run_id": run.get("run_id"),
        "seconds": run.get("seconds"),
        "ended": run.get("ended"),
    }


def _runs(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(folder.glob("*.json")):
        name = path.stem
        stage, dash, variant = name.partition("-")
        found[f"{stage}@{variant}" if dash else name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _print_rows(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from vatt.progress import duration

    table = Table(box=None, pad_edge=False)
    for column in ("stage", "state", "took", "MLflow run", "changed since"):
        table.add_column(column, overflow="fold")
    for row in rows:
        took = duration(row["seconds"]) if row["seconds"] is not None else ""
        changes = "; ".join(row["changes"][:3]) if row["state"] == "changed" else ""
        table.add_row(row["stage"], row["state"], took, (row["run_id"] or "")[:12], changes)
    print_rich(table)


def summary(paths: "PathsParams") -> str:
    """The results of the last evaluation and where to look, as text."""
    from rich.console import Console
    from rich.table import Table

    file = paths.metrics / "evaluate.json"
    if not file.exists():
        return f"no results yet: {file} is missing"
    table = Table(box=None, pad_edge=False, title="Results on the test split (95 % interval)")
    for column in ("what", "value", "interval", "chance", "clips"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, metric in headline(json.loads(file.read_text(encoding="utf-8"))):
        value, interval, chance, clips = _cells(metric, ranks="median rank" in name)
        table.add_row(name, value, interval, "" if "difference" in name else chance, clips)
    console = Console(width=100, color_system=None)
    with console.capture() as text:
        console.print(table)
    where = [
        f"report:  {paths.report / 'report.html'}  (open it in a browser)",
        "runs:    vattctl ui  (the MLflow page)",
        "state:   vattctl status",
    ]
    return text.get() + "\n".join(where)


def _cells(metric: dict[str, Any], *, ranks: bool) -> tuple[str, str, str, str]:
    def show(value: float | None) -> str:
        if value is None:
            return ""
        return f"{value:.1f}" if ranks else f"{100 * value:.1f} %"

    interval = f"{show(metric.get('low'))} to {show(metric.get('high'))}"
    return show(metric["value"]), interval, show(metric.get("chance")), str(metric.get("n", ""))


def headline(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The few numbers a person looks for first, by name, in order."""
    retrieval = results.get("retrieval", {}).get("pretrained", {})
    found = [
        (f"{direction.replace('_', ' ')}, {measure.replace('_at_', '@').replace('_', ' ')}", metric)
        for direction in ("text_to_video", "video_to_audio")
        for measure, metric in retrieval.get(direction, {}).items()
        if measure in ("recall_at_1", "recall_at_10", "class_at_1", "median_rank")
    ]
    found += [
        (f"probe {probe} ({kind}), {start}", metric)
        for probe, classifiers in results.get("probes", {}).items()
        for kind, values in classifiers.items()
        for start, metric in values.items()
        if "low" in metric  # no table of folds
    ]
    found += [
        (f"fine-tuned {task}, {start}", _judged_by(values[start]))
        for task, values in results.get("classification", {}).items()
        for start in ("pretrained", "scratch", "difference")
        if start in values
    ]
    return found


def _judged_by(run: dict[str, Any]) -> dict[str, Any]:
    """Top-1 accuracy, mAP where clips have several labels, or the difference itself."""
    found: dict[str, Any] = run.get("top_1") or run.get("mean_ap") or run
    return found


@click.command()
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535))
@click.pass_context
def ui(context: click.Context, port: int) -> None:
    """Serve the MLflow page with all runs on 127.0.0.1 (Ctrl-C ends it)."""
    enter_project(context)
    from vatt.config import load_params
    from vatt.tracking.mlflow import store_uri

    if not _port_is_free(port):
        raise MachineError(f"port {port} is in use", hint=f"vattctl ui --port {port + 1}")
    store = store_uri(load_params().machine)
    click.echo(f"http://127.0.0.1:{port}  (ready in some seconds; Ctrl-C ends it)")
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1"),
    ]
    code = serve(command, {"MLFLOW_BACKEND_STORE_URI": store})
    if code != 0:
        raise MachineError(f"the MLflow server ended with {code}", hint="its message is above")


# `read` returns when vattctl has ended, however it ends: its pipe is closed then.
GUARD = """
read line
kill -TERM "-$1"
for i in 1 2 3 4 5 6 7 8 9; do kill -0 "-$1" || exit 0; sleep 0.5; done
kill -KILL "-$1"
"""


def serve(command: list[str], variables: Mapping[str, str] | None = None) -> int:
    """Run a server until it ends or vattctl does; its processes end with vattctl.

    `variables` may hold a password, which must not be in the command line.
    """
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", **(variables or {})}
    server = subprocess.Popen(command, env=environment, process_group=0)
    guard = subprocess.Popen(
        ["sh", "-c", GUARD, "sh", str(server.pid)],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # of `kill`, where nothing is left
        process_group=0,
    )
    try:
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        assert guard.stdin is not None
        guard.stdin.close()
        server.wait()
        guard.wait()


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


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

    A run is the MLflow id of an evaluate run or of its pipeline (the first letters suffice), or
    a folder with the arrays of an evaluation. A difference whose interval contains 0 may be chance.
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
    from vatt.tracking.mlflow import artifact_of

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
    print_rich(table, "* the interval of the difference (first - second) excludes 0")


def _span(gap: dict[str, Any]) -> tuple[float, float, float]:
    return gap["value"], gap["low"], gap["high"]


def _number(name: str, value: float) -> str:
    if name.endswith(("median_rank", "d_prime")):
        return f"{value:.2f}"
    return f"{100 * value:.1f} %"


COMMANDS = (status, ui, compare)
