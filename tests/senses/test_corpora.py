"""Own folders and the demo, with every sense: manifest -> shards -> batches."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.data.corpus import demo_params, write_media
from tests.senses.test_motion import wave, write_csv
from vatt.config import DepthStorageParams, MotionStorageParams
from vatt.data.clips.ledger import Entry
from vatt.data.clips.manifest import read_manifest, write_manifest
from vatt.data.clips.samples import INDEX, read_index
from vatt.data.loading.batches import Sampling, eval_batches, open_index
from vatt.data.loading.loader import Loading
from vatt.data.sharding.shards import write_shards
from vatt.data.sources.demo import make_demo
from vatt.data.sources.folder import scan
from vatt.senses import SENSES

MOTION = {"size": "tiny", "samples": 40, "channels": 6, "patch": 5}
DEPTH = {"size": "tiny", "frames": 8, "frame_size": 32, "patch": [4, 8, 8]}


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        write_media(tmp_path / f"{name}.mp4", size=(32, 32))
    time = np.arange(110) / 100
    write_csv(tmp_path / "a.motion.csv", time, wave(time))
    write_media(tmp_path / "a.depth.mp4", size=(32, 32), sound=False)
    (tmp_path / "b.depth").mkdir()
    (tmp_path / "b.depth" / "0001.png").write_bytes(b"no picture")
    return tmp_path


def test_files_of_other_senses_belong_to_their_clips_and_are_no_clips(folder):
    found = scan(folder, demo_params().data)
    assert [clip.url for clip in found.clips] == ["folder:a.mp4", "folder:b.mp4"]
    assert found.clips[0].senses == {
        "motion": "folder:a.motion.csv",
        "depth": "folder:a.depth.mp4",
    }
    assert found.clips[1].senses == {"depth": "folder:b.depth"}
    assert not found.ignored and not any(clip.labels for clip in found.clips)


def test_a_change_of_such_a_file_is_a_change_of_the_folder(folder):
    before = scan(folder, demo_params().data).mark
    assert scan(folder, demo_params().data).mark == before
    (folder / "b.depth" / "0001.png").write_bytes(b"another one")
    assert scan(folder, demo_params().data).mark != before


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_manifest_keeps_them(folder, suffix):
    clips = scan(folder, demo_params().data).clips
    clips[1] = replace(clips[1], senses={})
    path = folder / f"manifest.{suffix}"
    write_manifest(path, clips)
    assert list(read_manifest(path)) == clips


def test_the_demo_with_every_sense(tmp_path):
    torch.set_num_threads(1)
    params = demo_params(source="demo")
    settings = params.data.demo.model_copy(
        update={"train_clips": 40, "test_clips": 2, "dead_links": 1, "motion": True, "depth": True}
    )
    quiet = {"seed": 0, "workers": 0, "progress": lambda *_: None}
    plain = make_demo(
        tmp_path / "corpus", settings.model_copy(update={"motion": False, "depth": False}), **quiet
    )
    before = {path: path.read_bytes() for path in (tmp_path / "corpus").glob("*.mp4")}
    clips = make_demo(tmp_path / "corpus", settings, **quiet)
    assert [replace(clip, senses={}) for clip in clips] == plain
    assert all(path.read_bytes() == content for path, content in before.items())
    has = Counter(name for clip in clips for name in clip.senses)
    assert all(30 <= has[name] < 43 for name in ("motion", "depth"))

    clips = clips[:-1]  # the dead link
    (tmp_path / "media").mkdir()
    for clip in clips:
        (tmp_path / "media" / clip.media_name).symlink_to(
            tmp_path / "corpus" / clip.url.removeprefix("demo:")
        )
    entries = {c.clip_id: Entry(c.clip_id, "ok", "download", seconds=1.0) for c in clips}
    counts = write_shards(
        clips,
        entries,
        params.preprocess.model_copy(
            update={
                "motion": MotionStorageParams(hz=50, channels=6),
                "depth": DepthStorageParams(short_side=32),
            }
        ),
        params.data,
        machine=params.machine,
        media=tmp_path / "media",
        folder=tmp_path / "shards",
        ledger=tmp_path / "ledger.jsonl",
        seed=0,
    )
    assert counts == {"ok": 42}
    _, rows = read_index(tmp_path / "shards" / INDEX)
    assert {r.clip_id: set(r.senses) for r in rows} == {c.clip_id: set(c.senses) for c in clips}

    model = params.model.model_validate(
        params.model.model_dump() | {"motion": MOTION, "depth": DEPTH}
    )
    index = open_index(tmp_path / "shards", Loading(), split="train")
    sampling = Sampling.for_pretraining(model, params.pretrain)
    (batch,) = eval_batches(index, sampling, batch_size=40)
    assert list(batch.signals) == list(SENSES)
    motions = batch.labels["motion"]
    seen = batch.present["motion"] & batch.present["depth"]
    for row in seen.nonzero().flatten().tolist():
        speed = batch.signals["motion"][row, :, :3].mean(0)
        near = (batch.signals["depth"][row] < 150).float()
        middle = (near * torch.arange(32)).sum((1, 2)) / near.sum((1, 2)).clamp(min=1)
        if motions[row] in ("left", "right"):
            sign = 1 if motions[row] == "right" else -1
            assert sign * speed[0] > 0.05
            assert sign * (middle[-1] - middle[0]) > 1
        if motions[row] == "grow":
            assert speed[2] > 0.1 and near[-1].sum() > near[0].sum()
