"""Depth: mp4 or pictures -> frames by the clip's clock -> the same part as of the video."""

import contextlib
from dataclasses import replace

import cv2
import numpy as np
import pytest

from tests.data.corpus import demo_params, write_media
from tests.data.loading.test_sampling import FPS, ROW, SAMPLING, STORAGE, VOCABULARY, Counting
from vatt.config import DepthParams, DepthStorageParams
from vatt.data.clips.media import BrokenMediaError
from vatt.data.loading.sampling import Arrays, Request, fill
from vatt.senses import SENSES
from vatt.senses.form import SampleSource

DEPTH = SENSES["depth"]
SECTION = DepthParams(size="tiny", frames=8, frame_size=4, patch=(2, 2, 2))


def stored(**changes):
    depth = DepthStorageParams(**{"short_side": 16, **changes})
    return demo_params().preprocess.model_copy(update={"depth": depth})


def cut(path, windows, params=None):
    pieces, complaint = DEPTH.cut(path, windows, params or stored())
    return [None if one is None else DEPTH.decode(one.data, one.count) for one in pieces], complaint


def levels(frames):
    return frames.mean(axis=(1, 2)).round().tolist()


def test_frame_k_is_what_stands_k_frames_after_the_start(tmp_path):
    path = tmp_path / "a.depth.mp4"
    write_media(path, seconds=3.0, size=(32, 48), sound=False, step=8)  # level 8 k at k / 10 s
    (first, second), said = cut(path, [(0.0, 1.0), (1.5, 2.5)])
    assert said == "" and first.shape == (10, 16, 24) and first.dtype == np.uint8
    np.testing.assert_allclose(levels(first), 8 * np.arange(10), atol=2)
    np.testing.assert_allclose(levels(second), 8 * np.arange(15, 25), atol=2)


def test_a_slower_and_a_faster_recording_show_what_stands_at_each_moment(tmp_path):
    for fps in (5, 30):
        write_media(tmp_path / "a.mp4", seconds=2.0, fps=fps, size=(32, 32), sound=False, step=4)
        (found,), _ = cut(tmp_path / "a.mp4", [(0.5, 1.5)])
        expected = 4 * np.floor((0.5 + np.arange(10) / 10) * fps + 0.1)
        np.testing.assert_allclose(levels(found), expected, atol=2)


def test_pictures_of_16_bits_are_a_sequence(tmp_path):
    folder = tmp_path / "a.depth"
    folder.mkdir()
    for k in range(40):
        picture = np.full((20, 30), 100 * k, np.uint16)
        picture[:10] = 0
        cv2.imwrite(str(folder / f"{k:04d}.png"), picture)
    (found,), said = cut(folder, [(1.0, 2.0)], stored(farthest=4000, png_fps=20.0))
    assert said == "" and found.shape == (10, 16, 24)
    assert not found[:, :7].any()
    np.testing.assert_allclose(
        found[:, 10:].mean(axis=(1, 2)), 255 * 100 * np.arange(20, 40, 2) / 4000, atol=1
    )


def test_a_window_after_the_end_has_no_depth_and_the_others_do(tmp_path):
    write_media(tmp_path / "a.mp4", seconds=1.0, size=(32, 32), sound=False)
    pieces, said = cut(tmp_path / "a.mp4", [(0.0, 1.0), (0.5, 1.5)])
    assert [piece is not None for piece in pieces] == [True, False]
    assert said == "no depth in 1 of 2 windows"


@pytest.mark.parametrize("content", [b"", b"x" * 5000])
def test_a_file_that_is_no_video_says_so(tmp_path, content):
    (tmp_path / "a.depth.mp4").write_bytes(content)
    pieces, said = cut(tmp_path / "a.depth.mp4", [(0.0, 1.0)])
    assert pieces == [None]
    assert said == "no depth: a.depth.mp4: Invalid data found when processing input"


def test_a_picture_that_is_none_and_a_folder_without_pictures(tmp_path):
    assert cut(tmp_path, [(0.0, 1.0)])[1] == "no depth in 1 of 1 windows"
    (tmp_path / "1.png").write_bytes(b"no picture")
    assert "1.png is not a picture" in cut(tmp_path, [(0.0, 0.01), (0.0, 1.0)])[1]


def test_pictures_come_in_the_order_of_their_numbers_without_hidden_files(tmp_path):
    for k in range(12):
        cv2.imwrite(str(tmp_path / f"d{k}.png"), np.full((16, 16), 10 * k, np.uint8))
    (tmp_path / "d11.png").rename(tmp_path / "D11.PNG".replace("D", "d"))
    (tmp_path / "._d0.png").write_bytes(b"of a Mac")
    (found,), said = cut(tmp_path, [(0.0, 1.2)], stored(png_fps=10.0, farthest=255))
    assert said == "" and levels(found) == [10 * k for k in range(12)]


@pytest.mark.parametrize(
    ("size", "said"), [((2**14, 2**14), "16384 x 16384 pixels"), ((2, 2**19), "too narrow")]
)
def test_a_picture_that_would_take_gigabytes_is_refused(tmp_path, size, said):
    data = bytearray(png(np.zeros((size[0] if size[0] == 2 else 4, 4), np.uint8)))
    if size[0] == 2:
        data = png(np.zeros(size, np.uint8))
    else:
        data[16:24] = size[1].to_bytes(4) + size[0].to_bytes(4)
    (tmp_path / "1.png").write_bytes(data)
    assert said in cut(tmp_path, [(0.0, 0.1)])[1]


def test_a_video_without_a_decoder_says_so(tmp_path):
    write_media(tmp_path / "a.depth.mp4", seconds=1.0, size=(32, 32), sound=False)
    data = (tmp_path / "a.depth.mp4").read_bytes()
    (tmp_path / "a.depth.mp4").write_bytes(data.replace(b"avc1", b"avq1"))
    assert cut(tmp_path / "a.depth.mp4", [(0.0, 1.0)])[1].startswith("no depth: a.depth.mp4: ")


def png(frames):
    return bytes(cv2.imencode(".png", frames)[1])


@pytest.mark.parametrize("data", [b"", b"abc", png(np.zeros((7, 4, 3), np.uint8))])
def test_a_damaged_member_is_refused(data):
    with pytest.raises(BrokenMediaError):
        DEPTH.decode(data, 7)


def test_any_damage_to_a_member_is_found():
    frames = np.random.default_rng(0).integers(0, 256, (21, 9), dtype=np.uint8)
    data = png(frames)
    for place in range(8, 8 * len(data), 11):
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        with contextlib.suppress(BrokenMediaError):  # or it was in the end mark
            np.testing.assert_array_equal(DEPTH.decode(bytes(damaged), 7).reshape(21, 9), frames)
    header = data[:16] + (2**31 - 1).to_bytes(4) + data[20:]
    with pytest.raises(BrokenMediaError, match="pixels"):
        DEPTH.decode(header, 7)


class Sensing(Counting):
    """Frame k of the depth is k on the left and 100 + k on the right; rows tell the height."""

    def signal(self, row, name):
        frames = np.tile(np.arange(100, dtype=np.uint8)[:, None, None], (1, 8, 8))
        frames[..., 4:] += 100
        return frames


def show(draw, *, view=None, flip=False):
    row = replace(ROW, senses={"depth": (0, 1, 100)})
    storage = replace(STORAGE, senses={"depth": {"short_side": 8}})
    change = SAMPLING.augmentation.model_copy(
        update={"flip": flip, "crop_area": (1.0, 1.0), "crop_aspect": (1.0, 1.0)}
    )
    sampling = replace(SAMPLING, more={"depth": SECTION}, augmentation=change)
    arrays = Arrays.empty(1, sampling.shapes())
    fill(arrays, 0, Request(row, draw), SampleSource(Sensing(), storage, sampling, VOCABULARY))
    return arrays


@pytest.mark.parametrize("step", range(20))
def test_depth_shows_the_frames_of_the_video_and_is_flipped_with_it(step):
    arrays = show((0, step), flip=True)
    first = int(arrays["video"][0, 0, 0, 0, 0])
    assert first <= 10 * FPS
    left, right = arrays["depth"][0, :, 0, 0], arrays["depth"][0, :, 0, -1]
    near, far = (left, right) if left[0] < right[0] else (right, left)
    assert near.tolist() == list(range(first, first + 8))
    assert far.tolist() == list(range(first + 100, first + 108))


def test_some_clips_are_flipped():
    starts = [show((0, step), flip=True)["depth"][0, 0, 0] for step in range(20)]
    assert len({bool(row[0] > row[-1]) for row in starts}) == 2


def test_values_become_minus_one_to_one():
    import torch

    values = torch.tensor([0, 255], dtype=torch.uint8)
    assert DEPTH.scaled(values, None).tolist() == [-1, 1]
