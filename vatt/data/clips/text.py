"""Words -> ids. Id 0 always pads; the vocabulary's file says what the other ids are.

The file is one of three kinds, which its first line shows: words, most frequent first, with or
without their counts (ids from 2 on; 1 is unknown); the release's list, which begins with <pad>; or
BERT's WordPiece vocabulary.
"""

import logging
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np

from vatt.data.clips.manifest import Caption, Clip
from vatt.errors import DataError
from vatt.files import atomic_write

UNKNOWN_PIECE = "[UNK]"
PAD_PIECE = "[PAD]"
LONGEST_WORD = 100  # characters; a longer one is unknown
# Seconds after the end of its media: a caption that begins later is not of it. Nearer ones are the
# neighbours of a clip that was fetched as a section, as in the demo; they are candidates, too.
LATE = 10.0
log = logging.getLogger(__name__)


def pieces_of(sentence: str, known: Container[str]) -> Iterator[str]:
    """The pieces of a sentence, longest first in each word; those inside a word begin with ##."""
    for word in _words(sentence):
        yield from _pieces(word, known)


def _pieces(word: str, known: Container[str]) -> list[str]:
    if len(word) > LONGEST_WORD:
        return [UNKNOWN_PIECE]
    pieces: list[str] = []
    start = 0
    while start < len(word):
        for end in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:end]
            if piece in known:
                break
        else:
            return [UNKNOWN_PIECE]
        pieces.append(piece)
        start = end
    return pieces


def _words(sentence: str) -> list[str]:
    """Lower case without accents; every punctuation mark and every Chinese character is a word."""
    plain = unicodedata.normalize("NFD", _without_controls(sentence).lower())
    letters = []
    for character in plain:
        if unicodedata.category(character) == "Mn":
            continue
        alone = _is_punctuation(character) or _is_chinese(character)
        letters.append(f" {character} " if alone else character)
    return "".join(letters).split()


def _without_controls(text: str) -> str:
    return "".join(
        " " if c.isspace() else c
        for c in text
        if c.isspace() or (c != "\ufffd" and unicodedata.category(c)[0] != "C")
    )


def _is_punctuation(character: str) -> bool:
    code = ord(character)
    ascii_mark = code in range(33, 48) or code in range(58, 65) or code in range(91, 97)
    return ascii_mark or code in range(123, 127) or unicodedata.category(character)[0] == "P"


def _is_chinese(character: str) -> bool:
    code = ord(character)
    return (
        0x4E00 <= code <= 0x9FFF
        or 0x3400 <= code <= 0x4DBF
        or 0x20000 <= code <= 0x2CEAF
        or 0xF900 <= code <= 0xFAFF
        or 0x2F800 <= code <= 0x2FA1F
    )


PAD, UNKNOWN, FIRST_WORD = 0, 1, 2
RELEASE_PAD, RELEASE_UNKNOWN = "<pad>", "<unk>"
UNKNOWN_SHOWN = "…"
_ID = re.compile(r"[0-9]{1,7}")
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_NO_MARKS = str.maketrans("", "", string.punctuation)
# Sounds in brackets, speakers, addresses, notes: text that is not spoken.
_UNSAID = re.compile(
    r"(?:^|>>+)\s*[A-Z][A-Z .]{1,20}:|>>+|\[[^\]]*\]|\([^)]*\)|<[^>]*>|https?://\S+|[♪♫]+"
)


Tokenise = Callable[[str], Iterable[str]]


def words_of(sentence: str) -> list[str]:
    """The words of a sentence, in lower case, without punctuation."""
    return _WORD.findall(sentence.lower())


def release_words_of(sentence: str) -> list[str]:
    """Words as in the release: punctuation is dropped, so that "don't" is "dont"."""
    return sentence.translate(_NO_MARKS).lower().split()


class Vocabulary:
    """Words or pieces and their ids, and how sentences are cut into them."""

    def __init__(self, ids: Mapping[str, int], *, unknown: int, cut: Tokenise) -> None:
        self._ids, self._unknown, self._cut = ids, unknown, cut
        self._words = {place: word for word, place in ids.items()}

    def __len__(self) -> int:
        """The rows that an embedding table needs."""
        return max(self._words, default=UNKNOWN) + 1

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file of any of the three kinds."""
        lines = _lines(path)
        first = lines[0].split()[-1] if lines else ""
        if first == RELEASE_PAD:
            ids = _numbered(lines, path)
            return cls(ids, unknown=ids[RELEASE_UNKNOWN], cut=release_words_of)
        if first == PAD_PIECE:
            ids = {line: number for number, line in enumerate(lines)}
            if UNKNOWN_PIECE not in ids:
                raise _broken(path, f"it has no {UNKNOWN_PIECE}")
            return cls(ids, unknown=ids[UNKNOWN_PIECE], cut=partial(pieces_of, known=ids))
        words = (line.split("\t")[0] for line in lines)
        return cls(
            {word: FIRST_WORD + rank for rank, word in enumerate(words)},
            unknown=UNKNOWN,
            cut=words_of,
        )

    def encode(self, sentence: str, words: int) -> np.ndarray:
        """The ids of the first `words` words, padded with 0: (L,)."""
        ids = np.zeros(words, dtype=np.int64)
        found = [self._ids.get(word, self._unknown) for word in self._cut(sentence)][:words]
        ids[: len(found)] = found
        return ids

    def knows(self, sentence: str) -> bool:
        """Whether any word of a sentence has an id of its own."""
        return any(
            self._ids.get(word, self._unknown) != self._unknown for word in self._cut(sentence)
        )

    def examples(self, count: int) -> list[str]:
        """Some of the known words, the most frequent first, without short and cut ones."""
        known = (word for word in self._words.values() if len(word) > 3 and word.isalpha())
        return list(islice(known, count))

    def decode(self, ids: Iterable[int]) -> str:
        """The words behind ids, without padding."""
        known = [self._words.get(place, UNKNOWN_SHOWN) for place in ids if place != PAD]
        shown = (UNKNOWN_SHOWN if self._ids.get(word) == self._unknown else word for word in known)
        return " ".join(shown).replace(" ##", "")

    def coverage(self, counts: Mapping[str, int]) -> float:
        """The share of spoken words that it knows; `counts` holds how often each word is said."""
        known = total = 0
        for said, times in counts.items():
            for word in self._cut(said):
                total += times
                known += times * (self._ids.get(word, self._unknown) != self._unknown)
        return known / total if total else 1.0


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        return [line for line in text.split("\n") if line.strip()]
    except FileNotFoundError:
        raise DataError(f"{path} is missing", hint="run `vattctl preprocess`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(path, str(error)) from None


def _numbered(lines: Iterable[str], path: Path) -> dict[str, int]:
    """Words by their number: the one before the word, or else that of its line."""
    ids: dict[str, int] = {}
    for number, line in enumerate(lines):
        index, _, word = line.strip().rpartition(" ")
        if index and not _ID.fullmatch(index):
            raise _broken(path, f"line {number + 1} is neither a word nor a number and a word")
        place = int(index) if index else number
        if ids.setdefault(word, place) != place:
            raise _broken(path, f"line {number + 1}: '{word}' appears twice")
    if len(set(ids.values())) < len(ids):
        raise _broken(path, "two words have one number")
    if ids.get(RELEASE_PAD) != PAD or RELEASE_UNKNOWN not in ids:
        raise _broken(path, f"{RELEASE_PAD} must be word 0, and {RELEASE_UNKNOWN} is required")
    return ids


def _broken(path: Path, why: str) -> DataError:
    return DataError(
        f"{path} is not a vocabulary: {why}", hint="docs/data-sources.md shows the forms"
    )


def count_words(sentences: Iterable[str]) -> Counter[str]:
    """How often each word occurs."""
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update(words_of(sentence))
    return counts


def write_vocabulary(path: Path, counts: Counter[str], *, size: int) -> int:
    """Write the most frequent words, at most `size` ids with pad and unknown; returns the ids."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: size - FIRST_WORD]
    with atomic_write(path) as temporary:
        temporary.write_text(
            "".join(f"{word}\t{count}\n" for word, count in ranked), encoding="utf-8"
        )
    return FIRST_WORD + len(ranked)


def copy_vocabulary(source: Path, path: Path, *, size: int) -> None:
    """Copy an existing vocabulary; of a plain list, as many of the first words as fit."""
    needed = len(Vocabulary.load(source))
    lines = _lines(source)
    if needed > size:
        if lines[0].split()[-1] in (RELEASE_PAD, PAD_PIECE):
            raise DataError(
                f"{source} needs {needed} ids, preprocess.vocabulary allows {size}",
                hint=f"set preprocess.vocabulary and model.text.vocabulary to {needed}",
            )
        lines = lines[: size - FIRST_WORD]
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def as_said(clip: Clip, *, clean: bool, without: frozenset[str]) -> Clip:
    """A clip with its captions as they are used: cleaned, and without the stop words."""
    if not clean and not without:
        return clip
    kept = []
    for caption in clip.captions:
        text = " ".join(_UNSAID.sub(" ", caption.text).split()) if clean else caption.text
        if without:
            text = " ".join(word for word in text.split() if not _is_stop_word(word, without))
        if text:
            kept.append(Caption(caption.start, caption.end, text))
    return replace(clip, captions=tuple(kept))


def within_media(clips: Sequence[Clip], seconds: Mapping[str, float | None]) -> list[Clip]:
    """Clips without captions that begin after the end of their media; these count as dropped.

    They belong to another file, or their times have another unit.
    """
    found, odd = [], []
    for clip in clips:
        end = seconds.get(clip.clip_id)
        kept = tuple(c for c in clip.captions if end is None or c.start < end + LATE)
        late = len(clip.captions) - len(kept)
        if late:
            odd.append(clip)
            faults = replace(clip.caption_faults, dropped=clip.caption_faults.dropped + late)
            clip = replace(clip, captions=kept, caption_faults=faults)
        found.append(clip)
    if odd:
        last, name = odd[0].captions[-1].start, odd[0].clip_id
        log.warning(
            "captions of %d clips begin after the end of their media and are left out, among them "
            "%s (%.0f s, and a caption at %.0f s)",
            len(odd), name, seconds[name], last,
        )  # fmt: skip
    return found


def _is_stop_word(word: str, without: frozenset[str]) -> bool:
    return " ".join(words_of(word)) in without


def read_stop_words(path: Path | None) -> frozenset[str]:
    """The words of a file, one a line; no words without a file."""
    if path is None:
        return frozenset()
    try:
        lines = path.read_text(encoding="utf-8-sig").lower().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"preprocess.stop_words: {path} cannot be read: {error}", hint="one word a line"
        ) from None
    return frozenset(line.strip() for line in lines if line.strip())
