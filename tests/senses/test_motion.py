"""Motion: files of any quality -> samples by the clip's clock -> what a batch shows."""

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.corpus import demo_params, make_corpus
from tests.data.loading.test_sampling import FPS, ROW, SAMPLING, STORAGE, VOCABULARY, Counting
from vatt.config import MotionParams, MotionStorageParams
from vatt.data.clips.ledger import read_ledger
from vatt.data.clips.media import BrokenMediaError
from vatt.data.clips.samples import INDEX, read_index
from vatt.data.loading.batches import eval_batches, open_index, train_batches
from vatt.data.loading.loader import Loading
from vatt.data.loading.sampling import Arrays, Request, fill
from vatt.data.sharding.shards import write_shards
from vatt.errors import SettingsError
from vatt.senses import SENSES, files_beside
from vatt.senses.form import SampleSource
from vatt.senses.motion import _encode, longest_gap, resampled

MOTION = SENSES["motion"]
SECTION = MotionParams(size="tiny", samples=40, channels=2, patch=5)


def stored(hz=50, channels=2, longest_gap=0.2):
    motion = MotionStorageParams(hz=hz, channels=channels, longest_gap=longest_gap)
    return demo_params().preprocess.model_copy(update={"motion": motion})


def wave(time):
    """Slow enough for 50 Hz."""
    return np.stack([np.sin(2 * np.pi * 1.5 * time), 3 * time], axis=-1)


def write_csv(path, time, values, *, names=("x", "y"), clock="t"):
    rows = [",".join([clock, *names])]
    rows += [",".join(map(repr, map(float, row))) for row in np.column_stack([time, values])]
    path.write_text("\n".join(rows) + "\n")
    return path


def cut(path, windows, params=None):
    pieces, complaint = MOTION.cut(path, windows, params or stored())
    return [
        None if one is None else MOTION.decode(one.data, one.count) for one in pieces
    ], complaint


# --- a file -> samples ----------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(rate=st.integers(30, 400), start=st.floats(0.1, 8), seed=st.integers(0, 2**16))
def test_sample_k_is_what_the_sensor_read_k_samples_after_the_start(rate, start, seed):
    jitter = np.random.default_rng(seed).uniform(-0.2, 0.2, size=10 * rate)
    time = (np.arange(10 * rate) + jitter) / rate
    params = MotionStorageParams(hz=50, channels=2)
    found = resampled(time, wave(time), (start, start + 1.0), params)
    expected = wave(start + np.arange(50) / 50)
    assert found.shape == (50, 2) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=0.03)


def test_a_tone_too_fast_for_the_stored_rate_does_not_become_a_slow_one():
    time = np.arange(5000) / 1000
    fast = np.sin(2 * np.pi * 245 * time)[:, None]  # every 20th sample of it looks like 5 Hz
    params = MotionStorageParams(hz=50, channels=1)
    assert np.abs(fast[::20]).max() > 0.9
    assert np.abs(resampled(time, fast, (1.0, 3.0), params)).max() < 0.15


def test_files_of_ego4d_give_the_same_as_our_own(tmp_path):
    time = np.arange(200) / 100
    own = write_csv(tmp_path / "a.motion.csv", time, wave(time))
    names = "component_idx,component_timestamp_ms,canonical_timestamp_ms,gyro_x,accl_x"
    rows = [
        f"0,{9000 + 1000 * t},{1000 * t},{x},{y}"
        for t, (x, y) in zip(time, wave(time), strict=True)
    ]
    theirs = tmp_path / "uid.csv"
    theirs.write_text("\n".join([names, *rows]) + "\n")
    windows = [(0.0, 1.0), (0.5, 1.5)]
    for one, other in zip(cut(own, windows)[0], cut(theirs, windows)[0], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_rows_in_disorder_and_rows_without_numbers_are_put_right_and_reported(tmp_path):
    time = np.arange(300) / 100
    path = write_csv(tmp_path / "a.motion.csv", time, wave(time))
    (clean,), said = cut(path, [(0.5, 2.5)])
    assert said == ""
    lines = path.read_text().splitlines()
    lines[100:120] = lines[100:120][::-1]
    lines[150:150] = [
        "1.485,nan,2",
        "1.486,inf,2",
        "1.487,1e300,2",
        "1.488,oops,1",
        "1.489",
        lines[150],
    ]
    path.write_text("\ufeff" + "\n".join(lines))
    (found,), said = cut(path, [(0.5, 2.5)])
    np.testing.assert_array_equal(found, clean)
    assert said == (
        "5 rows of a.motion.csv are not finite numbers; "
        "the rows of a.motion.csv are not in the order of time"
    )


def test_a_gap_loses_the_windows_that_it_touches_and_no_other(tmp_path):
    time = np.arange(600) / 100
    time = time[(time < 2.2) | (time > 2.9)]
    pieces, said = cut(
        write_csv(tmp_path / "a.motion.csv", time, wave(time)),
        [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0), (4.0, 5.0), (5.5, 6.5), (9.0, 10.0)],
    )
    assert [piece is not None for piece in pieces] == [True, True, False, True, False, False]
    assert said == "no motion from 2.19 to 2.91 s; 2 more gaps"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=20), st.integers(0, 30))
def test_the_longest_gap_is_that_of_a_search_in_small_steps(tenths, start):
    times, window = np.unique(tenths) / 10, (start / 10, start / 10 + 1)
    longest = 0
    for step in range(1000):  # thousandths of a second, by their middle
        moment = window[0] + (step + 0.5) / 1000
        before, after = times[times < moment], times[times > moment]
        left = before.max() if before.size else window[0]
        right = after.min() if after.size else window[1]
        longest = max(longest, right - left)
    gap = longest_gap(times, window)
    assert gap[1] - gap[0] == pytest.approx(longest, abs=1e-9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no column t or canonical_timestamp_ms in its first line"),
        (b"x,y\n1,2\n", "no column t or canonical_timestamp_ms in its first line"),
        (b"t\n1\n2\n", "no column but the time"),
        (b"t,x\n0,1\n1,2\n", "1 channels, preprocess.motion.channels is 2"),
        (b"t,x,y\nnan,1,2\n", "no row with a time and a number for each channel"),
        (b"t,x,y\n" + b"1" * 70_000, "a line of 65536 characters or more"),
        (b"\x00\xff" * 500, "no column t or canonical_timestamp_ms in its first line"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, content, message):
    path = tmp_path / "a.motion.csv"
    path.write_bytes(content)
    pieces, said = cut(path, [(0.0, 1.0)])
    assert pieces == [None] and said == f"no motion: a.motion.csv: {message}"


def test_a_quote_that_is_left_open_costs_its_row_only(tmp_path):
    path, time = tmp_path / "a.motion.csv", np.arange(150) / 100
    write_csv(path, time, wave(time))
    lines = path.read_text().splitlines()
    lines[40] = '"' + lines[40]
    path.write_text("\n".join(lines))
    (found,), said = cut(path, [(0.0, 1.0)])
    np.testing.assert_allclose(found, wave(np.arange(50) / 50), atol=0.05)
    assert said == "1 rows of a.motion.csv are not finite numbers"


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters_are_read(tmp_path, delimiter):
    path, time = tmp_path / "a.motion.csv", np.arange(150) / 100
    write_csv(path, time, wave(time))
    path.write_text(path.read_text().replace(",", delimiter))
    (found,), said = cut(path, [(0.0, 1.0)])
    assert said == "" and found.shape == (50, 2)


def test_a_missing_file_says_so(tmp_path):
    assert cut(tmp_path / "a.motion.csv", [(0.0, 1.0)])[1].endswith("No such file or directory")


# --- samples -> what is shown ---------------------------------------------------------------------


class Sensing(Counting):
    """A stored clip whose motion is the time of each sample."""

    def signal(self, row, name):
        assert name == "motion"
        return np.tile(np.arange(500, dtype=np.float32)[:, None] / 50, (1, 3))


@settings(max_examples=60, deadline=None)
@given(step=st.integers(0, 10**6))
def test_motion_begins_with_the_first_frame(step):
    row = replace(ROW, senses={"motion": (0, 1, 500)})
    storage = replace(STORAGE, senses={"motion": {"hz": 50, "channels": 3}})
    sampling = replace(SAMPLING, more={"motion": SECTION})
    arrays = Arrays.empty(1, sampling.shapes())
    fill(arrays, 0, Request(row, (0, step)), SampleSource(Sensing(), storage, sampling, VOCABULARY))
    first = int(arrays["video"][0, 0, 0, 0, 0]) / FPS
    assert arrays["has_motion"][0]
    expected = np.tile((first + np.arange(40) / 50)[:, None], (1, 2))
    np.testing.assert_allclose(arrays["motion"][0], expected, atol=1e-5)


# --- a folder -> shards -> batches ----------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Six clips; the second has no motion, that of the third has a gap."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("motion")
    clips, entries = make_corpus(root / "media", 6)
    (root / "corpus").mkdir()
    time = np.arange(110) / 100
    for number in range(6):
        times = time if number != 2 else time[(time < 0.2) | (time > 0.8)]
        write_csv(root / "corpus" / f"{number}.motion.csv", times, number + wave(times))
    clips = [
        replace(clip, senses={"motion": f"demo:{n}.motion.csv"} if n != 1 else {})
        for n, clip in enumerate(clips)
    ]
    write(root, clips, entries)
    return root / "shards"


def write(root, clips, entries, **data):
    params = demo_params(**data)
    return write_shards(
        clips,
        entries,
        params.preprocess.model_copy(update={"motion": stored().motion}),
        params.data,
        machine=params.machine,
        media=root / "media",
        folder=root / "shards",
        ledger=root / "ledger.jsonl",
        seed=0,
    )


def test_the_index_says_who_has_motion_and_the_ledger_why_not(shards):
    storage, rows = read_index(shards / INDEX)
    assert storage.senses == {"motion": {"hz": 50, "channels": 2}}
    has = {row.clip_id: row.senses.get("motion", (0, 0, 0))[2] for row in rows}
    assert has == {f"clip-{n:03d}": 0 if n in (1, 2) else 50 for n in range(6)}
    ledger = read_ledger(shards.parent / "ledger.jsonl")
    assert ledger["clip-000"].has == ("video", "audio", "text", "motion")
    assert ledger["clip-001"].has == ledger["clip-002"].has == ("video", "audio", "text")
    assert ledger["clip-002"].reason == "no motion from 0.19 to 0.81 s"


SEEN = replace(
    SAMPLING, frame_size=(16, 16), samples=6400, candidates=2, words=4,
    more={"motion": MotionParams(size="tiny", samples=40, channels=2, patch=5)},
)  # fmt: skip


@pytest.mark.parametrize("cache_gb", [0.0, 1.0], ids=["from shards", "from memory"])
def test_batches_hold_motion_where_there_is_some(shards, cache_gb):
    loading = Loading(cache_gb=cache_gb)
    index = open_index(shards, loading, split="train")
    (batch,) = eval_batches(index, SEEN, batch_size=6, loading=loading)
    assert batch.present["motion"].tolist() == [True, False, False, True, True, True]
    assert not batch.signals["motion"][1:3].any()
    assert batch.signals["motion"].shape == (6, 40, 2)
    start = 0.1  # the middle of two places: 8 of 10 frames are shown
    expected = 3 + wave(start + np.arange(40) / 50)
    np.testing.assert_allclose(batch.signals["motion"][3], expected, atol=0.05)


def test_training_draws_motion_and_picture_from_the_same_moment(shards):
    index = open_index(shards, Loading(), split="train")
    batches = train_batches(index, SEEN, batch_size=6, steps=range(8), seed=0)
    for batch in batches:
        for row in batch.present["motion"].nonzero().flatten().tolist():
            first = round(float(batch.signals["video"][row, 0].float().mean()) / 10)  # 10 a frame
            number = int(batch.clip_ids[row][-3:])
            times = (batch.signals["motion"][row, :, 1] - number) / 3
            np.testing.assert_allclose(times[0], first / 10, atol=0.02)


def test_a_damaged_member_is_a_broken_sample(shards, tmp_path):
    for name in ("train-00000.tar", "train-00001.tar", INDEX, "vocabulary.txt"):
        (tmp_path / name).write_bytes((shards / name).read_bytes())
    _, rows = read_index(tmp_path / INDEX)
    row = next(row for row in rows if "motion" in row.senses)
    shard = tmp_path / row.shard
    content = bytearray(shard.read_bytes())
    content[row.senses["motion"][0] + 3] ^= 255
    shard.write_bytes(content)
    with pytest.raises(Exception, match="its motion is damaged"):
        list(eval_batches(open_index(tmp_path, Loading(), split="train"), SEEN, batch_size=2))


def test_any_damage_to_a_member_is_found():
    values = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    data = _encode(values)
    np.testing.assert_array_equal(MOTION.decode(data, 50), values)
    np.testing.assert_array_equal(np.load(io.BytesIO(data)), values)  # others may read it, too
    damaged = [data[:end] for end in range(0, len(data), 13)] + [data + b"x"]
    for place in range(0, 8 * len(data), 7):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        damaged.append(bytes(flipped))
    huge = data.replace(b"(50, 6), }" + 8 * b" ", b"(5000000000, 6), }")
    assert len(huge) == len(data) and huge != data
    not_finite = values.copy()
    not_finite[3, 2] = np.nan
    for one in (*damaged, huge, _encode(not_finite)):
        with pytest.raises(BrokenMediaError):
            MOTION.decode(one, 50)


def test_motion_can_be_required(tmp_path):
    clips, entries = make_corpus(tmp_path / "media", 2)
    (tmp_path / "corpus").mkdir()
    time = np.arange(110) / 100
    write_csv(tmp_path / "corpus" / "0.motion.csv", time, wave(time))
    clips[0] = replace(clips[0], senses={"motion": "demo:0.motion.csv"})
    assert write(tmp_path, clips, entries, require=("motion",)) == {"ok": 1, "no-motion": 1}


def test_shards_without_motion_say_what_to_set(shards):
    index = open_index(shards, Loading(), split="train")
    bare = replace(index, storage=replace(index.storage, senses={}))
    with pytest.raises(SettingsError, match="the shards hold no motion") as error:
        list(eval_batches(bare, SEEN, batch_size=2))
    assert "preprocess.motion=" in error.value.hint
    more = SECTION.model_copy(update={"channels": 3})
    with pytest.raises(SettingsError, match="channels is 3, but the shards have 2"):
        list(eval_batches(index, replace(SEEN, more={"motion": more}), batch_size=2))


def test_an_index_without_other_senses_is_written_as_before(shards, tmp_path):
    """Byte for byte what versions without other senses wrote, and read again by this one."""
    clips, entries = make_corpus(tmp_path / "media", 1)
    params = demo_params()
    write_shards(
        clips, entries, params.preprocess, params.data, machine=params.machine,
        media=tmp_path / "media", folder=tmp_path / "shards", ledger=tmp_path / "l", seed=0,
    )  # fmt: skip
    header, row = (tmp_path / "shards" / INDEX).read_text().splitlines()
    assert header == ('{"audio": "pcm", "audio_hz": 8000, "format": 2, "fps": 10, "video": "h264"}')
    assert json.loads(row).keys() == {
        "key", "clip_id", "media", "split", "shard", "labels", "json", "video", "audio",
        "num_frames", "height", "width", "num_samples",
    }  # fmt: skip
    (batch,) = eval_batches(
        open_index(tmp_path / "shards", Loading(), split="train"),
        replace(SEEN, more={}),
        batch_size=1,
    )
    assert batch.signals.keys() == {"video", "audio", "text"}


def test_shards_written_before_there_were_other_senses_load_as_they_did():
    """tests/golden/shards: two clips of tests/data/corpus.py, as commit b3ba96d wrote them."""
    index = open_index(Path(__file__).parents[1] / "golden" / "shards", Loading(), split="train")
    (batch,) = eval_batches(index, replace(SEEN, more={}), batch_size=2)
    digest = hashlib.sha256()
    for tensor in (*batch.signals.values(), batch.has_video, batch.has_audio):
        digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest() == "38068206bdd328bb21ff22e75a0cbe1f03fb21ee5615e9241f3a50988ac8a078"
    with pytest.raises(SettingsError, match="the shards hold no motion"):
        list(eval_batches(index, SEEN, batch_size=2))


def test_the_files_next_to_a_video_are_found(tmp_path):
    for name in ("a.motion.csv", "imu/b.csv", "day/c.mp4", "imu/d.csv", "day/imu/c.csv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("t,x\n")
    names = ("a.mp4", "b.mp4", "day/c.mp4", "day/d.mp4", "e.mp4")
    assert [files_beside(tmp_path, name) for name in names] == [
        {"motion": "a.motion.csv"},
        {"motion": "imu/b.csv"},
        {"motion": "day/imu/c.csv"},
        {"motion": "imu/d.csv"},
        {},
    ]
    inside = Path(tmp_path / "day")
    assert files_beside(inside, "d.mp4") == {}  # what lies above the folder is not the user's


def test_the_energy_of_motion_is_the_square_in_whole_steps():
    values = torch.tensor([[0.0, 0.5, -2.0, 1e30]])
    assert MOTION.energy(values).tolist() == [[0, 128**2, 512**2, (2**15 * 256) ** 2]]
