"""Kinetics-400 and -600's lists -> clips: ten seconds of a YouTube video and one action.

Files: csv of train, val (or validate) and test under any names, with the official columns; the test
lists of the time of the papers hold no labels.
"""

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
SPLITS = {"train": "train", "val": "val", "validate": "val", "test": "test"}


def read_kinetics(folder: Path, data: DataParams, *, source: str) -> Iterator[Clip]:
    """The clips of every csv file in the folder."""
    for path in listed_files(folder, "*.csv"):
        faults = Faults(path, hint=MANGLED)
        for line, row in csv_rows(path, ("youtube_id", "time_start", "time_end", "split")):
            try:
                yield _clip(row, source, sections=data.sections)
            except ValueError as error:
                faults.add(line, str(error))
        faults.check()


def _clip(row: dict[str, str], source: str, *, sections: bool) -> Clip:
    start, end = number(row["time_start"], "start"), number(row["time_end"], "end")
    url, first, last = youtube_span(row["youtube_id"], start, end, sections=sections)
    if row["split"] not in SPLITS:
        raise ValueError(f"split '{row['split']}' is none of {', '.join(SPLITS)}")
    return Clip(
        clip_id=f"{source}_{row['youtube_id']}_{start:g}".replace(".", "-"),
        source=source,
        url=url,
        start=first,
        end=last,
        split=SPLITS[row["split"]],
        labels={LABEL: row["label"]} if row.get("label") else {},
        captions=(),
        licence=None,
    )
