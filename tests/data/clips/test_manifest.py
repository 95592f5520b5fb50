"""A manifest holds what was written, and refuses what could do harm."""

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from tests.data.corpus import TEST_DATA, make_clip, needs_data
from tests.test_architecture import ROOT
from vatt.data.clips import manifest
from vatt.data.clips.manifest import (
    Caption,
    CaptionFaults,
    Clip,
    describe_manifest,
    manifest_hash,
    media_path,
    read_manifest,
    write_manifest,
)
from vatt.errors import DataError


@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet"])
def test_clips_come_back_as_written(tmp_path, name):
    clips = [make_clip(1), make_clip(2, end=None, captions=(Caption(-1.5, 0.25, "żółw 🐢"),))]
    clips.append(replace(make_clip(3, captions=()), labels={}, licence="CC0"))
    assert write_manifest(tmp_path / name, iter(clips)) == 3
    assert list(read_manifest(tmp_path / name)) == clips


@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet"])
def test_half_a_character_from_a_json_escape_can_be_written(tmp_path, name):
    captions = (Caption(0.0, 1.0, json.loads(r'"a \ud83d \ud83d\ude00"')),)
    write_manifest(tmp_path / name, [replace(make_clip(0), captions=captions)])
    [clip] = read_manifest(tmp_path / name)
    assert clip.captions[0].text == "a ? 😀"


def test_hash_names_the_set_whatever_its_order(tmp_path):
    clips = [make_clip(number) for number in range(5)]
    write_manifest(tmp_path / "a", clips)
    write_manifest(tmp_path / "b.parquet", clips[::-1])
    write_manifest(tmp_path / "c", clips[:4])
    assert manifest_hash(tmp_path / "a") == manifest_hash(tmp_path / "b.parquet")
    assert manifest_hash(tmp_path / "a") != manifest_hash(tmp_path / "c")


@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet"])
def test_an_id_given_twice_is_refused_and_nothing_is_written(tmp_path, name):
    with pytest.raises(DataError, match="two clips are called clip-001"):
        write_manifest(tmp_path / name, [make_clip(1), make_clip(2), make_clip(1)])
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_is_described_in_one_pass(tmp_path):
    write_manifest(tmp_path / "m", [make_clip(1), make_clip(2), make_clip(3, split="test")])
    corpus = describe_manifest(tmp_path / "m")
    assert (corpus.clips, corpus.splits, corpus.sources) == (
        3,
        {"train": 2, "test": 1},
        {"test": 3},
    )


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "m.parquet").write_text("{}")
    with pytest.raises(DataError, match=r"m\.parquet is not a Parquet manifest"):
        list(read_manifest(tmp_path / "m.parquet"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_id": "../../etc/passwd"}, "clip_id"),
        ({"clip_id": "a.b"}, "clip_id"),
        ({"split": "training"}, "split"),
        ({"start": 3.0, "end": 2.0}, "empty"),
        ({"end": "two"}, "not a time in seconds"),
        ({"labels": {"digit": 7}}, "not a text"),
        ({"captions": [[0.0, 1.0]]}, "not a clip"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, change, message):
    path = tmp_path / "m.jsonl"
    write_manifest(path, [make_clip(1)])
    good = path.read_text()
    path.write_text(good + json.dumps({**json.loads(good), **change}) + "\n")
    with pytest.raises(DataError, match=message) as caught:
        list(read_manifest(path))
    assert f"{path}:2" in str(caught.value)


ATTACK = Path(TEST_DATA or "/nowhere") / "attack"
ATTACKS = [
    path for kind in ("man-*", "fuzz-jsonl*", "fuzz-parquet*") for path in sorted(ATTACK.glob(kind))
]


@needs_data
@pytest.mark.parametrize("path", ATTACKS, ids=lambda path: path.name)
def test_hostile_manifests_are_named(path):
    with pytest.raises(DataError) as caught:
        describe_manifest(path)
    assert path.name in caught.value.problem and caught.value.hint
    if path.suffix == ".jsonl":
        assert ".jsonl:" in caught.value.problem  # and the line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"clip_id": "a\xff"}', "2: not a clip: 'utf-8' codec"),
        (b"[" * 100_000, "2: not a clip: brackets are nested"),
        (b'{"start": ' + b"9" * 5000 + b"}", "2: not a clip: a number has thousands of digits"),
        (b'{"split": "val", "split": "test"}', "2: not a clip: the key 'split' appears twice"),
        (b" " * (2**25 + 1) + b"{}", "2: not a clip: longer than"),
        (b'"a"', "2: not a clip"),
        (b"17", "2: not a clip"),
    ],
    ids=["bad byte", "deep", "long number", "doubled key", "long line", "text", "number"],
)
def test_a_damaged_line_is_named_with_its_number(tmp_path, line, message):
    write_manifest(tmp_path / "m.jsonl", [make_clip(1)])
    with (tmp_path / "m.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(DataError) as caught:
        describe_manifest(tmp_path / "m.jsonl")
    assert f"m.jsonl:{message}" in caught.value.problem and len(caught.value.problem) < 500


@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet"])
def test_faults_of_captions_come_back_and_are_counted(tmp_path, name):
    faults = CaptionFaults(dropped=2, repaired=1, encoding="cp1251")
    clips = [replace(make_clip(1), caption_faults=faults), make_clip(2)]
    write_manifest(tmp_path / name, clips)
    assert list(read_manifest(tmp_path / name)) == clips
    corpus = describe_manifest(tmp_path / name)
    assert (corpus.captions, corpus.captions_dropped, corpus.captions_repaired) == (4, 2, 1)
    assert corpus.encodings == {"cp1251": 1}


def test_a_parquet_manifest_from_before_faults_were_counted_is_read(tmp_path):
    write_manifest(tmp_path / "m.parquet", [make_clip(1)])
    table = pyarrow.parquet.read_table(tmp_path / "m.parquet").drop_columns(["caption_faults"])
    pyarrow.parquet.write_table(table, tmp_path / "m.parquet")
    assert list(read_manifest(tmp_path / "m.parquet")) == [make_clip(1)]


def test_a_parquet_file_that_unpacks_to_more_than_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "LARGEST_GROUP", 2**20)
    long = (Caption(0.0, 1.0, "x" * 2**21),)
    write_manifest(tmp_path / "m.parquet", [make_clip(1, captions=long)])
    assert (tmp_path / "m.parquet").stat().st_size < 2**14
    with pytest.raises(DataError, match=r"m\.parquet .*: row group 0 unpacks to 2,"):
        describe_manifest(tmp_path / "m.parquet")


def test_a_parquet_file_whose_pages_hide_gigabytes_is_refused_in_bounded_memory(tmp_path):
    """One caption, four million times: its page says some bytes, and so does the file."""
    count = 4_000_000
    write_manifest(tmp_path / "m.parquet", [make_clip(1)])
    table = pyarrow.parquet.read_table(tmp_path / "m.parquet")
    text = pyarrow.DictionaryArray.from_arrays(np.zeros(count, np.int32), ["x" * 1000])
    parts = [pyarrow.array(np.zeros(count)), pyarrow.array(np.ones(count)), text]
    captions = pyarrow.StructArray.from_arrays(parts, ["start", "end", "text"])
    whole = pyarrow.ListArray.from_arrays([0, count], captions)
    table = table.set_column(table.schema.get_field_index("captions"), "captions", whole)
    pyarrow.parquet.write_table(table, tmp_path / "m.parquet", store_schema=False)
    assert (tmp_path / "m.parquet").stat().st_size < 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"m\.parquet is not a Parquet manifest: "):
        describe_manifest(tmp_path / "m.parquet")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2_000_000


def test_clips_of_one_url_share_their_media():
    one, two = make_clip(1), replace(make_clip(2), url=make_clip(1).url)
    assert one.media_name == two.media_name != make_clip(3).media_name
    assert "/" not in replace(one, url="http://x/../../etc/passwd").media_name


def test_a_folder_clip_stays_inside_its_folder(tmp_path):
    def at(url: str) -> Clip:
        return replace(make_clip(1), url=url)

    here = {"media": tmp_path / "media", "location": tmp_path}
    assert media_path(at("folder:a/-b %20.mp4"), **here) == tmp_path / "a/-b %20.mp4"
    for url in ("folder:../secret.mp4", "folder:/etc/passwd"):
        with pytest.raises(DataError, match="points out of"):
            media_path(at(url), **here)
    assert media_path(at("demo:x.mp4"), **here).parent == Path(tmp_path / "media")


@pytest.mark.slow
def test_ten_million_clips_stay_within_two_gigabytes():
    command = [sys.executable, "bench/manifest.py", "--json"]
    done = subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
    steps = json.loads(done.stdout)["steps"]
    counted = steps["count and hash"]["result"]
    assert counted["clips"] == counted["splits"]["train"] + counted["splits"]["test"] == 10**7
    assert counted["sources"] == {"audioset": 8 * 10**6, "howto100m": 2 * 10**6}
    assert steps["sample"]["result"] == pytest.approx(10**6, rel=0.01)
    assert max(step["peak_mb"] for step in steps.values()) < 2000
