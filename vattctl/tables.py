"""One command for each table and study: its runs as experiments, their cost, their results."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vatt.errors import Interrupted, SettingsError, Stopped, VattError
from vatt.files import inside, read_json
from vattctl.dvc import StageFailed, changed_stages
from vattctl.experiments import Experiment, run_experiment, settings_of
from vattctl.params import enter_project, print_rich
from vattctl.sets import overlay

if TYPE_CHECKING:
    from vatt.beyond import Beyond
    from vatt.config import Params
    from vatt.studies import Scale, StudyRun

NUMBERS = tuple(str(number) for number in range(1, 11))
BEYOND = ("text", "tokens", "senses", "experts")
RESUMABLE = (Stopped.exit_code, Interrupted.exit_code)
VERSION = 1
EXPERIMENTS, SETS = Path("experiments"), Path("sets")
CHECKPOINT = Path("runs/checkpoints/pretrained")


@dataclass(frozen=True, slots=True)
class RunState:
    """How far a run is, what it lacks, and what it took or will take."""

    run: "StudyRun"
    state: str  # done, unfinished (or changed since), to run
    missing: tuple[str, ...]  # what must be there first
    measured: float | None  # seconds, of the stages that have run
    forecast: float | None  # seconds; None: unknown


def experiment_of(run: "StudyRun", scale: "Scale") -> Experiment:
    """A run as an experiment of this project; on a data set, by the recipe that the set brings."""
    import yaml

    brought = None if run.data is None or missing(run) else SETS / run.data / "params.yaml"
    raw = yaml.safe_load((brought or Path("params.yaml")).read_text(encoding="utf-8"))
    tasks = {
        task.name: _merged(_of(raw["finetune"]["tasks"], task.like, run), task.settings)
        for task in run.tasks
    }
    settings: dict[tuple[str, ...], Any] = {}
    if brought is not None:
        settings = {("evaluate", key): value for key, value in raw["evaluate"].items()}
    for key, value in run.settings.items():
        keys = tuple(key.split("."))
        if keys[:2] == ("evaluate", "probes") and keys[2:]:  # one more
            probes = {**raw["evaluate"]["probes"], keys[2]: value}
            settings["evaluate", "probes"] = probes
        else:
            settings[keys] = value
    settings["finetune", "run"] = list(tasks)
    if tasks:
        settings["finetune", "tasks"], settings["finetune", "init"] = tasks, list(run.inits)
    stages = [
        *(["download", "preprocess"] if _brings_data(run) else []),
        *(["pretrain"] if run.start is None else []),
        *(["finetune"] if tasks else []),
        *(["evaluate"] if scale.name == "demo" or run.start is not None else []),
    ]
    data = Path() if run.data is None else SETS / run.data
    if run.bringer is not None and not _brings_data(run):
        data = EXPERIMENTS / run.bringer
    return Experiment(
        EXPERIMENTS / run.name,
        stages=tuple(stages),
        settings=settings,
        data=data,
        start=None if run.start is None else EXPERIMENTS / run.start / CHECKPOINT,
    )


def _merged(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested sections; values of `over` win."""
    deeper = {k: _merged(under[k], v) for k, v in over.items() if isinstance(v, Mapping)}
    return {**under, **over, **deeper}


def _brings_data(run: "StudyRun") -> bool:
    return run.bringer == run.name


def _of(tasks: dict[str, Any], like: str, run: "StudyRun") -> dict[str, Any]:
    """The task that a run's task is based on; in a data set, it has the set's name."""
    name = run.data if like not in tasks and run.data in tasks else like
    if name not in tasks and run.data is not None and "task" in (recipe := overlay(run.data)):
        return dict(recipe["task"])  # as the set will bring it
    if name not in tasks:
        raise SettingsError(
            f"finetune.tasks has no '{like}', which {run.name} needs",
            hint=f"it has: {', '.join(tasks)}",
        )
    return deepcopy(tasks[name])


def plan(
    runs: "Sequence[StudyRun]", scale: "Scale", *, device: str | None, gpus: int
) -> list[RunState]:
    """State and cost of each run; nothing is written."""
    speed = _speed(device, gpus)
    changed = changed_stages([EXPERIMENTS / run.name / "dvc.yaml" for run in runs])
    by_name = {run.name: run for run in runs}
    planned = []
    for run in runs:
        folder = EXPERIMENTS / run.name
        same = _same(settings_of(experiment_of(run, scale)), folder) and not any(
            name.startswith(f"{folder}/") for name in changed
        )
        ran = (folder / "dvc.lock").exists()
        work = _work(run, by_name.get(run.start or ""), scale)
        planned.append(
            RunState(
                run,
                state="to run" if not ran else "done" if same else "unfinished",
                missing=tuple(missing(run)),
                measured=sum(_seconds(folder).values()) or None,
                forecast=None if speed is None else work / speed,
            )
        )
    return planned


def _same(settings: "Params", folder: Path) -> bool:
    """Whether the folder was written with these settings; `machine` changes no result."""
    from vatt.config import load_params

    if not (folder / "params.yaml").exists():
        return False
    written = load_params(folder / "params.yaml")
    one, other = (params.model_dump(exclude={"machine"}) for params in (settings, written))
    return one == other


def missing(run: "StudyRun") -> list[str]:
    """The data set that a run needs and that is not there."""
    if run.data is None or (SETS / run.data / "dvc.yaml").exists():
        return []
    return [str(SETS / run.data)]


def _seconds(folder: Path) -> dict[str, float]:
    """What the stages of a project took, by name."""
    from vatt.tracking.records import Record

    found = {}
    for file in sorted((folder / "reports/runs").glob("*.json")):
        facts = Record.read(file).facts
        if facts.get("status") == "FINISHED":
            found[file.stem] = float(facts["seconds"])
    return found


def _training_seconds(params: "Params", folder: Path) -> float | None:
    """What the steps of a pre-training take at their median speed."""
    from statistics import median

    from vatt.tracking.mlflow import metric_values
    from vatt.tracking.records import Record

    file = folder / params.paths.runs / "pretrain.json"
    run_id = Record.read(file).facts.get("run_id")
    if run_id is None:
        return None
    with inside(folder):  # a relative store counts from there
        speeds = metric_values(params, run_id, "samples_per_second")
    samples = params.pretrain.steps * params.pretrain.batch_size
    return samples / median(speeds) if speeds else None


def _seconds_of_a_window(params: "Params", folder: Path) -> dict[str, float]:
    """What a window takes in each tower, as the evaluation of a run has measured it."""
    from vatt.tracking.mlflow import metric_values
    from vatt.tracking.records import Record

    run_id = Record.read(folder / params.paths.runs / "evaluate.json").facts.get("run_id")
    if run_id is None:
        return {}
    with inside(folder):
        found = {
            tower: metric_values(params, run_id, f"cost.{tower}.seconds")
            for tower in ("video", "audio")
        }
    return {tower: values[-1] for tower, values in found.items() if values}


def _speed(device: str | None, gpus: int) -> float | None:
    """Operations a second: a GPU's by its data sheet, else as a pre-training here has shown."""
    from vatt.plan.forecast import COMMON_SHARE, named_place
    from vatt.training.telemetry import pretraining_work

    if device is not None:
        place = named_place(device)
        assert place.device is not None
        return place.device.bf16_flops * COMMON_SHARE * gpus
    from vatt.config import load_params

    for folder in (Path(), *sorted(EXPERIMENTS.glob("*"))):
        known = load_params(folder / "params.yaml")
        seconds = _training_seconds(known, folder)
        if seconds:
            work = pretraining_work(known.model, known.pretrain).flops * known.pretrain.steps
            return work / seconds
    return None


def _work(run: "StudyRun", start: "StudyRun | None", scale: "Scale") -> float:
    """Operations of a run's training; a fine-tuning's model is that of its start."""
    from vatt.training.finetune import task_model
    from vatt.training.telemetry import finetuning_work, pretraining_work

    known = settings_of(experiment_of(run, scale))
    model = known.model if start is None else settings_of(experiment_of(start, scale)).model
    work = 0.0
    if run.start is None:
        work += pretraining_work(known.model, known.pretrain).flops * known.pretrain.steps
    for name in known.finetune.run:
        task = known.finetune.tasks[name]
        once = finetuning_work(task_model(model, task), task).flops * task.steps
        work += once * len(known.finetune.init)
    return work


def gather(scale: "Scale", params: "Params") -> dict[str, Any]:
    """What the runs have measured, in one file among the metrics: the report is made from it."""
    from vatt.beyond import beyond
    from vatt.files import atomic_write
    from vatt.studies import SEEDS, STUDIES, studies, with_seed

    once = {run.name: run for one in studies(scale) for run in one.runs}
    runs = {run.name: run for one in once.values() for run in (with_seed(one, n) for n in SEEDS)}
    if scale.name == "demo":
        runs |= {run.name: run for one in beyond().values() for run in one.runs()}
    found = {}
    for run in runs.values():
        file = EXPERIMENTS / run.name / "reports/metrics/evaluate.json"
        if file.exists():
            found[run.name] = _measured(EXPERIMENTS / run.name, file)
    content = {"version": VERSION, "scale": scale.name, "runs": found}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    target = params.paths.metrics / f"{STUDIES}.json"
    if found and not (target.exists() and target.read_text(encoding="utf-8") == text):
        with atomic_write(target) as path:
            path.write_text(text, encoding="utf-8")
    return found


def _measured(folder: Path, file: Path) -> dict[str, Any]:
    """A run's metrics with its operations and seconds."""
    from vatt.checkpoint import load_config
    from vatt.config import ModelParams, load_params
    from vatt.flops import audio_flops, multimodal_flops, video_flops
    from vatt.training.finetune import task_model

    params = load_params(folder / "params.yaml")
    results = read_json(file, dict, hint="run `vattctl evaluate --force` in that experiment")
    checkpoint = load_config(folder / params.paths.pretrained)
    whole, rate = ModelParams.model_validate(checkpoint["model"]), params.pretrain.drop_rate
    forward = multimodal_flops(
        whole, drop_rate=rate, merge_rate=params.pretrain.merge_rate, convention="true"
    )
    gflops: dict[str, Any] = {"pretrain": forward / 1e9}
    gflops["evaluate"] = results.get("protocol", {}).get("gflops", {})
    for name in params.finetune.run:
        task = params.finetune.tasks[name]
        model = task_model(whole, task)
        how: Any = {"drop_rate": task.drop_rate, "experts": model.experts, "convention": "true"}
        flops = (
            audio_flops(model.audio, **how)
            if task.modality == "audio"
            else video_flops(model.video, **how)
        )
        gflops[name] = flops / 1e9
    return {
        "seed": params.seed,
        "steps": params.pretrain.steps,
        "gflops": gflops,
        "seconds": _seconds(folder),
        "training_seconds": _training_seconds(params, folder),
        "cost": _seconds_of_a_window(params, folder),
        "retrieval": {"pretrained": results.get("retrieval", {}).get("pretrained", {})},
        "probes": results.get("probes", {}),
        "classification": results.get("classification", {}),
        "experts": results.get("experts", {}),
    }


@click.command(
    "table",
    epilog="""\b
Examples:
  vattctl table                 all tables, a line each: what is done, what is missing, its cost
  vattctl table 5 --dry-run     the runs behind table 5 (DropToken while pre-training)
  vattctl table 5               run those that are missing
  vattctl table all --seeds     three seeds for DropToken and the two backbones
  vattctl table tokens          a study beyond the paper, with three seeds
  vattctl table 1 --dry-run --device h100-80gb --gpus 64""",
)
@click.argument("which", required=False, type=click.Choice([*NUMBERS, "all", *BEYOND, "beyond"]))
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
    which: str | None,
    dry_run: bool,
    seeds: bool,
    device: str | None,
    gpus: int,
    as_json: bool,
) -> None:
    """Run what a table of the paper, or a study beyond it, needs: each run is an experiment.

    On the demo corpus the tables are scaled down; with the paper's settings, on the data sets
    in sets/ (`vattctl finetune SET --data DIR` makes them). A run that several tables need is run
    once; a killed one continues. The report shows the results next to the published numbers.
    `beyond` is all studies of docs/beyond.md, each arm and its control with three seeds.
    """
    from vatt.config import load_params

    enter_project(context)
    params = load_params()
    scale = _scale(params)
    chosen = _choose(which, scale)
    runs = _runs(chosen, scale, seeds=seeds)
    if which is None or dry_run:
        planned = plan(runs, scale, device=device, gpus=gpus)
        if as_json:
            click.echo(json.dumps(_plain(chosen, planned, scale), indent=2))
        elif which in (None, "beyond"):
            _print_tables(chosen, planned, scale)
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
        _print_results(chosen)
    if failed:
        raise VattError(f"failed: {', '.join(failed)}", hint="their messages are above")


def _scale(params: "Params") -> "Scale":
    from vatt.studies import SCALES

    return SCALES["demo" if params.data.source == "demo" else "paper"]


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a call of `vattctl table` is about."""

    numbers: tuple[int, ...]  # of the paper's tables
    studies: "tuple[Beyond, ...]"

    def runs_of(self, scale: "Scale") -> "dict[str, list[StudyRun]]":
        """The runs of each table and study, by the name under which it is listed."""
        from vatt.studies import study

        tables = {str(number): list(study(number, scale).runs) for number in self.numbers}
        return tables | {one.name: list(one.runs()) for one in self.studies}


def _choose(which: str | None, scale: "Scale") -> Chosen:
    from vatt.beyond import beyond, named

    if which in (None, "all", *NUMBERS):
        wanted = [str(which)] if which in NUMBERS else NUMBERS
        return Chosen(tuple(map(int, wanted)), ())
    if scale.name != "demo":
        raise SettingsError(
            f"the study '{which}' runs on the demo corpus, scaled down",
            hint="vattctl init DIR --preset demo makes a project for it",
        )
    return Chosen((), tuple(beyond().values()) if which == "beyond" else named(str(which)))


def _runs(chosen: Chosen, scale: "Scale", *, seeds: bool) -> "list[StudyRun]":
    """The chosen runs, shared ones once, each after the one whose weights or clips it takes."""
    from vatt.studies import BASE, SEEDED, SEEDS, with_seed

    found = {run.name: run for runs in chosen.runs_of(scale).values() for run in runs}
    runs = list(found.values())
    if seeds and chosen.numbers:
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
        experiment = experiment_of(run, scale)
        if run.corpus == run.name:
            _lend_corpus(experiment, run.seed)
        try:
            run_experiment(experiment, quiet=quiet)
        except StageFailed as error:
            if error.exit_code in RESUMABLE:
                raise
            click.echo(f"{run.name}: {error}", err=True)
            failed.append(run.name)
        gather(scale, params)  # also when a later run fails
    return failed


def _lend_corpus(experiment: Experiment, seed: int | None) -> None:
    """Link the generated videos of the base with the same seed, so that they are not made again.

    Such a file's name determines its content; what differs is what is said, or what is beside it.
    """
    from vatt.studies import BASE

    base = Path() if seed is None else EXPERIMENTS / f"{BASE}-seed-{seed}"
    own = experiment.folder / settings_of(experiment).paths.media.with_name("corpus")
    own.mkdir(parents=True, exist_ok=True)
    for video in (base / own.relative_to(experiment.folder)).glob("demo*.mp4"):
        with suppress(OSError):  # there already, or no links here
            os.link(video, own / video.name)


def _plain(chosen: Chosen, planned: Sequence[RunState], scale: "Scale") -> dict[str, Any]:
    return {
        "version": VERSION,
        "scale": scale.name,
        "tables": {
            name: [run.name for run in runs] for name, runs in chosen.runs_of(scale).items()
        },
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


def _print_tables(chosen: Chosen, planned: Sequence[RunState], scale: "Scale") -> None:
    from rich.table import Table

    from vatt.paper import paper_tables

    by_name = {one.run.name: one for one in planned}
    captions = {str(one.number): one.caption for one in paper_tables()}
    captions |= {one.name: one.title for one in chosen.studies}
    lines = Table(box=None, pad_edge=False)
    for column in ("table", "what", "runs done", "left"):
        lines.add_column(column, overflow="fold")
    for name, wanted in chosen.runs_of(scale).items():
        runs = [by_name[run.name] for run in wanted]
        done = sum(one.state == "done" for one in runs)
        words = "by formula, nothing to run" if not runs else _total(runs)
        lines.add_row(name, captions[name], f"{done} of {len(runs)}", words)
    print_rich(lines)
    if scale.name == "demo" and chosen.numbers:
        print_rich("more, beyond the paper: vattctl table beyond --dry-run")
    print_rich(f"all together: {_total(planned)}")


def _print_results(chosen: Chosen) -> None:
    from rich.table import Table

    from vatt.config import load_params
    from vatt.report.inputs import read_inputs
    from vatt.report.studies import beyond_table, study_table

    inputs = read_inputs(load_params().paths)
    found = [
        (f"Table {number}, scaled down", study_table(number, inputs)) for number in chosen.numbers
    ]
    found += [(study.title, beyond_table(study, inputs)) for study in chosen.studies]
    for title, one in found:
        if one is None:
            continue
        lines = Table(box=None, pad_edge=False, title=title)
        for heading in one.headings:
            lines.add_column(heading, overflow="fold")
        for row in one.rows:
            cells = (f"{cell.text} {cell.detail}".strip() for cell in row.cells)
            lines.add_row(f"{row.head} ({row.note})" if row.note else row.head, *cells)
        print_rich(lines)
    print_rich("next: vattctl report")
