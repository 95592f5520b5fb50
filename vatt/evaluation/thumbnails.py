"""Small moving pictures of clips, for the report: animated WebP, a few kilobytes each."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from vatt.data.loading import Loading, open_index
from vatt.data.reader import BrokenSampleError, ShardReader

FRAMES = 8
HEIGHT, MOST_WIDTH = 72, 160  # pixels
MILLISECONDS = 180  # a frame
QUALITY = 45


def thumbnails(shards: Path, clip_ids: Iterable[str], loading: Loading) -> dict[str, bytes]:
    """A moving picture of each test clip that has one, whatever its length, in FRAMES frames."""
    keys = sorted(set(clip_ids))
    index = open_index(shards, loading, split="test", keys=keys)
    reader, found = ShardReader(index), {}
    try:
        for row in index.rows:
            if row.video is None:
                continue
            count = min(FRAMES, row.num_frames)
            places = np.linspace(0, row.num_frames - 1, count).astype(int).tolist()
            try:
                found[row.key] = _moving(reader.frames(row, places))
            except BrokenSampleError:  # the loader's ledger says so already
                continue
    finally:
        reader.close()
    return found


def _moving(frames: np.ndarray) -> bytes:
    """(T, H, W, C) -> a WebP that plays again and again."""
    _, height, width, _ = frames.shape
    size = (min(max(round(width * HEIGHT / height), 1), MOST_WIDTH), HEIGHT)
    first, *others = (Image.fromarray(frame).resize(size) for frame in frames)
    file = io.BytesIO()
    first.save(
        file, "WEBP", save_all=True, append_images=others,
        duration=MILLISECONDS, loop=0, quality=QUALITY,
    )  # fmt: skip
    return file.getvalue()
