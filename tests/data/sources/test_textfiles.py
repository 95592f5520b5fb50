"""Texts in any encoding, lines with any ends, numbers and JSON that are absurd."""

import json

import pytest

from vatt.data.sources import textfiles
from vatt.data.sources.textfiles import (
    BAD_BYTE,
    csv_rows,
    decode,
    encoding_of,
    encoding_of_file,
    number,
    published_lines,
    read_json,
    text_lines,
)
from vatt.errors import DataError

SAID = {
    "gb18030": ("打开门", "倒牛奶", "今天我们来做一道菜，先把锅烧热。"),
    "big5": ("今天我們來做一道菜", "先把鍋燒熱"),
    "cp932": ("今日は料理を作ります", "まず鍋を温めてください"),
    "iso2022_jp_2": ("今日は料理を作ります", "まず鍋を温めてください"),
    "iso2022_kr": ("오늘은 요리를 해 보겠습니다", "문을 여세요"),
    "euc_jp": ("今日は料理を作ります", "まず鍋を温めてください"),
    "cp949": ("오늘은 요리를 해 보겠습니다", "문을 여세요"),
    "cp1251": ("открой дверь", "налей молоко"),
    "koi8_r": ("открой дверь", "налей молоко"),
    "cp866": ("открой дверь", "налей молоко"),
    "cp1250": ("Otevřete dveře, prosím", "Nalijte mléko do šálku žluťoučký"),
    "iso8859_2": ("Dzień dobry, dzisiaj będziemy gotować pyszną zupę", "źdźbło żółte"),
    "cp1252": ("Café déjà vu", "über alles, señor", "it’s open"),
    "cp1253": ("άνοιξε την πόρτα", "ρίξε το γάλα"),
    "cp1254": ("Merhaba arkadaşlar bugün çok güzel bir yemek yapacağız", "soğanları doğrayalım"),
    "cp1255": ("שלום לכולם היום אנחנו הולכים לבשל ארוחה טעימה מאוד", "קודם כל נחתוך את הירקות"),
    "cp1256": ("افتح الباب", "اسكب الحليب"),
    "cp874": ("เปิดประตู", "เทนม"),
}


def subtitles(lines):
    cue = "{0}\n00:00:0{0},000 --> 00:00:0{1},000\n{2}\n\n"
    return "".join(cue.format(place, place + 1, line) for place, line in enumerate(lines))


@pytest.mark.parametrize("encoding", SAID)
def test_two_lines_are_enough_to_know_an_encoding(encoding):
    text = subtitles(SAID[encoding])
    assert decode(text.encode(encoding)) == (text, encoding)


@pytest.mark.parametrize(
    ("encoding", "word"),
    [
        ("gb18030", "打开门"), ("gb18030", "我爱你"), ("big5", "謝謝你"), ("cp949", "문을 여세요"),
        ("cp932", "ありがとう"), ("euc_jp", "水を入れる"), ("cp1251", "Привет"), ("koi8_r", "привет"),
        ("cp1252", "Café"), ("koi8_r", "Спасибо большое"), ("koi8_r", "Да"), ("cp1251", "ВНИМАНИЕ"),
        ("cp1255", "תודה רבה"), ("cp1253", "Γεια σου"), ("cp1256", "مرحبا"), ("cp866", "Привет"),
    ],
)  # fmt: skip
def test_one_short_caption_of_an_old_encoding_is_read(encoding, word):
    text = subtitles([word])
    assert decode(text.encode(encoding)) == (text, encoding)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("language", ["gb18030", "cp1251", "cp1252"])
def test_unicode_without_a_mark_is_known_by_its_zeros(encoding, language):
    text = subtitles(SAID[language])
    assert decode(text.encode(encoding)) == (text, encoding)


@pytest.mark.parametrize("place", range(0, 120, 7))
def test_one_bad_byte_garbles_no_other_character(place):
    text = subtitles(["naïve café", "señor, über alles", "cut off café"])
    damaged = bytearray(text.encode())
    damaged[place] = 0xE9
    got, encoding = decode(bytes(damaged))
    assert encoding == "utf-8"
    same = sum(one == other for one, other in zip(got, text, strict=False))
    tail = len(text) - text.encode()[:place].decode(errors="ignore").__len__() - 2
    assert got[-tail:] == text[-tail:] and same >= len(
        text.encode()[:place].decode(errors="ignore")
    )


def test_zeros_at_the_end_as_a_crash_leaves_them_are_not_utf_16():
    assert encoding_of("1\nüber\n".encode() + bytes(4096)) == "utf-8"


def test_a_bad_byte_far_behind_in_a_long_file_does_not_change_how_it_is_read(tmp_path):
    row = "http://a/b,schöne Grüße\n".encode()
    (tmp_path / "l").write_bytes(row * 200_000 + b"\xff\n" + row)
    lines = [line for _, line in text_lines(tmp_path / "l")]
    assert len(lines) == 200_002 and lines[0] == lines[-1] == row.decode().strip()
    assert BAD_BYTE.fullmatch(lines[-2])


def test_an_accent_behind_a_megabyte_of_ascii_is_found(tmp_path):
    (tmp_path / "l").write_bytes(b"plain\n" * 300_000 + "café déjà\n".encode("cp1252"))
    assert encoding_of_file(tmp_path / "l") == "cp1252"
    assert [line for _, line in text_lines(tmp_path / "l", "cp1252")][-1] == "café déjà"


def test_a_mark_of_utf_16_within_a_file_is_damage(tmp_path):
    (tmp_path / "l").write_bytes(b"\0one\n\xff\xfetwo\n")
    assert [line for _, line in text_lines(tmp_path / "l")] == ["\0one", "\udcff\udcfetwo"]


def test_a_published_list_with_a_bad_byte_is_refused_by_line(tmp_path):
    (tmp_path / "l.csv").write_bytes(b"video_id\nabc\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"l\.csv:3: a byte that is not UTF-8"):
        list(csv_rows(tmp_path / "l.csv", ["video_id"]))
    with pytest.raises(DataError, match=r"l\.csv:3: a byte that is not UTF-8"):
        list(published_lines(tmp_path / "l.csv"))


def test_a_character_at_the_border_of_two_blocks_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(textfiles, "BLOCK", 7)
    text = "äöü\r\n打开门\r\r\nend\rlast\n\r\n"
    (tmp_path / "l").write_bytes(text.encode())
    assert list(text_lines(tmp_path / "l")) == [
        (1, "äöü"), (2, "打开门"), (3, "end"), (4, "last"), (5, ""),
    ]  # fmt: skip


def test_a_line_without_end_takes_bounded_memory(tmp_path):
    (tmp_path / "l").write_bytes(b"a" * 5_000_000 + b"\nb\n" + b"\r" * 100_000)
    lines = [line for _, line in text_lines(tmp_path / "l")]
    assert textfiles.LONGEST_LINE < len(lines[0]) < 2 * textfiles.LONGEST_LINE + 2
    assert lines[1] == "b"


def test_column_names_may_be_in_another_case_and_behind_a_mark(tmp_path):
    (tmp_path / "l.csv").write_text("\ufeffVIDEO_ID , Label\nx, y\n")
    assert list(csv_rows(tmp_path / "l.csv", ["video_id"])) == [
        (2, {"video_id": "x", "Label": "y"})
    ]


@pytest.mark.parametrize(
    "text", ["nan", "inf", "1e400", "1_0", "", "1,5", "0x10", "١٢", "-1e8", "9" * 5000]
)
def test_absurd_numbers_are_refused(text):
    with pytest.raises(ValueError, match=r"start .* is not a number of seconds"):
        number(text, "start")


def test_plain_numbers_are_read():
    assert [number(text, "x") for text in ("1", " 2.5", "3.", ".5", "1e2", "-1")] == [
        1,
        2.5,
        3,
        0.5,
        100,
        -1,
    ]


@pytest.mark.parametrize(
    "content", [b"{", b"[" * 100_000, b"\xff", b"1" * 5000, json.dumps([1]).encode()[:-1]]
)
def test_broken_json_is_named(tmp_path, content):
    (tmp_path / "o.json").write_bytes(content)
    with pytest.raises(DataError, match=r"o\.json is broken"):
        read_json(tmp_path / "o.json")
