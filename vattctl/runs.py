"""What has run: status, results in one table, two runs compared, and the MLflow page."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vatt.errors import MachineError, SettingsError
from vatt.files import inside
from vattctl.dvc import STAGES, changed_in_background, stage_log, stage_names
from vattctl.params import (
    completion_folder,
    enter_project,
    json_option,
    print_json,
    print_rich,
)

if TYPE_CHECKING:
    from rich.table import Table

    from vatt.config import Params, PathsParams


@click.command(
    epilog="""\b
Examples:
  vattctl status
  vattctl status --json"""
)
@json_option
@click.pass_context
def status(context: click.Context, as_json: bool) -> None:
    """Show what has run, what has changed since, and how each stage ended.

    A run whose process has died is marked KILLED in MLflow.
    """
    enter_project(context)
    with changed_in_background() as changes:  # DVC looks while the settings are read
        from vatt.config import load_params

        params = load_params()
        records = _records(params.paths.runs)
        dead = _mark_dead(params, records)
        changed = changes()
    rows = [
        _row(name, records.get(name), None if changed is None else changed.get(name, []))
        for name in _names(records)
    ]
    if as_json:
        print_json(stages=rows, marked_killed=dead)
        return
    for run_id in dead:
        click.echo(f"MLflow run {run_id} has died: marked KILLED", err=True)
    _print_rows(rows)
    if changed is None:
        print_rich("a stage is running, so what has changed is not known: vattctl logs STAGE -f")
    if any(row["state"] == OBSOLETE for row in rows):
        print_rich(f"{OBSOLETE}: made by earlier settings; no stage of the present ones uses it")


OBSOLETE = "obsolete"  # a fine-tuning that is no longer in finetune.run or finetune.init


def _mark_dead(params: "Params", records: dict[str, dict[str, Any]]) -> list[str]:
    """Ids of runs whose process has died; MLflow is asked only if there may be one."""
    from vatt.process import is_dead

    running = [record for record in records.values() if record.get("status") == "RUNNING"]
    if not any(is_dead(str(record.get("process", ""))) for record in running):
        return []
    from vatt.tracking.mlflow import mark_dead_runs

    dead = mark_dead_runs(params)
    records.update(_records(params.paths.runs))
    return dead


def _names(records: dict[str, Any]) -> list[str]:
    """Stages in the pipeline's order, each with its variants (`finetune@action-scratch`)."""
    return sorted(
        {*stage_names(), *records}, key=lambda name: (STAGES.index(name.partition("@")[0]), name)
    )


def _row(name: str, run: dict[str, Any] | None, changes: list[str] | None) -> dict[str, Any]:
    """One line; `changes` are None while a stage runs."""
    if run is None:
        state = "never run"
    elif name not in stage_names():
        state = OBSOLETE
    elif run.get("status") != "FINISHED":
        state = str(run.get("status", "unknown")).lower()
    elif changes is None:
        state = "done"
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


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    """The record of each stage's last run."""
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


def complete_stages(context: click.Context, parameter: click.Parameter, typed: str) -> list[str]:
    """Stages, and each fine-tuning by its task and start."""
    names = [*STAGES]
    with contextlib.suppress(OSError, KeyError, TypeError), inside(completion_folder(context)):
        names = [*dict.fromkeys([*names, *stage_names()])]
    return [name for name in names if name.startswith(typed)]


@click.command(
    epilog="""\b
Examples:
  vattctl logs pretrain                    what the stage printed when it last ran
  vattctl logs finetune@audio-scratch -f   go on until it ends"""
)
@click.argument("stage", shell_complete=complete_stages)
@click.option("-f", "--follow", is_flag=True, help="Print new lines until the stage ends.")
@click.pass_context
def logs(context: click.Context, stage: str, follow: bool) -> None:
    """Print what STAGE printed when vattctl last ran it."""
    enter_project(context)
    if stage.partition("@")[0] not in STAGES:
        raise SettingsError(f"no stage '{stage}'", hint=f"stages: {', '.join(STAGES)}")
    try:
        for line in stage_log(stage, follow=follow):
            click.echo(line)
    except KeyboardInterrupt:  # of --follow; the stage goes on
        context.exit(0)


def read_results(stage: str, paths: "PathsParams") -> dict[str, Any]:
    """What the stage has measured, by its metrics files; of the last two, the whole evaluation."""
    stem = "evaluate" if stage == "report" else stage
    return {
        file.stem: json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(paths.metrics.glob(f"{stem}*.json"))
    }


def results_table(stage: str, paths: "PathsParams") -> "Table | None":
    """The results of a stage for a person: what a command that runs it ends with."""
    from rich.table import Table

    found = read_results(stage, paths)
    if stage in ("evaluate", "report"):
        return _evaluation_table(found["evaluate"]) if "evaluate" in found else None
    table = Table(box=None, pad_edge=False)
    facts = {name: dict(_numbers(content)) for name, content in found.items()}
    columns = list(dict.fromkeys(key for row in facts.values() for key in row))
    if not columns:
        return None
    for column in ("stage", *columns):
        heading = column.replace("_", " ")
        table.add_column(heading, justify="left" if column == "stage" else "right")
    for name, row in facts.items():
        table.add_row(name, *(row.get(column, "") for column in columns))
    return table


def _numbers(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The plain numbers of a metrics file."""
    for key, value in content.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield key, f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _evaluation_table(evaluation: dict[str, Any]) -> "Table":
    from rich.table import Table

    from vatt.report.tables import too_few

    table = Table(box=None, pad_edge=False, title="Results on the test split (95 % interval)")
    for column in ("what", "value", "interval", "chance", "clips"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, metric in headline(evaluation):
        value, interval, chance, clips = _cells(metric, ranks="median rank" in name)
        needed = too_few(metric, searched=not name.startswith(("probe", "fine")))
        if needed:
            value, interval, clips = "too few clips", "", f"{clips} of {needed}"
        table.add_row(name, value, interval, "" if "difference" in name else chance, clips)
    return table


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


COMMANDS = (status, logs, ui, compare)
