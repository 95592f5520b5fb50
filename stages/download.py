"""Stage download: a source -> manifest, media, and a ledger row for each clip."""

import json
from dataclasses import asdict

from vatt.config import load_params
from vatt.data.clips.manifest import Manifest, describe_manifest, write_manifest
from vatt.data.fetching.download import download
from vatt.data.sources.choice import open_source
from vatt.data.sources.official import official_counts
from vatt.files import atomic_write
from vatt.process import run_stage
from vatt.progress import progress
from vatt.tracking import mlflow
from vatt.tracking.provenance import stage_hash


def main() -> None:
    """List the clips of the source and fetch their media."""
    params = load_params()
    paths, workers = params.paths, params.machine.workers
    with (
        mlflow.run("download", params, stage_hash=stage_hash("download", params)) as run,
        progress("make the corpus", "clips") as made,
        open_source(
            params.data,
            seed=params.seed,
            corpus=paths.media.with_name("corpus"),
            workers=workers,
            progress=made,
        ) as source,
        progress("download", "clips") as tick,
    ):
        write_manifest(paths.manifest, source.clips)
        corpus = describe_manifest(paths.manifest)
        counts = download(
            Manifest(paths.manifest), source.data, params.machine,
            media=paths.media, ledger=paths.download_ledger, progress=tick,
        )  # fmt: skip
        run.log(0, {f"clips.{state}": float(count) for state, count in counts.items()})
        run.tag("vatt.data_hash", corpus.hash)
        with atomic_write(paths.metrics / "download.json") as path:
            official = official_counts(corpus.sources)
            content = {"clips": counts, "corpus": asdict(corpus), "official": official}
            path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    run_stage("download", main)
