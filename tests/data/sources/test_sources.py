"""A folder and a list of addresses become clips; nothing in them is passed over in silence."""

import os
import shutil
from collections import Counter

import pytest

from tests.data.corpus import demo_params, write_media
from tests.data.sharding.test_shards import write
from vatt.data.clips.ledger import read_ledger
from vatt.data.clips.manifest import read_manifest, write_manifest
from vatt.data.fetching.download import download
from vatt.data.sources.folder import scan
from vatt.errors import DataError

PARAMS = demo_params(test_share=0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight videos in two classes and one beside them, with subtitles and odd neighbours."""
    root = tmp_path_factory.mktemp("videos")
    for number in range(8):
        place = root / ("cats" if number % 2 else "dogs")
        place.mkdir(exist_ok=True)
        write_media(place / f"{number}.mp4", seconds=1 + number / 10)
    shutil.copy(root / "cats" / "1.mp4", root / "dogs" / "copy of 1.mp4")
    write_media(root / "-é 'x' %20 #.MP4", seconds=2.0)
    (root / "-é 'x' %20 #.en.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nhello\n")
    (root / "cats" / "3.vtt").write_text("WEBVTT\n\n00:00.000 --> 00:01.000\na cat\n\nx --> y\n")
    (root / "nobody.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nhello\n")
    (root / "broken.mp4").write_bytes(b"<html></html>")
    (root / "empty.webm").write_bytes(b"")
    (root / "half.mp4.part").write_bytes(b"x")
    (root / "folder.mp4").mkdir()
    (root / "notes.txt").write_text("x")
    (root / ".hidden.mp4").write_bytes(b"x")
    return root


def test_every_file_is_accounted_for(folder):
    found = scan(folder, PARAMS.data, opens=True)
    counts = found.counts(PARAMS.preprocess)
    assert counts["videos"] == 12 and counts["with_captions"] == 2 and counts["captions"] == 2
    assert counts["captions_dropped"] == 1 and counts["labelled"] == 9
    assert counts["ignored"] == {
        ".txt files": 1, "hidden files": 1, "subtitles of no video": 1,
        "unfinished downloads": 1, "folders named like a video": 1,
    }  # fmt: skip
    assert sorted(name for name, _ in found.broken) == ["broken.mp4", "empty.webm"]
    assert "cannot be used: empty.webm: empty file" in found.describe(PARAMS.preprocess)
    files = [path for path in folder.rglob("*") if path.is_file()]
    subtitles = 2
    # the folder that is named like a video is not a file
    assert len(files) == counts["videos"] + subtitles + sum(counts["ignored"].values()) - 1


LINKS = {"dangling.mp4": "nowhere", "loop.mp4": "loop.mp4"}


def test_what_is_no_file_or_has_no_name_is_left_out_and_counted(tmp_path):
    root = tmp_path / "videos"
    (root / "sub").mkdir(parents=True)
    write_media(root / "a\nb.mp4")
    shutil.copy(root / "a\nb.mp4", tmp_path / "outside.mp4")
    (root / "link.mp4").symlink_to(tmp_path / "outside.mp4")  # as libraries of links are made
    for name, target in LINKS.items():
        (root / name).symlink_to(target)
    (root / "sub" / "up").symlink_to(root)
    os.mkfifo(root / "pipe.mp4")  # whoever opens it waits for a writer
    shutil.copy(root / "a\nb.mp4", os.fsencode(root) + b"/caf\xe9.mp4")
    (root / "link.srt").mkdir()
    found = scan(root, PARAMS.data, opens=True)
    write_manifest(tmp_path / "manifest.jsonl", found.clips)
    assert sorted(clip.url for clip in read_manifest(tmp_path / "manifest.jsonl")) == [
        "folder:a\nb.mp4", "folder:dangling.mp4", "folder:link.mp4", "folder:loop.mp4",
    ]  # fmt: skip
    reasons = [(n, f"{root / n} is a link to {to}, which is not there") for n, to in LINKS.items()]
    assert found.broken == reasons
    assert found.ignored == {
        "links to folders that are listed already": 1, "pipes, sockets and devices": 1,
        "files whose names are not UTF-8 (rename them)": 1,
    }  # fmt: skip


def test_labels_captions_and_ids(folder):
    clips = {clip.url.removeprefix("folder:"): clip for clip in scan(folder, PARAMS.data).clips}
    assert clips["cats/3.mp4"].labels == {"class": "cats"}
    assert [caption.text for caption in clips["cats/3.mp4"].captions] == ["a cat"]
    odd = clips["-é 'x' %20 #.MP4"]
    assert odd.labels == {} and odd.captions[0].text == "hello"
    assert len({clip.clip_id for clip in clips.values()}) == 12


def test_the_split_depends_on_content_and_keeps_copies_together(folder, tmp_path):
    clips = {clip.url: clip for clip in scan(folder, PARAMS.data).clips}
    assert 1 <= Counter(clip.split for clip in clips.values())["test"] <= 6
    spoken = {clip.split for clip in clips.values() if clip.captions}
    assert spoken == {"train", "test"}  # at least one of those with words
    assert clips["folder:cats/1.mp4"].split == clips["folder:dogs/copy of 1.mp4"].split
    copied = {
        clip.url: clip for clip in scan(shutil.copytree(folder, tmp_path / "x"), PARAMS.data).clips
    }
    assert {url: c.split for url, c in clips.items()} == {url: c.split for url, c in copied.items()}


def test_a_sub_folder_may_name_the_split(tmp_path):
    for place in ("train/jump", "val/jump", "test", "run"):
        (tmp_path / place).mkdir(parents=True)
        write_media(tmp_path / place / "a.mp4")
    clips = {clip.url: clip for clip in scan(tmp_path, PARAMS.data).clips}
    assert {url.partition("/")[0][7:]: clip.split for url, clip in clips.items()} == {
        "train": "train", "val": "val", "test": "test", "run": "train",
    }  # fmt: skip
    assert clips["folder:val/jump/a.mp4"].labels == {"class": "jump"}
    assert clips["folder:test/a.mp4"].labels == {}


def test_a_folder_goes_through_to_shards_in_place(folder, tmp_path):
    params = demo_params(source="folder", location=folder, test_share=0.25)
    before = sorted(path.stat().st_mtime_ns for path in folder.rglob("*"))
    write_manifest(tmp_path / "manifest.jsonl", scan(folder, params.data).clips)
    clips = list(read_manifest(tmp_path / "manifest.jsonl"))
    counts = download(
        clips, params.data, params.machine, media=tmp_path / "media", ledger=tmp_path / "d.jsonl"
    )
    assert counts == {"ok": 10, "corrupt": 2}
    assert not [path for path in (tmp_path / "media").iterdir() if path.suffix == ".mp4"]
    counts = write(tmp_path, clips, read_ledger(tmp_path / "d.jsonl"), params=params)
    assert counts == {"ok": 10, "corrupt": 2}
    ledger = read_ledger(tmp_path / "ledger.jsonl")
    assert set(ledger) == {clip.clip_id for clip in clips}
    assert sorted(path.stat().st_mtime_ns for path in folder.rglob("*")) == before


def test_a_share_is_held_out_to_validate_and_the_tests_stay_the_same(folder):
    def by_split(**shares):
        clips = scan(folder, demo_params(**shares).data).clips
        return {
            split: {clip.clip_id for clip in clips if clip.split == split}
            for split in ("train", "val", "test")
        }

    without, some = by_split(test_share=0.25), by_split(test_share=0.25, val_share=0.25)
    assert not without["val"] and some["val"]
    assert some["test"] == without["test"]
    assert some["val"] | some["train"] == without["train"]


def test_a_folder_without_videos_is_said_so(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"no video, sound or image in .*; left out: 1 .txt files"):
        scan(tmp_path, PARAMS.data)
    for place, message in (
        (tmp_path / "gone", "gone is missing"),
        (tmp_path / "a.txt", "not a folder"),
    ):
        with pytest.raises(DataError, match=message):
            scan(place, PARAMS.data)
