"""The site builds, and the commands in its pages are commands that vattctl has."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.test_architecture import ROOT
from vatt.errors import DataError
from vattctl.cli import cli

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(vattctl [a-z][^`]*)`")
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z_]*\b|\.\.\.")  # SET, DIR: words to replace


def commands(page: Path) -> Iterator[str]:
    """Each call of vattctl in a page, also those in the middle of a shell line."""
    text = page.read_text(encoding="utf-8")
    for language, block in BLOCK.findall(text):
        if language not in ("", "bash", "sh", "console"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;|\|", line.partition(" #")[0]):
                found = re.search(r"(?:^|\s)(vattctl\s.*)", part)
                if found:
                    yield found[1].strip()
    yield from (found for found in INLINE.findall(text) if not PLACEHOLDER.search(found))


def check(line: str) -> None:
    """Parse a call; a path or run that is not here, or a name without arguments, is no fault."""
    words, before = shlex.split(line), dict(os.environ)
    try:
        _check(cli, words[0], words[1:], None)
    finally:  # an option such as --name sets a variable for the stages
        os.environ.clear()
        os.environ.update(before)


def _check(
    command: click.Command, name: str, words: list[str], parent: click.Context | None
) -> None:
    try:
        context = command.make_context(name, words, parent=parent)
    except (click.exceptions.Exit, DataError):  # --help, --version; a run that is not in MLflow
        return
    except click.MissingParameter:
        if words:
            raise
        return
    except click.BadParameter as error:
        if "does not exist" in error.message:
            return
        raise
    if isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        inner_name, inner, inner_words = command.resolve_command(context, rest)
        assert inner is not None
        _check(inner, str(inner_name), inner_words, context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_one_that_vattctl_takes(page: Path) -> None:
    wrong = []
    for line in commands(page):
        try:
            check(line)
        except click.UsageError as error:
            wrong.append(f"{line}: {error.format_message()}")
    assert not wrong, "\n".join(wrong)


def test_the_check_of_commands_finds_wrong_ones(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```\nvattctl pretrain --siz large\n```\n`vattctl retrain`\n")
    for line in commands(page):
        with pytest.raises(click.UsageError):
            check(line)
    assert len(list(commands(page))) == 2


def test_the_site_builds_with_every_link_and_anchor(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    settings = (tmp_path / "settings.html").read_text(encoding="utf-8")
    for key in ("drop_rate", "micro_batch_size", "learning_rate", "no_text_share"):
        assert f"<code>{key}</code>" in settings, key
    shown = (tmp_path / "commands.html").read_text(encoding="utf-8")
    for name in cli.load():
        assert f"vattctl {name}" in shown, name
