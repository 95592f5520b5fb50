"""The lists of the downstream tasks load whole: official splits, folds, labels and counts."""

import csv
import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from tests.data.corpus import TEST_DATA, demo_params, needs_data, write_media
from tests.data.sources.test_official_lists import place
from vatt.data.clips.ledger import read_ledger
from vatt.data.clips.manifest import path_in_folder, write_manifest
from vatt.data.fetching.download import download
from vatt.data.sources.choice import READERS, listed
from vatt.data.sources.official import CLASSES, COUNTS
from vatt.errors import DataError

FILES = Path(TEST_DATA or "/nowhere") / "annotations"
DATA = demo_params().data


def counts(clips) -> dict[str, int]:
    return dict(Counter(clip.split for clip in clips))


def values(clips, label: str) -> set[str]:
    return {clip.labels[label] for clip in clips if label in clip.labels}


@needs_data
@pytest.mark.parametrize(("name", "classes"), [("kinetics400", 400), ("kinetics600", 600)])
def test_kinetics(tmp_path, name, classes):
    stem = name.replace("kinetics", "kinetics-")
    files = {f"{stem}_{split}.csv": FILES / "Kinetics" / f"{stem}_{split}.csv"
             for split in ("val", "test")}  # fmt: skip
    clips = list(READERS[name](place(tmp_path, files), DATA))
    # Val is tested on; what the test lists hold has no labels.
    assert counts(clips) == {"test": COUNTS[name]["test"]}
    assert len(values(clips, "action")) == classes and all(clip.labels for clip in clips)
    known = (FILES / "Kinetics" / f"label_map_k{name[-3:]}.txt").read_text().splitlines()
    assert values(clips, "action") == {label.strip() for label in known}
    assert len({clip.clip_id for clip in clips}) == len(clips)


@needs_data
def test_kinetics_lists_of_others_and_of_700_classes_have_the_same_columns(tmp_path):
    """No list of Kinetics-700 is here: its columns are those, its classes the 700 of label_map."""
    real = FILES / "Kinetics"
    for name in ("tiny_train.csv", "tiny_val.csv", "kinetics-400_val_8videos.csv"):
        rows = len((real / name).read_text().splitlines()) - 1
        folder = place(tmp_path / name, {name: real / name})
        assert len(list(READERS["kinetics400"](folder, DATA))) == rows > 7
    labels = (real / "label_map_k700.txt").read_text().splitlines()
    assert len(labels) == CLASSES["kinetics700"][1] == len(set(labels))
    rows = [f'"{label}",{number:011d},1,11,train' for number, label in enumerate(labels)]
    listing = "label,youtube_id,time_start,time_end,split\n" + "\n".join(rows) + "\n"
    folder = place(tmp_path / "k700", {"kinetics700_train.csv": listing})
    clips = list(READERS["kinetics700"](folder, DATA))
    assert {clip.source for clip in clips} == {"kinetics700"} and len(clips) == 700
    assert values(clips, "action") == set(labels)


@needs_data
def test_vggsound(tmp_path):
    folder = place(tmp_path / "parts", {"test.csv": FILES / "VGGSound" / "test.csv"})
    clips = list(READERS["vggsound"](folder, DATA))
    assert counts(clips) == {"test": COUNTS["vggsound"]["test"]}
    assert len(values(clips, "sound")) == CLASSES["vggsound"][1]
    assert (clips[0].start, clips[0].end) == (300.0, 310.0)
    assert clips[0].labels == {"sound": "playing hammond organ"}
    with (FILES / "VGGSound" / "stat.csv").open(newline="") as file:
        stat = {row[0]: int(row[1]) for row in csv.reader(file)}
    assert set(stat) == values(clips, "sound")
    assert sum(stat.values()) == sum(COUNTS["vggsound"].values())
    write_manifest(tmp_path / "m", clips)
    whole = "".join(
        f'{clip.url[-11:]},{clip.start:g},"{clip.labels["sound"]}",{split}\n'
        for clip, split in zip(clips, ["train", "test"] * len(clips), strict=False)
    )
    again = list(READERS["vggsound"](place(tmp_path / "whole", {"vggsound.csv": whole}), DATA))
    assert [clip.clip_id for clip in again] == [clip.clip_id for clip in clips]
    assert counts(again) == {"train": 7723, "test": 7723}


@needs_data
def test_ucf101_knows_its_three_folds(tmp_path):
    names = [f"{s}list0{k}.txt" for s in ("train", "test") for k in (1, 2, 3)]
    folder = place(tmp_path, {name: FILES / "UCF101" / name for name in names})
    clips = list(READERS["ucf101"](folder, DATA))
    assert counts(clips) == COUNTS["ucf101"] and len(values(clips, "action")) == 101
    tests = [sum(clip.labels[f"fold{k}"] == "test" for clip in clips) for k in (1, 2, 3)]
    assert tests == [3783, 3734, 3696]
    assert clips[0].url == "folder:ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi"
    write_manifest(tmp_path / "m", clips)


@needs_data
def test_hmdb51_knows_its_three_folds(tmp_path):
    clips = list(READERS["hmdb51"](FILES / "HMDB51" / "testTrainMulti_7030_splits", DATA))
    assert counts(clips) == COUNTS["hmdb51"] and len(values(clips, "action")) == 51
    for fold in ("fold1", "fold2", "fold3"):
        uses = Counter(clip.labels[fold] for clip in clips)
        assert uses == {"train": 3570, "test": 1530, "val": 1666}
    with (FILES / "HMDB51" / "hmdb51.csv").open(newline="") as file:  # others' table of the same
        table = {row["video_id"]: row for row in csv.DictReader(file)}
    use = {"0": "val", "1": "train", "2": "test"}
    for clip in clips:
        row = table.pop(clip.url.rpartition("/")[2])
        told = [clip.labels[f"fold{fold}"] for fold in (1, 2, 3)]
        assert told == [use[row[f"split{fold}"]] for fold in (1, 2, 3)]
    assert not table
    write_manifest(tmp_path / "m", clips)


@needs_data
def test_esc50_knows_its_five_folds(tmp_path):
    clips = list(READERS["esc50"](FILES / "ESC-50", DATA))
    assert counts(clips) == COUNTS["esc50"] and len(values(clips, "sound")) == 50
    assert set(Counter(clip.labels["fold"] for clip in clips).values()) == {400}
    write_manifest(tmp_path / "m", clips)


@needs_data
def test_moments(tmp_path):
    real = FILES / "MomentsInTime"
    files = {f"{name}.csv": real / f"{name}.made.csv" for name in ("trainingSet", "validationSet")}
    clips = list(READERS["moments"](place(tmp_path, files), DATA))
    assert counts(clips) == {"train": 6560, "test": 960}
    assert clips[0].url == "folder:training/inflating/yt-vvIxdBxctWY_15.mp4"
    known = (real / "label_map_mit.txt").read_text().splitlines()
    assert len(known) == CLASSES["moments"][1] and values(clips, "action") <= set(known)
    write_manifest(tmp_path / "m", clips)


@needs_data
def test_youcook2(tmp_path):
    clips = list(READERS["youcook2"](FILES / "YouCook2", DATA))
    assert counts(clips) == COUNTS["youcook2"]
    assert len({clip.url for clip in clips}) == 436
    assert clips[0].captions[0].text == "pick the ends off the verdalago"
    assert (clips[0].start, clips[0].end) == (47.0, 60.0)
    write_manifest(tmp_path / "m", clips)


@needs_data
def test_msrvtt_trains_with_all_sentences_and_tests_with_one(tmp_path):
    real = FILES / "MSR-VTT"
    sentences = [{"video_id": "video0", "caption": text} for text in ("a car", "a red car")]
    names = ("MSRVTT_train.9k.csv", "MSRVTT_JSFUSION_test.csv")
    files = {name: real / name for name in names}
    files["train_val_videodatainfo.json"] = json.dumps({"sentences": sentences})
    clips = list(READERS["msrvtt"](place(tmp_path, files), DATA))
    assert counts(clips) == COUNTS["msrvtt"]
    assert [caption.text for caption in clips[0].captions] == ["a car", "a red car"]
    tests = [clip for clip in clips if clip.split == "test"]
    assert all(len(clip.captions) == 1 for clip in tests)
    assert tests[0].captions[0].text == "a person is connecting something to system"
    write_manifest(tmp_path / "m", clips)


@needs_data
def test_msrvtt_tests_without_the_train_list_and_trains_with_the_real_layout(tmp_path):
    real = FILES / "MSR-VTT"
    for name in ("MSRVTT_JSFUSION_test.csv", "msrvtt_test.csv"):
        folder = place(tmp_path / name, {name: real / name})
        assert counts(READERS["msrvtt"](folder, DATA)) == {"test": 1000}
    names = ("MSRVTT_train.9k.csv", "MSRVTT_JSFUSION_test.csv")
    files = {name: real / name for name in (*names, "videodatainfo_2017_italian.json.gz")}
    clips = list(READERS["msrvtt"](place(tmp_path / "all", files), DATA))
    with gzip.open(real / "videodatainfo_2017_italian.json.gz") as file:
        sentences = Counter(row["video_id"] for row in json.load(file)["sentences"])
    train = {clip.clip_id.removeprefix("msrvtt_"): clip for clip in clips if clip.split == "train"}
    assert len(train) == 9000
    assert all(len(clip.captions) == sentences[name] for name, clip in train.items())
    assert sum(map(bool, (clip.captions for clip in train.values()))) > 300
    made = {"videodatainfo_1kA_english_made.json": real / "videodatainfo_1kA_english_made.json"}
    tests = {name: real / name for name in names} | made
    spoken = READERS["msrvtt"](place(tmp_path / "english", tests), DATA)
    assert all(len(clip.captions) == 1 for clip in spoken if clip.split == "test")


@needs_data
def test_msrvtt_reads_the_sentences_as_clip4clip_hands_them_on(tmp_path, caplog):
    real = Path(TEST_DATA or "/nowhere") / "reported" / "12_msrvtt_data_json" / "ann" / "msrvtt"
    clips = list(READERS["msrvtt"](real, DATA))
    train = [[c.text for c in clip.captions] for clip in clips if clip.split == "train"]
    assert train == [[f"caption {k} of video{n}" for k in range(3)] for n in range(3)]
    assert caplog.messages == []
    lists = {name: real / name for name in ("MSRVTT_train.9k.csv", "MSRVTT_JSFUSION_test.csv")}
    assert len(list(READERS["msrvtt"](place(tmp_path, lists), DATA))) == 5
    assert "3 videos have no sentence in *videodatainfo*.json*" in caplog.text


def test_media_that_are_there_already_are_found_by_name(tmp_path):
    rows = "label,youtube_id,time_start,time_end,split\n" + "".join(
        f"run,{name * 11},30,40,train\n" for name in "abc"
    )
    place(tmp_path / "lists" / "kinetics400", {"kinetics-400_train.csv": rows})
    videos = tmp_path / "videos" / "deep"
    videos.mkdir(parents=True)
    (videos / f"{'a' * 11}.webm").touch()
    (videos / f"{'b' * 11}_000030_000040.mp4").touch()
    for sections in (False, True):
        update = {"source": "kinetics400", "annotations": tmp_path / "lists",
                  "location": tmp_path / "videos", "sections": sections}  # fmt: skip
        whole, part, away = listed(DATA.model_copy(update=update), 0)
        assert (whole.url, whole.start, whole.end) == (f"folder:deep/{'a' * 11}.webm", 30.0, 40.0)
        assert part.url == f"folder:deep/{'b' * 11}_000030_000040.mp4"
        assert (part.start, part.end) == (0.0, 10.0)
        assert away.url.startswith("https://www.youtube.com/watch?v=ccccccccccc")


def test_parts_of_videos_are_known_by_name_or_by_their_length(tmp_path):
    rows = [
        ("a", "Y" + "a" * 11, ".wav"),
        ("b", "b" * 11 + "_000030", ".mp4"),
        ("c", "c" * 11, ".mp4"),
    ]
    videos = tmp_path / "videos" / "val"
    videos.mkdir(parents=True)
    for _, stem, ending in rows:
        write_media(videos / f"{stem}{ending}", seconds=9.8, form="mp4")
    write_media(videos / f"{'d' * 11}.mp4", seconds=41)
    listing = "youtube_id,time_start,time_end,split\n" + "".join(
        f"{letter * 11},30,40,val\n" for letter in "abcd"
    )
    place(tmp_path / "lists" / "kinetics400", {"a.csv": listing})
    update = {"source": "kinetics400", "annotations": tmp_path / "lists",
              "location": tmp_path / "videos"}  # fmt: skip
    *parts, whole = listed(DATA.model_copy(update=update), 0)
    for clip, (_, stem, ending) in zip(parts, rows, strict=True):
        assert clip.url == f"folder:val/{stem}{ending}" and (clip.start, clip.end) == (0.0, 10.0)
    assert whole.url == f"folder:val/{'d' * 11}.mp4" and (whole.start, whole.end) == (30.0, 40.0)


def test_sentences_move_with_a_video_that_is_there_in_parts(tmp_path):
    for folder, name in (("part", f"{'a' * 11}_000030_000040.mp4"), ("whole", f"{'a' * 11}.mp4")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch()
    listing = f"start,end,task,text,video_id\n30,40,cook,stir,{'a' * 11}\n"
    place(tmp_path / "lists" / "youcook2", {"validation_youcook.csv": listing})
    for folder, start, sections in (("part", 0, False), ("part", 0, True), ("whole", 30, True)):
        update = {"source": "youcook2", "annotations": tmp_path / "lists", "sections": sections,
                  "location": tmp_path / folder}  # fmt: skip
        [clip] = listed(DATA.model_copy(update=update), 0)
        assert (clip.start, clip.end) == (start, start + 10)
        [said] = clip.captions
        assert (said.start, said.end) == (clip.start, clip.end)


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    """A video of Moments in Time may stand under two actions, and in both splits."""
    lists = {"trainingSet.csv": "run/a.mp4,run,3,0\nwalk/a.mp4,walk,3,0\n",
             "validationSet.csv": "run/a.mp4,run,3,0\nwalk/b.mp4,walk,3,0\n"}  # fmt: skip
    place(tmp_path / "lists" / "moments", lists)
    for name in ("training/run/a", "training/walk/a", "validation/run/a", "validation/walk/b"):
        path = tmp_path / "videos" / "Moments" / f"{name}.webm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    update = {"source": "moments", "annotations": tmp_path / "lists",
              "location": tmp_path / "videos"}  # fmt: skip
    urls = [clip.url for clip in listed(DATA.model_copy(update=update), 0)]
    assert urls == [
        f"folder:Moments/{name}.webm"
        for name in ("training/run/a", "training/walk/a", "validation/run/a", "validation/walk/b")
    ]


def test_a_name_that_leads_out_of_the_folder_is_no_file_of_it(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "a.wav").touch()
    rows = f"filename,fold,category\n../a.wav,1,dog\n{tmp_path}/a.wav,2,dog\n"
    place(tmp_path / "lists" / "esc50", {"esc50.csv": rows})
    update = {"source": "esc50", "annotations": tmp_path / "lists",
              "location": tmp_path / "videos"}  # fmt: skip
    for clip in listed(DATA.model_copy(update=update), 0):
        with pytest.raises(DataError, match="a clip points out of"):
            path_in_folder(clip.url, tmp_path / "videos")


def test_a_video_in_both_splits_of_a_fold_is_refused(tmp_path):
    place(tmp_path, {f"{split}list0{k}.txt": "Run/a.avi 1\n" for split in ("train", "test")
                     for k in "123"})  # fmt: skip
    with pytest.raises(DataError, match=r"testlist01.txt:1: Run/a.avi is in train and in test"):
        list(READERS["ucf101"](tmp_path, DATA))


@needs_data
def test_real_sounds_of_esc50_are_taken_from_their_folder(tmp_path):
    folder = Path(TEST_DATA) / "esc10"
    place(tmp_path / "lists" / "esc50", {"esc50.csv": folder / "meta" / "esc50.csv"})
    update = {"source": "esc50", "annotations": tmp_path / "lists", "location": folder}
    params = demo_params(**update, require=())
    clips = list(listed(params.data, 0))
    states = download(
        clips, params.data, params.machine, media=tmp_path / "media", ledger=tmp_path / "l"
    )
    there = sum(1 for _ in folder.rglob("*.flac"))
    assert states["ok"] == there and states["ok"] + states.get("not-found", 0) == len(clips)
    assert {entry.has for entry in read_ledger(tmp_path / "l").values()} <= {("audio",), ()}


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("kinetics400", "a.csv", "youtube_id,time_start,time_end,split\nx,1,2,val\n", "a.csv:2"),
        ("hmdb51", "run_test_split1.txt", "a.avi 1\nb.avi 7\n", "split1.txt:2: 'b.avi 7'"),
        ("esc50", "esc50.csv", "filename,fold,category\na.wav,9,dog\n", "esc50.csv:2: fold '9'"),
        ("moments", "trainingSet.csv", "run/a.mp4,run,3,0\nb.mp4,run\n", "Set.csv:2: not a file"),
        ("youcook2", "validation_youcook.csv", "end,start,task,text\n", "no column video_id"),
        ("ucf101", "classInd.txt", "", "no trainlist01.txt"),
        (
            "ucf101",
            "trainlist01.txt",
            "Run/a.avi 1\nRun\\b.avi 1\n",
            "list01.txt:2: 'Run\\b.avi 1'",
        ),
        (
            "vggsound",
            "vggsound.csv",
            "a,1,dog,train\nb,2\n",
            "vggsound.csv:1: 'a' is not a YouTube",
        ),
        ("vggsound", "test.csv", "a.mp4,dog\n", "test.csv:1: not a file <id>_<second>.mp4"),
        ("vggsound", "notes.txt", "", "not one of vggsound.csv, train.csv, test.csv"),
    ],
)
def test_broken_lists_are_named_by_line(tmp_path, name, file, text, message):
    place(tmp_path, {file: text})
    with pytest.raises(DataError) as caught:
        list(READERS[name](tmp_path, DATA))
    assert message in str(caught.value)
