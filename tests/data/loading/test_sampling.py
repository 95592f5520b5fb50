"""What a sample shows: captions nearest in time, sound in step, rows that lack something."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.corpus import demo_params, make_clip, make_corpus
from tests.data.sharding.test_shards import write
from vatt.data.clips.ledger import Entry
from vatt.data.clips.manifest import Caption
from vatt.data.clips.samples import IndexRow, nearest
from vatt.data.clips.storage import Storage
from vatt.data.clips.text import Vocabulary
from vatt.data.loading.batches import Sampling, eval_batches, train_batches
from vatt.data.loading.reader import ShardIndex, ShardReader
from vatt.data.loading.sampling import Arrays, Request, fill
from vatt.senses.form import SampleSource

FPS, HZ, FRAMES = 10, 1000, 100
STORAGE = Storage(FPS, HZ, "h264", "pcm")
SAMPLING = Sampling(
    frames=8,
    fps=10,
    frame_size=(4, 4),
    samples=800,
    audio_hz=None,
    candidates=5,
    words=2,
    augmentation=demo_params().pretrain.augmentation,
)
ROW = IndexRow("k", "k", "m", "train", "s", {}, (0, 0), (0, 0), (0, 0), FRAMES, 4, 4, 10 * HZ)

VOCABULARY = Vocabulary(
    {f"w{number}": 2 + number for number in range(40)}, unknown=1, cut=lambda text: text.split()
)


class Counting:
    """A stored clip whose frame k is grey k and whose sound counts its samples."""

    def __init__(self, captions=()) -> None:
        self._captions = captions

    def captions(self, row):
        return self._captions

    def each_frame(self, row, indices, box):
        for place, index in enumerate(indices):
            yield place, np.full((*box[2:], 3), index, np.uint8)

    def audio(self, row, first, last):
        return np.arange(max(first, 0), min(last, row.num_samples)).astype(np.int16)


def shown(draw, *, captions=(), row=ROW, sampling=SAMPLING) -> Arrays:
    arrays = Arrays.empty(1, sampling.shapes())
    source = SampleSource(Counting(captions), STORAGE, sampling, VOCABULARY)
    fill(arrays, 0, Request(row, draw), source)
    return arrays


def naive_nearest(captions, start, end, count):
    """Pick the nearest one by one: by the gap to the window, then by the centres, then in time."""
    left, picked = list(captions), []
    while left and len(picked) < count:
        best = left[0]
        for caption in left[1:]:
            keys = []
            for one in (caption, best):
                if one.end < start:
                    gap = start - one.end
                elif one.start > end:
                    gap = one.start - end
                else:
                    gap = 0.0
                middle = abs((one.start + one.end) / 2 - (start + end) / 2)
                keys.append((gap, middle, one.start))
            if keys[0] < keys[1]:
                best = caption
        left.remove(best)
        picked.append(best)
    return picked


times = st.integers(-40, 140).map(lambda tenth: tenth / 10)
spans = st.tuples(times, st.integers(0, 40)).map(lambda s: (s[0], s[0] + s[1] / 10))


@settings(max_examples=100, deadline=None)
@given(spans=st.lists(spans, max_size=12), step=st.integers(0, 10**6))
def test_the_five_captions_nearest_to_what_is_shown(spans, step):
    captions = tuple(Caption(*span, f"w{number}") for number, span in enumerate(spans))
    arrays = shown((0, step, 0), captions=captions)
    start = arrays["video"][0, 0, 0, 0, 0] / FPS
    expected = naive_nearest(captions, start, start + 0.8, 5)
    assert [row[0] for row in arrays["text"][0].tolist() if row[0]] == [
        2 + int(caption.text[1:]) for caption in expected
    ]
    assert nearest(captions, start=start, end=start + 0.8, count=5) == expected
    assert (arrays["text"][0, len(expected) :] == 0).all()


@settings(max_examples=60, deadline=None)
@given(step=st.integers(0, 10**6), place=st.integers(0, 2048))
def test_sound_begins_with_the_first_frame_to_the_sample(step, place):
    arrays = shown((7, step, place))
    first = int(arrays["video"][0, 0, 0, 0, 0])
    assert arrays["video"][0, :, 0, 0, 0].tolist() == list(range(first, first + 8))
    begin = first * HZ // FPS
    assert arrays["audio"][0].tolist() == list(range(begin, begin + 800))


def test_sound_alone_is_drawn_by_itself_and_a_short_one_ends_in_silence():
    deaf = replace(ROW, video=None, num_frames=0)
    starts = {int(shown((0, step, 0), row=deaf)["audio"][0, 0]) for step in range(50)}
    assert len(starts) > 40 and max(starts) <= 10 * HZ - 800
    short = replace(deaf, num_samples=300)
    arrays = shown((0, 0, 0), row=short)
    assert arrays["audio"][0].tolist() == [*range(300), *[0] * 500]
    assert not arrays["has_video"][0] and arrays["has_audio"][0] and (arrays["video"] == 0).all()


def test_a_row_used_before_keeps_nothing_of_the_sample_before():
    arrays = Arrays.empty(1, SAMPLING.shapes())
    for name in arrays:
        arrays[name][:] = 1
    empty = replace(ROW, video=None, audio=None, num_frames=0, num_samples=0)
    source = SampleSource(Counting(), STORAGE, SAMPLING, VOCABULARY)
    fill(arrays, 0, Request(empty, (0,)), source)
    assert not any(arrays[name].any() for name in ("video", "audio", "text", "has_video"))
    assert arrays["colour"][0].tolist() == [0, 1, 1, 0]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """As of HowTo100M and AudioSet: every second clip has no text."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("mixed")
    clips, entries = make_corpus(root / "media", 6)
    clips = [replace(clip, captions=clip.captions * (n % 2)) for n, clip in enumerate(clips)]
    write(root, clips, entries)
    return root / "shards"


def write_frames(path: Path, frames: np.ndarray) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_rows_without_text_come_with_padding_alone_beside_others(mixed):
    sampling = replace(SAMPLING, samples=3200, frames=4)
    index = ShardIndex.load(mixed, split="train")
    for batches in (
        eval_batches(index, sampling, batch_size=6),
        train_batches(index, sampling, batch_size=6, steps=range(2), seed=0),
    ):
        for batch in batches:
            with_text = [int(key[-3:]) % 2 == 1 for key in batch.clip_ids]
            assert (batch.text != 0).any(-1).any(-1).tolist() == with_text
            assert batch.has_video.all() and batch.has_audio.all()


def test_what_a_batch_shows_is_cut_from_what_the_shards_hold(mixed):
    """Crop and sound of the centre, taken by hand from the decoded sample."""
    sampling = replace(SAMPLING, frame_size=(24, 24), frames=4, samples=3200)
    index = ShardIndex.load(mixed, split="train")
    [batch] = eval_batches(index, sampling, batch_size=6)
    reader = ShardReader(index)
    for row in index.rows:
        place = batch.clip_ids.index(row.key)
        frames = reader.frames(row, range(row.num_frames))[3:7]
        top, left = (row.height - 24) // 2, (row.width - 24) // 2
        part = frames[:, top : top + 24, left : left + 24]
        assert np.array_equal(batch.video[place].numpy(), part)
        wave = reader.audio(row, 0, row.num_samples)[2400:5600]
        assert np.array_equal(batch.audio[place].numpy(), wave)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("form", ["h264", "jpeg"])
def test_a_part_of_frames_is_that_part_of_the_whole_frames(stored, form, data):
    reader, row = stored[form]
    height, width = data.draw(st.integers(1, row.height)), data.draw(st.integers(1, row.width))
    top = data.draw(st.integers(0, row.height - height))
    left = data.draw(st.integers(0, row.width - width))
    part = reader.frames(row, [4, 2, 2, 9], (top, left, height, width))
    whole = reader.frames(row, [4, 2, 2, 9])
    assert np.array_equal(part, whole[:, top : top + height, left : left + width])


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A clip of noise in both forms."""
    root = tmp_path_factory.mktemp("stored")
    clip = make_clip(0)
    (root / "media").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (10, 36, 52, 3), np.uint8)
    write_frames(root / "media" / clip.media_name, noise)
    entries = {clip.clip_id: Entry(clip.clip_id, "ok", "download", seconds=1.0)}
    readers = {}
    for form in ("h264", "jpeg"):
        (root / form).mkdir()
        (root / form / "media").symlink_to(root / "media")
        write(root / form, [clip], entries, video_storage=form)
        index = ShardIndex.load(root / form / "shards", split="train")
        readers[form] = ShardReader(index), index.rows[0]
    return readers
