"""Video: voxels of frames, cropped and flipped as they are read, coloured on the training device.

Random numbers come from the generator that is passed in. B clips, T H W C frames, height, width,
channels. Colour follows the released code: brightness is added, saturation and hue work in HSV,
contrast about the mean of a frame's channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import cv2
import numpy as np

from vatt.config import AugmentationParams, VideoParams
from vatt.data.clips.storage import Box
from vatt.senses.form import ArrayShapes, Cutting, Framing, SamplingLike, Sense, Showing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Colour = tuple[float, float, float, float]  # brightness, contrast, saturation, hue

IDENTITY: Colour = (0.0, 1.0, 1.0, 0.0)  # changes nothing
_TRIES = 10


class Video(Sense):
    """The picture: the sense with which all others are compared."""

    name, lacking, is_anchor, change = "video", "no-video", True, ("colour", IDENTITY)
    skips_absent = False  # as in the paper and the release

    def tokens(self, section: VideoParams) -> Cutting:
        """Voxels of t x h x w; a position is the sum of a temporal, vertical and horizontal one."""
        return Cutting(
            axes=("frames", "height", "width"),
            positions=("temporal", "vertical", "horizontal"),
            sizes=(section.frames, *pair(section.frame_size)),
            patch=section.patch,
            channels=3,
        )

    def arrays(self, sampling: SamplingLike) -> ArrayShapes:
        """The frames as they are stored; the training device changes their colours."""
        return {
            "video": ((sampling.frames, *sampling.frame_size, 3), np.uint8),
            "colour": ((4,), np.float32),
            "has_video": ((), np.bool_),
        }

    def fill(self, out: Mapping[str, np.ndarray], shown: Showing) -> None:
        """Crop, resize and flip the frames, and draw the colour change for them."""
        row, sampling = shown.row, shown.source.sampling
        out["colour"][:] = IDENTITY
        out["has_video"][()] = sampling.frames > 0 and row.video is not None
        if not out["has_video"]:
            out["video"][:] = 0
            return
        shown.framing, colour = _framing(shown)
        out["colour"][:] = colour
        fps, video = shown.source.storage.fps, out["video"]
        count = 1 if sampling.still else sampling.frames
        indices = frame_indices(
            round(shown.start * fps), row.num_frames, frames=count, stride=fps / sampling.fps
        )
        frames = shown.source.stored.each_frame(row, indices, shown.framing.box)
        show(frames, video[:count], flip=shown.framing.flip)
        video[count:] = video[:1]

    def scaled(self, values: Tensor, change: Tensor | None) -> Tensor:
        """A uint8 video in [-1, 1], its colours changed."""
        clips = values.float() / 255
        if change is not None:
            clips = change_colour(clips, change)
        return clips * 2 - 1

    def energy(self, values: Tensor) -> Tensor:
        """How much each value changes."""
        return frame_changes(values)


def _framing(shown: Showing) -> tuple[Framing, Colour]:
    """The part of the frames that is shown, and the colour change: drawn, or those of the view."""
    row, sampling, generator = shown.row, shown.source.sampling, shown.generator
    stored = row.height, row.width
    change = None if generator is None else sampling.augmentation
    if generator is None or change is None:
        view = shown.view
        box = view_box(stored, sampling.frame_size, view=view.crop, views=view.crops)
        return Framing(box, stored, flip=False), IDENTITY
    box = draw_box(stored, area=change.crop_area, aspect=change.crop_aspect, generator=generator)
    flip = uniform(0, 1, generator) < 0.5 and change.flip
    return Framing(box, stored, flip=flip), draw_colour(change, generator)


def frame_changes(video: Tensor) -> Tensor:  # (B, T, ...) uint8
    """|frame - the frame before it|; the first one is compared with the second."""
    import torch

    before = torch.arange(-1, video.shape[1] - 1, device=video.device).abs()
    others = video[:, before.clamp(max=video.shape[1] - 1)]
    return video.maximum(others) - video.minimum(others)


def frame_indices(first: int, available: int, *, frames: int, stride: float) -> list[int]:
    """`frames` indices from `first` on, `stride` apart; a clip too short for them is repeated."""
    fitting = max(int(np.ceil((available - first) / stride - 1e-6)), 1)
    return [first + int(number % fitting * stride + 1e-6) for number in range(frames)]


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width, where one number stands for both."""
    return (size, size) if isinstance(size, int) else size


def generator_for(*keys: int) -> torch.Generator:
    """A generator whose numbers depend on the keys alone."""
    import torch

    state = np.random.SeedSequence(keys).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2**63)


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    """A number from low to high."""
    import torch

    return low + (high - low) * torch.rand((), generator=generator).item()


def draw_box(
    size: tuple[int, int],
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
    generator: torch.Generator,
) -> Box:
    """A random part of a frame (H, W), its share of the area and width / height in the ranges."""
    height, width = size
    for _ in range(_TRIES):
        pixels = uniform(*area, generator) * height * width
        ratio = math.exp(uniform(math.log(aspect[0]), math.log(aspect[1]), generator))
        tall, wide = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < tall <= height and 0 < wide <= width:
            top = int(uniform(0, height - tall + 1, generator))
            left = int(uniform(0, width - wide + 1, generator))
            return min(top, height - tall), min(left, width - wide), tall, wide
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def view_box(size: tuple[int, int], crop: tuple[int, int], *, view: int, views: int) -> Box:
    """The part of a frame that evaluation shows: the centre, or one of several along the long side.

    A frame a little larger than the crop is cut as it is stored; a smaller or much larger one is
    cut so that the crop, once resized, shows 7/8 of the short side (all of it when smaller).
    """
    height, width = size
    zoom = min(height / crop[0], width / crop[1])  # stored pixels per pixel shown, at most
    if 1 <= zoom <= 4 / 3:
        zoom = 1
    elif zoom > 4 / 3:
        zoom *= 7 / 8
    tall, wide = min(round(crop[0] * zoom), height), min(round(crop[1] * zoom), width)
    share = 0.5 if views == 1 else view / (views - 1)
    down = share if height > width else 0.5
    across = 0.5 if height > width else share
    return int((height - tall) * down), int((width - wide) * across), tall, wide


def show(frames: Iterable[tuple[int, np.ndarray]], out: np.ndarray, *, flip: bool) -> None:
    """Resize and mirror frames alike: places and (h, w, C) uint8 -> `out` (T, H, W, C) uint8.

    Bilinear, with half-pixel centres. One frame at a time, while it is in the processor's cache.
    """
    cv2.setNumThreads(1)  # workers have a core each; more threads would be in their way
    size = out.shape[2], out.shape[1]
    for place, frame in frames:
        shown = out[place]
        cv2.resize(frame, size, dst=shown, interpolation=cv2.INTER_LINEAR)
        if flip:
            cv2.flip(shown, 1, dst=shown)


def draw_colour(params: AugmentationParams, generator: torch.Generator) -> Colour:
    """Brightness added, contrast and saturation factors, hue turned by a share of the circle."""
    return (
        uniform(-params.brightness, params.brightness, generator),
        uniform(1 - params.contrast, 1 + params.contrast, generator),
        uniform(1 - params.saturation, 1 + params.saturation, generator),
        uniform(-params.hue, params.hue, generator),
    )


def change_colour(video: Tensor, colour: Tensor) -> Tensor:  # (B, T, H, W, C) in [0, 1], (B, 4)
    """Brightness, saturation, contrast, hue in the released order, then clipped to [0, 1]."""
    video = _brighten(video, colour)
    video = _change_contrast(video, video.mean(dim=(2, 3), keepdim=True), colour)
    return turn_hue(video, colour[:, 3]).clamp(0, 1)


def change_colour_of_patches(
    patches: Tensor, frames: Tensor, video: Tensor, colour: Tensor
) -> Tensor:
    """The same for some patches (B, K, t, P, C), in [0, 1], of a uint8 video (B, T, H, W, C).

    `frames` (B, K, t) are the frames that each patch is of. The rest of a frame is needed only for
    the means of its channels, about which contrast changes.
    """
    means = _brighten(video.float() / 255, colour).mean(dim=(2, 3))
    places = frames.flatten(1)[..., None].expand(-1, -1, means.shape[-1])
    of_patch = means.gather(1, places)
    mean = of_patch.unflatten(1, frames.shape[1:])[..., None, :]
    patches = _change_contrast(_brighten(patches, colour), mean, colour)
    return turn_hue(patches, colour[:, 3]).clamp(0, 1)


def _brighten(video: Tensor, colour: Tensor) -> Tensor:
    brightness, _, saturation, _ = colour.to(video.dtype)[..., None, None, None, None].unbind(1)
    return change_saturation(video + brightness, saturation)


def _change_contrast(video: Tensor, mean: Tensor, colour: Tensor) -> Tensor:
    return (video - mean) * colour.to(video.dtype)[:, 1, None, None, None, None] + mean


def change_saturation(video: Tensor, factor: Tensor) -> Tensor:
    """Multiply the saturation of HSV, at most to 1; the value stays."""
    low, value = video.aminmax(dim=-1, keepdim=True)
    spread = value - low
    most = value / spread.clamp_min(1e-12)  # the factor that makes the saturation 1
    return value - (value - video) * factor.minimum(most.clamp_min(0))


def turn_hue(video: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by a share (B,) of the circle; largest and smallest channel stay as they are."""
    import torch

    turn = turn.to(video.dtype)[..., None, None, None]
    red, green, blue = video.unbind(-1)
    low, high = video.aminmax(dim=-1)
    spread = high - low
    scale = 1 / torch.where(spread > 0, spread, torch.ones_like(spread))
    sixths = torch.where(
        high == red,
        (green - blue) * scale,
        torch.where(high == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    sixths = (sixths + 6 * turn) % 6
    shares = torch.stack(
        ((sixths - 3).abs() - 1, 2 - (sixths - 2).abs(), 2 - (sixths - 4).abs()), dim=-1
    )
    return low[..., None] + spread[..., None] * shares.clamp(0, 1)
