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
    Edit,
    Settings,
    edit,
    enter_project,
    set_option,
    size_settings,
    use_preset,
)
from vattctl.planning import check_clips, check_memory
from vattctl.runs import summary

if TYPE_CHECKING:
    from vatt.config import PathsParams
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
        set_option("Change a setting in params.yaml first; may be repeated."),
    ):
        command = option(command)
    return command


def machines_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a stage that can use several machines."""
    for option in (
        click.option(
            "--address",
            metavar="HOST:PORT",
            help="Address of a Ray cluster (machine.ray_address); default: start one here.",
        ),
        click.option(
            "--executor",
            type=click.Choice(["local", "ray"]),
            help="Worker processes here, or a Ray cluster (machine.executor).",
        ),
    ):
        command = option(command)
    return command


def machines_settings(executor: str | None, address: str | None) -> Settings:
    """The settings that these options stand for."""
    if address is not None and executor == "local":
        raise SettingsError("--address needs --executor ray", hint="leave out one of them")
    settings: Settings = {}
    if executor is not None or address is not None:
        settings["machine", "executor"] = executor or "ray"
        settings["machine", "ray_address"] = address
    return settings


def run(
    context: click.Context,
    targets: tuple[str, ...],
    changed: Edit,
    *,
    force: bool,
    dry_run: bool,
) -> None:
    """Change params.yaml, then let DVC run the targets with what they depend on."""
    from vatt.data.clips.files import ContentHashes
    from vatt.data.sources.choice import mark_of_lists

    quiet, params = context.obj["quiet"], changed.params
    hashes = ContentHashes.beside(params.paths.media, writes=not dry_run)
    mark = None if dry_run else mark_of_lists(params.data, hashes)
    if mark is not None:  # DVC sees the settings, not the lists that they name
        changed.set(("data", "location_hash"), mark)
    if not dry_run:
        changed.write()
    for line in changed.lines:
        click.echo(f"params.yaml: {line}", err=True)
    repro = ["repro", *(["--dry"] if dry_run else [])]
    if not dry_run and _needs_clips(targets, params.paths):
        run_dvc(["repro", "preprocess"], quiet=quiet)
        check_clips(params)
    if force and targets:  # the targets alone, after what they need has been brought up to date
        before = stage_before(targets[0], has_tasks=bool(params.finetune.run))
        if before is not None:
            run_dvc([*repro, before], quiet=quiet)
        run_dvc([*repro, "--force", "--single-item", *targets], quiet=quiet)
    else:
        run_dvc([*repro, *(["--force"] if force else []), *targets], quiet=quiet)
    if not dry_run:
        click.echo(closing_lines(targets, params.paths))


def _needs_clips(targets: tuple[str, ...], paths: "PathsParams") -> bool:
    """Whether a pre-training may run before a later stage whose clips are not checked yet."""
    here = stages_here()
    if not {"preprocess", "pretrain"} <= set(here):
        return False
    last = max((STAGES.index(target.partition("@")[0]) for target in targets), default=len(STAGES))
    if last <= STAGES.index("pretrain"):
        return False
    evaluated = paths.metrics / "evaluate.json"
    sources = (Path("params.yaml"), paths.manifest, paths.shards / "index.jsonl")
    if not evaluated.exists():
        return True
    checked = evaluated.stat().st_mtime
    return any(not file.exists() or file.stat().st_mtime > checked for file in sources)


def stage_before(target: str, *, has_tasks: bool) -> str | None:
    """The stage before a target; fine-tuning is left out where there are no tasks."""
    stages = [name for name in stages_here() if has_tasks or name != "finetune"]
    place = stages.index(target.partition("@")[0])
    return stages[place - 1] if place else None


def closing_lines(targets: tuple[str, ...], paths: "PathsParams") -> str:
    """What came out, where it lies, its MLflow run and the next command."""
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


@click.command()
@click.option(
    "--size", type=click.Choice(SIZES), help="Size of the video tower; the others follow."
)
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
    settings: Settings,
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
    enter_project(context)
    more: Settings = {}
    if backbone is not None:
        more[("model", "backbone")] = backbone
    now = edit({}).params.model if size or backbone else None
    if now and (size is not None or (backbone == "agnostic" and now.backbone != "agnostic")):
        chosen = size or now.video.size
        if not isinstance(chosen, str):
            raise SettingsError("model.video.size is not a named size", hint="add --size")
        more |= size_settings(chosen, backbone or now.backbone)
    if launcher_arguments:
        more[("machine", "launcher_arguments")] = list(launcher_arguments)
    wanted = {**more, **settings}
    if pretrain_as_rank(wanted, quiet=context.obj["quiet"]):
        return
    changed = edit(wanted)
    check_memory(changed.params, force=force)
    run(context, ("pretrain",), changed, force=force, dry_run=dry_run)


def pretrain_as_rank(settings: Settings, *, quiet: bool) -> bool:
    """Take part in the stage: rank 0 runs DVC, the others the stage. False for a single process."""
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
    # Even if DVC finds it up to date, the stage must run: the other processes wait in it.
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
@click.option("--data", "location", type=FOLDER, help="Folder of your files; for csv, the list.")
@click.option("--annotations", type=FOLDER, help="Folder that holds SET/ with the official lists.")
@click.option("--from", "start", type=FOLDER, help="Checkpoint to start from, trained or imported.")
@click.option(
    "--init",
    multiple=True,
    type=click.Choice(["pretrained", "scratch"]),
    help="Start from its weights (default), or from new ones; may be repeated.",
)
@click.option(
    "--modality",
    type=click.Choice(["video", "audio", "image"]),
    help="What a folder or csv holds; default: by file names.",
)
@click.option(
    "--drop-rate",
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of tokens that DropToken drops.",
)
@click.option("--name", "experiment", help="Name of the experiment; default: SET.")
@stage_options
@click.pass_context
def finetune(
    context: click.Context, /, name: str | None, settings: Settings, force: bool,
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
        enter_project(context)
        run(context, ("finetune",), edit(settings), force=force, dry_run=dry_run)
        return
    enter_project(context)
    made = _set_plan(name, settings, {**options, "dry_run": dry_run})
    for note in made.notes:
        click.echo(f"note: {note}", err=True)
    if dry_run:
        click.echo(describe_plan(made))
        return
    _run_set(made, force=force, quiet=context.obj["quiet"])


def _set_plan(name: str, settings: Settings, options: dict[str, Any]) -> "SetPlan":
    from vatt.config import load_params
    from vattctl.sets import SetRequest, plan

    params = load_params()
    known = params.data.annotations
    experiment = options["experiment"] or name
    if Path(experiment).name != experiment or experiment.startswith("."):
        raise SettingsError(
            f"--name {experiment} cannot be the name of a folder", hint="letters, digits, - and _"
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
    return plan(wanted, params, settings)


def describe_plan(made: "SetPlan") -> str:
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


def _run_set(made: "SetPlan", *, force: bool, quiet: bool) -> None:
    from vatt.config import load_params

    run_experiment(made.clips, quiet=quiet)
    run_experiment(made.work, upstream=False, quiet=quiet)
    if force:
        with inside(made.work.folder):
            run_dvc(["repro", "--force", "--single-item", *made.work.stages], quiet=quiet)
    with inside(made.work.folder):
        paths = load_params().paths
        lines = closing_lines(made.work.stages, paths).splitlines()
    place = made.work.folder
    click.echo("\n".join(line.replace("see ", f"see {place}/", 1) for line in lines[:-1]))
    click.echo(f"next: vattctl --project {place} status")


@click.command()
@click.option(
    "--from",
    "given",
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A checkpoint's folder, as `vattctl import --out` writes it: encoder or classifier.",
)
@stage_options
@click.pass_context
def evaluate(
    context: click.Context,
    given: Path | None,
    settings: Settings,
    force: bool,
    dry_run: bool,
) -> None:
    """Measure probes, fine-tuned accuracy and zero-shot retrieval.

    With --from, nothing is trained or replaced: metrics and report go to
    experiments/evaluate-NAME, a project of its own that uses the clips of this one.

    \b
    Examples:
      vattctl evaluate --set evaluate.bootstrap=2000
      vattctl import ckpt-500000 --out runs/mbs --vocab howto100m_en.txt
      vattctl evaluate --from runs/mbs
    """
    if given is None:
        enter_project(context)
        run(context, ("evaluate",), edit(settings), force=force, dry_run=dry_run)
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
    experiment = Experiment(EXPERIMENTS / f"evaluate-{name}", MEASURING, settings, start=given)
    quiet = context.obj["quiet"]
    if "preprocess" in stages_here():
        run_dvc(["repro", *(["--dry"] if dry_run else []), "preprocess"], quiet=quiet)
    if force and not dry_run:
        write_experiment(experiment)
        with inside(experiment.folder):
            run_dvc(["repro", "--force", "--single-item", *MEASURING], quiet=quiet)
    else:  # without metrics, as before a first run, DVC cannot plan the report
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
    def command(context: click.Context, settings: Settings, force: bool, dry_run: bool) -> None:
        enter_project(context)
        run(context, (name,), edit(settings), force=force, dry_run=dry_run)

    return command


@click.command()
@click.argument("targets", nargs=-1)
@stage_options
@click.pass_context
def repro(
    context: click.Context,
    targets: tuple[str, ...],
    settings: Settings,
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
    enter_project(context)
    run(context, targets, edit(settings), force=force, dry_run=dry_run)


@click.command()
@stage_options
@click.pass_context
def demo(context: click.Context, settings: Settings, force: bool, dry_run: bool) -> None:
    """Run the whole pipeline on a small generated corpus: minutes on two CPU cores.

    The same as `vattctl config use demo` and `vattctl repro`, with a summary at the end.
    """
    enter_project(context)
    for line in use_preset("demo") if not dry_run else []:
        click.echo(line, err=True)
    changed = edit(settings)
    run(context, (), changed, force=force, dry_run=dry_run)
    if not dry_run:
        click.echo(summary(changed.params.paths))


COMMANDS = (
    _stage_command("report", "Write the report: HTML and Markdown.", "vattctl report"),
    repro,
)
