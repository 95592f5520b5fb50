"""Weights in and out, checks of the model, and search in one's own videos."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vatt.errors import DataError, SettingsError, redact
from vattctl.params import (
    JSON_VERSION,
    CheckpointFolder,
    dry_run_option,
    enter_project,
    print_json,
    print_rich,
)

if TYPE_CHECKING:
    from vatt.release.convert import ImportReport
    from vatt.verify.row import Check

SHOWN_KEYS = 20  # of each kind of mismatch


def parse_heads(text: str) -> Mapping[str, int]:
    """`video=3,audio=4,text=3`, or one number for the only encoder."""
    from vatt.release.recognise import ONLY

    heads = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        if not number.strip().isdecimal() or not 0 < int(number) <= 1024:
            raise SettingsError(
                f"--heads {text}: '{part}' is not a number of heads",
                hint="write 3, or video=3,audio=4,text=3",
            )
        heads[name.strip() or ONLY] = int(number)
    return heads


@click.command(
    "import",
    epilog="""\b
Examples:
  vattctl import ckpt-500000 --out runs/bbs
  vattctl import gs://tf_model_garden/vision/vatt/pretrain/tx_fac_bbs/ckpt-500000 --out runs/bbs
  vattctl import small/ckpt-1 --out runs/small --heads video=4,audio=3,text=2""",
)
@click.argument("prefix")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--heads",
    metavar="N | TOWER=N,...",
    help="Attention heads, unless each is 64 wide: one number for the only encoder, or "
    "video=N,audio=N,text=N.",
)
@click.option(
    "--vocab",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The word list, copied into the folder.",
)
@click.option("--allow-partial", is_flag=True, help="Convert what fits; initialise the rest.")
@click.option("--force", is_flag=True, help="Overwrite --out.")
@click.option("--dry-run", is_flag=True, help="Check every key; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def import_command(
    prefix: str,
    out: Path,
    heads: str | None,
    vocab: Path | None,
    allow_partial: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Convert a released TensorFlow checkpoint.

    PREFIX is the part of its file names before `.index`, or an address (https, gs, s3). Every key
    is checked; a checkpoint that matches only in part is refused. TensorFlow is not needed.
    """
    from vatt.progress import progress
    from vatt.release.convert import import_checkpoint
    from vatt.release.fetch import download_folder, fetch_checkpoint, is_url

    _refuse_existing(out, force=force or dry_run)
    local, downloads = Path(prefix.removesuffix(".index")), None
    if is_url(prefix):
        downloads = download_folder(prefix, out)
        with progress("fetch", "bytes") as tick:
            local = fetch_checkpoint(prefix, downloads, progress=tick)
    with progress("convert", "weights") as tick:
        imported = import_checkpoint(
            local,
            None if dry_run else out,
            heads=parse_heads(heads) if heads else {},
            source=prefix,
            vocabulary=vocab,
            allow_partial=allow_partial,
            progress=tick,
        )
    if downloads is not None and not dry_run:
        shutil.rmtree(downloads)
    written = None if dry_run else str(out)
    if as_json:
        content = {"version": JSON_VERSION, **asdict(imported), "source": prefix, "out": written}
        click.echo(json.dumps(content, indent=2))
    else:
        click.echo(_describe(imported, written))


def _refuse_existing(out: Path, *, force: bool) -> None:
    """Without --force, only an empty folder or an earlier import is overwritten."""
    if out.exists() and not out.is_dir():
        raise SettingsError(f"{out} is a file, not a folder")
    if force or not out.exists() or not any(out.iterdir()):
        return
    config = out / "config.json"
    try:
        is_import = "source" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        is_import = False
    if not is_import:
        raise SettingsError(
            f"{out} exists and is not an imported checkpoint",
            hint="give another --out, or --force to overwrite it",
        )


def _describe(imported: "ImportReport", out: str | None) -> str:
    keys = imported.keys
    others = ", ".join(f"{number} {kind}" for kind, number in keys.not_weights.items())
    lines = [
        f"model       {imported.model}, {imported.parameters / 1e6:.2f} M parameters",
        f"heads       {', '.join(f'{name} {n}' for name, n in imported.heads.items())}",
        f"keys        {len(keys.used)} used, {len(keys.unused)} unused, "
        f"{len(keys.missing)} missing, {len(keys.shape)} of another shape",
        f"not weights {others}",
    ]
    for title, found in (("unused", keys.unused), ("missing", keys.missing), ("shape", keys.shape)):
        lines += [f"  {title}: {key}" for key in found[:SHOWN_KEYS]]
        if len(found) > SHOWN_KEYS:
            lines.append(f"  {title}: and {len(found) - SHOWN_KEYS} more")
    lines += [f"sha256      {digest}  {name}" for name, digest in imported.sha256.items()]
    if out is None:
        lines.append("nothing written (--dry-run)")
    else:
        lines += [
            f"written     {out}",
            f"next        python -c \"import vatt; vatt.load('{out}')\"",
        ]
    return "\n".join(lines)


@click.command(
    "export",
    epilog="""\b
Examples:
  vattctl export runs/checkpoints/pretrained --to onnx --out runs/onnx
  vattctl export runs/checkpoints/pretrained --to huggingface-folder --out runs/hf""",
)
@click.argument("folder", type=CheckpointFolder(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--to", required=True, type=click.Choice(["safetensors", "onnx", "huggingface-folder"])
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--licence", help="Of the weights, for the model card: a name such as apache-2.0.")
@click.option("--force", is_flag=True, help="Overwrite --out.")
@dry_run_option("Check the folders; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def export_command(
    context: click.Context,
    folder: Path,
    to: str,
    out: Path,
    licence: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write a checkpoint FOLDER in another form.

    An ONNX graph is run with onnxruntime and compared; exit code 1 when it differs. A Hugging Face
    folder loads with transformers' AutoModel; its model card describes the project's run.
    """
    from vatt.checkpoint import load_config
    from vatt.export import FORMS, TOLERANCE

    if out.exists() and not force and (not out.is_dir() or any(out.iterdir())):
        raise SettingsError(f"{out} exists", hint="give another --out, or --force to overwrite it")
    if out.resolve() == folder.resolve():
        raise SettingsError("--out is the checkpoint's own folder", hint="give another --out")
    folder, out = folder.resolve(), out.resolve()
    if dry_run:
        load_config(folder)  # raises where it is no checkpoint
        _would_write(f"{folder} as {to}", out, as_json=as_json)
        return
    card = {"run": _run_card(context, folder), "licence": licence}
    comparisons = FORMS[to](folder, out, **(card if to == "huggingface-folder" else {}))
    files = {file.name: file.stat().st_size for file in sorted(out.iterdir())}
    if as_json:
        rows = [asdict(comparison) for comparison in comparisons]
        content = {"version": JSON_VERSION, "form": to, "out": str(out), "files": files}
        click.echo(json.dumps({**content, "tolerance": TOLERANCE, "compared": rows}, indent=2))
        return
    for row in comparisons:
        click.echo(f"{row.graph} {row.output}, {row.clips} clips: differs by {row.difference:.1e}")
    for name, size in files.items():
        click.echo(f"{size:>13,} bytes  {out / name}")


def _run_card(context: click.Context, folder: Path) -> str:
    """The run behind a checkpoint in Markdown; empty when it is not one of this project."""
    try:
        enter_project(context)
    except SettingsError:
        return ""
    from vatt.config import load_params
    from vatt.report.page import model_card

    params = load_params()
    pretrained, finetuned = params.paths.pretrained.resolve(), params.paths.finetuned.resolve()
    is_ours = folder == pretrained or finetuned in folder.parents
    return model_card(params.paths, params.report) if is_ours else ""


@click.command(
    "push",
    epilog="""\b
Examples:
  vattctl push runs/checkpoints/pretrained file:///mnt/models/vatt
  vattctl push runs/hf s3://bucket/models/vatt
  vattctl push runs/hf hf://me/vatt""",
)
@click.argument("folder", type=CheckpointFolder(exists=True, file_okay=False, path_type=Path))
@click.argument("address")
@click.option("--dry-run", is_flag=True, help="List the files; copy nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def push_command(folder: Path, address: str, dry_run: bool, as_json: bool) -> None:
    """Copy a checkpoint FOLDER to an address, from which `vatt.load` and `pull` take it.

    ADDRESS is a bucket, a hub or any other place that fsspec knows; credentials come from the usual
    variables and files of each.
    """
    from vatt.export import push
    from vatt.progress import progress

    if dry_run:
        sums = dict.fromkeys(file.name for file in sorted(folder.iterdir()) if file.is_file())
    else:
        with progress("push", "files") as tick:
            sums = dict(push(folder, address, progress=tick))
    _print_files(sums, {"pushed": None if dry_run else redact(address)}, as_json=as_json)


@click.command(
    "pull",
    epilog="""\b
Examples:
  vattctl pull s3://bucket/models/vatt --out runs/vatt
  vattctl pull hf://me/vatt --out runs/vatt""",
)
@click.argument("address")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--force", is_flag=True, help="Overwrite --out.")
@dry_run_option("Check the folder; fetch nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def pull_command(address: str, out: Path, force: bool, dry_run: bool, as_json: bool) -> None:
    """Copy a checkpoint from an ADDRESS to a local folder, and check its files."""
    from vatt.export import pull
    from vatt.progress import progress

    if out.exists() and not force and (not out.is_dir() or any(out.iterdir())):
        raise SettingsError(f"{out} exists", hint="give another --out, or --force to overwrite it")
    if dry_run:
        _would_write(redact(address), out, as_json=as_json)
        return
    with progress("pull", "files") as tick:
        sums = dict(pull(address, out, progress=tick))
    if not sums:
        click.echo("not checked: the address has no checksums.json (vattctl push)", err=True)
    _print_files(sums, {"pulled": redact(address), "out": str(out)}, as_json=as_json)


def _would_write(what: str, out: Path, *, as_json: bool) -> None:
    """The answer to --dry-run of a command that writes a folder."""
    if as_json:
        print_json(dry_run=True, source=what, out=str(out))
    else:
        click.echo(f"would write {what} to {out}\nnothing written (--dry-run)")


def _print_files(
    sums: Mapping[str, str | None], facts: dict[str, object], *, as_json: bool
) -> None:
    if as_json:
        content = {"version": JSON_VERSION, **facts, "sha256": sums}
        click.echo(json.dumps(content, indent=2))
        return
    for name, digest in sums.items():
        click.echo(f"{(digest or '')[:12]:12}  {name}")
    for name, value in facts.items():
        click.echo(f"{name}: {value or 'nothing (--dry-run)'}")


@click.command(
    "verify",
    epilog="""\b
Examples:
  vattctl verify
  vattctl verify --failed                  only rows that do not pass
  vattctl verify --json > verify.json""",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--failed", is_flag=True, help="Show only rows that do not pass.")
@click.pass_context
def verify_command(context: click.Context, as_json: bool, failed: bool) -> None:
    """Compare parameters, operations, schedules, tokens and losses with the paper.

    Needs no data. Exit code 1 when a row fails.
    """
    from vatt.progress import progress
    from vatt.verify import verify

    with progress("verify", "parts") as tick:
        rows = verify(tick)
    shown = [row for row in rows if row.state != "pass"] if failed else rows
    if as_json:
        content = {"version": JSON_VERSION, "rows": [asdict(row) for row in shown]}
        click.echo(json.dumps(content, indent=2))
    else:
        _print(shown)
        states = [row.state for row in rows]
        counts = ", ".join(f"{states.count(s)} {s}" for s in ("pass", "fail", "not run"))
        click.echo(f"{len(rows)} rows: {counts}", err=True)
    if any(row.state == "fail" for row in rows):
        context.exit(1)


def _print(rows: list["Check"]) -> None:
    from rich.table import Table

    columns = ("state", "quantity", "source", "unit", "paper", "expected", "ours", "difference")
    table = Table(box=None, pad_edge=False)
    for column in columns:
        is_number = column in columns[4:]
        table.add_column(
            column, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold"
        )
    for row in rows:
        name = row.name if row.state == "pass" else f"{row.name} ({row.reason})"
        numbers = (row.paper, row.expected, row.ours, row.difference)
        table.add_row(row.state, name, row.source, row.unit, *map(_number, numbers))
    print_rich(table)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.7g}"


INDICES = Path("runs/search")  # indices, by folder; safe to delete

_checkpoint = click.option(
    "--checkpoint",
    type=CheckpointFolder(exists=True, file_okay=False, path_type=Path),
    help="A pre-trained checkpoint's folder or address in MLflow; default: the project's last.",
)


def _embedder(given: Path | None, trained: Path):  # type: ignore[no-untyped-def]
    from vatt.search import Embedder

    if given is None and not trained.is_dir():
        raise DataError(
            f"{trained} is missing: nothing is pre-trained yet",
            hint="run `vattctl pretrain`, or name a folder with --checkpoint",
        )
    return Embedder(given or trained)


@click.command(
    epilog="""\b
Examples:
  vattctl embed cat.mp4
  vattctl embed cat.mp4 --checkpoint runs/bbs --json
  vattctl embed cat.mp4 --checkpoint models:/vatt/1""",
)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_checkpoint
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the complete vectors.")
@click.pass_context
def embed(context: click.Context, file: Path, checkpoint: Path | None, as_json: bool) -> None:
    """Print the embeddings of a video FILE's moments in the video-text space.

    Each vector has length 1, so the dot product of two is their cosine.
    """
    file, checkpoint = file.resolve(), checkpoint and checkpoint.resolve()
    enter_project(context)
    from vatt.config import load_params
    from vatt.progress import progress
    from vatt.search import embed_file

    params = load_params()
    embedder = _embedder(checkpoint, params.paths.pretrained)
    INDICES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=INDICES) as work, progress("cut", "clips") as tick:
        found = embed_file(embedder, file, params, work=Path(work), progress=tick)
    if as_json:
        rows = [{**asdict(moment), "vector": vector.tolist()} for moment, vector in found]
        click.echo(json.dumps({"version": JSON_VERSION, "space": "video_vt", "moments": rows}))
        return
    for moment, vector in found:
        first = " ".join(f"{value:+.3f}" for value in vector[:6])
        click.echo(f"{moment.start:8.1f} to {moment.end:.1f} s   {first} ... ({len(vector)})")


@click.command(
    epilog="""\b
Examples:
  vattctl search "a dog jumps" --in ~/videos
  vattctl search "pour the milk" --in ~/videos --top 20 --json""",
)
@click.argument("query")
@click.option(
    "--in",
    "place",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder of videos, or its index.",
)
@_checkpoint
@click.option("--top", default=10, show_default=True, type=click.IntRange(1), help="Moments shown.")
@dry_run_option("Say how many files would be indexed first; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def search(
    context: click.Context,
    query: str,
    place: Path,
    checkpoint: Path | None,
    top: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Find the moments of your own videos that fit the words of QUERY.

    A folder is indexed once, and again when its files or the checkpoint change.
    """
    place, checkpoint = place.resolve(), checkpoint and checkpoint.resolve()
    enter_project(context)
    from vatt.config import load_params
    from vatt.progress import progress
    from vatt.search import build_index, files_to_index, is_index
    from vatt.search import search as find

    params = load_params()
    embedder = _embedder(checkpoint, params.paths.pretrained)
    known = is_index(place)
    index = place if known else INDICES / hashlib.sha256(str(place).encode()).hexdigest()[:12]
    if dry_run:
        files = 0 if known else files_to_index(embedder, place, params, out=index)
        _would_index(files, index, as_json=as_json)
        return
    if not known:
        with progress("index", "moments") as tick:
            facts = build_index(embedder, place, params, out=index, progress=tick)
        if facts["left_out"]:
            ledger = index.with_name(f".{index.name}.work") / "preprocess.ledger.jsonl"
            click.echo(f"{facts['left_out']} files could not be indexed: see {ledger}", err=True)
    hits = find(embedder, index, query, count=top)
    if as_json:
        rows = [{**asdict(hit.moment), "cosine": hit.cosine} for hit in hits]
        content = {"version": JSON_VERSION, "query": query, "index": str(index), "moments": rows}
        click.echo(json.dumps(content, indent=2, ensure_ascii=False))
        return
    for hit in hits:
        span = f"{hit.moment.start:.1f} to {hit.moment.end:.1f} s"
        click.echo(f"{hit.cosine:+.3f}  {span:>20}  {hit.moment.file}")
    click.echo(f"columns: cosine of words and picture, moment, file; index: {index}", err=True)


def _would_index(files: int, index: Path, *, as_json: bool) -> None:
    """The answer to --dry-run of a search."""
    if as_json:
        print_json(dry_run=True, files=files, index=str(index))
        return
    click.echo(f"would index {files} files in {index}" if files else f"{index} is up to date")
    click.echo("nothing written (--dry-run)")
