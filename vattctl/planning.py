"""Before anything starts: what would run and why, what it takes, what later stages will lack."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vatt.errors import MachineError, SettingsError
from vatt.files import inside
from vatt.process import FOLDER
from vatt.progress import duration
from vattctl.dvc import STAGES, changed_in_background, stages_here
from vattctl.experiments import Experiment, edit_of
from vattctl.params import (
    JSON_VERSION,
    SIZES,
    Edit,
    Settings,
    edit,
    enter_project,
    print_json,
    print_rich,
    set_option,
    shortened,
    size_settings,
    yaml_plain,
)

if TYPE_CHECKING:
    from rich.table import Table

    from vatt.config import Params
    from vatt.plan.forecast import Forecast, Place, Speed, Trial
    from vatt.plan.memory import BatchSettings

# --- what a command would run ---------------------------------------------------------------------

LONG_SECONDS = 3600.0  # of training: ask before it
SLOWEST = 1e10  # operations a second that any machine reaches
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage: why it would run (nothing: it would not) and what it would take."""

    stage: str
    why: tuple[str, ...]
    seconds: float | None = None
    source: str = ""  # of the seconds: measured, or forecast; or what is known without them


def plan_run(
    changed: Edit, targets: tuple[str, ...] = (), *, force: bool = False
) -> list[StagePlan]:
    """What `dvc repro` would run in this folder with these settings; nothing is written."""
    settings, locked = yaml_plain(changed.document), _locked(Path())
    with changed_in_background() as answer:
        found = answer() or {}
    plans: list[StagePlan] = []
    for name in _stages_until(targets, settings, force=force):
        before = [
            one.stage
            for one in plans
            if one.why and STAGES.index(_kind(one.stage)) < STAGES.index(_kind(name))
        ]
        why = list(_reasons(name, locked.get(name), settings, found.get(name, [])))
        if force and (not targets or name in targets or _kind(name) in targets):
            why = why or ["--force"]
        if not why and before:
            why = [f"if {before[-1]} gives another result"]
        seconds, source = _takes(name, changed, locked.get(name)) if why else (None, "")
        plans.append(StagePlan(name, tuple(why), seconds, source))
    return plans


def plan_experiment(experiment: Experiment, *, force: bool) -> list[StagePlan]:
    """What an experiment's own stages would run, whether its folder is there or not."""
    changed = edit_of(experiment)
    if not (experiment.folder / "dvc.yaml").exists():
        names = _expanded(experiment.stages, yaml_plain(changed.document))
        return [StagePlan(name, ("never run",)) for name in names]
    with inside(experiment.folder):
        return plan_run(changed, experiment.stages if force else (), force=force)


def _kind(name: str) -> str:
    return name.partition("@")[0]


def _expanded(stages: Sequence[str], settings: Any) -> list[str]:
    """Each fine-tuning by its task and start, in the order of the pipeline."""
    tuning = settings["finetune"]
    tasks = [f"finetune@{task}-{init}" for task in tuning["run"] for init in tuning["init"]]
    ordered = [name for name in STAGES if name in stages]
    return [one for name in ordered for one in (tasks if name == "finetune" else [name])]


def _stages_until(targets: tuple[str, ...], settings: Any, *, force: bool) -> list[str]:
    names = _expanded(stages_here(), settings)
    if not targets:
        return names
    last = max(STAGES.index(_kind(target)) for target in targets)
    return [
        name
        for name in names
        if STAGES.index(_kind(name)) < last or name in targets or _kind(name) in targets
    ]


def _locked(folder: Path) -> dict[str, Any]:
    """What dvc.lock knows of each stage."""
    import yaml

    file = folder / "dvc.lock"
    if not file.exists():
        return {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)["stages"]
    return found


def _reasons(
    name: str, locked: dict[str, Any] | None, settings: Any, changes: Sequence[str]
) -> Iterator[str]:
    """Settings that differ from those of the last run, then what DVC finds changed."""
    if locked is None:
        yield "never run"
        return
    known = (locked.get("params") or {}).get("params.yaml") or {}
    for key, before in known.items():
        now = settings
        for part in key.split("."):
            now = now.get(part) if isinstance(now, dict) else None
        yield from _differences(key, before, now)
    for change in changes:
        thing = change.partition(": ")[2]
        if not any(thing == key or thing.startswith(f"{key}.") for key in known):
            yield change


def _differences(key: str, before: Any, now: Any) -> Iterator[str]:
    """A line for each innermost setting that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            yield from _differences(f"{key}.{name}", before.get(name), now.get(name))
    elif before != now and str(before) != str(now):  # YAML 1.1 reads 4e-05 as text
        one, other = (json.dumps(value, ensure_ascii=False) for value in (before, now))
        yield f"{key}: {one} -> {other}"


def _takes(name: str, changed: Edit, locked: dict[str, Any] | None) -> tuple[float | None, str]:
    """Seconds of a stage: as measured here, scaled to the settings; else forecast if it trains.

    A pre-training that surely ends within an hour is not tried for a forecast.
    """
    from vatt.tracking.records import Record

    file = changed.params.paths.runs / f"{name.replace('@', '-')}.json"
    record = Record.read(file).facts
    measured = float(record["seconds"]) if record.get("status") == "FINISHED" else None
    if name != "pretrain":
        scale = _task_scale(name, changed, locked) if measured is not None else None
        return (None, "") if measured is None or scale is None else (measured * scale, "measured")
    then = ((locked or {}).get("params") or {}).get("params.yaml") or {}
    if measured is not None and {"model", "pretrain"} <= then.keys():
        from vatt.config import ModelParams, PretrainParams

        old = ModelParams.model_validate(then["model"])
        work = training_work(old, PretrainParams.model_validate(then["pretrain"]))
        now = training_work(changed.params.model, changed.params.pretrain)
        return measured * now / work, "measured"
    params = changed.params
    if training_work(params.model, params.pretrain) < LONG_SECONDS * SLOWEST:
        return None, "within an hour"
    seconds = forecast_training(params)
    return seconds, "forecast" if seconds is not None else ""


def _task_scale(name: str, changed: Edit, locked: dict[str, Any] | None) -> float | None:
    """Steps of a fine-tuning now, relative to those that were measured; 1 for other stages."""
    if not name.startswith("finetune@"):
        return 1.0
    task = name.partition("@")[2].rpartition("-")[0]
    then = ((locked or {}).get("params") or {}).get("params.yaml") or {}
    before, now = then.get(f"finetune.tasks.{task}"), changed.params.finetune.tasks.get(task)
    if before is None or now is None:
        return None
    return now.steps * now.batch_size / (before["steps"] * before["batch_size"])


def training_work(model: Any, pretrain: Any) -> float:
    """Operations of a whole pre-training."""
    from vatt.training.telemetry import pretraining_work

    return float(pretraining_work(model, pretrain).flops * pretrain.steps)


def forecast_training(params: "Params") -> float | None:
    """Seconds of a pre-training here; None where a trial fails, which `vattctl plan` explains."""
    from vatt.plan import forecast as plans
    from vatt.plan.memory import count

    place, counts = plans.this_place(params), count(params.model)
    if place.device is not None:
        speed: Speed = plans.GpuSpeed(place.device, params.model, params.pretrain, counts)
    else:
        try:
            speed = plans.TrialSpeed(_trial(params, again=False), params.pretrain)
        except MachineError as error:
            log.debug("no forecast: %s", error)
            return None
    return params.pretrain.steps * speed(plans.as_set(params, place, counts)).total


def _trial(params: "Params", *, again: bool) -> "Trial":
    """Measured steps on this machine, some seconds; without `again`, a recent result counts."""
    from vatt.plan.trial import last_trial, run_trial

    notes = FOLDER / "trial.json"
    known = None if again else last_trial(params, notes)
    if known is not None:
        return known
    click.echo("trying the model on this machine...", err=True)
    return run_trial(params, notes)


def ask_before_hours(plans: Sequence[StagePlan], *, yes: bool) -> None:
    """Announce the time of a pre-training; on a terminal ask before more than an hour of it."""
    training = next((one for one in plans if one.stage == "pretrain" and one.why), None)
    if training is None or training.seconds is None:
        return
    about = f"the pre-training takes about {duration(training.seconds)} ({training.source})"
    click.echo(f"forecast: {about}", err=True)
    if training.seconds > LONG_SECONDS and not yes and sys.stdin.isatty() and sys.stderr.isatty():
        click.confirm("start it?", abort=True, err=True, default=True)


def show_plan(changed: Edit, plans: Sequence[StagePlan], *, as_json: bool) -> None:
    """Print what --dry-run found."""
    price = changed.params.report.device_hour_price
    facts = plan_facts(plans, price, devices=changed.params.machine.processes)
    if as_json:
        print_json(dry_run=True, changes=changed.lines, **facts)
        return
    for line in changed.lines:
        click.echo(f"params.yaml would change: {shortened(line)}")
    print_rich(plan_table(plans))
    runs = [one for one in plans if one.why]
    if runs:
        known = sum(one.seconds is not None for one in runs)
        more = f", {len(runs) - known} not known" if 0 < known < len(runs) else ""
        about = f"about {duration(facts['seconds'])}" if known else "time and cost not known"
        cost = f"; cost about {facts['cost']:.2f}" if known and price is not None else ""
        if known and price is None:
            cost = "; cost not known: report.device_hour_price is not set"
        click.echo(f"{len(runs)} stage{'s' * (len(runs) > 1)}, {about}{more}{cost}")
    click.echo("nothing was changed or run (--dry-run)")


def plan_facts(
    plans: Sequence[StagePlan], price: float | None, *, devices: int = 1
) -> dict[str, Any]:
    """The same for `--json`."""
    seconds = sum(one.seconds or 0.0 for one in plans)
    return {
        "stages": [{**asdict(one), "runs": bool(one.why)} for one in plans],
        "seconds": seconds,
        "cost": None if price is None else price * devices * seconds / 3600,
    }


WHY_SHOWN = 4  # reasons in a line


def plan_table(plans: Sequence[StagePlan]) -> "Table":
    """Stage, what it takes, why it would run."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("stage", "takes", "would run because"):
        table.add_column(column, overflow="fold")
    for one in plans:
        more = f"; and {len(one.why) - WHY_SHOWN} more" if len(one.why) > WHY_SHOWN else ""
        why = "; ".join(one.why[:WHY_SHOWN]) + more if one.why else "(up to date)"
        known = one.source or "not known"
        takes = f"{duration(one.seconds)}, {known}" if one.seconds is not None else known
        table.add_row(one.stage, takes if one.why else "-", why)
    return table


# --- the forecast of a pre-training ---------------------------------------------------------------

PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimiser",
    "activations": "activations",
    "loss": "heads and loss",
    "inputs": "clips",
    "runtime": "runtime",
}


@click.command(
    "plan",
    epilog="""\b
Examples:
  vattctl plan                                    this machine, after a short trial
  vattctl plan --device h100-80gb --price 2.50    a GPU by its data sheet, at 2.50 an hour
  vattctl plan --device rtx4090 --gpus 4 --size base --batch 2048
  vattctl plan --json""",
)
@click.option(
    "--device", help="A GPU type, e.g. h100-80gb, a100-40gb, rtx4090; default: this machine."
)
@click.option(
    "--gpus", type=click.IntRange(min=1), help="Number of GPUs; default: machine.processes."
)
@click.option("--price", type=click.FloatRange(min=0), help="Price of one device for an hour.")
@click.option("--size", type=click.Choice(SIZES), help="As in `vattctl pretrain`.")
@click.option("--batch", type=click.IntRange(min=1), help="Clips in the global batch.")
@set_option("Forecast with another setting; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def plan_command(
    context: click.Context,
    device: str | None,
    gpus: int | None,
    price: float | None,
    size: str | None,
    batch: int | None,
    settings: Settings,
    as_json: bool,
) -> None:
    """Forecast memory, time, energy and cost of the pre-training in params.yaml.

    Only a short trial is run. With --device there is no trial: everything is computed from counted
    operations and the data sheet of the GPU. Exit code 2 if the settings do not fit.
    """
    enter_project(context)
    changes = dict(settings)
    if batch is not None:
        changes["pretrain", "batch_size"] = batch
    if gpus is not None:
        changes["machine", "processes"] = gpus
    if size is not None:
        changes |= size_settings(size, edit({}).params.model.backbone)
    found = make_plan(edit(changes).params, device)
    if as_json:
        click.echo(json.dumps(_plain(found, price), indent=2))
    else:
        _print(found, price)
    if not found["as_set"].fits:
        context.exit(SettingsError.exit_code)


def make_plan(params: "Params", device: str | None) -> dict[str, Any]:
    """Forecasts: as set, with the largest micro-batch, and in the cheapest way."""
    from vatt.plan import forecast as plans
    from vatt.plan.forecast import GpuSpeed, TrialSpeed
    from vatt.plan.memory import count

    place = plans.named_place(device) if device else plans.this_place(params)
    counts = count(params.model)
    loader = None
    if device is None:
        from vatt.plan.trial import run_loader

        trial = _trial(params, again=True)
        if (params.paths.shards / "index.jsonl").exists():
            loader = run_loader(params)
        speed: Speed = TrialSpeed(trial, params.pretrain, loader, _network(params, place))
    else:
        assert place.device is not None
        speed = GpuSpeed(place.device, params.model, params.pretrain, counts)
    setting = plans.as_set(params, place, counts)
    return {
        "params": params,
        "place": place,
        "loader": loader,
        "measured": device is None,
        "as_set": plans.forecast(params, setting, place, speed, counts),
        "largest": plans.largest_micro_batch(params, setting, place, counts),
        "cheapest": plans.cheapest(params, setting.processes, place, speed, counts),
    }


def _network(params: "Params", place: "Place") -> "Callable[[BatchSettings], float]":
    """Seconds between GPUs by their data sheet; between a CPU's processes there are none."""
    from vatt.plan.forecast import network_seconds
    from vatt.plan.memory import count

    if place.device is None:
        return lambda _: 0.0
    return partial(
        network_seconds, place.device, params.model, params.pretrain, count(params.model)
    )


def check_processes(params: "Params", plans: Sequence[StagePlan]) -> None:
    """Refuse a batch that machine.processes cannot divide, before what comes first has run."""
    from vatt.config import check_share

    machine = params.machine
    if machine.launcher_counts:
        return
    for kind, _, variant in (one.stage.partition("@") for one in plans if one.why):
        if kind == "pretrain":
            size = params.pretrain.batch_size
            check_share(size, machine.processes, setting="pretrain.batch_size")
        elif kind == "finetune":
            name = variant.rpartition("-")[0]  # before the start: pretrained or scratch
            setting, task = f"finetune.tasks.{name}.batch_size", params.finetune.tasks[name]
            size, paired = task.batch_size, task.mixup > 0
            check_share(size, machine.processes, setting=setting, paired=paired)


def check_memory(params: "Params", *, force: bool) -> None:
    """Print what `pretrain` will take; refuse what cannot fit, unless it is forced."""
    from vatt.plan import forecast as plans
    from vatt.plan.memory import count

    place = plans.this_place(params)
    counts = count(params.model)
    setting = plans.as_set(params, place, counts)
    memory = plans.forecast_memory(params, setting, place, counts)
    parts = ", ".join(
        f"{words} {_bytes(getattr(memory, name))}"
        for name, words in PARTS.items()
        if getattr(memory, name) > 0.02 * memory.total
    )
    click.echo(
        f"forecast: {_bytes(memory.total)} for each process ({parts}); {place.name} has "
        f"{_bytes(place.memory)}; `vattctl plan` forecasts time and cost",
        err=True,
    )
    if memory.total <= place.memory or force:
        return
    largest = plans.largest_micro_batch(params, setting, place, counts)
    remedy = (
        f"--set machine.micro_batch_size={largest}"
        if largest is not None
        else "a smaller --size, or machine.activation_checkpointing=true"
    )
    raise SettingsError(
        f"{_bytes(memory.total)} are needed, {place.name} has {_bytes(place.memory)}",
        hint=f"try {remedy}; `vattctl plan` finds what fits; --force starts it anyway",
    )


def _plain(found: dict[str, Any], price: float | None) -> dict[str, Any]:
    place: Place = found["place"]
    cheapest = found["cheapest"]
    return {
        "version": JSON_VERSION,
        "device": place.name,
        "memory_bytes": place.memory,
        "source": "trial" if found["measured"] else "formula",
        "loader_samples_per_second": found["loader"],
        "largest_micro_batch": found["largest"],
        "as_set": _facts(found["as_set"], price),
        "cheapest": _facts(cheapest, price) if cheapest else None,
    }


def _facts(one: "Forecast", price: float | None) -> dict[str, Any]:
    return {
        "setting": asdict(one.setting),
        "fits": one.fits,
        "memory_bytes": {**asdict(one.memory), "total": one.memory.total},
        "step_seconds": {**asdict(one.seconds), "total": one.seconds.total},
        "bound_by": one.seconds.bound,
        "samples_per_second": one.samples_per_second,
        "days": one.days,
        "device_hours": one.device_hours,
        "kwh": one.kwh,
        "cost": None if price is None else price * one.device_hours,
    }


def _print(found: dict[str, Any], price: float | None) -> None:
    from rich.table import Table

    params, place = found["params"], found["place"]
    way = (
        "from a short trial here"
        if found["measured"]
        else "by formula, from counted operations and bytes"
    )
    print_rich(
        f"{params.pretrain.steps:,} steps of {params.pretrain.batch_size:,} clips on "
        f"{found['as_set'].setting.processes} x {place.name} "
        f"({_bytes(place.memory)} each); time {way}"
    )
    chosen = found["cheapest"]
    table = Table(box=None, pad_edge=False)
    for column in ("", "as set", "cheapest that fits"):
        table.add_column(column, justify="right" if column else "left")
    rows = _rows(found["as_set"], price)
    others = _rows(chosen, price) if chosen else {}
    for name, value in rows.items():
        table.add_row(name, value, others.get(name, "-"))
    print_rich(table)
    largest = found["largest"]
    print_rich(
        "not even one clip fits at a time"
        if largest is None
        else f"largest micro-batch that fits as set: {largest}"
    )
    if chosen is None:
        print_rich("no setting fits: choose a smaller --size or a larger --device")
    elif chosen.setting != found["as_set"].setting:
        print_rich(f"to use it: vattctl pretrain {_options(chosen)}")


def _rows(one: "Forecast", price: float | None) -> dict[str, str]:
    setting, seconds = one.setting, one.seconds
    rows = {
        "micro-batch": _micro_batch(setting, one.batch_size),
        "ZeRO stage": str(setting.zero_stage),
        "offload": setting.offload,
        "activation checkpointing": "yes" if setting.activation_checkpointing else "no",
    }
    for name, words in PARTS.items():
        value = getattr(one.memory, name)
        rows[f"memory: {words}"] = _bytes(value) if value else "0 at the peak"
    rows["memory at the peak"] = _bytes(one.memory.total) + ("" if one.fits else " - too much")
    for name in ("compute", "loss", "update", "network", "loader"):
        value = getattr(seconds, name)
        rows[f"step: {name}"] = _time(value) if value else "-"
    rows["a step"] = f"{_time(seconds.total)}, bound by {seconds.bound}"
    rate = one.samples_per_second
    rows["samples a second"] = f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"
    rows["all steps"] = duration(one.days * 86400) if one.days < 1 else f"{one.days:,.2f} days"
    rows["device-hours"] = f"{one.device_hours:,.1f}"
    rows["energy"] = f"{one.kwh:,.1f} kWh"
    if price is not None:
        rows["cost"] = f"{price * one.device_hours:,.2f}"
    return rows


def _micro_batch(setting: "BatchSettings", batch_size: int) -> str:
    """Clips at once, and how many micro-batches keep their activations."""
    if not setting.is_cached(batch_size):
        return f"{setting.rows(batch_size)} (all)"
    number = len(setting.micro_batches(batch_size))
    return f"{setting.micro_batch_size}; {setting.kept_micro_batches} of {number} kept"


def _options(one: "Forecast") -> str:
    setting = one.setting
    values = {
        "processes": setting.processes,
        "micro_batch_size": setting.micro_batch_size or "null",
        "zero_stage": setting.zero_stage,
        "offload": setting.offload,
        "activation_checkpointing": str(setting.activation_checkpointing).lower(),
    }
    return " ".join(f"--set machine.{name}={value}" for name, value in values.items())


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.2f} ms"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
