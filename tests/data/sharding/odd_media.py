"""Odd and damaged media whose picture and sound both show the second: grey level and tone.

A case is a container, a change in the middle, the seconds that each picture stays, and the first
time stamp. Most are two recordings put together, as broken connections and `cat` leave them.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SECONDS = 10
CHANGE = 5  # second
FPS = 25
GREY = 20  # levels from second to second
TONE, STEP = 300, 100  # Hz of second 0, and from second to second
WRAP = 2**33 / 90000  # seconds; then the clock of MPEG-TS begins again
LATE = 1.5  # seconds
LEAPS = {"leap": 1000.0, "gap": 4.0}

# Name -> FFmpeg's muxer, encoder of the picture, encoder of the sound.
FORMS = {
    "ts": ("mpegts", "libx264", "aac"),
    "m2ts": ("mpegts", "mpeg2video", "mp2"),
    "vob": ("vob", "mpeg2video", "mp2"),
    "mkv": ("matroska", "libx264", "aac"),
    "webm": ("webm", "libvpx", "libopus"),
    "flv": ("flv", "libx264", "aac"),
    "mp4": ("mp4", "libx264", "aac"),
    "avi": ("avi", "mpeg4", "libmp3lame"),
    "opus": ("ogg", None, "libopus"),
    "oga": ("ogg", None, "flac"),
}
JOINS = ("restart", "size", "rate", "channels", "leap", "gap", "back")
ALONE = ("plain", "late", "early")  # picture or sound sets in later
# No second header for picture or sound; a muxer that moves the first time stamp by half a second.
IMPOSSIBLE = {("mkv", "size"), ("webm", "rate"), ("webm", "channels"), ("vob", "gap")}
ENCODER = {
    "libx264": {"bf": "0", "g": "25", "preset": "ultrafast"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8", "g": "25"},
}
STEADY = {("vob", 3), ("m2ts", 3), ("avi", 3)}  # pictures come at a rate, and cannot stay
CLOSES_LEAPS = {"ts", "m2ts", "vob", "opus", "oga"}


@dataclass(frozen=True)
class Case:
    """One file to make."""

    form: str
    change: str
    hold: int = 0  # seconds; 0: a film of moving pictures
    offset: float = 0.0  # seconds

    @property
    def name(self) -> str:
        return f"{self.change}-{self.hold}-{self.offset:.0f}.{self.form}"

    def second_at(self, start: int) -> int | None:
        """The second that a window shows; None where nothing was recorded."""
        leap = LEAPS.get(self.change, 0.0)
        if leap > 10 and self.form in CLOSES_LEAPS:
            leap = 0.0
        if start < CHANGE or not leap:
            return start
        return start - round(leap) if start >= CHANGE + leap else None

    def picture_at(self, second: int) -> int | None:
        """The second whose picture stands on the screen; None before the first one."""
        if self.change == "late" and second < LATE:
            return None
        begin = CHANGE if self.change in JOINS and second >= CHANGE else 0
        return begin + (second - begin) // self.hold * self.hold if self.hold else second


def all_cases() -> list[Case]:
    """Container x change x hold x start offset, as far as a container allows it."""
    joined = [
        Case(form, change, hold, offset)
        for form in ("ts", "m2ts", "vob", "mkv", "webm", "flv")
        for change in JOINS
        for hold, offset in ((0, 0.0), (0, 3.7), (3, 0.0), (3, 3.7))
        if (form, change) not in IMPOSSIBLE and (form, hold) not in STEADY
    ]
    alone = [
        Case(form, change, hold)
        for form in ("ts", "vob", "mkv", "webm", "flv", "mp4", "avi")
        for change in ALONE
        for hold in (0, 3)
        if (form, hold) not in STEADY and (form, change) not in {("avi", "late"), ("avi", "early")}
    ]
    wrapped = [Case(form, "plain", 0, WRAP - 5) for form in ("ts", "m2ts")]
    wrapped.append(Case("ts", "plain", 3, WRAP - 5))
    sound = [Case(form, change) for form in ("opus", "oga") for change in ("plain", "restart")]
    return joined + alone + wrapped + sound


def make(folder: Path, case: Case) -> Path:
    """Write the file of a case."""
    path = folder / case.name
    if case.change not in JOINS:
        _record(path, case, (0, SECONDS), case.offset)
        return path
    leap = {"restart": -float(CHANGE), "back": -2.0, **LEAPS}.get(case.change, 0.0)
    parts = [folder / f"{case.name}.{number}" for number in range(2)]
    _record(parts[0], case, (0, CHANGE), case.offset)
    _record(parts[1], case, (CHANGE, SECONDS), case.offset + leap, changed=True)
    first, second = (part.read_bytes() for part in parts)
    if case.form in ("mkv", "webm"):  # a live recording goes on with clusters
        second = second[second.index(b"\x1f\x43\xb6\x75") :]
    elif case.form == "flv":
        second = second[13:]  # and with tags
    path.write_bytes(first + second)
    for part in parts:
        part.unlink()
    return path


def _record(
    path: Path, case: Case, span: tuple[int, int], shift: float, *, changed: bool = False
) -> None:
    """Write the seconds of a span, with time stamps that are shifted."""
    muxer, film, sound = FORMS[case.form]
    options = {"live": "1"} if muxer in ("matroska", "webm") else {}
    if muxer == "ogg":
        options = {"serial_offset": str(span[0])}
    hz = 32000 if changed and case.change == "rate" else 48000
    layout = "stereo" if changed and case.change == "channels" else "mono"
    height = 96 if changed and case.change == "size" else 64
    with av.open(str(path), "w", format=muxer, options=options) as container:
        tracks = []
        if film:
            video = container.add_stream(film, rate=FPS, options=ENCODER.get(film, {}))
            video.height, video.width, video.pix_fmt = height, height * 3 // 2, "yuv420p"
            video.bit_rate = 400_000
            tracks.append((video, _pictures(case, span, height)))
        audio = container.add_stream(sound, rate=hz, layout=layout)
        tracks.append((audio, _tones(case, span, hz, layout, audio)))
        packets = []
        for stream, frames in tracks:
            for frame in [*frames, None]:
                packets += stream.encode(frame)
        for packet in sorted(packets, key=lambda p: float(p.dts * p.time_base)):
            ticks = round(shift / packet.time_base)
            packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
            container.mux(packet)


def _pictures(case: Case, span: tuple[int, int], height: int):
    """Frames of the grey of their second: all of them, or one a hold."""
    late = LATE if case.change == "late" else 0
    for number in range(span[0] * FPS, span[1] * FPS):
        if number < late * FPS or (case.hold and (number - span[0] * FPS) % (case.hold * FPS)):
            continue
        pixels = np.full((height, height * 3 // 2, 3), GREY * (number // FPS + 1), np.uint8)
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
        frame.pts, frame.time_base = number, Fraction(1, FPS)
        yield frame


def _tones(case: Case, span: tuple[int, int], hz: int, layout: str, stream):
    """Frames of the tone of their second."""
    early = LATE if case.change == "early" else 0
    time = np.arange(span[0] * hz, span[1] * hz) / hz
    wave = 0.5 * np.sin(2 * np.pi * (TONE + STEP * np.floor(time)) * time)
    form = stream.codec_context.format.name
    size = stream.codec_context.frame_size or 1024
    for first in range(round(early * hz) if not span[0] else 0, len(wave), size):
        part = np.tile(wave[first : first + size], (2 if layout == "stereo" else 1, 1))
        whole = av.AudioFrame.from_ndarray(part.astype(np.float32), "fltp", layout)
        whole.sample_rate, whole.pts = hz, span[0] * hz + first
        whole.time_base = Fraction(1, hz)
        resampler = av.AudioResampler(format=form, layout=layout, rate=hz)
        for frame in resampler.resample(whole):
            frame.pts, frame.time_base = span[0] * hz + first, Fraction(1, hz)
            yield frame
