"""The demo corpus is what it says it is."""

import http.client
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from vatt.config import DemoParams
from vatt.data.clips.manifest import Clip
from vatt.data.sources import demo

PARAMS = DemoParams(train_clips=18, test_clips=6, no_text_share=0.5, dead_links=2)


def make(folder: Path, workers: int = 0) -> list[Clip]:
    return demo.make_demo(
        folder, PARAMS, seed=0, workers=workers, progress=lambda done, total: None
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return folder, make(folder)


def file_of(folder: Path, clip: Clip) -> Path:
    return folder / clip.url.removeprefix("demo:")


def decode(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with av.open(str(path)) as container:
        assert [s.codec_context.name for s in container.streams] == ["h264", "aac"]
        video = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with av.open(str(path)) as container:
        audio = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    return video, audio


def goertzel(audio: np.ndarray, hertz: float) -> float:
    """The power at one frequency, by Goertzel's recurrence."""
    coefficient = 2 * np.cos(2 * np.pi * hertz / demo.AUDIO_HZ)
    before, last = 0.0, 0.0
    for value in audio.tolist():
        before, last = last, value + coefficient * last - before
    return before**2 + last**2 - coefficient * before * last


def test_a_corpus_is_the_same_bytes_whoever_writes_it(corpus, tmp_path):
    folder, clips = corpus
    assert make(tmp_path, workers=2) == clips
    names = sorted(file.name for file in folder.iterdir())
    assert names == sorted(file.name for file in tmp_path.iterdir())
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def test_another_seed_makes_another_corpus(corpus):
    picture, sound = demo.render_clip(0, "train", 3)
    other_picture, other_sound = demo.render_clip(1, "train", 3)
    assert not np.array_equal(picture, other_picture)
    assert not np.array_equal(sound, other_sound)


def test_a_rerun_writes_only_what_is_missing(corpus, tmp_path):
    _, clips = corpus
    make(tmp_path)
    first, second = (file_of(tmp_path, clip) for clip in clips[:2])
    before, content = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    leftover = tmp_path / ".killed.mp4.1234.tmp"
    leftover.write_bytes(b"half a file")
    assert make(tmp_path) == clips
    assert first.stat().st_mtime_ns == before
    assert second.read_bytes() == content
    assert not leftover.exists()


def test_a_larger_corpus_holds_the_smaller(corpus):
    assert demo.describe(0, "train", 5, no_text_share=0.5) == corpus[1][5]


def test_train_and_test_share_no_scan():
    images, targets = demo._scans()
    for digit in range(10):
        train, test = (demo._scans_of(0, split, digit) for split in demo.SPLITS)
        assert set(train).isdisjoint(test)
        assert set(targets[train]) == set(targets[test]) == {digit}
        pictures = {images[row].tobytes() for row in train}
        assert pictures.isdisjoint(images[row].tobytes() for row in test)


def test_dead_links_are_listed_and_lead_nowhere(corpus):
    folder, clips = corpus
    dead = [clip for clip in clips if not file_of(folder, clip).exists()]
    assert len(clips) == 26
    assert len(dead) == PARAMS.dead_links
    assert len({clip.clip_id for clip in clips}) == len(clips)


def test_digits_and_motions_are_balanced():
    clips = [demo.describe(0, "train", index, no_text_share=0) for index in range(160)]
    pairs = Counter((clip.labels["digit"], clip.labels["motion"]) for clip in clips)
    assert len(pairs) == 80
    assert set(pairs.values()) == {2}


def test_the_decoded_sound_is_the_digits_telephone_tone(corpus):
    folder, clips = corpus
    rows, columns = (697, 770, 852, 941), (1209, 1336, 1477)
    keypad = ("123", "456", "789", "*0#")
    for clip in clips[:10]:
        _, audio = decode(file_of(folder, clip))
        row = max(range(4), key=lambda place: goertzel(audio, rows[place]))
        column = max(range(3), key=lambda place: goertzel(audio, columns[place]))
        assert clip.labels["digit"] == demo.DIGITS[int(keypad[row][column])]


def test_every_rhythm_is_its_own_wherever_it_begins():
    turns = {
        motion: {rhythm[turn:] + rhythm[:turn] for turn in range(16)}
        for motion, rhythm in demo.RHYTHMS.items()
    }
    assert tuple(turns) == demo.MOTIONS
    assert sum(len(each) for each in turns.values()) == len(set.union(*turns.values()))


def followed(video: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How far down and right the ink is in each frame, and how far it spreads."""
    light = video.astype(float).mean(axis=-1)
    ink = np.maximum(light - 128, 0)
    ink /= ink.sum(axis=(1, 2), keepdims=True)
    place = np.arange(video.shape[1])
    down, right = ink.sum(axis=2) @ place, ink.sum(axis=1) @ place
    spread = (ink.sum(axis=2) * (place - down[:, None]) ** 2).sum(axis=1) ** 0.5
    return down, right, spread


@pytest.mark.parametrize("motion", demo.MOTIONS)
def test_the_decoded_picture_moves_as_its_label_says(motion, tmp_path):
    index = next(i for i in range(80) if demo._classes(i) == (8, motion))
    demo.write_clip(tmp_path / "clip.mp4", *demo.render_clip(0, "test", index))
    video, _ = decode(tmp_path / "clip.mp4")
    assert video.shape == (10, 72, 72, 3)
    down, right, spread = followed(video)
    steps_down, steps_right = np.diff(down), np.diff(right)
    true = {
        "left": right[-1] < right[0] - 8,
        "right": right[-1] > right[0] + 8,
        "up": down[-1] < down[0] - 8,
        "down": down[-1] > down[0] + 8,
        "grow": spread[-1] > 1.2 * spread[0],
        "shrink": spread[-1] < spread[0] / 1.2,
        "circle": min(np.ptp(down), np.ptp(right)) > 8 and abs(down[-1] - down[0]) < 4,
        "shake": (np.diff(np.sign(steps_right)) != 0).sum() >= 3 and np.ptp(down) < 4,
    }
    assert true[motion]
    if motion in ("left", "right"):
        assert abs(steps_down).max() < 2
    assert video.shape[0] == demo.FPS * demo.SECONDS


def test_the_sentence_nearest_to_the_middle_tells_digit_and_motion(corpus):
    for index in range(80):
        clip = demo.describe(0, "test", index, no_text_share=1.0)
        nearest = min(clip.captions, key=lambda caption: abs(caption.start + caption.end - 1.0))
        assert clip.labels["digit"] in nearest.text
        predicates = demo.PREDICATES[clip.labels["motion"]]
        assert nearest.text.endswith(predicates)


def test_the_share_without_text_is_in_the_train_split_alone():
    silent = {
        split: np.mean(
            [not demo.describe(0, split, i, no_text_share=0.2).captions for i in range(400)]
        )
        for split in demo.SPLITS
    }
    assert silent["test"] == 0
    assert 0.14 < silent["train"] < 0.26


def ask(base: str, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, str | None]:
    connection = http.client.HTTPConnection(base.removeprefix("http://"), timeout=5)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body, answer.headers.get("Content-Range")


def test_the_server_gives_whole_files_and_parts(tmp_path):
    content = bytes(range(100))
    (tmp_path / "clip.mp4").write_bytes(content)
    with demo.serve(tmp_path) as base:
        assert base.startswith("http://127.0.0.1:")
        assert ask(base, "/clip.mp4") == (200, content, None)
        assert ask(base, "/clip.mp4", "HEAD") == (200, b"", None)
        assert ask(base, "/clip.mp4", Range="bytes=90-") == (206, content[90:], "bytes 90-99/100")
        assert ask(base, "/clip.mp4", Range="bytes=0-9") == (206, content[:10], "bytes 0-9/100")
        assert ask(base, "/clip.mp4", Range="bytes=-5") == (206, content[95:], "bytes 95-99/100")
        assert ask(base, "/clip.mp4", Range="bytes=100-") == (416, b"", "bytes */100")


def test_the_server_gives_nothing_but_the_folders_files(tmp_path):
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (tmp_path / "media").mkdir()
    with demo.serve(tmp_path / "media") as base:
        for path in ("/", "/gone.mp4", "/../secret.mp4", "/%2e%2e/secret.mp4", "//secret.mp4"):
            assert ask(base, path)[0] == 404
