"""Subtitle files give captions; what cannot be read is counted."""

import json
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from tests.data.corpus import TEST_DATA, needs_data, write_media
from vatt.data.clips.manifest import Caption, CaptionFaults
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


def test_other_encodings_are_read_and_a_guessed_one_is_named(tmp_path):
    cue = "1\n00:00:00,000 --> 00:00:01,000\nCafé\n"
    for encoding, named in (("latin-1", "cp1252"), ("utf-16", ""), ("utf-8-sig", "")):
        got = read(tmp_path, "a.srt", cue.encode(encoding))
        assert got.captions[0].text == "Café" and got.faults == CaptionFaults(encoding=named)


OPEN, POUR, STIR = (
    Caption(1.0, 2.0, "open the door"),
    Caption(3.0, 4.0, "pour the milk"),
    Caption(5.0, 6.0, "stir it"),
)
REPORTED_SRT = {
    "noblank.srt": ((OPEN, POUR, STIR), CaptionFaults()),
    "crcrlf.srt": ((OPEN, POUR), CaptionFaults()),
    "utf16nobom.srt": ((OPEN, POUR), CaptionFaults()),
    "blanktext.srt": ((OPEN, POUR, STIR), CaptionFaults()),
    "gbk.srt": (
        (Caption(1.0, 2.0, "打开门"), Caption(3.0, 4.0, "倒牛奶")), CaptionFaults(encoding="gb18030"),
    ),
    "cp1251.srt": (
        (Caption(1.0, 2.0, "открой дверь"), Caption(3.0, 4.0, "налей молоко")),
        CaptionFaults(encoding="cp1251"),
    ),
    "badbyte.srt": (
        (
            Caption(1.0, 2.0, "naïve café"), Caption(3.0, 4.0, "señor, über alles"),
            Caption(5.0, 6.0, "cut off caf\ufffd"),
        ),
        CaptionFaults(repaired=1),
    ),
    "yt.vtt": (
        (
            Caption(1.0, 3.99, "first open the door"), Caption(4.0, 6.99, "then pour the milk"),
            Caption(7.0, 9.99, "and stir it"),
        ),
        CaptionFaults(),
    ),
}  # fmt: skip


@needs_data
@pytest.mark.parametrize("name", REPORTED_SRT)
def test_reported_files_give_their_cues_at_their_times(name):
    got = read_subtitles(Path(TEST_DATA) / "reported" / "09_srt" / name)
    assert (got.captions, got.faults) == REPORTED_SRT[name]


HOSTILE = {
    "fuzz-sub-OverflowError-199.srt": (0, 2), "sub-bigint.json": (0, 1),
    "sub-bigint2.json": (0, 1), "sub-dup.json": (1, 0), "sub-dur-null.json": (0, 1),
    "sub-dur-str.json": (1, 0), "sub-entity.srt": (1, 0), "sub-hours.srt": (0, 1),
    "sub-hours400.srt": (0, 1),
}  # fmt: skip


@needs_data
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_read_and_counted(name):
    got = read_subtitles(Path(TEST_DATA) / "attack" / name)
    assert (len(got.captions), got.dropped) == HOSTILE[name]


ONE, TWO = "00:00:01,000 --> 00:00:02,000", "00:00:03,000 --> 00:00:04,000"
SHAPES = {
    "no numbers": f"{ONE}\nopen the door\n\n{TWO}\npour the milk\n",
    "no numbers, no empty lines": f"{ONE}\nopen the door\n{TWO}\npour the milk",
    "every line is followed by an empty one": f"1\n\n{ONE}\n\nopen\n\nthe door\n\n\n\n2\n\n{TWO}\n\npour the milk\n",
    "numbers stand there twice": f"1\n1\n{ONE}\nopen the door\n\n2\n2\n{TWO}\npour the milk\n",
    "one number is missing": f"1\n{ONE}\nopen the door\n\n{TWO}\npour the milk\n",
    "the first number is missing": f"{ONE}\nopen the door\n\n2\n{TWO}\npour the milk\n",
    "spaces in the empty lines": f"1\n{ONE}\nopen the door\n \t\n2\n{TWO}\npour the milk\n \n",
    "vtt without empty lines": f"WEBVTT\n{ONE}\nopen the door\n{TWO}\npour the milk\n",
    "names of cues": f"WEBVTT\n\nintro\n{ONE}\nopen the door\n\nthe milk - 2\n{TWO}\npour the milk\n",
    "a name of one cue": f"WEBVTT\n\n{ONE}\nopen the door\n\nmilk\n{TWO}\npour the milk\n",
    "comments": f"WEBVTT - a title\n\nSTYLE\n::cue {{ color: red }}\n\nREGION\nid:a\n\n{ONE} align:start\n"
    f"open the door\n\nNOTE\nnot said\nnor this\n\nNOTE one line\n\n2\n{TWO} line:0 position:50%\n<v Ann>pour <b>the milk</b>\n",
    "other arrows and spaces": "1\n00: 00: 01, 000 -> 00:00:02.000\nopen the door\n\n2\n00:03.000 —> 00:04,0\npour the milk\n",
    "coordinates": f"1\n{ONE} X1:40 X2:600 Y1:20 Y2:50\n{{\\an8}}open the door\n\n2\n{TWO}\n<font color=red>pour the milk</font>\n",
    "unseen marks": f"1\n{ONE}\n\u202aopen the\u200b door\u202c\n\n2\n{TWO}\n\ufeffpour&nbsp;the milk\n",
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
def test_cues_are_found_whatever_surrounds_them(tmp_path, shape, end):
    name = "a.vtt" if SHAPES[shape].startswith("WEBVTT") else "a.srt"
    got = read(tmp_path, name, SHAPES[shape].replace("\n", end))
    assert got.captions == (OPEN, POUR) and not got.faults


@pytest.mark.parametrize(
    ("cue", "texts", "dropped", "repaired"),
    [
        ("00:00:03,000 --> 00:00:03,000\nno time\n", [], 1, 0),
        ("00:00:0x,000 --> 00:00:04,000\nbad start\n", [], 1, 0),
        ("00:00:03,000 00:00:04,000\nno arrow\n", [], 1, 0),
        ("00:00:03,000 --> \nno end\n", [], 1, 0),
        ("nan --> inf\nno times\n", [], 1, 0),
        ("999999:00:00,000 --> 999999:00:01,000\nabsurd\n", [], 1, 0),
        ("-00:00:01,000 --> 00:00:04,000\nearly\n", ["early"], 0, 1),
        ("00:00:60,000 --> 00:01:02,000\nlate\n", ["late"], 0, 1),
        ("00:00:03,000 --> 00:00:04,000 in one line\n", ["in one line"], 0, 1),
        ("100:00:00,000 --> 100:00:01,000\nlong\n", ["long"], 0, 0),
        ("00:00:03,000 --> 00:00:04,000\na\0b\n", ["a b"], 0, 1),
        ("00:00:03,000 --> 00:00:04,000\n\n", [], 0, 0),
        ("00:00:01,500 --> 00:00:04,000\nboth\n", ["both"], 0, 0),
    ],
)
def test_each_cue_is_read_repaired_or_dropped_alone(tmp_path, cue, texts, dropped, repaired):
    after = "3\n00:00:05,000 --> 00:00:06,000\nstir it\n"
    got = read(tmp_path, "a.srt", f"1\n{ONE}\nopen the door\n\n2\n{cue}\n{after}")
    found = [caption.text for caption in got.captions]
    assert {OPEN.text, STIR.text} <= {*found}
    assert [text for text in found if text not in (OPEN.text, STIR.text)] == texts
    assert (got.dropped, got.faults.repaired) == (dropped, repaired)


def test_a_cue_whose_times_are_lost_skips_absent_and_joins_no_other(tmp_path):
    got = read(
        tmp_path, "a.srt", f"1\n{ONE}\nopen the door\n\n2\nlost\n\n3\n{TWO}\npour the milk\n"
    )
    assert (got.captions, got.dropped) == ((OPEN, POUR), 1)
    got = read(tmp_path, "a.srt", f"1\nlost\n\n2\n{ONE}\nopen the door\n")
    assert (got.captions, got.dropped) == ((OPEN,), 1)
    assert read(tmp_path, "a.srt", "no subtitles at all\n").dropped == 1
    assert read(tmp_path, "a.vtt", "WEBVTT\n\nNOTE nothing is said\n").dropped == 0


@pytest.mark.parametrize(
    "times",
    [
        "0:0:1,5 --> 0:0:2,5", "00:00:01:500 --> 00:00:02:500", "00:00:01,500 --&gt; 00:00:02,500",
        "00:00:01,500 – 00:00:02,500", "0:00:01.500,0:00:02.500", "[00:01.500 --> 00:02.500]",
        "00:00:01,500\u00a0-->\u00a000:00:02,500", "００:００:０１,５００ --> ００:００:０２,５００",
        "00:00:01\u060c500 --> 00:00:02\u060c500", "\u202b00:00:01,500 --> 00:00:02,500",
    ],
)  # fmt: skip
@pytest.mark.parametrize("number", ["2\n", ""])
def test_times_as_other_programs_write_them_are_read(tmp_path, times, number):
    before = number.replace("2", "1") + "00:00:00,500 --> 00:00:01,000\nopen\n\n"
    got = read(tmp_path, "a.srt", f"{before}{number}{times}\npour\n")
    assert got.captions[-1] == Caption(1.5, 2.5, "pour")
    assert got.captions[0].text == "open" and got.dropped == 0
    assert got.faults.repaired == (not times.startswith("\u202b"))


@pytest.mark.parametrize("first", ["\nWEBVTT\n\n", "webvtt\n\n", ""])
def test_comments_of_vtt_are_left_out_whatever_its_first_line_is(tmp_path, first):
    got = read(
        tmp_path, "a.vtt", f"{first}{ONE}\nopen the door\n\nNOTE to me\n\n{TWO}\npour the milk"
    )
    assert got.captions == (OPEN, POUR) and not got.faults


@pytest.mark.parametrize("end", ["\n2", "\n2\n", "\n2\n\n"])
def test_a_file_that_ends_after_the_number_of_a_cue_has_lost_it(tmp_path, end):
    got = read(tmp_path, "a.srt", f"1\n{ONE}\nopen the door\n{end}")
    assert (got.captions, got.dropped) == ((OPEN,), 1)


def test_files_that_were_joined_keep_their_cues_apart(tmp_path):
    part = "\ufeff1\n{}\n{}\n\n"
    got = read(tmp_path, "a.srt", part.format(ONE, OPEN.text) + part.format(TWO, POUR.text))
    assert got.captions == (OPEN, POUR) and not got.faults


def test_numbers_that_are_all_that_is_said_stay(tmp_path):
    for numbers in (("", "", ""), ("1\n", "", "3\n")):
        times = [ONE, TWO, "00:00:05,000 --> 00:00:06,000"]
        cues = zip(numbers, times, ["10", "7", "x"], strict=True)
        text = "".join(f"{number}{span}\n{said}\n\n" for number, span, said in cues)
        got = read(tmp_path, "a.srt", text)
        assert [caption.text for caption in got.captions] == ["10", "7", "x"]


def test_numbers_and_marks_that_are_said_stay(tmp_path):
    said = [
        "count to 10",
        "42",
        "I <3 you > all",
        "a & b",
        "if a<b and c>d",
        "from a --> b\nand on",
    ]
    said[-1] = said[-1].replace("\n", " ")
    cues = [f"00:00:0{k},000 --> 00:00:0{k + 1},000\n{text}\n\n" for k, text in enumerate(said)]
    assert [caption.text for caption in read(tmp_path, "a.srt", "".join(cues)).captions] == said


def test_a_long_cue_is_cut_and_loses_no_word(tmp_path):
    words = [f"word{number}" for number in range(90)]
    words[19] += "."
    got = read(tmp_path, "a.srt", f"1\n00:00:00,000 --> 00:01:00,000\n{' '.join(words)}\n")
    assert " ".join(caption.text for caption in got.captions).split() == words
    assert [len(caption.text.split()) for caption in got.captions] == [16, 16, 16, 16, 16, 10]
    assert (got.captions[0].start, got.captions[-1].end) == (0.0, 60.0)
    assert all(a.end == b.start for a, b in pairwise(got.captions)) and not got.faults


WORDS = [{"word": f" w{k}", "start": k * 1.0, "end": k + 0.5} for k in range(20)]
TEXT = " ".join(f"w{k}" for k in range(20))
JSONS = {
    "Whisper": {"text": TEXT, "segments": [
        {"id": 0, "start": 1.0, "end": 2.0, "text": " open the door", "tokens": [1]},
        {"id": 1, "start": 3.0, "end": 4.0, "text": " pour the milk"}], "language": "en"},
    "WhisperX": {"segments": [
        {"start": 1.0, "end": 2.0, "text": "open the door", "words": [{"word": "open"}]},
        {"start": 3.0, "end": 4.0, "text": "pour the milk", "words": []}], "word_segments": []},
    "whisper.cpp": {"transcription": [
        {"offsets": {"from": 1000, "to": 2000}, "text": " open the door"},
        {"offsets": {"from": 3000, "to": 4000}, "text": " pour the milk"}]},
    "Transformers": {"chunks": [
        {"timestamp": [1.0, 2.0], "text": " open the door"},
        {"timestamp": [3.0, 4.0], "text": " pour the milk"}]},
    "YouTube": {"events": [
        {"tStartMs": 0, "dDurationMs": 9000},
        {"tStartMs": 1000, "dDurationMs": 1000, "segs": [{"utf8": "open"}, {"utf8": " the door"}]},
        {"tStartMs": 2000, "dDurationMs": 10, "segs": [{"utf8": "\n"}]},
        {"tStartMs": 3000, "dDurationMs": 1000, "segs": [{"utf8": "pour the milk"}]}]},
    "words alone": {"words": [
        {"word": "open", "start": 1.0, "end": 1.2}, {"word": "the door", "start": 1.3, "end": 2.0},
        {"word": "pour the milk", "start": 3.5, "end": 4.0}]},
    "AssemblyAI": {"words": [
        {"text": "open", "start": 1000, "end": 1200}, {"text": "the door", "start": 1300, "end": 2000},
        {"text": "pour the milk", "start": 3500, "end": 4000}]},
}  # fmt: skip


@pytest.mark.parametrize("form", JSONS)
def test_transcripts_of_known_programs_are_read(tmp_path, form):
    got = read(tmp_path, "a.json", json.dumps(JSONS[form]))
    assert [caption.text for caption in got.captions] == [OPEN.text, POUR.text]
    assert got.captions[0] == OPEN and got.captions[1].end == 4.0 and not got.faults


def test_a_long_segment_is_cut_by_the_times_of_its_words(tmp_path):
    segment = {"start": 0.0, "end": 19.5, "text": TEXT, "words": WORDS}
    first, last = read(tmp_path, "a.json", json.dumps({"segments": [segment]})).captions
    assert (first.start, first.end, last.start, last.end) == (0.0, 15.5, 16.0, 19.5)


@pytest.mark.parametrize(
    ("row", "texts", "faults"),
    [
        ({"start": "1.0", "end": "2", "text": "a"}, ["a"], CaptionFaults(repaired=1)),
        ({"start": -1, "end": 2, "text": "a"}, ["a"], CaptionFaults(repaired=1)),
        ({"start": 1e308, "end": 1.1e308, "text": "a"}, [], CaptionFaults(dropped=1)),
        ({"start": True, "end": 2, "text": "a"}, [], CaptionFaults(dropped=1)),
        ({"start": [1], "end": {}, "text": "a"}, [], CaptionFaults(dropped=1)),
        ({"start": 1, "end": 2, "text": ["a"]}, [], CaptionFaults(dropped=1)),
        ({"start": 1, "end": 2, "text": "a \ud83d"}, ["a \ufffd"], CaptionFaults(repaired=1)),
        ({"start": 1, "end": 2, "text": " "}, [], CaptionFaults()),
    ],
)
def test_odd_rows_of_json_are_repaired_or_dropped(tmp_path, row, texts, faults):
    got = read(tmp_path, "a.json", json.dumps([row]))
    assert ([caption.text for caption in got.captions], got.faults) == (texts, faults)


def test_the_list_of_a_transcript_that_is_not_empty_is_read(tmp_path):
    words = [{"word": "pour", "start": 0.0, "end": 1.0}, {"word": "milk", "start": 1.0, "end": 2.0}]
    for name in ("a.json", "a.en.json3"):
        got = read(tmp_path, name, json.dumps({"segments": [], "words": words}))
        assert got.captions == (Caption(0.0, 2.0, "pour milk"),)
    assert read(tmp_path, "a.json", json.dumps({"segments": [], "words": []})).captions == ()
    row = {"start": "00:00:01,500", "end": "0:02.5", "text": "pour"}
    assert read(tmp_path, "a.json", json.dumps([row])).captions == (Caption(1.5, 2.5, "pour"),)


@needs_data
def test_a_text_track_inside_a_video_is_read():
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


def test_of_several_text_tracks_the_one_of_the_wanted_language_is_read(tmp_path):
    write_media(tmp_path / "film.mp4", seconds=3.0)
    tracks = [("ger", "", "0"), ("eng", "", "forced"), ("eng", "Commentary", "0"), ("eng", "", "0")]
    options = ["-i", "film.mp4"]
    for number, (language, title, _) in enumerate(tracks):
        text = f"1\n00:00:00,500 --> 00:00:01,500\n{language}{title} {number}\n"
        (tmp_path / f"{number}.srt").write_text(text)
        options += ["-i", f"{number}.srt"]
    options += ["-map", "0:v", *(part for k in range(1, 5) for part in ("-map", f"{k}:s"))]
    for number, (language, title, flag) in enumerate(tracks):
        options += [f"-metadata:s:s:{number}", f"language={language}"]
        options += [f"-metadata:s:s:{number}", f"title={title}", f"-disposition:s:{number}", flag]
    run_ffmpeg(*options, "-c:v", "copy", "-c:s", "srt", "film.mkv", folder=tmp_path)
    eng, ger = ("eng 3", "track 4 of 4 (eng)"), ("ger 0", "track 1 of 4 (ger)")
    for language, wanted in (("en", eng), ("de", ger), ("fr", ger)):
        found = embedded_captions(tmp_path / "film.mkv", languages=[language])
        assert ([caption.text for caption in found.captions], found.choice) == (
            [wanted[0]],
            wanted[1],
        )


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


# --- sentences ------------------------------------------------------------------------------------

WHISPER = {
    "segments": [
        {"start": 0.0, "end": 3.0, "text": " First we open the", "words": [
            {"word": " First", "start": 0.1, "end": 0.4}, {"word": " we", "start": 0.4, "end": 0.6},
            {"word": " open", "start": 0.7, "end": 1.0}, {"word": " the", "start": 1.0, "end": 1.1}]},
        {"start": 3.0, "end": 9.0, "text": " door. Then pour.", "words": [
            {"word": " door.", "start": 1.2, "end": 1.6}, {"word": " Then", "start": 5.0, "end": 5.3},
            {"word": " pour.", "start": 5.3, "end": 5.8}]},
    ]
}  # fmt: skip


def sentences(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_subtitles(path, sentences=True)


def test_sentences_of_whisper_join_its_segments_at_the_times_of_their_words(tmp_path):
    got = sentences(tmp_path, "a.json", WHISPER)
    assert got.captions == (
        Caption(0.1, 1.6, "First we open the door."), Caption(5.0, 5.8, "Then pour."),
    )  # fmt: skip
    assert len(read(tmp_path, "b.json", json.dumps(WHISPER)).captions) == 2  # the segments


def test_a_word_that_whisperx_gives_no_time_lies_between_its_neighbours(tmp_path):
    words = [{"word": "In", "start": 1.0, "end": 1.2}, {"word": "2014"}, {"word": "we", "start": 2.0, "end": 2.2},
             {"word": "won."}]  # fmt: skip
    got = sentences(
        tmp_path, "a.json", {"segments": [{"start": 1.0, "end": 3.0, "text": "x", "words": words}]}
    )
    assert got.captions == (Caption(1.0, 3.0, "In 2014 we won."),)
    got = sentences(tmp_path, "b.json", {"word_segments": words})
    assert got.captions == (Caption(1.0, 2.2, "In 2014 we won."),) and got.dropped == 0


def test_sentences_of_youtubes_rolling_vtt_follow_the_times_in_the_lines(tmp_path):
    rolling = (
        "WEBVTT\n\n00:00.000 --> 00:02.000\n \nso today<00:00:00.500><c> we</c><00:00:00.800><c> are</c>\n\n"
        "00:02.000 --> 00:02.010\nso today we are\n \n\n"
        "00:02.010 --> 00:09.000\nso today we are\nmaking<00:00:02.500><c> pasta.</c><00:00:07.000><c> boil</c>\n\n"
        "00:09.000 --> 00:09.010\nmaking pasta. boil\n \n\n"
        "00:09.010 --> 00:12.000\nmaking pasta. boil\nwater\n"
    )  # fmt: skip
    got = sentences(tmp_path, "a.vtt", rolling)
    assert [(one.text, one.start) for one in got.captions] == [
        ("so today we are making pasta.", 0.0), ("boil", 7.0), ("water", 9.01),
    ]  # fmt: skip
    assert got.captions[0].end == 3.5  # a word lasts a second at most


def test_sentences_of_youtubes_json3_follow_the_offsets_of_its_words(tmp_path):
    events = [
        {"tStartMs": 1000, "dDurationMs": 4000, "segs": [
            {"utf8": "open", "tOffsetMs": 0}, {"utf8": " the", "tOffsetMs": 300},
            {"utf8": " door", "tOffsetMs": 600}]},
        {"tStartMs": 3000, "dDurationMs": 1000, "aAppend": 1, "segs": [{"utf8": "\n"}]},
        {"tStartMs": 3010, "dDurationMs": 2000, "segs": [{"utf8": "pour"}, {"utf8": " milk", "tOffsetMs": 500}]},
    ]  # fmt: skip
    got = sentences(tmp_path, "a.json", {"events": events})
    assert [(one.text, one.start) for one in got.captions] == [("open the door pour milk", 1.0)]
    assert got.captions[0].end == 4.51


def test_sentences_of_plain_srt_are_joined_across_cues_by_estimated_times(tmp_path):
    cues = "1\n00:00:00,000 --> 00:00:02,000\nnow we open\n\n2\n00:00:02,000 --> 00:00:04,000\nthe door. Then\n"
    got = sentences(tmp_path, "a.srt", cues)
    assert [one.text for one in got.captions] == ["now we open the door.", "Then"]
    assert got.captions[0].start == 0 and 3 < got.captions[0].end < 3.5


@pytest.mark.parametrize(
    "content",
    [
        '{"segments": [{"start": 0, "end": 1, "words": [{"word": 3, "start": 0, "end": 1}]}]}',
        '{"segments": [{"words": [{"word": "a"}]}, 7]}',
        '{"events": [{"tStartMs": 0, "segs": [{"utf8": "a", "tOffsetMs": "x"}]}]}',
        '{"events": [{"segs": 3}]}',
    ],
)
def test_sentences_of_damaged_rows_are_dropped_and_counted(tmp_path, content):
    got = sentences(tmp_path, "a.json", content)
    assert got.captions == () and got.dropped >= 1


def test_times_of_words_outside_their_cue_are_brought_back_into_it(tmp_path):
    cues = "WEBVTT\n\n00:01.000 --> 00:03.000\none<900000:00:00.000><c> two</c><00:00:00.000><c> three</c>\n"
    got = sentences(tmp_path, "a.vtt", cues)
    assert got.captions[0].start == 1.0
    assert all(1.0 <= one.start <= one.end <= 3.0 for one in got.captions)


def test_sentences_of_a_cue_of_very_many_lines_take_no_longer_than_they_must(tmp_path):
    got = sentences(tmp_path, "a.vtt", "WEBVTT\n\n00:00.000 --> 00:01.000\n" + "a\n" * 100_000)
    assert sum(len(one.text.split()) for one in got.captions) == 100_000


def test_embedded_text_gives_sentences_too(tmp_path):
    path = embed(tmp_path)
    said = [one.text for one in embedded_captions(path, sentences=True).captions]
    assert said == ["now we open the door.", "Then"]


def embed(tmp_path):
    (tmp_path / "s.srt").write_text(
        "1\n00:00:00,000 --> 00:00:01,000\nnow we open\n\n2\n00:00:01,000 --> 00:00:02,000\nthe door. Then\n"
    )
    write_media(tmp_path / "plain.mp4", seconds=2.0)
    command = [find_ffmpeg(None), "-loglevel", "error", "-i", tmp_path / "plain.mp4", "-i", tmp_path / "s.srt",
               "-c", "copy", "-c:s", "mov_text", tmp_path / "v.mp4"]  # fmt: skip
    subprocess.run(command, check=True)
    return tmp_path / "v.mp4"
