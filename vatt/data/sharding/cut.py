"""One source in, its clips out: a source is decoded once for all of them.

Every window gets frames at a constant rate and mono sound from the same instant, by the clock of
`vatt.data.clips.media`. The same input gives the same bytes.

There are two ways. The ffmpeg program cuts ordinary files. It loses the clock where time stamps or
the form of picture or sound change, and after a seek into a picture that stays for seconds: such
files are decoded packet by packet in a process of its own (`python -m vatt.data.sharding.cut`), and
ffmpeg only encodes. So is a window of an ordinary file that differs from the plan.
"""

import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import ffmpeg
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from vatt.config import PreprocessParams
from vatt.data.clips.media import (
    FORMATS,
    NEAR_START,
    SEEK_AFTER,
    STILL_SECONDS,
    Limits,
    Media,
    Packets,
    Reading,
    off_rate,
    open_media,
    other_mix,
    run_limited,
    scan,
    stamped_packets,
)
from vatt.data.clips.samples import Window
from vatt.errors import MachineError

SEEK_MARGIN = 3.0  # a picture shown up to so long before the window still stands in its first frame
MAX_ASPECT = 8  # a longer side beyond this many short sides is cut down: no endless frames
# A stored frame shows what stands on the screen so long after its time: a source of the same rate
# whose stamps are rounded gives frame for frame what it holds.
LOOK_AHEAD = 0.01
PATIENCE = 20.0  # seconds that a second of video may take
MAX_CLIP_BYTES = 2**28  # of a stored clip's picture
MAX_PIXELS = 2**26  # of a frame: 8192 x 8192; a file that claims more is not decoded
CANCELLED = 30.0  # a mix that is so many times quieter than another one is not their sound
CELL_CANCELLED, SHARE_CANCELLED = 25.0, 0.1  # in energy: a part of the sound, and of all of it
AUDIBLE = 10  # of 32,768: quieter channels need not be rescued
_GLOBAL = ("-nostdin", "-hide_banner", "-nostats", "-filter_complex_threads", "1", "-y")
_LEVEL = ("-loglevel", "level+info")  # at this level it says when the form of a stream changes
_CHANGED = b"Reconfiguring filter graph"
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
    complaints: tuple[str, ...] = ()

    @property
    def complaint(self) -> str:
        """All of them, in one line."""
        return "; ".join(self.complaints)


def cut(
    cuts: Sequence[Cut], params: PreprocessParams, *, program: str, work: Path
) -> list[CutResult]:
    """Cut windows out of files; what cannot be decoded is missing from its piece."""
    ordinary = [item for item in cuts if not item.media.exact]
    tool = _Tool(params, program, work)
    found = iter(_cut_ordinary(ordinary, tool) if ordinary else ())
    results = []
    for item in cuts:
        result = None if item.media.exact else next(found)
        result = _cut_exactly(item, tool) if result is None else _verify(item, result, tool)
        results.append(CutResult(result.pieces, _distinct(item.media.remark, *result.complaints)))
    return results


@dataclass(frozen=True, slots=True)
class _Tool:
    """What cuts: the settings, the ffmpeg program and a folder for what lies between."""

    params: PreprocessParams
    program: str
    work: Path

    def run(
        self, command: Sequence[str], limits: Limits, log: Path, *, python: bool = False
    ) -> str:
        """Run a command and return its complaint; a full disk is an error."""
        # The worker may have found this package by its own path.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)} if python else None
        complaint = run_limited(command, limits, log=log, env=env)
        if "No space left on device" in complaint:
            raise MachineError(
                f"the disk of {self.work} is full", hint="free some space, run it again"
            )
        return complaint

    def encode(self, outputs: Sequence[Any], limits: Limits, log: Path) -> str:
        """Run ffmpeg for these outputs; returns its complaint."""
        command = ffmpeg.merge_outputs(*outputs).compile(cmd=self.program)
        return self.run([command[0], *_GLOBAL, *_LEVEL, *command[1:]], limits, log)


def _distinct(*complaints: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, complaints)))


def _cut_ordinary(cuts: Sequence[Cut], tool: _Tool) -> list[CutResult | None]:
    """Cut files in one call of ffmpeg; None for one whose form changes on the way.

    When anything is wrong with one of several files, each is cut by itself: the same bytes come
    out, and it is known which one is broken.
    """
    params = tool.params
    with tempfile.TemporaryDirectory(dir=tool.work) as name:
        folder = Path(name)
        outputs: list[Any] = []
        for number, item in enumerate(cuts):
            outputs += _outputs(item, params, f"{folder}/{number}")
        log = folder / "log"
        complaint = tool.encode(outputs, _limits(cuts, params), log)
        changed = _CHANGED in log.read_bytes()
        if len(cuts) == 1 and changed:
            return [None]
        if len(cuts) == 1 or not (complaint or changed):
            return [
                _collect(item, params, f"{folder}/{number}", complaint)
                for number, item in enumerate(cuts)
            ]
    return [_cut_ordinary([item], tool)[0] for item in cuts]


def _verify(item: Cut, result: CutResult, tool: _Tool) -> CutResult:
    """Compare pieces with what was planned; the doubtful ones are cut again, exactly."""
    is_film = item.media.image is None and any(piece.num_frames for piece in result.pieces)
    if is_film and result.complaint:
        # After damage, ffmpeg shows the last good picture for as long as it takes.
        again = _cut_exactly(replace(item, media=replace(item.media, exact=True)), tool)
        return CutResult(again.pieces, _distinct(*result.complaints, *again.complaints))
    pieces = list(result.pieces)
    wrong = _doubtful(item, result, tool.params)
    silent = [k for k in _silent(item, pieces) if k not in wrong]
    complaints = result.complaints
    for numbers, pictures in ((wrong, True), (silent, False)):
        if not numbers:
            continue
        windows = tuple(item.windows[k] for k in numbers)
        again = _cut_exactly(replace(item, windows=windows), tool, pictures=pictures)
        complaints = _distinct(*complaints, *again.complaints)
        for k, piece in zip(numbers, again.pieces, strict=True):
            old, hz = pieces[k], tool.params.audio_hz
            length = round(old.num_frames / tool.params.fps * hz) if old.num_frames else None
            sound = None if piece.audio is None else piece.audio[:length]
            pieces[k] = piece if pictures else replace(old, audio=sound)
    return CutResult(pieces, complaints)


def _doubtful(item: Cut, result: CutResult, params: PreprocessParams) -> list[int]:
    """The pieces that have not as many frames as planned, or that repeat another one."""
    doubtful = []
    seen: dict[tuple[tuple[bytes, ...], bytes], Window] = {}
    for k, (piece, window) in enumerate(zip(result.pieces, item.windows, strict=True)):
        if item.media.image is not None:
            continue
        planned = _frames(window, params) if item.media.video is not None else 0
        too_few = piece.num_frames < planned - 1 and not result.complaint
        sound = b"" if piece.audio is None or not piece.audio.any() else piece.audio.tobytes()
        first = seen.setdefault((piece.video, sound), window) if sound else window
        if piece.num_frames > planned or too_few or first != window:
            doubtful.append(k)
    return doubtful


def _silent(item: Cut, pieces: Sequence[Piece]) -> list[int]:
    """The pieces without any sound although the source has packets of sound for most of them."""
    return [
        k
        for k, (piece, window) in enumerate(zip(pieces, item.windows, strict=True))
        if (piece.audio is None or not piece.audio.any())
        and _overlap(item.media.heard, window) > (window[1] - window[0]) / 2
    ]


def _overlap(spans: Sequence[Window], window: Window) -> float:
    return sum(max(0.0, min(end, window[1]) - max(begin, window[0])) for begin, end in spans)


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
        sound = stream[str(item.media.audio)]
        if item.media.channels > 1:
            both = sound.filter_multi_output("asplit", 2)
            weights = enumerate(other_mix(item.media.channels))
            args = "".join(f"{weight:+.6f}*c{channel}" for channel, weight in weights)
            side = both[1].filter("pan", args=f"mono|c0={args.removeprefix('+')}")
            outputs.append(_sound(side, length, params, f"{prefix}-side"))
            sound = both[0]
        if item.media.mix:
            sound = sound.filter("pan", args=item.media.mix)
        outputs.append(_sound(sound, length, params, f"{prefix}-sound"))
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
                # Always this matrix: a JPEG does not name one, and readers assume this.
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


def _sound(sound: Any, until: float, params: PreprocessParams, path: str) -> Any:
    """All of the sound from time 0, silence where the track has none; sliced by sample later."""
    return (
        sound.filter("aresample", params.audio_hz, **{"async": 1, "first_pts": 0})
        .filter("aformat", sample_fmts="s16", channel_layouts="mono")
        .output(f"file:{path}", f="s16le", acodec="pcm_s16le", t=f"{until:.6f}")
    )


def _limits(cuts: Sequence[Cut], params: PreprocessParams) -> Limits:
    """Far more than an honest file needs."""
    seconds = sum(_span(item)[1] for item in cuts)
    sound = round(max(_span(item)[1] for item in cuts) * params.audio_hz * 2)
    return Limits(seconds=PATIENCE * (3 + seconds), file_bytes=sound + MAX_CLIP_BYTES)


def _collect(item: Cut, params: PreprocessParams, prefix: str, complaint: str) -> CutResult:
    """What ffmpeg wrote for one file."""
    track, side = (_samples(f"{prefix}-{name}") for name in ("sound", "side"))
    seek, _ = _span(item)
    hz = params.audio_hz
    pieces, complaints = [], [complaint]
    for number, (start, end) in enumerate(item.windows):
        first = round((item.media.start + start - seek) * hz)
        inside = slice(first, first + round((end - start) * hz))
        sound, cancelled = _mixed(track[inside], side[inside], item.media.channels)
        complaints.append(cancelled)
        pieces.append(_piece(f"{prefix}-{number}.mp4", sound, end - start, params))
    return CutResult(pieces, _distinct(*complaints))


def _samples(path: str) -> np.ndarray:
    return np.fromfile(path, dtype="<i2") if Path(path).exists() else np.zeros(0, np.int16)


def _mixed(mid: np.ndarray, side: np.ndarray, channels: int) -> tuple[np.ndarray, str]:
    """The sound of a window, and a complaint where the mix of its channels is not its sound."""
    size = min(mid.size, side.size)  # at damage, one of them may end before the other
    if not size:
        return mid, ""
    whole, mid, side = mid, mid[:size], side[:size]
    loudness = [float(np.sqrt(np.mean(wave.astype(float) ** 2))) for wave in (mid, side)]
    if loudness[1] < AUDIBLE:
        return whole, ""
    if loudness[1] < CANCELLED * loudness[0] and not (channels == 2 and _cancels(mid, side)):
        return whole, ""
    other = np.clip(mid.astype(int) + side, -32768, 32767).astype(np.int16)  # of two, the left
    return other, "its channels cancel each other: another mix was taken"


def _cancels(mid: np.ndarray, side: np.ndarray) -> bool:
    """Whether the mix of two channels loses some of their sound, for a while or in an octave.

    And more than the left channel alone, which lacks what only the right one has.
    """
    waves = [mid, side, mid + side.astype(float), mid - side.astype(float)]
    mix, other, left, right = (_cells(wave) for wave in waves)
    lost = [
        missing[missing > CELL_CANCELLED * kept].sum() / max((missing + kept).sum(), 1.0)
        for kept, missing in ((mix, other), (left, right))
    ]
    return bool(lost[0] > SHARE_CANCELLED and lost[0] > lost[1])


def _cells(wave: np.ndarray) -> np.ndarray:
    """The energy of a sound in each octave of each eighth of it."""
    size = max(len(wave) // 8, 2)
    blocks = wave[: len(wave) // size * size].reshape(-1, size)
    energy = np.abs(np.fft.rfft(blocks, axis=1)) ** 2
    octaves = 2 ** np.arange(int(np.log2(energy.shape[1])) + 1) - 1
    return np.add.reduceat(energy, octaves, axis=1)


def _piece(path: str, sound: np.ndarray, seconds: float, params: PreprocessParams) -> Piece:
    """A window's encoded picture with its sound, of the same length."""
    data = Path(path).read_bytes() if Path(path).exists() else b""
    packets, height, width = _measure(data)
    frames = len(packets)
    length = round((frames / params.fps if frames else seconds) * params.audio_hz)
    audio = None
    if sound.size:
        audio = np.zeros(length, dtype=np.int16)
        audio[: sound.size] = sound[:length]
    video = packets if params.video_storage == "jpeg" else [data] if frames else []
    return Piece(tuple(video), frames, height, width, audio)


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


# --- the exact way --------------------------------------------------------------------------------

SOUND_GRID = 60.0  # seconds; sound is decoded from multiples of this, for any windows
WARM_UP = 1.0  # seconds that a decoder of sound is given before them
IN_STEP = 0.05  # seconds; sound whose stamps are nearer to its samples' count follows the count
STALE = 0.5  # seconds that a picture may stand in for the next ones, which cannot be decoded
_LAYOUTS = dict(enumerate(("mono", "stereo", "2.1", "4.0", "5.0", "5.1", "6.1", "7.1"), start=1))
HEADERS = "new_extradata"  # with a packet: the decoder needs them for all later ones
FILMS_A_CALL = 8  # each has threads of its own


def _cut_exactly(item: Cut, tool: _Tool, *, pictures: bool = True) -> CutResult:
    """Cut one file by the times of its packets, or only its sound."""
    params = tool.params
    with tempfile.TemporaryDirectory(dir=tool.work) as name:
        prefix = f"{name}/0"
        request = {
            "source": str(item.source.resolve()),
            "windows": item.windows,
            "params": params.model_dump(mode="json"),
            "prefix": prefix,
            "pictures": pictures,
            "whole": not item.media.exact,  # its form changes somewhere: decode from the beginning
        }
        Path(f"{name}/request").write_text(json.dumps(request), encoding="utf-8")
        limits = _exact_limits(item, params)
        command = [sys.executable, "-m", __name__, f"{name}/request"]
        complaints = [tool.run(command, limits, Path(f"{name}/log"), python=True)]
        films = [Path(f"{prefix}-{number}.y4m") for number in range(len(item.windows))]
        outputs = [
            ffmpeg.input(f"file:{film}", f="yuv4mpegpipe").output(
                f"file:{film.with_suffix('.mp4')}", **_encoder(params), **_ENCODER
            )
            for film in films
            if film.exists()
        ]
        for first in range(0, len(outputs), FILMS_A_CALL):
            part = outputs[first : first + FILMS_A_CALL]
            complaints.append(tool.encode(part, limits, Path(f"{name}/log")))
        pieces = []
        for number, (start, end) in enumerate(item.windows):
            tracks = [_samples(f"{prefix}-{number}-{track}") for track in ("sound", "side")]
            sound, cancelled = _mixed(tracks[0], tracks[1], item.media.channels)
            complaints.append(cancelled)
            pieces.append(_piece(f"{prefix}-{number}.mp4", sound, end - start, params))
    return CutResult(pieces, _distinct(*complaints))


def _exact_limits(item: Cut, params: PreprocessParams) -> Limits:
    until = max(end for _, end in item.windows) + SEEK_MARGIN
    frames = max(_frames(window, params) for window in item.windows)
    picture = frames * (params.short_side + 2) ** 2 * MAX_ASPECT * 3 // 2
    return Limits(PATIENCE * (3 + until), max(MAX_CLIP_BYTES, picture + 2**20))


def main(path: str) -> None:
    """Decode what a request wants: y4m films and samples, a file each for every window."""
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    params = PreprocessParams.model_validate(request["params"])
    source, windows = Path(request["source"]), [(a, b) for a, b in request["windows"]]
    media, packets = scan(source)
    errors: list[str] = []
    if media.video is not None and request["pictures"]:
        films = [
            _Film(f"{request['prefix']}-{number}.y4m", window, params)
            for number, window in enumerate(windows)
        ]
        needed = _needed_pictures(packets, windows, whole=request["whole"])
        _shoot(films, _decode(source, packets.pictures, packets, needed, errors), media, packets)
        errors += [film.fault for film in films if film.fault][:1]
    if media.audio is not None:
        tracks = {}
        for chunk in {int(x // SOUND_GRID) for a, b in windows for x in (*np.arange(a, b), b)}:
            # Each from a new decoder: its noise must not depend on what else is wanted.
            needed = _needed_sound(packets, chunk, whole=request["whole"])
            heard = list(_hear(_decode(source, packets.sounds, packets, needed, errors), media))
            heard, wrong = _in_rate(heard)
            errors += wrong
            tracks[chunk] = _place(heard, chunk * SOUND_GRID, params.audio_hz)
        for number, window in enumerate(windows):
            _save_sound(f"{request['prefix']}-{number}", window, tracks, media, params.audio_hz)
    for error in dict.fromkeys(errors):
        sys.stderr.write(f"[error] {error}\n")


# Time on the clips' clock, a frame, and the shape of its pixels.
Decoded = tuple[float, Any, Fraction | None]
Sound = tuple[float, int, np.ndarray]  # time, sample rate, (2, S): the mix, another mix


def _needed_pictures(packets: Packets, windows: Sequence[Window], *, whole: bool) -> np.ndarray:
    """Which packets of the picture must be decoded: from a key frame on, for each window."""
    time, key = packets.time[~packets.sound], packets.key[~packets.sound]
    needed = np.zeros(len(time), bool)
    for start, end in windows:
        before = np.flatnonzero(key & (time <= start + LOOK_AHEAD))
        first = 0 if whole or not before.size else before[np.argmax(time[before])]
        until = np.flatnonzero(time <= end + LOOK_AHEAD)
        needed[first : until[-1] + 3 if until.size else 0] = True  # two more: a whole picture
    return needed


def _needed_sound(packets: Packets, chunk: int, *, whole: bool) -> np.ndarray:
    time = packets.time[packets.sound]
    begin = -np.inf if whole else chunk * SOUND_GRID - WARM_UP
    return (time >= begin) & (time <= (chunk + 1) * SOUND_GRID + WARM_UP)


def _decode(
    source: Path,
    readings: Sequence[Reading],
    packets: Packets,
    needed: np.ndarray,
    errors: list[str],
) -> Iterator[Decoded]:
    """The frames of the packets that are needed, each with its time on the clips' clock."""
    shifts = packets.shift[packets.sound == (readings is packets.sounds)]
    number = 0
    for reading in readings:
        with open_media(source, reading.begin, reading.end) as container:
            stream = container.streams[reading.stream]
            codec = stream.codec_context
            codec.thread_type, codec.thread_count = "NONE", 1
            codec.options = {"max_pixels": str(MAX_PIXELS)} if stream.type == "video" else {}
            unit = float(stream.time_base)
            decoding = False
            shown_from = reading.start + float(shifts[number : number + 1].sum()) - packets.zero
            for packet, pts, dts in stamped_packets(container, [stream]):
                is_needed = number < len(needed) and needed[number]
                if is_needed:
                    ticks = round(shifts[number] / unit)
                    packet.pts, packet.dts = pts + ticks, dts + ticks
                    frames = _timed(codec, packet, unit, packets.zero, errors)
                    yield from (frame for frame in frames if frame[0] > shown_from - LOOK_AHEAD)
                elif decoding:
                    yield from _timed(codec, None, unit, packets.zero, errors)
                    codec.flush_buffers()
                if not is_needed and packet.has_sidedata(HEADERS):
                    for _ in _timed(codec, packet, unit, packets.zero, []):
                        pass  # only the headers are wanted
                    codec.flush_buffers()
                decoding, number = is_needed, number + 1
            if decoding:
                yield from _timed(codec, None, unit, packets.zero, errors)


def _timed(
    codec: Any, packet: Any, unit: float, zero: float, errors: list[str]
) -> Iterator[Decoded]:
    try:
        frames = codec.decode(packet)
    except av.FFmpegError as error:
        errors.append(f"a packet cannot be decoded: {error.strerror}")
        return
    for frame in frames:
        if frame.is_corrupt:
            errors.append("a packet is damaged")
        elif frame.pts is not None:
            shape = codec.sample_aspect_ratio if isinstance(frame, av.VideoFrame) else None
            yield float(frame.pts * (frame.time_base or unit)) - zero, frame, shape


class _Film:
    """The picture of one window, written frame by frame.

    All frames have the size of the first; one of another shape is fitted into it, with black bars.
    """

    def __init__(self, path: str, window: Window, params: PreprocessParams) -> None:
        self.path, self.params = Path(path), params
        self.start, self.total = window[0], _frames(window, params)
        self.count, self.fault = 0, ""
        self.size: tuple[int, int] | None = None  # width, height

    def show(self, picture: Decoded, until: float, stale: float) -> None:
        """Take frames from a picture that stands on the screen; it is wrong from `stale` on."""
        begin, data = picture[0], None
        while self.count < self.total and not self.fault:
            time = self.start + self.count / self.params.fps + LOOK_AHEAD
            if time >= until:
                return
            if time < begin - NEAR_START - LOOK_AHEAD:
                self.fault = f"there is no picture from {time - LOOK_AHEAD:.2f} to {begin:.2f} s"
            elif time > stale:
                self.fault = f"the pictures from {stale - STALE:.2f} s on cannot be decoded"
            else:
                data = data or self._planes(*picture[1:])
                self._write(data)

    def _write(self, data: bytes) -> None:
        with self.path.open("ab") as file:
            if not self.count and self.size:
                file.write(
                    b"YUV4MPEG2 W%d H%d F%d:1 Ip A1:1 C420jpeg\n" % (*self.size, self.params.fps)
                )
            file.write(b"FRAME\n" + data)
        self.count += 1

    def _planes(self, frame: av.VideoFrame, shape: Fraction | None) -> bytes:
        """A frame as planes of Y, U and V, scaled as the ffmpeg program does, and upright."""
        turn = _turn(frame)
        size = _stored_size(frame, shape, self.params)
        if turn.swaps:
            size = size[::-1]
        self.size = self.size or size
        inside = _fitted(size, self.size)
        width, height = inside[::-1] if turn.swaps else inside
        full = self.params.video_storage == "jpeg"
        unknown = frame.colorspace in (2, 3)  # unspecified, reserved
        picture = frame.reformat(
            width=width,
            height=height,
            format="yuv420p",
            src_colorspace=Colorspace.ITU601 if unknown else None,
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
            interpolation=Interpolation.BICUBIC,
            threads=1,
        )
        planes = [
            np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
            for plane in picture.planes
        ]
        upright = [turn.of(plane) for plane in planes]
        return b"".join(_framed(upright, self.size, black=0 if full else 16))


@dataclass(frozen=True, slots=True)
class _Turn:
    """How a picture is shown: rows and columns swapped first, then each one mirrored."""

    swaps: bool = False
    mirrors: tuple[bool, bool] = (False, False)  # rows, columns

    def of(self, plane: np.ndarray) -> np.ndarray:
        """A plane as it is shown."""
        turned = plane.T if self.swaps else plane
        rows, columns = (slice(None, None, -1 if mirror else 1) for mirror in self.mirrors)
        return turned[rows, columns]


def _turn(frame: av.VideoFrame) -> _Turn:
    """The nearest turn to a frame's display matrix, which sends (x, y) to (ax + cy, bx + dy)."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
            return _Turn(True, (b < 0, c < 0)) if abs(b) > abs(a) else _Turn(False, (d < 0, a < 0))
    return _Turn()


def _stored_size(
    frame: av.VideoFrame, shape: Fraction | None, params: PreprocessParams
) -> tuple[int, int]:
    """Width and height, even, with square pixels, as in `_pictures`."""
    width, height = frame.width * float(shape or 1), float(frame.height)
    short, most = min(width, height) / params.short_side, MAX_ASPECT * params.short_side
    stored = [2 * int(min(side / short, most) / 2 + 0.5) for side in (width, height)]
    return stored[0], stored[1]


def _fitted(size: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int]:
    """The even width and height of a picture scaled to touch a frame from inside."""
    scale = min(outer / own for own, outer in zip(size, frame, strict=True))
    width, height = (
        outer if abs(own * scale - outer) <= 2 else max(2 * round(own * scale / 2), 2)
        for own, outer in zip(size, frame, strict=True)
    )
    return width, height


def _framed(planes: Sequence[np.ndarray], size: tuple[int, int], *, black: int) -> Iterator[bytes]:
    """The bytes of planes in the middle of a black frame."""
    inner = planes[0].shape[1], planes[0].shape[0]
    left, top = (2 * ((outer - own) // 4) for own, outer in zip(inner, size, strict=True))
    for number, plane in enumerate(planes):
        share = 2 if number else 1  # U and V have half as many rows and columns
        frame = np.full((size[1] // share, size[0] // share), 128 if number else black, np.uint8)
        rows, columns = plane.shape
        frame[top // share :, left // share :][:rows, :columns] = plane
        yield frame.tobytes()


def _shoot(
    films: Sequence[_Film], frames: Iterator[Decoded], media: Media, packets: Packets
) -> None:
    """Show each picture to the films from its time until that of the next one."""
    stamps = np.sort(packets.time[~packets.sound])
    if media.interlaced:
        frames = _deinterlace(frames)
    last: Decoded | None = None
    for picture in frames:
        if last is None or picture[0] > last[0]:  # otherwise its time stamp is out of order
            _show(films, last, picture[0], stamps, media)
            last = picture
    _show(films, last, np.inf, stamps, media)
    for film in films:
        if film.count < film.total and not film.fault:
            film.fault = f"{film.count} of {film.total} frames can be decoded"


def _show(
    films: Sequence[_Film],
    picture: Decoded | None,
    until: float,
    stamps: np.ndarray,
    media: Media,
) -> None:
    if picture is not None:
        following = np.searchsorted(stamps, picture[0] + 1e-3, side="right")
        last = max(media.seconds, picture[0])
        end = stamps[following] if following < len(stamps) else last
        for film in films:
            film.show(picture, until, float(end) + STALE)


def _deinterlace(frames: Iterator[Decoded]) -> Iterator[Decoded]:
    """Make whole pictures of half ones, as `_outputs` does."""
    graph: Any = None
    form, shape = None, None
    for time, frame, shape in frames:
        if form != (frame.width, frame.height, frame.format.name):
            yield from _pull(graph, shape, flush=True)
            form = frame.width, frame.height, frame.format.name
            graph = av.filter.Graph()
            source = graph.add_buffer(
                width=form[0], height=form[1], format=form[2], time_base=Fraction(1, 10**6)
            )
            half = graph.add("bwdif", "mode=send_frame:deint=interlaced")
            graph.link_nodes(source, half, graph.add("buffersink")).configure()
        frame.pts, frame.time_base = round(time * 1e6), Fraction(1, 10**6)
        graph.push(frame)
        yield from _pull(graph, shape)
    yield from _pull(graph, shape, flush=True)


def _pull(graph: Any, shape: Fraction | None, *, flush: bool = False) -> Iterator[Decoded]:
    if graph is None:
        return
    if flush:
        graph.push(None)
    try:
        while True:
            frame = graph.pull()
            yield frame.time, frame, shape
    except (av.BlockingIOError, av.EOFError):
        return


def _hear(frames: Iterator[Decoded], media: Media) -> Iterator[Sound]:
    """Frames of sound as one channel, and another mix of several."""
    mixers: dict[tuple[str, str, int], list[av.AudioResampler]] = {}
    for time, frame, _ in frames:
        layout, rate = frame.layout.name, frame.sample_rate
        if frame.layout.nb_channels in _LAYOUTS and "channels" in layout:  # FFmpeg's guess
            layout = _LAYOUTS[frame.layout.nb_channels]
            frame = av.AudioFrame.from_ndarray(frame.to_ndarray(), frame.format.name, layout)
            frame.sample_rate = rate
        kind = (frame.format.name, layout, rate)
        if kind not in mixers:
            wanted = layout if media.mix or layout == "stereo" else "mono"
            mixers[kind] = [av.AudioResampler("fltp", form, rate) for form in (wanted, layout)]
        if frame.format.name.startswith(("flt", "dbl")):
            frame = _finite(frame)
        frame.pts = None
        for mixed, each in zip(*(mixer.resample(frame) for mixer in mixers[kind]), strict=True):
            wave, channels = mixed.to_ndarray(), each.to_ndarray()
            mono = wave[0] if media.mix.endswith("c0=c0") else wave.mean(axis=0)
            weights = other_mix(len(channels)) if len(channels) > 1 else [0.0]
            yield time, rate, np.stack([mono, np.asarray(weights, np.float32) @ channels])


def _finite(frame: av.AudioFrame) -> av.AudioFrame:
    """A frame without samples that are not finite: they are silent."""
    wave = frame.to_ndarray()
    if np.isfinite(wave).all():
        return frame
    whole = av.AudioFrame.from_ndarray(
        np.nan_to_num(wave, nan=0.0, posinf=0.0, neginf=0.0), frame.format.name, frame.layout.name
    )
    whole.sample_rate = frame.sample_rate
    return whole


def _in_rate(heard: list[Sound]) -> tuple[list[Sound], list[str]]:
    """The frames without those that would be played too fast or too slowly, and a complaint."""
    time = np.array([frame[0] for frame in heard])
    off = off_rate(time, np.array([wave.shape[1] / rate for _, rate, wave in heard]))
    kept = [frame for frame, wrong in zip(heard, off, strict=True) if not wrong]
    if not off.any():
        return heard, []
    return kept, [f"its sound has another rate than the file says from {time[off][0]:.1f} s on"]


def _place(heard: Sequence[Sound], begin: float, hz: int) -> tuple[np.ndarray, np.ndarray]:
    """Sound in its place from `begin` on: (2, S) int16, and which samples there are."""
    count = round(SOUND_GRID * hz)
    track, there = np.zeros((2, count), np.int16), np.zeros(count, bool)
    frames = [
        (time, rate, wave)
        for time, rate, wave in heard
        if begin - NEAR_START < time + wave.shape[1] / rate and time < begin + SOUND_GRID
    ]
    number = 0
    reached = -np.inf  # where the samples before end
    while number < len(frames):
        time, rate, _ = frames[number]
        start = reached if not _leaves(frames, number, reached) else time
        run: list[np.ndarray] = []
        reached = start
        while number < len(frames) and frames[number][1] == rate:
            if run and _leaves(frames, number, reached):
                break
            run.append(frames[number][2])
            reached += run[-1].shape[1] / rate
            number += 1
        samples = np.stack([_resample(wave, rate, hz) for wave in np.concatenate(run, axis=1)])
        first = round((start - begin) * hz)
        inside = slice(max(first, 0), max(first + samples.shape[1], 0))
        part = samples[:, max(-first, 0) :][:, : track[:, inside].shape[1]]
        track[:, inside.start : inside.start + part.shape[1]] = part
        there[inside.start : inside.start + part.shape[1]] = True
    return track, there


def _leaves(frames: Sequence[Sound], number: int, reached: float) -> bool:
    """Whether the time stamps leave the count of the samples for good, not for a few frames.

    Within a packet of MPEG-TS they are a guess, which is wrong after a change of the sample rate.
    """
    begin, expected = frames[number][0], reached
    for time, rate, wave in frames[number:]:
        if abs(time - expected) <= IN_STEP:
            return False
        if not time - begin < STALE:
            break
        expected += wave.shape[1] / rate
    return True


def _resample(wave: np.ndarray, rate: int, hz: int) -> np.ndarray:
    """Samples at another rate, as 16 bits."""
    resampler = av.AudioResampler(format="s16", layout="mono", rate=hz)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[None], np.float32), "fltp", "mono")
    frame.sample_rate, frame.pts = rate, None
    parts = [*resampler.resample(frame), *resampler.resample(None)]
    return np.concatenate([part.to_ndarray()[0] for part in parts])


def _save_sound(
    prefix: str,
    window: Window,
    tracks: dict[int, tuple[np.ndarray, np.ndarray]],
    media: Media,
    hz: int,
) -> None:
    """Write a window's samples; none where the sound has ended or most cannot be decoded."""
    first, last = round(window[0] * hz), round(window[1] * hz)
    size = round(SOUND_GRID * hz)
    parts = [
        [part[..., max(first - chunk * size, 0) : max(last - chunk * size, 0)] for part in track]
        for chunk, track in sorted(tracks.items())
    ]
    track, there = (np.concatenate(kind, axis=-1) for kind in zip(*parts, strict=True))
    ended = window[0] >= media.heard[-1][1]
    if there.sum() < hz * _overlap(media.heard, window) / 2 or (ended and not there.any()):
        return
    for name, samples in zip(("sound", "side"), track, strict=True):
        samples.astype("<i2").tofile(f"{prefix}-{name}")


if __name__ == "__main__":
    main(sys.argv[1])
