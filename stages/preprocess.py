"""Stage preprocess: manifest + media -> shards and a ledger row for each clip."""

import json

from vatt.config import load_params
from vatt.data.clips.ledger import read_ledger
from vatt.data.clips.manifest import manifest_hash, read_manifest
from vatt.data.sharding.shards import TEXT_FACTS, write_shards
from vatt.data.sources.official import account, shares
from vatt.files import atomic_write
from vatt.process import run_stage
from vatt.progress import progress
from vatt.tracking import mlflow
from vatt.tracking.provenance import stage_hash


def main() -> None:
    """Cut, scale and pack every downloaded clip."""
    params = load_params()
    paths, made_from = params.paths, stage_hash("preprocess", params)
    data_hash = manifest_hash(paths.manifest)
    with (
        mlflow.run("preprocess", params, stage_hash=made_from, data_hash=data_hash) as run,
        progress("preprocess", "clips") as tick,
    ):
        counts = write_shards(
            read_manifest(paths.manifest),
            read_ledger(paths.download_ledger),
            params.preprocess,
            params.data,
            machine=params.machine,
            media=paths.media,
            folder=paths.shards,
            ledger=paths.preprocess_ledger,
            seed=params.seed,
            progress=tick,
        )
        run.log(0, {f"clips.{state}": float(count) for state, count in counts.items()})
        left = account(paths.manifest, downloads=[paths.download_ledger],
                       preprocess=paths.preprocess_ledger)  # fmt: skip
        with atomic_write(paths.metrics / "preprocess.json") as path:
            said = json.loads((paths.shards / TEXT_FACTS).read_text(encoding="utf-8"))
            content = {"clips": counts, "text": said, "lists": shares(left)}
            path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    run_stage("preprocess", main)
