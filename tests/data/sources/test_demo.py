"""The demo corpus is what it says it is."""

import http.client
import wave
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from tests.data.corpus import TEST_DATA, demo_params, needs_data
from vatt.config import DemoParams
from vatt.data.clips.manifest import Clip
from vatt.data.sources import demo
from vatt.data.sources.choice import mark_of_lists
from vatt.errors import DataError

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


# --- noise ----------------------------------------------------------------------------------------


def said_in(index: int, noise: float, split: str = "train") -> tuple[list[str], dict[int, str]]:
    """The captions of a clip with their times, and the fault of each place that has one."""
    clip = demo.describe(0, split, index, no_text_share=0, text_noise=noise)
    label = clip.labels.get("spoilt", "")
    faults = dict(fault.split() for fault in label.split("|") if fault)
    said = [f"{caption.start:.2f} {caption.text}" for caption in clip.captions]
    return said, {int(place): fault for place, fault in faults.items()}


def test_the_share_of_spoilt_captions_is_that_of_the_setting():
    for noise in (0.2, 0.6):
        faults = [said_in(index, noise)[1] for index in range(300)]
        assert sum(map(len, faults)) / 1500 == pytest.approx(noise, abs=0.03)
        kinds = Counter(kind for one in faults for kind in one.values())
        assert set(kinds) == set(demo.FAULTS)
        assert min(kinds.values()) > 0.8 * max(kinds.values())


def test_the_label_names_exactly_the_captions_that_differ():
    for index in range(80):
        clean, _ = said_in(index, 0.0)
        said, faults = said_in(index, 0.5)
        assert len(said) == len(clean)
        kept = [caption for place, caption in enumerate(said) if place not in faults]
        assert set(kept) <= set(clean)
        assert not {said[place] for place in faults} & set(clean)


def test_what_a_small_share_spoils_a_larger_one_spoils_alike():
    for index in range(80):
        less, more = said_in(index, 0.2), said_in(index, 0.6)
        spoilt = [{said[place] for place in faults} for said, faults in (less, more)]
        assert spoilt[0] <= spoilt[1]


def test_each_fault_is_what_its_name_says():
    for index in range(200):
        digit, motion = demo._classes(index)
        clean = {caption.split(maxsplit=1)[1] for caption in said_in(index, 0.0)[0]}
        said, faults = said_in(index, 0.8)
        for place, fault in faults.items():
            start, words = said[place].split(maxsplit=1)
            if fault == "late":
                assert float(start) >= 3 and words in clean
            elif fault == "unrelated":
                named = [one.format(digit=demo.DIGITS[digit]) for one in demo.SUBJECTS]
                assert float(start) < 3 and not words.startswith(tuple(f"{n} " for n in named))
                assert not words.endswith(demo.PREDICATES[motion])
            else:
                same_length = [one for one in clean if len(one.split()) == len(words.split())]
                assert same_length and words not in clean


def test_noise_leaves_the_test_split_and_the_media_alone():
    for index in range(20):
        assert said_in(index, 0.8, "test") == said_in(index, 0.0, "test")
    clean, noisy = (
        demo.describe(0, "train", 3, no_text_share=0, text_noise=noise) for noise in (0.0, 0.8)
    )
    assert (clean.url, clean.clip_id) == (noisy.url, noisy.clip_id)
    assert "spoilt" not in clean.labels


# --- real voices ----------------------------------------------------------------------------------

TAKES = 8  # of a digit and speaker in the made-up recordings: the last three may be used
VOICED = PARAMS.model_copy(update={"train_clips": 24, "test_clips": 12, "dead_links": 1})


def hertz_of(digit: int) -> int:
    """What the made-up voices sound at."""
    return 400 + 100 * digit


def write_recording(path: Path, hertz: float, seconds: float = 0.3) -> None:
    time = np.arange(round(seconds * 8000)) / 8000
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes((8000 * np.sin(2 * np.pi * hertz * time)).astype("<i2").tobytes())


def write_voices(folder: Path) -> Path:
    (folder / "recordings").mkdir(parents=True)
    for digit in range(10):
        for speaker in ("ada", "bob"):
            for take in range(TAKES):
                name = f"{digit}_{speaker}_{take}.wav"
                write_recording(folder / "recordings" / name, hertz_of(digit) + take)
    return folder


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A corpus with voices, and the folder of the voices."""
    voices = write_voices(tmp_path_factory.mktemp("voices"))
    folder = tmp_path_factory.mktemp("spoken")
    return folder, make_spoken(folder, voices), voices


def make_spoken(folder: Path, voices: Path, workers: int = 0) -> list[Clip]:
    params = VOICED.model_copy(update={"voices": voices})
    return demo.make_demo(folder, params, seed=0, workers=workers, progress=lambda *_: None)


def test_no_recording_is_in_both_splits_and_no_official_test_take_in_either(spoken):
    for seed in (0, 1):
        voices = demo.Voices.of(spoken[2], seed=seed)
        used = {split: set() for split in demo.SPLITS}
        for (split, digit), names in voices.recordings.items():
            assert names and all(int(name[0]) == digit for name in names)
            used[split] |= set(names)
        assert used["train"].isdisjoint(used["test"])
        both = used["train"] | used["test"]
        assert len(both) == 10 * 2 * 3
        assert all(int(name.split("_")[2].removesuffix(".wav")) >= 5 for name in both)


def test_every_recording_sounds_before_one_sounds_again(spoken):
    voices = demo.Voices.of(spoken[2], seed=0)
    names = [voices.name(0, "train", 10 * number + 3) for number in range(40)]
    known = voices.recordings["train", 3]
    turns = [names[first : first + len(known)] for first in range(0, 40, len(known))]
    assert all(sorted(turn) == sorted(known) for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    assert voices.name(1, "train", 3) in known
    assert names != [voices.name(1, "train", 10 * number + 3) for number in range(40)]


def test_what_sounds_in_a_clip_is_its_digit_once(spoken):
    folder, clips, _ = spoken
    for clip in clips[:20]:
        _, audio = decode(file_of(folder, clip))
        powers = [goertzel(audio, hertz_of(digit) + 6) for digit in range(10)]
        assert demo.DIGITS[int(np.argmax(powers))] == clip.labels["digit"]
        loud = np.abs(audio) > 0.5 * np.abs(audio).max()
        assert np.ptp(np.flatnonzero(loud)) / demo.AUDIO_HZ == pytest.approx(0.3, abs=0.08)


def test_level_time_noise_and_room_vary_from_clip_to_clip():
    sound = np.sin(2 * np.pi * 440 * np.arange(4800) / demo.AUDIO_HZ)
    waves = [
        demo.render_voice(sound, rng=np.random.default_rng(seed)) / 32767 for seed in range(40)
    ]
    peaks = [np.abs(w).max() for w in waves]
    begins = [np.flatnonzero(np.abs(w) > 0.5 * np.abs(w).max())[0] for w in waves]
    assert max(peaks) > 4 * min(peaks) and max(peaks) <= 1
    assert np.ptp(begins) > 0.5 * demo.AUDIO_HZ
    assert all(begin + 4800 <= demo.AUDIO_HZ + 160 for begin in begins)
    noise = [np.std(w[-200:]) / peak for w, peak in zip(waves, peaks, strict=True)]
    assert max(noise) > 5 * min(noise)


def test_a_recording_longer_than_a_clip_is_cut_and_a_silent_one_stays_silent():
    for sound in (np.sin(np.arange(40_000)), np.zeros(100)):
        heard = demo.render_voice(sound, rng=np.random.default_rng(0))
        assert heard.shape == (demo.AUDIO_HZ,)
    assert np.abs(heard).max() < 0.2 * 32767


def test_a_corpus_with_voices_is_the_same_bytes_every_time(spoken, tmp_path):
    folder, clips, voices = spoken
    assert make_spoken(tmp_path, voices) == clips
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()


def test_the_manifest_names_speaker_and_licence_but_not_the_folder(spoken):
    _, clips, voices = spoken
    assert {clip.labels["speaker"] for clip in clips} == {"ada", "bob"}
    assert all("CC BY-SA 4.0: Free Spoken Digit Dataset" in clip.licence for clip in clips)
    assert voices.name not in repr(clips)


def test_other_recordings_make_other_files_and_another_hash(tmp_path):
    voices = write_voices(tmp_path / "voices")
    data = demo_params().data
    data = data.model_copy(update={"demo": VOICED.model_copy(update={"voices": voices})})
    before = mark_of_lists(data)
    first = make_spoken(tmp_path / "first", voices)
    write_recording(voices / "recordings" / "3_ada_4.wav", 1000)  # an official test take
    (voices / "recordings" / "notes.txt").write_text("not a recording")
    assert mark_of_lists(data) == before
    write_recording(voices / "recordings" / "3_ada_5.wav", 1000)
    assert mark_of_lists(data) not in (before, None)
    second = make_spoken(tmp_path / "first", voices)
    assert not {clip.clip_id for clip in first} & {clip.clip_id for clip in second}


def test_without_the_recordings_an_error_names_the_folder_and_what_is_missing(tmp_path):
    with pytest.raises(DataError, match=r"voices: .*nowhere/recordings cannot be read: No such"):
        make_spoken(tmp_path / "corpus", tmp_path / "nowhere")
    voices = write_voices(tmp_path / "voices")
    for path in (voices / "recordings").glob("7_*"):
        if path.name != "7_ada_6.wav":
            path.unlink()
    with pytest.raises(DataError, match=r"has 1 recordings of the digit 7 .*; 2 are needed"):
        make_spoken(tmp_path / "corpus", voices)


def test_a_broken_recording_is_named_by_a_worker_process_too(tmp_path):
    voices = write_voices(tmp_path / "voices")
    for path in (voices / "recordings").glob("2_*"):
        path.write_bytes(b"RIFF, not a recording")
    with pytest.raises(DataError, match=r"voices: .*/2_(ada|bob)_\d.wav cannot be read"):
        make_spoken(tmp_path / "corpus", voices, workers=2)


@needs_data
def test_the_spoken_digits_of_fsdd_are_divided_by_recording():
    voices = demo.Voices.of(Path(TEST_DATA or ".") / "fsdd", seed=0)
    sizes = {key: len(names) for key, names in voices.recordings.items()}
    assert set(sizes.values()) == {216, 54}  # 6 speakers, takes 5 to 49
    video, audio = demo.render_clip(0, "train", 3, voices)
    assert video.shape[0] == 10 and np.abs(audio).max() > 1000


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
