"""The commands that run stages: options -> settings in params.yaml -> DVC."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vatt.errors import DataError, SettingsError
from vatt.process import join_step
from vattctl.dvc import STAGES, run_dvc, stages_here
from vattctl.experiments import Experiment, inside, run_experiment, write_experiment
from vattctl.params import (
    SIZES,
    change,
    enter_project,
    parse_setting,
    preview,
    size_settings,
    use_preset,
)
from vattctl.planning import check_memory
from vattctl.runs import summary

if TYPE_CHECKING:
    from vattctl.sets import SetPlan

FOLDER = click.Path(path_type=Path, resolve_path=True)
EXPERIMENTS = Path("experiments")
MEASURING = ("evaluate", "report")


def stage_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every command which runs a stage has."""
    for option in (
        click.option(
            "--dry-run", is_flag=True, help="Print what would change and run; do nothing."
        ),
        click.option("-f", "--force", is_flag=True, help="Run even when nothing has changed."),
        click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change a setting in params.yaml first; may be repeated.",
        ),
    ):
        command = option(command)
    return command


def machines_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a stage whose work spreads over machines."""
    for option in (
        click.option(
            "--address",
            metavar="HOST:PORT",
            help="Of the Ray cluster (machine.ray_address); without one, it is started here.",
        ),
        click.option(
            "--executor",
            type=click.Choice(["local", "ray"]),
            help="Worker processes here, or a Ray cluster (machine.executor).",
        ),
    ):
        command = option(command)
    return command


def machines_settings(executor: str | None, address: str | None) -> dict[tuple[str, ...], Any]:
    """The settings that these options stand for."""
    if address is not None and executor == "local":
        raise SettingsError("--address is for --executor ray", hint="leave one of them out")
    settings: dict[tuple[str, ...], Any] = {}
    if executor is not None or address is not None:
        settings["machine", "executor"] = executor or "ray"
        settings["machine", "ray_address"] = address
    return settings


def run_stages(
    targets: tuple[str, ...],
    settings: dict[tuple[str, ...], Any],
    *,
    force: bool,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Change params.yaml, then let DVC run the targets with what they depend on."""
    from vatt.config import load_params
    from vatt.data.clips.files import ContentHashes
    from vatt.data.sources.choice import mark_of_lists

    changes = change(settings, write=not dry_run)
    params = load_params()
    hashes = ContentHashes.beside(params.paths.media)
    mark = None if dry_run else mark_of_lists(params.data, hashes)
    if mark is not None:  # DVC sees the settings, not the lists that they name
        changes += change({("data", "location_hash"): mark})
    for line in changes:
        click.echo(f"params.yaml: {line}", err=True)
    has_tasks = bool(params.finetune.run)
    dry = ["--dry"] if dry_run else []
    if force and targets:  # the target itself, on top of what is up to date before it
        before = stage_before(targets[0], has_tasks=has_tasks)
        if before is not None:
            run_dvc(["repro", *dry, before], quiet=quiet)
        run_dvc(["repro", *dry, "--force", "--single-item", *targets], quiet=quiet)
    else:
        run_dvc(["repro", *dry, *(["--force"] if force else []), *targets], quiet=quiet)
    if not dry_run:
        click.echo(closing_lines(targets))


def stage_before(target: str, *, has_tasks: bool) -> str | None:
    """The stage that a target builds on; fine-tuning is passed over where there are no tasks."""
    stages = [name for name in stages_here() if has_tasks or name != "finetune"]
    place = stages.index(target.partition("@")[0])
    return stages[place - 1] if place else None


def closing_lines(targets: tuple[str, ...]) -> str:
    """What came out, where it lies, its MLflow run and the next command."""
    from vatt.config import load_params

    paths = load_params().paths
    last = targets[-1] if targets else "report"
    places = {
        "download": (paths.manifest, "vattctl preprocess"),
        "preprocess": (paths.shards, "vattctl pretrain"),
        "pretrain": (paths.pretrained, "vattctl finetune"),
        "finetune": (paths.finetuned, "vattctl evaluate"),
        "evaluate": (paths.metrics / "evaluate.json", "vattctl report"),
        "report": (paths.report / "report.html", "vattctl ui"),
    }
    place, following = places[last.partition("@")[0]]
    lines = [f"{last}: done, see {place}"]
    for path in sorted(paths.runs.glob(f"{last.partition('@')[0]}*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        lines.append(f"MLflow run of {path.stem}: {run.get('run_id', 'unknown')}")
    return "\n".join([*lines, f"next: {following}"])


def run(
    context: click.Context,
    targets: tuple[str, ...],
    assignments: tuple[str, ...],
    *,
    force: bool,
    dry_run: bool,
    more: dict[tuple[str, ...], Any] | None = None,
) -> None:
    """Change settings, then run the targets with what they depend on."""
    enter_project(context)
    settings = {**(more or {}), **dict(parse_setting(text) for text in assignments)}
    run_stages(targets, settings, force=force, dry_run=dry_run, quiet=context.obj["quiet"])


@click.command()
@click.option("--size", type=click.Choice(SIZES), help="Video tower's size; the others follow it.")
@click.option(
    "--backbone", type=click.Choice(["specific", "agnostic"]), help="Three towers or one."
)
@stage_options
@click.argument("launcher_arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def pretrain(
    context: click.Context,
    size: str | None,
    backbone: str | None,
    assignments: tuple[str, ...],
    force: bool,
    dry_run: bool,
    launcher_arguments: tuple[str, ...],
) -> None:
    """Pre-train VATT with DeepSpeed on the preprocessed clips.

    LAUNCHER_ARGUMENTS after `--` go to the DeepSpeed launcher.

    \b
    Examples:
      vattctl pretrain --size large
      vattctl pretrain --set pretrain.steps=2000 --set machine.processes=2
      vattctl pretrain --size base -- --hostfile hosts.txt
    """
    from vatt.config import load_params

    enter_project(context)
    now = load_params().model
    more: dict[tuple[str, ...], Any] = {}
    if backbone is not None:
        more[("model", "backbone")] = backbone
    if size is not None or (backbone == "agnostic" and now.backbone != "agnostic"):
        chosen = size or now.video.size
        if not isinstance(chosen, str):
            raise SettingsError("model.video.size is not a named size", hint="add --size")
        more |= size_settings(chosen, backbone or now.backbone)
    if launcher_arguments:
        more[("machine", "launcher_arguments")] = list(launcher_arguments)
    wanted = {**more, **dict(parse_setting(text) for text in assignments)}
    if pretrain_as_rank(wanted, quiet=context.obj["quiet"]):
        return
    check_memory(preview(wanted), force=force)
    run(context, ("pretrain",), assignments, force=force, dry_run=dry_run, more=more)


def pretrain_as_rank(settings: dict[tuple[str, ...], Any], *, quiet: bool) -> bool:
    """Take part in the stage: rank 0 by driving DVC, the others at once. False when alone."""

    join_step()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    if settings:
        raise SettingsError(
            "several processes cannot change params.yaml at once",
            hint="change it first, then start them without options",
        )
    if os.environ["RANK"] != "0":
        os.execv(sys.executable, [sys.executable, "-m", "stages.pretrain"])
    # Whatever DVC thinks of it, the stage must run: the others wait in it.
    run_dvc(["repro", "--force", "--single-item", "pretrain"], quiet=quiet)
    return True


@click.command(
    epilog="""\b
Examples:
  vattctl finetune                                     the project's own tasks (finetune.run)
  vattctl finetune kinetics400 --data ~/kinetics       from the project's pre-training
  vattctl finetune ucf101 --data ~/UCF-101 --from imported/mbs
  vattctl finetune audioset --data ~/audioset --drop-rate 0.5 --name audioset-half
  vattctl finetune kinetics400 --data ~/kinetics --init scratch --name kinetics400-scratch
  vattctl finetune folder --data ~/my-classes --dry-run
  vattctl finetune csv --data list.csv --init pretrained --init scratch
  vattctl finetune msrvtt --data ~/msrvtt              retrieval: measured, nothing is trained"""
)
@click.argument("name", metavar="[SET]", required=False)
@click.option("--data", "location", type=FOLDER, help="The files you have; csv: the list.")
@click.option("--annotations", type=FOLDER, help="Folder with SET/ and the official lists in it.")
@click.option("--from", "start", type=FOLDER, help="A checkpoint: a run's, or an imported one.")
@click.option(
    "--init",
    multiple=True,
    type=click.Choice(["pretrained", "scratch"]),
    help="Its weights (default), or its shape alone; may be repeated.",
)
@click.option("--modality", type=click.Choice(["video", "audio", "image"]), help="folder, csv.")
@click.option("--drop-rate", type=click.FloatRange(0, 1, max_open=True), help="DropToken's.")
@click.option("--name", "experiment", help="Of the experiment; default: the set's.")
@stage_options
@click.pass_context
def finetune(
    context: click.Context, /, name: str | None, assignments: tuple[str, ...], force: bool,
    dry_run: bool, **options: Any,
) -> None:  # fmt: skip
    """Fine-tune, from pre-trained weights or from scratch.

    With a SET: list and preprocess it in sets/SET, then fine-tune, evaluate and report in
    experiments/SET. SET is a published data set (kinetics400, kinetics600, kinetics700, moments,
    ucf101, hmdb51, esc50, audioset, vggsound, imagenet, youcook2, msrvtt), or your own: folder (a
    folder for each class), csv. The recipe is the paper's; --set changes it.
    """
    if name is None:
        given = [f"--{key}" for key, value in options.items() if value not in (None, ())]
        if given:
            raise SettingsError(
                f"{given[0].replace('location', 'data').replace('start', 'from')} needs a SET",
                hint="e.g. vattctl finetune folder --data DIR; vattctl finetune --help lists them",
            )
        run(context, ("finetune",), assignments, force=force, dry_run=dry_run)
        return
    enter_project(context)
    made = _plan(name, assignments, {**options, "dry_run": dry_run})
    for note in made.notes:
        click.echo(f"note: {note}", err=True)
    if dry_run:
        click.echo(described(made))
        return
    _run(made, force=force, quiet=context.obj["quiet"])


def _plan(name: str, assignments: tuple[str, ...], options: dict[str, Any]) -> "SetPlan":
    from vatt.config import load_params
    from vattctl.sets import SetRequest, plan

    params = load_params()
    known = params.data.annotations
    experiment = options["experiment"] or name
    if Path(experiment).name != experiment or experiment.startswith("."):
        raise SettingsError(
            f"--name {experiment} is no name of a folder", hint="letters, digits, - and _"
        )
    wanted = SetRequest(
        name=name,
        start=(options["start"] or params.paths.pretrained).absolute(),
        location=options["location"],
        annotations=(options["annotations"] or known or Path("annotations")).absolute(),
        experiment=experiment,
        init=options["init"] or ("pretrained",),
        modality=options["modality"],
        drop_rate=options["drop_rate"],
        dry_run=options["dry_run"],
    )
    return plan(wanted, params, dict(parse_setting(text) for text in assignments))


def described(made: "SetPlan") -> str:
    """What would run where, and every setting that differs from the project's."""
    lines = [made.about] if made.about else []
    for experiment in (made.clips, made.work):
        lines += ["", f"{experiment.folder}: {', '.join(experiment.stages)}"]
        if experiment.start is not None:
            lines.append(f"  from {experiment.start}")
        for keys, value in experiment.settings.items():
            lines += _shown(".".join(keys), value)
    return "\n".join(lines).strip()


def _shown(key: str, value: Any) -> list[str]:
    """A line for each innermost setting."""
    if isinstance(value, dict) and value:
        return [line for name, inner in value.items() for line in _shown(f"{key}.{name}", inner)]
    return [f"  {key}: {json.dumps(value)}"]


def _run(made: "SetPlan", *, force: bool, quiet: bool) -> None:
    run_experiment(made.clips, quiet=quiet)
    run_experiment(made.work, upstream=False, quiet=quiet)
    if force:
        with inside(made.work.folder):
            run_dvc(["repro", "--force", "--single-item", *made.work.stages], quiet=quiet)
    with inside(made.work.folder):
        lines = closing_lines(made.work.stages).splitlines()
    place = made.work.folder
    click.echo("\n".join(line.replace("see ", f"see {place}/", 1) for line in lines[:-1]))
    click.echo(f"next: vattctl --project {place} status")


@click.command()
@click.option(
    "--from",
    "given",
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A checkpoint, encoder or classifier, as `vattctl import --out` writes one.",
)
@stage_options
@click.pass_context
def evaluate(
    context: click.Context,
    given: Path | None,
    assignments: tuple[str, ...],
    force: bool,
    dry_run: bool,
) -> None:
    """Measure probes, fine-tuned accuracy and zero-shot retrieval.

    With --from nothing is trained and nothing of the project is replaced: metrics and report lie
    in experiments/evaluate-NAME, a project of its own that uses this one's clips.

    \b
    Examples:
      vattctl evaluate --set evaluate.bootstrap=2000
      vattctl import ckpt-500000 --out runs/mbs --vocab howto100m_en.txt
      vattctl evaluate --from runs/mbs
    """
    if given is None:
        run(context, ("evaluate",), assignments, force=force, dry_run=dry_run)
        return
    given = given.resolve()
    for name in ("model.safetensors", "config.json"):
        if not (given / name).is_file():
            raise DataError(
                f"{given} has no {name}",
                hint="name the folder of one checkpoint: what `vattctl import --out` wrote",
            )
    enter_project(context)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", given.name).strip("-") or "checkpoint"
    settings = dict(parse_setting(text) for text in assignments)
    experiment = Experiment(EXPERIMENTS / f"evaluate-{name}", MEASURING, settings, start=given)
    quiet = context.obj["quiet"]
    if "preprocess" in stages_here():
        run_dvc(["repro", *(["--dry"] if dry_run else []), "preprocess"], quiet=quiet)
    if force and not dry_run:
        write_experiment(experiment)
        with inside(experiment.folder):
            run_dvc(["repro", "--force", "--single-item", *MEASURING], quiet=quiet)
    else:  # before a first run there are no metrics, and DVC sees no report in them
        targets = MEASURING[:1] if dry_run else MEASURING
        run_experiment(experiment, targets, upstream=False, dry_run=dry_run, quiet=quiet)
    if not dry_run:
        from vatt.config import load_params

        paths = load_params(experiment.folder / "params.yaml").paths
        click.echo(f"evaluate: done, see {experiment.folder / paths.metrics / 'evaluate.json'}")
        click.echo(f"report: done, see {experiment.folder / paths.report / 'report.html'}")
        click.echo("next: vattctl ui")


def _stage_command(name: str, summary: str, example: str) -> click.Command:
    @click.command(name, help=f"{summary}\n\n\b\nExample:\n  {example}")
    @stage_options
    @click.pass_context
    def command(
        context: click.Context, assignments: tuple[str, ...], force: bool, dry_run: bool
    ) -> None:
        run(context, (name,), assignments, force=force, dry_run=dry_run)

    return command


@click.command()
@click.argument("targets", nargs=-1)
@stage_options
@click.pass_context
def repro(
    context: click.Context,
    targets: tuple[str, ...],
    assignments: tuple[str, ...],
    force: bool,
    dry_run: bool,
) -> None:
    """Run every stage (or TARGETS) whose settings, code or data have changed.

    \b
    Example:
      vattctl repro
    """
    for target in targets:
        if target.partition("@")[0] not in STAGES:
            raise SettingsError(f"no stage '{target}'", hint=f"stages: {', '.join(STAGES)}")
    run(context, targets, assignments, force=force, dry_run=dry_run)


@click.command()
@stage_options
@click.pass_context
def demo(context: click.Context, assignments: tuple[str, ...], force: bool, dry_run: bool) -> None:
    """Run the whole pipeline on a small made corpus: minutes on two CPU cores.

    The same as `vattctl config use demo` and `vattctl repro`, with a summary at the end.
    """
    enter_project(context)
    for line in use_preset("demo") if not dry_run else []:
        click.echo(line, err=True)
    run(context, (), assignments, force=force, dry_run=dry_run)
    if not dry_run:
        click.echo(summary())


COMMANDS = (
    _stage_command("report", "Write the report: HTML and Markdown.", "vattctl report"),
    repro,
)
