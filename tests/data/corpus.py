"""Small media with known content: frame k is grey level 10 k, sound is a ramp or a tone."""

import hashlib
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from vatt.config import Params, load_params
from vatt.data.clips.ledger import Entry
from vatt.data.clips.manifest import Caption, Clip
from vatt.data.clips.storage import Box
from vatt.senses import video as augment

HZ = 8000
STEP = 10  # grey levels from frame to frame

TEST_DATA = os.environ.get("VATT_TEST_DATA")
needs_data = pytest.mark.skipif(
    TEST_DATA is None, reason="set VATT_TEST_DATA to the folder of real test data"
)


def show(frames: np.ndarray, box: Box, size: tuple[int, int], *, flip=False) -> np.ndarray:
    """What a batch gets of frames: their part in the box, resized and mirrored."""
    top, left, height, width = box
    shown = np.empty((len(frames), *size, 3), np.uint8)
    part = frames[:, top : top + height, left : left + width]
    augment.show(enumerate(part), shown, flip=flip)
    return shown


def demo_params(**data) -> Params:
    """The demo's settings for tiny corpora: sections are replaced by name."""
    params = load_params(Path(__file__).parents[2] / "presets" / "demo.yaml")
    update = {"min_clips": 1, "min_share": 0.0, **data}
    return params.model_copy(
        update={
            "data": params.data.model_copy(update=update),
            "preprocess": params.preprocess.model_copy(
                update={"samples_per_shard": 4, "short_side": 32, "clip_seconds": 1.0}
            ),
            "machine": params.machine.model_copy(update={"workers": 0, "cache_gb": 0.0}),
        }
    )


def write_media(
    path: Path, *, seconds=1.0, fps=10, size=(32, 48), sound=True, step=STEP, gop=1, form="mp4"
) -> None:
    """Encode frames of level step * k and, with them, a tone that is silent in the first half."""
    with av.open(str(path), "w", format=form) as container:
        video = container.add_stream("libx264", rate=fps, options={"crf": "4", "g": str(gop)})
        video.height, video.width, video.pix_fmt = *size, "yuv420p"
        if sound:
            audio = container.add_stream("aac", rate=HZ, layout="mono")
        for number in range(round(seconds * fps)):
            pixels = np.full((*size, 3), number * step % 250, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if sound:
            time = np.arange(round(seconds * HZ)) / HZ
            wave = 0.5 * np.sin(2 * np.pi * 440 * time) * (time >= seconds / 2)
            frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = HZ, 0
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_clip(number: int, *, split="train", end: float | None = 1.0, captions=None) -> Clip:
    """A clip of the file `urls:<number>`, with two captions."""
    spoken = (Caption(0.0, 0.4, f"word{number} first"), Caption(0.6, 1.0, f"word{number} second"))
    return Clip(
        clip_id=f"clip-{number:03d}",
        source="test",
        url=f"urls:{number}.mp4",
        start=0.0,
        end=end,
        split=split,
        labels={"number": str(number), "parity": "odd" if number % 2 else "even"},
        captions=spoken if captions is None else captions,
        licence=None,
    )


def make_corpus(media: Path, count: int, *, tests=0) -> tuple[list[Clip], dict[str, Entry]]:
    """Clips with their media in place, as after a download; the last `tests` are for testing."""
    media.mkdir(parents=True, exist_ok=True)
    clips = []
    for number in range(count):
        clip = make_clip(number, split="train" if number < count - tests else "test")
        write_media(media / clip.media_name, size=(32, 32 + 4 * (number % 3)))
        clips.append(clip)
    entries = {
        clip.clip_id: Entry(clip.clip_id, "ok", "download", seconds=1.0, sha256=sha256_of(path))
        for clip in clips
        for path in [media / clip.media_name]
    }
    return clips, entries
