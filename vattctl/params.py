"""params.yaml from the command line: show, set, use a preset, validate; completion of keys."""

import contextlib
import difflib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vatt.errors import SettingsError, redact
from vatt.files import inside

if TYPE_CHECKING:
    from vatt.config import Params

PARAMS = Path("params.yaml")
# What a project is made from: presets, pipeline. A wheel carries them; setup.py copies them there.
_PACKAGED = Path(__file__).parent / "shipped"
SHIPPED = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[1]
PRESETS = SHIPPED / "presets"
REPAIR = "correct it, or `vattctl config use PRESET`"
Settings = dict[tuple[str, ...], Any]  # ("pretrain", "steps") -> 1000
SIZES = ("tiny", "small", "base", "medium", "large")
JSON_VERSION = 1  # of what --json prints; it rises when a field changes its meaning
LINE_LETTERS = 160  # of a change that is printed
PIPED_WIDTH = 300  # columns; a pipe has no width, and a name that is cut off there is lost


def with_pages(text: str) -> str:
    """A text in which pages of the documentation are named by where they lie: docs/tables.md.

    A wheel carries them; a project has no folder docs.
    """
    if not _PACKAGED.is_dir():
        return text
    return re.sub(r"\bdocs/[\w-]+\.md", lambda found: str(SHIPPED / found[0]), text)


def print_rich(*parts: Any) -> None:
    """Print tables and lines of plain text, one below the other."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPED_WIDTH)
    for part in parts:
        # the terminal breaks long lines itself, so that they can be copied whole
        console.print(part, highlight=False, soft_wrap=isinstance(part, str))


def print_json(**content: Any) -> None:
    """What every `--json` prints: one object with its version first."""
    shown = json.dumps({"version": JSON_VERSION, **content}, indent=2, ensure_ascii=False)
    click.echo(shown)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The option --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def dry_run_option(description: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option --dry-run."""
    return click.option("--dry-run", is_flag=True, help=description)


def project_folder(chosen: Path | None) -> Path | None:
    """The folder that was chosen, or the nearest parent with a dvc.yaml."""
    candidates = [chosen.resolve()] if chosen else [Path.cwd(), *Path.cwd().parents]
    return next((folder for folder in candidates if (folder / "dvc.yaml").is_file()), None)


def enter_project(context: click.Context) -> Path:
    """Work in the project's folder: the nearest parent with dvc.yaml, or --project."""
    chosen: Path | None = context.obj["project"]
    folder = project_folder(chosen)
    if folder is None:
        raise SettingsError(
            f"no dvc.yaml in {chosen or Path.cwd()}" + ("" if chosen else " or its parents"),
            hint="make a project with `vattctl init DIR`, or name one with --project DIR",
        )
    os.chdir(folder)
    return folder


def parse_setting(text: str) -> tuple[tuple[str, ...], Any]:
    """`pretrain.steps=1000` -> (("pretrain", "steps"), 1000); the value is YAML."""
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SettingsError(f"{text!r} is not KEY=VALUE", hint="e.g. pretrain.steps=1000")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise SettingsError(f"{key}: {value!r} is not YAML") from None
    if isinstance(parsed, str):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-3 as text
            parsed = float(parsed)
    return tuple(key.strip().split(".")), parsed


def size_settings(size: str, backbone: str) -> Settings:
    """What `--size X` means: video X, audio Base, text Small for base and above; else X for all."""
    if backbone == "agnostic" or size in ("tiny", "small"):
        sizes = {"video": size, "audio": size, "text": size}
    else:
        sizes = {"video": size, "audio": "base", "text": "small"}
    return {("model", tower, "size"): value for tower, value in sizes.items()}


def parse_settings(
    context: click.Context, parameter: click.Parameter, assignments: Iterable[str]
) -> Settings:
    """The settings of all `--set` options; of two for the same key the later."""
    return dict(map(parse_setting, assignments))


# --- completion by the shell: each answers with values that begin with what was typed ------------


def completion_folder(context: click.Context) -> Path:
    """The project whose values are completed; here without one."""
    return project_folder(context.find_root().params.get("project")) or Path()


class CheckpointFolder(click.Path):
    """A checkpoint's folder, or the address of one in MLflow (`runs:/...`, `models:/...`)."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The folder; that of an address is fetched into the project, but not by the Tab key."""
        is_address = str(value).startswith(("runs:/", "models:/"))
        if not is_address or ctx is None or ctx.resilient_parsing:
            return super().convert(value, param, ctx)
        with inside(project_folder(ctx.find_root().params.get("project")) or Path()):
            from vatt.config import load_params
            from vatt.tracking.mlflow import checkpoint_of

            return checkpoint_of(load_params(), str(value))


def complete_keys(context: click.Context, parameter: click.Parameter, typed: str) -> list[str]:
    """Keys and sections of params.yaml."""
    return sorted({key for key in _known_keys(context, sections=True) if key.startswith(typed)})


def complete_settings(context: click.Context, parameter: click.Parameter, typed: str) -> list[str]:
    """Keys of params.yaml, each followed by `=`; after it the values that the key may have."""
    key, equals, value = typed.partition("=")
    if not equals:
        return [f"{key}=" for key in _known_keys(context) if key.startswith(typed)]
    from vatt.config import known_values

    values = known_values(tuple(key.split(".")))
    return [f"{key}={one}" for one in values if one.startswith(value)]


def complete_presets(context: click.Context, parameter: click.Parameter, typed: str) -> list[str]:
    """Names of presets."""
    return [name for name in preset_names() if name.startswith(typed)]


def _known_keys(context: click.Context, *, sections: bool = False) -> Iterator[str]:
    import yaml

    from vatt.config import off_keys

    with contextlib.suppress(OSError, yaml.YAMLError):
        text = (completion_folder(context) / PARAMS).read_text(encoding="utf-8")
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        known = list(_keys_of(yaml.load(text, Loader=loader), sections=sections))
        yield from dict.fromkeys([*known, *map(".".join, off_keys())])


def _keys_of(section: Any, path: str = "", *, sections: bool) -> Iterator[str]:
    if isinstance(section, dict):
        for key, value in section.items():
            inner = f"{path}.{key}" if path else str(key)
            if sections or not isinstance(value, dict):
                yield inner
            yield from _keys_of(value, inner, sections=sections)


def set_option(description: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option --set; the command gets `settings`, parsed."""
    return click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        callback=parse_settings,
        shell_complete=complete_settings,
        help=description,
    )


@dataclass
class Edit:
    """params.yaml with some settings changed, comments kept; `write` puts it on disk."""

    yaml: Any
    document: Any
    source: Path  # named in errors
    lines: list[str] = field(default_factory=list)  # one for each real change

    @cached_property
    def params(self) -> "Params":
        """All settings, checked."""
        from vatt.config import parse_params

        return parse_params(yaml_plain(self.document), source=self.source)

    def set(self, keys: tuple[str, ...], value: Any) -> None:
        """Change one more setting."""
        line = _set(self.document, keys, value)
        if line is not None:
            self.lines.append(redact(line, every_query=True))
            self.__dict__.pop("params", None)

    def text(self) -> str:
        """What the file will hold."""
        text = StringIO()
        self.yaml.dump(self.document, text)
        return text.getvalue()

    def refuse_if_busy(self) -> None:
        """Raise what `write` would raise while a stage runs, before anything long is done."""
        if self.lines:
            with _alone():
                pass

    def write(self) -> list[str]:
        """Check all settings, then replace params.yaml if one changes; returns the lines."""
        _ = self.params  # raises when one is wrong
        if self.lines:
            _write(self.text())
        return self.lines


def shortened(line: str) -> str:
    """A change for a person: a value of many settings is cut off."""
    return line if len(line) <= LINE_LETTERS else f"{line[: LINE_LETTERS - 1]}…"


def edit(
    settings: Mapping[tuple[str, ...], Any], *, source: Path = PARAMS, document: str | None = None
) -> Edit:
    """Read params.yaml (or take the text `document`) and change settings; nothing is written."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    from vatt.config import read_yaml

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.representer.add_representer(type(None), _null)
    yaml.indent(mapping=2, sequence=4, offset=2)
    try:
        if document is None:
            read_yaml(PARAMS)  # says what is wrong with a damaged file
        text = PARAMS.read_text(encoding="utf-8") if document is None else document
        loaded = yaml.load(text)
    except FileNotFoundError:
        raise SettingsError(f"{PARAMS} is missing", hint="run `vattctl config use demo`") from None
    except YAMLError as error:
        raise SettingsError(f"{PARAMS} cannot be read: {error}", hint=REPAIR) from None
    if not isinstance(loaded, dict):
        raise SettingsError(f"{PARAMS} does not hold sections", hint=REPAIR)
    edited = Edit(yaml, loaded, source)
    for keys, value in settings.items():
        edited.set(keys, value)
    return edited


def _alone() -> contextlib.AbstractContextManager[None]:
    """Refuse to go on while a stage runs that was started with the settings as they are."""
    from vatt.files import lock
    from vatt.process import SETTINGS_LOCK

    return lock(SETTINGS_LOCK, busy="busy: params.yaml cannot be changed while a stage runs")


def _write(text: str) -> None:
    """Replace params.yaml."""
    from vatt.files import atomic_write

    with _alone(), atomic_write(PARAMS) as path:
        path.write_text(text, encoding="utf-8")


def _null(representer: Any, value: None) -> Any:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def yaml_plain(document: Any) -> Any:
    """A ruamel document as plain dicts and lists, as the schema wants it."""
    if isinstance(document, dict):
        return {str(key): yaml_plain(value) for key, value in document.items()}
    if isinstance(document, list):
        return [yaml_plain(value) for value in document]
    return document


def _set(document: Any, keys: tuple[str, ...], value: Any) -> str | None:
    from vatt.config import default_of, may_be_missing

    section, is_new = document, False
    for depth, key in enumerate(keys[:-1]):
        if not isinstance(section, dict):
            raise _no_key(section, keys, depth)
        if section.get(key) is None and may_be_missing(keys[: depth + 1]):
            section[key], is_new = {}, True
        if key not in section:
            raise _no_key(section, keys, depth)
        section = section[key]
    key = keys[-1]
    if not isinstance(section, dict) or not (key in section or may_be_missing(keys)):
        raise _no_key(section, keys, len(keys) - 1)
    missing = None if is_new else default_of(keys)
    before = yaml_plain(section[key]) if key in section else missing
    if before == value:
        return None
    section[key] = value
    one, other = (json.dumps(it, ensure_ascii=False) for it in (before, value))
    return f"{'.'.join(keys)}: {one} -> {other}"


def _no_key(section: Any, keys: tuple[str, ...], depth: int) -> SettingsError:
    """What the file lacks, and what its section has instead."""
    from vatt.config import known_keys

    above = keys[:depth]
    known = known_keys(above) or (sorted(section) if isinstance(section, dict) else [])
    remedy = f"{'.'.join(above) or 'params.yaml'} has: {', '.join(known)}" if known else None
    if close := difflib.get_close_matches(keys[depth], known, n=1):
        remedy = f"did you mean '{'.'.join((*above, close[0]))}'?"
    return SettingsError(f"{PARAMS} has no key {'.'.join(keys)}", hint=remedy)


def preset_names() -> list[str]:
    """The presets that this version has."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_text(name: str) -> str:
    """The settings file of a preset."""
    presets = preset_names()
    if name not in presets:
        close = difflib.get_close_matches(name, presets, n=1)
        raise SettingsError(
            f"no preset '{name}'",
            hint=f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(presets)}",
        )
    return (PRESETS / f"{name}.yaml").read_text(encoding="utf-8")


def use_preset(name: str) -> list[str]:
    """Make params.yaml equal to a preset; a file that was edited is kept as params.yaml.bak."""
    wanted = preset_text(name)
    if PARAMS.exists() and PARAMS.read_text(encoding="utf-8") == wanted:
        return [f"params.yaml already equals the preset {name}"]
    kept = keep_edited()
    _write(wanted)
    return [f"params.yaml now equals the preset {name}", *kept]


def keep_edited() -> list[str]:
    """Keep a params.yaml that is no preset as params.yaml.bak, before it is replaced."""
    known = {path.read_text(encoding="utf-8") for path in PRESETS.glob("*.yaml")}
    if not PARAMS.exists() or PARAMS.read_text(encoding="utf-8") in known:
        return []
    shutil.copyfile(PARAMS, "params.yaml.bak")
    return ["your edited settings are kept in params.yaml.bak"]


@click.group()
def config() -> None:
    """Show, change, check or replace the settings in params.yaml."""


@config.command("show")
@click.argument("key", required=False, shell_complete=complete_keys)
@json_option
@click.pass_context
def show(context: click.Context, key: str | None, as_json: bool) -> None:
    """Print all settings, or those under KEY.

    \b
    Example:
      vattctl config show pretrain.optimizer
    """
    import yaml

    from vatt.config import default_of, load_params, may_be_missing

    enter_project(context)
    value: Any = load_params().model_dump(mode="json")
    parts = tuple(key.split(".")) if key else ()
    for part in parts:
        if not isinstance(value, dict) or part not in value:
            if may_be_missing(parts):
                value = default_of(parts)
                break
            close = difflib.get_close_matches(part, value if isinstance(value, dict) else [], n=1)
            raise SettingsError(
                f"params.yaml has no key {key}",
                hint=f"did you mean '{close[0]}'?" if close else None,
            )
        value = value[part]
    if as_json:
        shown = json.dumps(
            {"version": JSON_VERSION, "key": key, "value": value}, indent=2, ensure_ascii=False
        )
    else:
        shown = yaml.safe_dump(value, sort_keys=False, width=math.inf)
    click.echo(redact(shown, every_query=True).removesuffix("...\n").rstrip())


@config.command("set", short_help="Change settings in params.yaml, each KEY=VALUE.")
@click.argument("settings", nargs=-1, required=True, shell_complete=complete_settings)
@dry_run_option("Print what would change; write nothing.")
@json_option
@click.pass_context
def set_(context: click.Context, settings: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Change settings in params.yaml, each KEY=VALUE; comments stay, and nothing runs.

    \b
    Examples:
      vattctl config set pretrain.steps=2000 model.dropout=0.1
      vattctl config set data.require=[video,audio] --dry-run
    """
    enter_project(context)
    changed = edit(dict(map(parse_setting, settings)))
    _ = changed.params  # raises when one is wrong
    lines = changed.lines if dry_run else changed.write()
    if as_json:
        print_json(changes=lines, written=not dry_run)
        return
    for line in lines or ["nothing to change"]:
        click.echo(f"params.yaml: {line}")
    if dry_run:
        click.echo("nothing written (--dry-run)")


@config.command("validate")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@json_option
@click.pass_context
def validate(context: click.Context, file: Path | None, as_json: bool) -> None:
    """Check params.yaml, or FILE; name what is wrong and exit with 2.

    \b
    Examples:
      vattctl config validate
      vattctl config validate params.yaml.bak
    """
    from vatt.config import load_params

    if file is None:
        enter_project(context)
    problems: list[str] = []
    try:
        load_params(file or PARAMS)
    except SettingsError as error:
        if not as_json:
            raise
        problems = str(error).splitlines()
    if as_json:
        print_json(file=str(file or PARAMS), valid=not problems, problems=problems)
    else:
        click.echo(f"{file or PARAMS}: every setting is known and valid")
    if problems:
        context.exit(SettingsError.exit_code)
