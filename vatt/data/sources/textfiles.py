"""Text files from anywhere: their encoding, their lines, and rows of csv and JSON in them."""

import codecs
import csv
import json
import logging
import math
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from charset_normalizer import from_bytes

from vatt.data.clips.manifest import LONGEST_TIME
from vatt.errors import DataError

BLOCK = 2**20  # characters or bytes read at once
SAMPLE = 2**16  # bytes that an encoding is guessed from
LONGEST_LINE = 2**20  # characters; the rest of a longer line is not read
MOST_LINES = 100  # of one field in quotes
MAX_JSON = 48 * 2**20  # bytes; in memory it may take 35 times as much
SHOWN = 10  # faults named in the message
MANGLED = "get the official file again, and keep spreadsheet programs away from it"

_LINE_END = re.compile(r"\r{0,2}\n|\r")  # \r\r\n comes from converting a text twice
_NUMBER = re.compile(r"[+-]?(?:\d{1,20}(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?", re.ASCII)
_SHIFTS = re.compile(rb"\x1b\$(?:[@-BD]|\([CD]|\)C)")  # to Japanese or Korean, in seven bits
_NOT_ASCII = re.compile(rb"[^\r\n]*[\x80-\xff][^\r\n]*")
BAD_BYTE = re.compile("[\udc80-\udcff]")  # how `surrogateescape` writes a byte that has no meaning

log = logging.getLogger(__name__)


# --- the encoding ---------------------------------------------------------------------------------

_MARKS = {  # those of UTF-32 first: that of UTF-16 is a part of it
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
UNICODE = {"utf-8", *_MARKS.values(), "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"}
_LATIN = ["cp1252", "cp1250", "iso8859_2", "cp1254"]
_OTHERS = ["gb18030", "big5", "cp932", "euc_jp", "cp949", "cp1251", "cp1253", "cp1255", "cp1256",
           "cp874", "koi8_r", "cp866"]  # fmt: skip
_WESTERN = set("àáâãäåæçèéêëìíîïñòóôõöøùúûüßœ‘’“”„…–—«»¿¡°€")  # frequent in cp1252
_KANA = {*map(chr, range(0x3041, 0x30FF))}
_COMMON = {  # frequent signs: a few sentences contain some of them
    "gb18030": set(
        "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道"
        "行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无"
        "力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体政美相见被利什二等"
        "门打水今做菜热吃喝先走回给让叫快请爱她吗吧呢啊谢再加放火锅油盐切倒"
    ),
    "big5": set(
        "的一是不了在人有我他這個們中來上大為和國地到以說時要就出會可也你對生能而子那得於著下自之年過發後作裡用道"
        "行所然家種事成方多經麼去法學如都同現當沒動面起看定天分還進好小部其些主樣理心她本前開但因只從想實日者意無力"
        "它與長把機十第此已情明性知全三又關點正外將兩高間由問很最重並物手應向頭文體美相見被什二等門打水今做菜熱吃喝"
        "先走回給讓叫快請愛嗎吧呢啊謝再加放火鍋油鹽切倒"
    ),
    "cp949": set(
        "이다에의는로하을가고지서한은기으년대사시를리도인스일있나아어게자수그것해들면요네까여보라니안주세우만제정거"
        "오내는과와습합입문물"
    ),
    "cp932": _KANA,
    "euc_jp": _KANA,
}
_CYRILLIC = set("оеаинтсрвлкмдпуяыі")
_LETTERS = {  # the most frequent letters of code pages with one byte a letter
    "cp1251": _CYRILLIC, "koi8_r": _CYRILLIC, "cp866": _CYRILLIC,
    "cp1253": set("αοιετσνηυρπκμλςάίόέ"),
    "cp1255": set("יוהלאמרתבשנדעכם"),
    "cp1256": set("اليمنورتبةعدسفهكحی"),
    "cp874": set("านรอกเงมยลวดทสตะปบคหแจพชขใไ่้ัิีืุู์ำ"),
}  # fmt: skip
_WORD = re.compile("[\u05d0-\u05ea]+|[\u0621-\u06d2]+|[\u0e01-\u0e5b]+")  # Hebrew, Arabic, Thai
# Half-width katakana, single Korean letters, frames, private characters: a sign of a wrong guess.
_ODD = re.compile("[\uff61-\uff9f\u3130-\u318f\u2500-\u259f\ue000-\uf8ff\x80-\x9f]")


def decode(data: bytes) -> tuple[str, str]:
    """A text and its encoding; each byte that means nothing in it becomes a `BAD_BYTE`."""
    encoding = encoding_of(data)
    return decode_as(data, encoding), encoding


def decode_as(data: bytes, encoding: str) -> str:
    """A text of a known encoding."""
    return data.decode(encoding, _on_errors(encoding))


def encoding_of(data: bytes) -> str:
    """The encoding of a text: by its mark, its zeros, as UTF-8 with few bad bytes, or a guess."""
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    encoding = encoding or _by_zeros(data)
    if encoding is None and data.isascii() and (match := _SHIFTS.search(data)):
        encoding = "iso2022_kr" if match[0].endswith(b")C") else "iso2022_jp_2"
    if encoding is None and _all_utf8([data]):
        encoding = "utf-8"
    return encoding or _by_sample([data])


def _by_zeros(data: bytes) -> str | None:
    """UTF-16 and UTF-32 without a mark: the high bytes of Latin letters and digits are zero."""
    words = len(data) // 4
    if words == 0 or b"\0" not in data:
        return None
    zeros = [data[place::4].count(0) for place in range(4)]
    if min(zeros[2:]) > 0.9 * words and zeros[0] < 0.1 * words:
        return "utf-32-le"
    if min(zeros[:2]) > 0.9 * words and zeros[3] < 0.1 * words:
        return "utf-32-be"
    even, odd = zeros[0] + zeros[2], zeros[1] + zeros[3]
    if max(even, odd) < max(0.2 * words, 4) or min(even, odd) > 0.25 * max(even, odd):
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def _is_utf8(sample: bytes) -> bool:
    """Whether it is UTF-8 but for few bytes: one damaged byte must not garble all others."""
    text = sample.decode("utf-8", "surrogateescape")
    bad = BAD_BYTE.findall(text)
    good = sum(letter > "\x7f" for letter in text) - len(bad)
    starts = sum(byte >= "\udcc0" for byte in bad)  # the other bytes only go on with a character
    return len(bad) <= good or (len(bad) <= min(2 * good, 3) and starts <= 1)


def _guess(sample: bytes) -> str:
    """A code page from before Unicode."""
    runs = re.findall(rb"[\x80-\xff]+", sample)
    # Languages written in Latin letters have one accent here and there.
    if sum(len(run) == 1 for run in runs) >= 0.6 * len(runs):
        return _guess_latin(sample)
    likely = [match.encoding for match in from_bytes(sample, cp_isolation=_OTHERS)]
    likely.sort(key=lambda name: -_likeness(sample.decode(name, "replace"), name))
    if likely and likely[0] in _LETTERS:
        likely = [*dict.fromkeys([*likely, *_LETTERS])]
        return max(_LETTERS, key=lambda name: (_usualness(sample, name), -likely.index(name)))
    return likely[0] if likely else "cp1252"


def _guess_latin(sample: bytes) -> str:
    likely = [match.encoding for match in from_bytes(sample, cp_isolation=_LATIN)]
    western = sample.decode("cp1252", "replace")
    other = next((name for name in likely if name != "cp1252"), None)
    if other is None or sample.decode(other, "replace") == western:
        return "cp1252"
    accents = [letter for letter in western.lower() if letter > "\x7f"]
    frequent = sum(letter in _WESTERN for letter in accents) >= 0.9 * len(accents)
    return "cp1252" if frequent and "cp1252" in likely else other


def _likeness(text: str, encoding: str) -> float:
    """How much a guess looks like its language: a few words are too short for the library."""
    letters = [letter for letter in text if letter > "\x7f"] or [""]
    oddness = len(_ODD.findall(text)) / len(letters)
    if encoding in _COMMON:
        common = sum(letter in _COMMON[encoding] for letter in letters)
        return round(common / len(letters) - oddness, 1)
    words = re.findall(r"[^\W\d_]+", text)
    plain = sum(_WORD.fullmatch(word) is not None or word[1:].islower() for word in words)
    weight = 0.3 if encoding == "cp874" else 0.4  # any bytes make Thai words
    return round(weight * plain / max(len(words), 1) - oddness, 1)


def _is_plain(word: str) -> bool:
    return not any(map(str.isupper, word[1:]))


def _usualness(sample: bytes, encoding: str) -> float:
    """The share of frequent letters; words of capitals, and capitals within words, count less."""
    text = sample.decode(encoding, "replace")
    letters = [letter for letter in text if letter > "\x7f"] or [""]
    frequent = sum(letter.lower() in _LETTERS[encoding] for letter in letters)
    words = re.findall(r"[^\W\d_]+", text)
    odd = sum((0.25 if word.isupper() else 1) for word in words if not _is_plain(word))
    return round(frequent / len(letters) - odd / max(len(words), 1), 2)


def _on_errors(encoding: str) -> str:
    has_units = encoding.startswith(("utf-16", "utf-32", "iso2022"))  # that are no single bytes
    return "replace" if has_units else "surrogateescape"


def encoding_of_file(path: Path) -> str:
    """The encoding of a file of any size."""
    with path.open("rb") as file:
        head = file.read(BLOCK)
        encoding = encoding_of(head)
        is_shifted = encoding.startswith("iso2022")
        if encoding == "utf-8" or (encoding not in UNICODE and not is_shifted):  # by the head alone
            file.seek(0)
            encoding = "utf-8"
            if not _all_utf8(iter(partial(file.read, BLOCK), b"")):
                file.seek(0)
                encoding = _by_sample(iter(partial(file.read, BLOCK), b""))
    return encoding


def _by_sample(blocks: Iterable[bytes]) -> str:
    """UTF-8 with few bad bytes or a guess, by the lines that are not plain ASCII."""
    sample = _sample(blocks)
    return "utf-8" if _is_utf8(sample) else _guess(sample)


def _all_utf8(blocks: Iterable[bytes]) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for block in blocks:
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _sample(blocks: Iterable[bytes]) -> bytes:
    """Lines that are not plain ASCII, of the whole file."""
    found = bytearray()
    for block in blocks:
        for match in _NOT_ASCII.finditer(block):
            found += match[0][:SAMPLE] + b"\n"
            if len(found) > SAMPLE:
                return bytes(found)
    return bytes(found)


# --- lines ----------------------------------------------------------------------------------------


def split_lines(text: str) -> list[str]:
    """The lines of a text, whatever ends them."""
    return _LINE_END.split(text)


def text_lines(path: Path, encoding: str | None = None) -> Iterator[tuple[int, str]]:
    """The lines of a file and their numbers, without their ends, in bounded memory.

    Without an encoding it must be Unicode: a published list in another encoding is damaged.
    """
    try:
        if encoding is None:
            encoding = encoding_of_file(path)
            encoding = encoding if encoding in UNICODE else "utf-8"
        with path.open(encoding=encoding, errors=_on_errors(encoding), newline="") as file:
            yield from enumerate(_lines(iter(partial(file.read, BLOCK), "")), start=1)
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing", hint="docs/data-sources.md says where to get it"
        ) from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}", hint="name a file that you may read"
        ) from None


def _lines(blocks: Iterable[str]) -> Iterator[str]:
    rest = ""
    for block in blocks:
        text = rest + block
        whole = text.rstrip("\r")  # its \n may come with the next block
        *lines, rest = _LINE_END.split(whole)
        yield from lines
        rest = rest[: LONGEST_LINE + 1] + text[len(whole) :][-2:]
    *lines, rest = _LINE_END.split(rest)
    yield from lines
    if rest:
        yield rest


def published_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a published list, which has no bad byte."""
    for number, line in text_lines(path):
        if not line.isascii() and BAD_BYTE.search(line):
            raise DataError(f"{path}:{number}: a byte that is not UTF-8", hint=MANGLED)
        yield number, line


# --- rows -----------------------------------------------------------------------------------------


class Faults:
    """Bad lines of a file; all of it is read, then they are named at once."""

    def __init__(self, path: Path, *, hint: str) -> None:
        self._path, self._hint = path, hint
        self._shown: list[tuple[int, str]] = []
        self.count = 0

    def add(self, line: int, problem: str) -> None:
        """Note what is wrong in a line."""
        self.count += 1
        if len(self._shown) < SHOWN:
            self._shown.append((line, f"{self._path}:{line}: {problem}"))

    def check(self) -> None:
        """Refuse the file if anything was wrong in it."""
        if self.count:
            more = self.count - len(self._shown)
            rest = [f"... and {more} more lines"] if more else []
            shown = [problem for _, problem in sorted(self._shown)]
            raise DataError("\n".join(shown + rest), hint=self._hint)


class _OpenQuoteError(ValueError):
    """A field in quotes that does not end in its line."""


def split_row(line: str, delimiter: str = ",") -> list[str]:
    """The fields of a line of csv; ValueError says what is wrong with it."""
    if len(line) > LONGEST_LINE:
        raise ValueError(f"the line is longer than {LONGEST_LINE:,} characters")
    if "\0" in line:
        raise ValueError("a NUL character is in it")
    if not line.isascii() and BAD_BYTE.search(line):
        raise ValueError("a byte that is not UTF-8 is in it")
    try:
        rows = csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True)
        return next(rows, [])
    except csv.Error as error:
        if str(error) == "unexpected end of data":
            raise _OpenQuoteError("a quote opens a field and no quote ends it") from None
        if "limit" in str(error):
            raise ValueError(
                f"a field is longer than {csv.field_size_limit():,} characters"
            ) from None
        raise ValueError('a field in "quotes" goes on after its closing quote') from None


def read_rows(
    lines: Iterator[tuple[int, str]],
    faults: Faults,
    *,
    delimiter: str = ",",
    begins_row: Callable[[str, str], bool] | None = None,
) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv file; a bad one is added to `faults`, and never affects others.

    A field in quotes may go on in the following lines if `begins_row` says
    that these are not rows: otherwise a forgotten quote would swallow all lines up to the next one.
    """
    ahead: deque[tuple[int, str]] = deque()
    while found := ahead.popleft() if ahead else next(lines, None):
        number, line = found
        if not line.strip():
            continue
        try:
            yield number, split_row(line, delimiter)
        except _OpenQuoteError as error:
            fields = begins_row and _continued(line, ahead, lines, delimiter, begins_row)
            if fields:
                yield number, fields
            else:
                faults.add(number, str(error))
        except ValueError as error:
            faults.add(number, str(error))


def _continued(
    line: str,
    ahead: deque[tuple[int, str]],
    lines: Iterator[tuple[int, str]],
    delimiter: str,
    begins_row: Callable[[str, str], bool],
) -> list[str] | None:
    """The fields of a row of several lines; None, and all these lines are `ahead`, if it is not."""
    opener = line
    for taken in range(MOST_LINES):
        if len(ahead) == taken:
            ahead.extend(islice(lines, 1))
        more = ahead[taken][1] if len(ahead) > taken else None
        if (
            more is None
            or begins_row(more, opener)
            or len(line) + len(more) > csv.field_size_limit()
        ):
            return None
        line = f"{line}\n{more}"
        try:
            fields = split_row(line, delimiter) if '"' in more else None
        except _OpenQuoteError:
            continue
        except ValueError:
            return None
        if fields:
            for _ in range(taken + 1):
                ahead.popleft()
            return fields
    return None


def csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a published csv file whose header names at least `columns`, with their lines."""
    faults = Faults(path, hint=MANGLED)
    rows = read_rows(text_lines(path), faults)
    line, header = next(rows, (1, []))
    faults.check()
    known = {name.casefold(): name for name in columns}
    header = [known.get(name.strip().casefold(), name.strip()) for name in header]
    missing = [name for name in columns if header.count(name) != 1]
    if missing:
        raise DataError(
            f"{path}:{line}: no column {', '.join(missing)} among {', '.join(header) or 'none'}",
            hint=MANGLED,
        )
    for line, row in rows:
        if len(row) == len(header):
            yield line, dict(zip(header, row, strict=True))
        else:
            faults.add(line, f"{len(row)} fields under {len(header)} column names")
    faults.check()


def number(value: str, what: str) -> float:
    """Seconds, from text; ValueError when it is not a number of seconds."""
    seconds = float(value) if _NUMBER.fullmatch(value.strip()) else math.nan
    if not abs(seconds) <= LONGEST_TIME:
        raise ValueError(f"{what} '{value[:40]}' is not a number of seconds")
    return seconds + 0.0  # of -0 and 0 the same


def read_json(path: Path, opened: Callable[..., Any] = Path.open) -> Any:
    """A published JSON file, read whole; `opened` is `gzip.open` for a compressed one."""
    try:
        with opened(path, "rb") as file:
            data = file.read(MAX_JSON + 1)
        if len(data) > MAX_JSON:
            raise ValueError(f"more than {MAX_JSON:,} bytes")
        return json.loads(data)
    except (ValueError, RecursionError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is broken: {error}", hint=MANGLED) from None
