"""Each window of odd media shows and plays its own second, or the ledger says what was lost."""

from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.data.corpus import demo_params
from tests.data.sharding.odd_media import (
    CHANGE,
    ENCODER,
    GREY,
    SECONDS,
    STEP,
    TONE,
    Case,
    all_cases,
    edit,
    make,
    record,
)
from tests.data.sharding.test_shards import write
from vatt.data.clips.ledger import Entry, read_ledger
from vatt.data.clips.manifest import Clip
from vatt.data.clips.media import BrokenMediaError, find_ffmpeg, probe
from vatt.data.clips.storage import decode_frames, whole
from vatt.data.loading.reader import ShardIndex, ShardReader
from vatt.data.sharding.cut import Cut, cut

HZ = 8000
QUICK = [
    Case("ts", "restart"),
    Case("ts", "leap", 3, 3.7),
    Case("ts", "rate"),
    Case("ts", "back", 3, 0.0),
    Case("mkv", "restart", 3, 3.7),
    Case("mkv", "leap"),
    Case("webm", "size"),
    Case("flv", "size", 0, 3.7),
    Case("mp4", "plain", 3),
    Case("mp4", "late"),
    Case("opus", "restart"),
    Case("mp4", "joined", 0, 0.0, "b"),
    Case("mkv", "joined", 3, 0.0, "b"),
    Case("wav", "joined"),
    Case("ts", "streams", 3, 0.0),
    Case("ts", "mute"),
    Case("mkv", "plain", 0, 0.0, "tracks"),
    Case("mkv", "plain", 3, 3.7, "b"),
    Case("mkv", "plain", 4, 0.0, "b"),
    Case("ts", "restart", 0, 0.0, "open"),
    Case("flv", "plain", 0, 0.0, "uneven"),
    Case("mp4", "plain", 0, 0.0, "hidden"),
    Case("mkv", "joined-size"),
    Case("fragments", "joined"),
    Case("flac", "joined-rate"),
    Case("oga", "joined-rate"),
    Case("wv", "joined"),
]


def check(root: Path, cases: list[Case]) -> dict[Case, Counter[str]]:
    """Cut all cases in one run; counts their windows as right, lost (and reported) or wrong."""
    media = root / "odd"
    media.mkdir()
    clips, entries = {}, {}
    for number, case in enumerate(cases):
        path = make(media, case)
        clip = Clip(f"c{number}", "folder", f"folder:{path.name}", 0.0, None, "train", {}, (), None)
        seconds = round(probe(path).seconds, 3)
        entries[clip.clip_id] = Entry(clip.clip_id, "ok", "download", seconds=seconds)
        clips[clip.clip_id] = clip, case
    params = demo_params(source="folder", location=media, require=())
    write(
        root, [clip for clip, _ in clips.values()], entries, params=params, workers=2, fps=5,
        audio_hz=HZ, clip_seconds=1.0, min_clip_seconds=0.9, samples_per_shard=64,
        max_failed_share=0.99,
    )  # fmt: skip
    ledger = read_ledger(root / "ledger.jsonl")
    index = ShardIndex.load(root / "shards", split="train")
    reader = ShardReader(index)
    found: dict[Case, Counter[str]] = {case: Counter() for case in cases}
    for row in index.rows:
        case = clips[row.clip_id][1]
        start = int(row.key.partition("+")[2] or 0)
        frames = reader.frames(row, range(row.num_frames)) if row.video else None
        sound = reader.audio(row, 0, row.num_samples) if row.audio else None
        second = case.second_at(start) or 0
        if sound is not None or case.is_silent(second):  # without its sound it counts as lost
            found[case]["right" if is_right(case, start, frames, sound) else "wrong"] += 1
    reader.close()
    for name, (_, case) in clips.items():
        lost = SECONDS - found[case]["right"]
        found[case]["lost"] = lost
        if lost > 0 and not ledger[name].reason:
            found[case]["lost without a reason"] += lost
    return found


def is_right(case: Case, start: int, frames: np.ndarray | None, sound: np.ndarray | None) -> bool:
    """Whether picture and sound are those of the window's second, but for its ends."""
    second = case.second_at(start)
    if second is None or (frames is None and sound is None):
        return False
    if frames is not None:
        grey = frames[1:-1].mean(axis=(1, 2, 3)) / GREY - 1
        if np.abs(grey - (case.picture_at(second) or 0)).max() > 0.3:
            return False
    if case.is_silent(second):
        return True
    assert sound is not None
    wave = sound[HZ // 10 : -HZ // 10].astype(float)
    for part in np.array_split(wave, 2):
        spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part))))
        tone = np.argmax(spectrum) * HZ / len(part)
        if np.abs(part).max() < 3000 or abs(tone - TONE - STEP * second) > STEP / 3:
            return False
    return True


def table(found: dict[Case, Counter[str]]) -> str:
    return "\n".join(f"{case.name:24} {dict(+counts)}" for case, counts in found.items())


def test_windows_keep_their_second_across_breaks_and_held_pictures(tmp_path):
    found = check(tmp_path, QUICK)
    for case, counts in found.items():
        most = 2 if case.change == "late" else 1  # before the picture; at a break
        assert not counts["wrong"] and not counts["lost without a reason"], table(found)
        assert counts["lost"] <= most, table(found)


@pytest.mark.parametrize(
    ("form", "trait"), [("flv", ""), ("flv", "b"), ("flv", "open"), ("ts", "b"), ("webm", "")]
)
def test_a_window_alone_after_a_change_shows_its_second(tmp_path, form, trait):
    """The headers of the new form lie before the key frame at which its decoding begins."""
    case = Case(form, "size", 0, 0.0, trait)
    path = make(tmp_path, case)
    params = demo_params().preprocess.model_copy(update={"fps": 5, "crf": 1, "audio_hz": HZ})
    for start in (CHANGE + 1, SECONDS - 1):
        item = Cut(path, probe(path), ((float(start), start + 1.0),))
        [piece] = cut([item], params, program=find_ffmpeg(None), work=tmp_path)[0].pieces
        frames = whole(decode_frames(piece.video[0], range(5), fps=5), 5)
        assert is_right(case, start, frames, piece.audio), (start, frames.mean(axis=(1, 2, 3)))


def test_a_picture_of_another_shape_keeps_it_within_a_window(tmp_path):
    path = make(tmp_path, Case("ts", "shape"))
    params = demo_params().preprocess.model_copy(update={"fps": 10, "short_side": 64, "crf": 1})
    item = Cut(path, probe(path), ((4.5, 5.5),))
    [piece] = cut([item], params, program=find_ffmpeg(None), work=tmp_path)[0].pieces
    assert (piece.height, piece.width, piece.num_frames) == (64, 96, 10)
    frames = whole(decode_frames(piece.video[0], range(10), fps=10), 10)
    np.testing.assert_allclose(frames[0], GREY * 5, atol=3)
    assert frames[9][:, :24].max() < 12 and frames[9][:, -24:].max() < 12  # 42 of 96 columns
    np.testing.assert_allclose(frames[9][2:-2, 30:-30], GREY * 6, atol=3)


@pytest.mark.parametrize(
    ("form", "hold"), [("ts", 8), ("flv", 8), ("mkv", 8), ("mp4", 8), ("ts", 15), ("flv", 15)]
)
def test_slides_that_are_encoded_out_of_order_stand_at_their_time(tmp_path, form, hold):
    path = tmp_path / f"slides.{form}"
    record(path, Case(form, "plain", hold, 0.0, "b"), (0, 4 * hold), 0.0)
    windows = tuple((second + 0.5, second + 1.5) for second in range(0, 4 * hold - 1, 3))
    params = demo_params().preprocess.model_copy(update={"fps": 5, "crf": 1})
    [result] = cut(
        [Cut(path, probe(path), windows)], params, program=find_ffmpeg(None), work=tmp_path
    )
    for (start, _), piece in zip(windows, result.pieces, strict=True):
        slide = int(start) // hold * hold
        first = next(iter(decode_frames(piece.video[0], [0], fps=5)))[1]
        np.testing.assert_allclose(first, GREY * (slide + 1) % 250, atol=4)


@pytest.mark.slow
def test_no_odd_medium_gives_a_sample_of_another_second(tmp_path):
    cases = all_cases()
    found = check(tmp_path, cases)
    print(table(found))
    assert len(cases) >= 100
    wrong = {case: n for case, n in found.items() if n["wrong"] or n["lost without a reason"]}
    assert not wrong, table(wrong)
    kept = sum(counts["right"] for counts in found.values())
    assert kept > 0.9 * SECONDS * len(cases) and CHANGE < SECONDS


def test_slides_in_avi_that_are_out_of_order_are_reported(tmp_path):
    """Their times are not in the file."""
    path = tmp_path / "slides.avi"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=Fraction(1, 5), options=ENCODER["libx264-b"])
        video.height, video.width, video.pix_fmt = 64, 96, "yuv420p"
        for number in range(6):
            pixels = np.full((64, 96, 3), GREY * number, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode(None))
    assert "AVI has no times for them" in probe(path).remark


def seconds_of(path: Path, work: Path, guesses: list[int]) -> list[int]:
    """Of each window of a second, the second that its picture and its sound show; -1: another."""
    params = demo_params().preprocess.model_copy(update={"fps": 5, "crf": 1, "audio_hz": HZ})
    media = probe(path)
    windows = tuple((float(k), k + 1.0) for k in range(round(media.seconds)))
    [result] = cut([Cut(path, media, windows)], params, program=find_ffmpeg(None), work=work)
    seconds = []
    for piece, guess in zip(result.pieces, guesses, strict=True):
        frames = whole(decode_frames(piece.video[0], range(5), fps=5), 5)
        right = is_right(Case("mp4", "plain"), guess, frames, piece.audio)
        seconds.append(guess if right else -1)
    return seconds


@pytest.mark.parametrize("trait", ["", "b"])
@pytest.mark.parametrize(
    ("edits", "seconds"),
    [
        ([(4, 2, 1)], [2, 3, 4, 5]),
        ([(3, 0, 1), (5, 5, 1)], [0, 1, 2, 5, 6, 7, 8, 9]),
        ([(3, 0, 1), (3, 0, 1), (4, 6, 1)], [0, 1, 2, 0, 1, 2, 6, 7, 8, 9]),
        ([(5, 5, 1), (5, 0, 1)], [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]),
        ([(3, 0, 1), (2, -1, 1), (5, 3, 1)], [0, 1, 2]),
        ([(3, 0, 1), (5, 3, 2)], [0, 1, 2]),
    ],
)
def test_the_parts_of_an_edit_list_follow_each_other(tmp_path, trait, edits, seconds):
    """One that leaves a gap or changes the speed ends there."""
    path = tmp_path / "edited.mp4"
    record(path, Case("mp4", "plain", trait=trait), (0, SECONDS), 0.0)
    delay = 2 / 25 if trait else 0.0
    edit(path, [(length, start + delay * (start >= 0), rate) for length, start, rate in edits])
    assert seconds_of(path, tmp_path, seconds) == seconds
    is_odd = any(start < 0 or rate != 1 for _, start, rate in edits)
    assert ("what follows is not used" in probe(path).remark) == is_odd


def test_an_edit_list_at_another_speed_from_its_beginning_is_refused(tmp_path):
    path = tmp_path / "fast.mp4"
    record(path, Case("mp4", "plain"), (0, SECONDS), 0.0)
    edit(path, [(5, 0, 2)])
    with pytest.raises(BrokenMediaError, match="its edit list changes the speed"):
        probe(path)


def remux(source: Path, target: Path, keep) -> None:
    """Copy the packets that are kept."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        streams = [new.add_stream_from_template(stream) for stream in old.streams]
        for packet in old.demux():
            if packet.dts is not None and keep(packet):
                packet.stream = streams[packet.stream_index]
                new.mux(packet)


def windows_of(path: Path, work: Path) -> tuple[list[bool], str]:
    """Whether each window of a second is right, as far as there are any, and the complaint."""
    params = demo_params().preprocess.model_copy(update={"fps": 5, "crf": 1, "audio_hz": HZ})
    windows = tuple((float(k), k + 1.0) for k in range(SECONDS))
    item = Cut(path, probe(path), windows)
    [result] = cut([item], params, program=find_ffmpeg(None), work=work)
    right = []
    for second, piece in enumerate(result.pieces):
        if piece.num_frames == 5:
            frames = whole(decode_frames(piece.video[0], range(5), fps=5), 5)
            right.append(is_right(Case("mp4", "plain"), second, frames, piece.audio))
    return right, result.complaint


@pytest.mark.parametrize("form", ["mkv", "mp4", "flv", "ts"])
def test_pictures_before_the_first_key_frame_are_lost_and_not_those_of_later(tmp_path, form):
    source, path = tmp_path / f"whole.{form}", tmp_path / f"cut.{form}"
    record(source, Case(form, "plain"), (0, SECONDS), 0.0)
    first = []
    remux(source, path, lambda p: p.stream.type == "audio" or first or first.append(p))
    right, complaint = windows_of(path, tmp_path)
    assert right == [True] * (SECONDS - 1) and "no picture from 0.00" in complaint


@pytest.mark.parametrize("form", ["mkv", "mp4", "flv", "ts"])
def test_windows_in_which_nothing_was_recorded_are_pauses(tmp_path, form):
    source, path = tmp_path / f"whole.{form}", tmp_path / f"gap.{form}"
    record(source, Case(form, "plain"), (0, SECONDS), 0.0)
    remux(source, path, lambda p: not 4.0 <= float(p.pts * p.time_base) < 6.0)
    [(begin, end)] = probe(path).pauses
    assert abs(begin - 4) < 0.15 and abs(end - 6) < 0.15


def test_damaged_pictures_are_not_replaced_by_those_of_other_seconds(tmp_path):
    source, path = tmp_path / "whole.mkv", tmp_path / "damaged.mkv"
    record(source, Case("mkv", "plain"), (0, SECONDS), 0.0)
    data = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        for packet in container.demux(video=0):
            if packet.size and 2 <= float(packet.pts * packet.time_base) < 5.5:
                at = data.index(bytes(packet)[4:], packet.pos)
                data[at : at + packet.size - 4] = bytes(packet.size - 4)
    path.write_bytes(data)
    right, complaint = windows_of(path, tmp_path)
    assert all(right) and SECONDS - 5 <= len(right) <= SECONDS - 3 and complaint


@pytest.mark.parametrize("form", ["mp4", "mkv"])
def test_a_last_picture_that_claims_hours_ends_soon_after_the_sound(tmp_path, form):
    source, path = tmp_path / f"whole.{form}", tmp_path / f"hours.{form}"
    record(source, Case(form, "plain"), (0, SECONDS), 0.0)

    def lengthen(packet) -> bool:
        if packet.stream.type == "video" and packet.pts * packet.time_base > SECONDS - 0.05:
            packet.duration = round(40_000 / packet.time_base)
        return True

    remux(source, path, lengthen)
    media = probe(path)
    assert media.seconds <= SECONDS + 2 and "its last picture claims to stay" in media.remark
