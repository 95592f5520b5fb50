"""Published lists of labelled clips: Kinetics, Moments in Time, VGGSound, UCF101, HMDB51, ESC-50.

The last three come in folds. A clip's split is that of fold 1; its labels `fold1`, `fold2`, `fold3`
(ESC-50: `fold`) name the others too. Files, under their official names: ucf101: trainlist01.txt ...
testlist03.txt; hmdb51: *_test_split1.txt ... 3.txt; esc50: esc50.csv.
"""

import csv
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from vatt.config import DataParams
from vatt.data.clips.manifest import SPLITS, Clip
from vatt.data.sources.official import (
    MANGLED,
    Faults,
    csv_rows,
    file_clip,
    listed_files,
    number,
    open_text,
    youtube_span,
)
from vatt.errors import DataError

LABEL = "action"
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
            log.info("%s: %d clips of the test list left out", path, unlabelled)


def _kinetics_clip(row: dict[str, str], source: str, *, sections: bool) -> Clip | None:
    start, end = number(row["time_start"], "start"), number(row["time_end"], "end")
    url, first, last = youtube_span(row["youtube_id"], start, end, sections=sections)
    if row["split"] not in KINETICS_SPLITS:
        raise ValueError(f"split '{row['split']}' is none of {', '.join(SPLITS)}")
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
        labels={LABEL: row["label"]} if row.get("label") else {},
        captions=(),
        licence=None,
    )


FILES = {"trainingSet.csv": ("training", "train"), "validationSet.csv": ("validation", "test")}


def read_moments(folder: Path, data: DataParams) -> Iterator[Clip]:
    """The files of both lists."""
    for name, (place, split) in FILES.items():
        [path] = listed_files(folder, name)
        faults = Faults(path, hint=MANGLED)
        reader = csv.reader(open_text(path))
        for row in reader:
            if len(row) != 4 or "/" not in row[0]:
                faults.add(reader.line_num, "no file in a folder, label and two votes")
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
            f"none of {', '.join((WHOLE, *PARTS))} in {folder}",
            hint="docs/data-sources.md says where to get them",
        )
    for name in [WHOLE] if WHOLE in names else names:
        faults = Faults(folder / name, hint=MANGLED)
        reader = csv.reader(open_text(folder / name))
        for row in reader:
            try:
                yield _vggsound_clip(row, PARTS.get(name), sections=data.sections)
            except ValueError as error:
                faults.add(reader.line_num, str(error))
        faults.check()


def _vggsound_clip(row: list[str], split: str | None, *, sections: bool) -> Clip:
    if split is None:
        if len(row) != 4 or row[3] not in SPLITS:
            raise ValueError("no id, second, label and split")
        video_id, begin, label, split = row
    else:
        match = _FILE.fullmatch(row[0]) if len(row) == 2 else None
        if match is None:
            raise ValueError("no file <id>_<second>.mp4 and label")
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
_HMDB51_USE = {"0": "val", "1": "train", "2": "test"}  # 0: in neither; kept apart as val


def read_ucf101(folder: Path, data: DataParams) -> Iterator[Clip]:
    """13,320 videos, 101 actions."""
    folds: dict[str, dict[str, str]] = {}
    for fold in FOLDS:
        for split in ("train", "test"):
            for path in listed_files(folder, f"{split}list0{fold}.txt"):
                for line in open_text(path):
                    if line.strip():
                        folds.setdefault(line.split()[0], {})[f"fold{fold}"] = split
    for name, told in folds.items():
        labels = {"action": name.partition("/")[0], **told}
        yield file_clip(name, "ucf101", told.get("fold1", "val"), labels)


def read_hmdb51(folder: Path, data: DataParams) -> Iterator[Clip]:
    """6,766 videos, 51 actions; a fold leaves some of them out."""
    folds: dict[str, dict[str, str]] = {}
    for path in listed_files(folder, "*_test_split?.txt"):
        action, _, fold = path.stem.rpartition("_test_split")
        faults = Faults(path, hint=MANGLED)
        for place, line in enumerate(open_text(path), start=1):
            if not line.strip():
                continue
            name, _, use = line.strip().rpartition(" ")
            if not name or use not in _HMDB51_USE:
                faults.add(place, f"'{line.strip()}' is no video and 0, 1 or 2")
                continue
            folds.setdefault(f"{action}/{name}", {})[f"fold{fold}"] = _HMDB51_USE[use]
        faults.check()
    for name, told in folds.items():
        labels = {"action": name.partition("/")[0], **told}
        yield file_clip(name, "hmdb51", told.get("fold1", "val"), labels)


def read_esc50(folder: Path, data: DataParams) -> Iterator[Clip]:
    """2,000 sounds of five seconds, 50 classes, 5 folds."""
    [path] = listed_files(folder, "esc50.csv")
    faults = Faults(path, hint=MANGLED)
    for line, row in csv_rows(path, ("filename", "fold", "category")):
        if not re.fullmatch(r"[1-5]", row["fold"]):
            faults.add(line, f"fold '{row['fold']}' is none of 1 to 5")
            continue
        split = "test" if row["fold"] == "1" else "train"
        labels = {"sound": row["category"], "fold": row["fold"]}
        yield file_clip(row["filename"], "esc50", split, labels)
    faults.check()
