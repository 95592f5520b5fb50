"""A calculation of scaling: a step of the paper's pre-training on more and more GPUs.

    python bench/scaling.py --loader        # measure CPU time and bytes of a clip on this machine
    python bench/scaling.py --clip-ms 20 --clip-kb 1300 [--device h100-80gb --mfu 0.4 ...]

Operations, weights, features and traffic are counted from presets/paper.yaml, by the formulas of
`vattctl plan`; for each number of GPUs, the cheapest setting that fits is used. Every assumption
is an option, and is printed. Nothing overlaps unless --overlap is given.
"""

import argparse
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vatt.config import Params, load_params
from vatt.data.loading.batches import Sampling, train_batches
from vatt.data.loading.reader import ShardIndex
from vatt.plan.forecast import (
    MACHINE,
    Forecast,
    GpuSpeed,
    Seconds,
    cheapest,
    gather_bytes,
    gradient_bytes,
    named_place,
)
from vatt.plan.memory import BUCKET, BatchSettings, count, signal_values
from vatt.training.telemetry import GPUS

os.environ.setdefault("OMP_NUM_THREADS", "1")


PAPER = Path(__file__).parents[1] / "presets" / "paper.yaml"
FEATURE_COLLECTIVES = 9  # three features forward and backward, three flags
HALF = 0.5


@dataclass(frozen=True, slots=True)
class Network:
    """GpuSpeed with two more terms: latency, and traffic that overlaps with the backward pass."""

    speed: GpuSpeed
    latency: float  # seconds of a collective, for each doubling of the processes
    overlap: float  # share of the gradients' traffic

    def __call__(self, setting: BatchSettings) -> Seconds:
        """The seconds of a step."""
        found = self.speed(setting)
        n = setting.processes
        if n == 1:
            return found
        collectives = FEATURE_COLLECTIVES + 2 * math.ceil(self.speed.counts.trained / BUCKET)
        sent = gradient_bytes(self.speed.counts, setting)
        features = gather_bytes(self.speed.model, self.speed.params, n)
        hidden = min(self.overlap * found.network * sent / (sent + features), found.compute / 2)
        waits = collectives * self.latency * math.log2(n)
        return replace(found, network=found.network - hidden + waits)


def plans(
    params: Params, numbers: list[int], options: argparse.Namespace
) -> Iterator[tuple[int, Forecast]]:
    """The cheapest setting for each number of GPUs."""
    place, counts = named_place(options.device), count(params.model)
    assert place.device is not None
    device = replace(
        place.device,
        link=options.link * 1e9 if options.link else place.device.link,
        network=options.network * 1e9 if options.network else place.device.network,
    )
    speed = GpuSpeed(device, params.model, params.pretrain, counts, share=options.mfu)
    for number in numbers:
        network = Network(speed, options.latency_us / 1e6, options.overlap)
        found = cheapest(params, number, place, network, counts)
        if found is not None:
            yield number, found


def with_batch(params: Params, batch_size: int) -> Params:
    """The settings of the paper with another batch size."""
    pretrain = params.pretrain.model_copy(update={"batch_size": batch_size})
    return params.model_copy(update={"pretrain": pretrain})


def study(params: Params, options: argparse.Namespace) -> None:
    """Print the table of one batch size and the limits of its scaling."""
    batch = params.pretrain.batch_size
    counts = count(params.model)
    picture, sound = signal_values(params.model)
    print(f"\n### Batch {batch:,}\n")
    columns = [
        *("GPUs", "clips each", "at once", "compute", "loss", "update", "network", "step, ms"),
        *("clips/s", "efficiency", "gather, MB", "gradients, MB", "memory, GiB"),
        *("loader cores", "per GPU", "shards, GB/s", "to a GPU, GB/s"),
    ]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    alone: float | None = None
    for number, found in plans(params, options.gpus, options):
        alone = alone or found.seconds.total * number
        setting, seconds, rate = found.setting, found.seconds, found.samples_per_second
        cores = rate * options.clip_ms / 1e3
        cells = [
            f"{number:,}",
            f"{setting.rows(batch):,}",
            f"{setting.at_once(batch)}{' (checkpointed)' * setting.activation_checkpointing}",
            *(
                f"{1e3 * value:.1f}"
                for value in (seconds.compute, seconds.loss, seconds.update, seconds.network)
            ),
            f"{1e3 * seconds.total:.0f}",
            f"{rate:,.0f}",
            f"{alone / (number * seconds.total):.0%}",
            f"{gather_bytes(params.model, params.pretrain, number) / 1e6:.0f}",
            f"{gradient_bytes(counts, setting) / 1e6:,.0f}",
            f"{found.memory.total / 2**30:.0f}",
            f"{cores:,.0f}",
            f"{cores / number:.1f}",
            f"{rate * options.clip_kb / 1e6:.2f}",
            f"{rate / number * (picture + 2 * sound) / 1e9:.2f}",
        ]
        print("| " + " | ".join(cells) + " |")
    print("\n" + limits(params, options))


def limits(params: Params, options: argparse.Namespace) -> str:
    """The numbers of GPUs (powers of two) from which more GPUs help less."""
    powers = [2**power for power in range(int(math.log2(params.pretrain.batch_size)) + 1)]
    found = dict(plans(params, powers, options))
    alone = next(iter(found.values())).seconds.total * next(iter(found))

    def first(true_of: list[int]) -> str:
        return f"{true_of[0]:,} GPUs" if true_of else f"none up to {powers[-1]:,}"

    busy = {number: one.seconds for number, one in found.items()}
    half = [n for n, one in busy.items() if alone / (n * one.total) < HALF]
    network = [n for n, one in busy.items() if one.network > one.compute]
    flat = [n for n, one in busy.items() if 2 * n in busy and busy[2 * n].total > 0.8 * one.total]
    return (
        f"- efficiency falls below one half: {first(half)}\n"
        f"- the network takes longer than the encoders: {first(network)}\n"
        f"- twice as many would save less than a fifth of the time: {first(flat)}"
    )


def assumptions(params: Params, options: argparse.Namespace) -> None:
    """Print everything that was counted, measured or assumed."""
    device = GPUS[options.device]
    counts = count(params.model)
    link, network = options.link or device.link / 1e9, options.network or device.network / 1e9
    print(f"counted: {counts.trained / 1e6:.0f} million weights; measured: a clip takes "
          f"{options.clip_ms:g} ms of one core and {options.clip_kb:g} kB of shards")  # fmt: skip
    print(f"assumed: {device.name}, bf16 {device.bf16_flops / 1e12:g} and fp32 "
          f"{device.fp32_flops / 1e12:g} TFLOP/s, memory {device.bandwidth / 1e12:g} TB/s (data "
          f"sheet); the encoders reach {options.mfu:.0%} of bf16 at any number of clips; "
          f"{link:g} GB/s to another GPU among {MACHINE} of one machine, {network:g} GB/s for "
          f"each GPU beyond; {options.latency_us:g} us for each collective and doubling; "
          f"{options.overlap:.0%} of the gradients' traffic hidden")  # fmt: skip


def loader(clips: int, samples: int) -> None:
    """CPU milliseconds of a sample as in the paper, and bytes of a stored clip."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from bench.loader import make_corpus

    params = load_params(PAPER)
    sampling = replace(
        Sampling.for_pretraining(params.model, params.pretrain), candidates=5, words=16
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_corpus(folder, clips, params)
        for form in ("h264", "jpeg"):
            shards = folder / form
            stored = sum(path.stat().st_size for path in shards.rglob("*.tar")) / clips
            index = ShardIndex.load(shards, split="train")
            source = train_batches(index, sampling, batch_size=8, steps=range(10**6), seed=0)
            next(source)
            began = time.process_time()
            for _ in range(samples // 8):
                next(source)
            spent = (time.process_time() - began) / (samples // 8 * 8)
            source.close()
            assert len(index.rows) == clips
            print(f"{form}: {1e3 * spent:.1f} ms of one core and {stored / 1e3:.0f} kB per clip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loader", action="store_true", help="measure the cost of a clip here")
    parser.add_argument("--clip-ms", type=float, help="CPU milliseconds of a sample")
    parser.add_argument("--clip-kb", type=float, help="kB read from the shards for a sample")
    parser.add_argument("--device", choices=[*GPUS], default="h100-80gb")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the bf16 peak")
    parser.add_argument("--link", type=float, help="GB/s in a machine; default: data sheet")
    parser.add_argument("--network", type=float, help="GB/s for each GPU; default: a usual value")
    parser.add_argument("--latency-us", type=float, default=20.0)
    parser.add_argument("--overlap", type=float, default=0.0, help="share of gradients' traffic")
    parser.add_argument("--batch", type=int, nargs="+", default=[2048])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 256])
    options = parser.parse_args()
    if options.loader:
        loader(clips=16, samples=64)
        return
    if options.clip_ms is None or options.clip_kb is None:
        parser.error("--clip-ms and --clip-kb are needed; --loader measures them")
    params = load_params(PAPER)
    assumptions(params, options)
    for batch_size in options.batch:
        study(with_batch(params, batch_size), options)


if __name__ == "__main__":
    main()
