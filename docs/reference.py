"""Pages of the site that are made from the code: settings, and copies of files in the root."""

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from vatt import config as settings
from vattctl.cli import SECTIONS, cli

ROOT = Path(__file__).parents[1]
PRESETS = ("demo", "small", "one-gpu", "paper")
COPIES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    files.append(File.generated(config, "settings.md", content=settings_page()))
    files.append(File.generated(config, "commands.md", content=commands_page()))
    for source, page in COPIES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=re.sub(r"\]\(docs/", "](", text)))
    return files


def commands_page() -> str:
    """The help of every command, by purpose."""
    parts = [
        "# Commands\n\nThe texts of `vattctl COMMAND --help`. Each command also takes `--quiet`, "
        "`--verbose`, `--debug` and `--project DIR`.\n"
    ]
    top = click.Context(cli, info_name="vattctl")
    commands = cli.load()
    for title, names in SECTIONS.items():
        parts.append(f"## {title}\n")
        for name in names:
            command = commands[name]
            parts += _help(command, click.Context(command, top, name), 3)
    return "\n".join(parts)


def _help(command: click.Command, context: click.Context, level: int) -> Iterator[str]:
    yield f"{'#' * level} {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from _help(inner, click.Context(inner, context, name), level + 1)


def settings_page() -> str:
    """Every key of params.yaml: its type, its unit or meaning, and its value in each preset."""
    presets = {
        name: yaml.safe_load((ROOT / f"presets/{name}.yaml").read_text(encoding="utf-8"))
        for name in PRESETS
    }
    parts = [
        "# Settings\n\nEvery key of `params.yaml`. `--set KEY=VALUE` changes one for good, "
        "`vattctl config validate` checks the file, and `vattctl config show` prints it. Values "
        "are those of the presets `demo`, `small`, `one-gpu` and `paper`, where they differ.\n"
    ]
    for name, field in settings.Params.model_fields.items():
        section = field.annotation
        if not _is_section(section):
            parts.append(_table(name, [(name, "whole number from 0", "of every draw")], presets))
            continue
        parts += [_table(key, rows, presets) for key, rows in _sections(name, section)]
    return "\n".join(parts)


Row = tuple[str, str, str]  # key, type, meaning


def _sections(prefix: str, section: Any) -> Iterator[tuple[str, list[Row]]]:
    """A section and, after it, each section in it."""
    written, rows, inner = _as_written(section), list[Row](), list[tuple[str, Any]]()
    for name, field in section.model_fields.items():
        key, part = f"{prefix}.{name}", settings._section_of(field.annotation)
        if _is_section(field.annotation):
            inner.append((key, part))
        elif part is not None and str(field.annotation).startswith("dict["):
            inner.append((f"{key}.NAME", part))
        else:
            rows.append((key, *written[name]))
            if part is not None and part is not settings.SizeParams:  # off unless it is set
                inner.append((key, part))
    yield f"{prefix}: {(section.__doc__ or '').strip().splitlines()[0]}", rows
    for key, part in inner:
        yield from _sections(key, part)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, settings.BaseModel)


def _as_written(section: Any) -> dict[str, tuple[str, str]]:
    """The type of each field of a class, and the comment behind it."""
    source = inspect.getsource(section)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        node.target.id: (_type(node.annotation), comments.get(node.end_lineno or 0, ""))
        for node in body.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _table(title: str, rows: list[Row], presets: dict[str, Any]) -> str:
    name, _, meaning = title.partition(": ")
    if not rows:
        return f"## {name}\n\n{meaning}\n"
    lines = [
        f"## {name}\n",
        f"{meaning}\n",
        "| key | type | meaning | value |",
        "|---|---|---|---|",
    ]
    for key, kind, comment in rows:
        values = {name: _value(presets[name], key.split(".")) for name in PRESETS}
        if all(value is MISSING for value in values.values()):
            values = dict.fromkeys(PRESETS, _default(key.split(".")))
        short = key.removeprefix(f"{name}.")
        lines.append(f"| `{short}` | {_escape(kind)} | {_escape(comment)} | {_shown(values)} |")
    return "\n".join(lines) + "\n"


def _shown(values: dict[str, Any]) -> str:
    """One value, or those of each preset when they differ."""
    there = {name: _code(value) for name, value in values.items() if value is not MISSING}
    if len(set(there.values())) <= 1 and len(there) == len(values):
        return next(iter(there.values()))
    return "<br>".join(f"{name} {value}" for name, value in there.items())


MISSING = object()


def _value(preset: Any, path: list[str]) -> Any:
    for key in path:
        if key == "NAME":  # of the first one
            preset = next(iter(preset.values()), MISSING) if isinstance(preset, dict) else MISSING
        elif isinstance(preset, dict) and key in preset:
            preset = preset[key]
        else:
            return MISSING
    return preset


def _default(path: list[str]) -> Any:
    """The value that a missing key stands for, if it may be missing."""
    field = settings._fields_at(tuple(path[:-1])).get(path[-1])
    return MISSING if field is None or field.is_required() else settings.default_of(tuple(path))


def _code(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    return f"`{_escape(text.removesuffix('...').strip())}`"


WORDS = {
    r"Annotated\[(\w+), Field\(gt=0, le=(\d+)\)\]": r"\1 above 0, at most \2",
    r"Annotated\[int, Field\(ge=0, lt=2 ?\*\* ?32\)\]": "int from 0",
    r"Annotated\[(\w+), Field\(ge=(\d+), le=(\d+)\)\]": r"\1 from \2 to \3",
    r"Literal\[([^\]]*)\]": r"\1",
    r"tuple\[([^\]]*), \.\.\.\]": r"list of \1",
    r"tuple\[([^\]]*)\]": r"list of \1",
    r"dict\[str, (.*)\]": r"\1 for each name",
    r"\b(?:Positive|NonNegative)(Int|Float)\b": lambda m: (
        f"{m[1].lower()} {'above 0' if m[0].startswith('P') else 'from 0'}"
    ),
    r"\b(?:Layers|Width|Frames|Pixels)\b": "int above 0",
    r"\bRate\b": "share below 1",
    r"\bMergeRate\b": "share up to 0.5",
    r"\bNoiseShare\b": "share up to 0.8",
    r"\bModality\b": "video, audio, text, motion, depth",
    r"\bShare\b": "share",
    r"\bPrecision\b": "fp32, bf16",
    r"\bint\b": "whole number",
    r"\bfloat\b": "number",
    r"\bSizeName\b": "tiny, small, base, medium, large",
    r"\bSizeParams\b": "its own depth, dim, mlp_dim, heads and head_dim",
    r"\b\w+Params\b": "the section below",
    r"\bstr\b": "text",
    r"\bbool\b": "true, false",
    r"\bPath\b": "path",
    r" \| None": ", null",
    r" \| ": ", ",
    r"'": "",
}


def _type(annotation: ast.expr) -> str:
    """A type in words."""
    text = ast.unparse(annotation)
    for pattern, words in WORDS.items():
        text = re.sub(pattern, words, text)
    return text


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
