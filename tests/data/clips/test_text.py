"""Words become ids; 0 pads, 1 is unknown."""

import json
from pathlib import Path

import pytest

import vatt
from tests.data.corpus import TEST_DATA, make_clip, needs_data
from vatt.data.clips.manifest import Caption, CaptionFaults
from vatt.data.clips.text import (
    Vocabulary,
    as_said,
    copy_vocabulary,
    count_words,
    read_stop_words,
    within_media,
    words_of,
    write_vocabulary,
)
from vatt.errors import DataError

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "the", "dont"]
WORDPIECES = [9985, 3207, 1996, 7975, 1010, 10204, 999, 0, 0]  # marina ##de the chicken , ...


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


def test_the_releases_list_keeps_its_own_ids(tmp_path):
    for name, lines in (
        ("words", SPECIAL),
        ("numbered", [f"{i} {w}" for i, w in enumerate(SPECIAL)]),
    ):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        vocabulary = Vocabulary.load(tmp_path / name)
        assert len(vocabulary) == 6
        assert vocabulary.encode("The dont, DON'T cat!", 6).tolist() == [4, 5, 5, 3, 0, 0]
        assert vocabulary.decode([4, 5, 3, 0]) == "the dont …"


def test_a_checkpoint_folder_turns_words_into_ids(tmp_path):
    (tmp_path / "vocabulary.txt").write_text("\n".join(SPECIAL))
    assert vatt.vocabulary(tmp_path).encode("The cat", 3).tolist() == [4, 3, 0]


def test_a_vocabulary_names_some_of_its_words(tmp_path):
    (tmp_path / "vocabulary.txt").write_text("<pad>\n<unk>\nthe\nfrog\nit's\njumps\nover\n")
    assert vatt.vocabulary(tmp_path).examples(2) == ["frog", "jumps"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<pad>\nthe\n", "<unk>"),
        ("<pad>\n<unk>\na word more\n", "line 3 is neither a word nor"),
        ("0 <pad>\n1 <unk>\n1 the\n", "two words have one number"),
        ("<pad>\n<unk>\nthe\nthe\n", "line 4: 'the' appears twice"),
        ("3 <pad>\n1 <unk>\n", "<pad> must be word 0"),
        ("0 <pad>\n² <unk>\n", "line 2 is neither a word nor"),
        ("0 <pad>\n" + "9" * 5000 + " <unk>\n", "line 2 is neither a word nor"),
        ("[PAD]\nthe\n", r"no \[UNK\]"),
    ],
)
def test_broken_vocabularies_are_named(tmp_path, text, message):
    (tmp_path / "v").write_text(text)
    with pytest.raises(DataError, match=message):
        Vocabulary.load(tmp_path / "v")


def test_wordpieces_are_the_longest_known(tmp_path):
    pieces = ["[PAD]", "[UNK]", "una", "un", "##aff", "##ffa", "##ble", "!", "cafe", "##a", "中"]
    (tmp_path / "v").write_text("\n".join(pieces))
    vocabulary = Vocabulary.load(tmp_path / "v")
    ids = vocabulary.encode("Unaffable! CAFÉ xyz 中una", 12).tolist()
    assert ids == [2, 5, 6, 7, 8, 1, 10, 2, 0, 0, 0, 0]
    assert vocabulary.decode(ids) == "unaffable ! cafe … 中 una"


@needs_data
def test_published_vocabularies_load_whole():
    """Ids of the WordPiece sentences: what Hugging Face's tokenizers gives for tokenizer.json."""
    folder = Path(TEST_DATA) / "text"
    plain = Vocabulary.load(folder / "en_words_65536.txt")
    assert len(plain) == 65536 + 2 and plain.encode("to the", 2).tolist() == [3, 2]
    release = Vocabulary.load(folder / "word_vocab_65536_dmvr.txt")
    assert len(release) == 65536 and release.encode("the to", 2).tolist() == [4, 5]
    pieces = Vocabulary.load(folder / "vocab.txt")
    assert len(pieces) == 30522
    assert pieces.encode("Marinade the chicken, Zürich!", 9).tolist() == WORDPIECES


@needs_data
def test_coverage_is_the_share_of_what_is_said():
    captions = Path(TEST_DATA) / "annotations" / "HowTo100M" / "caption.small.json"
    said = json.loads(captions.read_text())
    counts = count_words(text for video in said.values() for text in video["text"])
    folder = Path(TEST_DATA) / "text"
    assert 0.96 < Vocabulary.load(folder / "en_words_65536.txt").coverage(counts) < 1.0
    assert Vocabulary.load(folder / "vocab.txt").coverage(counts) > 0.999


def test_coverage_counts_words_as_often_as_they_are_said(tmp_path):
    (tmp_path / "v").write_text("a\n")
    assert Vocabulary.load(tmp_path / "v").coverage({"a": 3, "b": 1}) == 0.75


def test_a_vocabulary_made_elsewhere_is_cut_to_the_size_or_refused(tmp_path):
    (tmp_path / "plain").write_text("the\nof\nand\n")
    copy_vocabulary(tmp_path / "plain", tmp_path / "v", size=4)
    assert (tmp_path / "v").read_text() == "the\nof\n"
    (tmp_path / "release").write_text("\n".join(SPECIAL))
    copy_vocabulary(tmp_path / "release", tmp_path / "v", size=6)
    assert Vocabulary.load(tmp_path / "v").encode("the", 1).tolist() == [4]
    with pytest.raises(DataError, match="needs 6 ids") as caught:
        copy_vocabulary(tmp_path / "release", tmp_path / "v", size=5)
    assert "model.text.vocabulary to 6" in caught.value.hint


def test_captions_are_cleaned_and_lose_stop_words_only_when_asked(tmp_path):
    texts = ("[Music]", ">> ANNA: Don't do that (laughs) see https://x.org/a", "the and", "♪ la ♪")
    clip = make_clip(0, captions=tuple(Caption(k, k + 1.0, text) for k, text in enumerate(texts)))
    (tmp_path / "stop").write_text("The\nand\ndon't\n")
    stop = read_stop_words(tmp_path / "stop")
    none = read_stop_words(None)

    def left(**how):
        return [(caption.start, caption.text) for caption in as_said(clip, **how).captions]

    assert as_said(clip, clean=False, without=none) is clip
    cleaned = [(1, "Don't do that see"), (2, "the and"), (3, "la")]
    assert left(clean=True, without=none) == cleaned
    assert left(clean=False, without=stop)[2] == (3, "♪ la ♪")
    assert left(clean=True, without=stop) == [(1, "do that see"), (3, "la")]
    with pytest.raises(DataError, match=r"preprocess\.stop_words"):
        read_stop_words(tmp_path / "none")


def test_captions_that_begin_after_the_end_of_their_media_are_dropped_and_named(caplog):
    captions = [Caption(float(t), t + 1.0, str(t)) for t in (0, 9, 10, 19, 20, 1000)]
    clip, other = make_clip(1, captions=captions), make_clip(2, captions=captions)
    kept, same = within_media([clip, other], {clip.clip_id: 10.0})
    assert [caption.text for caption in kept.captions] == ["0", "9", "10", "19"] and same == other
    assert kept.caption_faults == CaptionFaults(dropped=2)
    [said] = caplog.messages
    assert (
        "captions of 1 clips" in said and f"{clip.clip_id} (10 s, and a caption at 1000 s)" in said
    )
