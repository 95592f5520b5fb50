"""Memory and time of a large manifest: synthetic clips written, sampled, split, hashed, counted.

    python bench/manifest.py                          # 10 million clips, JSON lines
    python bench/manifest.py --clips 1000000 --format parquet

Prints seconds and the peak memory of the process after each step; --json prints JSON.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from vatt.data.clips.manifest import (
    Caption,
    Clip,
    describe_manifest,
    drawn_split,
    read_manifest,
    write_manifest,
)
from vatt.data.sources.choice import sampled

A_VIDEO = 10  # clips


def made_up(count: int) -> Iterator[Clip]:
    """Clips of ten seconds, ten of each video, each with a sentence."""
    for number in range(count):
        url = f"https://www.youtube.com/watch?v={number // A_VIDEO:011d}"
        start = 10.0 * (number % A_VIDEO)
        yield Clip(
            clip_id=f"clip_{number:011d}",
            source="audioset" if number % 5 else "howto100m",
            url=url,
            start=start,
            end=start + 10.0,
            split=drawn_split(url, 0.01, 0.0),
            labels={"task": str(number % 23611)},
            captions=(Caption(start, start + 4.0, f"sentence {number} of some ordinary length"),),
            licence=None,
        )


def peak_mb() -> float:
    """The peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Run the steps one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=10_000_000)
    parser.add_argument("--format", choices=["jsonl", "parquet"], default="jsonl")
    parser.add_argument("--share", type=float, default=0.1, help="share of the clips in the sample")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, part = (Path(folder) / f"{name}.{options.format}" for name in ("whole", "part"))
        steps = {
            "write and split": lambda: write_manifest(whole, made_up(options.clips)),
            "count and hash": lambda: asdict(describe_manifest(whole)),
            "sample": lambda: write_manifest(
                part, sampled(read_manifest(whole), options.share, seed=0)
            ),
            "count and hash the sample": lambda: asdict(describe_manifest(part)),
        }
        results = {}
        for name, step in steps.items():
            begun = time.perf_counter()
            result = step()
            results[name] = {
                "result": result, "seconds": time.perf_counter() - begun, "peak_mb": peak_mb(),
            }  # fmt: skip
            if not options.json:
                found = results[name]
                print(f"{name}: {found['seconds']:.0f} s, peak {found['peak_mb']:.0f} MB: {result}")
    if options.json:
        print(json.dumps({"version": 1, "clips": options.clips, "steps": results}))


if __name__ == "__main__":
    main()
