"""Media files: what a file holds and when, and programs that read it under limits.

Time has one definition, for planning and for cutting. `scan` reads a file's packets without
decoding them and gives each one a time on the clips' clock:

- Time 0 is the first picture by the file's own time stamps of presentation. It is the first sound
  where there is no picture or where the picture begins much later.
- Where time stamps run backwards, a new part begins: its start takes the place of the end of the
  part before. Streams that jump together stay in step; a stream that jumps alone goes on alone.
- A forward leap of all streams is closed in the same way in formats whose clock may leap (MPEG-TS,
  MPEG-PS, Ogg). In others the stamps are right: nothing was recorded there, and nothing is cut.
- Recordings that are joined in one file follow each other, also where each has its own header or
  its own streams.
- What an edit list hides has no time; the parts that it shows follow each other.
- A picture stays until the next one. The last one lasts as long as its packet says, but at most as
  long as the sound, the longest picture before it, or two seconds; a minute without sound. In a
  file whose pictures stay for seconds, it lasts as long as the longest of them within the sound.

Everything unusual about it is a remark for the ledger.
"""

import contextlib
import mmap
import os
import re
import resource
import signal
import subprocess
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import av
import imageio_ffmpeg
import numpy as np
from av.stream import Disposition

from vatt.data.clips.files import copied_link
from vatt.errors import MachineError

# What may be opened, by content: no playlist, pattern or script that would open something else.
FORMATS = (
    "aac,ac3,aiff,amr,asf,au,avi,caf,dv,flac,flv,gif,h264,hevc,ivf,m4v,matroska,webm,mov,mp4,m4a,"
    "3gp,3g2,mj2,mp3,mpeg,mpegts,mpegvideo,mxf,ogg,rm,vob,wav,w64,wv,apng"
)
STILL_SECONDS = 1.0  # for so long an image is shown
_IMAGES = {b"\xff\xd8\xff": "jpeg_pipe", b"\x89PNG\r\n\x1a\n": "png_pipe", b"BM": "bmp_pipe"}
MAX_HOURS = 48  # a file that claims more lies
NEAR_START = 0.1  # seconds
PROGRESSIVE = 1  # FFmpeg's field order; above it are the interlaced ones
_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": FORMATS}

# In seconds:
SEEK_AFTER = 20.0  # nearer the beginning, decoding from there is as fast as a seek, and safer
BACK = 0.25  # time stamps that run back by more begin a new part
LEAP = 10.0  # a longer leap is closed; FFmpeg has the same limit
SKEW = LEAP / 2  # the streams of a file are interleaved more closely
HOLD = 2.0  # a picture that stays for longer may be missed after a seek
KEYS = 2.5  # and so may one between key frames that are further apart
OFF_RATE, MIN_STEPS = 0.05, 8  # share by which the pace of sound may be wrong; steps that show it
REORDERED = 16  # pictures that wait for one: no codec allows more
PAUSE = 0.9  # no packet for longer is worth a remark
STRETCHED = 4.0  # times the usual length: a packet is not so long
ALONE = 60.0  # seconds; a longer picture without sound is not a film
BOXES = {"mov,mp4,m4a,3gp,3g2,mj2"}  # FFmpeg's name for all kinds of MP4
PLAIN = {"wav", "w64", "aiff", "au", "caf"}  # nothing but samples, as a rule
TIMED = {"matroska,webm", "avi", "flv", "asf", "wav", "w64", "aiff"}  # by their headers
ODD_BYTES, ODD_SHARE = 2**16, 0.05  # less is not worth a remark
UNDATED = 4  # packets; fewer are lost at the beginning or end of many files
INDEXED = {"matroska,webm", *BOXES, "avi", "gif"}  # a seek finds key frames
JOINED = 100  # recordings in one file, at most
TABLES = 2**21  # bytes; FFmpeg knows the streams and tables of MPEG-TS that begin before
OVERLAP = 0.02  # share of a file by which one stream may begin before the end of another
MIXED = 8  # channels; FFmpeg has no rule to mix more of them
TOO_LOUD = 0.001  # share of samples
_FLOATS = {
    f"pcm_f{bits}{order}e": np.dtype(f"{sign}f{bits // 8}")
    for bits in (32, 64)
    for order, sign in (("l", "<"), ("b", ">"))
}
_CLOCK_LEAPS = av.format.Flags.ts_discont.value
_NOT_FILM = Disposition.attached_pic | Disposition.timed_thumbnails
_FOR_FEW = Disposition.hearing_impaired | Disposition.visual_impaired | Disposition.comment

Span = tuple[float, float]  # from, to, in seconds


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
    exact: bool = False  # the ffmpeg program would lose the clock: `cut` decodes by packets
    channels: int = 0  # of the sound
    mix: str = ""  # what FFmpeg's `pan` makes of channels that it cannot mix by itself
    heard: tuple[Span, ...] = ()  # where there are packets of sound
    pauses: tuple[Span, ...] = ()  # where nothing was recorded
    remark: str = ""  # what is unusual about its time


@dataclass(frozen=True, slots=True)
class Reading:
    """A stream to read in a part of the file."""

    stream: int  # its index where only this part is opened
    begin: int = 0  # bytes
    end: int = 0  # bytes; 0: the end of the file
    start: float = -np.inf  # the time stamp from which on it is shown; an edit list hides the rest


@dataclass(frozen=True, slots=True)
class Packets:
    """The packets of the chosen streams, those of each kind in order. P: packets."""

    sound: np.ndarray  # (P,) bool; the others are pictures
    time: np.ndarray  # (P,) of presentation, in seconds on the clips' clock
    length: np.ndarray  # (P,) seconds; 0 where the file does not say
    key: np.ndarray  # (P,) bool: decoding can begin here
    hidden: np.ndarray  # (P,) bool: an edit list hides it; others may need it for their decoding
    shift: np.ndarray  # (P,) seconds added to the file's time stamps
    pictures: tuple[Reading, ...] = ()  # where they come from
    sounds: tuple[Reading, ...] = ()
    zero: float = 0.0  # and taken off then


def probe(path: Path) -> Media:
    """Read a file's packets, without decoding them; raises BrokenMediaError."""
    if not path.is_file():
        raise BrokenMediaError("not a file" if path.exists() else "no such file")
    if path.stat().st_size == 0:
        raise BrokenMediaError("empty file")
    with path.open("rb") as file:
        if file.read(4) == b"RIFX":
            raise BrokenMediaError("its samples are big-endian (RIFX), which FFmpeg misreads")
    image = image_format(path)
    if image is not None:  # not opened: what it claims to be is for the limits of `cut`
        return Media(0, None, 0.0, STILL_SECONDS, 1, image=image)
    return scan(path)[0]


def scan(path: Path) -> tuple[Media, Packets]:
    """What a file of pictures and sound holds, and when; raises BrokenMediaError."""
    try:
        with open_media(path) as container:
            return _scan(path, container)
    except av.FFmpegError as error:
        if (target := copied_link(path)) is not None:
            raise BrokenMediaError(f"a link to {target} that was copied as text") from None
        if isinstance(error, av.ArgumentError):  # FFmpeg knows its format, `FORMATS` does not
            raise BrokenMediaError("not a media file of a format that is read") from None
        raise BrokenMediaError(f"not a media file: {error.strerror}") from None


def open_media(path: Path, begin: int = 0, end: int = 0) -> av.container.InputContainer:
    """A file (or some bytes of it) whose format is one of ours; its titles may be any bytes."""
    name, options = f"file:{path.resolve()}", _OPTIONS
    if begin or end:
        name = f"subfile,,start,{begin},end,{end},,:{name}"
        options = {**_OPTIONS, "protocol_whitelist": "file,subfile"}
    return av.open(name, options=options, metadata_errors="replace")


def image_format(path: Path) -> str | None:
    """FFmpeg's name for the format of an image, by its first bytes; None for anything else."""
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp_pipe"
    if head.startswith((b"GIF87a", b"GIF89a")):  # one with several pictures is a video
        return "gif_pipe" if _pictures_in_gif(path) == 1 else None
    if head.startswith(b"\x89PNG") and _is_animated_png(path):
        return None
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


def _is_animated_png(path: Path) -> bool:
    """Whether a PNG says, before its first picture, that several follow."""
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
            if head[4:] == b"acTL":
                return int.from_bytes(file.read(4)) > 1
            file.seek(int.from_bytes(head[:4]) + 4, os.SEEK_CUR)
    return False


def _pass_colours(file: BinaryIO, flags: bytes) -> None:
    """Go on after a table of colours, if there is one."""
    if flags and flags[0] & 0x80:
        file.seek(3 * 2 ** ((flags[0] & 7) + 1), os.SEEK_CUR)


def stamped_packets(
    container: av.container.InputContainer,
    streams: Sequence[Any],
    undated: Counter[str] | None = None,
) -> Iterator[tuple[av.Packet, int, int]]:
    """The packets of streams, each with its times of presentation and of decoding.

    They end where the file is cut off. Those without a time are only counted, by type of stream.
    """
    counts_frames = container.format.name == "avi"  # no time of presentation: others guess one
    try:
        for packet in container.demux(streams):
            dts = packet.pts if packet.dts is None else packet.dts
            pts = dts if packet.pts is None or counts_frames else packet.pts
            if pts is not None and dts is not None and packet.size:
                yield packet, pts, dts
            elif packet.size and undated is not None:
                undated[packet.stream.type] += 1
    except (av.FFmpegError, IndexError):  # IndexError: at its end, where streams have been added
        pass  # what came before counts


@dataclass(slots=True)
class _Waves:
    """What is unusual about samples of sound that are stored as floating-point numbers."""

    count: int = 0
    loud: int = 0  # beyond full scale
    lost: int = 0  # not finite

    def look(self, packet: av.Packet) -> None:
        """Count the samples of a packet."""
        kind = _FLOATS.get(packet.stream.codec_context.name)
        if kind is None:
            return
        data = bytes(packet)
        wave = np.frombuffer(data[: len(data) // kind.itemsize * kind.itemsize], kind)
        self.count += wave.size
        self.loud += int((np.abs(wave) > 1).sum())
        self.lost += int((~np.isfinite(wave)).sum())

    def remarks(self) -> list[str]:
        """What the ledger should say."""
        said = []
        if self.lost:
            said.append(f"{self.lost:,} samples of its sound are not finite: they are silent")
        if self.loud > TOO_LOUD * self.count:
            share = self.loud / self.count
            said.append(f"{share:.1%} of its samples are beyond full scale: they are clipped")
        return said


class _Columns:
    """What is noted of each packet while files are read."""

    def __init__(self) -> None:
        # time of presentation, of decoding, length; whether sound, key, hidden; byte in the file
        self.columns: tuple[array[Any], ...] = tuple(array(kind) for kind in "dddbbbd")
        self.undated: Counter[str] = Counter()  # packets without a time stamp, of each type
        self.waves, self.bytes = _Waves(), 0
        self.readings: dict[bool, list[Reading]] = {False: [], True: []}
        self.starts: dict[int, float] = {}  # of recordings after the first, by their first packet

    def read(
        self, container: av.container.InputContainer, streams: Sequence[Any], begin: int, end: int
    ) -> int:
        """Note the packets of streams; returns where the last one ends in the file."""
        units = {stream.index: float(stream.time_base) for stream in streams}
        sound = {stream.index: stream.type == "audio" for stream in streams}
        reached, count, first = begin, 0, len(self.columns[0])
        start = -np.inf
        undated: dict[int, list[int]] = {stream.index: [] for stream in streams}
        if begin and container.start_time is not None:
            start = self.starts[first] = container.start_time / 1e6
        for packet, pts, dts in stamped_packets(container, streams, self.undated):
            self.waves.look(packet)
            self.bytes += packet.size
            place = -1 if packet.pos is None else packet.pos + begin
            reached, count = max(reached, place + packet.size), count + 1
            unit = units[packet.stream_index]
            facts = (pts * unit, dts * unit, (packet.duration or 0) * unit)
            flags = (sound[packet.stream_index], packet.is_keyframe, packet.is_discard, place)
            waiting = undated.get(packet.stream_index, [])
            if packet.dts is None and len(waiting) <= REORDERED:
                waiting.append(len(self.columns[0]))
            else:
                self._date(undated.pop(packet.stream_index, []), dts * unit)
            for column, value in zip(self.columns, (*facts, *flags), strict=True):
                column.append(value)
        for packets in undated.values():
            self._date(packets, np.inf)
        for stream in streams if count else ():
            self.readings[sound[stream.index]].append(Reading(stream.index, begin, end, start))
        return reached

    def _date(self, packets: Sequence[int], until: float) -> None:
        """A stream's first packets may lack times of decoding: none is after a later one."""
        times = self.columns[1]
        for number in reversed(packets):
            until = times[number] = min(times[number], until)

    def packets(
        self, *, leaps: bool, are_guessed: bool, in_order: bool
    ) -> tuple[Packets, list[tuple[float, float]]]:
        """The packets, and where and by how much their time stamps jump."""
        presented, decoded, length = (np.array(column) for column in self.columns[:3])
        sound, key, hidden = (np.array(column, bool) for column in self.columns[3:6])
        if not presented.size:
            raise BrokenMediaError(
                "its packets have no time stamps" if self.undated else "no packet in it"
            )
        # Stamps from both sides of a break; but a picture that stays for long waits for long, too.
        away = np.abs(presented - decoded) > LEAP
        if not are_guessed:
            away &= ~_is_reordered(sound, presented, decoded)
        presented[away] = decoded[away]
        # A hidden packet is only decoded for those after it: it has the time of the next one.
        if any(hidden[kind].all() and kind.any() for kind in (sound, ~sound)):
            raise BrokenMediaError("its edit list hides all of its picture or sound")
        following = _following(sound, hidden)
        presented, decoded = presented[following], decoded[following]
        length[hidden] = 0
        place = np.arange(len(sound)) if in_order else np.array(self.columns[6])
        part = np.zeros(len(sound), np.int64)
        part[~hidden] = _parts(
            sound[~hidden],
            decoded[~hidden],
            presented[~hidden],
            _order(sound[~hidden], place[~hidden]),
            leaps=leaps,
        )
        part = part[following]
        starts = {int(part[at]): start for at, start in self.starts.items() if at < len(part)}
        shift, jumps = _close(sound, part, presented, length, starts)
        pictures, sounds = (tuple(self.readings[kind]) for kind in (False, True))
        time = presented + shift
        return Packets(sound, time, length, key, hidden, shift, pictures, sounds), jumps

    def time_at(self, place: int) -> float:
        """About when something was recorded that begins at a byte of the file."""
        after = [time for time, at in zip(self.columns[0], self.columns[6], strict=True)
                 if at >= place]  # fmt: skip
        return min(after, default=0.0) - min(self.columns[0], default=0.0)


def _scan(path: Path, container: av.container.InputContainer) -> tuple[Media, Packets]:
    chosen = _chosen_of(container)
    if not chosen:
        raise BrokenMediaError("it has no picture and no sound that can be decoded")
    columns, form = _Columns(), container.format.name
    with contextlib.ExitStack() as opened:
        begins = _recordings(path, form)
        if len(begins) > 1:  # its reader would go on with the headers of the first one
            container = opened.enter_context(open_media(path, 0, begins[1]))
            chosen = _chosen_of(container)
        reached = columns.read(container, chosen, 0, begins[1] if len(begins) > 1 else 0)
        more, remarks = _joined(path, form, columns, reached, begins, opened)
        if form == "mpegts":
            more, remarks = _later_streams(path, container, columns, chosen, opened)
        packets, jumps = columns.packets(
            leaps=bool(container.format.flags & _CLOCK_LEAPS) or bool(more),
            are_guessed=form == "mpeg",  # it has time stamps for some pictures only
            in_order=form in BOXES,  # an edit list may go back in the file
        )
        remarks += _missing(columns.undated) + columns.waves.remarks()
        streams = [*chosen, *more]
        kinds = {kind: [s for s in streams if s.type == kind] for kind in ("video", "audio")}
        if len(streams) == len(chosen):
            remarks += _unread(path, container, columns, packets)
        media, packets = _describe(
            container,
            None if packets.sound.all() else kinds["video"][0],
            kinds["audio"][0] if packets.sound.any() else None,
            packets,
            jumps,
            remarks,
            is_damaged=columns.waves.lost > 0,  # ffmpeg would make loud noise of it
        )
    return _edited(path, form, media, packets), packets


def _unread(
    path: Path, container: av.container.InputContainer, columns: _Columns, packets: Packets
) -> list[str]:
    """What the ledger says of a file that holds less than its header says, or more."""
    form, size = container.format.name, path.stat().st_size
    if form in PLAIN and size - columns.bytes > max(ODD_BYTES, ODD_SHARE * size):
        return [f"{size - columns.bytes:,} of its {size:,} bytes are not read"]
    begin, end = (container.start_time or 0) / 1e6, float(max(columns.columns[0]))
    said = (container.duration or 0) / 1e6
    end -= min(begin, 0.0)  # some headers count from 0, others from the first time stamp
    if form in TIMED and said - end > max(PAUSE, ODD_SHARE * said):
        return [f"its header says {said:.1f} s, but it ends at {end:.1f} s"]
    return []


def _edited(path: Path, form: str, media: Media, packets: Packets) -> Media:
    """The same, up to where the edit list has something that FFmpeg does not follow."""
    odd = _odd_edits(path) if form in BOXES else []
    if not odd:
        return media
    at, why = min(odd)
    until = max(at - packets.zero, 0.0)
    if until < NEAR_START:
        raise BrokenMediaError(f"its edit list {why} at its beginning")
    said = f"its edit list {why} at {until:.1f} s: what follows is not used"
    remark = "; ".join(filter(None, (media.remark, said)))
    return replace(media, seconds=min(media.seconds, until), remark=remark)


def _odd_edits(path: Path) -> list[tuple[float, str]]:
    """Where the edit list of each track has a gap or another speed, in seconds of the film."""
    found = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for moov in _within(data, (0, len(data)), b"moov"):
            scales = [_scale(data, begin) for begin, _ in _within(data, moov, b"mvhd")]
            for part in _within(data, moov, b"trak", b"edts", b"elst"):
                time = 0
                edits = list(_edits(data, *part))
                for number, (length, start, rate) in enumerate(edits):
                    is_gap = start < 0 and number > 0
                    if is_gap or (rate != 1 and (rate or len(edits) > 1)):
                        why = "leaves a gap" if is_gap else "changes the speed"
                        found.append((time / max([*scales, 1]), why))
                    time += length
    return found


def _scale(data: Any, begin: int) -> int:
    """Ticks a second, by the header of a film."""
    at = begin + (20 if data[begin : begin + 1] == b"\1" else 12)
    return int.from_bytes(data[at : at + 4])


def _edits(data: Any, begin: int, end: int) -> Iterator[tuple[int, int, float]]:
    """The entries of an edit list: length in ticks of the film, start in the track's, rate."""
    width = 8 if data[begin : begin + 1] == b"\1" else 4
    step = 2 * width + 4
    count = int.from_bytes(data[begin + 4 : begin + 8])
    for at in range(begin + 8, min(begin + 8 + count * step, end - step + 1), step):
        length, start = (
            int.from_bytes(data[place : place + width], signed=place > at)
            for place in (at, at + width)
        )
        rate = int.from_bytes(data[at + 2 * width : at + step], signed=True)
        yield length, start, rate / 2**16


def _within(data: Any, span: tuple[int, int], *kinds: bytes) -> Iterator[tuple[int, int]]:
    """The contents of the boxes on a path of kinds of boxes."""
    for kind, _, begin, end in boxes(data, *span):
        if kind == kinds[0] and len(kinds) == 1:
            yield begin, end
        elif kind == kinds[0]:
            yield from _within(data, (begin, end), *kinds[1:])


def _chosen_of(container: av.container.InputContainer) -> list[Any]:
    """The streams to take, picture first."""
    both = _chosen(container.streams.video), _chosen(container.streams.audio)
    return [stream for stream in both if stream is not None]


def _missing(undated: Mapping[str, int]) -> list[str]:
    """What the ledger says of packets without a time."""
    names = {"video": "picture", "audio": "sound"}
    return [
        f"{count:,} packets of its {names[kind]} have no time stamp"
        for kind, count in undated.items()
        if count > UNDATED
    ]


# How a recording begins, in formats whose readers go on with the headers of the first one, and
# where its first block ends: one that begins there belongs to it.
_STARTS = {
    "matroska,webm": rb"\x1a\x45\xdf\xa3[^\0].{0,60}?\x42\x82[\x84\x88](?:webm|matroska)",
    "ogg": rb"OggS\0[\2\3]\0{8}.{12}(.)",
    "flac": rb"fLaC[\0\x80]\0\0\x22",
    "wv": rb"wvpk(.{4}).{8}\0{4}(?!\0{4})",
    "au": rb"\.snd\0\0.{2}.{4}\0\0\0[\x01-\x1b]",
}


def _recordings(path: Path, form: str) -> list[int]:
    """The byte at which each recording in a file begins."""
    begins, block_end = [0], 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if form in BOXES:
            seen: set[bytes] = set()
            for kind, begin, _, _ in boxes(data, 0, len(data)):
                if kind == b"ftyp" and not seen.isdisjoint((b"moov", b"mdat")):
                    begins.append(begin)
                    seen.clear()
                seen.add(kind)
            return begins
        for found in re.finditer(_STARTS[form], data, re.DOTALL) if form in _STARTS else ():
            begin = found.start()
            if begin not in (0, block_end) and begin >= block_end:
                begins.append(begin)
            if form == "ogg":
                lacing = data[found.end() : found.end() + found[1][0]]
                block_end = found.end() + len(lacing) + sum(lacing)
            elif form == "wv":
                block_end = begin + 8 + int.from_bytes(found[1], "little")
    return begins


def boxes(data: Any, begin: int, end: int) -> Iterator[tuple[bytes, int, int, int]]:
    """The boxes of an MP4 in a part of it: the kind, where each begins, its content, its end."""
    while begin + 8 <= end:
        size, kind, first = int.from_bytes(data[begin : begin + 4]), data[begin + 4 : begin + 8], 8
        if size == 1:
            size, first = int.from_bytes(data[begin + 8 : begin + 16]), 16
        last = begin + size if size else end
        if last < begin + first:
            return
        yield bytes(kind), begin, begin + first, min(last, end)
        begin = last


# How a recording begins, in formats whose readers stop where another one is joined to the first.
_HEADS = {
    "flv": rb"FLV\x01.\0\0\0\x09",
    "wav": rb"RIFF.{4}WAVE",
    "w64": rb"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb",
    "aiff": rb"FORM.{4}AIF[FC]",
    "caf": rb"caff\0\x01\0\0",
    "asf": rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c",
}


def _joined(
    path: Path,
    form: str,
    columns: _Columns,
    reached: int,
    begins: Sequence[int],
    opened: contextlib.ExitStack,
) -> tuple[list[Any], list[str]]:
    """Read the recordings that follow the first one in a file; remarks on those that cannot be."""
    streams: list[Any] = []
    remarks: list[str] = []
    found = list(pairwise((*begins[1:], 0))) if len(begins) > 1 else []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        head = re.compile(_HEADS[form], re.DOTALL) if form in _HEADS else None
        while True:
            if head is not None and (next_one := head.search(data, reached or 1)):
                found.append((next_one.start(), 0))
            if not found:
                return streams, remarks
            begin, end = found.pop(0)
            if len(streams) >= 2 * JOINED or len(remarks) >= JOINED:
                return streams, [*remarks, f"what follows {JOINED} recordings is not read"]
            more, reached = _one_more(path, columns, begin, end, opened)
            streams += more
            if not more:
                remarks.append(f"another recording that begins at byte {begin:,} cannot be read")
                reached = begin + 8


def _one_more(
    path: Path, columns: _Columns, begin: int, end: int, opened: contextlib.ExitStack
) -> tuple[list[Any], int]:
    """Read a recording within a file: its streams, and where its last packet ends."""
    try:
        container = opened.enter_context(open_media(path, begin, end))
        chosen = _chosen_of(container)
        reached = columns.read(container, chosen, begin, end) if chosen else begin
    except av.FFmpegError:
        return [], begin
    return (chosen, reached) if reached > begin else ([], begin)


def _later_streams(
    path: Path,
    container: av.container.InputContainer,
    columns: _Columns,
    chosen: Sequence[Any],
    opened: contextlib.ExitStack,
) -> tuple[list[Any], list[str]]:
    """Read the streams of an MPEG-TS that begin where the chosen ones have ended.

    Remarks on those that begin while the chosen ones go on.
    """
    spans, tables = _pids(path)
    known = {stream.id: stream.type for stream in container.streams}
    slack = OVERLAP * path.stat().st_size
    tables_end = min(slack, TABLES)
    ends = {stream.type: spans.get(stream.id, (0, 0))[1] - slack for stream in chosen}
    later: list[Any] = []
    remarks: list[str] = []
    for pid, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
        before = tables[tables <= first]
        late = first >= ends.get(known[pid], 0) if pid in known else first > tables_end
        if not late or not before.size or pid in {stream.id for stream in chosen}:
            continue
        begin = int(before[-1])
        try:
            part = opened.enter_context(open_media(path, begin))
        except av.FFmpegError:
            continue
        streams = [s for s in (*part.streams.video, *part.streams.audio) if s.id == pid]
        for stream in [s for s in streams if _chosen([s]) is not None]:
            if first >= ends.get(stream.type, 0):
                columns.read(part, [stream], begin, 0)
                ends[stream.type] = last - slack
                later.append(stream)
            elif pid not in known:
                what = "sound" if stream.type == "audio" else "picture"
                time = columns.time_at(first)
                remarks.append(f"another {what} begins at {time:.1f} s and is not used")
    return later, remarks


def _pids(path: Path) -> tuple[dict[int, tuple[int, int]], np.ndarray]:
    """Where each stream of an MPEG-TS begins and ends, and where its tables of streams are."""
    data = np.memmap(path, np.uint8, "r")
    spans: dict[int, tuple[int, int]] = {}
    tables: list[np.ndarray] = []
    place = 0
    while (found := _in_step(data, place)) is not None:
        place, stride, count = found
        heads = data[place : place + count * stride].reshape(count, stride)
        pids = (heads[:, 1].astype(np.uint16) & 0x1F) << 8 | heads[:, 2]
        for pid in np.unique(pids).tolist():
            at = np.flatnonzero(pids == pid) * stride + place
            if pid == 0:
                tables.append(at)
            elif pid != _NULL_PID:
                spans[pid] = spans.get(pid, (int(at[0]), 0))[0], int(at[-1])
        place += count * stride
    return spans, np.concatenate(tables) if tables else np.zeros(0, np.int64)


_SYNC, _NULL_PID = 0x47, 0x1FFF
_SEARCHED = 2**16  # bytes, for the next packet
_AT_ONCE = 2**22  # packets


def _in_step(data: np.ndarray, place: int) -> tuple[int, int, int] | None:
    """The next run of packets of MPEG-TS: where it begins, the length and number of its packets."""
    part = data[place : place + _SEARCHED]
    for first in np.flatnonzero(part == _SYNC):
        for stride in (188, 192, 204):
            begin = place + int(first)
            marks = data[begin : begin + _AT_ONCE * stride : stride]
            if len(marks) > 4 and (marks[:5] == _SYNC).all():
                wrong = np.flatnonzero(marks != _SYNC)
                count = int(wrong[0]) if wrong.size else len(marks)
                return begin, stride, max(min(count, (len(data) - begin) // stride), 1)
    return None


def _chosen(streams: Sequence[Any]) -> Any | None:
    """The stream to take of a kind: the default one, or else the first; no cover art.

    A stream without a decoder is left out. A commentary, or one for people who cannot hear or see,
    comes last.
    """
    known = [
        stream
        for stream in streams
        if stream.codec_context is not None and not stream.disposition & _NOT_FILM
    ]
    return max(
        known,
        key=lambda s: (
            not s.disposition & _FOR_FEW,
            bool(s.disposition & Disposition.default),
            s.frames != 1,  # a still image of it
        ),
        default=None,  # max takes the first of equals
    )


def _lengths(sound: np.ndarray, time: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Lengths of packets; those that the file does not give are as long as the usual step."""
    filled = length.copy()
    for kind in (sound, ~sound):
        steps = np.diff(np.sort(time[kind]))
        usual = np.median(steps[steps > 0]) if (steps > 0).any() else 0.0
        filled[kind] = np.where(length[kind] > 0, length[kind], usual)
    return filled


def _is_reordered(sound: np.ndarray, pts: np.ndarray, dts: np.ndarray) -> np.ndarray:
    """Whether a picture is decoded early for the pictures that are shown before it."""
    shown = np.sort(pts[~sound])
    between = np.searchsorted(shown, pts) - np.searchsorted(shown, dts, side="right")
    return ~sound & (pts > dts) & (between <= REORDERED)


def _following(sound: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Of each packet itself, or of a hidden one the next of its kind that is shown, or the last."""
    following = np.arange(len(sound))
    for kind in (sound, ~sound):
        shown = np.flatnonzero(kind & ~hidden)
        at = np.minimum(np.searchsorted(shown, following[kind]), len(shown) - 1)
        following[kind] = shown[at]
    return following


def _order(sound: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The order of the packets in the file: a picture may come out of it seconds later."""
    filled = place.copy()
    for kind in (sound, ~sound):
        filled[kind] = np.maximum.accumulate(place[kind])
    return np.argsort(filled, kind="stable")


def _parts(
    sound: np.ndarray, dts: np.ndarray, pts: np.ndarray, order: np.ndarray, *, leaps: bool
) -> np.ndarray:
    """The number of the part that each packet belongs to: a clock of its own."""
    part = np.zeros(len(dts), np.int64)
    steps = [np.diff(dts[kind]) for kind in (sound, ~sound)]
    # Slides that all stay for longer than a leap do not leap.
    leap = [max(LEAP, 2 * float(np.median(s[s > 0]))) if (s > 0).any() else LEAP for s in steps]
    if not any(
        ((s < -BACK) | (leaps & (s > most))).any() for s, most in zip(steps, leap, strict=True)
    ):
        return part
    repeats = np.zeros(len(dts), bool)  # pictures that are shown no later than the one before
    repeats[~sound] = np.diff(pts[~sound], prepend=-np.inf) <= 0
    at: dict[bool, int] = {}  # of each stream: its part, and its last time stamp
    last: dict[bool, float] = {}
    shift = [0.0]  # about what each part's stamps need to continue the ones before
    for number, kind, stamp in zip(order, sound[order].tolist(), dts[order].tolist(), strict=True):
        newest, other = len(shift) - 1, not kind
        reached = last[other] + shift[at[other]] if other in at else np.inf
        now = at.setdefault(kind, newest)
        away = abs(stamp + shift[now] - reached)
        if other in at and at[other] == newest != now:
            jumps = kind in last and not -BACK <= stamp - last[kind] <= LEAP
            if abs(stamp + shift[newest] - reached) < (away if jumps else min(SKEW, away)):
                at[kind] = newest  # it jumps as the other stream did
        elif kind in last:
            step = stamp - last[kind]
            # A picture that comes again at the same time, long after it, is of the next part.
            again = repeats[number] and step <= 0 and BACK < reached - stamp - shift[now] < np.inf
            if step < -BACK or again or (leaps and step > leap[not kind] and away > SKEW):
                ends = [last[stream] + shift[at[stream]] for stream in last]
                shift.append(max(ends) - stamp)
                at[kind] = newest + 1
        last[kind], part[number] = stamp, at[kind]
    return part


def _close(
    sound: np.ndarray,
    part: np.ndarray,
    pts: np.ndarray,
    length: np.ndarray,
    starts: Mapping[int, float],
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """What to add to each packet's time stamp, and where and by how much the stamps jump."""
    length = _lengths(sound, pts, length)
    shift, ends = np.zeros(len(pts)), {False: -np.inf, True: -np.inf}
    jumps: list[tuple[float, float]] = []
    before = 0.0
    for number in range(part.max() + 1):
        members = {kind: (part == number) & (sound == kind) for kind in (False, True)}
        members = {kind: inside for kind, inside in members.items() if inside.any()}
        begin = _part_begin({kind: float(pts[inside].min()) for kind, inside in members.items()})
        if number:
            begin = max(begin, starts.get(number, begin))
            known = {kind: ends[kind] for kind in members if np.isfinite(ends[kind])} or ends
            end = _part_end(known)
            jumps.append((end, before - (end - begin)))
            before = end - begin
        for kind, inside in members.items():
            shift[inside] = before
            ends[kind] = max(ends[kind], float((pts + length)[inside].max()) + before)
        if len(members) == 2:  # a guess about the last picture does not outlast the sound
            shown = float(pts[members[False]].max()) + before
            ends[False] = min(ends[False], max(ends[True], shown))
    return shift, jumps


def _part_begin(first: Mapping[bool, float]) -> float:
    """Clips begin with the first picture; one that begins long after the sound waits for it."""
    earliest = min(first.values())
    picture = first.get(False, earliest)
    return picture if picture - earliest <= NEAR_START else earliest


def _part_end(last: Mapping[bool, float]) -> float:
    """The end of the picture, or of a sound that goes on for much longer."""
    latest = max(last.values())
    picture = last.get(False, latest)
    return picture if latest - picture <= 2 * NEAR_START else latest


def _describe(
    container: av.container.InputContainer,
    video: Any | None,
    audio: Any | None,
    packets: Packets,
    jumps: Sequence[tuple[float, float]],
    remarks: Sequence[str],
    *,
    is_damaged: bool,
) -> tuple[Media, Packets]:
    sound, time = packets.sound, packets.time
    kinds = [kind for kind in (False, True) if (sound == kind).any()]
    first = {kind: float(time[sound == kind].min()) for kind in kinds}
    last = {kind: float((time + packets.length)[sound == kind].max()) for kind in kinds}
    # AAC's priming packets lie before it: their time is cut away by every player.
    given = container.start_time
    zero = min(first.values()) if given is None else given / 1e6
    moved = abs(zero - min(first.values())) > PAUSE and not container.format.name.startswith("mov")
    if moved:
        zero = min(first.values())  # FFmpeg's is of another part, or misses the first picture
    start = max(_part_begin({kind: max(begin, zero) for kind, begin in first.items()}), zero) - zero
    packets = replace(packets, time=time - (zero + start), zero=zero + start)
    shown = np.sort(packets.time[~sound & ~packets.hidden])
    if shown.size > 2 and len(np.unique(shown)) < len(shown) / 2:
        raise BrokenMediaError(f"{len(shown)} pictures share {len(np.unique(shown))} time stamps")
    longest = float(np.diff(shown).max()) if shown.size > 1 else np.inf
    seconds = last[kinds[0]] - zero - start
    if len(kinds) == 2 and longest > HOLD:
        seconds = max(seconds, min(last[True] - zero - start, shown[-1] + longest))
    if shown.size:
        heard_for = last.get(True, -np.inf) - zero - start - shown[-1]
        usual = max(longest, HOLD) if len(kinds) == 2 and shown.size > 1 else ALONE
        if (claimed := seconds - shown[-1]) > (most := max(usual, heard_for)):
            remarks = [*remarks, f"its last picture claims to stay for {claimed:.0f} s"]
            seconds = float(shown[-1] + most)
    if seconds > MAX_HOURS * 3600:
        raise BrokenMediaError(f"its time stamps claim {seconds / 3600:.0f} hours")
    heard = _heard(packets)
    pauses = _pauses(shown, heard)
    field_order = 0 if video is None else video.codec_context.field_order
    jumped = [(at - zero - start, by) for at, by in jumps]
    joined = max(len(packets.pictures), len(packets.sounds)) > 1 or _begins_later(packets)
    odd = _is_odd(packets, shown, longest, container.format.name)
    if container.format.name == "avi" and longest > HOLD and _is_out_of_order(video):
        remarks = [*remarks, "its pictures are out of order, and AVI has no times for them"]
    return Media(
        video=None if video is None else video.index,
        audio=None if audio is None else audio.index,
        start=start,
        seconds=seconds,
        num_frames=len(shown),
        interlaced=field_order > PROGRESSIVE,
        exact=bool(jumps) or moved or joined or odd or is_damaged,
        mix="" if audio is None else _mix(audio),
        channels=0 if audio is None else audio.codec_context.layout.nb_channels,
        heard=heard,
        pauses=tuple(pauses),
        remark=_remark(jumped, pauses, remarks),
    ), packets


def _is_out_of_order(video: Any | None) -> bool:
    return video is not None and bool(video.codec_context.has_b_frames)


def _begins_later(packets: Packets) -> bool:
    """Whether a stream is not there at the beginning of the file, where ffmpeg looks for it."""
    return any(one.begin for one in (*packets.pictures, *packets.sounds))


def _is_odd(packets: Packets, shown: np.ndarray, longest: float, form: str) -> bool:
    """Whether seeking or filling by FFmpeg's command line would lose the time of some packet."""
    sound = packets.sound
    if shown.size and (longest > HOLD or shown[0] > NEAR_START):
        return True
    if (np.diff((packets.time - packets.shift)[sound]) < 0).any():
        return True  # stamps that were guessed from another sample rate
    inner = packets.time[packets.hidden]
    if ((inner > inner.min(initial=0) + PAUSE) & (inner < packets.time.max() - PAUSE)).any():
        return True  # an edit list with several parts
    length = _lengths(sound, packets.time, packets.length)[sound]
    if off_rate(packets.time[sound], length).any():
        return True
    keys = np.sort(packets.time[~sound & packets.key])
    if keys.size and keys[0] > NEAR_START:
        return True  # the first pictures cannot be decoded
    until = shown[-1] if shown.size else 0.0
    apart = np.diff(keys, prepend=0.0, append=until).max() if shown.size else 0.0
    return bool(form not in INDEXED and apart > KEYS and until > SEEK_AFTER)


def off_rate(time: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Which packets or frames of sound come at another pace than their own length, for a second.

    Where some are lost the usual step is right, and where stamps are guessed their mean is: where
    both are wrong the samples have another rate than the file says.
    """
    off = np.zeros(len(time), bool)
    seconds = np.floor(time)
    for second in np.unique(seconds[:-1]):
        inside = np.flatnonzero(seconds == second)
        steps = np.diff(time[inside[0] : inside[-1] + 2])
        if len(steps) < MIN_STEPS or len(steps) < len(inside) - 1:
            continue
        own = length[inside[: len(steps)]]
        paces = [form(steps) / max(form(own), 1e-6) for form in (np.median, np.mean)]
        off[inside] = all(pace > 0 and abs(pace - 1) > OFF_RATE for pace in paces)
    return off


def other_mix(channels: int) -> list[float]:
    """Weights of channels whose plain mix may be silent: half the difference of two of them.

    No two of several weights are equal, and their signs alternate.
    """
    if channels == 2:
        return [0.5, -0.5]
    weights = [(-1) ** channel / (channel + 1) for channel in range(channels)]
    return [weight / sum(map(abs, weights)) for weight in weights]


def _mix(audio: Any) -> str:
    """what FFmpeg's `pan` makes of channels that it cannot mix by itself: their mean."""
    layout = audio.codec_context.layout
    count = layout.nb_channels
    if layout.name.startswith("ambisonic"):
        return "mono|c0=c0"  # the first channel hears all around
    if count <= MIXED:
        return ""
    return "mono|c0=" + "+".join(f"{1 / count:.6f}*c{channel}" for channel in range(count))


def _heard(packets: Packets) -> tuple[Span, ...]:
    """Where there is sound: spans that are more than half a second apart."""
    order = np.argsort(packets.time[packets.sound], kind="stable")
    begins = packets.time[packets.sound][order]
    if not begins.size:
        return ()
    length = _lengths(packets.sound, packets.time, packets.length)[packets.sound][order]
    # MP4 says of the packet before a gap that it lasts until the next one.
    length = np.minimum(length, max(STRETCHED * float(np.median(length)), NEAR_START))
    ends = np.maximum.accumulate(begins + length)
    cuts = np.flatnonzero(begins[1:] - ends[:-1] > PAUSE / 2)
    firsts, lasts = [0, *(cuts + 1)], [*cuts, len(ends) - 1]
    return tuple((float(begins[a]), float(ends[b])) for a, b in zip(firsts, lasts, strict=True))


def _pauses(shown: np.ndarray, heard: Sequence[Span]) -> list[Span]:
    """Where neither a new picture nor sound comes, although they go on later."""
    silent = [(before[1], after[0]) for before, after in pairwise(heard)]
    if not shown.size:
        return [span for span in silent if span[1] - span[0] > LEAP]
    pauses = []
    for number in np.flatnonzero(np.diff(shown) > PAUSE):
        begin, end = float(shown[number]), float(shown[number + 1])
        if not heard or begin >= heard[-1][1]:
            pauses += [(begin + ALONE, end)] if end - begin > ALONE + PAUSE else []
            continue
        both = [(max(begin, a), min(end, b)) for a, b in silent]
        pauses += [(a, b) for a, b in both if b - a > PAUSE]
    return pauses


def _remark(
    jumps: Sequence[tuple[float, float]], pauses: Sequence[Span], others: Sequence[str]
) -> str:
    said = [*others]
    said += [
        f"its time stamps {'start again' if by < 0 else f'leap by {by:.1f} s'} at {at:.1f} s"
        for at, by in jumps
    ]
    said += [f"nothing was recorded from {begin:.1f} to {end:.1f} s" for begin, end in pauses]
    more = f"; {len(said) - 2} more breaks" if len(said) > 2 else ""
    return "; ".join(said[:2]) + more


MEMORY = 4 * 2**30  # bytes; 32 clips of a film of 3840 x 2160 take 0.9 GiB
LOG_BYTES = 2**20  # of complaints that are read

_LEVEL = re.compile(
    rb"((?:\[[^\]]* @ 0x[0-9a-f]+\] )*)"
    rb"\[(quiet|panic|fatal|error|warning|info|verbose|debug|trace)\] "
)
_ERRORS = {b"panic", b"fatal", b"error"}
_REPEATED = b"    Last message repeated "

_SIGNALS = {
    signal.SIGXCPU: "decoding takes too long",
    signal.SIGXFSZ: "the output is too large",
    signal.SIGKILL: "ffmpeg was killed, perhaps because memory ran out",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may take."""

    seconds: float  # by the clock, and of computing
    file_bytes: int  # of each file that it writes
    memory: int = MEMORY


def run_limited(
    command: Sequence[str], limits: Limits, *, log: Path, env: Mapping[str, str] | None = None
) -> str:
    """Run a command; returns what it complains of, empty for a clean run. No shell reads it.

    Of lines that name a level, as after `-loglevel level+info`, only errors are complaints.
    """
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
            process_group=0, env=env,
        )  # fmt: skip
        _limit(process.pid, limits)
        try:
            code = process.wait(timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return _SIGNALS[signal.SIGXCPU]
        finally:
            _end(process)
    lines = _complaints(log)
    if code < 0:
        return _SIGNALS.get(signal.Signals(-code), f"ffmpeg ended by signal {-code}")
    if code and not lines:
        return f"ffmpeg ended with code {code}"
    return _sum_up([line for line in lines if "No space left on device" in line] or lines)


def _complaints(log: Path) -> list[str]:
    lines: list[str] = []
    levels, wrong, size = False, False, 0
    with log.open("rb") as errors:
        while size < LOG_BYTES and (line := errors.readline(LOG_BYTES)):
            level = _LEVEL.match(line)
            if level and not levels:
                levels, lines = True, []
            if level:
                wrong = level[2] in _ERRORS
            if line.strip() and (not levels or (wrong and (level or _REPEATED in line))):
                text = line if level is None else level[1] + line[level.end() :]
                lines.append(text.decode(errors="replace").strip())
                size += len(line)
    return lines


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and everything that it started, such as a wrapper's ffmpeg."""
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

    The parts run in parallel: only the order within each is always the same. Addresses are cut out.
    """
    firsts: dict[tuple[bool, str], str] = {}
    for line in lines:
        part = re.match(r"\[([^@\]]*) @ 0x", line)
        name = part[1] if part else "#"
        firsts.setdefault(("#" in name, name), re.sub(r"\[[^\]]*@ 0x[0-9a-f]+\]\s*", "", line))
    said = "; ".join(firsts[name] for name in sorted(firsts))[:200]
    # Nor is their number always the same: ffmpeg reads on for a while past the wanted end.
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
