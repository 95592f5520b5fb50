"""Kinetics-400, -600 and -700's lists -> clips: ten seconds of a YouTube video and one action.

Files: csv of train, val (or validate) and test under any names, with the official columns. The
labels of the test lists were never public: as in the papers, val is what is tested on, and the test
lists are left out.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from vatt.config import DataParams
from vatt.data.manifest import Clip
from vatt.data.sources.official import (
    MANGLED,
    Faults,
    csv_rows,
    listed_files,
    number,
    youtube_span,
)

LABEL = "action"
SPLITS = {"train": "train", "val": "test", "validate": "test", "test": None}
log = logging.getLogger(__name__)


def read_kinetics(folder: Path, data: DataParams, *, source: str) -> Iterator[Clip]:
    """The clips of every csv file in the folder."""
    for path in listed_files(folder, "*.csv"):
        faults, unlabelled = Faults(path, hint=MANGLED), 0
        for line, row in csv_rows(path, ("youtube_id", "time_start", "time_end", "split")):
            try:
                clip = _clip(row, source, sections=data.sections)
            except ValueError as error:
                faults.add(line, str(error))
                continue
            if clip is not None:
                yield clip
            unlabelled += clip is None
        faults.check()
        if unlabelled:
            log.info("%s: %d clips of the test list left out", path, unlabelled)


def _clip(row: dict[str, str], source: str, *, sections: bool) -> Clip | None:
    start, end = number(row["time_start"], "start"), number(row["time_end"], "end")
    url, first, last = youtube_span(row["youtube_id"], start, end, sections=sections)
    if row["split"] not in SPLITS:
        raise ValueError(f"split '{row['split']}' is none of {', '.join(SPLITS)}")
    split = SPLITS[row["split"]]
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
