"""Media that people reported: picture and sound of second k stand in window k."""

from pathlib import Path

import numpy as np
import pytest

from tests.data.corpus import TEST_DATA, demo_params, needs_data
from vatt.data.clips.media import find_ffmpeg, probe
from vatt.data.clips.samples import Window, windows_of
from vatt.data.clips.storage import decode_frames, whole
from vatt.data.sharding.cut import Cut, CutResult, cut

pytestmark = needs_data
DATA = Path(TEST_DATA or "/nowhere")
REPORTED = DATA / "reported"
GREY = 21  # levels from second to second
PARAMS = demo_params().preprocess.model_copy(update={"fps": 10, "audio_hz": 16000})


def cut_file(path: Path, windows: list[Window], tmp_path: Path) -> CutResult:
    item = Cut(path, probe(path), tuple(windows))
    return cut([item], PARAMS, program=find_ffmpeg(None), work=tmp_path)[0]


def shown(piece) -> np.ndarray:
    frames = decode_frames(piece.video[0], range(piece.num_frames), fps=PARAMS.fps)
    return whole(frames, piece.num_frames).mean(axis=(1, 2, 3)) / GREY


def tone(piece) -> float:
    wave = piece.audio[1600:-1600].astype(float)
    assert np.abs(wave).max() > 3000
    return np.argmax(np.abs(np.fft.rfft(wave * np.hanning(len(wave))))) * 16000 / len(wave)


@pytest.mark.parametrize(
    ("name", "remark"),
    [
        ("01_midstream_change/audchange.ts", ""),
        ("01_midstream_change/reschange.ts", ""),
        ("01_midstream_change/webrtc.webm", ""),
        ("11_ts_timestamps/tsreset.ts", "its time stamps start again at 6.0 s"),
        ("11_ts_timestamps/tsjump.ts", "its time stamps leap by 1000.0 s at 6.0 s"),
    ],
)
def test_a_change_in_the_middle_moves_no_second(name, remark, tmp_path):
    path = REPORTED / name
    windows = windows_of(0.0, round(probe(path).seconds, 3), PARAMS)[:12]
    result = cut_file(path, windows, tmp_path)
    assert len(windows) == 12 and result.complaint == remark
    for second, piece in enumerate(result.pieces):
        np.testing.assert_allclose(shown(piece)[1:-1], second, atol=0.2)
        assert abs(tone(piece) - 200 - 100 * second) < 20


def test_a_slide_that_stays_is_shown_whatever_else_is_wanted(tmp_path):
    path = REPORTED / "02_static_picture_after_seek" / "slides.mp4"
    wanted = [(float(second), second + 1.0) for second in (5, 62, 66, 67, 96, 98, 105)]
    together = cut_file(path, wanted, tmp_path)
    assert together.complaint == ""
    for (start, _), piece in zip(wanted, together.pieces, strict=True):
        np.testing.assert_allclose(shown(piece), int(start // 10), atol=0.2)
        assert abs(tone(piece) - 200 - 100 * (start // 10)) < 20
    [alone] = cut_file(path, [(66.0, 67.0)], tmp_path).pieces
    assert alone.video == together.pieces[2].video
    assert np.array_equal(alone.audio, together.pieces[2].audio)


@pytest.mark.parametrize("name", ["cam9.mkv", "plain9.wav"])
def test_the_mean_of_nine_channels_is_heard(name, tmp_path):
    result = cut_file(REPORTED / "14_nine_channels" / name, [(0.0, 1.0), (1.0, 2.0)], tmp_path)
    assert result.complaint == ""
    assert all(np.abs(piece.audio).max() > 300 for piece in result.pieces)
    assert all(bool(piece.video) == (name == "cam9.mkv") for piece in result.pieces)


def test_the_default_stream_is_the_film(tmp_path):
    path = REPORTED / "15_default_video_stream" / "thumbfirst.mov"
    assert probe(path).video == 1
    result = cut_file(path, [(3.0, 4.0)], tmp_path)
    np.testing.assert_allclose(shown(result.pieces[0]), 3, atol=0.2)


def test_channels_that_cancel_each_other_are_not_mixed(tmp_path):
    result = cut_file(DATA / "attack" / "antiphase_sound.mp4", [(0.0, 1.0), (1.0, 2.0)], tmp_path)
    assert result.complaint == "its channels cancel each other: another mix was taken"
    assert all(np.abs(piece.audio).max() > 50 for piece in result.pieces)


def test_one_frame_is_kept_for_its_time(tmp_path):
    media = probe(DATA / "attack" / "one_frame.mp4")
    assert media.num_frames == 1 and media.seconds < 0.1
    assert windows_of(0.0, media.seconds, PARAMS) == []  # the ledger says: too short
