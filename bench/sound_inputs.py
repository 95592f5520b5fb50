"""Which input lets a sound tower learn spoken digits from labels alone? Prints a table.

    python bench/sound_inputs.py --fsdd DIR [--steps 400] [--seed 0]

DIR contains recordings/<digit>_<speaker>_<take>.wav (Free Spoken Digit Dataset). The tiny tower of
the demo is trained from scratch on the 2,700 train takes, once for each input, and tested on the
300 official test takes: batches of 32, Adam, a learning rate of 3e-4 with a warm-up of a tenth of
the steps and a cosine, bf16, one thread. What labels hardly teach, pictures will not.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from real_audio import HZ, RESAMPLES, TEST_TAKES, WINDOW, cell, window
from torch import Tensor

from vatt.config import ModelParams, load_params
from vatt.metrics import Metric, measured
from vatt.model.vatt import Classifier
from vatt.senses.audio import log_mel

DIGITS, BATCH, RATE = 10, 32, 3e-4
PRESET = Path(__file__).parents[1] / "presets" / "demo.yaml"
SPECTROGRAM = {"size": "tiny", "input": "spectrogram", "samples": 38}
WAVEFORM = {"size": "tiny", "input": "waveform", "samples": WINDOW, "patch": 128, "mel_bins": None}


@dataclass(frozen=True, slots=True)
class Input:
    """A form of the sound: the settings of `model.audio`, and how much louder it is made."""

    words: str
    audio: dict[str, Any]
    gain: float = 1.0


INPUTS = (
    Input("spectrogram, patch 16x5 of 80 bins", {**SPECTROGRAM, "patch": [16, 5], "mel_bins": 80}),
    Input("spectrogram, patch 2x40 of 40 bins", {**SPECTROGRAM, "patch": [2, 40], "mel_bins": 40}),
    Input("waveform, patch 128, as recorded", WAVEFORM),
    Input("waveform, patch 128, five times as loud", WAVEFORM, gain=5.0),
)


def main() -> None:
    """Read, train, test, print."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--fsdd", type=Path, required=True)
    options.add_argument("--steps", type=int, default=400)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    torch.set_num_threads(1)
    waves, digits, is_test = recordings(given.fsdd)
    print(f"| input | right of {int(is_test.sum())} test takes, {given.steps} steps |\n|---|---|")
    for one in INPUTS:
        hits = trained(one, waves, digits, is_test, steps=given.steps, seed=given.seed)
        print(f"| {one.words} | {cell(accuracy(hits))} |", flush=True)


def recordings(folder: Path) -> tuple[np.ndarray, Tensor, np.ndarray]:
    """Waves (N, WINDOW) float32, digits (N,), and which are test takes (N,)."""
    files = sorted((folder / "recordings").glob("*.wav"))
    names = [file.stem.split("_") for file in files]
    waves = [window(file) for file in files]
    padded = [np.pad(wave, (0, WINDOW - len(wave))) for wave in waves]
    digits = torch.tensor([int(digit) for digit, _, _ in names])
    return np.stack(padded), digits, np.array([int(take) < TEST_TAKES for _, _, take in names])


def inputs_of(one: Input, waves: np.ndarray) -> Tensor:
    """What the tower reads."""
    if one.audio["input"] == "waveform":
        return torch.from_numpy(waves * np.float32(one.gain))
    shape: dict[str, Any] = {"frames": one.audio["samples"], "bins": one.audio["mel_bins"]}
    return torch.from_numpy(np.stack([log_mel(wave, hz=HZ, **shape) for wave in waves]))


def trained(
    one: Input, waves: np.ndarray, digits: Tensor, is_test: np.ndarray, *, steps: int, seed: int
) -> np.ndarray:
    """Whether the trained tower is right, for each test take."""
    torch.manual_seed(seed)
    chance = np.random.default_rng(seed)
    demo = load_params(PRESET).model.model_dump()
    params = ModelParams.model_validate({**demo, "audio": one.audio})
    model = Classifier(params, modality="audio", num_classes=DIGITS, head_dropout=0.5)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    sounds, train = inputs_of(one, waves), np.flatnonzero(~is_test)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / (steps / 10)) * cosine(step / steps)
        chosen = torch.from_numpy(chance.choice(train, BATCH, replace=False))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(sounds[chosen])
        loss = F.cross_entropy(logits.float(), digits[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = model.eval()(sounds[is_test]).argmax(1)
    return np.asarray(found == digits[is_test])


def cosine(done: float) -> float:
    """From 1 to 0."""
    return float(0.5 * (1 + np.cos(np.pi * done)))


def accuracy(hits: np.ndarray) -> Metric:
    """The share, with its interval."""
    return measured(hits, chance=1 / DIGITS, resamples=RESAMPLES, seed=0)


if __name__ == "__main__":
    main()
