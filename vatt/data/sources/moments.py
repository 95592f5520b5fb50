"""Moments in Time's lists -> clips: three-second files, one of 339 actions each.

Files, under their official names: trainingSet.csv and validationSet.csv (no header: file, label,
votes for, votes against). The media lie in training/ and validation/ of data.location; validation
is what is tested on, as in the paper: the test labels are not public.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from vatt.config import DataParams
from vatt.data.manifest import Clip
from vatt.data.sources.official import MANGLED, Faults, file_clip, listed_files, open_text

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
