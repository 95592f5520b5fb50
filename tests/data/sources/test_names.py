"""What files and folders are called: splits, classes, captions, links and what is passed over."""

import os
import shutil
import subprocess
import unicodedata
from pathlib import Path

import pytest

from tests.data.corpus import TEST_DATA, demo_params, needs_data, write_media
from tests.data.sharding.test_images import write_image
from vatt.config import DepthStorageParams, MotionStorageParams
from vatt.data.clips.files import copied_link, find_file, list_files, why_missing
from vatt.data.clips.manifest import path_in_folder
from vatt.data.clips.media import BrokenMediaError, probe
from vatt.data.sources.choice import listed
from vatt.data.sources.folder import scan, split_word
from vatt.data.sources.official import listed_files
from vatt.data.sources.subtitles import match_subtitles
from vatt.data.sources.urls import read_urls
from vatt.errors import DataError
from vatt.files import atomic_write
from vatt.senses import SENSES

DATA = demo_params(test_share=0.25).data
REPORTED = Path(TEST_DATA or "/nowhere") / "reported"
NFD = unicodedata.normalize("NFD", "é")
NFC = unicodedata.normalize("NFC", "é")
WORDS = "1\n00:00:00,000 --> 00:00:01,000\nhello\n"


def make(root: Path, *names: str) -> Path:
    """Files of different content; `x*3` stands for x1, x2, x3."""
    for name in names:
        stem, _, count = name.partition("*")
        number, _, suffix = count.partition(".")
        for k in range(1, int(number) + 1) if count else [""]:
            path = root / (f"{stem}{k}.{suffix}" if count else name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(WORDS if path.suffix in (".srt", ".vtt") else str(path))
    return root


def splits_and_labels(root: Path, **settings: object) -> dict[str, tuple[str, str]]:
    found = scan(root, DATA.model_copy(update=settings))
    return {
        clip.url.removeprefix("folder:"): (clip.split, clip.labels.get("class", ""))
        for clip in found.clips
    }


# --- splits and classes ---------------------------------------------------------------------------


def test_classes_whose_names_look_the_same_are_noted(tmp_path):
    names = ("Cat", "cat", "dog", "dog\u200b", " bird", "bird", "Bär", "fish")
    make(tmp_path, *(f"{name}/{n}*3.jpg" for n, name in enumerate(names)))
    [note] = [note for note in scan(tmp_path, DATA).notes if "nearly equal" in note]
    assert "'Cat' and 'cat'" in note and "' bird' and 'bird'" in note and "fish" not in note


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("train", "val", "test"), ("Train", "Validation", "TEST"), ("training", "valid", "testing"),
     ("TRAIN", "dev", "Test"), ("train2017", "val2017", "test2017"), ("train_set", "VAL", "Test Set")],
)  # fmt: skip
def test_folders_named_like_splits_decide_in_any_case(tmp_path, train, val, test):
    make(tmp_path, *(f"{split}/{c}/{c}*4.jpg" for split in (train, val, test) for c in "ab"))
    found = splits_and_labels(tmp_path, val_share=0.3)
    for name, (split, label) in found.items():
        folder, label_folder, _ = name.split("/")
        assert split == {train: "train", val: "val", test: "test"}[folder]
        assert label == label_folder
    [note] = scan(tmp_path, DATA).notes
    assert f"{test} is test" in note and "data.split_folders: classes" in note


@pytest.mark.parametrize(
    ("train", "test"),
    [("train_256", "test_256"), ("seg_train", "seg_test"), ("trn", "tst"), ("Train (1)", "Test (1)"),
     ("1_train", "2_test"), ("trainA", "testA"), ("ucf train set", "ucf test set")],
)  # fmt: skip
def test_split_words_within_names_count_next_to_each_other(tmp_path, train, test):
    make(tmp_path, *(f"{split}/{c}/{c}*4.jpg" for split in (train, test) for c in "ab"))
    for name, (split, label) in splits_and_labels(tmp_path).items():
        folder, label_folder, _ = name.split("/")
        assert (split, label) == ({train: "train", test: "test"}[folder], label_folder)
    [note] = scan(tmp_path, DATA).notes
    assert f"{train} is train" in note and "data.split_folders: classes" in note
    as_classes = splits_and_labels(tmp_path, split_folders="classes")
    assert {split for split, _ in as_classes.values()} == {"train", "test"}


def test_a_split_word_within_a_name_alone_is_a_class(tmp_path):
    make(tmp_path, "crash test/a*6.jpg", "bus/b*6.jpg", "train ride/c*6.jpg", "car/d*6.jpg")
    found = splits_and_labels(tmp_path)
    assert {label for _, label in found.values()} == {"crash test", "bus", "train ride", "car"}
    make(tmp_path / "two", "test_tube/a*4.jpg", "train_station/b*4.jpg")
    found = splits_and_labels(tmp_path / "two")
    assert {label for _, label in found.values()} == {"test_tube", "train_station"}


def test_words_that_only_begin_like_a_split_are_classes():
    assert [split_word(name) for name in ("trained", "testament", "valley", "a train", "developer")] == [
        None
    ] * 5  # fmt: skip


@pytest.mark.parametrize("name", ["train", "Train", "test", "validation", "dev"])
def test_a_class_may_be_called_like_a_split(tmp_path, name):
    make(tmp_path, f"{name}/t*6.jpg", "bus/b*6.jpg", "car/c*6.jpg")
    found = splits_and_labels(tmp_path)
    assert {label for _, label in found.values()} == {name, "bus", "car"}
    assert {split for split, _ in found.values()} == {"train", "test"}
    assert any(
        name in note and "split_folders: splits" in note for note in scan(tmp_path, DATA).notes
    )
    as_split = splits_and_labels(tmp_path, split_folders="splits")
    assert {as_split[f"{name}/t{k}.jpg"] for k in range(1, 7)} == {(split_word(name), "")}


def test_within_a_split_a_class_may_be_called_train(tmp_path):
    make(tmp_path, *(f"{split}/{c}/{split}{c}*2.jpg" for split in ("train", "test")
                     for c in ("train", "test", "bus")))  # fmt: skip
    for name, (split, label) in splits_and_labels(tmp_path).items():
        assert [split, label] == name.split("/")[:2]


def test_splits_may_lie_below_the_classes(tmp_path):
    make(tmp_path, *(f"{c}/{split}/{c}{split}*2.jpg" for split in ("Train", "Test") for c in "ab"))
    for name, (split, label) in splits_and_labels(tmp_path).items():
        assert [label, split] == name.lower().split("/")[:2]


def test_only_some_classes_may_have_splits(tmp_path):
    make(tmp_path, "cat/train/a*3.jpg", "cat/test/b*3.jpg", "dog/c*3.jpg")
    found = splits_and_labels(tmp_path)
    assert {found[f"cat/test/b{k}.jpg"] for k in (1, 2, 3)} == {("test", "cat")}
    assert {found[f"dog/c{k}.jpg"] for k in (1, 2, 3)} == {("train", "dog")}


def test_classes_in_folders_within_folders_are_pointed_out(tmp_path):
    make(
        tmp_path / "1",
        *(f"{c}/{day}/{c}{day}*3.jpg" for c in ("cat", "dog") for day in ("s1", "s2")),
    )
    [note] = scan(tmp_path / "1", DATA).notes[:1]
    assert note.startswith("folders of one name are one class: s1 (cat/s1, dog/s1), s2 (")
    make(tmp_path / "2", "train/cat/a*3.jpg", "test/cat/s1/b*3.jpg")
    assert any("cat/s1 in cat" in note for note in scan(tmp_path / "2", DATA).notes)
    make(tmp_path / "3", "train/cat/a*3.jpg", "test/cat/b*3.jpg", "train/a|b/c*3.jpg")
    notes = " ".join(scan(tmp_path / "3", DATA).notes)
    assert "one class" not in notes and "names with | are several classes: a|b" in notes


def test_files_that_are_not_what_their_names_say_are_pointed_out(tmp_path):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        write_media(tmp_path / name, size=(32, 32))
    assert not any("their names" in note for note in scan(tmp_path, DATA).notes)
    write_image(tmp_path / "photo.mp4", (9, 9, 9), form=".jpg")
    (tmp_path / "d.mp4").write_text("broken")
    [note] = [note for note in scan(tmp_path, DATA).notes if "their names" in note]
    assert note == "1 files are not what their names say: photo.mp4 is an image"
    (tmp_path / "a.mp4").rename(tmp_path / "film.jpg")
    [note] = [n for n in scan(tmp_path, DATA.model_copy(update={"file_kind": "images"})).notes
              if "their names" in n]  # fmt: skip
    assert "film.jpg is a recording" in note


def test_recordings_of_one_name_in_train_and_test_are_pointed_out(tmp_path):
    make(tmp_path, *(f"{k}.{ending}" for k in range(8) for ending in ("mp4", "mkv")))
    assert any("but for its ending" in note for note in scan(tmp_path, DATA).notes)


def test_the_longest_name_that_a_disk_takes_is_a_name(tmp_path):
    make(
        tmp_path,
        "x" * 251 + ".jpg",
        "é" * 125 + ".jpg",
        "a\nb.jpg",
        "100%d.jpg",
        "-x.jpg",
        "why?.jpg",
    )
    assert len(scan(tmp_path, DATA).clips) == 6
    assert find_file(tmp_path, "x" * 251 + ".jpg") and find_file(tmp_path, "x" * 999) is None
    assert find_file(tmp_path, "x/" * 3000) is None and why_missing(tmp_path / ("x" * 999))
    (tmp_path / "list.csv").write_text("x" * 999 + ".csv")
    assert copied_link(tmp_path / "list.csv") is None


def test_splits_without_classes_and_splits_taken_for_classes(tmp_path):
    make(tmp_path, "train/a*4.jpg", "test/b*4.jpg", "more/c*4.jpg")
    found = splits_and_labels(tmp_path)
    assert {found[f"test/b{k}.jpg"] for k in range(1, 5)} == {("test", "")}
    assert {found[f"more/c{k}.jpg"] for k in range(1, 5)} == {("train", "more")}  # never more tests
    plain = splits_and_labels(tmp_path, split_folders="classes")
    assert {label for _, label in plain.values()} == {"train", "test", "more"}


def test_a_class_in_two_unicode_forms_is_one(tmp_path):
    make(tmp_path, f"train/caf{NFC}/a*3.jpg", f"test/caf{NFD}/b*3.jpg", "train/x/c*3.jpg")
    assert {label for _, label in splits_and_labels(tmp_path).values()} == {f"caf{NFC}", "x"}
    assert any("two Unicode forms" in note for note in scan(tmp_path, DATA).notes)


def test_classes_of_test_that_train_lacks_and_copies_are_pointed_out(tmp_path):
    make(tmp_path, "train/a/a*2.jpg", "train/b/b*2.jpg", "test/A/c*2.jpg")
    (tmp_path / "test" / "A" / "copy.jpg").write_bytes((tmp_path / "train/a/a1.jpg").read_bytes())
    notes = scan(tmp_path, DATA).notes
    assert "1 classes of test are not in train: A" in notes
    assert "1 files of test are copies of files of train" in notes


def test_one_file_alone_leaves_nothing_to_test_on_and_that_is_said(tmp_path):
    make(tmp_path, "friday.mp4")
    assert any("no file is left for testing" in note for note in scan(tmp_path, DATA).notes)


# --- which files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "rule", "kept"),
    [
        (("a/i*12.jpg", "a/g.gif"), "auto", {".jpg", ".gif"}),
        (("a/i*4.png", "a/g*4.gif"), "auto", {".gif"}),
        (("a/i.jpg", "a/g*9.gif"), "auto", {".gif"}),
        (("a/i*12.jpg", "b/stray.mp4"), "auto", {".jpg"}),
        (("a/talk.mp4", "a/talk.jpg", "a/talk-thumb.webp", "a/cover.jpg"), "auto", {".mp4"}),
        (("a/v*3.mp4", "a/i*3.jpg"), "auto", {".mp4"}),
        (("a/i*12.jpg", "b/stray.mp4"), "recordings", {".mp4"}),
        (("a/i.jpg", "b/v*5.mp4"), "images", {".jpg"}),
    ],
)
def test_what_most_files_are_is_used(tmp_path, names, rule, kept):
    make(tmp_path, *names)
    found = scan(tmp_path, DATA.model_copy(update={"file_kind": rule}))
    assert {Path(clip.url).suffix for clip in found.clips} == kept
    everything = {path.suffix for path in tmp_path.rglob("*.*") if path.is_file()}
    is_guess = kept != everything or (".gif" in kept and ".jpg" in kept)
    assert any("data.file_kind" in note for note in found.notes) == is_guess


SYSTEM = (
    "@eaDir/1.jpg/SYNOPHOTO_THUMB_XL.jpg", "#recycle/a.jpg", "$RECYCLE.BIN/a.jpg", "Thumbs.db",
    "System Volume Information/x.jpg", ".Spotlight-V100/a.jpg", "__MACOSX/cat/._1.jpg",
    "lost+found/a.jpg", ".@__thumb/a.jpg", "cat/._1.jpg", "cat/.DS_Store", "cat/desktop.ini",
    "cat/Thumbs.db", "cat/1.jpg:Zone.Identifier", "cat/1.jpg@SynoEAStream",
)  # fmt: skip


def test_what_systems_leave_behind_skips_absent_and_used_by_no_source(tmp_path):
    make(tmp_path, "cat/1.jpg", "dog/2.jpg", *SYSTEM)
    found = scan(tmp_path, DATA)
    assert [clip.url for clip in found.clips] == ["folder:cat/1.jpg", "folder:dog/2.jpg"]
    hidden = sum(any(part.startswith(".") for part in Path(name).parts) for name in SYSTEM)
    # what lies in a system folder is counted with it
    hidden -= "__MACOSX/cat/._1.jpg" in SYSTEM
    assert found.ignored == {"hidden files": hidden, "system files": len(SYSTEM) - hidden}
    assert list_files(tmp_path).files == ["cat/1.jpg", "dog/2.jpg"]


def test_official_lists_and_their_media_pass_over_the_same_files(tmp_path):
    make(tmp_path, "inet/train/n01440764/n01440764_1.JPEG", "inet/train/n01440764/._n01440764_1.JPEG",
         "inet/train/@eaDir/n01440764/x.JPEG", "inet/Val/n01440764/ILSVRC2012_val_00000001.JPEG",
         "inet/Val/n01440764/.DS_Store", "hmdb/@eaDir/a.avi", "hmdb/run/a.mp4")  # fmt: skip
    lists = tmp_path / "ann"
    make(lists, "imagenet/x", "hmdb51/x")
    (lists / "imagenet" / "LOC_synset_mapping.txt").write_text("n01440764 tench\n")
    (lists / "hmdb51" / "run_test_split1.txt").write_text("a.avi 1\n")
    (lists / "hmdb51" / "._run_test_split1.txt").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X")
    update = {"annotations": lists, "source": "imagenet", "location": tmp_path / "inet"}
    assert [clip.url for clip in listed(DATA.model_copy(update=update), 0)] == [
        "folder:train/n01440764/n01440764_1.JPEG",
        "folder:Val/n01440764/ILSVRC2012_val_00000001.JPEG",
    ]
    update |= {"source": "hmdb51", "location": tmp_path / "hmdb"}
    assert [clip.url for clip in listed(DATA.model_copy(update=update), 0)] == ["folder:run/a.mp4"]


# --- links and paths ------------------------------------------------------------------------------


def test_links_to_folders_are_followed_once(tmp_path):
    make(tmp_path / "store", "cats/1.jpg", "deep/dogs/2.jpg")
    root = make(tmp_path / "root", "real/3.jpg")
    (root / "cat").symlink_to(tmp_path / "store" / "cats")
    (root / "dog").symlink_to(tmp_path / "store" / "deep")
    (root / "real" / "up").symlink_to(root)
    (root / "again").symlink_to("real")
    (root / "loop").symlink_to("loop")
    (root / "gone").symlink_to("nowhere")
    found = scan(root, DATA)
    assert {clip.url: clip.labels["class"] for clip in found.clips} == {
        "folder:cat/1.jpg": "cat", "folder:dog/dogs/2.jpg": "dogs", "folder:real/3.jpg": "real",
    }  # fmt: skip
    assert found.ignored == {"links to folders that are listed already": 2, "links to nothing": 2}
    for clip in found.clips:
        assert path_in_folder(clip.url, root).is_file()


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "linked").symlink_to(tmp_path / "unplugged")
    (tmp_path / "text").write_text("../disk")
    assert why_missing(tmp_path / "linked" / "a.mp4") == (
        f"{tmp_path}/linked is a link to {tmp_path}/unplugged, which is not there"
    )
    assert why_missing(tmp_path / "text" / "a.mp4") == (
        f"{tmp_path}/text is a file, not a folder: a link to ../disk that was copied as text"
    )
    assert why_missing(tmp_path / "b.mp4") == "no such file"


def test_a_link_that_was_copied_as_text_is_named(tmp_path):
    ann = tmp_path / "ucf101"
    ann.mkdir()
    for name in ("trainlist01.txt", "testlist01.txt"):
        (ann / name).write_text("Archery/v_Archery_g08_c01.avi 1")  # a list of one line
    assert len(listed_files(ann, "trainlist01.txt")) == 1
    (ann / "testlist01.txt").write_text("../../lists/testlist01.txt")
    with pytest.raises(
        DataError, match=r"testlist01.txt is not the list but a link to \.\./\.\./lis"
    ):
        listed_files(ann, "testlist01.txt")
    (tmp_path / "a.mp4").write_bytes(b"!<symlink>\xff\xfe" + "/disk/a.mp4\0".encode("utf-16-le"))
    with pytest.raises(BrokenMediaError, match=r"a link to /disk/a.mp4 that was copied as text"):
        probe(tmp_path / "a.mp4")
    make(tmp_path, "b.mp4")
    (tmp_path / "more").write_text("../disk/more")
    assert scan(tmp_path, DATA).ignored["links that were copied as text"] == 1
    (tmp_path / "page.html").write_text("<a href=x.html>")
    assert copied_link(tmp_path / "page.html") is None


def test_files_that_are_too_short_are_counted_with_the_setting_that_decides(tmp_path):
    write_media(tmp_path / "a.mp4", seconds=0.5)
    write_media(tmp_path / "b.mp4", seconds=0.8)
    found, preprocess = scan(tmp_path, DATA, opens=True), demo_params().preprocess
    assert found.num_samples(preprocess) == 0
    note = (
        "2 of 2 files give no clip: shorter than 0.9 s (the longest: 0.80 s); "
        "to change this set preprocess.min_clip_seconds"
    )
    assert note in found.counts(preprocess)["notes"]
    assert f"note: {note}" in found.describe(preprocess)


def test_a_list_and_an_official_set_follow_links_too(tmp_path):
    disk = make(tmp_path / "disk", "Archery/v_Archery_g08_c01.mp4", "a.mp4")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "linked").symlink_to(disk)
    (tmp_path / "list" / "l.csv").write_text("path,label\nlinked/a.mp4,x\n")
    [clip] = read_urls(tmp_path / "list" / "l.csv", DATA)
    assert path_in_folder(clip.url, tmp_path / "list" / "l.csv").samefile(disk / "a.mp4")
    folds = [f"ann/ucf101/{split}list0{k}.txt" for split in ("train", "test") for k in (1, 2, 3)]
    make(tmp_path, *folds)
    for name in folds:
        (tmp_path / name).write_text("Archery/v_Archery_g08_c01.avi 1\n" * ("train" in name))
    update = {"source": "ucf101", "annotations": tmp_path / "ann", "location": tmp_path / "list"}
    [clip] = listed(DATA.model_copy(update=update), 0)
    assert clip.url == "folder:linked/Archery/v_Archery_g08_c01.mp4"
    assert path_in_folder(clip.url, tmp_path / "list").is_file()


def test_paths_of_a_list_in_other_forms_are_found(tmp_path):
    make(tmp_path, f"sub/caf{NFD}.mp4", "sub/b.mp4")
    (tmp_path / "l.csv").write_text(f"path,label\nsub/caf{NFC}.mp4,th{NFD}\nsub\\b.mp4,th{NFC}\n")
    clips = list(read_urls(tmp_path / "l.csv", DATA))
    assert [clip.url for clip in clips] == [f"folder:sub/caf{NFD}.mp4", "folder:sub/b.mp4"]
    assert {clip.labels["label"] for clip in clips} == {f"th{NFC}"}
    assert find_file(tmp_path, "sub/none.mp4") is None


def test_a_list_names_splits_in_any_case(tmp_path):
    words = {"Train": "train", "TEST": "test", "Validation": "val", "valid": "val", "dev": "val"}
    rows = "".join(f"http://x/{word}.mp4,{word}\n" for word in words)
    (tmp_path / "l.csv").write_text(f"url,split\n{rows}")
    assert [clip.split for clip in read_urls(tmp_path / "l.csv", DATA)] == list(words.values())


def test_absolute_paths_below_the_list_are_used_and_others_need_the_setting(tmp_path):
    home = make(tmp_path / "home", "a.mp4")
    other = make(tmp_path / "other", "b.mp4") / "b.mp4"
    (home / "l.csv").write_text(f"path\n{home}/a.mp4\n")
    assert [clip.url for clip in read_urls(home / "l.csv", DATA)] == ["folder:a.mp4"]
    for path in (str(other), "../other/b.mp4", "a/../../other/b.mp4", "C:\\b.mp4"):
        (home / "l.csv").write_text(f"path\n{path}\n")
        with pytest.raises(DataError, match=r"l\.csv:2: .*data\.allow_absolute_paths"):
            list(read_urls(home / "l.csv", DATA))
    allowed = DATA.model_copy(update={"allow_absolute_paths": True})
    for path in (str(other), "../other/b.mp4"):
        (home / "l.csv").write_text(f"path\n{path}\n")
        [clip] = read_urls(home / "l.csv", allowed)
        assert path_in_folder(clip.url, home / "l.csv", absolute=True) == other
        with pytest.raises(DataError, match="points out of"):
            path_in_folder(clip.url, home / "l.csv")


@pytest.mark.parametrize(
    "url", ["folder:../x", "folder:a/../../x", "folder:/etc/passwd", "folder:a\0"]
)
def test_a_manifest_cannot_point_out_of_the_folder(tmp_path, url):
    with pytest.raises(DataError, match="points out of"):
        path_in_folder(url, tmp_path)
    assert path_in_folder("folder:a/../b.mp4", tmp_path) == tmp_path / "b.mp4"


# --- subtitles ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "media"),
    [
        ("talk.srt", "talk.mp4"),
        ("talk.en.srt", "talk.mp4"),
        ("talk.es-419.srt", "talk.mp4"),
        ("talk.zh-Hant-HK.vtt", "talk.mp4"),
        ("talk.pt_BR.srt", "talk.mp4"),
        ("talk.en-ehkg1hFWq8A.srt", "talk.mp4"),
        ("talk.en-nP7-2PuUl7o.srt", "talk.mp4"),
        ("talk.en-_-P7_2PuUl7.srt", "talk.mp4"),
        ("talk.en-orig.vtt", "talk.mp4"),
        ("talk.forced.srt", "talk.mp4"),
        ("talk.en.forced.srt", "talk.mp4"),
        ("talk.eng.sdh.srt", "talk.mp4"),
        ("talk.en.cc.srt", "talk.mp4"),
        ("talk.en.auto.srt", "talk.mp4"),
        ("talk.English.srt", "talk.mp4"),
        ("talk.Español.srt", "talk.mp4"),
        ("talk.日本語.srt", "talk.mp4"),
        ("talk.chs.srt", "talk.mp4"),
        ("talk.English (auto-generated).srt", "talk.mp4"),
        ("talk - English.srt", "talk.mp4"),
        ("talk.en.json3", "talk.mp4"),
        ("talk.mp4.srt", "talk.mp4"),
        ("talk.mp4.en.srt", "talk.mp4"),
        ("talk.webm.srt", "talk.mp4"),
        ("talk.en.srt.vtt", "talk.mp4"),
        ("talk_en.srt", "talk.mp4"),
        ("talk [en].srt", "talk.mp4"),
        ("TALK.EN.SRT", "talk.mp4"),
        (f"caf{NFC}.srt", f"caf{NFD}.mp4"),
        (f"caf{NFD}.en.srt", f"caf{NFC}.mp4"),
        ("Vol. 2.srt", "Vol. 2.mp4"),
        ("v1.5 demo.en.srt", "v1.5 demo.mkv"),
        ("show.s01e02.web.srt", "show.s01e02.web.mp4"),
        ("episode.one.srt", "episode.one.mp4"),
        ("one.it.srt", "one.it.mp4"),
        ("sub/talk.de.srt", "sub/talk.mp4"),
    ],
)
def test_a_subtitle_file_belongs_to_the_video_of_its_name(text, media):
    others = ["other.mp4", "Vol.mp4", "v1.mkv", "show.mp4", "episode.mp4", "one.mp4", "en.mp4"]
    assert match_subtitles([*others, media], [text], ["en"]).of == {media: [text]}


@pytest.mark.parametrize(
    "text", ["Vol. 3.srt", "talk.raw.srt", "talk 2.srt", "talk.info.json", "other/talk.srt",
             "talk.live_chat.json", "talks.srt", ".srt"],
)  # fmt: skip
def test_a_subtitle_file_of_another_name_belongs_to_nothing(text):
    found = match_subtitles(["talk.mp4", "Vol..mp4", "Vol.mp4"], [text], ["en"])
    assert not found.of and found.unmatched == [text]


def test_of_several_languages_the_wanted_one_is_read_first(tmp_path):
    texts = [
        "t.de.srt",
        "t.en.auto.srt",
        "t.en.forced.srt",
        "t.en.sdh.srt",
        "t.en.srt",
        "t.pt-BR.srt",
    ]
    best = match_subtitles(["t.mp4"], texts, ["en"]).of["t.mp4"]
    assert (
        best[:3] == ["t.en.srt", "t.en.sdh.srt", "t.en.auto.srt"] and best[-1] == "t.en.forced.srt"
    )
    assert match_subtitles(["t.mp4"], texts, ["pt"]).of["t.mp4"][0] == "t.pt-BR.srt"
    assert match_subtitles(["t.mp4"], texts, ["german", "de"]).of["t.mp4"][0] == "t.de.srt"
    [_, note] = match_subtitles(["t.mp4"], texts, ["en"]).notes
    assert "t.en.srt is read" in note and "data.caption_languages" in note
    make(tmp_path, "t.mp4", *texts)
    assert scan(tmp_path, DATA).with_captions == 1


def test_subtitles_in_a_language_that_is_not_wanted_are_announced():
    texts = ["a.de.srt", "b.fr.srt", "b.de.srt", "c.srt", "d.en.srt"]
    media = ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]
    notes = match_subtitles(media, texts, ["en"]).notes
    assert any(
        "2 files have subtitles in other languages only: a.de.srt is read" in n for n in notes
    )
    assert not any(
        "other languages" in n for n in match_subtitles(media[2:], texts[3:], ["en"]).notes
    )


# --- what was reported ----------------------------------------------------------------------------


@needs_data
def test_reported_names_of_subtitles_are_found():
    found = scan(REPORTED / "10_subtitle_names", DATA)
    assert len(found.clips) == 10 and all(clip.captions for clip in found.clips)
    assert found.ignored.get("subtitles of no video") is None
    assert {clip.split for clip in found.clips} == {"train", "test"}


@needs_data
@pytest.mark.parametrize(
    ("place", "classes", "files"),
    [
        ("06_class_named_train/vehicles", {"bus", "car", "train"}, 18),
        ("07_split_folder_case/upper", {"cat", "dog"}, 16),
        ("08_gif_among_jpg/gifs", {"cat", "dog"}, 15),
        ("16_nas_and_mac_files/syno", {"cat", "dog"}, 10),
        ("17_nfd_labels/norm", {"café", "thé"}, 16),
    ],
)
def test_reported_folders_give_their_classes(place, classes, files):
    found = scan(REPORTED / place, DATA)
    assert {clip.labels["class"] for clip in found.clips} == classes and len(found.clips) == files
    for clip in found.clips:
        named = split_word(clip.url.removeprefix("folder:").split("/")[0])
        assert named in (None, clip.split) or "vehicles" in place


@needs_data
def test_a_reported_video_alone_is_named_as_too_little_to_test_on():
    found = scan(REPORTED / "03_repro_one_video", DATA)
    assert [clip.split for clip in found.clips] == ["train"] and found.clips[0].captions
    assert any(note.startswith("no file is left for testing") for note in found.notes)


@needs_data
def test_reported_links_lead_to_their_files(tmp_path):
    shutil.copytree(REPORTED / "05_symlinks", tmp_path / "links", symlinks=True)
    root = tmp_path / "links"
    subprocess.run(["sh", "make.sh"], cwd=root, check=True)
    urls = DATA.model_copy(update={"source": "urls", "location": root / "list" / "link.csv"})
    official = DATA.model_copy(
        update={"source": "ucf101", "annotations": root / "ann", "location": root / "ucf"}
    )
    for data, count in ((urls, 2), (official, 2)):
        clips = list(listed(data, 0))
        assert len(clips) == count
        assert all(path_in_folder(clip.url, data.location).is_file() for clip in clips)


@needs_data
def test_reported_files_of_macs_are_in_no_official_set():
    root = REPORTED / "16_nas_and_mac_files"
    data = DATA.model_copy(
        update={"source": "imagenet", "annotations": root / "ann", "location": root / "inet"}
    )
    clips = list(listed(data, 0))
    assert len(clips) == 8 and not any("/._" in clip.url for clip in clips)
    assert len(list(listed(data.model_copy(update={"source": "hmdb51"}), 0))) == 2


@needs_data
def test_a_reported_absolute_path_is_refused_with_the_setting_or_used():
    path = REPORTED / "18_absolute_path" / "abs.csv"
    with pytest.raises(DataError, match=r"abs.csv:2: .* set data.allow_absolute_paths: true"):
        list(read_urls(path, DATA))
    allowed = DATA.model_copy(update={"allow_absolute_paths": True})
    assert [clip.url for clip in read_urls(path, allowed)] == [
        "folder:/data/videos/clock12.mp4", "folder:/data/videos/clock60.mp4",
    ]  # fmt: skip


@needs_data
def test_content_that_changes_after_its_head_at_equal_size_changes_the_mark(tmp_path):
    for path in (REPORTED / "13_same_head").glob("*.wav"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = scan(tmp_path, DATA).mark
    data = bytearray((tmp_path / "s1.wav").read_bytes())
    times = (tmp_path / "s1.wav").stat()
    data[2**16 + 1000] ^= 0x55
    (tmp_path / "s1.wav").write_bytes(data)
    os.utime(tmp_path / "s1.wav", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert scan(tmp_path, DATA).mark != before


def test_the_hash_of_what_was_seen_stays_the_same_on_a_second_look(tmp_path):
    make(tmp_path, "a/1.jpg", "b/2.jpg")
    with atomic_write(tmp_path / "a" / "3.jpg") as temporary:
        temporary.write_bytes(os.urandom(8))
    assert scan(tmp_path, DATA).mark == scan(tmp_path, DATA).mark


@pytest.mark.parametrize("name", ["a.motion.csv", "a.depth.mp4", "a.depth/2.png", "a.srt", "b.mp4"])
def test_a_pipe_is_never_opened(tmp_path, name):
    write_media(tmp_path / "a.mp4", size=(32, 32))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    found = scan(tmp_path, DATA)
    assert [clip.url for clip in found.clips] == ["folder:a.mp4"]
    params = demo_params().preprocess.model_copy(
        update={
            "motion": MotionStorageParams(hz=50, channels=1),
            "depth": DepthStorageParams(short_side=16),
        }
    )
    for sense in ("motion", "depth"):
        for path in (tmp_path / name, tmp_path / name.partition("/")[0]):
            [piece], said = SENSES[sense].cut(path, [(0.0, 1.0)], params)
            assert piece is None and said
