"""Crops, mirrors and colours: against naive forms, and a pure function of their generator."""

import colorsys

import numpy as np
import pytest
import torch

from tests.data.corpus import show
from vatt.config import AugmentationParams
from vatt.senses import video as augment

JITTER = AugmentationParams(
    crop_area=(0.08, 1.0),
    crop_aspect=(0.5, 2.0),
    flip=True,
    brightness=0.1255,
    contrast=0.4,
    saturation=0.4,
    hue=0.2,
)


def test_the_same_keys_give_the_same_numbers_and_others_do_not():
    first, again, other = (
        torch.rand(8, generator=augment.generator_for(*keys))
        for keys in ((1, 2, 3), (1, 2, 3), (1, 3, 2))
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_boxes_lie_inside_and_keep_their_ranges():
    generator = augment.generator_for(0)
    for _ in range(300):
        top, left, tall, wide = augment.draw_box(
            (90, 120), area=(0.08, 1.0), aspect=(0.5, 2.0), generator=generator
        )
        assert 0 <= top <= 90 - tall and 0 <= left <= 120 - wide
        assert 0.07 <= tall * wide / 10800 <= 1.0 and 0.47 <= wide / tall <= 2.1


def test_the_demo_crop_is_64_of_72_anywhere():
    generator = augment.generator_for(1)
    boxes = [
        augment.draw_box((72, 72), area=(0.79, 0.79), aspect=(1.0, 1.0), generator=generator)
        for _ in range(500)
    ]
    assert {box[2:] for box in boxes} == {(64, 64)}
    assert {box[0] for box in boxes} == {box[1] for box in boxes} == set(range(9))


@pytest.mark.parametrize(
    ("stored", "crop", "view", "views", "box"),
    [
        ((72, 72), (64, 64), 0, 1, (4, 4, 64, 64)),  # a little larger: cut as stored
        ((72, 100), (64, 64), 0, 3, (4, 0, 64, 64)),
        ((72, 100), (64, 64), 2, 3, (4, 36, 64, 64)),
        ((100, 72), (64, 64), 2, 3, (36, 4, 64, 64)),
        ((32, 48), (64, 64), 0, 1, (0, 8, 32, 32)),  # smaller: all of the short side
        ((128, 128), (32, 32), 0, 1, (8, 8, 112, 112)),  # much larger: 7/8 of it
    ],
)
def test_the_part_that_evaluation_shows(stored, crop, view, views, box):
    assert augment.view_box(stored, crop, view=view, views=views) == box


def test_taking_cuts_resizes_and_mirrors_every_frame_alike():
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 10, 3), dtype=np.uint8)
    plain = show(frames, (1, 2, 4, 6), (4, 6), flip=False)
    assert np.array_equal(plain, frames[:, 1:5, 2:8])
    assert np.array_equal(show(frames, (1, 2, 4, 6), (4, 6), flip=True), plain[:, :, ::-1])
    grey = np.full((2, 8, 8, 3), 77, np.uint8)
    assert np.array_equal(show(grey, (0, 0, 8, 8), (5, 3), flip=False), grey[:, :5, :3])


def naive_colour(frame, brightness, contrast, saturation, hue):
    """Pixel by pixel with colorsys; (H, W, C) in [0, 1]."""
    frame = frame + brightness
    for pixel in frame.reshape(-1, 3):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        pixel[:] = colorsys.hsv_to_rgb(h, min(s * saturation, 1.0), v)
    mean = frame.mean(axis=(0, 1))
    frame = (frame - mean) * contrast + mean
    for pixel in frame.reshape(-1, 3):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        pixel[:] = colorsys.hsv_to_rgb((h + hue) % 1.0, s, v)
    return frame.clip(0, 1)


def test_colour_equals_the_naive_form():
    video = 0.3 + 0.4 * np.random.default_rng(0).random((2, 2, 3, 4, 3))
    colour = np.array([[0.07, 0.8, 1.25, -0.12], [-0.1, 1.2, 0.7, 0.15]])
    changed = augment.change_colour(torch.from_numpy(video), torch.from_numpy(colour))
    for clip in range(2):
        for frame in range(2):
            naive = naive_colour(video[clip, frame].copy(), *colour[clip])
            np.testing.assert_allclose(changed[clip, frame].numpy(), naive, atol=1e-6)


def test_no_jitter_changes_nothing():
    still = JITTER.model_copy(update={"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0})
    assert augment.draw_colour(still, augment.generator_for(0)) == augment.IDENTITY
    video = torch.rand(1, 2, 3, 3, 3)
    same = augment.change_colour(video, torch.tensor([augment.IDENTITY]))
    torch.testing.assert_close(same, video)


def test_the_draws_stay_in_their_ranges():
    generator = augment.generator_for(5)
    drawn = torch.tensor([augment.draw_colour(JITTER, generator) for _ in range(500)])
    low = torch.tensor([-0.1255, 0.6, 0.6, -0.2])
    high = torch.tensor([0.1255, 1.4, 1.4, 0.2])
    assert (drawn >= low).all() and (drawn <= high).all()
    assert (drawn.amax(0) - drawn.amin(0) > 0.9 * (high - low)).all()
