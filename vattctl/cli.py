"""The command line: the click group, its global options, errors to messages and exit codes."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from vatt import __version__
from vatt.errors import MachineError, SettingsError, VattError, machine_error, redact, redact_logs
from vatt.process import BUG, INTERRUPTED, stop
from vattctl import data, doctor, models, params, pipeline, planning, project, runs, tables


class InOrder(click.Group):
    """Lists commands in the order of the pipeline."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Whole sentences on several lines, where click would cut them off."""
        rows = [(name, one.get_short_help_str(limit=200)) for name, one in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(
    cls=InOrder,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  vattctl init demo && cd demo               a project in a new folder
  vattctl demo                               the whole pipeline on a small generated corpus
  vattctl pretrain --size large              set the size, then run what it needs
  vattctl pretrain --set pretrain.steps=2000
  vattctl ingest ~/videos                    your own videos instead
  vattctl status                             what has run, what has changed, what it cost
  vattctl ui                                 compare runs in the MLflow page""",
)
@click.version_option(__version__, prog_name="vattctl")
@click.option(
    "--project",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The project's folder, instead of the nearest parent with dvc.yaml.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print results and errors only.")
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def cli(
    context: click.Context, project: Path | None, quiet: bool, verbose: bool, debug: bool
) -> None:
    """VATT (Video-Audio-Text Transformer), reproducible end to end.

    DVC runs each stage after the stages it depends on; MLflow records each as a run.
    """
    if debug:
        os.environ["VATTCTL_DEBUG"] = "1"  # the stages read these two
    if verbose:
        os.environ["VATTCTL_VERBOSE"] = "1"
    context.obj = {"quiet": quiet, "project": project}


for command in (
    project.init,
    pipeline.demo,
    *data.COMMANDS,
    planning.plan_command,
    pipeline.pretrain,
    pipeline.finetune,
    pipeline.evaluate,
    *pipeline.COMMANDS,
    *tables.COMMANDS,
    *runs.COMMANDS,
    params.config,
    doctor.doctor,
    models.import_command,
    models.export_command,
    models.embed,
    models.search,
    models.verify_command,
):
    cli.add_command(command)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: exit codes as documented in docs/exit-codes.md."""
    sys.exit(_run(list(sys.argv[1:] if argv is None else argv)))


def _run(argv: list[str]) -> int:
    signal.signal(signal.SIGTERM, stop)
    redact_logs()
    try:
        result: Any = cli.main(args=argv, prog_name="vattctl", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return SettingsError.exit_code
    except VattError as error:
        return _report(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        known = machine_error(error) if isinstance(error, OSError) else None
        if known is not None:
            return _report(known)
        if "--debug" in argv:
            raise
        click.echo(
            f"a bug in vattctl: {type(error).__name__}: {redact(str(error))}\n"
            "  -> please report it; --debug shows the traceback",
            err=True,
        )
        return BUG


def _report(error: VattError) -> int:
    click.echo(f"error: {error}", err=True)
    if error.exit_code == MachineError.exit_code:
        click.echo("`vattctl doctor` checks the machine and the project", err=True)
    return error.exit_code


if __name__ == "__main__":
    main()
