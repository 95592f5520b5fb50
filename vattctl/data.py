"""Clips from the command line: ingest, download, preprocess, ledger."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vatt.errors import SettingsError
from vattctl.params import (
    JSON_VERSION,
    PARAMS,
    Edit,
    complete_presets,
    config,
    dry_run_option,
    edit,
    enter_project,
    json_option,
    keep_edited,
    preset_text,
    print_json,
    shortened,
    use_preset,
    with_pages,
)
from vattctl.pipeline import (
    RunOptions,
    machines_options,
    machines_settings,
    run,
    stage_options,
)
from vattctl.sets import carried, expectations, own_preset, own_settings, own_source

if TYPE_CHECKING:
    from vatt.config import Params
    from vatt.data.sources.folder import Found
    from vatt.data.sources.official import Attrition, Loss

WORST = 15  # classes shown


@click.command(
    epilog="""\b
Examples:
  vattctl ingest ~/videos && vattctl repro
  vattctl ingest ~/videos --dry-run              count the files; show the settings
  vattctl ingest list.csv                        paths or addresses with spans, words and labels
  vattctl ingest ~/videos --preset keep          only data settings; sizes stay as they are"""
)
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--preset",
    metavar="NAME",
    shell_complete=complete_presets,
    help="Preset to start from, or `keep`; default: what fits the files and this machine.",
)
@dry_run_option("Count the files and show the settings; change nothing.")
@json_option
@click.pass_context
def ingest(
    context: click.Context, source: Path, preset: str | None, dry_run: bool, as_json: bool
) -> None:
    """Use your own videos: a folder, with subtitle files if there are any, or a csv list.

    Sub-folders (or columns of the list) become labels, and labels become tasks. Chooses a preset,
    fits lengths, batch and steps to the files, and writes params.yaml and the manifest. The videos
    stay where they are.
    """
    source = source.resolve()
    enter_project(context)
    from vatt.config import load_params

    params = load_params()
    found, changed, chosen = own_edit(source, params, preset, writes=not dry_run)
    preprocess = changed.params.preprocess
    counts = found.counts(preprocess)
    tests = counts["by_split"].get("test", 0) * counts["clips"] // max(len(found.clips), 1)
    advice = expectations(counts["clips"], tests)
    if not dry_run:
        from vatt.data.clips.manifest import write_manifest

        keep_edited()
        changed.write()
        write_manifest(params.paths.manifest, found.clips)
    if as_json:
        print_json(**counts, preset=chosen, changes=changed.lines, expect=list(advice))
        return
    if chosen is not None:
        click.echo(f"params.yaml: preset {chosen}, fitted to these files", err=True)
    for line in changed.lines:
        click.echo(f"params.yaml: {shortened(line)}", err=True)
    click.echo(with_pages("\n".join([found.describe(preprocess), *advice])))
    click.echo("nothing written (--dry-run)" if dry_run else "next: vattctl repro")


def own_edit(
    source: Path, params: "Params", preset: str | None, *, writes: bool
) -> "tuple[Found, Edit, str | None]":
    """Files of one's own, settings fitted to them, and the preset that these start from."""
    from vatt.data.clips.files import ContentHashes

    hashes = ContentHashes.beside(params.paths.media, writes=writes)
    found = own_source(source, params.data, hashes)
    chosen = own_preset(found, params) if preset is None else preset
    if chosen in (None, "keep"):
        return found, edit(own_settings(found, source, params)), None
    text, kept = preset_text(str(chosen)), carried(params, str(chosen))
    base = edit(kept, document=text).params
    if found.seconds and source.is_dir():  # the preset has shares of its own for test and val
        found = replace(
            own_source(source, base.data, hashes, opens=False),
            seconds=found.seconds,
            sounding=found.sounding,
            broken=found.broken,
        )
    return found, edit(kept | own_settings(found, source, base), document=text), chosen


@config.command("use", short_help="Replace params.yaml by a preset.")
@click.argument("preset", shell_complete=complete_presets)
@dry_run_option("Print what would change; write nothing.")
@json_option
@click.pass_context
def use(context: click.Context, preset: str, dry_run: bool, as_json: bool) -> None:
    """Replace params.yaml by a preset: demo, small, one-gpu, paper or beyond.

    After `vattctl ingest`, the data settings are kept, and the preset is fitted to your files.
    Only `demo` goes back to the generated corpus.

    \b
    Examples:
      vattctl config use one-gpu --dry-run
      vattctl config use demo
    """
    enter_project(context)
    lines = _kept_data(preset, write=not dry_run)
    if lines is None and dry_run:
        preset_text(preset)  # raises where there is no such preset
        lines = [f"params.yaml would equal the preset {preset}"]
    elif lines is None:
        lines = use_preset(preset)
    if as_json:
        print_json(preset=preset, changes=lines, written=not dry_run)
        return
    click.echo("\n".join(lines))
    click.echo("nothing written (--dry-run)" if dry_run else "next: vattctl repro")


def _kept_data(preset: str, *, write: bool) -> list[str] | None:
    """Take a preset with the data of the project; None where it has no data of its own."""
    from vatt.config import load_params

    if preset == "demo" or not PARAMS.exists():
        return None
    params = load_params()
    if params.data.source not in ("folder", "urls") or not params.data.location:
        return None
    if not params.data.location.exists():
        return None
    _, changed, _ = own_edit(params.data.location, params, preset, writes=write)
    kept = keep_edited() if write else []
    if write:
        changed.write()
    return [f"params.yaml: preset {preset}, data as before", *changed.lines, *kept]


@click.command()
@click.option(
    "--retry",
    metavar="STATES",
    help="Try clips in these states again: `retryable` (those that every run tries), `missing` "
    "(their files were deleted), or states joined by commas.",
)
@machines_options
@stage_options
@click.pass_context
def download(
    context: click.Context,
    retry: str | None,
    executor: str | None,
    address: str | None,
    options: RunOptions,
) -> None:
    """Fetch the clips that the source names; write manifest and ledger.

    \b
    Examples:
      vattctl download --set data.source=demo
      vattctl download --retry retryable          what was lost to the network or throttling
      vattctl download --retry missing            files that were fetched and are gone
      vattctl download --retry geo,needs-login --set machine.cookies=cookies.txt
    """
    more = machines_settings(executor, address)
    enter_project(context)
    if retry is None:
        run(context, ("download",), edit(more | options.settings), options)
        if not options.dry_run and (lost := len(_missing())):
            click.echo(
                f"{lost} files that were fetched are missing now; if shards must be written again, "
                "`vattctl download --retry missing` fetches them",
                err=True,
            )
        return
    count = _forget(retry, write=not options.dry_run)
    click.echo(
        f"{count} {'files' if retry == 'missing' else 'clips'} will be tried again", err=True
    )
    if count:
        run(context, ("download",), edit(more | options.settings), replace(options, force=True))


@click.command()
@machines_options
@stage_options
@click.pass_context
def preprocess(
    context: click.Context,
    executor: str | None,
    address: str | None,
    options: RunOptions,
) -> None:
    """Cut, scale and pack the clips into shards.

    \b
    Examples:
      vattctl preprocess --set preprocess.fps=25
      vattctl preprocess --executor ray --address 10.0.0.1:6379
    """
    more = machines_settings(executor, address)
    enter_project(context)
    run(context, ("preprocess",), edit(more | options.settings), options)


def _missing() -> list[Path]:
    """The media files that a download had and that are not there any more."""
    from vatt.config import load_params
    from vatt.data.clips.ledger import missing_media, read_ledger
    from vatt.data.clips.manifest import Manifest

    params = load_params()
    paths = params.paths
    if not (paths.manifest.is_file() and paths.download_ledger.is_file()):
        return []
    entries = read_ledger(paths.download_ledger)
    return missing_media(Manifest(paths.manifest), entries, params.data, paths.media)


def _forget(retry: str, *, write: bool) -> int:
    from vatt.config import load_params
    from vatt.data.clips.ledger import JOURNAL, RETRYABLE, STATES, forget, read_ledger, restore

    if retry == "missing":
        lost = len(_missing())
        if write and lost:
            paths = load_params().paths
            restore(paths.media / JOURNAL, paths.download_ledger)
        return lost
    states = RETRYABLE if retry == "retryable" else frozenset(retry.split(","))
    unknown = states - set(STATES)
    if unknown or "ok" in states:
        raise SettingsError(
            f"--retry: no such state: {', '.join(sorted(unknown or states))}",
            hint=f"retryable, missing, or some of {', '.join(STATES[1:])}",
        )
    journal = load_params().paths.media / JOURNAL
    if not write:
        return sum(entry.state in states for entry in read_ledger(journal).values())
    return forget(journal, states)


@click.command(
    epilog="""\b
Examples:
  vattctl ledger                     what was lost, by source and split, and of which classes
  vattctl ledger as_abcdefghijk_30   what happened to a clip, and when
  vattctl ledger --json > ledger.json"""
)
@click.argument("clips", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def ledger(context: click.Context, clips: tuple[str, ...], as_json: bool) -> None:
    """Show which clips are there and what became of the others.

    Every clip of the manifest counts once, in the state that the last stage gave it; `official` is
    the number in the published list.
    """
    enter_project(context)
    from vatt.config import load_params
    from vatt.data.clips.ledger import JOURNAL
    from vatt.data.sources.official import account

    params = load_params()
    paths = params.paths
    downloads = [paths.download_ledger, paths.media / JOURNAL]
    if clips:
        _history(clips, [paths.media / JOURNAL, paths.preprocess_ledger], as_json=as_json)
        return
    found = account(paths.manifest, downloads=downloads, preprocess=paths.preprocess_ledger)
    if as_json:
        click.echo(json.dumps(_as_json(found), indent=2, ensure_ascii=False))
    else:
        _print(found, params)


def _history(clips: tuple[str, ...], files: list[Path], *, as_json: bool) -> None:
    from dataclasses import asdict

    from vatt.data.clips.ledger import read_entries
    from vatt.errors import DataError

    wanted = set(clips)
    rows = [
        {"file": str(file), **{key: value for key, value in asdict(entry).items() if value}}
        for file in files
        for entry in read_entries(file)
        if entry.clip_id in wanted
    ]
    missing = wanted - {row["clip_id"] for row in rows}
    if missing:
        raise DataError(f"no ledger has clip {min(missing)}", hint="the manifest lists the ids")
    if as_json:
        click.echo(json.dumps({"version": JSON_VERSION, "entries": rows}, indent=2))
        return
    for row in rows:
        known = ("time", "clip_id", "stage", "state", "reason", "has", "seconds", "tools")
        counted = ("captions_dropped", "captions_repaired", "encoding")
        facts = [_text(row[name]) for name in known if name in row]
        facts += [f"{name} {row[name]}" for name in counted if name in row]
        click.echo("  ".join(facts))


def _text(value: Any) -> str:
    return "+".join(value) if isinstance(value, tuple) else str(value)


def _as_json(found: "Attrition") -> dict[str, Any]:
    from vatt.data.sources.official import shares

    def row(loss: "Loss") -> dict[str, Any]:
        return {"official": loss.official, "listed": loss.listed, "states": loss.counts()}

    return {
        "version": JSON_VERSION,
        "hash": {"listed": found.listed_hash, "kept": found.kept_hash},
        "total": row(found.total),
        "splits": [
            {"source": source, "split": split, **row(loss)}
            for (source, split), loss in sorted(found.by_split.items())
        ],
        "official": shares(found),
        "classes": [
            {"label": label, "value": value, **row(loss)}
            for (label, value), loss in sorted(found.by_class.items())
        ],
    }


def _print(found: "Attrition", params: "Params") -> None:
    states = list(found.total.counts())
    table = [["source", "split", "official", "listed", *states]]
    for (source, split), loss in sorted(found.by_split.items()):
        official = f"{loss.official:,}" if loss.official else "-"
        table.append([source, split, official, *_numbers(loss, states)])
    table.append(["all", "", "", *_numbers(found.total, states)])
    _echo_table(table, left=2)
    lost = {key: loss for key, loss in found.by_class.items() if loss.states["ok"] < loss.listed}
    if lost:
        click.echo(
            f"\nclasses that lost most clips ({len(lost)} of {len(found.by_class)} lost some)"
        )
        worst = sorted(lost, key=lambda key: (lost[key].states["ok"] / lost[key].listed, key))
        rows = [[*key, *_numbers(lost[key], ["ok"])] for key in worst[:WORST]]
        _echo_table([["label", "class", "listed", "ok"], *rows], left=2)
    for line in _shortfalls(found):
        click.echo(line)
    share = found.total.states["ok"] / max(found.total.listed, 1)
    click.echo(f"\n{share:.1%} kept; data.min_share requires {params.data.min_share:.0%}")
    click.echo(f"hash of the listed clips  {found.listed_hash}")
    click.echo(f"hash of the kept clips    {found.kept_hash}")
    if any(found.total.states[state] for state in ("rate-limited", "network")):
        click.echo("next: vattctl download --retry retryable")


def _shortfalls(found: "Attrition") -> list[str]:
    from vatt.data.sources.official import shares

    lines = [
        f"{row['source']} {row['of']}: {row['kept']:,} of the official {row['official']:,} are here"
        for row in shares(found)
        if row["official"] is not None and row["kept"] < row["official"]
    ]
    return ["", *lines] if lines else []


def _numbers(loss: "Loss", states: list[str]) -> list[str]:
    return [f"{loss.listed:,}", *(f"{loss.states[state]:,}" for state in states)]


def _echo_table(rows: list[list[str]], *, left: int) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())
