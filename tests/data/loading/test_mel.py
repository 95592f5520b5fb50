"""Log mel spectrograms: against the release's arrays, a naive form, and by the ordinary loader."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.corpus import demo_params, make_corpus
from tests.data.loading.test_batches import SAMPLING
from tests.data.sharding.test_shards import write
from vatt.config import AudioParams, parse_params
from vatt.data.loading.batches import Sampling, eval_batches, model_inputs
from vatt.data.loading.reader import ShardIndex
from vatt.errors import SettingsError
from vatt.model.vatt import Classifier
from vatt.senses.audio import STEP_SECONDS, WINDOW_SECONDS, log_mel
from vatt.training.finetune import task_model

GOLDEN = dict(np.load(Path(__file__).parents[2] / "golden" / "data.npz"))


def test_spectrograms_are_the_release_s():
    for wave, golden in zip(GOLDEN["mel/wave"], GOLDEN["mel/normalized"], strict=True):
        ours = log_mel(wave, hz=48000, frames=4, bins=80)
        np.testing.assert_allclose(ours, golden[..., 0], atol=1e-5)


def naive(wave: np.ndarray, hz: int, frames: int, bins: int) -> np.ndarray:
    """A sum for every frequency and a triangle for every bin, value by value."""
    width = round(WINDOW_SECONDS * hz)
    top = min(7600.0, hz / 2)
    mel = lambda f: 1127 * math.log(1 + f / 700)  # noqa: E731
    edges = [mel(80) + (mel(top) - mel(80)) * k / (bins + 1) for k in range(bins + 2)]
    loud = np.zeros((frames, bins))
    for frame in range(frames):
        begin = round(frame * STEP_SECONDS * hz)
        part = np.zeros(width)
        there = wave[begin : begin + width]
        part[: len(there)] = there
        part *= [0.5 - 0.5 * math.cos(2 * math.pi * n / width) for n in range(width)]
        for k in range(1, width // 2 + 1):
            turn = np.exp(-2j * math.pi * k * np.arange(width) / width)
            strength, place = abs((part * turn).sum()), mel(k * hz / width)
            for number in range(bins):
                low, centre, high = edges[number : number + 3]
                weight = min((place - low) / (centre - low), (high - place) / (high - centre))
                loud[frame, number] += max(weight, 0) * strength
    loud = np.log(1 + 1e4 * loud)
    return (loud - loud.min()) / (loud.max() - loud.min())


def test_any_rate_and_a_wave_that_ends_early_agree_with_a_naive_form():
    wave = np.random.default_rng(0).normal(size=700).astype(np.float32) * 0.1
    ours = log_mel(wave, hz=8000, frames=5, bins=12)
    assert ours.shape == (5, 12)
    np.testing.assert_allclose(ours, naive(wave, 8000, 5, 12), atol=1e-5)


def test_a_tone_is_in_the_bin_of_its_pitch_and_silence_is_nothing():
    time = np.arange(48000) / 48000
    low, high = (
        log_mel(np.sin(2 * np.pi * f * time).astype(np.float32), hz=48000, frames=40, bins=80)
        .mean(0)
        .argmax()
        for f in (300, 3000)
    )
    assert 0 < low < high < 79
    assert not log_mel(np.zeros(100, np.float32), hz=48000, frames=3, bins=80).any()


def test_a_spectrogram_model_is_fed_from_shards(tmp_path):
    clips, entries = make_corpus(tmp_path / "media", 3)
    write(tmp_path, clips, entries)
    params = demo_params()
    audio = AudioParams(size="tiny", input="spectrogram", samples=32, patch=(16, 5), mel_bins=80)
    model = params.model.model_copy(update={"audio": audio})
    task = params.finetune.tasks["audio"].model_copy(update={"audio_samples": 32})
    sampling = Sampling.for_task(model, task)
    index = ShardIndex.load(tmp_path / "shards", split="train")
    [batch] = eval_batches(index, sampling, batch_size=3)
    sound = model_inputs(batch)["audio"]
    assert sound.shape == (3, 32, 80) and 0.5 < sound.max() <= 1 and sound.min() == 0
    plain = replace(SAMPLING, samples=round(32 * STEP_SECONDS * 8000), frames=0, candidates=0)
    [waves] = eval_batches(index, plain, batch_size=3)
    own = log_mel(waves.audio[0].numpy() / np.float32(32768), hz=8000, frames=32, bins=80)
    # The last window reaches a little beyond the last step, where the clip goes on.
    np.testing.assert_allclose(sound[0, :30], own[:30], atol=0.02)
    classifier = Classifier(
        task_model(model, task), modality="audio", num_classes=2, head_dropout=0.0
    )
    classifier(sound).sum().backward()
    assert torch.isfinite(classifier.head.weight.grad).all()


@pytest.mark.parametrize(
    "audio",
    [
        {"input": "spectrogram", "mel_bins": None, "patch": [16, 5]},
        {"input": "spectrogram", "mel_bins": 80, "patch": 128},
        {"input": "waveform", "mel_bins": 80, "patch": 128},
    ],
)
def test_settings_that_are_neither_spectrogram_nor_waveform_are_refused(audio):
    raw = demo_params().model_dump(mode="json")
    raw["model"]["audio"] |= audio
    with pytest.raises(SettingsError, match="a spectrogram needs mel_bins"):
        parse_params(raw, source=Path("params.yaml"))
