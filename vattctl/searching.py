"""Use what was learned: embed a video, search one's own videos by words."""

import hashlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import click

from vatt.errors import DataError
from vattctl.params import enter_project

VERSION = 1
KEPT = Path("runs/search")  # indices, by folder; safe to delete

_checkpoint = click.option(
    "--checkpoint",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A pre-trained checkpoint's folder; without it, the project's last one.",
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
  vattctl embed cat.mp4 --checkpoint runs/bbs --json""",
)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_checkpoint
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the whole vectors.")
@click.pass_context
def embed(context: click.Context, file: Path, checkpoint: Path | None, as_json: bool) -> None:
    """Print where the moments of a video FILE lie in the video-text space.

    Each vector is of length 1: a product of two is their cosine.
    """
    file, checkpoint = file.resolve(), checkpoint and checkpoint.resolve()
    enter_project(context)
    from vatt.config import load_params
    from vatt.progress import progress
    from vatt.search import embed_file

    params = load_params()
    embedder = _embedder(checkpoint, params.paths.pretrained)
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=KEPT) as work, progress("cut", "clips") as tick:
        found = embed_file(embedder, file, params, work=Path(work), progress=tick)
    if as_json:
        rows = [{**asdict(moment), "vector": vector.tolist()} for moment, vector in found]
        click.echo(json.dumps({"version": VERSION, "space": "video_vt", "moments": rows}))
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
    help="A folder of videos, or an index made of one.",
)
@_checkpoint
@click.option("--top", default=10, show_default=True, type=click.IntRange(1), help="Moments shown.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def search(
    context: click.Context,
    query: str,
    place: Path,
    checkpoint: Path | None,
    top: int,
    as_json: bool,
) -> None:
    """Find the moments of your own videos that fit the words of QUERY.

    A folder is indexed once and again when its files or the checkpoint have changed.
    """
    place, checkpoint = place.resolve(), checkpoint and checkpoint.resolve()
    enter_project(context)
    from vatt.config import load_params
    from vatt.progress import progress
    from vatt.search import build_index, is_index
    from vatt.search import search as find

    params = load_params()
    embedder = _embedder(checkpoint, params.paths.pretrained)
    index = place
    if not is_index(place):
        index = KEPT / hashlib.sha256(str(place).encode()).hexdigest()[:12]
        with progress("index", "videos") as tick:
            facts = build_index(embedder, place, params, out=index, progress=tick)
        if facts["left_out"]:
            ledger = index.with_name(f".{index.name}.work") / "preprocess.ledger.jsonl"
            click.echo(f"{facts['left_out']} files show nothing: {ledger} says why", err=True)
    hits = find(embedder, index, query, count=top)
    if as_json:
        rows = [{**asdict(hit.moment), "cosine": hit.cosine} for hit in hits]
        content = {"version": VERSION, "query": query, "index": str(index), "moments": rows}
        click.echo(json.dumps(content, indent=2, ensure_ascii=False))
        return
    for hit in hits:
        span = f"{hit.moment.start:.1f} to {hit.moment.end:.1f} s"
        click.echo(f"{hit.cosine:+.3f}  {span:>20}  {hit.moment.file}")
    click.echo(f"index: {index}", err=True)
