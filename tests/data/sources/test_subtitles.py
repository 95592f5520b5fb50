"""Subtitle files give captions; what cannot be read is counted."""

import subprocess

import pytest

from tests.data.corpus import TEST_DATA, needs_data, write_media
from vatt.data.clips.manifest import Caption
from vatt.data.clips.media import find_ffmpeg
from vatt.data.sources.subtitles import embedded_captions, read_subtitles


def read(tmp_path, name: str, content: str | bytes):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_subtitles(path)


def test_srt_with_tags_entities_and_windows_line_ends(tmp_path):
    got = read(
        tmp_path,
        "a.srt",
        "\ufeff1\r\n00:00:01,500 --> 00:01:02,000\r\n<i>Salt</i> &amp;\r\npepper\r\n\r\n",
    )
    assert got.captions == (Caption(1.5, 62.0, "Salt & pepper"),) and got.dropped == 0


def test_bad_times_are_dropped_and_counted(tmp_path):
    cues = "1\n00:00:05,000 --> 00:00:02,000\nbackwards\n\n2\n0:1 --> 0:2\nno\n\n"
    got = read(tmp_path, "a.srt", cues + "3\n00:00:03,000 --> 00:00:04,000\ngood\n")
    assert [caption.text for caption in got.captions] == ["good"] and got.dropped == 2


def test_rolling_captions_are_said_once(tmp_path):
    rolling = (
        "WEBVTT\n\n00:00.000 --> 00:02.000\nso today<00:00:00.500><c> we</c>\n\n"
        "00:02.000 --> 00:02.010\nso today we\n\n"
        "00:02.010 --> 00:04.000\nso today we\nmake<00:00:02.500><c> pasta</c>\n\n"
        "00:04.000 --> 00:06.000\nmake pasta\n&lt;laughs&gt;\n"
    )
    assert [caption.text for caption in read(tmp_path, "a.vtt", rolling).captions] == [
        "so today we", "make pasta", "<laughs>",
    ]  # fmt: skip


def test_rolling_captions_without_inline_times_are_said_once(tmp_path):
    lines = [f"words number {number}" for number in range(6)]
    cues = [f"00:00:0{n},010 --> 00:00:0{n + 1},000\n{lines[n - 1]}\n{lines[n]}\n\n"
            f"00:00:0{n + 1},000 --> 00:00:0{n + 1},010\n{lines[n]}\n\n"
            for n in range(1, 6)]  # fmt: skip
    got = read(tmp_path, "a.srt", f"00:00:00,000 --> 00:00:01,010\n{lines[0]}\n\n" + "".join(cues))
    assert [caption.text for caption in got.captions] == lines


def test_a_refrain_in_plain_subtitles_stays(tmp_path):
    cue = "00:00:0{0},000 --> 00:00:0{1},000\nla la\n\n"
    song = "".join(cue.format(number, number + 1) for number in range(8))
    assert len(read(tmp_path, "a.srt", song).captions) == 8


def test_a_cue_of_very_many_lines_takes_no_longer_than_it_must(tmp_path):
    many = "a\n" * 100_000  # quadratic, this would not end
    cues = f"WEBVTT\n\n00:00.000 --> 00:01.000\n{many}\n00:01.000 --> 00:02.000\n{many}"
    got = read(tmp_path, "a.vtt", cues + "<00:00:01.500>b\n")
    assert [len(caption.text.split()) for caption in got.captions] == [100_000, 100_000 - 8 + 1]


def test_words_repeated_in_plain_subtitles_stay(tmp_path):
    cues = "WEBVTT\n\n00:00.000 --> 00:01.000\nGo!\n\n00:01.000 --> 00:02.000\nGo!\n"
    assert len(read(tmp_path, "a.vtt", cues).captions) == 2


@pytest.mark.parametrize(
    ("content", "texts", "dropped"),
    [
        ('{"start": [2, 0], "end": [3, 1], "text": ["b", "a"]}', ["a", "b"], 0),
        ('{"a": {"start": [0], "end": [1], "text": ["mine"]}, "b": {}}', ["mine"], 0),
        ('{"start": [0, 1], "end": [NaN, 2], "text": ["x", NaN]}', [], 2),
        ('{"start": [0, 1], "end": [1], "text": ["a", "b"]}', [], 2),
        ('[{"start": 0, "duration": 2, "text": "a"}, {"text": "b"}, 3]', ["a"], 2),
        ("{broken", [], 1),
        ("[" * 100_000, [], 1),
        ('[{"start": 0, "end": ' + "9" * 5000 + ', "text": "a"}]', [], 1),
        ("17", [], 1),
    ],
)
def test_json(tmp_path, content, texts, dropped):
    got = read(tmp_path, "a.json", content)
    assert [caption.text for caption in got.captions] == texts
    assert got.dropped == dropped


def test_other_encodings_are_read(tmp_path):
    cue = "1\n00:00:00,000 --> 00:00:01,000\nCafé\n"
    for encoding in ("latin-1", "utf-16", "utf-8-sig"):
        assert read(tmp_path, "a.srt", cue.encode(encoding)).captions[0].text == "Café"


@needs_data
def test_a_text_track_inside_a_video_is_read():
    from pathlib import Path

    captions = embedded_captions(Path(TEST_DATA) / "hostile" / "with_subtitles.mp4").captions
    assert [caption.text for caption in captions] == ["Hello there", "Second line"]


@pytest.mark.parametrize("codec", ["ass", "srt", "webvtt"])
def test_each_kind_of_text_track_in_a_matroska_file_is_read(tmp_path, codec):
    write_media(tmp_path / "film.mp4", seconds=3.0)
    cue = "1\n00:00:00,500 --> 00:00:01,500\nsalt, and\n<i>pepper</i>\n"
    (tmp_path / "film.srt").write_text(cue)
    run_ffmpeg(
        *("-i", "film.mp4", "-i", "film.srt", "-c:v", "copy", "-c:a", "copy", "-c:s", codec),
        "film.mkv",
        folder=tmp_path,
    )
    found = embedded_captions(tmp_path / "film.mkv")
    assert found.captions == (Caption(0.5, 1.5, "salt, and pepper"),)


def test_a_script_that_names_other_files_is_not_followed(tmp_path):
    write_media(tmp_path / "film.mp4")
    (tmp_path / "film.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nsecret\n")
    run_ffmpeg("-i", "film.mp4", "-i", "film.srt", "-c:s", "mov_text", "v.mp4", folder=tmp_path)
    assert embedded_captions(tmp_path / "v.mp4").captions
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile v.mp4\n")
    assert embedded_captions(tmp_path / "list.mp4").captions == ()


def test_a_text_track_of_an_unknown_kind_is_none(tmp_path):
    write_media(tmp_path / "film.mp4")
    (tmp_path / "film.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nwords\n")
    run_ffmpeg("-i", "film.mp4", "-i", "film.srt", "-c:s", "srt", "v.mkv", folder=tmp_path)
    film = (tmp_path / "v.mkv").read_bytes()
    assert b"S_TEXT/UTF8" in film
    (tmp_path / "v.mkv").write_bytes(film.replace(b"S_TEXT/UTF8", b"S_ZZZZ/ZZZZ"))
    assert embedded_captions(tmp_path / "v.mkv").captions == ()


def run_ffmpeg(*arguments: str, folder) -> None:
    command = [find_ffmpeg(None), "-v", "error", *arguments]
    subprocess.run(command, cwd=folder, check=True)
