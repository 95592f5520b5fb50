"""ffmpeg cuts exactly: the right frames, the right samples, the same bytes."""

import struct
import wave
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest

from tests.data.corpus import STEP, demo_params, write_media
from vatt.data.clips.media import BrokenMediaError, find_ffmpeg, probe
from vatt.data.clips.samples import windows_of
from vatt.data.clips.storage import decode_frames, whole
from vatt.data.sharding.cut import Cut, cut
from vatt.errors import MachineError

PARAMS = demo_params().preprocess


def cut_file(path, windows, tmp_path, params=PARAMS):
    work = Cut(path, probe(path), tuple(windows))
    return cut([work], params, program=find_ffmpeg(None), work=tmp_path)[0]


def numbers(piece) -> list[int]:
    """Which frames of the source these are, told from their grey."""
    video = whole(
        decode_frames(piece.video[0], range(piece.num_frames), fps=PARAMS.fps), piece.num_frames
    )
    return (video.mean(axis=(1, 2, 3)) / STEP).round().astype(int).tolist()


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """2.4 s: 24 frames of 10 a second, sound in the second half."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_media(path, seconds=2.4, size=(48, 64))
    return path


def test_windows_cover_the_span_and_drop_a_short_rest():
    params = PARAMS.model_copy(update={"clip_seconds": 1.0, "min_clip_seconds": 0.4})
    assert windows_of(0.5, 3.0, params) == [(0.5, 1.5), (1.5, 2.5), (2.5, 3.0)]
    assert windows_of(0.0, 2.3, params) == [(0.0, 1.0), (1.0, 2.0)]
    assert windows_of(0.0, 0.3, params) == []


def test_windows_hold_exactly_their_frames(film, tmp_path):
    result = cut_file(film, [(0.0, 1.0), (1.0, 2.0), (0.5, 1.5), (1.7, 2.4)], tmp_path)
    assert result.complaint == ""
    assert [numbers(piece) for piece in result.pieces] == [
        list(range(10)), list(range(10, 20)), list(range(5, 15)), list(range(17, 24)),
    ]  # fmt: skip


def test_a_window_off_the_frame_grid_shows_what_stands_on_the_screen(film, tmp_path):
    for start, first in ((0.96, 9), (0.995, 10), (1.04, 10)):
        [piece] = cut_file(film, [(start, start + 1)], tmp_path).pieces
        assert numbers(piece) == list(range(first, first + 10))


def test_stamps_that_count_frames_are_cut_as_exactly(tmp_path):
    path = tmp_path / "film.avi"
    write_media(path, seconds=2.4, sound=False, form="avi")
    pieces = cut_file(path, [(0.0, 1.0), (0.5, 1.5), (1.04, 2.04)], tmp_path).pieces
    assert [numbers(piece) for piece in pieces] == [[*range(k, k + 10)] for k in (0, 5, 10)]


def test_half_pictures_are_made_whole(tmp_path):
    """A bright bar moves 8 pixels a half picture: left as they are, rows would show it in turn."""
    path = tmp_path / "broadcast.ts"
    with av.open(str(path), "w", format="mpegts") as container:
        options = {"x264-params": "tff=1", "crf": "4"}
        stream = container.add_stream("libx264", rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = 64, 256, "yuv420p"
        stream.codec_context.flags |= av.codec.context.Flags.interlaced_dct
        for number in range(10):
            pixels = np.zeros((64, 256, 3), np.uint8)
            for half in range(2):
                left = 16 * number + 8 * half
                pixels[half::2, left : left + 32] = 200
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert probe(path).interlaced
    params = PARAMS.model_copy(update={"short_side": 64, "crf": 4})
    [piece] = cut_file(path, [(0.0, 1.0)], tmp_path, params).pieces
    video = whole(decode_frames(piece.video[0], range(2, 8), fps=10), 6).mean(axis=3)
    combs = np.abs(video[:, 1:-1] - (video[:, :-2] + video[:, 2:]) / 2)[:, 4:-4]
    assert combs.mean() < 2  # 12 when nothing is done


def test_each_side_of_the_sound_is_heard_in_the_mix(tmp_path):
    for channel in range(6):
        wave = np.zeros((6, 8000), np.float32)
        wave[channel] = 0.5 * np.sin(2 * np.pi * 100 * np.arange(8000) / 8000)
        path = tmp_path / f"{channel}.mka"
        with av.open(str(path), "w", format="matroska") as container:
            stream = container.add_stream("pcm_f32le", rate=8000, layout="5.1")
            frame = av.AudioFrame.from_ndarray(wave.T.reshape(1, -1).copy(), "flt", "5.1")
            frame.sample_rate, frame.pts = 8000, 0
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        [piece] = cut_file(path, [(0.0, 1.0)], tmp_path).pieces
        level = np.abs(piece.audio).max()
        assert level > (500 if channel == 3 else 2000)  # the fourth is for a subwoofer


@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize("channels", [[1, -1, 0, 0, 0, 0], [0, 0, 0, 0, 1, -1], [0, 0, 0, 1, 0, 0]])
def test_surround_whose_channels_cancel_or_are_left_out_is_heard(tmp_path, channels, is_exact):
    tone = 8000 * np.sin(2 * np.pi * 50 * np.arange(24000) / 8000)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((6, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.outer(tone, channels).astype("<i2").tobytes())
    item = Cut(
        tmp_path / "a.wav", replace(probe(tmp_path / "a.wav"), exact=is_exact), ((0.5, 1.5),)
    )
    [result] = cut([item], PARAMS, program=find_ffmpeg(None), work=tmp_path)
    assert np.abs(result.pieces[0].audio).max() > 500
    assert result.complaint == "its channels cancel each other: another mix was taken"


def test_sound_is_as_long_as_the_picture_and_in_step(film, tmp_path):
    pieces = cut_file(film, [(0.0, 1.0), (0.8, 1.8)], tmp_path).pieces
    assert [len(piece.audio) for piece in pieces] == [8000, 8000]
    assert np.abs(pieces[0].audio).max() < 300  # silent before 1.2 s
    onset = np.flatnonzero(np.abs(pieces[1].audio) > 3000)[0] / 8000
    assert abs(onset - 0.4) < 0.02


def test_short_side_and_even_sizes(tmp_path):
    for size, stored in (((48, 64), (32, 42)), ((96, 48), (64, 32)), ((32, 32), (32, 32))):
        path = tmp_path / f"{size[0]}.mp4"
        write_media(path, size=size)
        [piece] = cut_file(path, [(0.0, 1.0)], tmp_path).pieces
        assert (piece.height, piece.width) == stored


def test_frames_are_repeated_or_left_out_to_reach_the_rate(tmp_path):
    path = tmp_path / "slow.mp4"
    write_media(path, seconds=2.0, fps=5)
    [piece] = cut_file(path, [(0.0, 1.0)], tmp_path).pieces
    assert numbers(piece) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_many_sources_in_a_call_give_the_bytes_of_one_each(film, tmp_path):
    other = tmp_path / "other.mp4"
    write_media(other, seconds=1.2, sound=False)
    jobs = [
        Cut(film, probe(film), ((0.0, 1.0), (1.0, 2.0))),
        Cut(other, probe(other), ((0.0, 1.0),)),
    ]
    program = find_ffmpeg(None)
    together = cut(jobs, PARAMS, program=program, work=tmp_path)
    alone = [cut([job], PARAMS, program=program, work=tmp_path)[0] for job in jobs]
    for one, two in zip(together, alone, strict=True):
        for piece, same in zip(one.pieces, two.pieces, strict=True):
            assert piece.video == same.video and np.array_equal(piece.audio, same.audio)
    assert together[1].pieces[0].audio is None


def test_a_broken_file_among_others_costs_only_itself(film, tmp_path):
    broken = tmp_path / "broken.mp4"
    data = bytearray(film.read_bytes())
    start = data.index(b"mdat") + 4
    data[start : start + 4000] = b"\xff" * 4000
    broken.write_bytes(data)
    jobs = [Cut(path, probe(path), ((0.0, 1.0),)) for path in (film, broken)]
    good, bad = cut(jobs, PARAMS, program=find_ffmpeg(None), work=tmp_path)
    assert good.complaint == "" and numbers(good.pieces[0]) == list(range(10))
    assert bad.complaint and "0x" not in bad.complaint


def test_a_file_that_takes_too_long_is_given_up(film, tmp_path, monkeypatch):
    monkeypatch.setattr("vatt.data.sharding.cut.PATIENCE", 1e-4)
    result = cut_file(film, [(0.0, 1.0)], tmp_path)
    assert result.complaint == "decoding takes too long" and result.pieces[0].video == ()


def test_a_frame_of_too_many_pixels_is_not_decoded(film, tmp_path, monkeypatch):
    monkeypatch.setattr("vatt.data.sharding.cut.MAX_PIXELS", 1000)
    result = cut_file(film, [(0.0, 1.0)], tmp_path)
    assert "max pixel count" in result.complaint and result.pieces[0].video == ()


def test_a_file_that_claims_a_year_is_refused(tmp_path):
    path = tmp_path / "year.mkv"
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        for pts in (0, 365 * 86400 * 8000):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
            frame.sample_rate, frame.pts = 8000, pts
            container.mux(stream.encode(frame))
    with pytest.raises(BrokenMediaError, match=r"claim \d+ hours"):
        probe(path)


def test_what_is_no_media_says_why(tmp_path):
    cases = {
        "empty": b"",
        "page.mp4": b"<!doctype html><p>404</p>" * 50,
        "x.mp4": b"#EXTM3U\nfile:///",
        "answer.mp4": b'{"error": "' + b"no such video " * 40 + b'"}',
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BrokenMediaError, match=r"empty file|not a media file"):
            probe(tmp_path / name)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(BrokenMediaError, match="not a file"):
        probe(tmp_path / "folder.mp4")


def test_a_stream_that_no_decoder_knows_is_none(tmp_path):
    for sound in (True, False):
        path = tmp_path / f"{sound}.mp4"
        write_media(path, sound=sound)
        path.write_bytes(path.read_bytes().replace(b"avc1\0\0", b"zz9z\0\0"))
    media = probe(tmp_path / "True.mp4")
    assert media.video is None and media.audio is not None
    with pytest.raises(BrokenMediaError, match="that can be decoded"):
        probe(tmp_path / "False.mp4")


def test_a_missing_ffmpeg_is_the_machines_fault(tmp_path):
    with pytest.raises(MachineError, match=r"machine\.ffmpeg"):
        find_ffmpeg(tmp_path / "none")


def float_wav(path, wave) -> None:
    data = np.asarray(wave, "<f4")
    count, hz = (1, 8000) if data.ndim == 1 else (data.shape[1], 8000)
    form = struct.pack("<HHIIHH", 3, count, hz, 4 * count * hz, 4 * count, 32)
    body = b"WAVEfmt " + struct.pack("<I", 16) + form
    body += b"data" + struct.pack("<I", data.nbytes) + data.tobytes()
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)


TONE = 0.25 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [100, slice(2000, 6000)])
def test_samples_that_are_not_finite_are_silent_and_reported(tmp_path, odd, place):
    wave = TONE.copy()
    wave[place] = odd
    float_wav(tmp_path / "a.wav", wave)
    result = cut_file(tmp_path / "a.wav", [(0.0, 1.0)], tmp_path)
    np.testing.assert_allclose(
        result.pieces[0].audio / 32768, np.nan_to_num(wave, posinf=0, neginf=0), atol=1e-3
    )
    assert "samples of its sound are not finite" in result.complaint


def test_a_channel_that_is_not_finite_leaves_the_other(tmp_path):
    float_wav(tmp_path / "a.wav", np.stack([TONE, TONE * np.nan], axis=1))
    [piece] = cut_file(tmp_path / "a.wav", [(0.0, 1.0)], tmp_path).pieces
    np.testing.assert_allclose(piece.audio / 32768, TONE / 2, atol=1e-3)


def test_sound_that_is_too_loud_for_16_bits_is_reported(tmp_path):
    for factor, said in ((20, "beyond full scale"), (3.9, "")):
        float_wav(tmp_path / "a.wav", TONE * factor)
        complaint = cut_file(tmp_path / "a.wav", [(0.0, 1.0)], tmp_path).complaint
        assert said in complaint and bool(said) == bool(complaint)


def test_bytes_of_a_wav_that_nobody_reads_are_reported(tmp_path):
    float_wav(tmp_path / "a.wav", np.tile(TONE, 10))
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[40:44] = struct.pack("<I", 160_000)  # half of it
    (tmp_path / "a.wav").write_bytes(data)
    media = probe(tmp_path / "a.wav")
    assert media.seconds == 5 and media.remark == "160,044 of its 320,044 bytes are not read"


def test_a_big_endian_wav_is_refused(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFX" + bytes(1000))
    with pytest.raises(BrokenMediaError, match="big-endian"):
        probe(tmp_path / "a.wav")


@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize(
    ("matrix", "corner"),
    [
        ((1, 0, 0, 1), (0, 0)), ((-1, 0, 0, -1), (1, 1)), ((0, 1, -1, 0), (0, 1)),
        ((0, -1, 1, 0), (1, 0)), ((-1, 0, 0, 1), (0, 1)), ((1, 0, 0, -1), (1, 0)),
        ((0, 1, 1, 0), (0, 0)), ((0, -1, -1, 0), (1, 1)),
    ],
)  # fmt: skip
def test_a_picture_that_is_turned_or_mirrored_is_shown_so(tmp_path, matrix, corner, is_exact):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        pixels = np.zeros((64, 96, 3), np.uint8)
        pixels[:16, :16] = 255
        for _ in range(10):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    a, b, c, d = (2**16 * value for value in matrix)
    old = struct.pack(">9i", 2**16, 0, 0, 0, 2**16, 0, 0, 0, 2**30)
    track = data.index(b"tkhd")
    at = data.index(old, track)
    path.write_bytes(
        data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30) + data[at + 36 :]
    )
    item = Cut(path, replace(probe(path), exact=is_exact), ((0.0, 1.0),))
    [result] = cut([item], PARAMS, program=find_ffmpeg(None), work=tmp_path)
    [piece] = result.pieces
    assert (piece.width < piece.height) == (matrix[0] == 0)
    shown = whole(decode_frames(piece.video[0], [0], fps=PARAMS.fps), 1)[0].mean(axis=2)
    bright = [[shown[:4, :4], shown[:4, -4:]], [shown[-4:, :4], shown[-4:, -4:]]]
    assert [(r, c) for r in (0, 1) for c in (0, 1) if bright[r][c].mean() > 128] == [corner]


@pytest.mark.parametrize(("form", "codec"), [("apng", "apng"), ("gif", "gif")])
def test_all_pictures_of_an_animation_are_read(tmp_path, form, codec):
    path = tmp_path / "animation.png"
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = 32, 48
        stream.pix_fmt = "rgb24" if codec == "apng" else "rgb8"
        for number in range(20):
            pixels = np.full((32, 48, 3), number * STEP, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode(None))
    media = probe(path)
    assert media.image is None and round(media.seconds, 1) == 2.0


def test_pictures_that_share_a_time_stamp_are_refused(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuvj420p"
        for number in range(10):
            pixels = np.full((32, 48, 3), number * STEP, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                packet.pts = packet.dts = number // 5
                container.mux(packet)
    with pytest.raises(BrokenMediaError, match="10 pictures share 2 time stamps"):
        probe(path)


def test_a_raw_stream_without_time_stamps_says_so(tmp_path):
    path = tmp_path / "a.h264"
    with av.open(str(path), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for _ in range(10):
            pixels = np.zeros((32, 48, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(BrokenMediaError, match="no time stamps"):
        probe(path)


HUM = 0.02 * np.sin(2 * np.pi * 60 * np.arange(8000) / 8000)
HALVES = np.repeat([1, -1, 1, -1], 2000)


@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize(
    ("left", "right", "kept"),
    [
        (HUM + TONE, HUM - TONE, None),  # they cancel each other in one octave only
        (TONE, HALVES * TONE, None),  # for half of the time
        (TONE, -0.9 * TONE, None),
        (TONE, 0.5 * TONE, 0.75 * TONE),
        (TONE, 0 * TONE, TONE / 2),
        (0 * TONE, TONE, TONE / 2),
        (TONE, HALVES * HUM, (TONE + HALVES * HUM) / 2),
    ],
)
def test_a_part_of_stereo_that_cancels_out_is_heard(tmp_path, left, right, kept, is_exact):
    path = tmp_path / "a.wav"
    float_wav(path, np.stack([left, right], axis=1))
    item = Cut(path, replace(probe(path), exact=is_exact), ((0.0, 1.0),))
    [result] = cut([item], PARAMS, program=find_ffmpeg(None), work=tmp_path)
    sound = result.pieces[0].audio / 32768
    np.testing.assert_allclose(sound, left if kept is None else kept, atol=1e-3)
    assert ("another mix was taken" in result.complaint) == (kept is None)
