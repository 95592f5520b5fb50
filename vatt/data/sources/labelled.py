"""Published lists of labelled clips: Kinetics-400/600/700, Moments in Time and VGGSound."""

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
