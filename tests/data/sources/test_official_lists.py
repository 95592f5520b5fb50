"""Official annotation files load whole, with their known counts; broken ones are named by line."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.data.corpus import TEST_DATA, demo_params, needs_data
from vatt.data.clips.manifest import read_manifest, write_manifest
from vatt.data.sources import howto100m
from vatt.data.sources.choice import listed, mark_of_lists
from vatt.data.sources.howto100m import read_howto100m, stream_object
from vatt.data.sources.labelled import read_audioset, read_class_names, read_segments
from vatt.errors import DataError

FILES = Path(TEST_DATA or "/nowhere") / "annotations"
DATA = demo_params(test_share=0.1).data
HEADER = "video_id,category_1,category_2,rank,task_id\n"


def place(folder: Path, files: dict[str, Path | str]) -> Path:
    """A folder with files under their official names: links, or what a text says."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, Path):
            (folder / name).symlink_to(content)
        else:
            (folder / name).write_text(content)
    return folder


def howto100m_files(folder: Path, captions: str = "caption.json") -> Path:
    """The real captions of 100 videos; a list of these, the 4 printed rows and 1,083 mute ones."""
    real = FILES / "HowTo100M"
    names = json.loads((real / "caption.small.json").read_text())
    rows = [f"{name},Food and Entertaining,Drinks,1,2" for name in names]
    rows += (real / "HowTo100M_v1.head.csv").read_text().splitlines()[1:]
    rows += [f"{name},,,1,2" for name in (real / "no-caption-video.txt").read_text().split()]
    source = "small_train_captions" if captions == "captions" else "caption.small.json"
    listing = HEADER + "\n".join(rows) + "\n"
    return place(folder, {howto100m.VIDEOS: listing, captions: real / source})


def audioset_files(folder: Path) -> Path:
    real = FILES / "AudioSet"
    names = ("balanced_train_segments.csv", "eval_segments.csv", "class_labels_indices.csv")
    return place(folder, {name: real / name for name in names})


@needs_data
@pytest.mark.parametrize("captions", ["caption.json", "raw_caption.json", "captions"])
def test_howto100m_gives_every_video_with_its_captions(tmp_path, captions):
    clips = list(read_howto100m(howto100m_files(tmp_path, captions), DATA))
    spoken = [clip for clip in clips if clip.captions]
    assert len(clips) == 100 + 4 + 1083 and len(spoken) == 100
    assert sum(len(clip.captions) for clip in clips) == 11173
    first = next(clip for clip in clips if clip.clip_id == "ht_-tCQ4tCQdWE")
    assert first.url == "https://www.youtube.com/watch?v=-tCQ4tCQdWE" and first.end is None
    assert (first.captions[0].start, first.captions[0].end) == (0.41, 3.91)
    assert first.captions[0].text == "check pic tonight pick"
    printed = next(clip for clip in clips if clip.clip_id == "ht_gkjnR3-ZVts")
    assert printed.labels == {
        "category": "Food and Entertaining", "subcategory": "Drinks", "task": "25938",
    }  # fmt: skip
    assert 50 < sum(clip.split == "test" for clip in clips) < 200
    write_manifest(tmp_path / "m.jsonl", clips)
    assert list(read_manifest(tmp_path / "m.jsonl")) == clips


def test_unusable_captions_are_left_out_and_a_video_listed_twice_counts_once(tmp_path):
    name, other = "abcdefghijk", "lmnopqrstuv"
    spoken = {
        name: {"start": [0, 2, 3, 5], "end": [1, 2, 4, 6], "text": ["a", "b", float("nan"), " c "]},
        "unlisted000": {"start": [], "end": [], "text": []},
    }
    rows = f"{name},A,B,1,7\n{other},,,1,7\n{name},C,D,2,8\n"
    folder = place(
        tmp_path, {howto100m.VIDEOS: HEADER + rows, "caption.json": json.dumps(spoken, indent=1)}
    )
    first, second = read_howto100m(folder, DATA)
    assert [caption.text for caption in first.captions] == ["a", "c"]
    assert first.labels["category"] == "A"
    assert second.clip_id == f"ht_{other}" and second.captions == ()


def test_captions_that_cannot_be_matched_are_counted_and_stop_no_other_video(tmp_path):
    names = [letter * 11 for letter in "abcd"]
    spoken = {
        names[0]: {"start": [0, 1], "end": [1], "text": ["x", "y"]},
        names[1]: {"start": [5, 1, 10**400], "end": [6, 2, 7], "text": ["late", "early", "z"]},
        names[2]: None,
    }
    rows = "".join(f"{name},A,B,1,7\n" for name in names)
    files = {howto100m.VIDEOS: HEADER + rows, "caption.json": json.dumps(spoken)}
    clips = {clip.clip_id[3:]: clip for clip in read_howto100m(place(tmp_path / "a", files), DATA)}
    assert [clips[name].caption_faults.dropped for name in names] == [2, 1, 1, 0]
    assert [caption.text for caption in clips[names[1]].captions] == ["early", "late"]
    files = {howto100m.VIDEOS: HEADER + f"{names[0]},A,B,1,7\n"}
    folder = place(tmp_path / "b", files)
    place(folder / "captions", {f"{names[0]}.csv": 'start,end,text\n0,1,"x\n1,2,y\n2,3\n3,4,z\n'})
    [clip] = read_howto100m(folder, DATA)
    assert [caption.text for caption in clip.captions] == ["y", "z"]
    assert clip.caption_faults.dropped == 2
    bad = b"start,end,text\n0,1,caf\xe9\n1,2,na\xc3\xafve\n"
    (folder / "captions" / f"{names[0]}.csv").write_bytes(bad)
    [clip] = read_howto100m(folder, DATA)
    assert [caption.text for caption in clip.captions] == ["naïve"]
    assert clip.caption_faults.dropped == 1


def test_a_large_json_file_is_read_member_by_member(tmp_path, monkeypatch):
    monkeypatch.setattr(howto100m, "PIECE", 7)
    content = {"a": {"x": [1.5, "}"]}, 'ü"': [], "b": "long " * 20}
    (tmp_path / "f").write_text(json.dumps(content, ensure_ascii=False, indent=2))
    assert dict(stream_object(tmp_path / "f")) == content
    (tmp_path / "f").write_text("{}")
    assert list(stream_object(tmp_path / "f")) == []
    (tmp_path / "f").write_text('{"a": {"x": 1}, "b": {"x"')
    with pytest.raises(DataError, match=r"f: character \d+: broken JSON"):
        list(stream_object(tmp_path / "f"))


def test_howto100m_names_what_is_missing_or_wrong(tmp_path):
    with pytest.raises(DataError, match=r"not one of raw_caption.json, caption.json, captions"):
        list(read_howto100m(tmp_path, DATA))
    place(tmp_path, {howto100m.VIDEOS: HEADER + "short,A,B,1,2\n", "caption.json": "{}"})
    with pytest.raises(DataError, match=r"HowTo100M_v1.csv:2: 'short' is not a YouTube id"):
        list(read_howto100m(tmp_path, DATA))
    (tmp_path / howto100m.VIDEOS).write_text("video_id;task_id\n")
    with pytest.raises(DataError, match=r"HowTo100M_v1.csv:1: no column video_id, category_1"):
        list(read_howto100m(tmp_path, DATA))


@needs_data
def test_audioset_gives_every_segment_with_its_classes(tmp_path):
    clips = list(read_audioset(audioset_files(tmp_path), DATA))
    assert Counter(clip.split for clip in clips) == {"train": 22160, "test": 20371}
    labels = Counter(clip.labels["sound"].count("|") + 1 for clip in clips if clip.split == "train")
    assert sum(several * count for several, count in labels.items()) == 52882
    classes = {name for clip in clips for name in clip.labels["sound"].split("|")}
    assert len(classes) == 527 and "Male speech, man speaking" in classes
    first = next(clip for clip in clips if clip.clip_id == "as_--PJHxphWEs_30")
    assert first.url.endswith("watch?v=--PJHxphWEs") and (first.start, first.end) == (30.0, 40.0)
    assert len({clip.clip_id for clip in clips}) == len(clips)


@needs_data
def test_the_ontology_names_the_classes_too(tmp_path):
    folder = place(tmp_path, {"ontology.json": FILES / "AudioSet" / "ontology.json"})
    names = read_class_names(folder)
    assert len(names) == 632 and names["/m/09x0r"] == "Speech"


@needs_data
@pytest.mark.parametrize(
    ("name", "message", "count"),
    [
        ("balanced_train_segments", r"csv:2: a spreadsheet program has put #NAME\?", 22160),
        ("eval_segments", r"csv:1: 14 fields, not 4: the quotes", 20371),
    ],
)
def test_lists_that_a_spreadsheet_mangled_are_refused_with_lines(name, message, count):
    path = FILES / "AudioSet" / f"{name}.mangled_excel.csv"
    with pytest.raises(DataError, match=message) as caught:
        list(read_segments(path, "train", {}, sections=False))
    assert f"... and {count - 10} more lines" in str(caught.value)
    assert "spreadsheet" in caught.value.hint


def test_a_list_that_was_cut_off_is_refused(tmp_path):
    (tmp_path / "l.csv").write_text(
        "# Segments csv created\n# num_ytids=2, num_segs=2\n# YTID, start_seconds\n"
        'abcdefghijk, 30.000, 40.000, "/m/09x0r,/t/dd00088"\n'
    )
    with pytest.raises(DataError, match="promises 2 segments in its first lines and holds 1"):
        list(read_segments(tmp_path / "l.csv", "train", {}, sections=False))


def test_a_section_begins_at_zero_and_is_named_in_the_address(tmp_path):
    (tmp_path / "l.csv").write_text('abcdefghijk, 30.500, 40.500, "/m/09x0r"\n')
    [clip] = read_segments(tmp_path / "l.csv", "train", {}, sections=True)
    assert clip.url == "https://www.youtube.com/watch?v=abcdefghijk#t=30.5,40.5"
    assert (clip.start, clip.end, clip.clip_id) == (0.0, 10.0, "as_abcdefghijk_30-5")


@needs_data
def test_two_lists_are_joined_in_the_ratio_of_their_hours(tmp_path):
    howto100m_files(tmp_path / "howto100m")
    place(tmp_path / "audioset", {"eval_segments.csv": FILES / "AudioSet" / "eval_segments.csv"})
    source = {"source": "howto100m+audioset", "annotations": tmp_path}
    everything = list(listed(DATA.model_copy(update=source), 0))
    assert len(everything) == 1187 + 20371
    mixed = DATA.model_copy(update={**source, "mix": {"howto100m": 0.75, "audioset": 0.25}})
    clips = list(listed(mixed, 0))
    assert clips == list(listed(mixed, 0))
    hours = Counter()
    for clip in clips:
        known = clip.end or (clip.captions[-1].end if clip.captions else 390.0)
        hours[clip.source] += (known - clip.start) / 3600
    assert hours["howto100m"] / hours.total() == pytest.approx(0.75, abs=0.03)


def test_a_list_that_changes_is_noticed(tmp_path):
    folder = place(tmp_path / "audioset", {"eval_segments.csv": "a\n"})
    (folder / "captions").mkdir()
    data = DATA.model_copy(update={"source": "audioset", "annotations": tmp_path})
    marks = [mark_of_lists(data)]
    (folder / "eval_segments.csv").write_text("b\n")
    marks.append(mark_of_lists(data))
    (folder / "captions" / "a.csv").touch()
    marks.append(mark_of_lists(data))
    assert len({*marks}) == 3 and mark_of_lists(data) == marks[-1]
    assert mark_of_lists(DATA) is None
    alone = data.model_copy(update={"source": "urls", "location": tmp_path / "none.csv"})
    assert mark_of_lists(alone) not in marks
