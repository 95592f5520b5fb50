"""Before a pre-training starts: what it takes, whether it fits, what later stages will lack."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from vatt.errors import DataError, SettingsError
from vattctl.params import (
    JSON_VERSION,
    SIZES,
    Settings,
    edit,
    enter_project,
    print_rich,
    set_option,
    size_settings,
)

if TYPE_CHECKING:
    from vatt.config import FinetuneTaskParams, Params
    from vatt.data.clips.samples import IndexRow
    from vatt.plan.forecast import Forecast, Place
    from vatt.plan.memory import BatchSettings

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
    from vatt.plan.forecast import GpuSpeed, Speed, TrialSpeed
    from vatt.plan.memory import count

    place = plans.named_place(device) if device else plans.this_place(params)
    counts = count(params.model)
    loader = None
    if device is None:
        from vatt.plan.trial import run_loader, run_trial

        click.echo("trying the model on this machine...", err=True)
        if (params.paths.shards / "index.jsonl").exists():
            loader = run_loader(params)
        speed: Speed = TrialSpeed(
            run_trial(params), params.pretrain, loader, _network(params, place)
        )
    else:
        assert place.device is not None
        speed = GpuSpeed(place.device, params.model, params.pretrain, counts)
    setting = plans.as_set(params, place)
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


def check_memory(params: "Params", *, force: bool) -> None:
    """Print what `pretrain` will take; refuse what cannot fit, unless it is forced."""
    from vatt.plan import forecast as plans
    from vatt.plan.memory import count

    place = plans.this_place(params)
    setting, counts = plans.as_set(params, place), count(params.model)
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


MOST_SHOWN = 3  # lacking things in one message


def check_clips(params: "Params") -> None:
    """Refuse shards on which a later stage must fail: better now than after the pre-training."""
    from vatt.data.clips.samples import INDEX, read_index

    rows = read_index(params.paths.shards / INDEX)[1]
    counts = Counter(row.split for row in rows)
    lacks = [
        f"{counts[split]} clips of the {split} split, {needed} or more are needed"
        for split, needed in (("train", 2), ("test", 2))
        if counts[split] < needed
    ]
    tasks = {name: _lacks(name, params.finetune.tasks[name], rows) for name in params.finetune.run}
    lacks += [lack for found in tasks.values() for lack in found]
    unfit = [name for name, found in tasks.items() if found]
    without = f", take {', '.join(unfit)} out of finetune.run" if unfit else ""
    if lacks:
        more = f"; and {len(lacks) - MOST_SHOWN} more" if len(lacks) > MOST_SHOWN else ""
        raise DataError(
            f"too little for the stages after pretrain: {'; '.join(lacks[:MOST_SHOWN])}{more}",
            hint=f"add clips, raise data.test_share{without}, or run `vattctl pretrain` alone",
        )


def _lacks(name: str, task: "FinetuneTaskParams", rows: "Sequence[IndexRow]") -> list[str]:
    """What a fine-tuning task needs and the shards do not hold."""
    sound = task.modality == "audio"
    usable = [
        row for row in rows if row.labels.get(task.label) and (row.audio if sound else row.video)
    ]
    values = {row.labels[task.label] for row in usable if row.split == "train"}
    found = []
    if len(values) < 2:
        found.append(
            f"task {name}: {len(values)} values of label '{task.label}' in the train split"
        )
    if not any(row.split == "test" for row in usable):
        found.append(f"task {name}: no test clip with label '{task.label}'")
    return found


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
        "micro-batch": str(setting.micro_batch_size or f"{setting.rows(one.batch_size)} (all)"),
        "ZeRO stage": str(setting.zero_stage),
        "offload": setting.offload,
        "activation checkpointing": "yes" if setting.activation_checkpointing else "no",
    }
    for name, words in PARTS.items():
        rows[f"memory: {words}"] = _bytes(getattr(one.memory, name))
    rows["memory at the peak"] = _bytes(one.memory.total) + ("" if one.fits else " - too much")
    for name in ("compute", "loss", "update", "network", "loader"):
        value = getattr(seconds, name)
        rows[f"step: {name}"] = _time(value) if value else "-"
    rows["a step"] = f"{_time(seconds.total)}, bound by {seconds.bound}"
    rows["samples a second"] = f"{one.samples_per_second:,.0f}"
    rows["days"] = f"{one.days:,.2f}"
    rows["device-hours"] = f"{one.device_hours:,.1f}"
    rows["energy"] = f"{one.kwh:,.1f} kWh"
    if price is not None:
        rows["cost"] = f"{price * one.device_hours:,.2f}"
    return rows


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
