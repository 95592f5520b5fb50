"""Captions as better candidates: sentences from timed words; no fillers, repeats, other languages.

Each caption that is kept has a score from 0 to 1 (docs/beyond.md), the product of

- length: 1, or a third for each word where there are fewer than three,
- variety: the share of its words that are distinct,
- letters: the share of its characters, spaces left out, that are letters or digits,
- fluency: the share of its pairs of neighbouring words that are not odd. A pair is odd when the
  two words are so common in the corpus that they would meet by chance at least once, and they meet
  less often than that. Wrong words of speech recognition make such pairs.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from vatt.config import TextQualityParams
from vatt.data.clips.manifest import Caption, Clip
from vatt.data.clips.text import words_of
from vatt.errors import MachineError, SettingsError

SPLIT = "train"  # val and test captions are what is measured: they stay as they are
SHORT_WORDS = 3
PAIRS = 2**22  # counters of word pairs; pairs that share one are only judged more mildly
ALONE_WORDS = 8  # the language of a shorter caption is judged with its neighbours
SURE = 0.7  # probability of a language from which a caption is not kept
REASONS = ("filler", "repeat", "language", "quality")

Word = tuple[str, float, float]  # with start and end, in seconds


# --- sentences ------------------------------------------------------------------------------------

PAUSE_SECONDS = 1.0  # a longer one ends a sentence
MOST_WORDS = 16  # a longer sentence is cut at its widest pause: the paper's L
_CLOSING = "\"'”’»)]}"
_ENDS = tuple(".!?…。！？")
_NO_END = re.compile(r"(?:[A-Za-z]\.)+|(?:mr|mrs|ms|dr|prof|st|vs|etc|no|fig|approx)\.", re.I)


def sentences_of(words: Iterable[Word]) -> list[Caption]:
    """Sentences with the times of their words: they end at a mark or a pause."""
    groups: list[list[Word]] = []
    for word in words:
        last = groups[-1][-1] if groups else None
        if last is None or _ends(last[0]) or word[1] - last[2] > PAUSE_SECONDS or word[1] < last[1]:
            groups.append([])
        groups[-1].append(word)
    return [
        Caption(round(part[0][1], 3), round(part[-1][2], 3), " ".join(word[0] for word in part))
        for group in groups
        for part in _short(group)
    ]


def _ends(word: str) -> bool:
    bare = word.rstrip(_CLOSING)
    return bare.endswith(_ENDS) and not _NO_END.fullmatch(bare)


def _short(group: list[Word]) -> Iterator[list[Word]]:
    """A sentence in parts of at most MOST_WORDS words, cut after a comma or at a wide pause."""
    while len(group) > MOST_WORDS:
        at = max(range(MOST_WORDS // 2, MOST_WORDS + 1), key=lambda cut: (_break(group, cut), cut))
        yield group[:at]
        group = group[at:]
    yield group


def _break(group: Sequence[Word], cut: int) -> float:
    """How natural a break before the word at `cut` is: its pause; a comma counts half a second."""
    comma = group[cut - 1][0].endswith((",", ";", ":"))
    return round(group[cut][1] - group[cut - 1][2], 3) + 0.5 * comma


# --- captions of a corpus -------------------------------------------------------------------------


def improved(
    clips: Sequence[Clip], params: TextQualityParams
) -> tuple[list[Clip], dict[str, float]]:
    """The clips with better train captions, and what was done, for the metrics.

    A clip's `caption_faults` count what was dropped and what was changed.
    """
    languages = Languages(params.languages) if params.languages else None
    fillers = frozenset(" ".join(words_of(word)) for word in params.fillers)
    counts: Counter[str] = Counter()
    cleaned = [
        clip if clip.split != SPLIT else _cleaned(clip, params, fillers, languages, counts)
        for clip in clips
    ]
    pairs = Pairs(
        caption.text for clip in cleaned if clip.split == SPLIT for caption in clip.captions
    )
    scores: list[float] = []
    done = []
    for clip in cleaned:
        if clip.split == SPLIT:
            scored = [
                replace(caption, quality=round(quality(caption.text, pairs), 4))
                for caption in clip.captions
            ]
            kept = [one for one in scored if (one.quality or 0.0) >= params.least_quality]
            scores += [one.quality or 0.0 for one in kept]
            counts["quality"] += len(scored) - len(kept)
            clip = _with(clip, kept, dropped=len(scored) - len(kept))
        done.append(clip)
    facts: dict[str, float] = {f"dropped_{reason}": counts[reason] for reason in REASONS}
    facts |= {"captions": counts["read"], "changed": counts["changed"], "kept": len(scores)}
    facts["mean_quality"] = float(np.mean(scores)) if scores else 0.0
    return done, facts


def _cleaned(
    clip: Clip,
    params: TextQualityParams,
    fillers: frozenset[str],
    languages: "Languages | None",
    counts: Counter[str],
) -> Clip:
    """A clip without fillers, repeats and captions in other languages."""
    counts["read"] += len(clip.captions)
    said: list[Caption] = []
    changed = 0
    for caption in clip.captions:
        text = " ".join(word for word in caption.text.split() if not _is_filler(word, fillers))
        changed += bool(text) and text != caption.text
        counts["filler"] += not text
        if text:
            said.append(caption if text == caption.text else replace(caption, text=text))
    once = _without_repeats(said, params.repeat_seconds)
    counts["repeat"] += len(said) - len(once)
    kept = once if languages is None else languages.only_wanted(once)
    counts["language"] += len(once) - len(kept)
    counts["changed"] += changed
    return _with(clip, kept, dropped=len(clip.captions) - len(kept), repaired=changed)


def _is_filler(word: str, fillers: frozenset[str]) -> bool:
    """Whether a word is a filler, or marks that one leaves behind."""
    plain = " ".join(words_of(word))
    return plain in fillers if plain else bool(fillers)


def _without_repeats(captions: Sequence[Caption], seconds: float) -> list[Caption]:
    """Without captions that say what one has just said, as overlapping or frozen cues do."""
    if not seconds:
        return list(captions)
    until: dict[str, float] = {}  # what was said, and the end of its last repeat
    kept = []
    for caption in sorted(captions, key=lambda one: (one.start, one.end)):
        said = " ".join(words_of(caption.text)) or caption.text
        if said not in until or caption.start - until[said] >= seconds:
            kept.append(caption)
        until[said] = max(caption.end, until.get(said, caption.end))
    return kept


def _with(clip: Clip, captions: Sequence[Caption], *, dropped: int, repaired: int = 0) -> Clip:
    faults = clip.caption_faults
    counted = replace(faults, dropped=faults.dropped + dropped, repaired=faults.repaired + repaired)
    return replace(clip, captions=tuple(captions), caption_faults=counted)


# --- the score ------------------------------------------------------------------------------------


class Pairs:
    """How often words, and pairs of neighbouring words, occur in a corpus."""

    def __init__(self, sentences: Iterable[str]) -> None:
        self._words: Counter[str] = Counter()
        self._pairs = np.zeros(PAIRS, np.uint32)
        for sentence in sentences:
            words = words_of(sentence)
            self._words.update(words)
            for pair in pairwise(words):
                self._pairs[_place(*pair)] += 1
        self._total = max(self._words.total(), 1)

    def is_odd(self, first: str, second: str) -> bool:
        """Whether two common words meet less often than by chance."""
        by_chance = self._words[first] * self._words[second] / self._total
        return by_chance >= 1 and bool(self._pairs[_place(first, second)] < by_chance)


def _place(first: str, second: str) -> int:
    return zlib.crc32(f"{first} {second}".encode()) % PAIRS


def quality(sentence: str, pairs: Pairs) -> float:
    """The score of a caption: length x variety x letters x fluency."""
    words = words_of(sentence)
    marks = [character for character in sentence if not character.isspace()]
    if not words:
        return 0.0
    neighbours = list(pairwise(words))
    odd = sum(pairs.is_odd(*pair) for pair in neighbours)
    length = min(1.0, len(words) / SHORT_WORDS)
    variety = len(set(words)) / len(words)
    letters = sum(character.isalnum() for character in marks) / len(marks)
    fluency = 1 - odd / len(neighbours) if neighbours else 1.0
    return length * variety * letters * fluency


# --- languages ------------------------------------------------------------------------------------


class Languages:
    """Recognises languages offline, with py3langid: 139 of them, by their ISO 639-1 codes."""

    def __init__(self, wanted: Sequence[str]) -> None:
        try:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier
        except ImportError:
            raise MachineError(
                "preprocess.text_quality.languages needs py3langid, which is not installed",
                hint="pip install 'vattctl[text]', or leave the list empty",
            ) from None
        self._identifier: Any = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        self._wanted = frozenset(wanted)
        if unknown := self._wanted - set(self._identifier.labels):
            raise SettingsError(
                f"preprocess.text_quality.languages: '{min(unknown)}' is not known",
                hint="use ISO 639-1 codes, e.g. en",
            )

    def only_wanted(self, captions: Sequence[Caption]) -> list[Caption]:
        """Without the captions that are surely in another language.

        A short one is judged together with its neighbours.
        """
        texts = [caption.text for caption in captions]
        return [
            caption
            for place, caption in enumerate(captions)
            if not self._is_other(" ".join(_context(texts, place)))
        ]

    def _is_other(self, text: str) -> bool:
        code, share = self._identifier.classify(text)
        return code not in self._wanted and share >= SURE


def _context(texts: Sequence[str], place: int) -> Sequence[str]:
    """The text at a place, with as many neighbours as make ALONE_WORDS words."""
    first, last = place, place + 1
    while sum(len(text.split()) for text in texts[first:last]) < ALONE_WORDS:
        if first == 0 and last == len(texts):
            break
        if first == 0 or (last < len(texts) and last - 1 - place <= place - first):
            last += 1
        else:
            first -= 1
    return texts[first:last]
