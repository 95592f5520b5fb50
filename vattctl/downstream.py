"""`vattctl finetune` and `vattctl evaluate`: the project's own tasks, or any checkpoint."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vatt.errors import DataError, SettingsError
from vattctl.dvc import run, run_dvc, stage_options, stages_here
from vattctl.params import enter_project, parse_setting

if TYPE_CHECKING:
    from vattctl.sets import SetPlan

FOLDER = click.Path(path_type=Path, resolve_path=True)


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
    made = _plan(name, assignments, options)
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
    from vattctl.dvc import closing_lines, run_dvc
    from vattctl.experiments import inside, run_experiment

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


STAGES = ("evaluate", "report")
PLACE = Path("experiments")


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
    from vattctl.experiments import Experiment, inside, run_experiment, write_experiment

    name = re.sub(r"[^A-Za-z0-9_-]+", "-", given.name).strip("-") or "checkpoint"
    settings = dict(parse_setting(text) for text in assignments)
    experiment = Experiment(PLACE / f"evaluate-{name}", STAGES, settings, start=given)
    quiet = context.obj["quiet"]
    if "preprocess" in stages_here():
        run_dvc(["repro", *(["--dry"] if dry_run else []), "preprocess"], quiet=quiet)
    if force and not dry_run:
        write_experiment(experiment)
        with inside(experiment.folder):
            run_dvc(["repro", "--force", "--single-item", *STAGES], quiet=quiet)
    else:  # before a first run there are no metrics, and DVC sees no report in them
        targets = STAGES[:1] if dry_run else STAGES
        run_experiment(experiment, targets, upstream=False, dry_run=dry_run, quiet=quiet)
    if not dry_run:
        from vatt.config import load_params

        paths = load_params(experiment.folder / "params.yaml").paths
        click.echo(f"evaluate: done, see {experiment.folder / paths.metrics / 'evaluate.json'}")
        click.echo(f"report: done, see {experiment.folder / paths.report / 'report.html'}")
        click.echo("next: vattctl ui")
