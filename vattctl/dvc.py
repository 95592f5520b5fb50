"""Stages from the command line: options -> params.yaml -> `dvc repro`."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import click

from vatt.errors import MachineError, SettingsError, VattError
from vatt.process import join_step
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

STAGES = ("download", "preprocess", "pretrain", "finetune", "evaluate", "report")


class StageFailed(VattError):
    """A stage ended with its own code and message."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = code


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
    from vatt.data.sources.official import mark_of_lists

    changes = change(settings, write=not dry_run)
    params = load_params()
    mark = None if dry_run else mark_of_lists(params.data)
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


def stages_here() -> list[str]:
    """The stages that this project runs itself, in their order: an experiment lacks some."""
    import yaml

    declared = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return [name for name in STAGES if name in declared]


def stage_before(target: str, *, has_tasks: bool) -> str | None:
    """The stage that a target builds on; fine-tuning is passed over where there are no tasks."""
    stages = [name for name in stages_here() if has_tasks or name != "finetune"]
    place = stages.index(target.partition("@")[0])
    return stages[place - 1] if place else None


def run_dvc(arguments: list[str], *, quiet: bool) -> None:
    """Run dvc with this interpreter first on PATH; raise a failed stage's own code and message."""
    from vatt.process import OUTCOME, read_outcome

    here = Path.cwd()  # an experiment's stage may wait for one of the project above it
    projects = [folder for folder in (here, *here.parents) if (folder / "dvc.yaml").is_file()]
    for project in projects:
        (project / OUTCOME).unlink(missing_ok=True)
    folder = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}",
        "DVC_NO_ANALYTICS": "1",
        "VATTCTL": "1",
    }
    # dvc's own talk is progress, not a result, so its stdout goes to stderr
    command = [sys.executable, "-m", "dvc", *arguments, *(["--quiet"] if quiet else [])]
    with subprocess.Popen(command, env=environment, stdout=sys.stderr.fileno()) as process:
        forward_signals(process.pid)
        code = process.wait()
    if code == 0:
        return
    for project in projects:
        if (outcome := read_outcome(project)) is not None:
            raise StageFailed(*outcome)
    if code in (-signal.SIGINT, 128 + signal.SIGINT):
        raise KeyboardInterrupt
    raise MachineError(
        f"dvc {arguments[0]} ended with {code}",
        hint="its message is above; the same command continues where it stopped",
    )


def forward_signals(parent: int) -> None:
    """Hand SIGTERM and SIGUSR1 to the stage: dvc itself would die and leave it as an orphan.

    To the stage alone: its launcher and its processes get them from it, in the right order.
    """

    def forward(signum: int, frame: FrameType | None) -> None:
        import psutil

        for child in psutil.Process(parent).children(recursive=True):  # parents come first
            try:
                if _is_stage(child.cmdline()):
                    child.send_signal(signum)
                    return
            except psutil.Error:  # it ended while we looked
                continue

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGUSR1, forward)


def _is_stage(command: list[str]) -> bool:
    """Whether this is `python -m stages.<name>`: not a shell or a launcher that names it."""
    return command[1:2] == ["-m"] and command[2:3] != [] and command[2].startswith("stages.")


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
        from vattctl.runs import summary

        click.echo(summary())


COMMANDS = (
    _stage_command("report", "Write the report: HTML and Markdown.", "vattctl report"),
    repro,
)


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
