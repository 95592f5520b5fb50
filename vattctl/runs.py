"""What has run: status, results in one table, two runs compared, and the MLflow page."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import click

from vatt.errors import MachineError, SettingsError
from vatt.files import inside, read_json
from vattctl.dvc import STAGES, changed_in_background, stage_log, stage_names
from vattctl.params import (
    completion_folder,
    enter_project,
    json_option,
    print_json,
    print_rich,
)

HOME = "127.0.0.1"  # what only this machine reaches
READY_SECONDS = 120  # that a page may take to start

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
    from vatt.tracking.records import Record

    found = {}
    for path in sorted(folder.glob("*.json")):
        name = path.stem
        stage, dash, variant = name.partition("-")
        found[f"{stage}@{variant}" if dash else name] = Record.read(path).facts
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
@json_option
@click.pass_context
def logs(context: click.Context, stage: str, follow: bool, as_json: bool) -> None:
    """Print what STAGE printed when vattctl last ran it."""
    enter_project(context)
    if stage.partition("@")[0] not in STAGES:
        raise SettingsError(f"no stage '{stage}'", hint=f"stages: {', '.join(STAGES)}")
    if as_json:
        print_json(stage=stage, lines=list(stage_log(stage, follow=follow)))
        return
    try:
        for line in stage_log(stage, follow=follow):
            click.echo(line)
    except KeyboardInterrupt:  # of --follow; the stage goes on
        context.exit(0)


def read_results(stage: str, paths: "PathsParams") -> dict[str, Any]:
    """What the stage has measured, by its metrics files; of the last two, the whole evaluation."""
    stem = "evaluate" if stage == "report" else stage
    return {
        file.stem: read_json(file, dict, hint=f"run `vattctl repro --force {stem}`")
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


@click.command(
    epilog="""\b
Examples:
  vattctl ui
  vattctl ui --port 5001 --host 0.0.0.0    for other machines too"""
)
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535))
@click.option("--host", default=HOME, show_default=True, help="The address to listen on.")
@click.option("--open/--no-open", "opens", default=None, help="Open a browser; default: on a desk.")
@click.pass_context
def ui(context: click.Context, port: int, host: str, opens: bool | None) -> None:
    """Serve the MLflow page of this project's runs (Ctrl-C ends it).

    Whoever reaches the address can read and delete runs: by default only this machine does.
    """
    enter_project(context)
    from vatt.config import load_params
    from vatt.tracking.mlflow import runs_page, store_uri

    if not _port_is_free(port):
        raise MachineError(f"port {port} is in use", hint=f"vattctl ui --port {port + 1}")
    machine = (params := load_params()).machine
    if host != HOME:
        click.echo(f"note: anyone who reaches {host}:{port} can change the runs", err=True)
    shown = HOME if host == "0.0.0.0" else host
    address = f"http://{shown}:{port}/{runs_page(params)}"
    click.echo(f"{address}\n(ready in some seconds; Ctrl-C ends it)")
    if opens or (opens is None and sys.stdout.isatty() and os.environ.get("DISPLAY")):
        Thread(target=_open_when_ready, args=(address, port), daemon=True).start()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port)),
        *("--workers", "1", "--uvicorn-opts", "--log-level=warning"),
    ]
    store = store_uri(machine)
    beside = {"MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_REGISTRY_STORE_URI": store}
    code = serve(command, beside)
    if code != 0:
        raise MachineError(f"the MLflow server ended with {code}", hint="its message is above")


def _open_when_ready(address: str, port: int) -> None:
    import webbrowser

    for _ in range(READY_SECONDS):
        if not _port_is_free(port):
            webbrowser.open(address)
            return
        time.sleep(1)


# `read` returns when vattctl has ended, however it ends: its pipe is closed then.
GUARD = """
read line
kill -TERM "-$1"
for i in 1 2 3 4 5 6 7 8 9; do kill -0 "-$1" || exit 0; sleep 0.1; done
kill -KILL "-$1"
"""


def serve(command: list[str], variables: Mapping[str, str] | None = None) -> int:
    """Run a server until it ends or vattctl does; its processes end with vattctl.

    `variables` may hold a password, which must not be in the command line.
    """
    quiet = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "PYTHONWARNINGS": "ignore",  # of what the server imports
        "MLFLOW_LOGGING_LEVEL": "WARNING",
    }
    environment = {**os.environ, **quiet, **(variables or {})}
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

    A run is the name or MLflow id of a pipeline or the id of its evaluate run (the first letters of
    an id suffice), or a folder with the arrays of an evaluation. A difference whose interval
    contains 0 may be chance.
    """
    given = [Path(run).resolve() for run in (first, second)]  # entering changes the folder
    enter_project(context)
    from vatt.config import load_params
    from vatt.evaluation.comparison import compare_evaluations

    params = load_params()
    pairs = list(zip(given, (first, second), strict=True))
    folders = [path if path.is_dir() else _kept(params, run) for path, run in pairs]
    rows = compare_evaluations(*folders, resamples=resamples, seed=params.seed)
    one, other = ({} if path.is_dir() else _settings(params, run) for path, run in pairs)
    settings = differing(one, other) if one and other else None
    if as_json:
        print_json(first=first, second=second, rows=rows, settings=settings)
        return
    _print(rows)
    if settings is None:
        print_rich("settings: known only when both are MLflow runs")
    elif not settings:
        print_rich("settings: the same")
    else:
        from rich.table import Table

        table = Table("setting", "first", "second", box=None, pad_edge=False)
        for key, values in settings.items():
            table.add_row(key, *(value or "-" for value in values))
        print_rich(table)


def _kept(params: "Params", run: str) -> Path:
    from vatt.tracking.mlflow import artifact_of

    return artifact_of(params, run, "evaluate", params.paths.evaluation.name)


def _settings(params: "Params", run: str) -> dict[str, str]:
    from vatt.tracking.mlflow import settings_behind

    return settings_behind(params, run)


def differing(
    first: Mapping[str, str], second: Mapping[str, str]
) -> dict[str, tuple[str | None, str | None]]:
    """The settings that differ, by key, with both values."""
    return {
        key: (first.get(key), second.get(key))
        for key in sorted({*first, *second})
        if first.get(key) != second.get(key)
    }


def in_words(name: str) -> str:
    """`text_to_video.recall_at_10` -> `text to video, R@10`."""
    what, _, measure = name.rpartition(".")
    if what.startswith("probe-"):
        probe, _, kind = what.removeprefix("probe-").rpartition("-")
        return f"{probe} probe, {CLASSIFIERS.get(kind, kind)}"
    task, dash, start = what.rpartition("-")
    if dash:
        what = f"{task} {STARTS[start]}" if start in STARTS else what
    measure = measure.replace("recall_at_", "R@").replace("class_at_", "class@")
    return f"{what}, {measure}".replace("top_", "top-").replace("_", " ")


CLASSIFIERS = {"svm": "linear SVM", "low_rank": "low-rank classifier"}
STARTS = {"pretrained": "fine-tuned", "scratch": "from scratch"}


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from vatt.report.tables import too_few

    table = Table(box=None, pad_edge=False)
    columns = ("measure", "first", "second", "difference", "95 % interval", "clips", "", "name")
    for column in columns:
        is_text = column in ("measure", "", "name")
        table.add_column(column, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        gap, name = row["difference"], row["name"]
        clear = not gap["low"] <= 0 <= gap["high"]
        one, other, change, low, high = (
            show_value(name, value)
            for value in (row["first"]["value"], row["second"]["value"], *_span(gap))
        )
        clips, mark = str(gap["n"]), "*" if clear else ""
        table.add_row(in_words(name), one, other, change, f"{low} to {high}", clips, mark, name)
    print_rich(
        table,
        "* the interval of the difference (first - second) excludes 0; names as in MLflow and DVC",
    )
    few = {
        needed: row["difference"]["n"]
        for row in rows
        if (needed := too_few(row["difference"], searched="_to_" in row["name"]))
    }
    for needed, clips in few.items():
        print_rich(f"{clips} clips are too few to say anything: {needed} or more are needed")


def _span(gap: dict[str, Any]) -> tuple[float, float, float]:
    return gap["value"], gap["low"], gap["high"]


def show_value(name: str, value: float) -> str:
    """A measure as a person reads it."""
    if name.endswith(("median_rank", "d_prime", "loss")):
        return f"{value:.2f}"
    return f"{100 * value:.1f} %"


@click.command(
    "runs",
    epilog="""\b
Examples:
  vattctl runs                        the last pipelines, and what each changed
  vattctl runs --count 50 --json""",
)
@click.option("--count", default=10, show_default=True, type=click.IntRange(1), help="How many.")
@json_option
@click.pass_context
def runs_command(context: click.Context, count: int, as_json: bool) -> None:
    """List the last pipelines in MLflow: their state, main results and changed settings.

    A pipeline is all runs of stages with the same settings. `vattctl compare` takes two ids.
    """
    enter_project(context)
    from vatt.config import load_params
    from vatt.tracking.mlflow import pipelines

    found = pipelines(load_params(), count=count)
    rows = []
    for number, one in enumerate(found):
        before = found[number + 1].settings if number + 1 < len(found) else {}
        changes = differing(before, one.settings) if before and one.settings else {}
        rows.append({**asdict(one), "changed": {key: new for key, (_, new) in changes.items()}})
    if as_json:
        for row in rows:
            del row["settings"]
        print_json(pipelines=rows)
    else:
        _print_pipelines(rows)


def _print_pipelines(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from vatt.progress import duration

    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    shown = [name for name in MAIN if name in names]
    shown += [name for name in names if name.endswith("-pretrained.top_1")][:2]
    table = Table(box=None, pad_edge=False)
    for column in ("run", "name", "state", "began (UTC)", "took", *map(in_words, shown)):
        table.add_column(column, overflow="fold", justify="left")
    table.add_column("changed", overflow="fold")
    for row in rows:
        measured = row["metrics"]
        values = [_shown_of(name, measured) for name in shown]
        changed = [f"{key}={value}" for key, value in row["changed"].items()]
        more = [f"and {len(changed) - SHOWN} more"] if len(changed) > SHOWN else []
        took = duration(measured["seconds"]) if "seconds" in measured else ""
        table.add_row(
            row["run_id"][:8], row["name"], row["status"].lower(), row["began"][:16], took,
            *values, "\n".join([*changed[:SHOWN], *more]),
        )  # fmt: skip
    print_rich(table if rows else "no runs yet: vattctl demo")


def _shown_of(name: str, measured: Mapping[str, float]) -> str:
    """A measure of a pipeline; not the number, where too few clips were searched."""
    from vatt.report.tables import FEWEST_SEARCHED

    if measured.get(f"{name.rpartition('.')[0]}.clips", FEWEST_SEARCHED) < FEWEST_SEARCHED:
        return "too few clips"
    return show_value(name, measured[name]) if name in measured else ""


MAIN = ("text_to_video.recall_at_10", "video_to_audio.recall_at_10")
SHOWN = 4  # changed settings of a pipeline
