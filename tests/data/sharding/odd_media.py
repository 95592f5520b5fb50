"""Odd and damaged media whose picture and sound both show the second: grey level and tone.

A case is a container, a change in the middle, the seconds that each picture stays, the first time
stamp, and a trait of the whole file: pictures out of order (`b`, `open`), at uneven times
(`uneven`), other tracks (`tracks`), or a beginning that an edit list hides (`hidden`). Most are two
recordings put together, as broken connections and `cat` leave them.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

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
    "mov": ("mov", "libx264", "aac"),
    "fragments": ("mp4", "libx264", "aac"),
    "wav": ("wav", None, "pcm_s16le"),
    "aiff": ("aiff", None, "pcm_s16be"),
    "opus": ("ogg", None, "libopus"),
    "oga": ("ogg", None, "flac"),
    "flac": ("flac", None, "flac"),
    "wv": ("wv", None, "wavpack"),
    "au": ("au", None, "pcm_s16be"),
}
JOINS = ("restart", "size", "shape", "rate", "channels", "leap", "gap", "back")
# The second part has its own header (and another size or rate), its own streams, or a sound.
WHOLE = ("joined", "joined-size", "joined-rate", "streams", "mute")
TRAITS = ("b", "open", "uneven", "tracks")
HIDDEN = 1  # seconds before the beginning
ALONE = ("plain", "late", "early")  # picture or sound sets in later
# No second header for picture or sound; a muxer that moves the first time stamp by half a second.
IMPOSSIBLE = {
    ("mkv", "size"),
    ("mkv", "shape"),
    ("webm", "rate"),
    ("webm", "channels"),
    ("vob", "gap"),
}
ENCODER = {
    "libx264": {"bf": "0", "g": "25", "preset": "ultrafast"},
    "libx264-b": {"bf": "3", "g": "25", "preset": "medium"},
    "libx264-open": {"bf": "3", "g": "25", "preset": "medium", "x264-params": "open-gop=1"},
    "libx264-hidden": {"bf": "2", "g": "40", "preset": "medium"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8", "g": "25"},
}
STEADY = {("vob", 3), ("m2ts", 3), ("avi", 3)}  # pictures come at a rate, and cannot stay
B_FRAMES = ("ts", "mkv", "flv", "mp4", "mov")
CLOSES_LEAPS = {"ts", "m2ts", "vob", "opus", "oga"}


@dataclass(frozen=True)
class Case:
    """One file to make."""

    form: str
    change: str
    hold: int = 0  # seconds; 0: a film of moving pictures
    offset: float = 0.0  # seconds
    trait: str = ""

    @property
    def name(self) -> str:
        return f"{self.change}-{self.hold}-{self.offset:.0f}{self.trait}.{self.form}"

    @property
    def parts(self) -> bool:
        return self.change in JOINS + WHOLE

    def is_silent(self, second: int) -> bool:
        """Whether there is no sound yet."""
        return (self.change == "early" and second <= LATE) or (
            self.change == "mute" and second < CHANGE
        )

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
        begin = CHANGE if self.parts and second >= CHANGE else 0
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
    whole = [
        Case(form, "joined", hold, trait=trait)
        for form in ("mp4", "mov", "mkv", "webm", "flv", "avi", "wav", "aiff")
        for hold in (0, 3)
        for trait in ("", "b")
        if (form, hold) not in STEADY and (not trait or form in B_FRAMES)
    ]
    whole += [
        Case(form, "joined-size", hold)
        for form in ("mp4", "mov", "fragments", "mkv", "webm", "flv")
        for hold in (0, 3)
    ]
    whole += [
        Case(form, "joined-rate")
        for form in ("mp4", "fragments", "mkv", "oga", "flac", "wv", "au", "wav", "aiff")
    ]
    whole += [Case(form, "joined") for form in ("fragments", "flac", "wv", "au")]
    added = [
        Case(form, change, hold, offset, trait)
        for form in ("ts", "m2ts")
        for change in ("streams", "mute")
        for hold, offset in ((0, 0.0), (0, 3.7), (3, 0.0))
        for trait in ("", "b")
        if (form, hold) not in STEADY and (not trait or form in B_FRAMES)
    ]
    traits = [
        Case(form, change, hold, offset, trait)
        for form in B_FRAMES
        for change in ("plain", "late", "early", "restart", "size", "leap")
        for trait in TRAITS
        for hold, offset in ((0, 0.0), (3, 3.7), (4, 0.0))
        if (form, change) not in IMPOSSIBLE and (change in ALONE or form not in ("mp4", "mov"))
        if hold < 4 or (change == "plain" and trait == "b" and form not in ("mp4", "mov"))
        if not (hold and trait in ("uneven", "open")) and not (form == "flv" and trait == "tracks")
        if not (offset and change in ALONE and form in ("mp4", "mov"))
    ]
    hidden = [Case(form, change, trait="hidden") for form in ("mp4", "mov") for change in
              ("plain", "joined")]  # fmt: skip
    return joined + alone + wrapped + sound + whole + added + traits + hidden


def make(folder: Path, case: Case) -> Path:
    """Write the file of a case."""
    path = folder / case.name
    hidden = HIDDEN if case.trait == "hidden" else 0
    if not case.parts:
        record(path, case, (-hidden, SECONDS), case.offset)
        return path
    again = {"restart": -float(CHANGE), "joined": -float(CHANGE), "back": -2.0}
    leap = {**again, **LEAPS}.get(case.change.partition("-")[0], 0.0)
    parts = [folder / f"{case.name}.{number}" for number in range(2)]
    record(parts[0], case, (-hidden, CHANGE), case.offset)
    record(parts[1], case, (CHANGE - hidden, SECONDS), case.offset + leap, changed=True)
    first, second = (part.read_bytes() for part in parts)
    if case.change.startswith("joined"):
        pass
    elif case.form in ("mkv", "webm"):  # a live recording goes on with clusters
        second = second[second.index(b"\x1f\x43\xb6\x75") :]
    elif case.form == "flv":
        second = second[13:]  # and with tags
    path.write_bytes(first + second)
    for part in parts:
        part.unlink()
    return path


def record(
    path: Path, case: Case, span: tuple[int, int], shift: float, *, changed: bool = False
) -> None:
    """Write the seconds of a span, with time stamps that are shifted."""
    with av.open(
        str(path), "w", format=FORMS[case.form][0], options=_options(case, span, changed=changed)
    ) as container:
        packets = []
        for stream, frames in _tracks(container, case, span, changed=changed):
            for frame in [*frames, None]:
                packets += stream.encode(frame)
        for packet in sorted(packets, key=lambda p: float(p.dts * p.time_base)):
            ticks = round(shift / packet.time_base)
            packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
            container.mux(packet)


def _options(case: Case, span: tuple[int, int], *, changed: bool) -> dict[str, str]:
    """Options of the muxer."""
    muxer = FORMS[case.form][0]
    if case.form == "fragments":
        return {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    if case.trait == "hidden":
        return {"avoid_negative_ts": "disabled"}
    if changed and case.change == "streams":
        return {"mpegts_start_pid": "768"}
    if muxer == "ogg":
        return {"serial_offset": str(span[0])}
    return {"live": "1"} if muxer in ("matroska", "webm") else {}


def _tracks(container, case: Case, span: tuple[int, int], *, changed: bool):
    """Streams with their frames."""
    _, film, sound = FORMS[case.form]
    hz = 32000 if changed and case.change.endswith("rate") else 48000
    layout = "stereo" if changed and case.change == "channels" else "mono"
    height, width = 64, 96
    if changed and case.change.endswith(("size", "shape")):
        height, width = 96, 64 if case.change == "shape" else 144
    decoys = case.trait == "tracks"
    tracks = []
    if decoys and case.form != "ts":  # before the real ones, which are the default
        tracks += _decoys(container, case, span)
    if film:
        video = _film(container, case, height, width)
        tracks.append((video, _pictures(case, span, height, width)))
    if sound and (changed or case.change != "mute"):
        audio = container.add_stream(sound, rate=hz, layout=layout)
        tracks.append((audio, _tones(case, span, hz, layout, audio)))
    if decoys and case.form == "ts":
        tracks += _decoys(container, case, span)
    elif decoys:
        for stream, _ in tracks:
            stream.disposition = Disposition.default if stream in (video, audio) else 0
    return tracks


def _film(container, case: Case, height: int, width: int):
    """A stream of pictures."""
    film = FORMS[case.form][1]
    kind = f"{film}-{case.trait}"
    video = container.add_stream(film, rate=FPS, options=ENCODER.get(kind, ENCODER.get(film, {})))
    video.height, video.width, video.pix_fmt = height, width, "yuv420p"
    video.bit_rate = 400_000
    return video


def _decoys(container, case: Case, span: tuple[int, int]):
    """Tracks of another time, which a player does not choose."""
    other = Case(case.form, case.change)
    video = _film(container, other, 32, 48)
    audio = container.add_stream(FORMS[case.form][2], rate=48000, layout="mono")
    later = [span[0] + SECONDS, span[1] + SECONDS]
    for stream, frames, ticks in (
        (video, _pictures(other, later, 32, 48), SECONDS * FPS),
        (audio, _tones(other, later, 48000, "mono", audio), SECONDS * 48000),
    ):
        shown = list(frames)
        for frame in shown:
            frame.pts -= ticks
        yield stream, shown


def _pictures(case: Case, span: tuple[int, int], height: int, width: int):
    """Frames of the grey of their second: all of them, or one a hold."""
    late = LATE if case.change == "late" else 0
    for number in range(span[0] * FPS, span[1] * FPS):
        if number < late * FPS or (case.hold and (number - span[0] * FPS) % (case.hold * FPS)):
            continue
        if case.trait == "uneven" and number % FPS and number % 7 not in (0, 1, 3):
            continue
        grey = GREY * (number // FPS + 1) % 250
        pixels = np.full((height, width, 3), grey, np.uint8)
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
    for first in range(round(early * hz) if span[0] <= 0 else 0, len(wave), size):
        part = np.tile(wave[first : first + size], (2 if layout == "stereo" else 1, 1))
        whole = av.AudioFrame.from_ndarray(part.astype(np.float32), "fltp", layout)
        whole.sample_rate, whole.pts = hz, span[0] * hz + first
        whole.time_base = Fraction(1, hz)
        resampler = av.AudioResampler(format=form, layout=layout, rate=hz)
        for frame in resampler.resample(whole):
            frame.pts, frame.time_base = span[0] * hz + first, Fraction(1, hz)
            yield frame


Edit = tuple[float, float, float]  # its length, where it starts (-1: nowhere), its speed


def edit(path: Path, edits: list[Edit], kinds: tuple[bytes, ...] = (b"vide", b"soun")) -> None:
    """Give the tracks of an MP4 another edit list; what it indexes lies before its tables."""
    data = path.read_bytes()
    [(moov, whole)] = [(begin, body) for kind, begin, body in _boxes(data) if kind == b"moov"]
    tables = b""
    for kind, _, body in _boxes(whole):
        if kind == b"mvhd":
            scale = int.from_bytes(body[12:16])
        if kind == b"trak" and any(name in body for name in kinds):
            body = _edited(body, edits, scale)
        tables += _box(kind, body)
    path.write_bytes(data[:moov] + _box(b"moov", tables))


def _edited(track: bytes, edits: list[Edit], scale: int) -> bytes:
    parts = {kind: body for kind, _, body in _boxes(track)}
    media = {kind: body for kind, _, body in _boxes(parts[b"mdia"])}
    own = int.from_bytes(media[b"mdhd"][12:16])
    entries = [
        round(length * scale).to_bytes(4)
        + (-1 if start < 0 else round(start * own)).to_bytes(4, signed=True)
        + round(speed * 2**16).to_bytes(4)
        for length, start, speed in edits
    ]
    listed = _box(b"elst", bytes(4) + len(edits).to_bytes(4) + b"".join(entries))
    rest = [_box(kind, body) for kind, _, body in _boxes(track) if kind != b"edts"]
    return rest[0] + _box(b"edts", listed) + b"".join(rest[1:])


def _box(kind: bytes, body: bytes) -> bytes:
    return (len(body) + 8).to_bytes(4) + kind + body


def _boxes(data: bytes):
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4])
        yield data[at + 4 : at + 8], at, data[at + 8 : at + size]
        at += size
