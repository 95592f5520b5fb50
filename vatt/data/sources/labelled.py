"""Published lists of clips with labels or sentences, each with its official file names.

kinetics400, 600, 700: every csv file. moments: trainingSet.csv, validationSet.csv. vggsound:
vggsound.csv, or train.csv and test.csv. audioset: unbalanced_train_segments.csv,
balanced_train_segments.csv, eval_segments.csv (any of them), and class_labels_indices.csv or
ontology.json with the names of the classes.

Three sets come in folds. A clip's split is that of fold 1; its labels `fold1`, `fold2`, `fold3`
(ESC-50: `fold`) name the others too. ucf101: trainlist01.txt ... testlist03.txt; hmdb51:
*_test_split1.txt ... 3.txt; esc50: esc50.csv.

Two are for text-to-video retrieval. youcook2: validation_youcook.csv, the clips that MIL-NCE and
VATT are tested on; msrvtt (1k-A): MSRVTT_JSFUSION_test.csv (or msrvtt_test.csv, the same) and, for
training, MSRVTT_train.9k.csv with the json of its sentences: any *videodatainfo*.json, or
MSRVTT_data.json as distributed with CLIP4Clip (each also as .json.gz).
"""

import gzip
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from vatt.config import DataParams
from vatt.data.clips.manifest import LABEL_SEPARATOR, SPLITS, Caption, Clip
from vatt.data.sources.official import file_clip, listed_files, youtube_span
from vatt.data.sources.textfiles import (
    MANGLED,
    Faults,
    csv_rows,
    number,
    published_lines,
    read_json,
    read_rows,
    split_row,
)
from vatt.errors import DataError

KINETICS_SPLITS = {"train": "train", "val": "test", "validate": "test", "test": None}
log = logging.getLogger(__name__)


def read_kinetics(folder: Path, data: DataParams, *, source: str) -> Iterator[Clip]:
    """The clips of every csv file in the folder."""
    for path in listed_files(folder, "*.csv"):
        faults, unlabelled = Faults(path, hint=MANGLED), 0
        for line, row in csv_rows(path, ("youtube_id", "time_start", "time_end", "split")):
            try:
                clip = _kinetics_clip(row, source, sections=data.sections)
            except ValueError as error:
                faults.add(line, str(error))
                continue
            if clip is not None:
                yield clip
            unlabelled += clip is None
        faults.check()
        if unlabelled:
            log.info("%s: %d clips without a label are left out", path, unlabelled)


def _kinetics_clip(row: dict[str, str], source: str, *, sections: bool) -> Clip | None:
    start, end = number(row["time_start"], "start"), number(row["time_end"], "end")
    url, first, last = youtube_span(row["youtube_id"], start, end, sections=sections)
    if row["split"] not in KINETICS_SPLITS:
        raise ValueError(f"split '{row['split']}' is not one of {', '.join(SPLITS)}")
    split = KINETICS_SPLITS[row["split"]]
    if split is None:
        return None
    return Clip(
        clip_id=f"{source}_{row['youtube_id']}_{start:g}".replace(".", "-"),
        source=source,
        url=url,
        start=first,
        end=last,
        split=split,
        labels={"action": row["label"].strip()} if row.get("label") else {},
        captions=(),
        licence=None,
    )


MOMENTS = {"trainingSet.csv": ("training", "train"), "validationSet.csv": ("validation", "test")}


def read_moments(folder: Path, data: DataParams) -> Iterator[Clip]:
    """The files of both lists."""
    for name, (place, split) in MOMENTS.items():
        [path] = listed_files(folder, name)
        faults = Faults(path, hint=MANGLED)
        for line, row in read_rows(published_lines(path), faults):
            if len(row) != 4 or "/" not in row[0]:
                faults.add(line, "not a file in a folder, a label and two votes")
                continue
            yield file_clip(f"{place}/{row[0]}", "moments", split, {"action": row[1]})
        faults.check()


WHOLE = "vggsound.csv"
PARTS = {"train.csv": "train", "test.csv": "test"}
SECONDS = 10.0
_FILE = re.compile(r"(.{11})_(\d{6})\.mp4")


def read_vggsound(folder: Path, data: DataParams) -> Iterator[Clip]:
    """The clips of the whole list, or of the parts that are there."""
    names = [name for name in (WHOLE, *PARTS) if (folder / name).is_file()]
    if not names:
        raise DataError(
            f"not one of {', '.join((WHOLE, *PARTS))} in {folder}",
            hint="docs/data-sources.md says where to get them",
        )
    for name in [WHOLE] if WHOLE in names else names:
        faults = Faults(folder / name, hint=MANGLED)
        for line, row in read_rows(published_lines(folder / name), faults):
            try:
                yield _vggsound_clip(row, PARTS.get(name), sections=data.sections)
            except ValueError as error:
                faults.add(line, str(error))
        faults.check()


def _vggsound_clip(row: list[str], split: str | None, *, sections: bool) -> Clip:
    if split is None:
        if len(row) != 4 or row[3] not in SPLITS:
            raise ValueError("not an id, a second, a label and a split")
        video_id, begin, label, split = row
    else:
        match = _FILE.fullmatch(row[0]) if len(row) == 2 else None
        if match is None:
            raise ValueError("not a file <id>_<second>.mp4 and a label")
        (video_id, begin), label = match.groups(), row[1]
    start = number(begin, "start")
    url, first, last = youtube_span(video_id, start, start + SECONDS, sections=sections)
    return Clip(
        clip_id=f"vgg_{video_id}_{start:g}".replace(".", "-"),
        source="vggsound",
        url=url,
        start=first,
        end=last,
        split=split,
        labels={"sound": label},
        captions=(),
        licence=None,
    )


FOLDS = ("1", "2", "3")
_UCF101_LINE = re.compile(r"([^\s/\\]+/[^\s/\\]+)(?:\s+\d+)?")
_HMDB51_USE = {"0": "val", "1": "train", "2": "test"}  # 0: in neither; kept apart as val


def read_ucf101(folder: Path, data: DataParams) -> Iterator[Clip]:
    """13,320 videos, 101 actions."""
    folds: dict[str, dict[str, str]] = {}
    for fold in FOLDS:
        for split in ("train", "test"):
            for path in listed_files(folder, f"{split}list0{fold}.txt"):
                _add_fold(path, f"fold{fold}", split, folds)
    for name, uses in folds.items():
        labels = {"action": name.partition("/")[0], **uses}
        yield file_clip(name, "ucf101", uses.get("fold1", "val"), labels)


def _add_fold(path: Path, fold: str, split: str, folds: dict[str, dict[str, str]]) -> None:
    """Add what a list says of a fold."""
    faults = Faults(path, hint=MANGLED)
    for place, line in published_lines(path):
        if not line.strip():
            continue
        match = _UCF101_LINE.fullmatch(line.strip())
        if match is None:
            faults.add(place, f"'{line.strip()[:60]}' is not a video of an action")
        elif folds.setdefault(match[1], {}).setdefault(fold, split) != split:
            faults.add(place, f"{match[1]} is in train and in test")
    faults.check()


def read_hmdb51(folder: Path, data: DataParams) -> Iterator[Clip]:
    """6,766 videos, 51 actions; a fold leaves some of them out."""
    folds: dict[str, dict[str, str]] = {}
    for path in listed_files(folder, "*_test_split?.txt"):
        action, _, fold = path.stem.rpartition("_test_split")
        faults = Faults(path, hint=MANGLED)
        for place, line in published_lines(path):
            if not line.strip():
                continue
            name, _, use = line.strip().rpartition(" ")
            if not name or use not in _HMDB51_USE:
                faults.add(place, f"'{line.strip()}' is not a video and 0, 1 or 2")
                continue
            folds.setdefault(f"{action}/{name}", {})[f"fold{fold}"] = _HMDB51_USE[use]
        faults.check()
    for name, uses in folds.items():
        labels = {"action": name.partition("/")[0], **uses}
        yield file_clip(name, "hmdb51", uses.get("fold1", "val"), labels)


def read_esc50(folder: Path, data: DataParams) -> Iterator[Clip]:
    """2,000 sounds of five seconds, 50 classes, 5 folds."""
    [path] = listed_files(folder, "esc50.csv")
    faults = Faults(path, hint=MANGLED)
    for line, row in csv_rows(path, ("filename", "fold", "category")):
        if not re.fullmatch(r"[1-5]", row["fold"]):
            faults.add(line, f"fold '{row['fold']}' is not one of 1 to 5")
            continue
        split = "test" if row["fold"] == "1" else "train"
        labels = {"sound": row["category"], "fold": row["fold"]}
        yield file_clip(row["filename"], "esc50", split, labels)
    faults.check()


SEGMENTS = {
    "unbalanced_train_segments.csv": "train",
    "balanced_train_segments.csv": "train",
    "eval_segments.csv": "test",
}
SEGMENT_FIELDS = 4  # id, start, end, labels
_CLASS = re.compile(r"/[a-z]/\w+")


def read_audioset(folder: Path, data: DataParams) -> Iterator[Clip]:
    """The segments of every official list in the folder."""
    found = [name for name in SEGMENTS if (folder / name).is_file()]
    if not found:
        raise DataError(
            f"not one of {', '.join(SEGMENTS)} in {folder}",
            hint="docs/data-sources.md says where to get them",
        )
    names = read_class_names(folder)
    for name in found:
        yield from read_segments(folder / name, SEGMENTS[name], names, sections=data.sections)


def read_class_names(folder: Path) -> dict[str, str]:
    """Classes by their machine ids: /m/09x0r -> Speech. Empty when no file says."""
    table, ontology = folder / "class_labels_indices.csv", folder / "ontology.json"
    if table.is_file():
        rows = csv_rows(table, ("mid", "display_name"))
        return {row["mid"]: row["display_name"] for _, row in rows}
    if ontology.is_file():
        try:
            return {str(entry["id"]): str(entry["name"]) for entry in read_json(ontology)}
        except (TypeError, KeyError) as error:
            raise DataError(f"{ontology} is broken: {error}", hint=MANGLED) from None
    return {}


def read_segments(
    path: Path, split: str, names: dict[str, str], *, sections: bool
) -> Iterator[Clip]:
    """The segments of one list; bad lines are named with their numbers at its end."""
    faults = Faults(path, hint=MANGLED)
    promised, count = None, 0
    for line, text in published_lines(path):
        if text.startswith("#") and not text.startswith("#NAME?"):
            counted = re.search(r"num_segs=(\d+)", text)
            promised = int(counted[1][:18]) if counted else promised
            continue
        if not text.strip():
            continue
        try:
            yield _segment(text, split, names, sections=sections)
            count += 1
        except ValueError as error:
            faults.add(line, str(error))
    faults.check()
    if promised is not None and count != promised:
        raise DataError(
            f"{path} promises {promised} segments in its first lines and holds {count}",
            hint="it was cut off: get the official file again",
        )


def _segment(text: str, split: str, names: dict[str, str], *, sections: bool) -> Clip:
    if text.startswith("#NAME?"):
        raise ValueError("a spreadsheet program has put #NAME? in the place of the video's id")
    fields = split_row(text)
    if len(fields) != SEGMENT_FIELDS:
        raise ValueError(
            f"{len(fields)} fields, not {SEGMENT_FIELDS}: the quotes around the labels are wrong"
        )
    video_id, start, end, classes = fields
    begin = number(start, "start")
    url, first, last = youtube_span(video_id, begin, number(end, "end"), sections=sections)
    labels = classes.split(",")
    for label in labels:
        if not _CLASS.fullmatch(label):
            raise ValueError(f"'{label}' is not a class of the ontology")
    return Clip(
        clip_id=f"as_{video_id}_{begin:g}".replace(".", "-"),
        source="audioset",
        url=url,
        start=first,
        end=last,
        split=split,
        labels={"sound": LABEL_SEPARATOR.join(names.get(label, label) for label in labels)},
        captions=(),
        licence=None,
    )


SENTENCES = ("*videodatainfo*.json*", "MSRVTT_data.json*")  # of these, the first that is there
MSRVTT_TESTS = ("MSRVTT_JSFUSION_test.csv", "msrvtt_test.csv")
A_CLIP = 30.0  # seconds: no clip of MSR-VTT is longer; its sentences hold for all of it


def read_youcook2(folder: Path, data: DataParams) -> Iterator[Clip]:
    """3,350 steps of recipes, a sentence each."""
    [path] = listed_files(folder, "validation_youcook.csv")
    faults = Faults(path, hint=MANGLED)
    seen: Counter[str] = Counter()
    for line, row in csv_rows(path, ("start", "end", "task", "text", "video_id")):
        try:
            start, end = number(row["start"], "start"), number(row["end"], "end")
            url, first, last = youtube_span(row["video_id"], start, end, sections=data.sections)
        except ValueError as error:
            faults.add(line, str(error))
            continue
        name = f"yc_{row['video_id']}_{start:g}_{end:g}".replace(".", "-")
        seen[name] += 1
        yield Clip(
            clip_id=name if seen[name] == 1 else f"{name}_{seen[name]}",
            source="youcook2",
            url=url,
            start=first,
            end=last,
            split="test",
            labels={"recipe": row["task"]},
            captions=(Caption(first, last, row["text"]),) if row["text"].strip() else (),
            licence=None,
        )
    faults.check()


def read_msrvtt(folder: Path, data: DataParams) -> Iterator[Clip]:
    """The 1k-A split: 9,000 train clips with all their sentences, 1,000 test clips with one."""
    sentences: dict[str, list[str]] = {}
    for pattern in SENTENCES:
        for path in sorted(folder.glob(pattern)) if not sentences else ():
            for video_id, sentence in _sentences(path):
                sentences.setdefault(video_id, []).append(sentence)
    train, tests = folder / "MSRVTT_train.9k.csv", [folder / name for name in MSRVTT_TESTS]
    mute = 0
    for _, row in csv_rows(train, ("video_id",)) if train.is_file() else ():
        mute += row["video_id"] not in sentences
        yield _msrvtt(row["video_id"], "train", sentences.get(row["video_id"], []))
    if mute:
        log.warning("%s: %d videos have no sentence in %s", train, mute, " or ".join(SENTENCES))
    path = next((path for path in tests if path.is_file()), tests[0])
    for _, row in csv_rows(path, ("video_id", "sentence")):
        yield _msrvtt(row["video_id"], "test", [row["sentence"]])


def _sentences(path: Path) -> Iterator[tuple[str, str]]:
    record = read_json(path, gzip.open if path.suffix == ".gz" else Path.open)
    try:
        for sentence in record["sentences"]:
            yield str(sentence["video_id"]), str(sentence["caption"])
    except (KeyError, TypeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} is broken: {reason}", hint=MANGLED) from None


def _msrvtt(video_id: str, split: str, sentences: list[str]) -> Clip:
    clip = file_clip(f"{video_id}.mp4", "msrvtt", split, {})
    captions = tuple(Caption(0.0, A_CLIP, sentence) for sentence in sentences if sentence.strip())
    return replace(clip, clip_id=f"msrvtt_{video_id}", captions=captions)
