"""Depth: frames of one channel, near to far, by the clock of the picture.

A clip's frames lie next to its media: `clip.depth.mp4`, or a folder `clip.depth` of PNG pictures of
8 or 16 bits, in the order of their names, `preprocess.depth.png_fps` a second. They are cropped and
flipped as the video is. T frames, H W height, width.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from vatt.config import DepthParams, DepthStorageParams, PreprocessParams
from vatt.data.clips.media import BrokenMediaError
from vatt.data.clips.samples import Window
from vatt.data.clips.storage import Box, Storage
from vatt.errors import SettingsError
from vatt.files import UNREADABLE
from vatt.senses.form import ArrayShapes, Cutout, Cutting, SamplingLike, Sense, Showing
from vatt.senses.video import frame_changes, frame_indices, pair, show, view_box

if TYPE_CHECKING:
    from torch import Tensor

MOST_PIXELS = 2**25  # of a frame: 8192 x 4096
MOST_STORED = 2**29  # pixels of a member: half a gigabyte
LONGEST_SIDE = 10**6  # pixels of a PNG
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # how each begins
LATE = 0.01  # seconds by which the stamp of a frame may be late
# What a decoder may raise for a damaged file.
DAMAGE = (*UNREADABLE, BrokenMediaError, av.FFmpegError, cv2.error, ArithmeticError, MemoryError)
Frame = NDArray[np.uint8]  # (H, W)
Timed = Iterator[tuple[float, Callable[[], Frame]]]  # when a frame appears, and how to get it


class Depth(Sense):
    """How far away each pixel is."""

    name, loss, lacking = "depth", "nce_depth", "no-depth"
    places: ClassVar[tuple[str, ...]] = ("{stem}.depth.mp4", "{stem}.depth")

    def tokens(self, section: DepthParams) -> Cutting:
        """Voxels, as of the video."""
        return Cutting(
            axes=("frames", "height", "width"),
            positions=("temporal", "vertical", "horizontal"),
            sizes=(section.frames, *pair(section.frame_size)),
            patch=section.patch,
            channels=None,
        )

    def arrays(self, sampling: SamplingLike) -> ArrayShapes:
        """Frames as they are stored."""
        section = sampling.more.get(self.name)
        if section is None:
            return {}
        shape = (section.frames, *pair(section.frame_size))
        return {"depth": (shape, np.uint8), "has_depth": ((), np.bool_)}

    def fill(self, out: Mapping[str, np.ndarray], shown: Showing) -> None:
        """The frames from the start on, at the video's rate, in the box of the video."""
        depth, row, source = out["depth"], shown.row, shown.source
        out["has_depth"][()] = self.name in row.senses
        if not out["has_depth"]:
            depth[:] = 0
            return
        stored, fps = source.stored.signal(row, self.name), source.storage.fps
        indices = frame_indices(
            round(shown.start * fps),
            len(stored),
            frames=len(depth),
            stride=fps / source.sampling.fps,
        )
        box, flip = _box(shown, stored.shape[1:], depth.shape[1:])
        top, left, height, width = box
        frames = stored[:, top : top + height, left : left + width]
        last = len(stored) - 1  # a clip whose depth ends a frame before its picture
        show(((k, frames[min(i, last)]) for k, i in enumerate(indices)), depth, flip=flip)

    def scaled(self, values: Tensor, change: Tensor | None) -> Tensor:
        """Near is -1, far is 1."""
        return values.float() / 127.5 - 1

    def energy(self, values: Tensor) -> Tensor:
        """How much each value changes, as of the video."""
        return frame_changes(values)

    def stored(self, params: PreprocessParams) -> dict[str, int] | None:
        """The length of the short side."""
        return None if params.depth is None else {"short_side": params.depth.short_side}

    def cut(
        self, path: Path, windows: Sequence[Window], params: PreprocessParams
    ) -> tuple[list[Cutout | None], str]:
        """The frames of each window at `preprocess.fps`, and why they are not in others."""
        assert params.depth is not None
        pieces: list[Cutout | None] = []
        lost = 0
        try:
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise BrokenMediaError("neither a file nor a folder")
            for window in windows:
                count = round((window[1] - window[0]) * params.fps)
                wanted = window[0] + np.arange(count) / params.fps
                timed = _pictures(path, params.depth) if path.is_dir() else _video(path, window)
                frames = _at(timed, wanted, params.depth)
                lost += frames is None
                pieces.append(None if frames is None else Cutout(_encode(frames), len(frames)))
        except DAMAGE as error:
            why = getattr(error, "strerror", None) or str(error)
            return [None] * len(windows), f"no depth: {path.name}: {why}"
        return pieces, f"no depth in {lost} of {len(windows)} windows" if lost else ""

    def member(self, key: str) -> str:
        """A PNG in which the frames stand one below the other."""
        return f"{key}.depth.png"

    def decode(self, data: bytes, count: int) -> np.ndarray:
        """(T, H, W) uint8."""
        width, height = _png_size(data)
        if width * height > MOST_STORED:
            raise BrokenMediaError(f"its depth has {width} x {height} pixels")
        try:
            picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        except cv2.error as error:
            raise BrokenMediaError(f"its depth cannot be decoded: {error}") from None
        if picture is None or picture.ndim != 2 or count == 0 or len(picture) % count:
            raise BrokenMediaError(f"its depth is not {count} frames of one channel")
        return picture.reshape(count, -1, picture.shape[1])

    def decoded_bytes(self, extent: tuple[int, int, int]) -> int:
        """About: noise does not compress, smooth frames do."""
        return 4 * extent[1]

    def check(self, section: DepthParams, storage: Storage) -> None:
        """The shards must hold depth."""
        if self.name not in storage.senses:
            raise SettingsError(
                "model.depth is on, but the shards hold no depth",
                hint="set preprocess.depth='{short_side: 72}', or model.depth=null",
            )


def _box(shown: Showing, stored: tuple[int, ...], size: tuple[int, ...]) -> tuple[Box, bool]:
    """The part of the depth that the video shows of its own frames, and whether it is flipped."""
    height, width = stored
    if shown.framing is None:
        return view_box((height, width), (size[0], size[1]), view=0, views=1), False
    of = shown.framing.stored
    top, left, tall, wide = (
        round(part * whole / own)
        for part, whole, own in zip(shown.framing.box, (height, width) * 2, of * 2, strict=True)
    )
    top, left = min(top, height - 1), min(left, width - 1)
    tall, wide = max(min(tall, height - top), 1), max(min(wide, width - left), 1)
    return (top, left, tall, wide), shown.framing.flip


def _video(path: Path, window: Window) -> Timed:
    """The frames of an mp4 that may stand in a window."""
    with av.open(str(path), format="mp4", options={"max_pixels": str(MOST_PIXELS)}) as container:
        stream = next(iter(container.streams.video), None)
        if stream is None or stream.codec_context is None:
            raise BrokenMediaError("it has no picture that can be decoded")
        stream.codec_context.thread_count = 1
        if not stream.time_base:
            raise BrokenMediaError("its picture has no clock")
        begin = (stream.start_time or 0) * stream.time_base
        if window[0] > 1:
            offset = int((window[0] + float(begin)) / stream.time_base)
            container.seek(offset, stream=stream)
        for frame in container.decode(stream):
            if frame.pts is not None:
                time = float(frame.pts * Fraction(stream.time_base) - begin)
                yield time, partial(_grey, frame)


def _grey(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """One of three equal channels: a weighted sum of them would round."""
    return np.asarray(frame.to_ndarray(format="rgb24")[..., 0])


def _pictures(path: Path, params: DepthStorageParams) -> Timed:
    """The PNGs of a folder: 2.png comes before 10.png, hidden files are left out."""
    names = [f.name for f in path.iterdir() if f.suffix.lower() == ".png" and f.is_file()]
    shown = sorted(name for name in names if not name.startswith("."))
    for number, name in enumerate(sorted(shown, key=_by_number)):
        yield number / params.png_fps, partial(_picture, path / name)


def _by_number(name: str) -> list[str | int]:
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def _picture(path: Path) -> NDArray[np.uint8]:
    if path.stat().st_size > MOST_STORED:
        raise BrokenMediaError(f"{path.name} is larger than {MOST_STORED // 2**20} MiB")
    data = path.read_bytes()
    width, height = _png_size(data)
    if width * height > MOST_PIXELS:
        raise BrokenMediaError(f"{path.name} has {width} x {height} pixels")
    is_png = width * height > 0
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if is_png else None
    if picture is None:
        raise BrokenMediaError(f"{path.name} is not a picture")
    return np.asarray(picture if picture.ndim == 2 else picture[..., 0])


def _png_size(data: bytes) -> tuple[int, int]:
    """The width and height that a PNG claims; zeros where the bytes are not one."""
    if not data.startswith(PNG):
        return 0, 0
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def _at(timed: Timed, wanted: NDArray[np.float64], params: DepthStorageParams) -> Frame | None:
    """What stands at each of the wanted times (T, H, W); None where nothing does.

    The last frame stands as long as the one before it.
    """
    frames: list[Frame] = []
    due = deque(wanted)
    most = MOST_STORED // max(len(wanted), 1)
    for since, until, get in _standing(timed):
        while due and since <= due[0] + LATE < until:
            frames.append(_scaled(get(), params, most))
            due.popleft()
        if not due or due[0] + LATE < since:
            break
    return np.stack(frames) if frames and not due else None


def _standing(timed: Timed) -> Iterator[tuple[float, float, Callable[[], Frame]]]:
    """From when to when each frame stands."""
    shown: Callable[[], Frame] | None = None
    since = length = 0.0
    for time, get in timed:
        if shown is not None:
            length = time - since
            yield since, time, shown
        since, shown = time, get
    if shown is not None:
        yield since, since + max(length, LATE) + LATE, shown


def _scaled(frame: NDArray[np.integer], params: DepthStorageParams, most: int) -> Frame:
    """As it is stored: 8 bits, on its short side `short_side` pixels; `most` pixels in all."""
    height, width = frame.shape
    scale = params.short_side / min(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    if size[0] * size[1] > most or max(size) > LONGEST_SIDE:
        raise BrokenMediaError(f"a frame of {width} x {height} is too narrow to be stored")
    levels = np.minimum(frame.astype(np.float32) * (255 / params.farthest), 255)
    resized = cv2.resize(levels, size, interpolation=cv2.INTER_AREA)
    return np.rint(resized).astype(np.uint8)


def _encode(frames: Frame) -> bytes:
    rows = frames.reshape(-1, frames.shape[2])
    if max(rows.shape) > LONGEST_SIDE:
        raise BrokenMediaError(f"{rows.shape[1]} x {rows.shape[0]} pixels do not fit into a PNG")
    return cv2.imencode(".png", rows)[1].tobytes()
