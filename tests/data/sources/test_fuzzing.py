"""Whatever bytes a file holds, its reader gives clips or captions, or names the file and the fault.

The short form reads some dozens of mutations of each seed. The long form runs for
VATT_FUZZ_SECONDS seconds a reader: `VATT_FUZZ_SECONDS=600 pytest -m slow tests/data/sources`.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.corpus import demo_params, make_clip
from tests.fuzzing import Reader, fuzz, fuzz_long, run
from vatt.data.clips.ledger import read_ledger
from vatt.data.clips.manifest import LONGEST_TIME, describe_manifest, write_manifest
from vatt.data.clips.text import Vocabulary
from vatt.data.sources.choice import READERS
from vatt.data.sources.subtitles import read_subtitles
from vatt.data.sources.urls import read_urls
from vatt.errors import DataError

DATA = demo_params().data
SRT = b"1\n00:00:01,000 --> 00:00:02,000\ncaf\xc3\xa9 <i>one</i>\n\n2\n00:00:02,500 --> 00:00:04,000\ntwo &amp;\n"
VTT = b"WEBVTT\n\nNOTE x\n\n00:01.000 --> 00:02.000 align:start\none<00:00:01.500><c> two</c>\n\nb\n00:02.000 --> 00:03.000\none two\nthree\n"
WHISPER = b'{"segments": [{"start": 0.5, "end": 12.5, "text": " a b", "words": [{"word": "a", "start": 0, "end": 1}]}, {"start": 3, "end": 4e0, "text": "c"}]}'
WHISPERX = b'{"segments": [{"start": 0.5, "end": 2.5, "text": " a b", "words": [{"word": "a", "start": 0.5, "end": 1, "score": 0.5}, {"word": "b"}]}], "word_segments": [{"word": "a", "start": 0.5, "end": 1}]}'
YOUTUBE = b'{"events": [{"tStartMs": 0, "dDurationMs": 2000, "segs": [{"utf8": "one"}, {"utf8": " two", "tOffsetMs": 500}]}, {"tStartMs": 1990, "segs": [{"utf8": "\\n"}]}]}'
URLS = b'url,start,end,split,label,text\nhttp://a/b.mp4,1,2.5,test,"x, y","say ""hi"""\nhttp://a/c.mp4,,,,z,\n'
VIDEOS = b"video_id,category_1,category_2,rank,task_id\nabcdefghijk,A,B,1,7\nlmnopqrstuv,,,1,7\n"
SPOKEN = b'{"abcdefghijk": {"start": [0.5, 1], "end": [1, 2], "text": ["a", "b"]}, "lmnopqrstuv": {"start": [], "end": [], "text": []}}'
SEGMENTS = b'# num_ytids=2, num_segs=2\nabcdefghijk, 30.000, 40.000, "/m/09x0r,/t/dd00088"\nlmnopqrstuv, 0.000, 10.000, "/m/09x0r"\n'
KINETICS = b'label,youtube_id,time_start,time_end,split\n"arm, x",abcdefghijk,1,11,train\n'
COOKS = b"end,start,task,text,video_id\n60,47,226,pick the ends,abcdefghijk\n89,67,226,combine,abcdefghijk\n"
LEDGER = b'{"clip_id": "a", "has": ["video"], "seconds": 1.5, "stage": "download", "state": "ok"}\n'
SPLITS_UCF = {f"{s}list0{n}.txt": b"Archery/v_a.avi 1\n" for s in ("train", "test") for n in "123"}


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


def official(name: str, file: str, seed: bytes, **others: bytes) -> Reader:
    """The reader of official lists, whose folder holds `others` too."""

    def read(path: Path) -> None:
        clips = {clip.clip_id: clip for clip in READERS[name](path.parent, data)}
        write_manifest(path.parent.parent / "manifest.jsonl", clips.values())

    data = DATA
    folder = f"{name}/"
    if name == "imagenet":  # its images are looked for
        data = DATA.model_copy(update={"location": IMAGES})
        others = {"LOC_synset_mapping.txt": SYNSETS, "LOC_val_solution.csv": SOLUTION} | others
    around = {folder + other: content for other, content in others.items()}
    return Reader(folder + file, seed, read, others=around)


IMAGES = Path(__file__).parent  # replaced by the fixture below
SOLUTION = b"ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 1 2 3 4\n"
SYNSETS = b"n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n"
CASES: dict[str, Callable[[], Reader]] = {
    "srt": lambda: Reader("a.srt", SRT, read_captions),
    "vtt": lambda: Reader("a.vtt", VTT, read_captions),
    "captions of Whisper": lambda: Reader("a.json", WHISPER, read_captions),
    "captions of WhisperX": lambda: Reader("a.json", WHISPERX, read_captions),
    "captions of YouTube": lambda: Reader("a.json", YOUTUBE, read_captions),
    "urls": lambda: Reader("list.csv", URLS, read_list),
    "howto100m, captions": lambda: official(
        "howto100m", "caption.json", SPOKEN, **{"HowTo100M_v1.csv": VIDEOS}
    ),
    "howto100m, videos": lambda: official(
        "howto100m", "HowTo100M_v1.csv", VIDEOS, **{"caption.json": SPOKEN}
    ),
    "audioset": lambda: official("audioset", "eval_segments.csv", SEGMENTS),
    "audioset, classes": lambda: official(
        "audioset", "class_labels_indices.csv", b'index,mid,display_name\n0,/m/09x0r,"Speech"\n',
        **{"eval_segments.csv": SEGMENTS},
    ),
    "audioset, ontology": lambda: official(
        "audioset", "ontology.json", b'[{"id": "/m/09x0r", "name": "Speech"}]',
        **{"eval_segments.csv": SEGMENTS},
    ),
    "kinetics": lambda: official("kinetics400", "a.csv", KINETICS),
    "moments": lambda: official(
        "moments", "trainingSet.csv", b"diving/a.mp4,diving,3,0\nsinging/b c.mp4,singing,2,1\n",
        **{"validationSet.csv": b"diving/c.mp4,diving,3,0\n"},
    ),
    "vggsound": lambda: official(
        "vggsound", "vggsound.csv", b'abcdefghijk,1,"a, b",train\nlmnopqrstuv,30,c,test\n'
    ),
    "ucf101": lambda: official(
        "ucf101", "trainlist01.txt", b"Archery/v_a.avi 3\nBiking/v_b.avi 4\n", **SPLITS_UCF
    ),
    "hmdb51": lambda: official("hmdb51", "wave_test_split1.txt", b"a.avi 1\nb [x].avi 2\nc.avi 0\n"),
    "esc50": lambda: official(
        "esc50", "esc50.csv", b"filename,fold,target,category\n1-1-A-0.wav,1,0,dog\nb.wav,5,1,cat\n"
    ),
    "youcook2": lambda: official("youcook2", "validation_youcook.csv", COOKS),
    "msrvtt": lambda: official(
        "msrvtt", "MSRVTT_data.json", b'{"sentences": [{"video_id": "video0", "caption": "a car"}]}',
        **{
            "MSRVTT_train.9k.csv": b"video_id\nvideo0\n",
            "MSRVTT_JSFUSION_test.csv": b"video_id,sentence\nvideo1,x\n",
        },
    ),
    "imagenet, classes": lambda: official(
        "imagenet", "LOC_synset_mapping.txt", SYNSETS, **{"imagenet_real_labels.json": b"[[0, 1]]"}
    ),
    "imagenet, images": lambda: official(
        "imagenet", "LOC_val_solution.csv", SOLUTION
    ),
    "imagenet, reassessed": lambda: official(
        "imagenet", "imagenet_real_labels.json", b"[[], [0, 1], [1]]"
    ),
    "vocabulary": lambda: Reader("v.txt", b"<pad>\n<unk>\nthe\nof\n", read_words),
    "ledger": lambda: Reader("l.jsonl", LEDGER, read_ledger),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def images(tmp_path_factory):
    """An empty val folder of ImageNet."""
    global IMAGES
    IMAGES = tmp_path_factory.mktemp("images")
    (IMAGES / "val").mkdir()


def manifest(folder: Path, name: str) -> Reader:
    write_manifest(folder / name, [make_clip(1), make_clip(2, end=None)])
    return Reader(name, (folder / name).read_bytes(), describe_manifest)


@pytest.mark.parametrize("name", CASES)
def test_mutated_texts_are_read_or_refused(tmp_path, name):
    case = CASES[name]()
    run(case, tmp_path, case.seed)
    fuzz(case, tmp_path, examples=60)


@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet"])
def test_mutated_manifests_are_read_or_refused(tmp_path, name):
    fuzz(manifest(tmp_path, name), tmp_path, examples=150)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, "m.jsonl", "m.parquet"])
def test_mutations_for_a_long_time(tmp_path, name):
    case = CASES[name]() if name in CASES else manifest(tmp_path, name)
    fuzz_long(name, case, tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "imagenet, images",
            b"ImageId,PredictionString\nILSVRC2012_val_00000001,n01 1 2 3 4\n",
            r"LOC_val_solution\.csv: 'n01' is not a class",
        ),
        (
            "imagenet, reassessed",
            b"[[], [0, 1], [7]]",
            r"imagenet_real_labels\.json is broken: no class has the number 7",
        ),
    ],
)
def test_what_fuzzing_found(tmp_path, name, data, message):
    case = replace(CASES[name](), errors=())
    with pytest.raises(DataError, match=message):
        run(case, tmp_path, data)


def test_the_seeds_are_good(tmp_path):
    assert json.loads(WHISPER) and len(list(READERS)) >= 13
    for name, seed, texts in (
        ("a.srt", SRT, ["café one", "two &"]),
        ("a.json", WHISPERX, ["a b"]),
        ("b.json", YOUTUBE, ["one two"]),
    ):
        (tmp_path / name).write_bytes(seed)
        found = [caption.text for caption in read_subtitles(tmp_path / name).captions]
        assert found == texts
