"""AudioSet's segment lists -> clips: ten seconds of a YouTube video and what is heard in them.

Files, under their official names: unbalanced_train_segments.csv, balanced_train_segments.csv,
eval_segments.csv (any of them), and class_labels_indices.csv or ontology.json for the names.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

from vatt.config import DataParams
from vatt.data.clips.manifest import LABEL_SEPARATOR, Clip
from vatt.data.sources.official import MANGLED, Faults, csv_rows, number, open_text, youtube_span
from vatt.errors import DataError

SOURCE = "audioset"
LABEL = "sound"
FILES = {
    "unbalanced_train_segments.csv": "train",
    "balanced_train_segments.csv": "train",
    "eval_segments.csv": "test",
}
FIELDS = 4  # id, start, end, labels
_CLASS = re.compile(r"/[a-z]/\w+")


def read_audioset(folder: Path, data: DataParams) -> Iterator[Clip]:
    """The segments of every official list in the folder."""
    found = [name for name in FILES if (folder / name).is_file()]
    if not found:
        raise DataError(
            f"none of {', '.join(FILES)} in {folder}",
            hint="docs/data-sources.md says where to get them",
        )
    names = read_class_names(folder)
    for name in found:
        yield from read_segments(folder / name, FILES[name], names, sections=data.sections)


def read_class_names(folder: Path) -> dict[str, str]:
    """Classes by their machine ids: /m/09x0r -> Speech. Empty when no file says."""
    table, ontology = folder / "class_labels_indices.csv", folder / "ontology.json"
    if table.is_file():
        rows = csv_rows(table, ("mid", "display_name"))
        return {row["mid"]: row["display_name"] for _, row in rows}
    if ontology.is_file():
        try:
            entries = json.loads(ontology.read_text(encoding="utf-8"))
            return {str(entry["id"]): str(entry["name"]) for entry in entries}
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{ontology} is broken: {error}", hint=MANGLED) from None
    return {}


def read_segments(
    path: Path, split: str, names: dict[str, str], *, sections: bool
) -> Iterator[Clip]:
    """The segments of one list; bad lines are named with their numbers at its end."""
    faults = Faults(path, hint=MANGLED)
    promised, count = None, 0
    for line, text in enumerate(open_text(path), start=1):
        if text.startswith("#") and not text.startswith("#NAME?"):
            counted = re.search(r"num_segs=(\d+)", text)
            promised = int(counted[1]) if counted else promised
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
    [fields] = csv.reader([text], skipinitialspace=True)
    if fields[0].startswith("#NAME?"):
        raise ValueError("a spreadsheet program has put #NAME? in the place of the video's id")
    if len(fields) != FIELDS:
        raise ValueError(
            f"{len(fields)} fields, not {FIELDS}: the quotes around the labels are off"
        )
    video_id, start, end, classes = fields
    begin = number(start, "start")
    url, first, last = youtube_span(video_id, begin, number(end, "end"), sections=sections)
    labels = classes.split(",")
    for label in labels:
        if not _CLASS.fullmatch(label):
            raise ValueError(f"'{label}' is no class of the ontology")
    return Clip(
        clip_id=f"as_{video_id}_{begin:g}".replace(".", "-"),
        source=SOURCE,
        url=url,
        start=first,
        end=last,
        split=split,
        labels={LABEL: LABEL_SEPARATOR.join(names.get(label, label) for label in labels)},
        captions=(),
        licence=None,
    )
