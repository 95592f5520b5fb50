"""A list of addresses becomes clips; a bad row is named by its line and takes no other with it."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.corpus import TEST_DATA, demo_params, needs_data
from vatt.data.clips.files import ContentHashes, why_missing
from vatt.data.fetching.download import download
from vatt.data.sources.choice import list_doubts
from vatt.data.sources.urls import read_urls
from vatt.errors import DataError

PARAMS = demo_params(test_share=0.25)
REPORTED = Path(TEST_DATA or "/nowhere") / "reported"
ATTACK = Path(TEST_DATA or "/nowhere") / "attack"


def listed(tmp_path, text: str | bytes):
    path = tmp_path / "list.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(read_urls(path, PARAMS.data))


def test_a_list_of_addresses(tmp_path):
    clips = listed(
        tmp_path,
        "\ufeffurl,time_start,time_end,split,label,text,licence\r\n"
        'https://x.org/a.mp4,1,3.5,test,"arm, wrestling",two people,CC0\r\n'
        "https://x.org/b.mp4,,,,,,\r\n",
    )
    first, second = clips
    assert (first.start, first.end, first.split, first.licence) == (1.0, 3.5, "test", "CC0")
    assert first.labels == {"label": "arm, wrestling"} and first.captions[0].text == "two people"
    assert (second.start, second.end, second.labels, second.captions) == (0.0, None, {}, ())


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_column_names_may_stand_in_quotes(tmp_path, mark):
    lines = ['"url","label"', '"https://x.org/a.mp4","x"']
    [clip] = listed(tmp_path, "\n".join(lines).replace(",", mark))
    assert (clip.url, clip.labels) == ("https://x.org/a.mp4", {"label": "x"})


def test_paths_are_files_beside_the_list_or_on_a_mirror(tmp_path):
    (tmp_path / "b.mp4").touch()
    text = "path,label\na b.mp4,1\nb.mp4,2\n"
    assert [clip.url for clip in listed(tmp_path, text)] == ["folder:a b.mp4", "folder:b.mp4"]
    mirrored = PARAMS.data.model_copy(update={"base_urls": ("http://mirror",)})
    found = [clip.url for clip in read_urls(tmp_path / "list.csv", mirrored)]
    assert found == ["urls:a b.mp4", "folder:b.mp4"]


@needs_data
def test_each_file_of_a_list_ends_in_its_state(tmp_path):
    hostile = Path(TEST_DATA) / "hostile"
    for name in ("ok_reference.mp4", "zero_length.mp4"):
        (tmp_path / name).symlink_to(hostile / name)
    location = tmp_path / "list.csv"
    location.symlink_to(hostile / "manifests" / "missing_files.csv")
    params = demo_params(source="urls", location=location)
    clips = list(read_urls(location, params.data))
    counts = download(
        clips, params.data, params.machine, media=tmp_path / "media", ledger=tmp_path / "l"
    )
    assert counts == {"ok": 1, "not-found": 1, "corrupt": 1}


def test_youtube_ids_become_addresses(tmp_path):
    [video] = listed(tmp_path, "youtube_id,label\nabc_-12,x\n")
    assert video.url == "https://www.youtube.com/watch?v=abc_-12"


def test_clips_of_one_video_fall_in_one_split(tmp_path):
    rows = "".join(f"https://x.org/{k % 40}.mp4,{k},{k + 1}\n" for k in range(400))
    clips = listed(tmp_path, "url,start,end\n" + rows)
    splits = {}
    for clip in clips:
        splits.setdefault(clip.url, set()).add(clip.split)
    assert all(len(found) == 1 for found in splits.values())
    assert 3 <= sum(found == {"test"} for found in splits.values()) <= 18


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("path,label\n", "lists no clip"),
        ("name,label\na,b\n", "no column named url, path, youtube_id"),
        ("url\nfile:///etc/passwd\n", r"list.csv:2: .* not an http or https address"),
        ("url,start,end\nhttp://x/a,2,1\n", r"list.csv:2: the span from 2.0 to 1.0 is empty"),
        ("url,start\nhttp://x/a,zero\n", r"list.csv:2: start 'zero' is not a number"),
        ("url,start\nhttp://x/a,nan\n", "is not a number"),
        ("url\nhttp://x/a\nhttp://x/a\n", r"list.csv:3: the same clip as in line 2"),
        ("url,split\nhttp://x/a,other\n", "split 'other'"),
        ("url,label\nhttp://x/a,b,c\n", r"list.csv:2: 3 fields under 2 column names"),
        (b"url,text\nhttp://x/a,caf\xc3\xa9\nhttp://x/\xff,b\n", "csv:3: a byte that is not UTF-8"),
        ("url,url\nhttp://a/b,\n", "csv:1: two columns are called url"),
        ("url,time_start,start\nhttp://a/b,1,1\n", "two columns are called start"),
        ("url,\nhttp://a/b,x\n", "csv:2: 'x' is in a column without a name"),
        ("url,text\nhttp://a/b,x\0y\n", "csv:2: a NUL character"),
        ("url,text\nhttp://a/b," + "x" * 140_000, "csv:2: a field is longer than 131,072"),
        ("url,text\nhttp://a/b," + "x" * 2_000_000, "csv:2: the line is longer than"),
        ("url\nhttp://a:999999/b\n", "csv:2: Port out of range"),
        ("url\nhttp://a:xx/b\n", "csv:2: Port could not be cast"),
        ("url\nhttp://[::1\n", "csv:2: Invalid IPv6 URL"),
        ("url\nhttp://a\u2100/b\n", "csv:2: netloc"),
        ("url,start\nhttp://a/b,1e400\n", "start '1e400' is not a number"),
        ("url,start\nhttp://a/b,1_0\n", "start '1_0' is not a number"),
        ("url,start\nhttp://a/b,1e300\n", "start '1e300' is not a number"),
        ('url,text\nhttp://a/b,"he said "hi" twice"\n', 'csv:2: a field in "quotes" goes on'),
        ('"url,text\nhttp://a/b,x\n', "csv:1: a quote opens a field"),
        (
            "url,text\nhttp://a/b,x\n\ufeffURL,Text\nhttp://a/c,y\n",
            "csv:3: the column names once more",
        ),
        ("url\nhttp://me:S3C/RET@a:1/b\n", r"csv:2: Port could not be cast[^S]*$"),
        ("url\nhttp://me:S3 CRET@a/b\n", r"csv:2: the address has a space in it: write %20\s"),
        ("path\nhttp://a/b.mp4\n", "csv:2: .* is an address, not a path: call the column url"),
        ("path\nfile:///a/b.mp4\n", "csv:2: .* is an address, not a path: write the path alone"),
        ("path\n~/b.mp4\n", "csv:2: the path /.*/b.mp4 does not lie below"),
        ("path\n" + "x" * 300 + ".mp4\n", r"csv:2: the path x{40}\.\.\. is longer than a disk"),
        ("path\n" + "x/" * 3000 + ".mp4\n", "is longer than a disk allows"),
        ('path,text\na,"x\nb,y\nc,z"\n', "csv:2: a quote opens a field"),
        (
            "url\nhttps://youtu.be/abcdefghijk?t=3\nhttp://m.youtube.com/watch?a=b&v=abcdefghijk\n",
            "csv:3: the same clip as in line 2",
        ),
        ("path,start,end\na.mp4,-0,5\na.mp4,0,5\n", "csv:3: the same clip as in line 2"),
    ],
)
def test_bad_lists_name_the_line_and_the_fault(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        listed(tmp_path, text)
    assert caught.value.hint and caught.value.exit_code == 3


@pytest.mark.parametrize(
    "path",
    ["www.youtube.com/watch?v={}&list=x", "youtu.be/{}?si=abc", "youtube.com/shorts/{}",
     "www.youtube-nocookie.com/embed/{}?a=1", "youtube.com/live/{}", "music.youtube.com/watch?v={}"],
)  # fmt: skip
def test_a_video_of_youtube_has_one_address(tmp_path, path):
    [clip] = listed(tmp_path, f"url\nhttps://{path.format('Ab-_efghijk')}\n")
    assert clip.url == "https://www.youtube.com/watch?v=Ab-_efghijk"
    [other] = listed(tmp_path, "url\nhttps://youtube.com/@name/videos\n")
    assert other.url == "https://youtube.com/@name/videos"


def test_where_rows_name_a_test_split_no_other_row_is_drawn_for_it(tmp_path, caplog):
    rows = [f"{k}.mp4,{'TEST' if k < 3 else ''}\n" for k in range(40)]
    clips = listed(tmp_path, "path,split\n" + "".join(rows))
    assert [clip.split for clip in clips] == ["test"] * 3 + ["train"] * 37
    assert caplog.messages == [
        f"{tmp_path}/list.csv: 37 rows name no split: they are not for testing, as other rows are"
    ]


def test_columns_that_speak_of_time_are_labels_and_that_is_said(tmp_path, caplog):
    rows = "Path,Start Seconds,duration,end_ms,sometimes\na.mp4,1,2,3,4\n"
    [clip] = listed(tmp_path, rows)
    assert clip.start == 1.0 and set(clip.labels) == {"duration", "end_ms", "sometimes"}
    [said] = caplog.messages
    assert "labels: duration, end_ms;" in said and "columns start and end" in said


def test_a_list_that_was_appended_with_its_mark_is_read(tmp_path):
    clips = listed(tmp_path, "\ufeffpath,label\na.mp4,x\n\ufeffb.mp4,| y || z |\n")
    assert [(clip.url, clip.labels["label"]) for clip in clips] == [
        ("folder:a.mp4", "x"), ("folder:b.mp4", "y|z"),
    ]  # fmt: skip


def test_what_a_person_may_not_have_meant_is_said_of_a_list_as_of_a_folder(tmp_path):
    for name in ("a", "copy"):
        (tmp_path / f"{name}.mp4").write_text("the same")
    rows = ["a.mp4,train,Cat", "copy.mp4,test,cat", "lost.mp4,train,dog", "sub,train,dog"]
    (tmp_path / "sub").mkdir()
    (tmp_path / "list.csv").write_text("path,split,label\n" + "\n".join(rows * 1))
    data = PARAMS.data.model_copy(update={"source": "urls", "location": tmp_path / "list.csv"})
    clips = list(read_urls(tmp_path / "list.csv", data))
    lost, copies = list_doubts(clips, data, ContentHashes())[:2]
    assert lost == (
        f"2 of 4 files of the list are not there, among them {tmp_path}/lost.mp4: no such file"
    )
    assert copies == "1 files of test are copies of files of train"
    more = [replace(clip, clip_id=f"{clip.clip_id}-{k}") for k in range(2) for clip in clips]
    found = " ".join(list_doubts(more, data, ContentHashes()))
    assert "column label: different classes with nearly equal names: 'Cat' and 'cat'" in found
    assert "column label: 1 classes of test are not in train: cat" in found
    assert any(
        "no row is left for testing" in n for n in list_doubts(clips[2:], data, ContentHashes())
    )
    assert why_missing(tmp_path / "sub") == "a folder, not a file"


def texts(clips):
    return [clip.captions[0].text for clip in clips]


@needs_data
@pytest.mark.parametrize("name", ["quote.csv", "quote2.csv"])
def test_a_forgotten_quote_costs_its_own_row_alone(tmp_path, name):
    content = (REPORTED / "04_csv_unclosed_quote" / name).read_text()
    with pytest.raises(DataError) as caught:
        listed(tmp_path, content)
    assert str(caught.value).startswith(f"{tmp_path}/list.csv:3: a quote opens a field")
    assert ":4:" not in str(caught.value) and caught.value.exit_code == 3
    lines = content.splitlines(keepends=True)
    assert len(listed(tmp_path, "".join(lines[:2] + lines[3:]))) == 5


@needs_data
def test_a_large_list_with_a_forgotten_quote_is_refused_by_line():
    with pytest.raises(DataError, match=r"big\.csv:\d+: a quote opens a field"):
        list(read_urls(REPORTED / "04_csv_unclosed_quote" / "big.csv", PARAMS.data))


@pytest.mark.parametrize(
    "later",
    [
        'http://a/3,"a woman, waving"',
        '"http://a/3",rain',
        'http://a/3,a dog"',
        'http://a/3,""',
        'http://a/3,"a ""dog"""',
        'http://a/3,"',
    ],
)
def test_whatever_quotes_follow_a_forgotten_one_no_row_is_swallowed(tmp_path, later):
    rows = f'url,text\nhttp://a/1,"he says\nhttp://a/2,a cat\n{later}\nhttp://a/4,a bird\n'
    with pytest.raises(DataError, match=r"csv:2: a quote opens a field") as caught:
        listed(tmp_path, rows)
    assert "csv:3" not in str(caught.value) and "csv:5" not in str(caught.value)


def test_a_field_in_quotes_may_have_several_lines(tmp_path):
    rows = 'url,text\nhttp://a/1,"first, he\nsays ""hi""\n\nand goes"\nhttp://a/2,"b, c"\n'
    assert texts(listed(tmp_path, rows)) == ['first, he\nsays "hi"\n\nand goes', "b, c"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
def test_any_line_ends_give_the_same_rows_and_line_numbers(tmp_path, end):
    lines = ["url,text", "http://a/1,one", "", "http://a/2,two"]
    assert texts(listed(tmp_path, end.join(lines))) == ["one", "two"]
    with pytest.raises(DataError, match=r"csv:5: 1 fields under 2"):
        listed(tmp_path, end.join([*lines, "http://a/3"]))


@pytest.mark.parametrize(("mark", "named"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_other_separators_are_announced(tmp_path, caplog, mark, named):
    rows = "Path,Label,Start\na b.mp4,c,1.5\n".replace(",", mark)
    [clip] = listed(tmp_path, rows)
    assert (clip.url, clip.labels, clip.start) == ("folder:a b.mp4", {"Label": "c"}, 1.5)
    assert caplog.messages == [f"{tmp_path / 'list.csv'}: the fields are separated by {named}"]
    assert listed(tmp_path, f"sep={mark}\n{rows}") == [clip]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-16-be"])
def test_unicode_in_any_form_is_read_without_a_word(tmp_path, caplog, encoding):
    rows = "URL,Text\nhttp://a/1,żółw\nhttp://a/2,打开门\n"
    assert texts(listed(tmp_path, rows.encode(encoding))) == ["żółw", "打开门"]
    assert caplog.messages == []


def test_an_old_encoding_is_announced(tmp_path, caplog):
    rows = "url,text\nhttp://a/1,открой дверь\nhttp://a/2,налей молоко\n"
    assert texts(listed(tmp_path, rows.encode("cp1251"))) == ["открой дверь", "налей молоко"]
    assert len(caplog.messages) == 1 and "is read as cp1251" in caplog.messages[0]


@pytest.mark.parametrize(("name", "head"), [("a.mp4", b"\0\0\0 ftyp"), ("a.csv", b"PK\x03\x04"),
                                            ("a.csv.gz", b"\x1f\x8b\x08")])  # fmt: skip
def test_what_is_no_list_is_not_read_as_one(tmp_path, caplog, name, head):
    (tmp_path / name).write_bytes(head + bytes(range(256)))
    with pytest.raises(DataError, match=f"{name} is not a csv file"):
        list(read_urls(tmp_path / name, PARAMS.data))
    assert caplog.messages == []


HOSTILE = {  # the line that is refused and why; None: its one address is tried
    "url-badport": (2, "Port out of range"), "url-badport2": (2, "Port could not be cast"),
    "url-cr": None, "url-crmid": (3, "1 fields under 2"), "url-dupcol": (1, "two columns"),
    "url-file": (2, "not an http or https"), "url-id": (2, "may hold letters"),
    "url-internal": None, "url-ipv6": (2, "Invalid IPv6"), "url-latin": None,
    "url-long": (2, "longer than 131,072"), "url-nlcrlf": (2, "no quote ends it"),
    "url-nul": (2, "a NUL character"), "url-num": (2, "'1e400' is not a number"),
    "url-path": (2, "does not lie below"), "url-pathabs": (2, "does not lie below"),
    "url-pathnul": (2, "a NUL character"), "url-surlong": None,
    "url-unicode-url": (2, "invalid characters"), "url-userpw": None,
}  # fmt: skip


@needs_data
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_lists_are_read_or_refused_by_line(name):
    path = ATTACK / f"{name}.csv"
    if HOSTILE[name] is None:
        assert len(list(read_urls(path, PARAMS.data))) == 1
        return
    line, why = HOSTILE[name]
    with pytest.raises(DataError) as error:
        list(read_urls(path, PARAMS.data))
    assert f"{name}.csv:{line}: " in error.value.problem and why in error.value.problem
    assert error.value.hint


@needs_data
def test_every_hostile_list_is_tried():
    assert {path.stem for path in ATTACK.glob("url-*.csv")} == HOSTILE.keys()
