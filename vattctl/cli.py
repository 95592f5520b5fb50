"""The command line: the click group, its global options, completion, errors to exit codes."""

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from click.shell_completion import (
    CompletionItem,
    ShellComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

from vatt import __version__
from vatt.errors import (
    BUG,
    Interrupted,
    MachineError,
    SettingsError,
    Stopped,
    VattError,
    machine_error,
    redact,
    redact_logs,
    stop,
)

PROGRAM = "vattctl"
# Where each command is, and what `vattctl --help` says about it. So the command that runs is
# imported, and no other.
SECTIONS = {
    "Run": {
        "init": (
            "project.init",
            "Make a project in a new or empty folder DIR: settings, pipeline, git and DVC.",
        ),
        "demo": (
            "pipeline.demo",
            "Run the whole pipeline on a small generated corpus: minutes on two CPU cores.",
        ),
        "repro": (
            "pipeline.repro",
            "Run every stage (or TARGETS) whose settings, code or data have changed.",
        ),
        "pretrain": (
            "pipeline.pretrain",
            "Pre-train VATT with DeepSpeed on the preprocessed clips.",
        ),
        "finetune": (
            "pipeline.finetune",
            "Fine-tune, from pre-trained weights or from scratch.",
        ),
        "evaluate": (
            "pipeline.evaluate",
            "Measure probes, fine-tuned accuracy and zero-shot retrieval.",
        ),
        "report": ("pipeline.report", "Write the report: HTML and Markdown."),
        "plan": (
            "planning.plan_command",
            "Forecast memory, time, energy and cost of the pre-training in params.yaml.",
        ),
    },
    "Data": {
        "ingest": (
            "data.ingest",
            "Use your own videos: a folder, with subtitle files if there are any, or a csv list.",
        ),
        "download": (
            "data.download",
            "Fetch the clips that the source names; write manifest and ledger.",
        ),
        "preprocess": ("data.preprocess", "Cut, scale and pack the clips into shards."),
        "ledger": (
            "data.ledger",
            "Show which clips are there and what became of the others.",
        ),
    },
    "Results": {
        "status": (
            "runs.status",
            "Show what has run, what has changed since, and how each stage ended.",
        ),
        "runs": (
            "runs.runs_command",
            "List the last pipelines in MLflow: their state, main results and changed settings.",
        ),
        "logs": ("runs.logs", "Print what STAGE printed when vattctl last ran it."),
        "ui": ("runs.ui", "Serve the MLflow page of this project's runs (Ctrl-C ends it)."),
        "compare": (
            "runs.compare",
            "Compare two evaluations on the clips they share, with a paired bootstrap.",
        ),
        "table": (
            "tables.table",
            "Run what a table of the paper, or a study beyond it, needs: each run is an "
            "experiment.",
        ),
        "search": (
            "models.search",
            "Find the moments of your own videos that fit the words of QUERY.",
        ),
    },
    "Weights": {
        "import": ("models.import_command", "Convert a released TensorFlow checkpoint."),
        "export": ("models.export_command", "Write a checkpoint FOLDER in another form."),
        "push": (
            "models.push_command",
            "Copy a checkpoint FOLDER to an address, from which `vatt.load` and `pull` take it.",
        ),
        "pull": (
            "models.pull_command",
            "Copy a checkpoint from an ADDRESS to a local folder, and check its files.",
        ),
        "embed": (
            "models.embed",
            "Print the embeddings of a video FILE's moments in the video-text space.",
        ),
        "verify": (
            "models.verify_command",
            "Compare parameters, operations, schedules, tokens and losses with the paper.",
        ),
    },
    "Settings": {
        "config": (
            "data.config",  # with `use`, which data.py adds
            "Show, change, check or replace the settings in params.yaml.",
        ),
        "doctor": (
            "doctor.doctor",
            "Check the machine, the installed programs and the project, with a remedy for "
            "each problem.",
        ),
        "completion": (
            "cli.completion",
            "Complete commands, options, settings, data sets and stages with Tab.",
        ),
    },
}


class Sections(click.Group):
    """A group whose help lists the commands by purpose, in whole sentences."""

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Import a command the first time that it is wanted; each takes the global options."""
        place = next((known[name][0] for known in SECTIONS.values() if name in known), None)
        if name not in self.commands and place is not None:
            module, _, attribute = place.rpartition(".")
            command: click.Command = getattr(import_module(f"vattctl.{module}"), attribute)
            self.add_command(command)
        elif name not in self.commands:
            self.load()  # click looks among them for a similar name
        return super().get_command(context, name)

    def add_command(self, command: click.Command, name: str | None = None) -> None:
        for leaf in getattr(command, "commands", {"": command}).values():
            leaf.params += global_options()
        super().add_command(command, name)

    def load(self) -> dict[str, click.Command]:
        """All commands by name, imported."""
        context = click.Context(self)
        return {name: command for name in self.list_commands(context)
                if (command := self.get_command(context, name))}  # fmt: skip

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """`help COMMAND` is `COMMAND --help`."""
        is_help = args[:1] == ["help"]
        return super().parse_args(context, [*args[1:], "--help"] if is_help else args)

    def list_commands(self, context: click.Context) -> list[str]:
        return [name for known in SECTIONS.values() for name in known]

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        room = max(map(len, self.list_commands(context)))
        for title, known in SECTIONS.items():
            rows = [(name.ljust(room), summary) for name, (_, summary) in known.items()]
            with formatter.section(title):
                formatter.write_dl(rows)


def global_options() -> list[click.Parameter]:
    """The options of `vattctl` itself; hidden, because every command takes them."""

    def take(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value:
            keep(context, **{str(parameter.name): value})

    flags = {"quiet": ("-q", "--quiet"), "verbose": ("-v", "--verbose"), "debug": ("--debug",)}
    options: list[click.Parameter] = [
        click.Option([*names, name], is_flag=True, expose_value=False, hidden=True, callback=take)
        for name, names in flags.items()
    ]
    folder = click.Path(exists=True, file_okay=False, path_type=Path)
    place = click.Option(["--project"], type=folder, expose_value=False, hidden=True, callback=take)
    return [*options, place]


def keep(
    context: click.Context,
    *,
    quiet: bool = False,
    verbose: bool = False,
    debug: bool = False,
    project: Path | None = None,
) -> None:
    """Note global options in the context; the stages read two of them as variables."""
    known: dict[str, Any] = context.find_root().obj
    known["quiet"] = quiet or known.get("quiet", False)
    known["project"] = project or known.get("project")
    if debug or verbose:
        from vatt.process import DEBUG_VARIABLE, VERBOSE_VARIABLE
        from vattctl.pipeline import set_for_stages

        for is_on, variable in ((debug, DEBUG_VARIABLE), (verbose, VERBOSE_VARIABLE)):
            if is_on:
                set_for_stages(context, variable, "1")


@click.group(
    cls=Sections,
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
@click.version_option(__version__, prog_name=PROGRAM)
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

    DVC runs each stage after the stages it depends on; MLflow records each as a run. The four
    options below may also follow the command.
    """
    context.obj = {}
    keep(context, quiet=quiet, verbose=verbose, debug=debug, project=project)


# --- completion -----------------------------------------------------------------------------------

BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' line word="${COMP_WORDS[COMP_CWORD]}"
    if [[ $word == [=:@] ]]; then word=; fi
    COMPREPLY=()
    while IFS= read -r line; do
        case $line in
            plain,*) COMPREPLY+=("${line#plain,}") ;;
            dir,*) compopt -o dirnames ;;
            file,*) compopt -o default ;;
        esac
    done < <(COMP_WORDS="${COMP_LINE:0:COMP_POINT}" COMP_PART="$word" \
        %(complete_var)s=bash_complete "$1")
    if [[ ${COMPREPLY[0]-} == *= ]]; then compopt -o nospace; fi
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""
ZSH = """\
if ! (( $+functions[compdef] )); then autoload -Uz compinit && compinit -u; fi
%(complete_func)s() {
    local -a values keys
    local line
    for line in ${(f)"$(COMP_WORDS="${(F)words}" COMP_CWORD=$((CURRENT-1)) \
            %(complete_var)s=zsh_complete $words[1])"}; do
        case $line in
            plain,*=) keys+=("${line#plain,}") ;;
            plain,*) values+=("${line#plain,}") ;;
            dir,*) _path_files -/ ;;
            file,*) _path_files ;;
        esac
    done
    if (( $#values )); then compadd -V values -a values; fi
    if (( $#keys )); then compadd -S '' -V keys -a keys; fi
}
compdef %(complete_func)s %(prog_name)s
"""


class Zsh(ShellComplete):
    """Completion in zsh: no space follows a key of `--set`, which ends in `=`."""

    name, source_template = "zsh", ZSH

    def get_completion_args(self) -> tuple[list[str], str]:
        place = int(os.environ["COMP_CWORD"]) - 1  # of the word under the cursor
        words = split_arg_string(os.environ["COMP_WORDS"])[1:]
        return words[:place], words[place] if len(words) > place else ""

    def format_completion(self, item: CompletionItem) -> str:
        return f"{item.type},{item.value}"


class Bash(ShellComplete):
    """Completion in bash, which takes the parts around `=`, `:` and `@` for words of their own."""

    name, source_template = "bash", BASH
    cut = 0  # letters of the typed word before the part that bash replaces

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_WORDS"]  # up to the cursor
        words = split_arg_string(line)[1:]
        typed = "" if line[-1:].isspace() or not words else words.pop()
        self.cut = len(typed) - len(os.environ["COMP_PART"])
        return words, typed

    def format_completion(self, item: CompletionItem) -> str:
        return f"{item.type},{item.value[self.cut :]}"


for shell in (Bash, Zsh):
    add_completion_class(shell)
START_FILES = {"bash": Path(".bashrc"), "zsh": Path(".zshrc")}  # fish reads its own folder
MARK = "# completion of vattctl"


@click.command(
    epilog="""\b
Examples:
  vattctl completion --install           for the shell that $SHELL names
  vattctl completion zsh --install
  vattctl completion fish                print the script"""
)
@click.argument("shell", required=False, type=click.Choice(["bash", "zsh", "fish"]))
@click.option("--install", is_flag=True, help="Write the script, and load it in new shells.")
@click.option("--dry-run", is_flag=True, help="Print which files would change; write nothing.")
def completion(shell: str | None, install: bool, dry_run: bool) -> None:
    """Complete commands, options, settings, data sets and stages with Tab.

    Without --install the script is printed.
    """
    shell = shell or Path(os.environ.get("SHELL", "")).name
    made = get_completion_class(shell)
    if made is None:
        raise SettingsError("$SHELL names no known shell", hint="vattctl completion bash --install")
    script = made(cli, {}, PROGRAM, "_VATTCTL_COMPLETE").source()
    if not (install or dry_run):
        click.echo(script)
        return
    for file, text in _completion_files(shell, script).items():
        if not dry_run:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        click.echo(f"{'would write' if dry_run else 'written'}: {file}")
    click.echo(f"next: start a new {shell}, then type `vattctl ` and press Tab")


def _completion_files(shell: str, script: str) -> dict[Path, str]:
    """What each file will hold; a shell's start file gets one more line, once."""
    home = Path.home()
    if shell == "fish":
        config = Path(os.environ.get("XDG_CONFIG_HOME", home / ".config"))
        return {config / "fish/completions/vattctl.fish": script}
    place = Path(os.environ.get("XDG_DATA_HOME", home / ".local/share")) / f"vattctl/{shell}"
    start = Path(os.environ.get("ZDOTDIR", home) if shell == "zsh" else home) / START_FILES[shell]
    known = start.read_text(encoding="utf-8") if start.exists() else ""
    line = f"[ -r {shlex.quote(str(place))} ] && . {shlex.quote(str(place))}  {MARK}\n"
    kept = "".join(one for one in known.splitlines(keepends=True) if MARK not in one)
    kept += "" if kept.endswith("\n") or not kept else "\n"
    return {place: script, start: kept + line}


cli.add_command(completion)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: exit codes as documented in docs/exit-codes.md."""
    sys.exit(_run(list(sys.argv[1:] if argv is None else argv)))


def _run(argv: list[str]) -> int:
    signal.signal(signal.SIGTERM, stop)
    redact_logs()
    try:
        result: Any = cli.main(args=argv, prog_name=PROGRAM, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        return Interrupted.exit_code
    except click.ClickException as error:
        error.show()
        return SettingsError.exit_code
    except VattError as error:
        return _report(error, argv)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        known = machine_error(error) if isinstance(error, OSError) else None
        if known is not None:
            return _report(known, argv)
        if "--debug" in argv:
            raise
        click.echo(
            f"a bug in vattctl: {type(error).__name__}: {redact(str(error))}\n"
            "  -> please report it; --debug shows the traceback",
            err=True,
        )
        return BUG


def _report(error: VattError, argv: list[str]) -> int:
    """Print the message; of a stop one line, with the command that continues."""
    if error.exit_code in (Interrupted.exit_code, Stopped.exit_code):
        what = error.problem.splitlines()[0].partition(";")[0]
        again = redact(shlex.join([PROGRAM, *argv]), every_query=True)
        click.echo(f"{what}; what is done is saved. To continue: {again}", err=True)
        return error.exit_code
    from vattctl.params import with_pages

    click.echo(f"error: {with_pages(str(error))}", err=True)
    if error.exit_code == MachineError.exit_code:
        click.echo("`vattctl doctor` checks the machine and the project", err=True)
    return error.exit_code


if __name__ == "__main__":
    main()
