"""Subtitle files -> captions: srt, vtt, json, and text tracks inside a video."""

import html
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
from av.subtitles.stream import SubtitleStream

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
