"""What one clip of the demo corpus shows, sounds like and is told about: pure functions of a seed.

T H W C: frames, height, width, channels. S: waveform samples.
"""

import numpy as np
from numpy.typing import NDArray

from vatt.data.manifest import Caption

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

# Sixteen slots that repeat: x sounds, a dot is silent. Only the pattern tells them apart, since a
# clip may begin anywhere in it.
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


def render_video(
    scan: NDArray[np.float64], *, motion: str, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Move a scan, 8 x 8 with values in [0, 1], over a background; (T, H, W, C)."""
    num_frames = round(SECONDS * FPS)
    size = rng.uniform(48, 52)  # pixels, of the enlarged scan
    centre = FRAME_SIZE / 2 + rng.uniform(-1, 1, size=2) * rng.uniform(0.05, 0.08) * size / 2
    time = np.linspace(0, 1, num_frames) ** rng.uniform(0.8, 1.25)  # some hurry at the end
    down, right, scale = _path(motion, time, reach=rng.uniform(7, 10), rng=rng)
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


def speak(*, digit: int, motion: str, rng: np.random.Generator) -> tuple[Caption, ...]:
    """Sentences around the clip; the one nearest to its middle tells the digit and the motion."""

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


def _path(
    motion: str, time: NDArray[np.float64], *, reach: float, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """How far down and right, in pixels, and how large the digit is at each time in [0, 1]."""
    still, along, one = np.zeros_like(time), (2 * time - 1) * reach, np.ones_like(time)
    turn = 2 * np.pi * (time + rng.uniform())
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
