"""The forms in which shards hold picture and sound, and how they are read.

T H W C: frames, height, width, channels. S: samples.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, Self

import av
import numpy as np
import simplejpeg
from av.video.reformatter import VideoReformatter
from pydantic import Field

from vatt.config import PreprocessParams
from vatt.data.clips.media import BrokenMediaError

Box = tuple[int, int, int, int]  # top, left, height, width

WAV_HEADER_BYTES = 44
AAC_PREROLL = 2048  # samples: a packet's first half needs the packet before it
_BITEXACT = {"fflags": "+bitexact"}
_EXTENSIONS = {"pcm": "wav", "flac": "flac", "aac": "m4a"}
Rate = Annotated[int, Field(gt=0, le=10**6)]  # a second
Count = Annotated[int, Field(ge=0, lt=2**40)]
_CONTAINERS = {"flac": "flac", "aac": "mp4"}
MARGIN = 256  # pixels that a decoder may add to a side for itself
_STRICT = {"err_detect": "crccheck+explode"}  # damage is an error, not a picture or sound made up


@dataclass(frozen=True, slots=True)
class Storage:
    """How the samples of a folder are stored."""

    fps: Rate
    audio_hz: Rate
    video: Literal["h264", "jpeg"]
    audio: Literal["pcm", "flac", "aac"]
    # What is known of other senses that have members of their own, by name, e.g. their rate.
    senses: dict[str, dict[str, Count]] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, params: PreprocessParams) -> Self:
        """From the settings."""
        return cls(params.fps, params.audio_hz, params.video_storage, params.audio_storage)

    def video_names(self, key: str, num_members: int) -> list[str]:
        """The members of a sample's picture: one file, or one a frame."""
        if self.video == "h264":
            return [f"{key}.mp4"][:num_members]
        return [f"{key}.{number:04d}.jpg" for number in range(num_members)]

    def audio_name(self, key: str) -> str:
        """The member of a sample's sound."""
        return f"{key}.{_EXTENSIONS[self.audio]}"


FrameStream = Iterator[tuple[int, np.ndarray]]  # the place of a request, and its frame


def whole(shown: FrameStream, count: int) -> np.ndarray:
    """All frames of an iterator in their places: (T, H, W, C)."""
    frames = None
    for place, pixels in shown:
        if frames is None:
            frames = np.empty((count, *pixels.shape), dtype=np.uint8)
        frames[place] = pixels
    assert frames is not None
    return frames


def decode_frames(
    data: bytes,
    indices: Sequence[int],
    *,
    fps: int,
    size: tuple[int, int] | None = None,
    box: Box | None = None,
) -> FrameStream:
    """The frames at `indices` of an mp4 of constant fps, or `box` of them, as they are decoded.

    Each is (H, W, C) and valid until the next one is decoded; with `size` (H, W) a frame of another
    size is an error.
    """
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(index, []).append(place)
    first, last = min(places), max(places)
    scaler = VideoReformatter()  # setting it up takes longer than its work
    try:
        for index, frame in _decoded(data, set(places), fps, size):
            if index in places:
                pixels = _cut(_pixels(frame, scaler), box)
                for place in places.pop(index):
                    yield place, pixels
    except (av.FFmpegError, ValueError, IndexError, TypeError) as error:
        raise BrokenMediaError(f"frames {first} to {last} cannot be decoded: {error}") from None
    if places:
        raise BrokenMediaError(f"frame {min(places)} is missing")


def _cut(frame: np.ndarray, box: Box | None) -> np.ndarray:
    if box is None:
        return frame
    top, left, height, width = box
    part = frame[top : top + height, left : left + width]
    if part.shape[:2] != (height, width):
        raise ValueError(f"a frame of {frame.shape[1]} x {frame.shape[0]} is too small")
    return part


def _decoded(
    data: bytes, wanted: set[int], fps: int, size: tuple[int, int] | None
) -> Iterator[tuple[int, av.VideoFrame]]:
    """The frames that are wanted, and others that they or the seek need, with their numbers."""
    first, unsent = min(wanted), set(wanted)
    with av.open(io.BytesIO(data), format="mp4") as container:
        stream = container.streams.video[0]
        codec = _codec_of(stream, "h264")
        stream.thread_type = "NONE"
        codec.thread_count = 1
        if size is not None:  # before memory is taken for what a damaged header claims
            height, width = size
            codec.options = {**_STRICT, "max_pixels": str((height + MARGIN) * (width + MARGIN))}
        if first >= fps:  # before that a seek costs more than it saves
            container.seek(int(first / fps / stream.time_base), stream=stream)
        rate = float(stream.time_base * fps)
        for packet in container.demux(stream):
            index = -1 if packet.pts is None else round(packet.pts * rate)
            codec.skip_frame = "DEFAULT" if index in wanted else "NONREF"  # no other needs it
            frames = packet.decode()
            unsent.discard(index)
            if not unsent:
                frames += codec.decode(None)  # those that wait for their turn
            for frame in frames:
                if size not in (None, (frame.height, frame.width)):
                    raise ValueError(f"a frame is {frame.width} x {frame.height}")
                yield round(frame.pts * rate), frame
            if not unsent:
                return


def _codec_of(stream: av.stream.Stream, name: str) -> av.CodecContext:
    """The decoder of a stream: a damaged file may name another one, or one that does not exist."""
    codec = stream.codec_context
    if codec is None or codec.codec.canonical_name != name:
        raise ValueError(f"its codec is not {name}")
    codec.options = _STRICT
    return codec


def _pixels(frame: av.VideoFrame, scaler: VideoReformatter) -> np.ndarray:
    """A frame as RGB where the converter wrote it: (H, W, C)."""
    rgb = scaler.reformat(frame, format="rgb24", threads=1)
    shape, plane = (rgb.height, rgb.width, 3), rgb.planes[0]
    return np.ndarray(shape, np.uint8, buffer=memoryview(plane), strides=(plane.line_size, 3, 1))


def decode_jpegs(
    pictures: Sequence[bytes | memoryview], *, height: int, width: int, box: Box | None = None
) -> FrameStream:
    """Pictures of one size, or `box` of them, given as `decode_frames` gives frames."""
    buffer = np.empty((height, width, 3), dtype=np.uint8)
    try:
        for place, picture in enumerate(pictures):
            # The fast forms differ by a few grey levels, far less than compression does.
            image = simplejpeg.decode_jpeg(picture, buffer=buffer, fastdct=True, fastupsample=True)
            if image.shape != buffer.shape:
                raise ValueError("a picture has another size")
            yield place, _cut(buffer, box)
    except ValueError as error:
        raise BrokenMediaError(f"a JPEG cannot be decoded: {error}") from None


def scaled(wave: np.ndarray, peak: float) -> np.ndarray:
    """16-bit samples whose loudest has this share of full scale; silence stays silence."""
    loudest = np.abs(wave.astype(np.int32)).max(initial=1)
    return np.rint(wave * (peak * 32767 / loudest)).astype(np.int16)


def encode_sound(wave: np.ndarray, storage: Storage, *, kbps: int) -> bytes:
    """16-bit mono samples in their stored form: the same bytes for the same samples."""
    if storage.audio == "pcm":
        return wav_header(len(wave), hz=storage.audio_hz) + wave.astype("<i2").tobytes()
    file = io.BytesIO()
    with av.open(file, "w", format=_CONTAINERS[storage.audio], options=_BITEXACT) as container:
        stream = container.add_stream(storage.audio, rate=storage.audio_hz, layout="mono")
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        if storage.audio == "aac":
            stream.bit_rate = 1000 * kbps
            samples, form = wave.astype(np.float32) / 32768, "fltp"
        else:
            samples, form = wave.astype(np.int16), "s16"
        frame = av.AudioFrame.from_ndarray(samples[None], form, "mono")
        frame.sample_rate, frame.pts = storage.audio_hz, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def decode_sound(data: bytes, first: int, last: int, storage: Storage) -> np.ndarray:
    """Samples first to last (exclusive) of a FLAC or AAC file, which holds them: (S,)."""
    wave = np.empty(last - first, dtype=np.int16)
    found = 0
    hz = storage.audio_hz
    try:
        with av.open(io.BytesIO(data), format=_CONTAINERS[storage.audio]) as container:
            stream = container.streams.audio[0]
            codec = _codec_of(stream, storage.audio)
            if (codec.sample_rate, codec.channels) != (hz, 1):
                raise ValueError(f"it has {codec.channels} channels of {codec.sample_rate} Hz")
            if storage.audio == "aac" and first > AAC_PREROLL:
                container.seek(int((first - AAC_PREROLL) / hz / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                begin = round(frame.time * hz) - first
                if begin >= len(wave):
                    break
                samples = _as_int16(frame.to_ndarray()[0])[max(-begin, 0) :]
                begin = max(begin, 0)
                if begin > found:
                    break
                room = wave[begin : begin + len(samples)]
                room[:] = samples[: len(room)]
                found = max(found, begin + len(room))
    except (av.FFmpegError, ValueError, IndexError, TypeError) as error:
        raise BrokenMediaError(f"the sound cannot be decoded: {error}") from None
    if found != len(wave):
        raise BrokenMediaError(f"{found} of {len(wave)} samples of the sound can be decoded")
    return wave


def _as_int16(samples: np.ndarray) -> np.ndarray:
    if samples.dtype == np.int16:
        return samples
    return np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16)


def wav_header(num_samples: int, *, hz: int) -> bytes:
    """The 44 bytes before mono 16-bit samples."""
    size = 2 * num_samples
    return b"".join(
        (
            b"RIFF" + (36 + size).to_bytes(4, "little") + b"WAVEfmt ",
            (16).to_bytes(4, "little") + (1).to_bytes(2, "little") + (1).to_bytes(2, "little"),
            hz.to_bytes(4, "little") + (2 * hz).to_bytes(4, "little"),
            (2).to_bytes(2, "little") + (16).to_bytes(2, "little"),
            b"data" + size.to_bytes(4, "little"),
        )
    )
