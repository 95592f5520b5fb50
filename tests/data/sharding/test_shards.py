"""Shards: plain tars, the same bytes each time, kept whole through any death."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace

import numpy as np
import pytest

from tests.data.corpus import demo_params, make_clip, make_corpus, write_media
from vatt.config import TextQualityParams
from vatt.data.clips.ledger import Entry, read_ledger
from vatt.data.clips.manifest import Caption, media_path
from vatt.data.clips.samples import nearest, splits_of
from vatt.data.clips.storage import scaled
from vatt.data.loading.reader import ShardIndex, ShardReader
from vatt.data.sharding.shards import write_shards
from vatt.errors import DataError


def write(root, clips, entries, *, workers=0, params=None, machine=(), **preprocess):
    params = params or demo_params()
    return write_shards(
        clips,
        entries,
        params.preprocess.model_copy(update=preprocess),
        params.data,
        machine=params.machine.model_copy(update={"workers": workers, **dict(machine)}),
        media=root / "media",
        folder=root / "shards",
        ledger=root / "ledger.jsonl",
        seed=0,
    )


def digests(root) -> dict[str, str]:
    files = [path for path in sorted((root / "shards").rglob("*")) if path.is_file()]
    files.append(root / "ledger.jsonl")
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    clips, entries = make_corpus(root / "media", 11, tests=3)
    assert write(root, clips, entries) == {"ok": 11}
    return root, clips, entries


def test_every_clip_stands_once_in_a_shard_of_its_split(corpus):
    root, clips, _ = corpus
    assert splits_of(root / "shards") == {"test": 3, "train": 8}
    names = sorted(path.name for path in (root / "shards").glob("*.tar"))
    assert names == ["test-00000.tar", "train-00000.tar", "train-00001.tar"]
    for split in ("train", "test"):
        rows = ShardIndex.load(root / "shards", split=split).rows
        assert sorted(row.key for row in rows) == [c.clip_id for c in clips if c.split == split]


def test_a_shard_is_a_plain_tar_that_others_can_read(corpus):
    root, clips, _ = corpus
    row = ShardIndex.load(root / "shards", split="train").rows[0]
    with tarfile.open(root / "shards" / row.shard) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    assert {name.rpartition(".")[2] for name in members} == {"json", "mp4", "wav"}
    facts = json.loads(members[f"{row.key}.json"])
    clip = next(clip for clip in clips if clip.clip_id == row.key)
    assert facts["labels"] == clip.labels
    assert facts["captions"][0] == [0.0, 0.4, clip.captions[0].text]
    assert members[f"{row.key}.wav"][:4] == b"RIFF" and len(members[f"{row.key}.wav"]) == 16044


def test_index_and_reader_agree_with_the_source(corpus):
    root, _, _ = corpus
    index = ShardIndex.load(root / "shards", split="test")
    reader = ShardReader(index)
    for row in index.rows:
        frames = reader.frames(row, range(row.num_frames))
        assert frames.shape == (10, row.height, row.width, 3)
        grey = frames.mean(axis=(1, 2, 3)) / 10
        assert abs(grey - range(10)).max() < 0.5
        assert reader.frames(row, [7, 2, 2]).mean(axis=(1, 2, 3)).round(-1).tolist() == [70, 20, 20]
        assert len(reader.audio(row, 7000, 9000)) == 1000
    reader.close()


def test_vocabulary_counts_the_train_captions_only(corpus):
    root, _, _ = corpus
    lines = (root / "shards" / "vocabulary.txt").read_text().splitlines()
    assert lines[:2] == ["first\t8", "second\t8"]
    assert sorted(lines[2:]) == sorted(f"word{number}\t2" for number in range(8))


def test_workers_and_reruns_give_the_same_bytes(corpus, tmp_path):
    root, clips, entries = corpus
    before = digests(root)
    assert write(root, clips, entries) == {"ok": 11}
    assert digests(root) == before
    (tmp_path / "media").symlink_to(root / "media")
    write(tmp_path, clips[::-1], entries, workers=2)
    assert digests(tmp_path) == before


KILLED = """
import sys, time
from pathlib import Path
from tests.data.corpus import make_corpus
from tests.data.sharding.test_shards import write
import vatt.data.sharding.writer as w
add = w._add
def slowly(*args):
    time.sleep(0.3)
    add(*args)
w._add = slowly
root = Path(sys.argv[1])
write(root, *make_corpus(root / "media", 11, tests=3), workers=0)
"""


def test_a_kill_loses_and_doubles_nothing(corpus, tmp_path):
    root, clips, entries = corpus
    for wanted in (1, 2):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "shards" / "parts").glob("*.json"))) < wanted:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "shards" / "index.jsonl").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "shards" / "parts").iterdir()}
    write(tmp_path, clips, entries)
    assert digests(tmp_path) == digests(root)
    for name, changed in kept.items():
        assert (tmp_path / "shards" / "parts" / name).stat().st_mtime_ns == changed
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".work")] == []


def test_another_setting_writes_other_shards_and_leaves_no_old_ones(corpus, tmp_path):
    root, clips, entries = corpus
    (tmp_path / "media").symlink_to(root / "media")
    write(tmp_path, clips, entries)
    write(tmp_path, clips[:3], entries, short_side=16)
    assert splits_of(tmp_path / "shards") == {"train": 3}
    assert [path.name for path in (tmp_path / "shards").glob("*.tar")] == ["train-00000.tar"]
    assert ShardIndex.load(tmp_path / "shards", split="train").rows[0].height == 16


def test_every_sound_is_stored_at_one_peak_and_silence_stays_silence(corpus, tmp_path):
    root, clips, entries = corpus
    (tmp_path / "media").symlink_to(root / "media")
    write(tmp_path, clips, entries, audio_peak=0.5)
    readers = [
        ShardReader(ShardIndex.load(one / "shards", split="test")) for one in (root, tmp_path)
    ]
    for row in readers[0].index.rows:
        before, after = (reader.audio(row, 0, 8000).astype(float) for reader in readers)
        assert 0 < abs(before).max() != pytest.approx(0.5 * 32767, abs=1)
        assert abs(after).max() == pytest.approx(0.5 * 32767, abs=1)
        assert after == pytest.approx(before * abs(after).max() / abs(before).max(), abs=1)
    loudest = np.array([-32768, 16384, 0], dtype=np.int16)
    assert scaled(loudest, 1.0).tolist() == [-32767, 16384, 0]
    assert scaled(np.zeros(3, np.int16), 0.5).tolist() == [0, 0, 0]


def test_every_clip_ends_in_one_state_with_its_reason(tmp_path):
    clips, entries = make_corpus(tmp_path / "media", 3)
    lost = [make_clip(number) for number in range(10, 14)]
    here = {"media": tmp_path / "media", "location": None}
    media_path(lost[0], **here).write_bytes(b"<html>")
    write_media(media_path(lost[1], **here), seconds=0.5)
    write_media(media_path(lost[2], **here), sound=False)
    for clip in lost[:3]:
        entries[clip.clip_id] = Entry(clip.clip_id, "ok", "download", seconds=1.0)
    entries[lost[1].clip_id] = replace(entries[lost[1].clip_id], seconds=0.5)
    entries[lost[3].clip_id] = Entry(lost[3].clip_id, "removed", "download", "taken down")
    mute = replace(make_clip(0, captions=()), clip_id="mute")
    entries["mute"] = Entry("mute", "ok", "download", seconds=1.0)
    params = demo_params(require=("video", "audio", "text"))
    counts = write(tmp_path, [*clips, *lost, mute], entries, params=params, max_failed_share=0.9)
    assert counts == {
        "ok": 3, "removed": 1, "corrupt": 1, "too-short": 1, "no-audio": 1, "no-caption": 1,
    }  # fmt: skip
    ledger = read_ledger(tmp_path / "ledger.jsonl")
    assert len(ledger) == 8
    assert ledger["clip-000"].has == ("video", "audio", "text")
    assert ledger["clip-010"].reason.startswith("not a media file")
    assert ledger["clip-013"].stage == "download"


def test_too_many_failures_or_too_few_clips_stop_the_pipeline(tmp_path):
    clips, entries = make_corpus(tmp_path / "media", 4)
    (tmp_path / "media" / clips[0].media_name).write_bytes(b"")
    entries["clip-000"] = replace(entries["clip-000"], sha256=None)
    with pytest.raises(
        DataError, match=r"1 of 4 clips failed \(1 corrupt\).*max_failed_share"
    ) as e:
        write(tmp_path, clips, entries, max_failed_share=0.2)
    assert e.value.exit_code == 3
    with pytest.raises(DataError, match=r"3 clips are left; data\.min_clips requires 4"):
        write(tmp_path, clips, entries, params=demo_params(min_clips=4))
    with pytest.raises(DataError, match=r"data\.min_share requires 90%"):
        write(tmp_path, clips, entries, params=demo_params(min_share=0.9))
    assert not (tmp_path / "shards" / "index.jsonl").exists()
    assert read_ledger(tmp_path / "ledger.jsonl")["clip-000"].state == "corrupt"
    with pytest.raises(DataError, match="lacks clip clip-001"):
        write(tmp_path, clips, {"clip-000": entries["clip-000"]})


def test_lost_media_are_missing_before_the_first_shard_is_written(tmp_path):
    clips, entries = make_corpus(tmp_path / "media", 6)
    for clip in clips[:2]:
        (tmp_path / "media" / clip.media_name).unlink()
    with pytest.raises(DataError, match=r"2 of 6 media files are missing") as caught:
        write(tmp_path, clips, entries)
    assert "download --retry missing" in caught.value.hint
    assert str(tmp_path / "media") in caught.value.problem
    assert not list((tmp_path / "shards").glob("*.tar"))


@pytest.mark.parametrize("workers", [0, 2])
def test_media_that_changed_since_the_download_are_no_corrupt_clips(corpus, tmp_path, workers):
    root, clips, entries = corpus
    shutil.copytree(root / "media", tmp_path / "media")
    file = tmp_path / "media" / clips[1].media_name
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{file.name} has changed since") as caught:
            write(tmp_path, clips, entries, workers=workers)
        assert "download --retry missing" in caught.value.hint
    file.write_bytes(whole)
    assert write(tmp_path, clips, entries, workers=workers) == {"ok": 11}
    assert digests(tmp_path) == digests(root)


def test_finished_shards_need_no_media(corpus, tmp_path):
    root, clips, entries = corpus
    shutil.copytree(root / "shards", tmp_path / "shards")
    assert write(tmp_path, clips, entries) == {"ok": 11}
    assert digests(tmp_path) == digests(root)


def test_a_long_clip_gives_several_samples_even_over_shards(tmp_path):
    (tmp_path / "media").mkdir()
    clip = make_clip(0, end=None, captions=tuple(Caption(k, k + 0.5, f"at {k}") for k in range(5)))
    write_media(tmp_path / "media" / clip.media_name, seconds=5.3)
    entries = {clip.clip_id: Entry(clip.clip_id, "ok", "download", seconds=5.3)}
    write(tmp_path, [clip], entries, samples_per_shard=3)
    index = ShardIndex.load(tmp_path / "shards", split="train")
    assert [row.key for row in index.rows] == [f"clip-000+{k:04d}" for k in range(5)]
    assert {row.shard for row in index.rows} == {"train-00000.tar", "train-00001.tar"}
    assert read_ledger(tmp_path / "ledger.jsonl")["clip-000"].samples == 5
    captions = ShardReader(index).captions(index.rows[3])
    assert (captions[0].start, captions[3]) == (-3.0, Caption(0.0, 0.5, "at 3"))


QUALITY = {"fillers": ["um"], "repeat_seconds": 0, "languages": [], "least_quality": 0.5}


def test_the_score_of_a_caption_is_stored_with_it_and_its_drops_are_in_the_ledger(tmp_path):
    said = (Caption(0.0, 0.4, "um open the door"), Caption(0.5, 0.9, "no no no no"))
    clips, entries = make_corpus(tmp_path / "media", 4, tests=1)
    clips = [replace(clip, captions=said) for clip in clips]
    write(tmp_path, clips, entries, text_quality=TextQualityParams.model_validate(QUALITY))
    found = {}
    for split in ("train", "test"):
        index = ShardIndex.load(tmp_path / "shards", split=split)
        found[split] = ShardReader(index).captions(index.rows[0])
    assert found == {"train": (Caption(0.0, 0.4, "open the door", 1.0),), "test": said}
    ledger = read_ledger(tmp_path / "ledger.jsonl")
    counted = [(e.captions_dropped, e.captions_repaired) for e in ledger.values()]
    assert sorted(counted) == [(0, 0), (1, 1), (1, 1), (1, 1)]
    facts = json.loads((tmp_path / "shards" / "text.json").read_text())["quality"]
    assert (facts["captions"], facts["dropped_quality"], facts["kept"]) == (6, 3, 3)


def test_the_nearest_captions_come_first():
    captions = [Caption(0, 1, "a"), Caption(2, 9, "b"), Caption(4, 5, "c"), Caption(10, 11, "d")]
    near = nearest(captions, start=4, end=5, count=3)
    assert [caption.text for caption in near] == ["c", "b", "a"]


def test_broken_or_missing_shards_are_named(corpus, tmp_path):
    with pytest.raises(DataError, match="vattctl preprocess"):
        ShardIndex.load(tmp_path, split="train")
    root, _, _ = corpus
    with pytest.raises(DataError, match="no sample of split 'val'"):
        ShardIndex.load(root / "shards", split="val")
    with pytest.raises(DataError, match="no sample nope"):
        ShardIndex.load(root / "shards", split="train", keys=["nope"])
