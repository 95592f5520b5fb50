"""Whatever bytes a file holds, its reader gives clips or captions, or names the file and the fault.

The short form runs some hundred mutations of each seed. The long form runs for
VATT_FUZZ_SECONDS seconds a reader: `VATT_FUZZ_SECONDS=600 pytest -m slow tests/data/sources`.
"""

import json
import math
import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.corpus import demo_params, make_clip
from vatt.data.clips.ledger import read_ledger
from vatt.data.clips.manifest import LONGEST_TIME, describe_manifest, write_manifest
from vatt.data.clips.text import Vocabulary
from vatt.data.sources.choice import READERS
from vatt.data.sources.subtitles import read_subtitles
from vatt.data.sources.urls import read_urls
from vatt.errors import DataError

DATA = demo_params().data
SECONDS = float(os.environ.get("VATT_FUZZ_SECONDS", "20"))
A_HANG = 10.0  # seconds
TEXTS = {
    "srt": b"1\n00:00:01,000 --> 00:00:02,000\ncaf\xc3\xa9 <i>one</i>\n\n2\n00:00:02,500 --> 00:00:04,000\ntwo &amp;\n",
    "vtt": b"WEBVTT\n\nNOTE x\n\n00:01.000 --> 00:02.000 align:start\none<00:00:01.500><c> two</c>\n\nb\n00:02.000 --> 00:03.000\none two\nthree\n",
    "json": b'{"segments": [{"start": 0.5, "end": 12.5, "text": " a b", "words": [{"word": "a", "start": 0, "end": 1}]}, {"start": 3, "end": 4e0, "text": "c"}]}',
    "urls": b'url,start,end,split,label,text\nhttp://a/b.mp4,1,2.5,test,"x, y","say ""hi"""\nhttp://a/c.mp4,,,,z,\n',
    "howto100m": b'{"abcdefghijk": {"start": [0.5, 1], "end": [1, 2], "text": ["a", "b"]}, "lmnopqrstuv": {"start": [], "end": [], "text": []}}',
    "audioset": b'# num_ytids=2, num_segs=2\nabcdefghijk, 30.000, 40.000, "/m/09x0r,/t/dd00088"\nlmnopqrstuv, 0.000, 10.000, "/m/09x0r"\n',
    "kinetics": b'label,youtube_id,time_start,time_end,split\n"arm, x",abcdefghijk,1,11,train\n',
    "msrvtt": b'{"sentences": [{"video_id": "video0", "caption": "a car"}]}',
    "vocabulary": b"<pad>\n<unk>\nthe\nof\n",
    "ledger": b'{"clip_id": "a", "has": ["video"], "seconds": 1.5, "stage": "download", "state": "ok"}\n',
}
SPLICES = [
    b"\0", b"\xff", b"\xc3", b'"', b"'", b",", b"\n", b"\r", b"\r\r\n", b"-->", b"00:", b"[", b"{", b"}]", b"NaN",
    b"1e999", b"-1", b"9" * 400, b"\\ud800", b"\xef\xbb\xbf", b"\xff\xfe", b"&#x110000;", b"<", b"null", b"true", b"[" * 2000,
]  # fmt: skip


@st.composite
def mutated(draw, seed: bytes) -> bytes:
    """A seed with some bytes changed, lost, repeated or put in."""
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 12))
        how = draw(st.integers(0, 3))
        if how == 0:
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif how == 1:
            del data[at : at + length]
        elif how == 2:
            data[at:at] = draw(st.sampled_from(SPLICES))
        else:
            data[at:at] = data[max(at - length, 0) : at] * draw(st.integers(1, 3))
    return bytes(data)


def read_captions(path):
    found = read_subtitles(path)
    for caption in found.captions:
        assert 0 <= caption.start < caption.end <= LONGEST_TIME and caption.text.strip()
        caption.text.encode()
    assert min(found.faults.dropped, found.faults.repaired) >= 0


def read_list(path):
    for clip in read_urls(path, DATA):
        assert clip.start >= 0 and (clip.end is None or clip.start < clip.end < math.inf)


def read_words(path):
    Vocabulary.load(path).encode("the café of", 4)


def read_set(name, *others):
    """A reader of official lists, whose folder holds `others` too."""

    def read(path):
        for file, content in others:
            (path.parent / file).write_bytes(content)
        clips = list(READERS[name](path.parent, DATA))
        write_manifest(
            path.parent / "manifest.jsonl", {clip.clip_id: clip for clip in clips}.values()
        )

    return read


VIDEOS = b"video_id,category_1,category_2,rank,task_id\nabcdefghijk,A,B,1,7\nlmnopqrstuv,,,1,7\n"
CASES = {
    "srt": ("a.srt", read_captions),
    "vtt": ("a.vtt", read_captions),
    "json": ("a.json", read_captions),
    "urls": ("list.csv", read_list),
    "howto100m": ("caption.json", read_set("howto100m", ("HowTo100M_v1.csv", VIDEOS))),
    "audioset": ("eval_segments.csv", read_set("audioset")),
    "kinetics": ("a.csv", read_set("kinetics400")),
    "msrvtt": (
        "MSRVTT_data.json",
        read_set(
            "msrvtt",
            ("MSRVTT_train.9k.csv", b"video_id\nvideo0\n"),
            ("MSRVTT_JSFUSION_test.csv", b"video_id,sentence\nvideo1,x\n"),
        ),
    ),
    "vocabulary": ("v.txt", read_words),
    "ledger": ("l.jsonl", read_ledger),
}


def manifest_seed(folder, name: str) -> bytes:
    write_manifest(folder / name, [make_clip(1), make_clip(2, end=None)])
    return (folder / name).read_bytes()


def run(read, path, data: bytes) -> None:
    """Read it; only an error that names the file is allowed, and only within the time."""
    path.write_bytes(data)
    begun = time.monotonic()
    try:
        read(path)
    except DataError as error:
        assert path.name in error.problem and error.hint
    assert time.monotonic() - begun < A_HANG


def fuzz(read, path, seed: bytes, *, examples: int) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples < 1000,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutated(seed))
    def each(data):
        run(read, path, data)

    each()


@pytest.mark.parametrize("name", CASES)
def test_mutated_texts_are_read_or_refused(tmp_path, name):
    file, read = CASES[name]
    run(read, tmp_path / file, TEXTS[name])
    fuzz(read, tmp_path / file, TEXTS[name], examples=60)


@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet"])
def test_mutated_manifests_are_read_or_refused(tmp_path, name):
    seed = manifest_seed(tmp_path, name)
    fuzz(describe_manifest, tmp_path / name, seed, examples=150)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, "m.jsonl", "m.parquet"])
def test_mutations_for_a_long_time(tmp_path, name):
    file, read = CASES.get(name, (name, describe_manifest))
    seed = TEXTS[name] if name in TEXTS else manifest_seed(tmp_path, name)
    begun = time.monotonic()
    while time.monotonic() - begun < SECONDS:
        fuzz(read, tmp_path / file, seed, examples=1000)


def test_the_seeds_are_good(tmp_path):
    assert json.loads(TEXTS["json"]) and len(list(READERS)) >= 13
    (tmp_path / "a.srt").write_bytes(TEXTS["srt"])
    assert [caption.text for caption in read_subtitles(tmp_path / "a.srt").captions] == [
        "café one",
        "two &",
    ]
