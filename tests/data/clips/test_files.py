"""The content of a file is its identity: all of it, read once and known again by its stamp."""

import hashlib
import os
import time
import wave
from pathlib import Path

import numpy as np
import pytest

from tests.data.corpus import TEST_DATA, demo_params, needs_data
from tests.data.sharding.test_shards import write
from vatt.data.clips import files
from vatt.data.clips.files import ContentHashes, list_files
from vatt.data.clips.ledger import read_ledger
from vatt.data.clips.manifest import write_manifest
from vatt.data.fetching.download import download
from vatt.data.sources.choice import mark_of_lists
from vatt.data.sources.folder import scan

DATA = demo_params(test_share=0.25).data
REPORTED = Path(TEST_DATA or "/nowhere") / "reported"
LATER = 2**17  # bytes, well after what used to be compared


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def settle() -> None:
    """Wait until a file's time stamp is old enough to be trusted."""
    time.sleep(files.SETTLED_NS / 1e9 * 1.5)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "f"
    root.mkdir()
    for name in "abc":
        (root / name).write_bytes(bytes(LATER) + name.encode())
    settle()
    return root


def test_files_with_equal_heads_and_sizes_have_different_hashes(folder):
    paths = sorted(folder.iterdir())
    assert ContentHashes().of(paths) == [sha256(path) for path in paths]
    assert len({sha256(path) for path in paths}) == 3


def test_a_file_is_read_once_and_again_only_when_it_changes(folder, tmp_path, monkeypatch):
    cache, paths = tmp_path / "cache", sorted(folder.iterdir())
    first = ContentHashes(cache).of(paths)
    assert [ContentHashes(cache).known(path) for path in paths] == first
    times = paths[1].stat()
    with paths[1].open("r+b") as file:
        file.seek(LATER - 5)
        file.write(b"x")
    os.utime(paths[1], ns=(times.st_atime_ns, times.st_mtime_ns))  # as some tools restore it
    assert [ContentHashes(cache).known(path) for path in paths] == [first[0], None, first[2]]
    assert ContentHashes(cache).of(paths) == [sha256(path) for path in paths] != first


def test_a_file_that_has_just_changed_is_not_trusted_to_stay(folder, tmp_path):
    (folder / "a").write_bytes(b"new")
    hashes = ContentHashes(tmp_path / "cache")
    hashes.of([folder / "a"])
    assert hashes.known(folder / "a") is None  # the disk's clock may not see the next change


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "binary", "a folder"])
def test_a_damaged_cache_costs_one_reading(folder, tmp_path, damage):
    cache, paths = tmp_path / "cache", sorted(folder.iterdir())
    right = ContentHashes(cache).of(paths)
    text = cache.read_text()
    cache.unlink()
    if damage == "a folder":
        cache = tmp_path  # cannot be read, nor replaced
        assert ContentHashes(cache, writes=False).of(paths) == right
        return
    flipped = text.replace(right[0], right[1])  # a valid record of a wrong hash
    cache.write_bytes(
        {"torn": text[: len(text) // 2].encode(), "flipped": flipped.encode(), "empty": b"",
         "binary": os.urandom(2000)}[damage]
    )  # fmt: skip
    assert ContentHashes(cache).of(paths) == right
    assert [ContentHashes(cache).known(path) for path in paths] == right


def test_nothing_is_written_on_a_dry_run(folder, tmp_path):
    ContentHashes(tmp_path / "cache", writes=False).of(folder.iterdir())
    assert not (tmp_path / "cache").exists()


def test_files_that_cannot_be_read_are_told_apart_by_their_names(tmp_path):
    one, other = ContentHashes().of([tmp_path / "none", tmp_path / "nothing"])
    assert one != other


def test_a_folder_is_listed_in_order_with_what_was_passed_over(folder):
    (folder / "sub" / ".git").mkdir(parents=True)
    (folder / "sub" / ".git" / "x").touch()
    (folder / "sub" / "d").touch()
    listing = list_files(folder)
    assert listing.files == ["a", "b", "c", "sub/d"] and listing.folders == ["sub"]
    assert listing.skipped == {"hidden files": 1}


# --- what follows from it -------------------------------------------------------------------------


def write_sound(path: Path, level: int) -> None:
    """Two seconds: the first is silent, so that heads are equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.zeros(96_000, np.int16)
    samples[48_000:] = level * np.sign(np.sin(np.arange(48_000) / 9))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(48_000)
        file.writeframes(samples.tobytes())


def test_sounds_with_equal_heads_are_not_copies(tmp_path):
    for number in range(4):
        write_sound(tmp_path / f"s{number}.wav", 1000 * number + 1000)
    splits = [clip.split for clip in scan(tmp_path, DATA).clips]
    assert sorted(set(splits)) == ["test", "train"]


def test_changed_content_is_cut_again_and_nothing_else(tmp_path):
    root = tmp_path / "videos"
    for number in range(8):
        write_sound(root / f"s{number}.wav", 1000 * number + 1000)
    settle()
    params = demo_params(source="folder", location=root, test_share=0.0, require=("audio",))
    shards = tmp_path / "shards"

    def through() -> tuple[str, dict[str, bytes]]:
        hashes = ContentHashes.beside(tmp_path / "media")
        found = scan(root, params.data, hashes=hashes)
        write_manifest(tmp_path / "manifest.jsonl", found.clips)
        download(
            found.clips, params.data, params.machine, media=tmp_path / "media",
            ledger=tmp_path / "d.jsonl",
        )  # fmt: skip
        known = read_ledger(tmp_path / "d.jsonl")
        for clip in found.clips:
            assert known[clip.clip_id].sha256 == sha256(root / clip.url.removeprefix("folder:"))
        write(tmp_path, found.clips, known, params=params)
        return found.mark, {path.name: path.read_bytes() for path in shards.glob("*.tar")}

    mark, before = through()
    stamps = {path.name: path.stat().st_ino for path in shards.glob("*.tar")}
    assert len(before) > 1
    write_sound(root / "s3.wav", 12_000)  # the same size, the same head
    settle()
    other, after = through()
    assert other != mark
    changed = [name for name in before if before[name] != after[name]]
    assert len(changed) == 1
    again = [p.name for p in shards.glob("*.tar") if p.stat().st_ino != stamps[p.name]]
    assert again == changed


def test_a_change_in_the_middle_of_a_list_or_of_a_listed_file_is_noticed(tmp_path):
    annotations = tmp_path / "ann" / "audioset" / "captions"
    annotations.mkdir(parents=True)
    for path in (annotations.parent / "eval_segments.csv", annotations / "a.csv"):
        path.write_bytes(b"#" * 3 * LATER)
    (tmp_path / "a.mp4").write_bytes(bytes(3 * LATER))
    (tmp_path / "l.csv").write_text("path\na.mp4\nmissing.mp4\n")
    official = DATA.model_copy(update={"source": "audioset", "annotations": tmp_path / "ann"})
    urls = DATA.model_copy(update={"source": "urls", "location": tmp_path / "l.csv"})
    for data, path in (
        (official, annotations.parent / "eval_segments.csv"),
        (official, annotations / "a.csv"),
        (urls, tmp_path / "a.mp4"),
    ):
        before = mark_of_lists(data)
        with path.open("r+b") as file:
            file.seek(3 * LATER // 2)
            file.write(b"x")
        assert mark_of_lists(data) != before
        assert mark_of_lists(data) == mark_of_lists(data)


def test_system_files_beside_a_list_do_not_change_its_mark(tmp_path):
    folder = tmp_path / "audioset"
    folder.mkdir()
    (folder / "eval_segments.csv").write_text("a\n")
    data = DATA.model_copy(update={"source": "audioset", "annotations": tmp_path})
    before = mark_of_lists(data)
    for name in ("._eval_segments.csv", ".DS_Store", "Thumbs.db"):
        (folder / name).write_text("x")
    assert mark_of_lists(data) == before


@needs_data
def test_reported_sounds_that_differ_after_their_heads_are_tested_on(tmp_path):
    for path in (REPORTED / "13_same_head").glob("*.wav"):
        data = bytearray(path.read_bytes())
        data[-1] = int(path.stem[1:])
        (tmp_path / path.name).write_bytes(data)
    assert {clip.split for clip in scan(tmp_path, DATA).clips} == {"train", "test"}
