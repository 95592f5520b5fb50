"""VGGSound's lists -> clips: ten seconds of a YouTube video and the sound that is seen in them.

Files, under their official names: vggsound.csv (id, second, label, split; no header), or train.csv
and test.csv (file, label), either of them.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from vatt.config import DataParams
from vatt.data.manifest import SPLITS, Clip
from vatt.data.sources.official import MANGLED, Faults, number, open_text, youtube_span
from vatt.errors import DataError

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
                yield _clip(row, PARTS.get(name), sections=data.sections)
            except ValueError as error:
                faults.add(reader.line_num, str(error))
        faults.check()


def _clip(row: list[str], split: str | None, *, sections: bool) -> Clip:
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
