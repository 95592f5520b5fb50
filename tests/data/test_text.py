"""Words become ids; 0 pads, 1 is unknown."""

import pytest

from vatt.data.text import Vocabulary, count_words, words_of, write_vocabulary
from vatt.errors import DataError


def test_words_are_lower_case_without_punctuation():
    assert words_of("Don't stop -- the Ünïcode, 7 times!") == [
        "don't", "stop", "the", "ünïcode", "7", "times",
    ]  # fmt: skip


def test_the_vocabulary_keeps_the_most_frequent_words_within_its_size(tmp_path):
    counts = count_words(["b b a", "a b c"])
    assert write_vocabulary(tmp_path / "v", counts, size=4) == 4
    vocabulary = Vocabulary.load(tmp_path / "v")
    assert len(vocabulary) == 4
    assert vocabulary.encode("b a c", 5).tolist() == [2, 3, 1, 0, 0]
    assert vocabulary.encode("b b b", 2).tolist() == [2, 2]
    assert vocabulary.encode("", 2).tolist() == [0, 0]


def test_a_plain_list_of_words_loads(tmp_path):
    (tmp_path / "v").write_text("the\nof\n")
    assert Vocabulary.load(tmp_path / "v").encode("of the", 2).tolist() == [3, 2]
    with pytest.raises(DataError, match="vattctl preprocess"):
        Vocabulary.load(tmp_path / "none")
