"""Evaluate what the project has trained, or a checkpoint that somebody gave."""

import re
from pathlib import Path

import click

from vatt.errors import DataError
from vattctl.params import enter_project, parse_setting
from vattctl.pipeline import run, run_dvc, stage_options, stages_here

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
