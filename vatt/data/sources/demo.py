"""The demo corpus: handwritten digits that move while their telephone tones sound.

Real voices may say the digits instead, and captions may be spoilt (docs/beyond.md).
"""

import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import Any, Self

import av
import numpy as np
from numpy.typing import NDArray

from vatt.config import DemoParams
from vatt.data.clips.files import ContentHashes
from vatt.data.clips.manifest import LABEL_SEPARATOR, Caption, Clip
from vatt.data.clips.media import open_media
from vatt.data.workers import worker_pool
from vatt.errors import DataError
from vatt.files import atomic_write
from vatt.progress import Progress

SECONDS = 1.0
FPS = 10
FRAME_SIZE = 72  # pixels, H = W
AUDIO_HZ = 16_000

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOTIONS = ("left", "right", "up", "down", "grow", "shrink", "circle", "shake")

# Rows and columns of a telephone's keypad, in Hz.
TONES = {
    digit: (row, column)
    for row, digits in ((697, "123"), (770, "456"), (852, "789"), (941, " 0 "))
    for column, digit in zip((1209, 1336, 1477), digits, strict=True)
    if digit != " "
}

# Sixteen slots that repeat: x is sound, a dot is silence. Only the pattern distinguishes them,
# since a clip may begin anywhere in it.
RHYTHMS = {
    "left": "x...x...x...x...",
    "right": "xx..xx..xx..xx..",
    "up": "xxx.xxx.xxx.xxx.",
    "down": "x.x.x.x.x.x.x.x.",
    "grow": "xxxx....xxxx....",
    "shrink": "xxxxxx..xxxxxx..",
    "circle": "x.x.....x.x.....",
    "shake": "xxxxxxxxxxxxxxxx",
}

SUBJECTS = (
    "a {digit}",
    "the {digit}",
    "the digit {digit}",
    "the number {digit}",
    "a handwritten {digit}",
    "now a {digit}",
    "here the {digit}",
    "somebody's {digit}",
)
PREDICATES = {
    "left": ("drifts to the left", "moves left", "slides off to the left side"),
    "right": ("drifts to the right", "moves right", "slides off to the right side"),
    "up": ("rises", "moves up", "climbs towards the top"),
    "down": ("sinks", "moves down", "falls towards the bottom"),
    "grow": ("grows", "gets bigger", "comes closer and closer"),
    "shrink": ("shrinks", "gets smaller", "goes further and further away"),
    "circle": ("goes round in a circle", "circles", "turns one full round"),
    "shake": ("shakes", "trembles from side to side", "wobbles back and forth"),
}
NAMINGS = (
    "this is a {digit}",
    "you can see a {digit}",
    "look at this {digit}",
    "I think it is a {digit}",
    "and that is what a {digit} sounds like",
)
BESIDE_THE_POINT = (
    "thanks for watching and see you next time",
    "let me get some coffee first",
    "please subscribe to the channel",
    "it was raining all day yesterday",
    "so as I said before",
    "okay let us go on",
    "my phone is ringing again",
    "can you hear me at the back",
)

# Of a clip with a real voice: the time in which its room falls silent, the loudness of the room
# against the direct sound, and that of the noise against the voice's peak.
ROOM_SECONDS = (0.05, 0.4)
ROOM_SHARE = (0.0, 0.5)
NOISE_SHARE = (0.0005, 0.1)

# How `data.demo.text_noise` spoils a caption.
FAULTS = ("unrelated", "late", "words")
LATE_SECONDS = (3.0, 8.0)
WRONG_WORDS = 0.4  # share of the words, at least one


def render_video(
    scan: NDArray[np.float64], *, motion: str, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Move a scan, 8 x 8 with values in [0, 1], over a background; (T, H, W, C)."""
    num_frames = round(SECONDS * FPS)
    course = Course.draw(motion, rng)
    size, centre = course.size, course.centre
    down, right, scale = course.at(np.linspace(0, 1, num_frames))
    background = _background(rng)
    ink = rng.uniform(0.65, 1.0, size=3)
    video = np.empty((num_frames, FRAME_SIZE, FRAME_SIZE, 3))
    for frame in range(num_frames):
        rows = _enlarge(scan.shape[0], centre[0] + down[frame], size * scale[frame])
        columns = _enlarge(scan.shape[1], centre[1] + right[frame], size * scale[frame])
        cover = (rows @ scan @ columns.T)[..., None]
        video[frame] = cover * ink + (1 - cover) * background
    video += rng.normal(0, 0.05, size=video.shape)
    return np.rint(video.clip(0, 1) * 255).astype(np.uint8)


def render_audio(*, digit: int, motion: str, rng: np.random.Generator) -> NDArray[np.int16]:
    """Sound the digit's telephone tone in the motion's rhythm, in noise; (S,)."""
    time = np.arange(round(SECONDS * AUDIO_HZ)) / AUDIO_HZ
    phases = rng.uniform(0, 2 * np.pi, size=2)
    tone = sum(
        np.sin(2 * np.pi * hertz * time + phase)
        for hertz, phase in zip(TONES[str(digit)], phases, strict=True)
    )
    slots = np.array([slot == "x" for slot in RHYTHMS[motion]], dtype=float)
    # One slot is a sixteenth of a second, give or take; the edges are softened over 4 ms.
    position = (rng.uniform(0, 16) + time * 16 * rng.uniform(0.9, 1.1)).astype(int) % 16
    edge = AUDIO_HZ // 250
    gate = np.convolve(slots[position], np.full(edge, 1 / edge), mode="same")
    level = np.exp(rng.uniform(np.log(0.05), np.log(0.4)))
    noise = rng.normal(0, level * rng.uniform(0.05, 0.5), size=len(time))
    return np.rint(((tone * gate * level) + noise).clip(-1, 1) * 32767).astype(np.int16)


def render_voice(wave: NDArray[np.float64], *, rng: np.random.Generator) -> NDArray[np.int16]:
    """Let a recording sound once in the clip: in a room, at some level and time, in noise; (S,)."""
    from scipy.signal import fftconvolve  # slow to import, and seldom needed

    seconds = rng.uniform(*ROOM_SECONDS)
    time = np.arange(round(seconds * AUDIO_HZ)) / AUDIO_HZ
    room = rng.normal(size=len(time)) * 10 ** (-3 * time / seconds)  # 60 dB less at the end
    room *= rng.uniform(*ROOM_SHARE) / np.sqrt((room**2).sum())
    room[0] = 1.0  # the direct sound
    sound = np.zeros(round(SECONDS * AUDIO_HZ))
    begin = rng.integers(max(len(sound) - len(wave), 0) + 1)
    heard = fftconvolve(wave, room)[: len(sound) - begin]
    level = np.exp(rng.uniform(np.log(0.05), np.log(0.4)))
    sound[begin : begin + len(heard)] = heard * level / max(np.abs(heard).max(), 1e-6)
    sound += rng.normal(0, level * np.exp(rng.uniform(*np.log(NOISE_SHARE))), size=len(sound))
    return np.rint(sound.clip(-1, 1) * 32767).astype(np.int16)


def speak(*, digit: int, motion: str, rng: np.random.Generator) -> tuple[Caption, ...]:
    """Sentences around the clip; the one nearest to its middle names digit and motion."""

    def pick(sentences: tuple[str, ...]) -> str:
        return str(rng.choice(sentences)).format(digit=DIGITS[digit])

    def full() -> str:
        return f"{pick(SUBJECTS)} {pick(PREDICATES[motion])}"

    def aside() -> str:
        return pick(BESIDE_THE_POINT) if rng.random() < 0.6 else full()

    before, after = (pick(NAMINGS), aside()) if rng.random() < 0.5 else (aside(), pick(NAMINGS))
    spoken = (before, full(), after, aside(), pick(BESIDE_THE_POINT))
    starts = np.array([0.0, 0.35, 0.75, 1.2, 2.0]) + rng.uniform(0, 0.05, size=5)
    return tuple(
        Caption(start=round(float(start), 2), end=round(float(start) + 0.3, 2), text=text)
        for start, text in zip(starts, spoken, strict=True)
    )


def spoil(
    captions: Sequence[Caption], index: int, *, share: float, rngs: Sequence[np.random.Generator]
) -> tuple[tuple[Caption, ...], list[str]]:
    """Spoil a share of the captions of clip `index`; names each by its place, and its fault.

    Each caption has a generator of its own: what a small share spoils, a larger one spoils alike.
    """
    said: list[tuple[Caption, str]] = []
    for caption, rng in zip(captions, rngs, strict=True):
        fault = ""
        if rng.random() < share:
            fault = str(rng.choice(FAULTS))
            caption = _spoilt(caption, fault, index, rng)
        said.append((caption, fault))
    said.sort(key=lambda item: (item[0].start, item[0].end, item[0].text))
    faults = [f"{place} {fault}" for place, (_, fault) in enumerate(said) if fault]
    return tuple(caption for caption, _ in said), faults


def _spoilt(caption: Caption, fault: str, index: int, rng: np.random.Generator) -> Caption:
    if fault == "late":
        seconds = float(rng.uniform(*LATE_SECONDS))
        start, end = (round(time + seconds, 2) for time in (caption.start, caption.end))
        return replace(caption, start=start, end=end)
    if fault == "unrelated":  # the sentence that names another digit and another motion
        digit, motion = _classes(index)
        other = (digit + int(rng.integers(1, 10))) % 10
        moves = str(rng.choice([name for name in MOTIONS if name != motion]))
        return replace(caption, text=speak(digit=other, motion=moves, rng=rng)[1].text)
    words = caption.text.split()
    wrong = rng.random(len(words)) < WRONG_WORDS
    wrong[rng.integers(len(words))] = True
    for number in np.flatnonzero(wrong):
        words[number] = str(rng.choice([word for word in _all_words() if word != words[number]]))
    return replace(caption, text=" ".join(words))


@lru_cache(maxsize=1)
def _all_words() -> tuple[str, ...]:
    """Every word that is said in the corpus."""
    spoken = (*SUBJECTS, *chain.from_iterable(PREDICATES.values()), *NAMINGS, *BESIDE_THE_POINT)
    words = {word for sentence in spoken for word in sentence.split()} - {"{digit}"}
    return tuple(sorted(words | set(DIGITS)))


@dataclass(frozen=True, slots=True)
class Course:
    """How a digit moves in its clip."""

    motion: str
    size: float  # pixels, of the enlarged scan
    centre: NDArray[np.float64]
    hurry: float  # above 1: faster at the end
    reach: float  # pixels
    phase: float  # of a turn

    @classmethod
    def draw(cls, motion: str, rng: np.random.Generator) -> Self:
        """Draw one."""
        size = rng.uniform(48, 52)
        centre = FRAME_SIZE / 2 + rng.uniform(-1, 1, size=2) * rng.uniform(0.05, 0.08) * size / 2
        return cls(motion, size, centre, rng.uniform(0.8, 1.25), rng.uniform(7, 10), rng.uniform())

    def at(
        self, time: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Pixels down and right, and the size of the digit, at times from 0 to 1."""
        return _path(self.motion, time**self.hurry, reach=self.reach, phase=self.phase)


def _path(
    motion: str, time: NDArray[np.float64], *, reach: float, phase: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """How far down and right, in pixels, and how large the digit is at each time in [0, 1]."""
    still, along, one = np.zeros_like(time), (2 * time - 1) * reach, np.ones_like(time)
    turn = 2 * np.pi * (time + phase)
    paths = {
        "left": (still, -along, one),
        "right": (still, along, one),
        "up": (-along, still, one),
        "down": (along, still, one),
        "grow": (still, still, 0.65 + 0.35 * time),
        "shrink": (still, still, 1.0 - 0.35 * time),
        "circle": (reach * np.sin(turn), reach * np.cos(turn), one),
        "shake": (still, reach * np.sin(3 * turn), one),
    }
    return paths[motion]


def _background(rng: np.random.Generator) -> NDArray[np.float64]:
    """A gradient between two dark colours in any direction; (H, W, C)."""
    angle = rng.uniform(0, 2 * np.pi)
    across = np.linspace(-0.5, 0.5, FRAME_SIZE)
    ramp = (across[:, None] * np.sin(angle) + across * np.cos(angle)) / np.sqrt(2) + 0.5
    first, second = rng.uniform(0, 0.4, size=(2, 3))
    return first + ramp[..., None] * (second - first)


def _enlarge(num: int, centre: float, size: float) -> NDArray[np.float64]:
    """Weights (FRAME_SIZE, num) that stretch `num` pixels linearly over `size` around `centre`."""
    pixels = (np.arange(FRAME_SIZE) + 0.5 - centre) / size * num + (num - 1) / 2
    weights: NDArray[np.float64] = (1 - np.abs(pixels[:, None] - np.arange(num))).clip(0, 1)
    return weights


# --- real voices ----------------------------------------------------------------------------------

RECORDING = re.compile(r"([0-9])_([A-Za-z0-9-]+)_([0-9]{1,6})\.wav")  # digit, speaker, take
TEST_TAKES = 5  # takes 0 to 4 are FSDD's test set: they are in no clip
LONGEST_VOICE = 60  # seconds of a recording
TEST_SHARE = 0.2  # of the other recordings of a digit: for test clips
VOICES_EDITION = 2  # raise it when what is done with recordings changes
VOICES_LICENCE = "CC BY-SA 4.0: Free Spoken Digit Dataset"


@dataclass(frozen=True, slots=True)
class Voices:
    """Recordings of spoken digits: those for training clips and those for test clips."""

    folder: Path
    recordings: Mapping[tuple[str, int], tuple[str, ...]]  # of a split and digit
    mark: str  # names their content

    @classmethod
    def of(cls, folder: Path, *, seed: int, hashes: ContentHashes | None = None) -> Self:
        """Divide the recordings of a folder in FSDD's layout; none is in both splits."""
        names = voice_files(folder)
        found = {}
        for digit in range(len(DIGITS)):
            said = [name for name in names if name[0] == str(digit)]
            if len(said) < 2:
                raise DataError(
                    f"data.demo.voices: {folder} has {len(said)} recordings of the digit {digit} "
                    f"in addition to takes 0 to {TEST_TAKES - 1}; 2 are needed",
                    hint="get the whole Free Spoken Digit Dataset: docs/beyond.md",
                )
            order = np.random.default_rng([seed, digit]).permutation(len(said))
            tests = max(1, round(TEST_SHARE * len(said)))
            for split, chosen in (("test", order[:tests]), ("train", order[tests:])):
                found[split, digit] = tuple(said[place] for place in np.sort(chosen))
        return cls(folder, found, mark_of_voices(folder, hashes))

    def name(self, seed: int, split: str, index: int) -> str:
        """The recording that sounds in a clip: each is used once before one is used again."""
        digit, number = index % len(DIGITS), index // len(DIGITS)
        names = self.recordings[split, digit]
        turn, place = divmod(number, len(names))
        order = _generator(seed, split, digit, f"voices {turn}").permutation(len(names))
        return names[order[place]]


def voice_files(folder: Path) -> list[str]:
    """The names of the recordings that clips may use, sorted."""
    try:
        there = sorted(path.name for path in (folder / "recordings").iterdir())
    except OSError as error:
        raise DataError(
            f"data.demo.voices: {folder / 'recordings'} cannot be read: {error.strerror}",
            hint="name the folder of the Free Spoken Digit Dataset: docs/beyond.md",
        ) from None
    takes = {name: RECORDING.fullmatch(name) for name in there}
    return [name for name, match in takes.items() if match and int(match[3]) >= TEST_TAKES]


def mark_of_voices(folder: Path, hashes: ContentHashes | None = None) -> str:
    """Changes with the name or content of any recording that clips may use."""
    names = voice_files(folder)
    content = (hashes or ContentHashes()).of(folder / "recordings" / name for name in names)
    lines = [f"{name} {digest}\n" for name, digest in zip(names, content, strict=True)]
    lines.append(f"edition {VOICES_EDITION}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _recording(path: Path) -> NDArray[np.float64]:
    """The sound of a recording, mono; (S,)."""
    resampler = av.AudioResampler(format="s16", layout="mono", rate=AUDIO_HZ)
    try:
        with open_media(path) as container:
            frames = []
            for frame in container.decode(audio=0):
                if frame.time is not None and frame.time > LONGEST_VOICE:
                    raise ValueError(f"it is longer than {LONGEST_VOICE} s")
                frames += resampler.resample(frame)
        frames += resampler.resample(None)
        wave = np.concatenate([frame.to_ndarray()[0] for frame in frames])
    except (OSError, av.FFmpegError, ValueError, LookupError) as error:
        raise DataError(
            f"data.demo.voices: {path} cannot be read: {error}", hint="delete it, or get it again"
        ) from None
    return wave / 32768


# --- clips and files ------------------------------------------------------------------------------

# Part of every file's name, so that no old file is taken for a new one: raise it when
# anything that is drawn or sounded changes.
EDITION = 1
SPLITS = ("train", "test")
TEST_SCANS = 397  # of the 1,797; the others are for training
LICENCE = "CC BY 4.0: UCI Optical Recognition of Handwritten Digits"
BATCH = 16  # files a worker writes at a time


def make_demo(
    folder: Path,
    params: DemoParams,
    *,
    seed: int,
    workers: int,
    progress: Progress,
) -> list[Clip]:
    """Write the media that `folder` lacks and list every clip, dead links too.

    A clip depends only on the seed, its split and its number: a larger corpus contains a smaller.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in sorted(folder.glob(".*.tmp")):
        leftover.unlink(missing_ok=True)
    numbers = {"train": params.train_clips, "test": params.test_clips}
    jobs = [(split, index) for split in SPLITS for index in range(numbers[split])]
    voices = None if params.voices is None else Voices.of(params.voices, seed=seed)
    missing = [job for job in jobs if not (folder / _media_name(seed, *job, voices)).exists()]
    batches = [missing[first : first + BATCH] for first in range(0, len(missing), BATCH)]
    done = len(jobs) - len(missing)
    progress(done, len(jobs))
    write = partial(_write_batch, folder, seed, voices)
    for written in _in_processes(write, batches, workers=workers):
        done += written
        progress(done, len(jobs))
    dead = range(params.train_clips, params.train_clips + params.dead_links)
    senses = own_senses(params)
    if senses:
        every = [jobs[first : first + BATCH] for first in range(0, len(jobs), BATCH)]
        add = partial(_write_senses, folder, seed, voices, senses)
        for _ in _in_processes(add, every, workers=workers):
            pass
    say = partial(
        describe, no_text_share=params.no_text_share, text_noise=params.text_noise, senses=senses
    )
    jobs += [("train", index) for index in dead]
    return [say(seed, split, index, voices=voices) for split, index in jobs]


Shares = Mapping[str, float]  # of the clips that have a sense beyond picture, sound and words


def describe(
    seed: int,
    split: str,
    index: int,
    *,
    no_text_share: float,
    text_noise: float = 0.0,
    voices: Voices | None = None,
    senses: Shares = MappingProxyType({}),
) -> Clip:
    """The manifest's record of one clip; its label `spoilt` says which captions are noise."""
    digit, motion = _classes(index)
    talk, silence = _generator(seed, split, index, "talk"), _generator(seed, split, index, "silent")
    silent = split == "train" and silence.random() < no_text_share
    captions = () if silent else speak(digit=digit, motion=motion, rng=talk)
    faults: list[str] = []
    if split == "train" and text_noise:
        noise = [_generator(seed, split, index, f"noise {n}") for n in range(len(captions))]
        captions, faults = spoil(captions, index, share=text_noise, rngs=noise)
    name, licence = _media_name(seed, split, index, voices), LICENCE
    said: dict[str, str] = {}
    if voices is not None:
        said = {"speaker": voices.name(seed, split, index).split("_")[1]}
        licence = f"{LICENCE}; {VOICES_LICENCE}"
    return Clip(
        clip_id=Path(name).stem,
        source="demo",
        url=f"demo:{name}",
        start=0.0,
        end=SECONDS,
        split=split,
        labels={
            "digit": DIGITS[digit],
            "motion": motion,
            "action": f"{DIGITS[digit]} {motion}",  # who does what
            **said,
            **({"spoilt": LABEL_SEPARATOR.join(faults)} if faults else {}),
        },
        captions=captions,
        licence=licence,
        senses={
            sense: f"demo:{file}"
            for sense, file in _sense_files(seed, split, index, name, senses).items()
        },
    )


def render_clip(
    seed: int, split: str, index: int, voices: Voices | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
    """The picture (T, H, W, C) and the sound (S,) of one clip."""
    digit, motion = _classes(index)
    look, sound = _generator(seed, split, index, "look"), _generator(seed, split, index, "sound")
    scan = _scans()[0][look.choice(_scans_of(seed, split, digit))]
    video = render_video(scan, motion=motion, rng=look)
    if voices is None:
        return video, render_audio(digit=digit, motion=motion, rng=sound)
    wave = _recording(voices.folder / "recordings" / voices.name(seed, split, index))
    return video, render_voice(wave, rng=sound)


def write_clip(path: Path, video: NDArray[np.uint8], audio: NDArray[np.int16]) -> None:
    """Encode a picture (T, H, W, C) and a sound (S,) as H.264 and AAC in an mp4 file."""
    with atomic_write(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        picture = container.add_stream("libx264", rate=FPS)
        picture.width, picture.height, picture.pix_fmt = video.shape[2], video.shape[1], "yuv420p"
        # x264's macroblock tree gives different bytes each time, even on one thread.
        picture.options = {"preset": "veryfast", "crf": "18", "x264-params": "mbtree=0"}
        picture.codec_context.thread_count = 1  # the processes share the cores
        sound = container.add_stream("aac", rate=AUDIO_HZ, layout="mono")
        sound.bit_rate = 64_000
        for number, image in enumerate(video):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        wave = av.AudioFrame.from_ndarray(audio[None], format="s16", layout="mono")
        wave.sample_rate, wave.pts = AUDIO_HZ, 0
        container.mux(sound.encode(wave))
        container.mux(sound.encode(None))


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve the files in a folder on this machine alone; yields the address they are under."""

    class Handler(_FileHandler):
        root = folder

    server = _Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    """Ignores clients that hang up: the download's ledger records what became of the file."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _FileHandler(BaseHTTPRequestHandler):
    """Answers GET and HEAD for plain files of one folder, whole or from a byte on."""

    root: Path
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *_: Any) -> None:
        """Log nothing: the download's ledger records what happened."""

    def _answer(self, *, with_body: bool) -> None:
        name = self.path.partition("?")[0].removeprefix("/")
        file = self.root / name
        if not re.fullmatch(r"[\w-][\w.-]*", name, re.ASCII) or not file.is_file():
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        size = file.stat().st_size
        span = self._span(size)
        if span is None:
            self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        first, last = span
        partial = "Range" in self.headers
        self.send_response(HTTPStatus.PARTIAL_CONTENT if partial else HTTPStatus.OK)
        if partial:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Type", "video/mp4")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if with_body:
            with file.open("rb") as stream:
                stream.seek(first)
                self.wfile.write(stream.read(last - first + 1))

    def _span(self, size: int) -> tuple[int, int] | None:
        """The first and last byte of the requested range; None when the file lacks them."""
        requested = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "bytes=0-"))
        if requested is None or requested.groups() == ("", ""):
            return None
        first, last = requested.groups()
        if not first:  # the last n bytes
            return max(size - int(last), 0), size - 1
        span = int(first), min(int(last) if last else size - 1, size - 1)
        return span if span[0] <= span[1] else None


def _in_processes(
    work: Callable[[list[tuple[str, int]]], int],
    batches: list[list[tuple[str, int]]],
    *,
    workers: int,
) -> Iterator[int]:
    """How many files each batch wrote, as batches finish; without workers in this process."""
    if workers == 0 or len(batches) < 2:
        yield from map(work, batches)
        return
    with worker_pool(workers, preload=[__name__]) as pool:
        futures = [pool.submit(work, batch) for batch in batches]
        yield from (future.result() for future in as_completed(futures))


def _write_batch(
    folder: Path, seed: int, voices: Voices | None, jobs: list[tuple[str, int]]
) -> int:
    for split, index in jobs:
        path = folder / _media_name(seed, split, index, voices)
        write_clip(path, *render_clip(seed, split, index, voices))
    return len(jobs)


def _media_name(seed: int, split: str, index: int, voices: Voices | None) -> str:
    spoken = "" if voices is None else f"-voices-{voices.mark[:8]}"
    return f"demo{EDITION}{spoken}-{seed}-{split}-{index:05d}.mp4"


def _classes(index: int) -> tuple[int, str]:
    """Digit and motion of a clip: every pair occurs once in 80 consecutive clips."""
    motions = MOTIONS
    return index % 10, motions[index // 10 % len(motions)]


def _generator(seed: int, split: str, index: int, purpose: str) -> np.random.Generator:
    """A stream of its own for each purpose, so that one does not shift the others."""
    return np.random.default_rng([seed, *f"{split} {index} {purpose}".encode()])


@lru_cache(maxsize=1)
def _scans() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """All scans (1797, 8, 8) with values in [0, 1], and their digits."""
    from sklearn.datasets import load_digits  # slow to import, and seldom needed

    digits = load_digits()
    return digits.images / 16, digits.target


@lru_cache
def _scans_of(seed: int, split: str, digit: int) -> NDArray[np.int64]:
    """The numbers of a digit's scans in a split; no scan is in both."""
    _, targets = _scans()
    order = np.random.default_rng(seed).permutation(len(targets))
    chosen = order[:TEST_SCANS] if split == "test" else order[TEST_SCANS:]
    return chosen[targets[chosen] == digit]


# --- senses beyond picture, sound and words -------------------------------------------------------

MOTION_HZ = 50
FINE = 8  # steps between two samples of motion, in which the path is followed


def own_senses(params: DemoParams) -> Shares:
    """The senses that are on."""
    on = {"motion": params.motion, "depth": params.depth}
    return {name: params.sense_share for name, is_on in on.items() if is_on}


def _sense_files(seed: int, split: str, index: int, media: str, senses: Shares) -> dict[str, str]:
    """The names of the files of a clip's own senses; some clips lack one."""
    return {
        name: f"{Path(media).stem}.{name}{SUFFIXES[name]}"
        for name, share in senses.items()
        if _generator(seed, split, index, f"has {name}").random() < share
    }


def _write_senses(
    folder: Path, seed: int, voices: Voices | None, senses: Shares, jobs: list[tuple[str, int]]
) -> int:
    """Write the files that are not there yet."""
    for job in jobs:
        media = _media_name(seed, *job, voices)
        for name, file in _sense_files(seed, *job, media, senses).items():
            if not (folder / file).exists():
                WRITERS[name](folder / file, seed, *job)
    return len(jobs)


def course_of(seed: int, split: str, index: int) -> Course:
    """How the digit of a clip moves: as `render_clip` shows it."""
    return Course.draw(_classes(index)[1], _look(seed, split, index)[0])


def _look(seed: int, split: str, index: int) -> tuple[np.random.Generator, int]:
    """The stream that a clip's picture is drawn from, and the scan that it drew first."""
    look = _generator(seed, split, index, "look")
    return look, int(look.choice(_scans_of(seed, split, _classes(index)[0])))


def render_motion(course: Course, *, rng: np.random.Generator) -> NDArray[np.float64]:
    """A sensor on the digit: time, then how fast right, down and bigger, then how that changes.

    Units are frame widths and seconds; (samples, 7). Noise and a constant error are added.
    """
    time = np.arange(round(SECONDS * MOTION_HZ)) / MOTION_HZ
    fine = np.linspace(0, 1, FINE * len(time) + 1)
    down, right, scale = course.at(fine)
    places = np.stack([right, down, scale * course.size], axis=1) / FRAME_SIZE
    speed = np.gradient(places, fine * SECONDS, axis=0)
    change = np.gradient(speed, fine * SECONDS, axis=0)
    values = np.concatenate([speed, change], axis=1)[: FINE * len(time) : FINE]
    values += rng.normal(0, [0.05] * 3 + [0.5] * 3)  # of the sensor
    values += rng.normal(0, [0.1] * 3 + [1.0] * 3, size=values.shape)
    return np.concatenate([time[:, None], values], axis=1)


def _write_motion(path: Path, seed: int, split: str, index: int) -> None:
    noise = _generator(seed, split, index, "motion")
    values = render_motion(course_of(seed, split, index), rng=noise)
    header = "t,right,down,bigger,right_change,down_change,bigger_change"
    with atomic_write(path) as temporary:
        np.savetxt(temporary, values, fmt="%.4f", delimiter=",", header=header, comments="")


def render_depth(
    scan: NDArray[np.float64], course: Course, *, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """How far away each pixel is, from 0 to 255: (T, H, W). A digit that grows comes closer."""
    down, right, scale = course.at(np.linspace(0, 1, round(SECONDS * FPS)))
    behind = 0.8 + 0.1 * rng.uniform(-1, 1) + 0.1 * np.linspace(-1, 1, FRAME_SIZE)[:, None]
    depth = np.empty((len(scale), FRAME_SIZE, FRAME_SIZE))
    for frame, size in enumerate(course.size * scale):
        rows = _enlarge(scan.shape[0], course.centre[0] + down[frame], size)
        columns = _enlarge(scan.shape[1], course.centre[1] + right[frame], size)
        depth[frame] = np.where(rows @ scan @ columns.T > 0.3, 0.35 / scale[frame], behind)
    depth += rng.normal(0, 0.05, size=depth.shape)
    return np.rint(depth.clip(0, 1) * 255).astype(np.uint8)


def _write_depth(path: Path, seed: int, split: str, index: int) -> None:
    scan = _scans()[0][_look(seed, split, index)[1]]
    noise = _generator(seed, split, index, "depth")
    frames = render_depth(scan, course_of(seed, split, index), rng=noise)
    with atomic_write(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        picture = container.add_stream("libx264", rate=FPS)
        picture.width, picture.height, picture.pix_fmt = FRAME_SIZE, FRAME_SIZE, "yuv420p"
        picture.options = {"preset": "veryfast", "crf": "12", "x264-params": "mbtree=0"}
        picture.codec_context.thread_count = 1
        for number, values in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.repeat(values[..., None], 3, -1), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))


SUFFIXES = {"motion": ".csv", "depth": ".mp4"}
WRITERS: dict[str, Callable[[Path, int, str, int], None]] = {
    "motion": _write_motion,
    "depth": _write_depth,
}
