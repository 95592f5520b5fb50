"""The commands that run stages: options -> settings in params.yaml -> DVC."""

import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vatt.errors import DataError, SettingsError
from vatt.files import inside
from vatt.process import RUN_NAME_VARIABLE, check_hostfile, join_step
from vattctl.dvc import STAGES, run_dvc, stages_here
from vattctl.experiments import Experiment, run_experiment, write_experiment
from vattctl.params import (
    SIZES,
    CheckpointFolder,
    Edit,
    Settings,
    dry_run_option,
    edit,
    enter_project,
    json_option,
    preset_text,
    print_json,
    print_rich,
    set_option,
    shortened,
    size_settings,
    use_preset,
    yaml_plain,
)
from vattctl.planning import (
    ask_before_hours,
    check_memory,
    check_processes,
    plan_experiment,
    plan_facts,
    plan_run,
    plan_table,
    show_plan,
)
from vattctl.runs import complete_stages, read_results, results_table

if TYPE_CHECKING:
    from vatt.config import Params, PathsParams
    from vattctl.sets import SetPlan

FOLDER = click.Path(path_type=Path, resolve_path=True)
EXPERIMENTS = Path("experiments")
LAST_STAGE = "VATT_LAST_STAGE"  # `vatt.data.clips.samples` reads it
MEASURING = ("evaluate", "report")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options that every command which runs a stage has."""

    settings: Settings
    force: bool = False
    dry_run: bool = False
    yes: bool = False
    as_json: bool = False


def stage_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add these options; the command gets them as `options`."""

    @wraps(command)
    def with_options(*given: Any, **values: Any) -> Any:
        own = {one.name: values.pop(one.name) for one in fields(RunOptions)}
        return command(*given, options=RunOptions(**own), **values)

    result: Callable[..., Any] = with_options
    for option in (
        json_option,
        click.option("-y", "--yes", is_flag=True, help="Do not ask before hours of training."),
        dry_run_option("Print what would change, run, take and cost; do nothing."),
        click.option("-f", "--force", is_flag=True, help="Run even when nothing has changed."),
        set_option("Change a setting in params.yaml first; may be repeated."),
    ):
        result = option(result)
    return result


def name_run(context: click.Context, parameter: click.Parameter, name: str | None) -> None:
    """Give the stages the name of their pipeline in MLflow."""
    if name is not None:
        set_for_stages(context, RUN_NAME_VARIABLE, name)


def set_for_stages(context: click.Context, variable: str, value: str) -> None:
    """Set an environment variable until this command ends: the stages that it starts read it."""
    before = {variable: os.environ[variable]} if variable in os.environ else {}
    os.environ[variable] = value

    def restore() -> None:
        os.environ.pop(variable, None)
        os.environ.update(before)

    context.find_root().call_on_close(restore)


name_option = click.option(
    "--name",
    expose_value=False,
    callback=name_run,
    help="Name of the pipeline's run in MLflow; default: the folder and a hash of the settings.",
)


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
    context: click.Context, targets: tuple[str, ...], changed: Edit, options: RunOptions
) -> None:
    """Change params.yaml, then let DVC run the targets with what they depend on."""
    from vatt.data.clips.files import ContentHashes
    from vatt.data.sources.choice import mark_of_lists

    quiet, params, force = context.obj["quiet"], changed.params, options.force
    hashes = ContentHashes.beside(params.paths.media, writes=not options.dry_run)
    mark = mark_of_lists(params.data, hashes)
    if mark is not None or params.data.source == "demo":  # DVC sees no list, only its name
        changed.set(("data", "location_hash"), mark)
    plans = plan_run(changed, targets, force=force) if options.dry_run or trains(targets) else []
    check_processes(params, plans)
    if options.dry_run:
        show_plan(changed, plans, as_json=options.as_json)
        return
    changed.refuse_if_busy()
    if trains(targets):
        check_hostfile(params.machine.launcher_arguments)
        ask_before_hours(plans, yes=options.yes)
    for line in changed.write():
        click.echo(f"params.yaml: {shortened(line)}", err=True)
    if targets:
        set_for_stages(context, LAST_STAGE, last_stage(targets))
    if force and targets:  # the targets alone, after what they need has been brought up to date
        before = stage_before(targets[0], has_tasks=bool(params.finetune.run))
        if before is not None:
            run_dvc(["repro", before], quiet=quiet)
        run_dvc(["repro", "--force", "--single-item", *targets], quiet=quiet)
    else:
        run_dvc(["repro", *(["--force"] if force else []), *targets], quiet=quiet)
    show_outcome(targets, params.paths, as_json=options.as_json, then=_search(targets, params))


def _search(targets: tuple[str, ...], params: "Params") -> str | None:
    """After all stages on a folder of one's own with words: the search; else what NEXT names."""
    place, words = params.data.location, params.paths.pretrained / "vocabulary.txt"
    is_own = params.data.source == "folder" and place is not None and place.is_dir()
    if targets or not is_own or not words.is_file():
        return None
    return f'vattctl search "WORDS" --in {shlex.quote(str(place))}'


def trains(targets: tuple[str, ...]) -> bool:
    """Whether a pre-training may be among what runs."""
    last = STAGES.index(last_stage(targets)) if targets else len(STAGES)
    return "pretrain" in stages_here() and last >= STAGES.index("pretrain")


def last_stage(targets: tuple[str, ...]) -> str:
    """The last stage that the targets want."""
    return max((target.partition("@")[0] for target in targets), key=STAGES.index)


def stage_before(target: str, *, has_tasks: bool) -> str | None:
    """The stage before a target; fine-tuning is left out where there are no tasks."""
    stages = [name for name in stages_here() if has_tasks or name != "finetune"]
    place = stages.index(target.partition("@")[0])
    return stages[place - 1] if place else None


NEXT = {
    "download": "vattctl preprocess",
    "preprocess": "vattctl pretrain",
    "pretrain": "vattctl finetune",
    "finetune": "vattctl evaluate",
    "evaluate": "vattctl report",
    "report": "vattctl ui",
}


def show_outcome(
    targets: tuple[str, ...],
    paths: "PathsParams",
    *,
    as_json: bool,
    folder: Path = Path(),
    then: str | None = None,
) -> None:
    """Print the results, where they lie, the MLflow runs and the next command.

    `folder` is that of the experiment, whose `paths` count from there.
    """
    from vatt.tracking.records import Record

    last = (targets[-1] if targets else "report").partition("@")[0]
    paths = paths.below(folder)
    places = {
        "download": paths.manifest,
        "preprocess": paths.shards,
        "pretrain": paths.pretrained,
        "finetune": paths.finetuned,
        "evaluate": paths.metrics / "evaluate.json",
        "report": paths.report / "report.html",
    }
    runs = {
        path.stem: Record.read(path).facts.get("run_id")
        for path in sorted(paths.runs.glob(f"{last}*.json"))
    }
    then = then or NEXT[last]
    if as_json:
        results = read_results(last, paths)
        print_json(stage=last, place=str(places[last]), results=results, runs=runs, next=then)
        return
    if (table := results_table(last, paths)) is not None:
        print_rich(table)
    click.echo(f"{last}: done, see {places[last]}")
    for name, run_id in runs.items():
        click.echo(f"MLflow run of {name}: {run_id}")
    click.echo(f"next: {then}")


@click.command()
@click.option(
    "--size", type=click.Choice(SIZES), help="Size of the video tower; the others follow."
)
@click.option(
    "--backbone", type=click.Choice(["specific", "agnostic"]), help="Three towers or one."
)
@name_option
@stage_options
@click.argument("launcher_arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def pretrain(
    context: click.Context,
    size: str | None,
    backbone: str | None,
    options: RunOptions,
    launcher_arguments: tuple[str, ...],
) -> None:
    """Pre-train VATT with DeepSpeed on the preprocessed clips.

    Says first how much memory and time it will take. On a terminal it asks before more than an
    hour of training.

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
    wanted = {**more, **options.settings}
    if pretrain_as_rank(wanted, quiet=context.obj["quiet"]):
        return
    changed = edit(wanted)
    check_memory(changed.params, force=options.force)
    run(context, ("pretrain",), changed, options)


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
    os.environ[LAST_STAGE] = "pretrain"
    if os.environ["RANK"] != "0":
        os.execv(sys.executable, [sys.executable, "-m", "stages.pretrain"])
    # Even if DVC finds it up to date, the stage must run: the other processes wait in it.
    run_dvc(["repro", "--force", "--single-item", "pretrain"], quiet=quiet)
    return True


def complete_sets(context: click.Context, parameter: click.Parameter, typed: str) -> list[str]:
    """Names of data sets."""
    from vattctl.sets import names

    return [name for name in names() if name.startswith(typed)]


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
@click.argument("name", metavar="[SET]", required=False, shell_complete=complete_sets)
@click.option("--data", "location", type=FOLDER, help="Folder of your files; for csv, the list.")
@click.option("--annotations", type=FOLDER, help="Folder that holds SET/ with the official lists.")
@click.option(
    "--from",
    "start",
    type=CheckpointFolder(path_type=Path, resolve_path=True),
    help="Checkpoint to start from: its folder, or its address in MLflow.",
)
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
@click.option("--name", "experiment", help="Name of the experiment (default: SET) or the run.")
@stage_options
@click.pass_context
def finetune(context: click.Context, /, name: str | None, options: RunOptions, **own: Any) -> None:
    """Fine-tune, from pre-trained weights or from scratch.

    With a SET: list and preprocess it in sets/SET, then fine-tune, evaluate and report in
    experiments/SET. SET is a published data set (kinetics400, kinetics600, kinetics700, moments,
    ucf101, hmdb51, esc50, audioset, vggsound, imagenet, youcook2, msrvtt), or your own: folder (a
    folder for each class), csv. The recipe is the paper's; --set changes it.
    """
    if name is None:
        name_run(context, context.command.params[0], own.pop("experiment"))
        words = {"location": "data", "start": "from"}
        given = [words.get(key, key) for key, value in own.items() if value not in (None, ())]
        if given:
            raise SettingsError(
                f"--{given[0].replace('_', '-')} needs a SET",
                hint="e.g. vattctl finetune folder --data DIR; vattctl finetune --help lists them",
            )
        enter_project(context)
        run(context, ("finetune",), edit(options.settings), options)
        return
    enter_project(context)
    made = _set_plan(name, options.settings, {**own, "dry_run": options.dry_run})
    for note in made.notes:
        click.echo(f"note: {note}", err=True)
    if options.dry_run:
        show_set_plan(made, options)
    else:
        _run_set(made, options, quiet=context.obj["quiet"])


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


def show_set_plan(made: "SetPlan", options: RunOptions) -> None:
    """What would run where, and once every setting that differs from the project's."""
    project = edit({}).document
    differing = {
        keys: value
        for keys, value in {**made.clips.settings, **made.work.settings}.items()
        if yaml_plain(project.get(keys[0], {}).get(keys[1]) if len(keys) > 1 else project[keys[0]])
        != value
    }
    lines = [line for keys, value in differing.items() for line in _shown(".".join(keys), value)]
    plans = [plan_experiment(one, force=options.force) for one in (made.clips, made.work)]
    if options.as_json:
        print_json(
            dry_run=True,
            about=made.about,
            start=str(made.work.start),
            changes=[line.strip() for line in lines],
            experiments=[
                {"folder": str(one.folder), **plan_facts(stages, None)}
                for one, stages in zip((made.clips, made.work), plans, strict=True)
            ],
        )
        return
    click.echo(made.about or made.work.folder.name)
    for one, stages in zip((made.clips, made.work), plans, strict=True):
        origin = f", from {one.start}" if one.start is not None else ""
        print_rich(f"\n{one.folder}{origin}", plan_table(stages))
    click.echo("\nsettings that differ from params.yaml:")
    click.echo("\n".join(lines))
    click.echo("nothing was changed or run (--dry-run)")


def _shown(key: str, value: Any) -> list[str]:
    """A line for each innermost setting."""
    if isinstance(value, dict) and value:
        return [line for name, inner in value.items() for line in _shown(f"{key}.{name}", inner)]
    return [f"  {key}: {json.dumps(value)}"]


def _run_set(made: "SetPlan", options: RunOptions, *, quiet: bool) -> None:
    from vatt.config import load_params

    run_experiment(made.clips, quiet=quiet)
    run_experiment(made.work, upstream=False, quiet=quiet)
    if options.force:
        with inside(made.work.folder):
            run_dvc(["repro", "--force", "--single-item", *made.work.stages], quiet=quiet)
    place = made.work.folder
    show_outcome(
        made.work.stages,
        load_params(place / "params.yaml").paths,
        as_json=options.as_json,
        folder=place,
        then=f"vattctl --project {place} status",
    )


@click.command()
@click.option(
    "--from",
    "given",
    metavar="FOLDER",
    type=CheckpointFolder(exists=True, file_okay=False, path_type=Path),
    help="Encoder or classifier: a folder, as `vattctl import --out` writes it, or its address in "
    "MLflow.",
)
@name_option
@stage_options
@click.pass_context
def evaluate(
    context: click.Context,
    given: Path | None,
    options: RunOptions,
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
        run(context, ("evaluate",), edit(options.settings), options)
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
    experiment = Experiment(
        EXPERIMENTS / f"evaluate-{name}", MEASURING, options.settings, start=given
    )
    if options.dry_run:
        clips = edit({})
        own = plan_experiment(experiment, force=options.force)
        planned = (
            [*plan_run(clips, ("preprocess",)), *own] if "preprocess" in stages_here() else own
        )
        show_plan(clips, planned, as_json=options.as_json)
        return
    _evaluate_checkpoint(experiment, options, quiet=context.obj["quiet"])


def _evaluate_checkpoint(experiment: Experiment, options: RunOptions, *, quiet: bool) -> None:
    from vatt.config import load_params

    if "preprocess" in stages_here():
        run_dvc(["repro", "preprocess"], quiet=quiet)
    if options.force:
        write_experiment(experiment)
        with inside(experiment.folder):
            run_dvc(["repro", "--force", "--single-item", *MEASURING], quiet=quiet)
    else:
        run_experiment(experiment, MEASURING, upstream=False, quiet=quiet)
    paths = load_params(experiment.folder / "params.yaml").paths
    show_outcome(MEASURING, paths, as_json=options.as_json, folder=experiment.folder)


@click.command()
@name_option
@stage_options
@click.pass_context
def report(context: click.Context, options: RunOptions) -> None:
    """Write the report: HTML and Markdown.

    \b
    Example:
      vattctl report
    """
    enter_project(context)
    run(context, ("report",), edit(options.settings), options)


@click.command()
@click.argument("targets", nargs=-1, shell_complete=complete_stages)
@name_option
@stage_options
@click.pass_context
def repro(context: click.Context, targets: tuple[str, ...], options: RunOptions) -> None:
    """Run every stage (or TARGETS) whose settings, code or data have changed.

    \b
    Examples:
      vattctl repro
      vattctl repro --dry-run
      vattctl repro --name half-the-steps --set pretrain.steps=200
      vattctl repro finetune@audio-scratch
    """
    for target in targets:
        if target.partition("@")[0] not in STAGES:
            raise SettingsError(f"no stage '{target}'", hint=f"stages: {', '.join(STAGES)}")
    enter_project(context)
    run(context, targets, edit(options.settings), options)


@click.command()
@name_option
@stage_options
@click.pass_context
def demo(context: click.Context, options: RunOptions) -> None:
    """Run the whole pipeline on a small generated corpus: minutes on two CPU cores.

    The same as `vattctl config use demo` and `vattctl repro`.

    \b
    Examples:
      vattctl demo --dry-run
      vattctl demo
    """
    enter_project(context)
    if options.dry_run:
        run(context, (), edit(options.settings, document=preset_text("demo")), options)
        return
    for line in use_preset("demo"):
        click.echo(line, err=True)
    run(context, (), edit(options.settings), options)
