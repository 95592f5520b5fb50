"""What a media file holds, by PyAV. Nothing here trusts a header."""

from dataclasses import dataclass
from pathlib import Path

import av

# What may be opened, by content: no playlist, pattern or script that would open something else.
FORMATS = (
    "aac,ac3,aiff,amr,asf,au,avi,caf,dv,flac,flv,gif,h264,hevc,ivf,m4v,matroska,webm,mov,mp4,m4a,"
    "3gp,3g2,mj2,mp3,mpeg,mpegts,mpegvideo,mxf,ogg,rm,vob,wav,w64,wv"
)
STILL_SECONDS = 1.0  # for so long an image is shown
_IMAGES = {b"\xff\xd8\xff": "jpeg_pipe", b"\x89PNG\r\n\x1a\n": "png_pipe", b"BM": "bmp_pipe"}
MAX_HOURS = 48  # a file that claims more lies
NEAR_START = 0.1  # seconds
PROGRESSIVE = 1  # FFmpeg's field order; above it are the interlaced ones
_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": FORMATS}


class BrokenMediaError(Exception):
    """A file that holds no media, or whose media cannot be decoded; the message says why."""


@dataclass(frozen=True, slots=True)
class Media:
    """What a file holds, from its packets."""

    video: int | None  # index of the stream to take
    audio: int | None
    start: float  # time 0 of its clips, in seconds from the file's first time stamp
    seconds: float  # of the picture from there on; of the sound where there is no picture
    num_frames: int
    interlaced: bool = False  # some of its pictures are two half pictures
    image: str | None = None  # FFmpeg's name for the format of an image


def probe(path: Path) -> Media:
    """Read a file's packets, without decoding them; raises BrokenMediaError."""
    if not path.is_file():
        raise BrokenMediaError("not a file" if path.exists() else "no such file")
    if path.stat().st_size == 0:
        raise BrokenMediaError("empty file")
    image = image_format(path)
    if image is not None:  # not opened: what it claims to be is for the limits of `cut`
        return Media(0, None, 0.0, STILL_SECONDS, 1, image=image)
    try:
        with open_media(path) as container:
            return _scan(container)
    except av.FFmpegError as error:
        raise BrokenMediaError(f"not a media file: {error.strerror}") from None


def open_media(path: Path) -> av.container.InputContainer:
    """A file whose format is one of ours, whatever bytes its titles are made of."""
    return av.open(f"file:{path.resolve()}", options=_OPTIONS, metadata_errors="replace")


def image_format(path: Path) -> str | None:
    """FFmpeg's name for the format of an image, by its first bytes; None for anything else."""
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp_pipe"
    return next((form for mark, form in _IMAGES.items() if head.startswith(mark)), None)


def _scan(container: av.container.InputContainer) -> Media:
    video, audio = _picture_stream(container), _sound_stream(container)
    chosen = [stream for stream in (video, audio) if stream is not None]
    if not chosen:
        raise BrokenMediaError("no picture and no sound in it that can be decoded")
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    packets = dict.fromkeys((stream.index for stream in chosen), 0)
    counts_frames = container.format.name == "avi"  # it has no time of showing, others guess one
    try:
        for packet in container.demux(chosen):
            stamp = packet.dts if packet.pts is None or counts_frames else packet.pts
            if stamp is None or packet.time_base is None or not packet.size:
                continue
            begin = float(stamp * packet.time_base)
            length = float((packet.duration or 0) * packet.time_base)
            index = packet.stream_index
            packets[index] += 1
            first[index] = min(first.get(index, begin), begin)
            last[index] = max(last.get(index, begin), begin + length)
    except av.FFmpegError:
        pass  # cut off: what came before counts
    if not last:
        raise BrokenMediaError("no packet in it")
    # AAC's priming packets lie before it: their time is cut away by every player.
    zero = container.start_time / 1e6 if container.start_time is not None else min(first.values())
    main = next(stream.index for stream in chosen if stream.index in last)
    # Clips begin with the first frame; a picture that sets in long after the sound waits for it.
    sound_or_picture = max(min(first.values()), zero)
    late = first[main] - sound_or_picture
    start = max(first[main] if late <= NEAR_START else sound_or_picture, zero) - zero
    seconds = last[main] - zero - start
    if seconds > MAX_HOURS * 3600:
        raise BrokenMediaError(f"its time stamps claim {seconds / 3600:.0f} hours")
    field_order = 0 if video is None else video.codec_context.field_order
    return Media(
        video=video.index if video is not None and video.index in last else None,
        audio=audio.index if audio is not None and audio.index in last else None,
        start=start,
        seconds=seconds,
        num_frames=packets[main] if video is not None and main == video.index else 0,
        interlaced=field_order > PROGRESSIVE,
    )


def _picture_stream(container: av.container.InputContainer) -> av.VideoStream | None:
    """The first moving picture: cover art is none, nor is one that no decoder knows."""
    for stream in container.streams.video:
        attached = stream.disposition & av.stream.Disposition.attached_pic
        if stream.codec_context is not None and not attached:
            return stream
    return None


def _sound_stream(container: av.container.InputContainer) -> av.AudioStream | None:
    """The track that a player would take."""
    best = container.streams.best("audio")
    known = isinstance(best, av.AudioStream) and best.codec_context is not None
    return best if known else None
