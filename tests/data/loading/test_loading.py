"""Loading: exact after any restart, whoever loads; broken samples replaced; memory bounded."""

import gc
import hashlib
import random
import shutil
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.corpus import demo_params, make_corpus
from tests.data.sharding.test_shards import write
from vatt.data.clips.ledger import read_ledger
from vatt.data.loading.batches import Loading, Sampling, eval_batches, train_batches
from vatt.data.loading.loader import MemoryBlocks, attach
from vatt.data.loading.reader import ShardIndex
from vatt.data.loading.sampling import Arrays, bytes_of
from vatt.errors import DataError

AUGMENTATION = demo_params().pretrain.augmentation.model_copy(
    update={"crop_area": (0.3, 0.9), "flip": True, "brightness": 0.1, "hue": 0.2}
)
SAMPLING = Sampling(
    frames=2,
    fps=10,
    frame_size=(8, 8),
    samples=800,
    audio_hz=None,
    candidates=2,
    words=4,
    augmentation=AUGMENTATION,
)
BATCH, THOUSAND = 40, 25  # clips, and steps of so many
OPEN_FILES = Path("/proc/self/fd")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("loading")
    params = demo_params()
    write(
        root,
        *make_corpus(root / "media", 72, tests=8),
        params=params,
        samples_per_shard=8,
        short_side=16,
        video_storage="jpeg",
    )
    return root / "shards"


@pytest.fixture(scope="module")
def shards(whole, tmp_path_factory):
    """The same, some samples broken: a picture, a JSON, a shard cut off in its last sample."""
    folder = tmp_path_factory.mktemp("broken") / "shards"
    shutil.copytree(whole, folder)
    train = ShardIndex.load(folder, split="train").rows
    for row, (offset, size) in ((train[3], train[3].video), (train[20], train[20].json)):
        with (folder / row.shard).open("r+b") as file:
            file.seek(offset)
            file.write(b"x" * size)
    row = ShardIndex.load(folder, split="train").rows[63]
    with (folder / row.shard).open("r+b") as file:
        file.truncate(row.audio[0] + 100)
    return folder


def train(shards, first_step=0, **changes):
    settings = {"batch_size": BATCH, "seed": 3, **changes}
    settings["steps"] = range(first_step, settings.get("steps", first_step + THOUSAND))
    settings.setdefault("loading", Loading(max_broken_share=0.1))
    return train_batches(ShardIndex.load(shards, split="train"), SAMPLING, **settings)


def digests(batches) -> list[list[str]]:
    """A hash of everything that a sample is, for each sample of each batch."""
    found = []
    for batch in batches:
        assert batch.changes.keys() == {"video"}
        parts = [tensor.numpy() for tensor in batch.tensors()]
        found.append(
            [
                key + hashlib.sha1(b"".join(part[i].tobytes() for part in parts)).hexdigest()
                for i, key in enumerate(batch.clip_ids)
            ]
        )
    return found


@pytest.fixture(scope="module")
def undisturbed(shards):
    """What a run without a restart shows: twice a thousand samples and some more."""
    return digests(train(shards, steps=2 * THOUSAND + 10))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_the_next_thousand_samples_after_a_restart_are_the_undisturbed_ones(
    shards, undisturbed, workers, world_size
):
    draw = random.Random(10 * workers + world_size)
    for step in draw.sample(range(1, THOUSAND + 10), 1 if workers else 3):
        parts = [
            digests(
                train(
                    shards,
                    first_step=step,
                    rank=rank,
                    world_size=world_size,
                    loading=Loading(workers, prefetch_gb=0.001, max_broken_share=0.1),
                )
            )
            for rank in range(world_size)
        ]
        together = [list(chain(*own)) for own in zip(*parts, strict=True)]
        assert sum(map(len, together)) == 1000
        assert together == undisturbed[step : step + THOUSAND]


def test_broken_samples_are_noted_and_others_shown_in_their_place(
    shards, whole, undisturbed, tmp_path
):
    ledger = tmp_path / "load.ledger.jsonl"
    how = Loading(0, cache_gb=1.0, max_broken_share=0.1, ledger=ledger)  # from memory: the same
    assert digests(train(shards, loading=how)) == undisturbed[:THOUSAND]
    rows = ShardIndex.load(shards, split="train").rows
    broken = {rows[number].key for number in (3, 20, 63)}
    entries = read_ledger(ledger)
    assert set(entries) == broken and {entry.state for entry in entries.values()} == {"corrupt"}
    assert all(entry.stage == "load" and key in entry.reason for key, entry in entries.items())
    for ours, theirs in zip(undisturbed, digests(train(whole)), strict=False):
        for shown, meant in zip(ours, theirs, strict=True):
            assert (shown == meant) == (meant[:-40] not in broken)
            assert shown[:-40] not in broken


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_samples_stop_the_run(shards, workers, tmp_path):
    how = Loading(workers, max_broken_share=0.04, ledger=tmp_path / "ledger.jsonl")
    with pytest.raises(DataError, match=r"3 of 64 samples are broken.*max_broken_share") as error:
        digests(train(shards, loading=how))
    assert "ledger.jsonl" in error.value.hint


@pytest.mark.parametrize("how", [Loading(), Loading(0, 1.0), Loading(1), Loading(1, 1.0)])
def test_evaluation_names_a_broken_sample_and_stops(whole, tmp_path, how):
    shutil.copytree(whole, tmp_path / "shards")
    index = ShardIndex.load(tmp_path / "shards", split="test")
    row = index.rows[0]
    with (tmp_path / "shards" / row.shard).open("r+b") as file:
        file.seek(row.video[0])
        file.write(b"x" * row.video[1])
    with pytest.raises(DataError, match=row.key):
        list(eval_batches(index, SAMPLING, batch_size=2, loading=how))


def test_memory_is_used_again_only_when_no_tensor_of_it_lives():
    blocks, shapes = MemoryBlocks(), SAMPLING.shapes()
    size = bytes_of(3, shapes)
    first, memory = blocks.take(size)
    arrays = Arrays.over(memory, 3, shapes)
    video = torch.from_numpy(arrays["video"])[1]
    del memory, arrays
    second, other = blocks.take(size)
    assert second.number != first.number
    Arrays.over(attach(first), 3, shapes)["video"][1] = 7  # as another process would
    assert (video == 7).all()
    del video
    gc.collect()
    assert blocks.take(size)[0] == first
    assert len(other) == size


def test_batches_that_are_kept_stay_as_they_were(shards):
    kept = list(train(shards, loading=Loading(2, prefetch_gb=0.001, max_broken_share=0.1)))
    assert digests(kept) == digests(train(shards))


def test_prefetching_is_bounded_by_bytes_and_goes_on_while_nobody_waits(whole):
    from vatt.data.loading.loader import BatchMaker, open_index
    from vatt.data.workers import InProcess

    large = replace(SAMPLING, frames=32, frame_size=(224, 224))
    index = open_index(whole, Loading(), split="train")

    def ahead(gigabytes, clips):
        return BatchMaker(index, large, Loading(2, prefetch_gb=gigabytes), InProcess()).ahead(clips)

    assert [ahead(2.0, clips) for clips in (2048, 256, 64, 8)] == [1, 1, 6, 16]
    assert ahead(0.1, 64) == 1


@pytest.mark.skipif(not OPEN_FILES.is_dir(), reason="no /proc")
def test_leaving_early_frees_the_shared_memory(shards):
    before = len(list(OPEN_FILES.iterdir()))
    for _ in range(3):
        batches = train(shards, loading=Loading(1, max_broken_share=0.1))
        assert len(list(islice(batches, 2))) == 2
        batches.close()
    del batches
    gc.collect()
    assert len(list(OPEN_FILES.iterdir())) <= before + 2


def test_the_arrays_of_a_batch_do_not_overlap():
    shapes = SAMPLING.shapes()
    arrays = Arrays.empty(5, shapes)
    for number, name in enumerate(arrays):
        arrays[name][:] = number % 2
    assert all((arrays[n] == k % 2).all() for k, n in enumerate(arrays))
    assert arrays["video"].shape == (5, 2, 8, 8, 3) and arrays["text"].dtype == np.int64
