"""ffmpeg: one source in, its clips out. One decode of a source gives all of them.

Every window gets frames at a constant rate and mono sound from the same instant; time 0 is the
file's first time stamp. The same input gives the same bytes.
"""

import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import ffmpeg
import numpy as np

from vatt.config import PreprocessParams
from vatt.data.clips.media import FORMATS, STILL_SECONDS, Limits, Media, run_limited
from vatt.data.clips.samples import Window
from vatt.errors import MachineError

SEEK_AFTER = 20.0  # seconds; nearer the beginning, decoding from there is as fast and safer
SEEK_MARGIN = 3.0  # a picture shown up to so long before the window still stands in its first frame
MAX_ASPECT = 8  # a longer side beyond this many short sides is cut down: no endless frames
# A stored frame shows what stands on the screen so long after its time: a source of the same rate
# whose stamps are rounded gives frame for frame what it holds.
LOOK_AHEAD = 0.01
PATIENCE = 20.0  # seconds that a second of video may take
MAX_CLIP_BYTES = 2**28  # of a stored clip's picture
MAX_PIXELS = 2**26  # of a frame: 8192 x 8192; a file that claims more is not decoded
_GLOBAL = ("-nostdin", "-hide_banner", "-loglevel", "error", "-filter_complex_threads", "1", "-y")
_ENCODER: dict[str, Any] = {
    "threads": 1,
    "map_metadata": -1,
    "fflags": "+bitexact",
    "flags:v": "+bitexact",
    "f": "mp4",
}


@dataclass(frozen=True, slots=True)
class Cut:
    """The windows to cut out of a file."""

    source: Path
    media: Media
    windows: tuple[Window, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A window's media: one mp4, or a JPEG a frame, and 16-bit samples."""

    video: tuple[bytes, ...]  # empty where there is no picture
    num_frames: int
    height: int
    width: int
    audio: np.ndarray | None  # (S,) int16


@dataclass(frozen=True, slots=True)
class CutResult:
    """The pieces in the windows' order, and what the decoder complained of."""

    pieces: list[Piece]
    complaint: str


def cut(
    cuts: Sequence[Cut], params: PreprocessParams, *, program: str, work: Path
) -> list[CutResult]:
    """Cut windows out of files in one call; what cannot be decoded is missing from its piece.

    When anything is wrong with one of several files, each is cut by itself: the same bytes come
    out, and it is known which one is broken.
    """
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        outputs: list[Any] = []
        for number, item in enumerate(cuts):
            outputs += _outputs(item, params, f"{folder}/{number}")
        command = ffmpeg.merge_outputs(*outputs).compile(cmd=program)
        complaint = run_limited(
            [command[0], *_GLOBAL, *command[1:]], _limits(cuts, params), log=folder / "log"
        )
        if "No space left on device" in complaint:
            raise MachineError(f"the disk of {work} is full", hint="free some space, run it again")
        if not complaint or len(cuts) == 1:
            return [
                CutResult(_collect(item, params, f"{folder}/{number}"), complaint)
                for number, item in enumerate(cuts)
            ]
    return [cut([item], params, program=program, work=work)[0] for item in cuts]


def _span(item: Cut) -> tuple[float, float]:
    """Where reading begins, and for how long, in seconds of the source."""
    begin = item.media.start + min(start for start, _ in item.windows)
    seek = begin - SEEK_MARGIN if begin > SEEK_AFTER else 0.0
    until = item.media.start + max(end for _, end in item.windows)
    return seek, until - seek + SEEK_MARGIN


def _outputs(item: Cut, params: PreprocessParams, prefix: str) -> list[Any]:
    """What ffmpeg writes for one file: <prefix>-<window>.mp4 and <prefix>-sound."""
    seek, length = _span(item)
    stream = ffmpeg.input(
        f"file:{item.source.resolve()}",
        **({"ss": f"{seek:.6f}"} if seek else {}),
        **({"max_pixels:v": MAX_PIXELS} if item.media.video is not None else {}),
        **_form(item.media),
        t=f"{length:.6f}",
        threads=1,
        protocol_whitelist="file",
    )
    shift = item.media.start - seek
    windows = [(start + shift, end + shift) for start, end in item.windows]
    outputs: list[Any] = []
    if item.media.video is not None:
        picture = stream[str(item.media.video)]
        if item.media.interlaced:
            picture = picture.filter("bwdif", mode="send_frame", deint="interlaced")
        outputs += _pictures(picture, windows, params, prefix)
    if item.media.audio is not None:
        outputs.append(_sound(stream[str(item.media.audio)], length, params, prefix))
    return outputs


def _form(media: Media) -> dict[str, Any]:
    """An image is one frame that lasts; its name could be taken for a pattern of names."""
    if media.image is None:
        return {"format_whitelist": FORMATS}
    return {"f": media.image, "format_whitelist": media.image, "framerate": 1 / STILL_SECONDS}


def _pictures(
    picture: Any, windows: Sequence[Window], params: PreprocessParams, prefix: str
) -> Any:
    """One output a window. Windows on one frame grid share their rate conversion and scaling."""
    side = params.short_side
    short = f"min(iw*sar,ih)/{side}"
    grids: dict[int, list[int]] = {}
    for number, (start, _) in enumerate(windows):
        grids.setdefault(round(start * params.fps % 1 * 1000) % 1000, []).append(number)
    branches = picture.filter_multi_output("split", len(grids)) if len(grids) > 1 else None
    outputs = []
    for branch, numbers in enumerate(grids.values()):
        zero = min(windows[number][0] for number in numbers)
        frames = (
            (branches[branch] if branches is not None else picture)
            .filter("settb", "1/90000")  # an avi counts in frames: less cannot be taken off
            .filter("setpts", f"PTS-{zero + LOOK_AHEAD:.6f}/TB")
            .filter("fps", fps=params.fps, start_time=0, round="up")
            .filter(
                "scale",
                w=f"2*round(min(iw*sar/({short}),{MAX_ASPECT * side})/2)",
                h=f"2*round(min(ih/({short}),{MAX_ASPECT * side})/2)",
                # One matrix whatever the source says: a JPEG cannot say, and readers do not ask.
                out_color_matrix="bt601",
                out_range="full" if params.video_storage == "jpeg" else "limited",
            )
            .filter("setsar", 1)
        )
        copies = frames.filter_multi_output("split", len(numbers)) if len(numbers) > 1 else None
        for copy, number in enumerate(numbers):
            first = round((windows[number][0] - zero) * params.fps)
            trimmed = (
                (copies[copy] if copies is not None else frames)
                .filter(
                    "trim", start_frame=first, end_frame=first + _frames(windows[number], params)
                )
                .filter("setpts", "PTS-STARTPTS")
            )
            outputs.append(
                trimmed.output(f"file:{prefix}-{number}.mp4", **_encoder(params), **_ENCODER)
            )
    return outputs


def _encoder(params: PreprocessParams) -> dict[str, Any]:
    if params.video_storage == "jpeg":
        return {"vcodec": "mjpeg", "q:v": params.jpeg_scale, "pix_fmt": "yuvj420p"}
    return {
        "vcodec": "libx264",
        "preset": "veryfast",
        **({"tune": "fastdecode"} if params.fast_decode else {}),
        "x264-params": "mbtree=0",  # its macroblock tree may come out otherwise at every run
        "pix_fmt": "yuv420p",
        "crf": params.crf,
        "g": params.gop,
    }


def _sound(sound: Any, until: float, params: PreprocessParams, prefix: str) -> Any:
    """All of the sound from time 0, silence where the track has none; sliced by sample later."""
    return (
        sound.filter("aresample", params.audio_hz, **{"async": 1, "first_pts": 0})
        .filter("aformat", sample_fmts="s16", channel_layouts="mono")
        .output(f"file:{prefix}-sound", f="s16le", acodec="pcm_s16le", t=f"{until:.6f}")
    )


def _limits(cuts: Sequence[Cut], params: PreprocessParams) -> Limits:
    """Far more than an honest file needs."""
    seconds = sum(_span(item)[1] for item in cuts)
    sound = round(max(_span(item)[1] for item in cuts) * params.audio_hz * 2)
    return Limits(seconds=PATIENCE * (3 + seconds), file_bytes=sound + MAX_CLIP_BYTES)


def _collect(item: Cut, params: PreprocessParams, prefix: str) -> list[Piece]:
    track = Path(f"{prefix}-sound")
    samples = np.fromfile(track, dtype="<i2") if track.exists() else np.zeros(0, np.int16)
    seek, _ = _span(item)
    hz = params.audio_hz
    pieces = []
    for number, (start, end) in enumerate(item.windows):
        path = Path(f"{prefix}-{number}.mp4")
        data = path.read_bytes() if path.exists() else b""
        packets, height, width = _measure(data)
        frames = len(packets)
        length = round((frames / params.fps if frames else end - start) * hz)
        first = round((item.media.start + start - seek) * hz)
        heard = samples[first : first + length]
        audio = None
        if heard.size:
            audio = np.zeros(length, dtype=np.int16)
            audio[: heard.size] = heard
        video = packets if params.video_storage == "jpeg" else [data] if frames else []
        pieces.append(Piece(tuple(video), frames, height, width, audio))
    return pieces


def _measure(data: bytes) -> tuple[list[bytes], int, int]:
    """The frames of an encoded window, their height and width; nothing when there are none."""
    try:
        with av.open(io.BytesIO(data), format="mp4") as container:
            stream = container.streams.video[0]
            packets = [bytes(packet) for packet in container.demux(stream) if packet.size]
            return packets, stream.height, stream.width
    except (av.FFmpegError, IndexError):
        return [], 0, 0


def _frames(window: Window, params: PreprocessParams) -> int:
    return round((window[1] - window[0]) * params.fps)
