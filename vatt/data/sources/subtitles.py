"""Subtitle files -> captions: srt, vtt, json, and text tracks inside a video.

Each cue is read, repaired or dropped, and the last two are counted. We tried pysubs2 and srt:
they count nothing, and they lose or merge the cues of damaged files.
"""

import html
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path, PurePosixPath
from statistics import median
from typing import Any

import av
from av.stream import Disposition
from av.subtitles.stream import SubtitleStream

from vatt.data.clips.files import MEDIA, composed
from vatt.data.clips.manifest import LONGEST_TIME, Caption, CaptionFaults
from vatt.data.clips.media import open_media
from vatt.data.clips.quality import PAUSE_SECONDS, Word, sentences_of
from vatt.data.sources.textfiles import UNICODE, decode, decode_as, encoding_of, number, split_lines

SUFFIXES = (".srt", ".vtt", ".json", ".json3")
MAX_BYTES = 20 * 2**20  # a larger file is not subtitles
FEW = 3  # cues that begin as another ended, by chance
MAX_LINES = 8  # that a cue has in common with the one before: two or three are usual
LONG_SECONDS, LONG_WORDS = 10.0, 16  # a cue that has more of both is cut
LONGEST_WORD = 1.0  # seconds; a file that only says when words begin has pauses after them
ABSURD_WORD = 30  # seconds; words that are all so long have their times in milliseconds
_ASS = ("ass", "ssa")
_TEXT_TRACKS = ("mov_text", "subrip", "srt", "webvtt", "text", *_ASS)
ASS_FIELDS = 8  # of a line of an ass track, before its text

_TIME = r"(?:(\d{1,6})\s*:\s*)?(\d{1,3})\s*:\s*(\d{2})(?:\s*[.,]\s*(\d{1,9}))?"
_ARROW = "(?:-+\\s*>|[\u2013\u2014]+>|\u2192)"  # -->, also as word processors write it
_TIMES = re.compile(rf"\s*(-?){_TIME}\s*{_ARROW}\s*{_TIME}(?![\d:])(.*)", re.ASCII)
_LIKE_TIMES = re.compile(r"\s*\d+\s*:\s*\d+\s*:\s*\d+\s*[.,][\W\d]*$")
_FINE = r"((?:\d+:)?\d+:\d{1,2}[.,;]\d{1,3})"
# Times with another mark than an arrow between them.
_PAIR = re.compile(rf"[\W_]*{_FINE}\s*[^\w\s]+\s*{_FINE}[\W_]*$", re.ASCII)
_ONE_TIME = re.compile(rf"\s*{_TIME}\s*", re.ASCII)
_CLOCK = re.compile(r"\d\s*[:;.,]\s*\d")
_SETTINGS = re.compile(r"(?:\s+[A-Za-z]\w*:\S+)*\s*")  # of a cue: align:start, X1:40
_NUMBER = re.compile(r"\s*(\d{1,7})\s*", re.ASCII)
_COMMENT = re.compile(r"NOTE(?:\s.*)?|STYLE\s*|REGION\s*")
_INLINE_TIME = re.compile(rf"<{_TIME}>", re.ASCII)
_TAG = re.compile(  # of srt and vtt; `a <b and c> d` is said
    r"</?[A-Za-z][\w.-]*\s*/?>|<(?:v|c|lang)[\s.][^<>]*>|<[A-Za-z]\w*(?:\s+[\w-]+\s*=[^<>]*)>"
    r"|<[\d:.,]+>|\{\\[^{}]*\}"
)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NO_WIDTH = re.compile("[\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
_HALF = re.compile("[\ud800-\udfff]")  # a bad byte, or half a character of JSON
_DAMAGE = re.compile("[\ud800-\udfff\ufffd\0]")
_COLUMNS = ("start", "end", "text")
_SENTENCE_END = (".", "!", "?", "\u2026")


@dataclass(frozen=True, slots=True)
class Subtitles:
    """Captions in the order of time, and what was wrong with them."""

    captions: tuple[Caption, ...]
    faults: CaptionFaults = field(default_factory=CaptionFaults)
    choice: str = ""  # which text track was read, where a video has several

    @property
    def dropped(self) -> int:
        """Captions that could not be read."""
        return self.faults.dropped


Piece = tuple[float, list[str]]  # words, and when the first of them begins
MaybePiece = tuple[float | None, list[str]]  # the same, where that may be unknown
UNREADABLE = Subtitles((), CaptionFaults(dropped=1))


@dataclass(slots=True)
class _Cue:
    """A span and the lines that are said in it, without marks; of some lines, pieces with times."""

    start: float
    end: float
    repaired: bool = False
    lines: list[str] = field(default_factory=list)
    pieces: dict[str, list[MaybePiece]] = field(default_factory=dict)

    def add(self, lines: Iterable[str]) -> None:
        """Add what is said in lines of the file."""
        for line in lines:
            self.repaired = self.repaired or _DAMAGE.search(line) is not None
            if plain := _plain(line):
                self.lines.append(plain)
                if _INLINE_TIME.search(line):
                    self.pieces[plain] = list(_pieces(line))


def _pieces(line: str) -> Iterator[MaybePiece]:
    """The words of a line from each of its times to the next; those before the first have none."""
    at = 0
    start: float | None = None
    for match in _INLINE_TIME.finditer(line):
        yield start, _plain(line[at : match.start()]).split()
        at, start = match.end(), _seconds(match, 1)
    yield start, _plain(line[at:]).split()


def read_subtitles(path: Path, *, sentences: bool = False) -> Subtitles:
    """Read a file; what is malformed is counted, not raised.

    With `sentences`, captions are sentences by the times of their words, whatever the cues are.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            return UNREADABLE
        text, encoding = decode(path.read_bytes())
    except OSError:  # not ours to read
        return UNREADABLE
    text = text.lstrip("\ufeff")
    ending = path.suffix.lower()
    if ending.startswith(".json"):
        read = _from_json(text, path.stem, sentences)
    else:
        read = _from_cues(text, sentences, has_comments=ending == ".vtt")
    guessed = "" if encoding in UNICODE else encoding
    return Subtitles(read.captions, replace(read.faults, encoding=guessed))


# --- srt and vtt ----------------------------------------------------------------------------------


def _from_cues(text: str, sentences: bool, *, has_comments: bool) -> Subtitles:
    """A line of times begins each cue; empty lines may be missing, doubled or anywhere."""
    lines = split_lines(_NO_WIDTH.sub("", text))
    first = next((line for line in lines if line.strip()), "")
    is_vtt = first.strip().upper().startswith("WEBVTT")
    if has_comments and not is_vtt:
        lines = _without_comments(lines)
    cues, dropped = _cues(lines, is_vtt=is_vtt)
    if _INLINE_TIME.search(text) or _rolls(cues):
        cues = _unroll(cues)
    captions: list[Caption] = []
    repaired = sum(cue.repaired and bool(cue.lines) for cue in cues)
    if sentences:
        captions = sentences_of(word for cue in cues for word in _words_in(cue))
    else:
        for cue in cues:
            captions += _cut(cue.start, cue.end, " ".join(cue.lines))
    return Subtitles(_in_order(captions), CaptionFaults(dropped, repaired))


def _words_in(cue: _Cue) -> list[Word]:
    """The words of a cue by the times in its lines, or spread over the cue where it has none."""
    pieces: list[Piece] = [(cue.start, [])]
    for line in cue.lines:
        whole: list[MaybePiece] = [(None, line.split())]
        for start, words in cue.pieces.get(line, whole):
            if start is not None:
                pieces.append((min(max(start, pieces[-1][0]), cue.end), []))
            pieces[-1][1].extend(words)
    pieces = [piece for piece in pieces if piece[1]]
    if len(pieces) == 1:
        return _spread(pieces[0][1], cue.start, cue.end)
    return _since(pieces, cue.end)


def _since(pieces: Sequence[Piece], end: float) -> list[Word]:
    """The words of pieces that each last until the next one begins, but not for long."""
    ends = [start for start, _ in pieces[1:]] + [end]
    return [
        word
        for (start, words), until in zip(pieces, ends, strict=bool(pieces))
        for word in _spread(words, start, min(until, start + LONGEST_WORD * len(words)))
    ]


def _cues(lines: list[str], *, is_vtt: bool) -> tuple[list[_Cue], int]:
    """The cues in the order of the file, and how many could not be read."""
    starts = [at for at, line in enumerate(lines) if _is_times(line, after=lines[at - 1 : at])]
    if not starts:
        return [], int(not is_vtt and any(map(str.strip, lines)))
    bodies, dropped = (_vtt_bodies if is_vtt else _srt_bodies)(lines, starts)
    cues: list[_Cue] = []
    for at, body in zip(starts, bodies, strict=True):
        cue = _timed(lines[at])
        if cue is None:
            dropped += 1
        else:
            cue.add(body)
            cues.append(cue)
    return cues, dropped


def _is_times(line: str, *, after: Sequence[str]) -> bool:
    """Whether a cue begins here, though its times may be damaged; an arrow may be said, too."""
    if "-->" in line or "--&gt;" in line:
        is_first = not after or not after[0].strip() or _NUMBER.fullmatch(after[0])
        return bool(is_first or _CLOCK.search(line))
    return ":" in line and any(form.match(line) for form in (_TIMES, _LIKE_TIMES, _PAIR))


def _timed(line: str) -> _Cue | None:
    """The cue that begins with this line; None where its times cannot be known."""
    match = _TIMES.fullmatch(line)
    plain = line if match else _tidied(line)
    match = match or _TIMES.fullmatch(plain)
    if match is None:
        return None
    start, end = _seconds(match, 2), _seconds(match, 6)
    is_odd = plain != line or any(int(match[group]) > 59 for group in (3, 4, 7, 8))
    if match[1]:
        start = 0.0
    if not start < end <= LONGEST_TIME:
        return None
    cue = _Cue(start, end, repaired=bool(match[1]) or is_odd)
    if not _SETTINGS.fullmatch(match[10]):  # words in the line of the times
        cue.repaired = True
        cue.add([match[10]])
    return cue


def _tidied(line: str) -> str:
    """A line of times as it should be: other programs write 0:0:1,5, 00:00:01:500 or [00:01.0]."""
    plain = unicodedata.normalize("NFKC", line).replace("&gt;", ">").replace("\u060c", ",")
    if pair := _PAIR.match(plain):
        plain = f"{pair[1]} --> {pair[2]}".replace(";", ",")
    plain = re.sub(r"\[([^\[\]]*>[^\[\]]*)\]", r"\1 ", plain)
    plain = re.sub(r"(?<=:)(\d)(?=\s*[.,:\s])", r"0\1", plain)
    return re.sub(r"(:\d\d):(\d{3})(?!\d)", r"\1,\2", plain)


def _srt_bodies(lines: list[str], starts: list[int]) -> tuple[list[list[str]], int]:
    """The lines of each cue without the number of the next, and the cues that have no times."""
    numbers = [_number_before(lines, before, at) for before, at in pairwise([-1, *starts])]
    offsets = Counter(found[0] - place for place, found in enumerate(numbers) if found is not None)
    most = max(offsets.values(), default=0)
    is_numbered = numbers[0] is not None or most > len(starts) / 2
    for place, found in enumerate(numbers):
        if found is not None and _is_said(found, place, starts, lines, numbers, is_numbered):
            numbers[place] = None
    first = numbers[0][1] if numbers[0] else starts[0]
    dropped = int(any(map(str.strip, lines[:first])))  # words before all times
    bodies = []
    for place, (at, following) in enumerate(pairwise([*starts, len(lines)])):
        after = numbers[place + 1] if place + 1 < len(numbers) else None
        body = lines[at + 1 : after[1] if after else following]
        own = numbers[place]
        is_last = following == len(lines)
        body, lost = _without_lost_cues(body, own[0] if own else None, is_last=is_last)
        dropped += lost
        bodies.append(body)
    return bodies, dropped


def _is_said(
    found: tuple[int, int],
    place: int,
    starts: Sequence[int],
    lines: Sequence[str],
    numbers: Sequence[tuple[int, int] | None],
    is_numbered: bool,
) -> bool:
    """Whether a number belongs to the words of the cue before: it may be all that is said."""
    if not is_numbered:
        return found[0] != place + 1
    before = numbers[place - 1] if place else None
    if place == 0 or (before is not None and found[0] == before[0] + 1):
        return False
    has_words = any(map(str.strip, lines[starts[place - 1] + 1 : found[1]]))
    return not has_words and found[0] != place + 1


def _number_before(lines: list[str], before: int, at: int) -> tuple[int, int] | None:
    """A cue's number and its line; it may be doubled, with empty lines below it."""
    place = at - 1
    while place > before and not lines[place].strip():
        place -= 1
    match = _NUMBER.fullmatch(lines[place]) if place > before else None
    if match is None:
        return None
    if place - 1 > before and lines[place - 1].strip() == lines[place].strip():
        place -= 1
    return int(match[1]), place


def _without_lost_cues(body: list[str], own: int | None, *, is_last: bool) -> tuple[list[str], int]:
    """A cue's lines up to the next number: that begins a cue whose times are lost."""
    kept, lost = len(body), 0
    if own is None:
        return body, 0
    for place in range(1, len(body) - 1):
        is_alone = not body[place - 1].strip() and body[place + 1].strip()
        if is_alone and body[place].strip() == str(own + lost + 1):
            kept = min(kept, place)
            lost += 1
    if is_last:  # the file may end within a cue
        last = next((k for k in range(len(body) - 1, 0, -1) if body[k].strip()), 0)
        if last > 1 and not body[last - 1].strip() and body[last].strip() == str(own + lost + 1):
            return body[: min(kept, last)], lost + 1
    return body[:kept], lost


def _vtt_bodies(lines: list[str], starts: list[int]) -> tuple[list[list[str]], int]:
    """The lines of each cue without the name of the next one and without comments."""
    first = starts[0]
    is_named = first > 1 and bool(lines[first - 1].strip()) and not lines[first - 2].strip()
    bodies = []
    for at, following in pairwise([*starts, len(lines)]):
        body = lines[at + 1 : following]
        named = following < len(lines) and len(body) > 1 and bool(body[-1].strip())
        has_words = is_named or any(map(str.strip, body[:-1]))
        if named and (_NUMBER.fullmatch(body[-1]) or (has_words and not body[-2].strip())):
            del body[-1]
        bodies.append(_without_comments(body))
    return bodies, 0


def _without_comments(lines: list[str]) -> list[str]:
    """Without the blocks NOTE, STYLE and REGION, which end at an empty line."""
    kept: list[str] = []
    is_comment, before = False, "-"
    for line in lines:
        if not line.strip():
            is_comment = False
        elif not before.strip() and _COMMENT.fullmatch(line):
            is_comment = True
        if not is_comment:
            kept.append(line)
        before = line
    return kept


def _rolls(cues: Sequence[_Cue]) -> bool:
    """Whether a third of the cues begin with the last line of the one before and say more.

    So do automatic captions that were turned into srt, where their inline times are lost.
    """
    again = sum(
        len(cue.lines) > 1 and bool(before.lines) and cue.lines[0] == before.lines[-1]
        for before, cue in pairwise(cues)
    )
    return again >= max(len(cues) / 3, FEW)


def _unroll(cues: list[_Cue]) -> list[_Cue]:
    """Automatic captions roll: each cue begins with the lines that the one before ended with."""
    kept = []
    before: list[str] = []
    for cue in cues:
        lines = cue.lines
        repeated = max(
            (
                k
                for k in range(min(len(lines), len(before), MAX_LINES) + 1)
                if before[-k or None :][:k] == lines[:k]
            ),
            default=0,
        )
        if lines[repeated:]:
            kept.append(replace(cue, lines=lines[repeated:]))
        before = lines or before
    return kept


# --- json -----------------------------------------------------------------------------------------


def _from_json(text: str, name: str, sentences: bool) -> Subtitles:
    """Captions as HowTo100M, Whisper, WhisperX, whisper.cpp, YouTube and others write them."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return UNREADABLE
    if isinstance(record, dict) and isinstance(record.get(name), (dict, list)):
        record = record[name]
    rows = _rows_of(record) if isinstance(record, dict) else record
    if not isinstance(rows, list):
        return UNREADABLE
    found: list[Any] = []  # captions, or words of sentences
    dropped = repaired = 0
    read: Callable[[dict[str, Any]], list[Any] | None] = _timed_words if sentences else _captions_of
    for row in rows:
        said = read(row) if isinstance(row, dict) else None
        if said is None:
            dropped += 1
        elif said:
            found += said
            repaired += _is_repaired(row)
    captions = sentences_of(found) if sentences else found
    return Subtitles(_in_order(captions), CaptionFaults(dropped, repaired))


def _rows_of(record: dict[str, Any]) -> Any:
    """The list of captions in an object; None where there is none."""
    columns = [record[key] for key in _COLUMNS if isinstance(record.get(key), list)]
    if len(columns) == len(_COLUMNS):
        if len({len(column) for column in columns}) > 1:  # the lists cannot be matched
            return [None] * max(map(len, columns))
        return [dict(zip(_COLUMNS, row, strict=True)) for row in zip(*columns, strict=True)]
    names = ("segments", "chunks", "transcription", "events", "words", "word_segments")
    lists = [key for key in names if isinstance(record.get(key), list)]
    key = next((key for key in lists if record[key]), lists[0] if lists else None)
    if key in ("words", "word_segments"):
        return [{"words": _in_seconds(record[key])}]
    return None if key is None else record[key]


def _in_seconds(words: list[Any]) -> list[Any]:
    """Words whose times are milliseconds, as AssemblyAI has them, in seconds."""
    times = [
        (word["start"], word["end"])
        for word in words
        if isinstance(word, dict)
        and all(type(word.get(end)) is int and 0 <= word[end] < 10**9 for end in ("start", "end"))
    ]
    if not times or len(times) < len(words) or median(b - a for a, b in times) < ABSURD_WORD:
        return words
    spans = ({"start": start / 1000, "end": end / 1000} for start, end in times)
    return [word | span for word, span in zip(words, spans, strict=True)]


def _captions_of(row: dict[str, Any]) -> list[Caption] | None:
    """The captions of a row, none where nothing is said; None where it cannot be read."""
    words = _words_of(row.get("words"))
    text = row.get("text")
    if isinstance(row.get("segs"), list):  # of YouTube
        parts = (part.get("utf8") for part in row["segs"] if isinstance(part, dict))
        text = "".join(part for part in parts if isinstance(part, str))
    elif "tStartMs" in row:  # only the position of the words
        return []
    if text is None and words:
        return _grouped(words)
    span = _span(row)
    if span is None or not isinstance(text, str):
        return None
    return _cut(*span, _plain(text), words)


def _timed_words(row: dict[str, Any]) -> list[Word] | None:
    """The words of a row with their own times where it has them, else spread over its span."""
    span, given = _span(row), row.get("words")
    if isinstance(row.get("segs"), list):
        return _words_of_segments(row["segs"], span)
    if isinstance(given, list):
        spans = [one for word in given if isinstance(word, dict) and (one := _span(word))]
        if span is None and spans:
            span = spans[0][0], spans[-1][1]
        if words := _words_of(given, within=span):
            return words
    captions = _captions_of(row)
    if captions is None:
        return None
    return [word for one in captions for word in _spread(one.text.split(), one.start, one.end)]


def _words_of_segments(segments: list[Any], span: tuple[float, float] | None) -> list[Word] | None:
    """The words of YouTube's json3, whose times count from the start of their row."""
    if span is None:
        return None
    pieces: list[Piece] = []
    for part in segments:
        if isinstance(part, dict) and isinstance(part.get("utf8"), str):
            since = span[0] + (_time(part.get("tOffsetMs", 0), 0.001) or 0.0)
            least = pieces[-1][0] if pieces else span[0]
            if words := _plain(part["utf8"]).split():
                pieces.append((min(max(since, least), span[1]), words))
    return _since(pieces, span[1])


def _span(row: dict[str, Any]) -> tuple[float, float] | None:
    """Start and end in seconds."""
    start, end, length = row.get("start"), row.get("end"), row.get("duration", row.get("dur"))
    unit = 1.0
    if isinstance(row.get("timestamp"), list) and len(row["timestamp"]) == 2:
        start, end = row["timestamp"]
    elif isinstance(row.get("offsets"), dict):
        start, end, unit = row["offsets"].get("from"), row["offsets"].get("to"), 0.001
    elif "tStartMs" in row:
        start, length, unit = row["tStartMs"], row.get("dDurationMs"), 0.001
    first, last, lasting = (_time(value, unit) for value in (start, end, length))
    if last is None and first is not None and lasting is not None:
        last = first + lasting
    if first is None or last is None or not max(first, 0.0) < last <= LONGEST_TIME:
        return None
    return max(first, 0.0), last


def _time(value: Any, unit: float = 1.0) -> float | None:
    """Seconds, of a number or a text of one; None for anything else."""
    try:
        seconds = number(value, "time") if isinstance(value, str) else value
    except ValueError:
        match = _ONE_TIME.fullmatch(value)
        return _seconds(match, 1) if match else None
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        return None
    return seconds * unit if abs(seconds) <= LONGEST_TIME / unit else None


def _is_repaired(row: dict[str, Any]) -> bool:
    start, text = row.get("start"), row.get("text")
    is_odd = isinstance(start, str) or (isinstance(start, (int, float)) and start < 0)
    return is_odd or (isinstance(text, str) and _DAMAGE.search(text) is not None)


def _words_of(words: Any, *, within: tuple[float, float] | None = None) -> list[Word] | None:
    """Words with their times; None where any of them lacks one.

    In a row of a known span, such words share the time between their neighbours, as WhisperX has
    no time for a number.
    """
    if not isinstance(words, list) or not all(isinstance(word, dict) for word in words):
        return None
    found: list[Word] = []
    waiting: list[str] = []  # words without a time
    for word in words:
        text, span = word.get("word", word.get("text")), _span(word)
        if not isinstance(text, str) or (span is None and within is None):
            return None
        if span is None:
            waiting += _plain(text).split()
            continue
        if waiting and within is not None:
            found += _between(waiting, found, within, until=span[0])
            waiting = []
        found += [(part, *span) for part in _plain(text).split()]
    if waiting and within is not None:
        found += _between(waiting, found, within, until=within[1])
    return found


def _between(
    words: Sequence[str], before: Sequence[Word], within: tuple[float, float], *, until: float
) -> list[Word]:
    start = before[-1][2] if before else within[0]
    return _spread(words, min(start, until), until)


# --- a track inside a video -----------------------------------------------------------------------


def embedded_captions(
    path: Path, *, sentences: bool = False, languages: Sequence[str] = ()
) -> Subtitles:
    """The text track inside a video, of several the best by language and flags, as of files.

    There are no captions where there is no track or the file is broken.
    """
    if not path.is_file():
        return Subtitles(())
    found: list[tuple[float, float, bytes]] = []
    dropped, choice = 0, ""
    try:
        with open_media(path) as container:
            # A track of an unknown kind has no codec at all.
            tracks = [
                track
                for track in container.streams.subtitles
                if track.codec_context is not None and track.codec_context.name in _TEXT_TRACKS
            ]
            best = min(tracks, key=lambda track: _rank(_tags_of(track), languages), default=None)
            if best is not None and len(tracks) > 1:
                choice = f"track {tracks.index(best) + 1} of {len(tracks)}"
                choice += f" ({best.language})" if best.language else ""
            for cue in _cues_in(container, best) if best is not None else ():
                found.append(cue)
    except (av.FFmpegError, ValueError):
        dropped = int(bool(found))  # what came before the damage stays
    encoding = encoding_of(b"\n".join(data for _, _, data in found))
    captions: list[Caption] = []
    repaired = 0
    for start, end, data in found:
        text = decode_as(data, encoding)
        if not max(start, 0.0) < end <= LONGEST_TIME:
            dropped += 1
            continue
        plain = _plain(" ".join(split_lines(text)))
        repaired += bool(plain) and (start < 0 or _DAMAGE.search(text) is not None)
        whole = [Caption(max(start, 0.0), end, plain)] if plain else []
        captions += whole if sentences else _cut(max(start, 0.0), end, plain)
    if sentences:
        captions = sentences_of(
            word for one in captions for word in _spread(one.text.split(), one.start, one.end)
        )
    guessed = "" if encoding in UNICODE else encoding
    return Subtitles(_in_order(captions), CaptionFaults(dropped, repaired, guessed), choice)


def _tags_of(track: SubtitleStream) -> list[str]:
    """What a track says of its words: its flags and title, and its language last."""
    flags = {
        "forced": track.disposition & Disposition.forced,
        "commentary": track.disposition & Disposition.comment,
        "sdh": track.disposition & Disposition.hearing_impaired,
    }
    title = re.findall(r"\w+", track.metadata.get("title", "").lower())
    words = [word for word in title if word in FLAGS or (len(word) > 3 and word in LANGUAGES)]
    named = [flag for flag, is_set in flags.items() if is_set]
    return [*words, *named, *([track.language.lower()] if track.language else [])]


def _cues_in(
    container: av.container.InputContainer, track: SubtitleStream
) -> Iterator[tuple[float, float, bytes]]:
    zero = (container.start_time or 0) / 1e6
    kind = track.codec_context.name
    for packet in container.demux(track):
        data = bytes(packet)
        if packet.pts is None or not packet.duration or not data:
            continue
        if kind == "mov_text":
            data = data[2 : 2 + int.from_bytes(data[:2], "big")]
        elif kind in _ASS:
            data = data.split(b",", ASS_FIELDS)[-1].replace(b"\\N", b"\n")
        start = float(packet.pts * packet.time_base) - zero
        yield start, start + float(packet.duration * packet.time_base), data


# --- captions -------------------------------------------------------------------------------------


def _cut(start: float, end: float, text: str, words: Sequence[Word] | None = None) -> list[Caption]:
    """One caption, or several where it is long: its first words are said far from its last."""
    said = text.split()
    if end - start <= LONG_SECONDS or len(said) <= LONG_WORDS:
        return [Caption(start, end, text)] if said else []
    if words is None or [word for word, _, _ in words] != said:
        words = _spread(said, start, end)
    return _grouped(words)


def _spread(words: Sequence[str], start: float, end: float) -> list[Word]:
    """Words with estimated times: every letter takes the same time."""
    a_letter = (end - start) / sum(len(word) + 1 for word in words)
    found = []
    for word in words:
        begun, start = start, start + (len(word) + 1) * a_letter
        found.append((word, begun, start))
    return found


def _grouped(words: Sequence[Word]) -> list[Caption]:
    """Captions of some words each, cut at a pause or after a sentence where there is one."""
    groups: list[list[Word]] = []
    for word in words:
        group = groups[-1] if groups else None
        is_whole = group is not None and len(group) >= LONG_WORDS / 2
        if (
            group is None
            or len(group) >= LONG_WORDS
            or word[1] - group[-1][2] > PAUSE_SECONDS
            or (is_whole and group[-1][0].endswith(_SENTENCE_END))
        ):
            groups.append([])
        groups[-1].append(word)
    return [
        Caption(round(group[0][1], 3), round(group[-1][2], 3), " ".join(word[0] for word in group))
        for group in groups
    ]


def _in_order(captions: Iterable[Caption]) -> tuple[Caption, ...]:
    return tuple(sorted(captions, key=lambda caption: (caption.start, caption.end, caption.text)))


def _seconds(match: re.Match[str], group: int) -> float:
    hours, minutes, seconds, fraction = (match.group(group + k) or "0" for k in range(4))
    return 3600 * int(hours) + 60 * int(minutes) + int(seconds) + float(f"0.{fraction}")


def _plain(line: str) -> str:
    """Words without tags, entities and invisible marks; a damaged byte becomes \ufffd."""
    text = _ENTITY.sub(lambda match: html.unescape(match[0]), _TAG.sub("", line))
    text = _HALF.sub("\ufffd", _NO_WIDTH.sub("", _CONTROL.sub(" ", text)))
    return " ".join(text.split())


# --- which video a file belongs to ----------------------------------------------------------------

_CODES = """
aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de
dv dz ee el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id
ie ig ii ik in io is it iu iw ja ji jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln
lo lt lu lv mg mh mi mk ml mn mo mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi
pl ps pt qu rm rn ro ru rw sa sc sd se sg sh si sk sl sm sn so sq sr ss st su sv sw ta te tg th ti
tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
afr alb amh ara arm aze bak baq bel ben bos bul bur cat ceb ces chi ckb cmn cze dan deu dut ell eng
epo est eus fao fas fil fin fra fre geo ger gle glg gre guj hat hau haw heb hin hmn hrv hun hye ice
ind isl ita jav jpn kan kat kaz khm kir kor kri kur lao lat lav lit ltz lus mac mai mal mao mar may
mis mkd mlg mlt mon msa mul mya nep nld nob nor nso nya ori pan per pol por pus que ron rum rus sat
sin slk slo slv sna som sot spa sqi srp sun swa swe tam tel tgk tha tib tur uig ukr und urd uzb vie
wel xho yid yor yue zho zul zxx
"""
LANGUAGES = dict(zip(_CODES.split(), _CODES.split(), strict=True)) | {
    "arabic": "ar", "chinese": "zh", "czech": "cs", "danish": "da", "deutsch": "de", "dutch": "nl",
    "english": "en", "espanol": "es", "español": "es", "finnish": "fi", "francais": "fr",
    "français": "fr", "french": "fr", "german": "de", "greek": "el", "hebrew": "he", "hindi": "hi",
    "hungarian": "hu", "italian": "it", "italiano": "it", "japanese": "ja", "korean": "ko",
    "chs": "zh", "cht": "zh", "jp": "ja", "中文": "zh", "日本語": "ja", "한국어": "ko",
    "русский": "ru", "українська": "uk", "português": "pt", "polski": "pl", "türkçe": "tr",
    "العربية": "ar", "हिन्दी": "hi", "ελληνικά": "el", "עברית": "he", "nederlands": "nl",
    "norwegian": "no", "polish": "pl", "portuguese": "pt", "romanian": "ro", "russian": "ru",
    "spanish": "es", "swedish": "sv", "turkish": "tr", "ukrainian": "uk", "vietnamese": "vi",
    "ara": "ar", "chi": "zh", "deu": "de", "eng": "en", "fra": "fr", "fre": "fr", "ger": "de",
    "ita": "it", "jpn": "ja", "kor": "ko", "por": "pt", "rus": "ru", "spa": "es", "zho": "zh",
}  # fmt: skip
FLAGS = {
    "asr", "auto", "autogenerated", "caption", "captions", "cc", "commentary", "default", "forced",
    "foreign", "full", "generated", "hi", "orig", "original", "sdh", "signs", "sub", "subs",
    "subtitle", "subtitles", "translated", "whisper",
}  # fmt: skip
PARTIAL = {"commentary", "forced", "foreign", "signs"}  # not all that is said
MACHINE_MADE = {"asr", "auto", "autogenerated", "generated", "translated"}
_LANGUAGE_TAG = re.compile(
    r"([a-z]{2,3})(?:[-_][a-z0-9_-]+)?"
)  # BCP 47, or YouTube's en-<track id>


Rank = tuple[bool, int, bool, int]


@dataclass(frozen=True, slots=True)
class SubtitleMatch:
    """Which subtitle files belong to which media, the best first."""

    of: Mapping[str, list[str]]
    unmatched: list[str]
    notes: list[str]


def match_subtitles(
    media: Sequence[str], texts: Sequence[str], languages: Sequence[str]
) -> SubtitleMatch:
    """talk.srt belongs to talk.mp4, and so do talk.es-419.vtt, talk.en.forced.srt, talk.mp4.srt.

    The longest name wins: `Vol. 2.srt` belongs to `Vol. 2.mp4` in any case.
    """
    exact: dict[str, list[str]] = {}
    folded: dict[str, list[str]] = {}
    for name in media:
        for key in (composed(name), composed(str(PurePosixPath(name).with_suffix("")))):
            exact.setdefault(key, []).append(name)
            folded.setdefault(key.casefold(), []).append(name)
    ranked: dict[str, list[tuple[Rank, str]]] = {}
    unmatched, guessed = [], []
    for text in texts:
        owners, tags = _owners_of(text, exact, folded)
        if not owners:
            unmatched.append(text)
        elif tags:
            guessed.append(f"{text} -> {PurePosixPath(owners[0]).name}")
        for name in owners:
            ranked.setdefault(name, []).append((_rank(tags, languages), text))
    best = {name: [text for _, text in sorted(found)] for name, found in ranked.items()}
    return SubtitleMatch(best, unmatched, _notes(guessed, ranked, best, languages))


def _notes(
    guessed: Sequence[str],
    ranked: Mapping[str, list[tuple[Rank, str]]],
    best: Mapping[str, list[str]],
    languages: Sequence[str],
) -> list[str]:
    notes = []
    if guessed:
        more = f" and {len(guessed) - 1} more" if len(guessed) > 1 else ""
        notes.append(f"subtitle files found by a longer name: {guessed[0]}{more}")
    several = [name for name, found in ranked.items() if len({rank for rank, _ in found}) > 1]
    if several:
        taken, other = best[several[0]][:2]
        notes.append(
            f"several subtitle files for {len(several)} files: {taken} is read, not {other}; "
            "set data.caption_languages to change this"
        )
    foreign = [name for name, found in ranked.items() if min(found)[0][1] > len(languages) > 0]
    if foreign:
        notes.append(
            f"{len(foreign)} files have subtitles in other languages only: {best[foreign[0]][0]} "
            "is read; set data.caption_languages to change this"
        )
    return notes


def _owners_of(
    text: str, exact: Mapping[str, list[str]], folded: Mapping[str, list[str]]
) -> tuple[list[str], list[str]]:
    """The media that a subtitle file belongs to, and what its name says beyond theirs."""
    stem = composed(str(PurePosixPath(text).with_suffix("")))
    tags: list[str] = []
    while True:
        owners = exact.get(stem) or folded.get(stem.casefold())
        if owners:
            return owners, tags
        for separator in (".", "_", " ", "-"):
            head, _, tag = stem.rpartition(separator)
            tag = tag.strip("[]() ").lower()
            is_mark = not tag.strip("-_ ") and separator == " "  # of `talk - English`
            if head and not head.endswith("/") and (is_mark or _is_tag(tag, after=separator)):
                break
        else:
            return [], []
        stem = head.rstrip()
        tags += [] if is_mark else [tag]


def _is_tag(tag: str, *, after: str) -> bool:
    """Whether a part of a name speaks of the words; only a dot may separate more than languages."""
    if after != ".":
        return _language(tag) is not None and tag not in FLAGS
    ending = f".{tag}"
    return _language(tag) is not None or tag in FLAGS or ending in MEDIA or ending in SUFFIXES


def _language(tag: str) -> str | None:
    tag = re.sub(r"\s*\(.*", "", tag) or tag  # english (auto-generated)
    match = _LANGUAGE_TAG.fullmatch(tag)
    return LANGUAGES.get(match[1] if match else tag)


def _rank(tags: Sequence[str], languages: Sequence[str]) -> Rank:
    """The order of a file among several: a wanted language comes first."""
    spoken = [tag for tag in tags if _language(tag) is not None][-1:]
    wanted = [language.lower() for language in languages]
    places = [
        place
        for place, want in enumerate(wanted, start=1)
        for tag in spoken
        if tag == want or tag.startswith(f"{want}-") or _language(tag) == want
    ]
    place = min(places, default=len(wanted) + 1) if spoken else 0
    said = set(tags) - set(spoken)
    return bool(said & PARTIAL), place, bool(said & MACHINE_MADE), len(said)
