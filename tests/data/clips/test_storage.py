"""Every stored form gives back what was put in, in step and in the right colours."""

import io
import json
import tarfile

import av
import numpy as np
import pytest

from tests.data.corpus import STEP, demo_params, make_corpus, write_media
from tests.data.sharding.test_cut import cut_file
from tests.data.sharding.test_shards import digests, write
from vatt.data.clips.media import BrokenMediaError
from vatt.data.clips.storage import (
    Storage,
    decode_frames,
    decode_jpegs,
    decode_sound,
    encode_sound,
    whole,
)
from vatt.data.loading.reader import ShardIndex, ShardReader
from vatt.errors import DataError

FORMS = [("h264", "flac"), ("jpeg", "pcm"), ("jpeg", "aac")]
PARAMS = demo_params().preprocess


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same corpus in every form."""
    root = tmp_path_factory.mktemp("forms")
    clips, entries = make_corpus(root / "media", 2)
    made = {}
    for video, audio in FORMS:
        folder = root / f"{video}-{audio}"
        folder.mkdir()
        (folder / "media").symlink_to(root / "media")
        write(folder, clips, entries, video_storage=video, audio_storage=audio)
        made[video, audio] = folder
    return made, clips, entries


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_alike(folders, form):
    index = ShardIndex.load(folders[0][form] / "shards", split="train")
    reader = ShardReader(index)
    for row in index.rows:
        frames = reader.frames(row, [8, 3, 3, 9])
        assert frames.shape == (4, row.height, row.width, 3)
        assert abs(frames.mean(axis=(1, 2, 3)) / STEP - [8, 3, 3, 9]).max() < 0.3
        wave = reader.audio(row, 3000, 9000)
        assert wave.dtype == np.int16 and len(wave) == 5000
        assert np.abs(wave[:900]).max() < 400 and np.abs(wave[1200:]).max() > 12000
    reader.close()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_bytes_each_time(folders, form, tmp_path):
    made, clips, entries = folders
    (tmp_path / "media").symlink_to(made[form] / "media")
    write(tmp_path, clips, entries, video_storage=form[0], audio_storage=form[1])
    assert digests(tmp_path) == digests(made[form])


def test_a_jpeg_shard_is_a_plain_tar_of_pictures(folders):
    folder = folders[0]["jpeg", "aac"] / "shards"
    [row, _] = ShardIndex.load(folder, split="train").rows
    with tarfile.open(folder / row.shard) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    names = [name.removeprefix(row.key) for name in members if name.startswith(row.key)]
    assert names == [".json", *(f".{number:04d}.jpg" for number in range(10)), ".m4a"]
    sizes = json.loads(members[f"{row.key}.json"])["frame_bytes"]
    assert sizes == [len(members[f"{row.key}.{number:04d}.jpg"]) for number in range(10)]


@pytest.mark.parametrize("form", FORMS)
def test_webdataset_reads_the_shards(folders, form):
    from webdataset import WebDataset

    folder = folders[0][form] / "shards"
    rows = ShardIndex.load(folder, split="train").rows
    shards = sorted({str(folder / row.shard) for row in rows})
    samples = list(WebDataset(shards, shardshuffle=False).decode("rgb8", partial=True))
    assert [sample["__key__"] for sample in samples] == [row.key for row in rows]
    for sample, row in zip(samples, rows, strict=True):
        assert sample["json"]["clip_id"] == row.clip_id
        if form[0] == "jpeg":
            assert sample["0009.jpg"].shape == (row.height, row.width, 3)
        else:
            assert len(sample["mp4"]) == row.video[1]
        assert {"wav", "flac", "m4a"} & sample.keys()


@pytest.mark.parametrize("form", ["flac", "aac"])
@pytest.mark.parametrize("hz", [8000, 48000])
def test_compressed_sound_stays_in_step_from_any_sample_on(form, hz):
    storage = Storage(10, hz, "h264", form)
    wave = np.random.default_rng(0).normal(0, 3000, 2 * hz)
    wave = np.convolve(wave, np.ones(16) / 4, "same").astype(np.int16)
    data = encode_sound(wave, storage, kbps=128)
    assert data == encode_sound(wave, storage, kbps=128)
    for first, last in ((0, 2 * hz), (hz // 3, hz), (hz + 1, hz + 1001), (2 * hz - 500, 2 * hz)):
        heard = decode_sound(data, first, last, storage).astype(float)
        assert len(heard) == last - first
        if form == "flac":
            assert np.array_equal(heard, wave[first:last])
        shifted = [np.corrcoef(heard, np.roll(wave, k)[first:last])[0, 1] for k in range(-3, 4)]
        assert np.argmax(shifted) == 3 and shifted[3] > 0.95


def test_both_picture_forms_show_the_same_colours(tmp_path):
    path = tmp_path / "colours.mp4"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.colorspace = 1  # BT.709, as high definition has it
        picture = np.zeros((64, 96, 3), np.uint8)
        picture[:, :32], picture[:, 32:64], picture[:, 64:] = (200, 30, 30), (30, 200, 30), 128
        for _ in range(10):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for form in ("h264", "jpeg"):
        params = PARAMS.model_copy(update={"video_storage": form, "crf": 8, "jpeg_scale": 2})
        [piece] = cut_file(path, [(0.0, 1.0)], tmp_path, params).pieces
        if form == "h264":
            shown = decode_frames(piece.video[0], [5], fps=10)
        else:
            shown = decode_jpegs(piece.video[5:6], height=piece.height, width=piece.width)
        seen = whole(shown, 1)[0, 16, [8, 24, 40]].astype(int)
        assert np.abs(seen - [(200, 30, 30), (30, 200, 30), (128, 128, 128)]).max() < 8, form


def test_broken_pictures_and_sound_are_named(folders, tmp_path):
    with pytest.raises(BrokenMediaError, match="JPEG"):
        next(decode_jpegs([b"\xff\xd8\xff nothing"], height=8, width=8))
    for form in ("flac", "aac"):
        with pytest.raises(BrokenMediaError, match="sound"):
            decode_sound(b"nothing" * 100, 0, 10, Storage(10, 8000, "h264", form))
    made, clips, entries = folders
    (tmp_path / "media").symlink_to(made["jpeg", "pcm"] / "media")
    write(tmp_path, clips, entries, video_storage="jpeg")
    index = ShardIndex.load(tmp_path / "shards", split="train")
    row = index.rows[0]
    shard = tmp_path / "shards" / row.shard
    data = bytearray(shard.read_bytes())
    data[row.video[0] : sum(row.video)] = bytes(row.video[1])
    shard.write_bytes(data)
    with pytest.raises(DataError, match=f"sample {row.key} of .*broken"):
        ShardReader(index).frames(row, [0])


def test_a_grown_file_is_read_whole(tmp_path):
    """Frames beyond the first second are found by a seek."""
    path = tmp_path / "long.mp4"
    write_media(path, seconds=3.0, step=8)
    params = PARAMS.model_copy(update={"clip_seconds": 3.0, "gop": 10})
    [piece] = cut_file(path, [(0.0, 3.0)], tmp_path, params).pieces
    frames = whole(decode_frames(piece.video[0], [25, 12, 29], fps=10), 3)
    assert (frames.mean(axis=(1, 2, 3)) / 8).round().tolist() == [25, 12, 29]


@pytest.fixture(scope="module")
def encoded():
    """Forty frames of noise in motion, with frames that no other one needs."""
    rng = np.random.default_rng(0)
    canvas = np.kron(
        rng.integers(0, 255, (30, 30, 3), dtype=np.uint8), np.ones((4, 4, 1), np.uint8)
    )
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"g": "10", "bf": "3", "x264-params": "b-adapt=0:scenecut=0"}
        for number in range(40):
            part = canvas[number : number + 48, number // 2 : number // 2 + 64]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(part), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    "indices",
    [
        [0], [39], [17], [9, 10], [12, 13, 14], [11, 13, 15, 17, 19], [3, 33], [38, 2, 2, 25],
        list(range(40)), list(range(1, 40, 4)), list(range(24, 40)),
    ],
)  # fmt: skip
def test_frames_are_those_of_a_decoder_that_leaves_none_out(encoded, indices):
    with av.open(io.BytesIO(encoded)) as container:
        all_ = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(all_) == 40
    shown = whole(decode_frames(encoded, indices, fps=10), len(indices))
    np.testing.assert_array_equal(shown, np.stack([all_[index] for index in indices]))
