"""Sets of files in folds -> clips: UCF101, HMDB51 and ESC-50, each file once.

The splits are those of fold 1; the labels `fold1`, `fold2`, `fold3` (or `fold`) tell all of them.
Files, under their official names: ucf101: trainlist01.txt ... testlist03.txt; hmdb51: the files
*_test_split1.txt ... 3.txt; esc50: esc50.csv. The media lie in the folder data.location.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from vatt.config import DataParams
from vatt.data.clips.manifest import Clip
from vatt.data.sources.official import MANGLED, Faults, csv_rows, file_clip, listed_files, open_text

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
        for number, line in enumerate(open_text(path), start=1):
            if not line.strip():
                continue
            name, _, use = line.strip().rpartition(" ")
            if not name or use not in _HMDB51_USE:
                faults.add(number, f"'{line.strip()}' is no video and 0, 1 or 2")
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
