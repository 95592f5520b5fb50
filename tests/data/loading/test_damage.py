"""A changed byte of a stored sample is one broken sample, one of an index a clear line."""

import json
import os
import random
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch

from tests.data.corpus import TEST_DATA, demo_params, make_corpus, needs_data, write_media
from tests.data.loading.test_batches import SAMPLING, same
from tests.data.sharding.test_shards import write
from tests.fuzzing import Reader, fuzz_long
from vatt.data.clips.ledger import read_ledger
from vatt.data.clips.samples import INDEX, IndexRow, read_index, row_of, write_index
from vatt.data.clips.storage import Storage, decode_frames, encode_sound, wav_header
from vatt.data.clips.text import Vocabulary
from vatt.data.loading.batches import Loading, train_batches
from vatt.data.loading.reader import BrokenSampleError, ShardIndex, ShardReader
from vatt.errors import DataError

FORMS = [("h264", "flac"), ("jpeg", "pcm"), ("h264", "aac")]
FLIPS = int(os.environ.get("VATT_FLIPS", "250"))  # of each form; a few thousand take a minute


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same six clips in every form, in one shard each."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("damage")
    corpus = make_corpus(root / "media", 6)
    made = {}
    for video, audio in FORMS:
        folder = root / f"{video}-{audio}"
        folder.mkdir()
        (folder / "media").symlink_to(root / "media")
        forms = {"video_storage": video, "audio_storage": audio, "samples_per_shard": 6}
        write(folder, *corpus, params=demo_params(), **forms)
        made[video, audio] = folder / "shards"
    return made


@pytest.fixture
def shards(folders, tmp_path):
    """A function that copies the corpus of a form, to be damaged."""

    def copied(form=("h264", "flac")) -> Path:
        return Path(shutil.copytree(folders[form], tmp_path / "shards"))

    return copied


def read(index: ShardIndex, row: IndexRow, vocabulary: Vocabulary) -> None:
    """All that a training, an evaluation, a cache or a search reads of a sample."""
    reader = ShardReader(index)
    try:
        reader.frames(row, [2, 5, 8], (0, 0, 16, 16))
        reader.frames(row, range(row.num_frames))
        reader.audio(row, 3000, 5000)
        reader.audio(row, 0, row.num_samples)
        for caption in reader.captions(row):
            vocabulary.encode(caption.text, 8)
        reader.origin(row)
    finally:
        reader.close()


def damaged(data: bytes, place: int, end: int, rng: random.Random) -> bytes:
    """One bit, one byte, a few bytes or all bytes from `place` to `end` changed."""
    changed, kind = bytearray(data), rng.randrange(5)
    if kind < 2:
        changed[place] ^= 1 << rng.randrange(8)
    elif kind == 2:
        changed[place] = rng.choice([0, 127, 128, 255])
    elif kind == 3:
        last = min(place + rng.randrange(1, 9), end)
        changed[place:last] = rng.randbytes(last - place)
    else:
        changed[place:end] = bytes(end - place)
    return bytes(changed)


@pytest.mark.parametrize("form", FORMS)
def test_any_changed_byte_gives_a_broken_sample_or_a_whole_one(shards, form):
    folder, rng = shards(form), random.Random(0)
    index = ShardIndex.load(folder, split="train")
    vocabulary = Vocabulary.load(folder / "vocabulary.txt")
    shard = folder / index.rows[0].shard
    data, broken = shard.read_bytes(), 0
    for _ in range(FLIPS):
        row = rng.choice(index.rows)
        first, size = rng.choice([row.json, row.video, row.audio])
        place = first + rng.randrange(rng.choice([64, 700, size]) % size or size)
        shard.write_bytes(damaged(data, place, first + size, rng))
        try:
            read(index, row, vocabulary)
        except BrokenSampleError as error:
            assert row.key in error.problem and error.hint
            broken += 1
    assert broken > FLIPS / 5


MEMBERS = [
    ("jpeg", "pcm", "video"), ("h264", "flac", "video"), ("jpeg", "pcm", "audio"),
    ("h264", "flac", "audio"), ("h264", "aac", "audio"), ("jpeg", "pcm", "json"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("member", MEMBERS, ids="-".join)
def test_a_mutated_member_for_a_long_time(folders, tmp_path, member):
    video, audio, name = member
    folder = Path(shutil.copytree(folders[video, audio], tmp_path / "shards"))
    row = ShardIndex.load(folder, split="train").rows[0]
    vocabulary = Vocabulary.load(folder / "vocabulary.txt")
    shard, (first, size) = folder / row.shard, getattr(row, name)
    data = shard.read_bytes()

    def read_mutated(path):
        shard.write_bytes(data + path.read_bytes())
        changed = replace(row, **{name: (len(data), path.stat().st_size)})
        try:
            read(ShardIndex.load(folder, split="train"), changed, vocabulary)
        except BrokenSampleError as error:
            assert row.key in error.problem

    seed = data[first : first + size]
    fuzz_long(f"sample: {'-'.join(member)}", Reader("member", seed, read_mutated), tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_a_shard_cut_anywhere_breaks_the_samples_behind_the_cut(shards, form):
    folder = shards(form)
    index = ShardIndex.load(folder, split="train")
    vocabulary = Vocabulary.load(folder / "vocabulary.txt")
    rows = index.rows
    for length in (rows[4].audio[0] + 60, rows[2].json[0] + 5, 100, 0):
        os.truncate(folder / rows[0].shard, length)
        for row in rows:
            if sum(row.audio) <= length:
                read(index, row, vocabulary)
                continue
            with pytest.raises(BrokenSampleError, match="cut off"):
                read(index, row, vocabulary)


def replaced(folder: Path, row: IndexRow, **members: bytes) -> ShardIndex:
    """An index in which members of a sample are others, at the end of its shard."""
    index = ShardIndex.load(folder, split="train")
    shard = folder / row.shard
    for name, data in members.items():
        row = replace(row, **{name: (shard.stat().st_size, len(data))})
        with shard.open("ab") as file:
            file.write(data)
    return replace(index, rows=[row])


def record(**changes) -> bytes:
    whole = {"url": "urls:0.mp4", "start": 0, "end": 1, "labels": {}, "captions": [[0, 1, "word"]]}
    return json.dumps(whole | changes).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b"[]",
        b"",
        b'"text"',
        b'{"captions": [[0, 1' + b"0" * 5000 + b', "a"]]}',
        b"\xff\xfe{}",
        record(captions=None),
        record(captions=7),
        record(captions="abc"),
        record(captions={"a": 1}),
        record(captions=[[0, 1]]),
        record(captions=[[0, 1, "a", "b"]]),
        record(captions=[[0, 1, 5]]),
        record(captions=[["0", 1, "a"]]),
        record(captions=[[0, None, "a"]]),
        record(captions=[[0, float("nan"), "a"]]),
        record(captions=[[0, float("inf"), "a"]]),
        record(captions=[[10**400, 1, "a"]]),
        record(captions=[[[0], 1, "a"]]),
    ],
)
def test_json_that_is_not_a_samples_is_a_broken_sample(shards, data):
    folder = shards()
    row = ShardIndex.load(folder, split="train").rows[0]
    index = replaced(folder, row, json=data)
    with pytest.raises(BrokenSampleError, match=r"captions|caption|JSON"):
        ShardReader(index).captions(index.rows[0])


@pytest.mark.parametrize(
    "sizes",
    [None, 7, "abc", [], [1, 2], [-1] * 10, [0] * 10, [10**30] * 10, ["a"] * 10, [1.5] * 10],
)
def test_sizes_of_frames_that_do_not_add_up_are_a_broken_sample(shards, sizes):
    folder = shards(("jpeg", "pcm"))
    row = ShardIndex.load(folder, split="train").rows[0]
    index = replaced(folder, row, json=record(frame_bytes=sizes))
    with pytest.raises(BrokenSampleError):
        ShardReader(index).frames(index.rows[0], [0, 9])


def test_frames_of_another_size_or_codec_are_a_broken_sample(shards, tmp_path):
    folder = shards()
    row = ShardIndex.load(folder, split="train").rows[0]
    write_media(tmp_path / "large.mp4", size=(64, 64), sound=False)
    data = (tmp_path / "large.mp4").read_bytes()
    for changed in (data, data.replace(b"avc1", b"av01"), data.replace(b"avc1", b"avq1")):
        index = replaced(folder, row, video=changed)
        with pytest.raises(BrokenSampleError):
            ShardReader(index).frames(index.rows[0], [0])


@pytest.mark.parametrize("size", [(2, 2), (72, 72), (34, 1022), (1080, 1920)])
def test_a_whole_video_of_any_size_is_read(tmp_path, size):
    write_media(tmp_path / "video.mp4", seconds=0.3, size=size, sound=False)
    data = (tmp_path / "video.mp4").read_bytes()
    assert len(list(decode_frames(data, [0, 2], fps=10, size=size))) == 2


def test_a_jpeg_of_another_or_a_huge_size_is_a_broken_sample(shards):
    folder = shards(("jpeg", "pcm"))
    row = replace(ShardIndex.load(folder, split="train").rows[0], num_frames=1)
    data = simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8))
    size = data.index(b"\xff\xc0") + 5
    for changed in (data, data[:size] + b"\xff\x00\xff\x00" + data[size + 4 :]):
        index = replaced(folder, row, json=record(frame_bytes=[len(changed)]), video=changed)
        with pytest.raises(BrokenSampleError, match="JPEG"):
            ShardReader(index).frames(index.rows[0], [0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("seconds", "hz"), [(0.5, 8000), (1.0, 16000), (1.0, 12000)])
def test_sound_of_another_rate_or_length_is_a_broken_sample(shards, form, seconds, hz):
    folder = shards(form)
    row = ShardIndex.load(folder, split="train").rows[0]
    wave = np.zeros(round(seconds * hz), np.int16)
    index = replaced(folder, row, audio=encode_sound(wave, Storage(10, hz, *form), kbps=64))
    with pytest.raises(BrokenSampleError):
        ShardReader(index).audio(index.rows[0], 0, row.num_samples)


def test_a_wav_that_claims_more_than_it_holds_is_a_broken_sample(shards):
    folder = shards(("jpeg", "pcm"))
    row = ShardIndex.load(folder, split="train").rows[0]
    index = replaced(folder, row, audio=wav_header(row.num_samples, hz=8000) + bytes(100))
    with pytest.raises(BrokenSampleError, match="cannot hold"):
        ShardReader(index).audio(index.rows[0], 0, 10)


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_a_training_goes_on_over_damage_and_its_batches_are_the_same_from_memory(
    shards, tmp_path, cache_gb
):
    folder, ledger = shards(), tmp_path / "ledger.jsonl"
    rows = ShardIndex.load(folder, split="train").rows
    shard = folder / rows[0].shard
    data = bytearray(shard.read_bytes())
    codec = data.index(b"avc1", rows[0].video[0] + 100)  # of the track, behind the file's type
    data[codec] ^= 16  # no decoder has this name
    data[rows[1].json[0]] = 0
    shard.write_bytes(data)
    how = Loading(0, cache_gb, max_broken_share=0.5, ledger=ledger)
    index = ShardIndex.load(folder, split="train")
    batches = list(
        train_batches(index, SAMPLING, batch_size=4, steps=range(6), seed=0, loading=how)
    )
    shown = {key for batch in batches for key in batch.clip_ids}
    assert shown == {row.key for row in rows[2:]} and set(read_ledger(ledger)) == {
        rows[0].clip_id, rows[1].clip_id,
    }  # fmt: skip
    workers = replace(how, workers=1, cache_gb=1.0 - cache_gb)
    other = train_batches(index, SAMPLING, batch_size=4, steps=range(6), seed=0, loading=workers)
    assert all(same(*pair) for pair in zip(batches, other, strict=True))


GOOD = {
    "key": "a", "clip_id": "a", "media": "m", "split": "train", "shard": "train-0.tar",
    "labels": {"x": "y"}, "json": [512, 10], "video": [1024, 20], "audio": None, "num_frames": 10,
    "height": 8, "width": 8, "num_samples": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        "", "{", "[" * 100_000, "[]", "null", "7", '{"key": "a"}', "\x00", "\ud800",
        *(
            json.dumps(GOOD | change)
            for change in (
                {"key": ""}, {"key": 7}, {"key": None}, {"shard": 7}, {"shard": "../a.tar"},
                {"shard": "/etc/passwd"}, {"shard": ".hidden"}, {"shard": "a\x00b"}, {"shard": ""},
                {"labels": {"x": 7}}, {"labels": []}, {"labels": None}, {"json": None},
                {"json": [-1, 10]}, {"json": [1, -10]}, {"json": [1]}, {"json": [1, 2, 3]},
                {"json": "ab"}, {"json": [0.5, 1]}, {"json": [1, 2**63]}, {"json": [10**400, 1]},
                {"video": [True, 1]}, {"video": {}}, {"audio": [0, "1"]}, {"num_frames": -1},
                {"num_frames": None}, {"num_frames": "10"}, {"num_frames": 0}, {"height": 0},
                {"height": 10**9}, {"num_samples": 1e300}, {"num_samples": float("nan")},
                {"more": 1},
            )
        ),
        json.dumps(GOOD | {"key": "first"}),
    ],
)  # fmt: skip
def test_a_damaged_row_of_an_index_is_named_by_its_line(tmp_path, line):
    path = tmp_path / INDEX
    write_index(path, [row_of(GOOD | {"key": "first"})], storage=Storage(10, 8000, "h264", "pcm"))
    with path.open("ab") as file:
        file.write(line.encode(errors="surrogatepass") + b"\n")
    with pytest.raises(DataError, match=rf"{INDEX}:3: ") as error:
        read_index(path)
    assert error.value.hint and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "change",
    [{"format": 1}, {"fps": 0}, {"fps": 10**400}, {"fps": "10"}, {"audio": "mp3"}, {"audio_hz": -1},
     {"video": None}, {"more": 1}],
)  # fmt: skip
def test_a_damaged_first_line_is_named(tmp_path, change):
    header = {"format": 2, "fps": 10, "audio_hz": 8000, "video": "h264", "audio": "pcm"}
    (tmp_path / INDEX).write_text(json.dumps(header | change) + "\n")
    with pytest.raises(DataError, match=rf"{INDEX}:1: "):
        read_index(tmp_path / INDEX)


def test_an_index_that_is_empty_or_a_folder_is_named(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    for name, message in (("empty", "it is empty"), (".", "cannot be read"), ("gone", "missing")):
        with pytest.raises(DataError, match=message):
            read_index(tmp_path / name)


def test_a_missing_shard_is_named(shards):
    folder = shards()
    index = ShardIndex.load(folder, split="train")
    (folder / index.rows[0].shard).unlink()
    with pytest.raises(DataError, match=rf"{index.rows[0].shard} is missing") as error:
        ShardReader(index).captions(index.rows[0])
    assert not isinstance(error.value, BrokenSampleError)


@needs_data
def test_one_changed_byte_of_a_codecs_name_breaks_one_sample(tmp_path):
    source = Path(TEST_DATA) / "attack" / "shard-onebyte-avc1.tar"
    shutil.copyfile(source, tmp_path / "train-00000.tar")
    places: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(source) as tar:
        for member in tar:
            key, _, kind = member.name.rpartition(".")
            places.setdefault(key, {})[kind] = (member.offset_data, member.size)
    rows = [
        IndexRow(
            key, key, key, "train", "train-00000.tar", {}, own["json"], own["mp4"], own.get("wav"),
            10, 72, 72, 8000 if "wav" in own else 0,
        )
        for key, own in places.items()
    ]  # fmt: skip
    reader = ShardReader(ShardIndex(tmp_path, Storage(10, 8000, "h264", "pcm"), rows))
    broken = []
    for row in rows:
        try:
            reader.frames(row, range(10))
        except BrokenSampleError as error:
            broken.append(error.problem)
    assert len(broken) == 1 and "its codec is not h264" in broken[0]


@needs_data
@pytest.mark.parametrize(
    "name", sorted(path.name for path in Path(TEST_DATA or ".").glob("attack/fuzz-shard-*"))
)
def test_attacks_on_an_index_are_named_lines_or_broken_samples(tmp_path, name):
    attack = Path(TEST_DATA) / "attack"
    try:
        storage, rows = read_index(attack / name)
    except DataError as error:
        assert f"{name}:" in error.problem
        return
    for shard in {row.shard for row in rows}:
        (tmp_path / shard).symlink_to(attack / "shard-onebyte-avc1.tar")
    reader = ShardReader(ShardIndex(tmp_path, storage, rows))
    broken = 0
    for row in rows:  # some lie in this shard, some in another one
        try:
            reader.frames(row, [0])
            reader.captions(row)
            reader.audio(row, 0, row.num_samples)
        except BrokenSampleError:
            broken += 1
    assert 0 < broken < len(rows)
