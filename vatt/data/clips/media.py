"""Media files: what a file holds, and programs that read it under limits of time and memory."""

import contextlib
import os
import re
import resource
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import imageio_ffmpeg

from vatt.errors import MachineError

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
    if head.startswith((b"GIF87a", b"GIF89a")):  # one with several pictures is a video
        return "gif_pipe" if _pictures_in_gif(path) == 1 else None
    return next((form for mark, form in _IMAGES.items() if head.startswith(mark)), None)


def _pictures_in_gif(path: Path) -> int:
    """The number of pictures in a GIF, up to 2."""
    count = 0
    with path.open("rb") as file:
        _pass_colours(file, file.read(13)[10:11])
        while count < 2 and (block := file.read(1)) in (b"!", b","):
            if block == b"!":  # an extension, of one kind or another
                file.read(1)
            else:
                count += 1
                _pass_colours(file, file.read(9)[8:9])
                file.read(1)
            while size := file.read(1):  # the block's parts; an empty one ends it
                if size == b"\0":
                    break
                file.seek(size[0], os.SEEK_CUR)
    return count


def _pass_colours(file: BinaryIO, flags: bytes) -> None:
    """Go on after a table of colours, if there is one."""
    if flags and flags[0] & 0x80:
        file.seek(3 * 2 ** ((flags[0] & 7) + 1), os.SEEK_CUR)


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


MEMORY = (
    4 * 2**30
)  # bytes; 32 clips of a film of 3840 x 2160 take 0.9 GiB, 7680 x 4320 half of that
LOG_BYTES = 2**20  # of complaints that are read

_SIGNALS = {
    signal.SIGXCPU: "decoding takes too long",
    signal.SIGXFSZ: "what comes out is too large",
    signal.SIGKILL: "ffmpeg was killed, perhaps for want of memory",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may take."""

    seconds: float  # by the clock, and of computing
    file_bytes: int  # of each file that it writes
    memory: int = MEMORY


def run_limited(command: Sequence[str], limits: Limits, *, log: Path) -> str:
    """Run a command; returns what it complains of, empty for a clean run. No shell reads it."""
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
            process_group=0,
        )  # fmt: skip
        _limit(process.pid, limits)
        try:
            code = process.wait(timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return _SIGNALS[signal.SIGXCPU]
        finally:
            _end(process)
    with log.open("rb") as errors:
        lines = errors.read(LOG_BYTES).decode(errors="replace").strip().splitlines()
    if code < 0:
        return _SIGNALS.get(signal.Signals(-code), f"ffmpeg ended by signal {-code}")
    if code and not lines:
        return f"ffmpeg ended with code {code}"
    return _sum_up([line for line in lines if "No space left on device" in line] or lines)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of it, with what it may have started: a wrapper's ffmpeg too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _limit(pid: int, limits: Limits) -> None:
    """Set the limits from outside: nothing of ours runs between fork and exec, threads or not."""
    if not hasattr(resource, "prlimit"):
        return  # not Linux: the clock alone limits
    seconds = int(limits.seconds) + 1
    most = {
        resource.RLIMIT_CPU: (seconds, seconds + 1),  # a signal that names it, then the end
        resource.RLIMIT_DATA: (limits.memory, limits.memory),
        resource.RLIMIT_FSIZE: (limits.file_bytes, limits.file_bytes),
        resource.RLIMIT_CORE: (0, 0),
    }
    with contextlib.suppress(ProcessLookupError):  # it is done already
        for kind, values in most.items():
            resource.prlimit(pid, kind, values)


def _sum_up(lines: Sequence[str]) -> str:
    """The first complaint of each part of ffmpeg, those that read the file before the others.

    The parts run at once: only the order within each is the same every time. Nor are addresses.
    """
    firsts: dict[tuple[bool, str], str] = {}
    for line in lines:
        part = re.match(r"\[([^@\]]*) @ 0x", line)
        name = part[1] if part else "#"
        firsts.setdefault(("#" in name, name), re.sub(r"\[[^\]]*@ 0x[0-9a-f]+\]\s*", "", line))
    said = "; ".join(firsts[name] for name in sorted(firsts))[:200]
    # Nor is their number: ffmpeg reads on for a while beyond the end of what is wanted.
    return f"several complaints: {said}" if len(lines) > 1 else said


def find_ffmpeg(chosen: Path | None) -> str:
    """The ffmpeg to run: the chosen one, or the one in the imageio-ffmpeg wheel."""
    program = str(chosen) if chosen is not None else imageio_ffmpeg.get_ffmpeg_exe()
    if not Path(program).is_file():
        raise MachineError(
            f"no ffmpeg at {program}", hint="set machine.ffmpeg to null to use the one installed"
        )
    return program


def ffmpeg_version(program: str) -> str:
    """The first line of `ffmpeg -version`: other builds may write other bytes."""
    try:
        answer = subprocess.run(
            [program, "-version"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise MachineError(
            f"{program} does not run: {error}", hint="set machine.ffmpeg to null"
        ) from None
    return answer.stdout.partition(" Copyright")[0].strip()
