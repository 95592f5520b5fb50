"""Projects: `vattctl init` makes one, and marks of the installed code let DVC see an upgrade.

The clone is a project: its stages depend on their source files. In a project made by `init`, the
code lies elsewhere, in a Python environment. There, dvc.yaml is the clone's with one stage more,
`code`, which DVC runs every time: it writes a file for each stage, with the hash of every source
file that the stage depends on. The stages depend on these files.
"""

import re
import shutil
import subprocess
from pathlib import Path

import click

from vatt.errors import MachineError, SettingsError
from vatt.process import MARKS
from vattctl.dvc import init_repository, refresh_marks, was_made_by_init
from vattctl.params import (
    PARAMS,
    SHIPPED,
    complete_presets,
    dry_run_option,
    json_option,
    preset_text,
    print_json,
)

PIPELINE, README = Path("dvc.yaml"), Path("README.md")
COPIED = (".gitignore", ".dvcignore", ".dvc/config")
HEADER = """\
# Made by `vattctl init`; `vattctl init --update` writes it again for another version of vattctl.
# Six stages: download -> preprocess -> pretrain -> finetune -> evaluate -> report. The stage `code`
# notes which code is installed, so that a stage runs again when its code has changed.
"""
CODE_STAGE = """\
  code:
    cmd: python -m vattctl.project
    always_changed: true
    outs:
"""
ABOUT = """\
# {name}

A project of vattctl. `params.yaml` holds every setting, `dvc.yaml` the stages.

- `vattctl repro` runs each stage whose settings, code or data have changed.
- `vattctl status` shows what has run; `vattctl ui` compares the runs.
"""


def project_pipeline(text: str) -> str:
    """The clone's dvc.yaml for a project: marks of the code in place of source files."""
    lines: list[str] = []
    stages: list[str] = []
    for line in text[text.index("stages:\n") :].splitlines():
        found = re.fullmatch(r"  (\w+):", line)
        if found:
            stages.append(found[1])
        if re.match(r" +- (?:stages|vatt)/", line):
            continue
        lines.append(line)
        if line.strip() == "deps:":
            lines.append(f"      - {(MARKS / stages[-1]).as_posix()}")
    outs = "".join(
        f"      - {(MARKS / name).as_posix()}: {{cache: false, persist: true}}\n" for name in stages
    )
    return f"{HEADER}stages:\n{CODE_STAGE}{outs}\n" + "\n".join(lines[1:]) + "\n"


def shipped_pipeline() -> str:
    """dvc.yaml of a new project, for the installed version."""
    return project_pipeline((SHIPPED / PIPELINE).read_text(encoding="utf-8"))


def make_project(folder: Path, preset: str) -> None:
    """Write a new project into an empty folder; dvc.yaml comes last, for it makes the project."""
    settings = preset_text(preset)
    is_new = not folder.exists()
    _refuse_full(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PARAMS).write_text(settings, encoding="utf-8")
        (folder / README).write_text(ABOUT.format(name=folder.name), encoding="utf-8")
        scm = _start_git(folder)
        init_repository(folder, scm)
        for name in COPIED:
            shutil.copyfile(SHIPPED / name, folder / name)
        if scm == "none":  # DVC's own setting, which says so, is replaced
            config = folder / ".dvc/config"
            text = config.read_text(encoding="utf-8")
            config.write_text(
                text.replace("[core]\n", "[core]\n    no_scm = true\n"), encoding="utf-8"
            )
        if (SHIPPED / ".dvc/plots").is_dir():
            shutil.copytree(SHIPPED / ".dvc/plots", folder / ".dvc/plots", dirs_exist_ok=True)
        (folder / PIPELINE).write_text(shipped_pipeline(), encoding="utf-8")
        refresh_marks(folder)
        if scm != "none":  # as `dvc init` does with its files
            subprocess.run(["git", "add", "."], cwd=folder, capture_output=True, check=False)
    except BaseException:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _refuse_full(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"{folder} is a file", hint="name a new or an empty folder")
    if folder.is_dir() and {entry.name for entry in folder.iterdir()} - {".git"}:
        is_project = (folder / PIPELINE).is_file() and (folder / PARAMS).is_file()
        raise SettingsError(
            f"{folder} is not empty",
            hint=f"it is a project already: cd {folder} && vattctl status"
            if is_project
            else "name a new or an empty folder",
        )


def _start_git(folder: Path) -> str:
    """How DVC finds git: `git` here, `subdir` of a repository around it, or `none`."""
    if shutil.which("git") is None:
        return "none"

    def git(*arguments: str) -> bool:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=False)
        return done.returncode == 0

    if (folder / ".git").exists():
        return "git"
    if git("rev-parse", "--is-inside-work-tree") and not git("check-ignore", "-q", "."):
        return "subdir"
    if not git("init", "-q"):
        raise MachineError(f"git init failed in {folder}", hint="run it there to see why")
    return "git"


def update_project(folder: Path, *, write: bool) -> bool:
    """Write dvc.yaml again for the installed version; returns whether it changes."""
    from vatt.files import atomic_write

    pipeline = folder / PIPELINE
    if not was_made_by_init(folder):
        raise SettingsError(
            f"{folder} was not made by `vattctl init`",
            hint="in a clone, `git pull` brings a new dvc.yaml",
        )
    wanted = shipped_pipeline()
    changed = wanted != pipeline.read_text(encoding="utf-8")
    if changed and write:
        with atomic_write(pipeline) as path:
            path.write_text(wanted, encoding="utf-8")
    return changed


@click.command(
    epilog="""\b
Examples:
  vattctl init demo && cd demo && vattctl demo
  vattctl init films --preset one-gpu
  vattctl init --update .          after an upgrade of vattctl: the new pipeline, your settings"""
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--preset",
    default="demo",
    show_default=True,
    shell_complete=complete_presets,
    help="demo, small, one-gpu, paper or beyond.",
)
@click.option("--update", is_flag=True, help="Write dvc.yaml of an existing project again.")
@dry_run_option("Check DIR and the preset; write nothing.")
@json_option
def init(folder: Path, preset: str, update: bool, dry_run: bool, as_json: bool) -> None:
    """Make a project in a new or empty folder DIR: settings, pipeline, git and DVC.

    Nothing of a project lies in the installed package: data, runs and reports go to DIR.
    """
    folder = folder.resolve()
    if update:
        words = "would be written again" if dry_run else "written again"
        changed = update_project(folder, write=not dry_run)
        done = f"{folder / PIPELINE}: {words if changed else 'fits this version already'}"
        following = "vattctl config validate"
    elif dry_run:
        preset_text(preset)
        _refuse_full(folder)
        done = f"would make a project with the preset {preset} in {folder}"
        following = f"vattctl init {folder.name}"
    else:
        make_project(folder, preset)
        done = f"{folder}: a project with the preset {preset}"
        place = folder.name if folder.parent == Path.cwd() else folder
        first = {"demo": "demo", "beyond": "repro"}  # on the generated corpus
        following = f"vattctl {first.get(preset, 'ingest DIR_OF_YOUR_VIDEOS')}"
        if folder != Path.cwd():
            following = f"cd {place} && {following}"
    if as_json:
        print_json(folder=str(folder), preset=preset, written=not dry_run, next=following)
    else:
        click.echo(f"{done}\nnext: {following}")


if __name__ == "__main__":  # the stage `code`
    refresh_marks(Path())
