"""Words -> ids. Id 0 pads, id 1 stands for a word that is not in the vocabulary."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import numpy as np

from vatt.errors import DataError
from vatt.files import atomic_write

PAD, UNKNOWN, FIRST_WORD = 0, 1, 2
_WORD = re.compile(r"\w+(?:['’]\w+)*")


def words_of(sentence: str) -> list[str]:
    """The words of a sentence, in lower case, without punctuation."""
    return _WORD.findall(sentence.lower())


class Vocabulary:
    """Words and their ids, most frequent first."""

    def __init__(self, words: Iterable[str]) -> None:
        self._ids = {word: FIRST_WORD + rank for rank, word in enumerate(words)}

    def __len__(self) -> int:
        """The rows that an embedding table needs: pad, unknown and the words."""
        return FIRST_WORD + len(self._ids)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file of one word a line; what follows a tab (its count) is ignored."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise DataError(f"{path} is missing", hint="run `vattctl preprocess`") from None
        return cls(line.split("\t")[0] for line in lines if line.strip())

    def encode(self, sentence: str, words: int) -> np.ndarray:
        """The ids of the first `words` words, padded with 0: (L,)."""
        ids = np.zeros(words, dtype=np.int64)
        found = [self._ids.get(word, UNKNOWN) for word in words_of(sentence)[:words]]
        ids[: len(found)] = found
        return ids


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
