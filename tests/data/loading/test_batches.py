"""Batches: the same for any workers, cache, processes and starts; nothing lost or doubled."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from tests.data.corpus import demo_params, make_corpus, sha256_of, write_media
from tests.data.sharding.test_shards import write
from vatt.data.loading.batches import (
    Batch,
    Loading,
    Sampling,
    eval_batches,
    model_inputs,
    train_batches,
)
from vatt.data.loading.reader import ShardIndex
from vatt.errors import DataError, SettingsError
from vatt.senses.audio import resample
from vatt.senses.video import frame_indices

PARAMS = demo_params()
SAMPLING = Sampling(
    frames=4,
    fps=10,
    frame_size=(24, 24),
    samples=3200,
    audio_hz=None,
    candidates=3,
    words=4,
    augmentation=PARAMS.pretrain.augmentation.model_copy(
        update={"crop_area": (0.3, 0.9), "flip": True, "brightness": 0.1, "hue": 0.2}
    ),
)
STEPS = 7


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("batches")
    write(root, *make_corpus(root / "media", 14, tests=4))
    return root / "shards"


def train(
    shards, first_step=0, *, steps=STEPS, sampling=SAMPLING, clip_ids=None, **changes
) -> list[Batch]:
    index = ShardIndex.load(shards, split="train", keys=clip_ids)
    settings = {"batch_size": 6, "seed": 3, **changes}
    return list(train_batches(index, sampling, steps=range(first_step, steps), **settings))


def evaluate(shards, split="train", *, sampling=SAMPLING, **settings) -> list[Batch]:
    return list(eval_batches(ShardIndex.load(shards, split=split), sampling, **settings))


def same(one: Batch, two: Batch) -> bool:
    return (
        one.clip_ids == two.clip_ids
        and one.labels == two.labels
        and all(map(torch.equal, one.tensors(), two.tensors()))
    )


def test_a_batch_has_the_promised_shapes(shards):
    batch = train(shards, steps=1)[0]
    assert batch.video.shape == (6, 4, 24, 24, 3) and batch.video.dtype == torch.uint8
    assert batch.audio.shape == (6, 3200) and batch.audio.dtype == torch.int16
    assert batch.text.shape == (6, 3, 4) and batch.text.dtype == torch.int64
    assert (
        batch.has_video.all() and batch.has_audio.all() and batch.changes["video"].shape == (6, 4)
    )
    assert (batch.text[:, :2] > 1).any(-1).all() and (batch.text[:, 2] == 0).all()
    number = [int(key.removeprefix("clip-")) for key in batch.clip_ids]
    assert batch.labels["number"] == [str(n) for n in number]
    assert batch.labels["parity"] == ["odd" if n % 2 else "even" for n in number]


@pytest.mark.parametrize(("workers", "cache_gb"), [(0, 1.0), (2, 0.0), (2, 1.0)])
def test_workers_and_cache_change_nothing(shards, workers, cache_gb):
    plain = train(shards)
    other = train(shards, loading=Loading(workers, cache_gb))
    assert len(plain) == len(other) == STEPS
    assert all(same(one, two) for one, two in zip(plain, other, strict=True))


@pytest.mark.parametrize("first_step", range(STEPS + 1))
def test_a_start_at_any_step_continues_exactly(shards, first_step):
    whole, rest = train(shards), train(shards, first_step=first_step, loading=Loading(0, 1.0))
    assert len(rest) == STEPS - first_step
    assert all(same(one, two) for one, two in zip(whole[first_step:], rest, strict=True))


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_global_batch_in_order(shards, world_size):
    whole = train(shards)
    parts = [train(shards, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        assert [key for part in parts for key in part[step].clip_ids] == batch.clip_ids
        assert torch.equal(torch.cat([part[step].video for part in parts]), batch.video)
        assert torch.equal(
            torch.cat([part[step].changes["video"] for part in parts]), batch.changes["video"]
        )


def test_an_epoch_shows_every_clip_once_in_an_order_of_its_own(shards):
    keys = [key for batch in train(shards, batch_size=5, steps=4) for key in batch.clip_ids]
    assert len(set(keys[:10])) == len(set(keys[10:])) == 10
    assert keys[:10] != keys[10:]
    other = [key for b in train(shards, batch_size=5, steps=2, seed=4) for key in b.clip_ids]
    assert sorted(other) == sorted(keys[:10]) and other != keys[:10]


def test_a_batch_may_be_larger_than_the_corpus(shards):
    batch = train(shards, batch_size=23, steps=1)[0]
    assert Counter(Counter(batch.clip_ids).values()) == {2: 7, 3: 3}


def test_draws_differ_from_step_to_step_and_clip_to_clip(shards):
    colours = torch.cat([batch.changes["video"] for batch in train(shards)])
    assert len({tuple(row.tolist()) for row in colours}) == len(colours)


def test_frames_and_sound_come_from_the_same_instant(shards):
    """Frame k is grey 10 k; sound sets in at 0.5 s: it must set in where the greys say so."""
    for batch in train(shards, steps=12):
        greys = batch.video.float().mean(dim=(2, 3, 4)) / 10
        for first, wave in zip(greys[:, 0], batch.audio.numpy(), strict=True):
            loud = np.flatnonzero(np.abs(wave.astype(int)) > 3000)
            onset = loud[0] / 8000 if len(loud) else None
            expected = 0.5 - round(first.item()) / 10
            if 0.02 < expected < 0.38:
                assert onset is not None and abs(onset - expected) < 0.02
            elif expected > 0.42:
                assert onset is None


def test_evaluation_shows_every_clip_once_in_the_order_of_ids(shards):
    for workers, cache_gb in ((0, 0.0), (2, 1.0), (2, 0.0)):
        batches = evaluate(shards, batch_size=4, loading=Loading(workers, cache_gb))
        keys = [key for batch in batches for key in batch.clip_ids]
        assert keys == [f"clip-{number:03d}" for number in range(10)]
        assert [len(batch.clip_ids) for batch in batches] == [4, 4, 2]
        greys = torch.cat([batch.video for batch in batches]).float().mean(dim=(2, 3, 4)) / 10
        assert greys.round().unique(dim=0).tolist() == [[3.0, 4.0, 5.0, 6.0]]  # the centre
        assert not any(b.changes for b in batches)


def test_views_of_a_clip_are_adjacent_rows(shards):
    batches = evaluate(shards, "test", batch_size=8, views=(3, 3))
    keys = [key for batch in batches for key in batch.clip_ids]
    assert keys == [f"clip-{number:03d}" for number in range(10, 14) for _ in range(9)]
    greys = batches[0].video.float().mean(dim=(2, 3, 4)).div(10).round()
    assert greys[:, 0].tolist() == [0, 0, 0, 3, 3, 3, 6, 6, 6]


def test_an_image_is_the_middle_frame_repeated(shards):
    still = replace(SAMPLING, still=True, samples=0, candidates=0)
    [batch] = evaluate(shards, "test", batch_size=4, sampling=still)
    greys = batch.video.float().mean(dim=(2, 3, 4)).div(10).round()
    assert greys.tolist() == [[4.0] * 4] * 4
    assert batch.audio.shape == (4, 0) and batch.text.shape == (4, 0, 4)
    shown = {
        int(b.video[0, 0].float().mean().div(10).round()) for b in train(shards, sampling=still)
    }
    assert len(shown) > 2  # training draws the frame


def test_a_subset_of_clips(shards):
    chosen = ["clip-001", "clip-007"]
    keys = [key for batch in train(shards, clip_ids=chosen, steps=2) for key in batch.clip_ids]
    assert Counter(keys) == {"clip-001": 6, "clip-007": 6}
    with pytest.raises(DataError, match="no sample clip-099"):
        train(shards, clip_ids=["clip-099"])


def test_a_modality_that_is_not_there_is_zero_and_masked(tmp_path):
    clips, entries = make_corpus(tmp_path / "media", 2)
    silent = tmp_path / "media" / clips[0].media_name
    write_media(silent, sound=False)
    entries["clip-000"] = replace(entries["clip-000"], sha256=sha256_of(silent))
    write(tmp_path, clips, entries)
    [batch] = evaluate(tmp_path / "shards", batch_size=2)
    assert batch.has_audio.tolist() == [False, True] and batch.has_video.all()
    assert (batch.audio[0] == 0).all() and (batch.audio[1] != 0).any()


def test_short_clips_begin_again_as_the_released_code_does():
    # Values of the released code: windows of length 8, stride 2, in clips of 10 and 50 frames.
    assert frame_indices(0, 10, frames=8, stride=2) == [0, 2, 4, 6, 8, 0, 2, 4]
    assert frame_indices(17, 50, frames=8, stride=2) == [17, 19, 21, 23, 25, 27, 29, 31]
    assert frame_indices(3, 100, frames=4, stride=2.5) == [3, 5, 8, 10]


def test_model_inputs_lie_in_minus_one_to_one(shards):
    batch = train(shards, steps=1)[0]
    video, audio, text = model_inputs(batch).values()
    assert video.min() >= -1 and video.max() <= 1 and audio.abs().max() <= 1
    assert torch.equal(text, batch.text)
    plain = replace(batch, changes={})
    torch.testing.assert_close(model_inputs(plain)["video"], batch.video / 127.5 - 1)
    assert not torch.equal(video, model_inputs(plain)["video"])


def test_resampling_keeps_a_tone(shards):
    time = np.arange(8000) / 8000
    wave = (10000 * np.sin(2 * np.pi * 300 * time)).astype(np.int16)
    slower = resample(wave, 8000, 4000)
    assert len(slower) == 4000
    expected = 10000 * np.sin(2 * np.pi * 300 * np.arange(4000) / 4000)
    assert np.abs(slower - expected)[50:-50].max() < 100


def test_rates_that_the_shards_do_not_hold_are_refused(shards):
    with pytest.raises(SettingsError, match="25 frames a second"):
        train(shards, sampling=replace(SAMPLING, fps=25))
    with pytest.raises(SettingsError, match="48000 Hz"):
        train(shards, sampling=replace(SAMPLING, audio_hz=48000))


def test_leaving_early_ends_the_workers(shards):
    import multiprocessing

    for cache_gb in (0.0, 1.0):
        batches = train_batches(
            ShardIndex.load(shards, split="train"), SAMPLING, batch_size=4, steps=range(1000),
            seed=0, loading=Loading(2, cache_gb),
        )  # fmt: skip
        assert len(list(islice(batches, 2))) == 2
        batches.close()
        assert multiprocessing.active_children() == []
