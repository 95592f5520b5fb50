"""Sampling, resizing, cropping and colour, against arrays recorded from the released code."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.corpus import show
from vatt.data.clips.samples import IndexRow
from vatt.data.clips.storage import Storage
from vatt.data.loading.sampling import Arrays, Request, Sampling, fill
from vatt.senses import video as augment
from vatt.senses.form import SampleSource, View

GOLDEN = dict(np.load(Path(__file__).parents[2] / "golden" / "data.npz"))
SAMPLES = sorted(name for name in GOLDEN if name.startswith("sample/"))


class Numbered:
    """A stored clip whose frame k is grey k."""

    def captions(self, row):
        return ()

    def each_frame(self, row, indices, box):
        yield from enumerate(np.array(indices, np.uint8)[:, None, None, None].repeat(3, axis=3))

    def audio(self, row, first, last):
        return np.zeros(0, np.int16)


@pytest.mark.parametrize("name", SAMPLES)
def test_frames_of_test_windows(name):
    length, steps, stride = (int(n) for n in re.findall(r"(?:len|steps|stride)(\d+)", name))
    windows = int(re.findall(r"windows(\d+)", name)[0]) if "windows" in name else 1
    if "linspace" in name and windows == 1:
        pytest.skip("one window: ours is the middle one")
    row = IndexRow("k", "k", "m", "test", "s", {}, (0, 0), (0, 0), None, length, 1, 1, 0)
    sampling = Sampling(steps, 50 / stride, (1, 1), 0, None, 0, 0, None)
    arrays = Arrays.empty(windows, sampling.shapes())
    source = SampleSource(Numbered(), Storage(50, 8000, "h264", "pcm"), sampling, None)
    for window in range(windows):
        fill(arrays, window, Request(row, None, View(window, windows)), source)
    assert arrays["video"][..., 0, 0, 0].ravel().tolist() == GOLDEN[name].tolist()


def test_resizing_is_bilinear_to_a_grey_level():
    frames, golden = (
        GOLDEN["image/frames_uint8"],
        GOLDEN["image/resize_smallest_24(uint8, truncated)"],
    )
    ours = show(frames, (0, 0, 40, 56), (24, 33), flip=False)
    assert np.abs(ours.astype(int) - golden).max() <= 1  # rounded, there cut off


def test_a_box_is_cut_out_and_resized():
    frames = GOLDEN["image/resize_smallest_24(uint8, truncated)"]
    golden = GOLDEN["image/box_y3:19_x5:30_resized_to_24(float, no antialias)"]
    ours = show(frames, (3, 5, 16, 25), (24, 24), flip=False)
    assert np.abs(ours - (golden + 1) * 127.5).max() <= 1.001  # whole grey levels, there floats


def test_crops_of_a_tall_picture_stand_one_above_the_other():
    tall = np.ascontiguousarray(GOLDEN["image/frames_uint8"].transpose(0, 2, 1, 3))
    resized = show(tall, (0, 0, 56, 40), (33, 24), flip=False)
    golden = GOLDEN["image/three_crops_24(tall input)"].reshape(3, 3, 24, 24, 3)
    for view in range(3):
        box = augment.view_box((33, 24), (24, 24), view=view, views=3)
        ours = show(resized, box, (24, 24), flip=False)
        assert np.abs(ours - (golden[view] + 1) * 127.5).max() <= 1.001


def test_crops_lie_where_they_should():
    resized = GOLDEN["image/resize_smallest_24(uint8, truncated)"]
    golden = GOLDEN["image/three_crops_24(concatenated on time, wide input)"].reshape(
        3, 3, 24, 24, 3
    )
    for view in range(3):
        box = augment.view_box((24, 33), (24, 24), view=view, views=3)
        ours = show(resized, box, (24, 24), flip=False) / 127.5 - 1
        np.testing.assert_allclose(ours, golden[view], atol=1e-6)
    box = augment.view_box((24, 33), (24, 24), view=0, views=1)
    ours = show(resized, box, (24, 24), flip=False)
    assert np.array_equal(ours, GOLDEN["image/central_crop_24"])


def test_colour_with_the_recorded_factors():
    factors = GOLDEN["color/factors(brightness_delta,saturation,contrast,hue_delta)"]
    brightness, saturation, contrast, hue = factors.tolist()
    video = torch.from_numpy(GOLDEN["image/normalized_0_1"])[None]
    ours = augment.change_colour(video, torch.tensor([[brightness, contrast, saturation, hue]]))
    golden = torch.from_numpy(GOLDEN["color/final_zero_centered"])
    torch.testing.assert_close(ours[0] * 2 - 1, golden, atol=1e-5, rtol=0)


def test_each_step_of_the_colour_alone():
    factors = GOLDEN["color/factors(brightness_delta,saturation,contrast,hue_delta)"]
    brightness, saturation, contrast, hue = map(float, factors)
    after = {
        name: torch.from_numpy(GOLDEN[f"color/after_{name}"])
        for name in ("1_brightness", "2_saturation", "3_contrast", "4_hue")
    }
    start = torch.from_numpy(GOLDEN["image/normalized_0_1"])
    bright, strong, rich, turned = after.values()
    factor = torch.tensor(saturation)
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(start + brightness, bright, **close)
    torch.testing.assert_close(augment.change_saturation(bright, factor), strong, **close)
    mean = strong.mean(dim=(1, 2), keepdim=True)
    torch.testing.assert_close((strong - mean) * contrast + mean, rich, **close)
    torch.testing.assert_close(augment.turn_hue(rich, torch.tensor(hue)), turned, **close)
