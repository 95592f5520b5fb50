"""WordPiece as BERT's uncased vocabularies want it: words, then their longest known pieces."""

import unicodedata
from collections.abc import Container, Iterator

UNKNOWN_PIECE = "[UNK]"
PAD_PIECE = "[PAD]"
LONGEST_WORD = 100  # characters; a longer one is unknown


def pieces_of(sentence: str, known: Container[str]) -> Iterator[str]:
    """The pieces of a sentence, longest first within each word; those inside a word bear ##."""
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
