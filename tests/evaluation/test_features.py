"""Features: every clip once, views averaged, the same from the cache as from the model."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.evaluation.clips import MODEL, batches
from vatt.errors import DataError, MachineError
from vatt.evaluation.features import (
    KEPT_FILES,
    ProcessShare,
    cache_key,
    cached,
    cached_arrays,
    computing_in,
    extract,
    load_features,
    save_features,
)
from vatt.evaluation.passes import untrained


def quiet(done, total):
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def encoder():
    torch.set_num_threads(1)
    return untrained(MODEL, seed=0)


def features(encoder, **how):
    return extract({"one": encoder}, batches(**how), progress=quiet, total=12)["one"]


def test_features_do_not_depend_on_the_batch_size(encoder):
    small, large = features(encoder, batch_size=1), features(encoder, batch_size=12)
    assert (
        small.clip_ids.tolist() == large.clip_ids.tolist() == [f"clip-{i:03d}" for i in range(12)]
    )
    assert small.arrays.keys() == large.arrays.keys()
    for name, values in small.arrays.items():
        np.testing.assert_allclose(values, large.arrays[name], atol=1e-5)


def test_in_bf16_only_the_encoders_compute_in_bf16(encoder):
    whole = features(encoder)
    half = extract({"one": encoder}, batches(), progress=quiet, total=12, precision="bf16")["one"]
    for name in ("video", "audio", "video_va", "audio_va", "text_vt"):
        found, exact = getattr(half, name), getattr(whole, name)
        assert found.dtype == np.float32 and not np.array_equal(found, exact), name
        np.testing.assert_allclose(found, exact, atol=0.03 * np.abs(exact).max())
    bf16 = torch.from_numpy(half.video_va).bfloat16().float().numpy()
    assert not np.array_equal(half.video_va, bf16)  # the heads are not rounded


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_encoder_that_computes_in_another_precision_is_an_error(encoder, precision):
    other = precision == "fp32"
    with (
        torch.inference_mode(),
        pytest.raises(MachineError, match="encoders should compute in"),
        computing_in(precision, encoder),
        torch.autocast("cpu", torch.bfloat16, enabled=other),
    ):
        (batch,) = batches(clips=1, batch_size=1)
        encoder.encode(video=batch.video.float())


def test_a_last_batch_that_is_not_full_is_neither_dropped_nor_doubled(encoder):
    found = features(encoder, clips=11, batch_size=4)
    assert found.clip_ids.tolist() == [f"clip-{i:03d}" for i in range(11)]
    assert found.labels["shade"].shape == (11,)


def test_the_windows_of_a_clip_are_kept_side_by_side(encoder):
    both = features(encoder, clips=3, views=2)
    (batch,) = batches(clips=3, batch_size=3, views=2)
    video = batch.video.float() / 255 * 2 - 1
    with torch.inference_mode():
        each = encoder.encode(video=video)["video"]
    np.testing.assert_allclose(both.video, each.unflatten(0, (3, 2)).numpy(), atol=1e-6)
    assert both.clip_ids.tolist() == ["clip-000", "clip-001", "clip-002"]


def test_shares_of_several_processes_join_to_the_same_bits(encoder):
    every = list(batches(clips=11, batch_size=2))
    alone = extract({"one": encoder}, every, progress=quiet, total=11)["one"]
    sent = []
    for rank in (1, 2, 0):  # the first process comes last, when the others have sent theirs

        def gather(parts, rank=rank):
            sent.append((rank, parts))
            return [part for _, part in sorted(sent)] if rank == 0 else None

        share = ProcessShare(rank, 3, gather, lambda value: value)
        found = extract({"one": encoder}, every[rank::3], progress=quiet, total=11, share=share)
        assert bool(found) == (rank == 0)
    assert found["one"].arrays.keys() == alone.arrays.keys()
    for name, values in alone.arrays.items():
        np.testing.assert_array_equal(found["one"].arrays[name], values)
    assert found["one"].clip_ids.tolist() == alone.clip_ids.tolist()


def test_a_clip_whose_views_are_apart_is_refused(encoder):
    twice = [*batches(clips=4), *batches(clips=4)]
    with pytest.raises(AssertionError, match="adjacent"):
        extract({"one": encoder}, twice, progress=quiet, total=4)


def test_embeddings_have_length_one_and_masks_say_what_is_there(encoder):
    found = features(encoder)
    for name in ("video_va", "audio_va", "video_vt"):
        np.testing.assert_allclose(np.linalg.norm(getattr(found, name), axis=-1), 1, atol=1e-5)
    assert found.has_text.sum(axis=1).tolist() == [2, 2, 2, 1, 2, 0, 2, 1, 2, 2, 2, 0]
    assert found.has_audio.tolist() == [i != 6 for i in range(12)]


def test_progress_counts_clips_to_the_end(encoder):
    seen = []
    extract(
        {"one": encoder},
        batches(views=2),
        progress=lambda done, total: seen.append((done, total)),
        total=12,
    )
    assert seen == [(4, 12), (8, 12), (12, 12)]


def test_saved_features_come_back_bit_for_bit(encoder, tmp_path):
    made = features(encoder)
    save_features(made, tmp_path / "features.npz")
    back = load_features(tmp_path / "features.npz")
    assert back.arrays.keys() == made.arrays.keys()
    for name, values in made.arrays.items():
        np.testing.assert_array_equal(back.arrays[name], values)
    assert back.labels["shade"].tolist() == made.labels["shade"].tolist()


def test_only_what_the_cache_lacks_is_computed(encoder, tmp_path):
    asked = []

    def compute(names):
        asked.append(names)
        return {name: features(encoder, seed=i) for i, name in enumerate(names)}

    cached(tmp_path, {"first": "a"}, compute)
    both = cached(tmp_path, {"first": "a", "second": "b"}, compute)
    again = cached(tmp_path, {"first": "a", "second": "b"}, compute)
    assert asked == [["first"], ["second"]]
    np.testing.assert_array_equal(both["second"].video, again["second"].video)
    cached(None, {"first": "a"}, compute)
    assert asked[-1] == ["first"]


@pytest.mark.parametrize("length", [0, 30, 2000])
def test_a_damaged_file_of_the_cache_is_made_again(encoder, tmp_path, length):
    made = features(encoder)
    cached(tmp_path, {"one": "key"}, lambda names: {"one": made})
    os.truncate(tmp_path / "key.npz", length)
    cached(tmp_path, {"one": "key"}, lambda names: {"one": made})
    back = cached(tmp_path, {"one": "key"}, lambda names: {})["one"]
    np.testing.assert_array_equal(back.video, made.video)
    cached_arrays(tmp_path, "other", lambda: {"a": np.ones(2)})
    os.truncate(tmp_path / "other.npz", length // 10)
    again = cached_arrays(tmp_path, "other", lambda: {"a": np.zeros(2)})
    assert again["a"].tolist() == [0, 0]


def test_the_cache_forgets_the_oldest(encoder, tmp_path):
    made = features(encoder, clips=2, batch_size=2)
    for number in range(KEPT_FILES + 3):
        cached(tmp_path, {"one": f"key{number}"}, lambda names: {"one": made})
    assert len(list(tmp_path.glob("*.npz"))) == KEPT_FILES


def test_the_cache_key_tells_weights_and_data_apart():
    assert cache_key("weights", "data") == cache_key("weights", "data")
    assert len({cache_key("a", "b"), cache_key("a", "c"), cache_key("b", "b")}) == 3


def test_the_untrained_encoder_is_the_same_for_the_same_seed_and_touches_no_global_state():
    before = torch.random.get_rng_state()
    first, second, other = (untrained(MODEL, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [model.state_dict() for model in (first, second, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_a_modality_that_is_not_sampled_is_not_encoded(encoder):
    (batch,) = batches(clips=3, batch_size=3)
    whole = extract({"one": encoder}, [batch], progress=quiet, total=3)["one"]
    signals = batch.signals | {"audio": batch.audio[:, :0], "text": batch.text[:, :0]}
    bare = replace(batch, signals=signals)
    seen = extract({"one": encoder}, [bare], progress=quiet, total=3)["one"]
    np.testing.assert_array_equal(seen.video, whole.video)
    assert seen.audio.shape == seen.audio_va.shape == (3, 1, 0)
    assert seen.text_vt.shape[:2] == seen.has_text.shape == (3, 0)


def test_an_encoder_that_diverged_is_named():
    broken = untrained(MODEL, seed=0)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(DataError, match="the pretrained encoder"):
        extract({"pretrained": broken}, batches(), progress=quiet, total=12)
