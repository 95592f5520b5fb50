"""Subtitle files give captions; what cannot be read is counted."""

import pytest

from tests.data.corpus import TEST_DATA, needs_data
from vatt.data.manifest import Caption
from vatt.data.subtitles import embedded_captions, read_subtitles


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
