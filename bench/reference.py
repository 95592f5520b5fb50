"""The tiny reference model of the pre-training benches, its settings and batches, and their clock.

8.2 million weights; video 8 x 64 x 64 (patch 4 x 16 x 16), audio of 16,000 samples (patch 128),
sentences of 16 words from 8,192; bf16, all tokens kept. What is compared runs in turn within each
round, so that a busy machine slows both; a time is the median over rounds, and the spread from the
fastest round to the slowest is shown.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vatt.config import (
    AudioParams,
    MachineParams,
    ModelParams,
    PretrainParams,
    TextParams,
    VideoParams,
    load_params,
)
from vatt.data.loading.batches import Batch

ROOT = Path(__file__).parents[1]
DEMO = load_params(ROOT / "presets" / "demo.yaml")
RATE = 1e-4
Step = Callable[[], object]


def reference_model() -> ModelParams:
    """The tiny reference model."""
    return ModelParams(
        recipe="paper",
        backbone="specific",
        video=VideoParams(size="tiny", frames=8, frame_size=64, patch=(4, 16, 16)),
        audio=AudioParams(size="tiny", input="waveform", samples=16_000, patch=128, mel_bins=None),
        text=TextParams(size="tiny", words=16, vocabulary=8192),
        va_dim=512,
        vt_dim=256,
        dropout=0.0,
    )


def settings(**changes: Any) -> PretrainParams:
    """The demo's pre-training, all tokens kept."""
    base = {"drop_rate": 0.0, "precision": "bf16", "text_candidates": 1, "batch_size": 32}
    return PretrainParams.model_validate(DEMO.pretrain.model_dump() | base | changes)


def machine(**changes: Any) -> MachineParams:
    """The demo's machine."""
    return MachineParams.model_validate(DEMO.machine.model_dump() | changes)


def random_batch(model: ModelParams, clips: int, candidates: int) -> Batch:
    """Noise of the right shapes."""
    size = model.video.frame_size
    assert isinstance(size, int)
    words = model.text.vocabulary
    torch.manual_seed(1)
    return Batch(
        clip_ids=[str(number) for number in range(clips)],
        signals={
            "video": torch.randint(
                256, (clips, model.video.frames, size, size, 3), dtype=torch.uint8
            ),
            "audio": torch.randint(
                -(2**15), 2**15, (clips, model.audio.samples), dtype=torch.int16
            ),
            "text": torch.randint(1, words, (clips, candidates, model.text.words)),
        },
        present=dict.fromkeys(("video", "audio"), torch.ones(clips, dtype=torch.bool)),
        labels={},
    )


def compare(title: str, steps: dict[str, Step], rounds: int) -> list[float]:
    """Seconds of the steps taken in turn, printed; returns each round's first / second."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - began)
    first, second = times.values()
    ratios = [one / other for one, other in zip(first, second, strict=True)]
    print(f"\n{title}")
    for name, values in times.items():
        print(f"  {name:44} {show(values, 'ms', 1e3)}")
    print(f"  {' / '.join(steps):44} {show(ratios, 'x', 1)}")
    return ratios


def show(values: list[float], unit: str, scale: float) -> str:
    """The median and the spread."""
    low, middle, high = (scale * f(values) for f in (min, statistics.median, max))
    return f"{middle:8.2f} {unit} ({low:.2f} to {high:.2f})"


def mean_step(times: list[float]) -> float:
    """Seconds from one batch to the next, without the first ones."""
    return (times[-1] - times[3]) / (len(times) - 4)


def run_parts(parts: Mapping[str, Callable[[int], None]], description: str) -> None:
    """Run the parts that the command line names, or all."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("part", nargs="*", metavar="part", help=f"of {', '.join(parts)}; or all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if unknown := set(options.part) - set(parts):
        parser.error(
            f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(parts)}"
        )
    torch.set_num_threads(options.threads)
    for name in options.part or parts:
        parts[name](options.rounds)
