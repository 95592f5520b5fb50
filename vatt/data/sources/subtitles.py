"""Subtitle files -> captions: srt, vtt, json, and text tracks inside a video."""

import html
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import av
from av.subtitles.stream import SubtitleStream

from vatt.data.clips.files import MEDIA, composed
from vatt.data.clips.manifest import Caption
from vatt.data.clips.media import open_media

SUFFIXES = (".srt", ".vtt", ".json")
MAX_BYTES = 20 * 2**20  # a larger file is no subtitles
Cue = tuple[float, float, list[str]]  # start, end and lines
FEW = 3  # cues that begin as another ended, by chance
MAX_LINES = 8  # that a cue has in common with the one before: two or three are usual
_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{2})[.,](\d{1,3})"
_ARROW = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?")
_INLINE_TIME = re.compile(rf"<{_TIME}>")
_TAG = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")
_ASS = ("ass", "ssa")
_TEXT_TRACKS = ("mov_text", "subrip", "srt", "webvtt", "text", *_ASS)
ASS_FIELDS = 8  # of a line of an ass track, before its text


@dataclass(frozen=True, slots=True)
class Subtitles:
    """Captions in the order of time, and how many could not be read."""

    captions: tuple[Caption, ...]
    dropped: int = 0


def read_subtitles(path: Path) -> Subtitles:
    """Read a file; what is malformed is counted, not raised."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return Subtitles((), dropped=1)
        text = _decode(path.read_bytes())
    except OSError:  # not ours to read
        return Subtitles((), dropped=1)
    if path.suffix.lower() == ".json":
        return _from_json(text, path.stem)
    return _from_cues(text)


def _decode(data: bytes) -> str:
    for encoding in ("utf-8-sig", "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return data.decode("cp1252", errors="replace")


def _from_cues(text: str) -> Subtitles:
    """srt and vtt: a line with an arrow, then lines of words up to an empty one."""
    cues: list[Cue] = []
    dropped = 0
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n").replace("\r", "\n")):
        lines = block.strip("\n").split("\n")
        at = next((number for number, line in enumerate(lines) if "-->" in line), None)
        if at is None:
            continue
        match = _ARROW.fullmatch(lines[at])
        start, end = (_seconds(match, 1), _seconds(match, 5)) if match else (0.0, 0.0)
        if end <= start:
            dropped += 1
            continue
        cues.append((start, end, [_plain(line) for line in lines[at + 1 :]]))
    if _INLINE_TIME.search(text) or _rolls(cues):
        cues = _unroll(cues)
    captions = (Caption(start, end, " ".join(filter(None, lines))) for start, end, lines in cues)
    return Subtitles(_in_order(caption for caption in captions if caption.text), dropped)


def _rolls(cues: Sequence[Cue]) -> bool:
    """Whether a third of the cues begin with the last line of the one before and say more.

    So do automatic captions that were turned into srt, where their inline times are lost.
    """
    again = sum(
        len(lines) > 1 and bool(before) and lines[0] == before[-1]
        for (_, _, before), (_, _, lines) in pairwise(cues)
    )
    return again >= max(len(cues) / 3, FEW)


def _unroll(cues: list[Cue]) -> list[Cue]:
    """Automatic captions roll: each cue begins with the lines that the one before ended with."""
    kept = []
    before: list[str] = []
    for start, end, lines in cues:
        lines = [line for line in lines if line]
        repeated = max(
            (
                k
                for k in range(min(len(lines), len(before), MAX_LINES) + 1)
                if before[-k or None :][:k] == lines[:k]
            ),
            default=0,
        )
        if lines[repeated:]:
            kept.append((start, end, lines[repeated:]))
        before = lines or before
    return kept


def _from_json(text: str, name: str) -> Subtitles:
    """Lists of start, end and text (alone, or under the video's name), or a list of cues."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return Subtitles((), dropped=1)
    if isinstance(record, dict) and isinstance(record.get(name), (dict, list)):
        record = record[name]
    if isinstance(record, dict):
        columns = [record.get(key) for key in ("start", "end", "text")]
        if not all(isinstance(column, list) for column in columns):
            return Subtitles((), dropped=1)
        lengths = {len(column) for column in columns if column is not None}
        if len(lengths) != 1:
            return Subtitles((), dropped=max(lengths))
        rows: list[Any] = list(zip(*columns, strict=True))
    else:
        rows = [_row(cue) for cue in record] if isinstance(record, list) else [None]
    found = [_caption(row) for row in rows]
    captions = [caption for caption in found if caption is not None]
    return Subtitles(_in_order(captions), dropped=len(found) - len(captions))


def _row(cue: Any) -> Any:
    if not isinstance(cue, dict) or not isinstance(cue.get("start"), (int, float)):
        return None
    end = cue.get("end", cue["start"] + cue.get("duration", 0))
    return cue["start"], end, cue.get("text")


def _caption(row: Any) -> Caption | None:
    if row is None:
        return None
    start, end, text = row
    times = [time for time in (start, end) if isinstance(time, (int, float))]
    if len(times) < 2 or not all(map(math.isfinite, times)) or end <= start:
        return None
    if not isinstance(text, str) or not _plain(text):
        return None
    return Caption(float(start), float(end), _plain(text))


def embedded_captions(path: Path) -> Subtitles:
    """The first text track inside a video; none when there is none or it cannot be read."""
    if not path.is_file():
        return Subtitles(())
    try:
        with open_media(path) as container:
            # A track of a kind that nobody knows has no codec at all.
            tracks = [
                track
                for track in container.streams.subtitles
                if track.codec_context is not None and track.codec_context.name in _TEXT_TRACKS
            ]
            found = list(_cues_in(container, tracks[0])) if tracks else []
    except (av.FFmpegError, ValueError):
        return Subtitles((), dropped=1)
    return Subtitles(_in_order(caption for caption in found if caption.text))


def _cues_in(container: av.container.InputContainer, track: SubtitleStream) -> Iterator[Caption]:
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
        text = _plain(" ".join(_decode(data).split("\n")))
        yield Caption(start, start + float(packet.duration * packet.time_base), text)


def _in_order(captions: Iterable[Caption]) -> tuple[Caption, ...]:
    return tuple(sorted(captions, key=lambda caption: (caption.start, caption.end, caption.text)))


def _seconds(match: re.Match[str], group: int) -> float:
    hours, minutes, seconds, fraction = (match.group(group + k) or "0" for k in range(4))
    whole = 3600 * int(hours) + 60 * int(minutes) + int(seconds)
    return whole + int(fraction.ljust(3, "0")) / 1000


def _plain(line: str) -> str:
    """Words without tags, entities and control characters."""
    text = html.unescape(_TAG.sub("", line))
    return " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", text).split())


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

    The longest name wins: `Vol. 2.srt` is that of `Vol. 2.mp4`, whatever else is there.
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
    return SubtitleMatch(best, unmatched, _notes(guessed, ranked, best))


def _notes(
    guessed: Sequence[str],
    ranked: Mapping[str, list[tuple[Rank, str]]],
    best: Mapping[str, list[str]],
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
            "data.caption_languages decides otherwise"
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
            if head and not head.endswith("/") and _is_tag(tag, after=separator):
                break
        else:
            return [], []
        stem = head.rstrip()
        tags.append(tag)


def _is_tag(tag: str, *, after: str) -> bool:
    """Whether a part of a name speaks of the words; only a dot may separate more than languages."""
    if after != ".":
        return _language(tag) is not None and tag not in FLAGS
    ending = f".{tag}"
    return _language(tag) is not None or tag in FLAGS or ending in MEDIA or ending in SUFFIXES


def _language(tag: str) -> str | None:
    match = _LANGUAGE_TAG.fullmatch(tag)
    return LANGUAGES.get(match[1] if match else tag)


def _rank(tags: Sequence[str], languages: Sequence[str]) -> Rank:
    """How far back a file stands among several: what is said in the wanted language comes first."""
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
