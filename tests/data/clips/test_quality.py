"""Captions are prepared as their settings say, and every drop is counted."""

import importlib.util

import numpy as np
import pytest

from tests.data.corpus import make_clip
from vatt.config import TextQualityParams
from vatt.data.clips.manifest import Caption, CaptionFaults
from vatt.data.clips.quality import MOST_WORDS, Pairs, improved, quality, sentences_of
from vatt.data.sources import demo
from vatt.errors import SettingsError

needs_languages = pytest.mark.skipif(
    importlib.util.find_spec("py3langid") is None, reason="py3langid is not installed"
)
OFF = {"fillers": (), "repeat_seconds": 0.0, "languages": (), "least_quality": 0.0}


def params(**changes):
    return TextQualityParams.model_validate(OFF | changes)


def clip_of(*texts, seconds=2.0, split="train", number=0):
    """A clip whose captions follow each other."""
    said = tuple(Caption(seconds * n, seconds * (n + 1), text) for n, text in enumerate(texts))
    return make_clip(number, split=split, captions=said)


def texts_of(clip):
    return [caption.text for caption in clip.captions]


# --- sentences ------------------------------------------------------------------------------------


def timed(text, start=0.0, each=0.25):
    return [(word, start + each * n, start + each * (n + 1)) for n, word in enumerate(text.split())]


def test_sentences_end_at_marks_and_pauses_and_have_the_times_of_their_words():
    words = timed("Hold it. Then (gently) turn.) now wait") + timed("go on", start=8.0)
    assert sentences_of(words) == [
        Caption(0.0, 0.5, "Hold it."),
        Caption(0.5, 1.25, "Then (gently) turn.)"),
        Caption(1.25, 1.75, "now wait"),
        Caption(8.0, 8.5, "go on"),
    ]


def test_abbreviations_and_numbers_end_no_sentence():
    text = "Dr. Smith took 3.5 cups, e.g. of U.S. flour"
    assert [one.text for one in sentences_of(timed(text))] == [text]


def test_a_long_sentence_is_cut_where_the_break_is_widest():
    words = timed(" ".join(f"w{n}" for n in range(20)))
    words[10:] = [(word, start + 0.6, end + 0.6) for word, start, end in words[10:]]
    assert [len(one.text.split()) for one in sentences_of(words)] == [10, 10]
    comma = timed(" ".join(f"w{n}{',' * (n == 8)}" for n in range(20)))
    assert sentences_of(comma)[0].text.endswith("w8,")
    even = sentences_of(timed("word " * 100))
    assert max(len(one.text.split()) for one in even) == MOST_WORDS


def test_times_that_go_back_begin_a_new_sentence():
    words = timed("one two", start=5.0) + timed("three four")
    assert [(one.start, one.text) for one in sentences_of(words)] == [
        (5.0, "one two"), (0.0, "three four"),
    ]  # fmt: skip


# --- fillers, repeats, languages ------------------------------------------------------------------


def test_fillers_are_left_out_and_captions_of_nothing_else_dropped():
    clip = clip_of("Um, take the, uh, salt", "uh ... um", "an umbrella", "UH")
    (done,), facts = improved([clip], params(fillers=("um", "Uh")))
    assert texts_of(done) == ["take the, salt", "an umbrella"]
    assert done.caption_faults == CaptionFaults(dropped=2, repaired=1)
    assert (facts["dropped_filler"], facts["changed"], facts["kept"]) == (2, 1, 2)


def test_what_was_just_said_is_dropped_and_a_later_refrain_stays():
    clip = clip_of("take salt", "Take salt!", "stir", "take salt", seconds=3.0)
    (done,), facts = improved([clip], params(repeat_seconds=3.0))
    assert texts_of(done) == ["take salt", "stir", "take salt"]
    assert done.captions[-1].start == 9.0 and facts["dropped_repeat"] == 1
    assert texts_of(improved([clip], params())[0][0]) == texts_of(clip)


@needs_languages
def test_captions_surely_in_another_language_are_dropped():
    german = "und jetzt schneiden wir die Zwiebeln in kleine Würfel und braten sie an"
    english = "now we cut the onions and fry them in a large pan with butter"
    clip = clip_of(english, german, "Salz!", "then we add some more salt and pepper", "okay")
    (done,), facts = improved([clip], params(languages=("en",)))
    assert texts_of(done) == [english, "Salz!", "then we add some more salt and pepper", "okay"]
    assert facts["dropped_language"] == 1 and done.caption_faults.dropped == 1
    both, _ = improved([clip], params(languages=("en", "de")))
    assert texts_of(both[0]) == texts_of(clip)


@needs_languages
def test_short_captions_are_judged_with_their_neighbours():
    clip = clip_of("wir schneiden", "die Zwiebeln", "in kleine Würfel", "und braten sie an")
    (done,), _ = improved([clip], params(languages=("en",)))
    assert done.captions == ()


@needs_languages
def test_a_doubtful_caption_is_kept():
    clip = clip_of("okay let us go on", "let me get some coffee first", "no no no no no no no no")
    (done,), facts = improved([clip], params(languages=("en",)))
    assert texts_of(done) == texts_of(clip) and facts["dropped_language"] == 0


@needs_languages
def test_an_unknown_language_is_named():
    with pytest.raises(SettingsError, match="languages: 'english' is not known"):
        improved([clip_of("a")], params(languages=("english",)))


# --- the score ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("take the salt", 1.0),
        ("salt", 1 / 3),
        ("no no no no", 1 / 4),
        ("$ 12 $$ 34 #!", 2 / 3 * 4 / 9),
        ("...", 0.0),
    ],
)
def test_the_score_is_the_documented_product(text, score):
    assert quality(text, Pairs([])) == pytest.approx(score)


def test_words_that_are_common_but_never_meet_lower_the_score():
    pairs = Pairs(["take the salt"] * 10 + ["stir it well"] * 10)
    assert pairs.is_odd("take", "well") and not pairs.is_odd("take", "the")
    assert quality("take the salt", pairs) == 1
    assert quality("stir the well", pairs) == 0  # both pairs are odd
    assert quality("take the unheard", pairs) == 1  # a rare word proves nothing


def test_the_score_finds_the_wrong_words_of_a_noisy_corpus():
    clips = [
        demo.describe(0, "train", index, no_text_share=0, text_noise=0.4) for index in range(800)
    ]
    done, _ = improved(clips, params())
    wrong, clean = [], []
    for clip in done:
        faults = dict(part.split() for part in clip.labels.get("spoilt", "").split("|") if part)
        for place, caption in enumerate(clip.captions):
            (wrong if faults.get(str(place)) == "words" else clean).append(caption.quality)
    wins = np.mean(np.array(wrong)[:, None] < np.array(clean)[:2000])
    assert wins > 0.9


def test_captions_below_the_least_quality_are_dropped_and_the_others_keep_their_score():
    clip = clip_of("take the salt now", "no no no no no", "stir")
    (done,), facts = improved([clip], params(least_quality=0.3))
    assert [(one.text, one.quality) for one in done.captions] == [
        ("take the salt now", 1.0), ("stir", 0.3333),
    ]  # fmt: skip
    assert done.caption_faults.dropped == facts["dropped_quality"] == 1
    assert facts["mean_quality"] == pytest.approx(0.66665)


def test_test_captions_stay_as_they_are():
    clips = [clip_of("um um", "um um", split=split) for split in ("train", "val", "test")]
    done, facts = improved(clips, params(fillers=("um",), least_quality=1.0))
    assert done[0].captions == () and done[1:] == clips[1:]
    assert facts["captions"] == 2


def test_every_caption_is_kept_or_counted_under_one_reason():
    texts = ["um", "take salt", "take salt", "salt", "stir it well", "no no no no", "um stir"]
    clips = [clip_of(*texts, number=number) for number in range(5)]
    settings = params(fillers=("um",), repeat_seconds=5.0, least_quality=0.5)
    done, facts = improved(clips, settings)
    dropped = sum(facts[f"dropped_{reason}"] for reason in ("filler", "repeat", "language",
                                                            "quality"))  # fmt: skip
    assert facts["captions"] == 7 * 5 == facts["kept"] + dropped
    assert sum(clip.caption_faults.dropped for clip in done) == dropped
    assert all(one.quality is not None for clip in done for one in clip.captions)
