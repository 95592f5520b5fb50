"""What the readers of published lists share; the published counts."""

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vatt.data.clips.files import skipped_as
from vatt.data.clips.manifest import Clip
from vatt.errors import DataError

SHOWN = 10  # faults named in the message
_VIDEO_ID = re.compile(r"[A-Za-z0-9_-]{11}")

# Clips of the published lists, by split, as their files or papers count them. What Kinetics,
# Moments in Time and ImageNet call val is `test` here: their readers say why.
COUNTS: dict[str, dict[str, int]] = {
    "audioset": {"train": 22_160 + 2_041_789, "test": 20_371},
    "esc50": {"train": 1_600, "test": 400},
    "hmdb51": {"train": 3_570, "val": 1_666, "test": 1_530},
    "howto100m": {"train": 1_220_000},  # videos; published to this precision
    "imagenet": {"train": 1_281_167, "test": 50_000},
    "kinetics400": {"train": 246_534, "test": 19_906},
    "kinetics600": {"train": 392_622, "test": 30_000},
    "kinetics700": {"train": 545_317, "test": 35_000},  # the list of 2019
    "moments": {"train": 802_264, "test": 33_900},  # version 1
    "msrvtt": {"train": 9_000, "test": 1_000},
    "ucf101": {"train": 9_537, "test": 3_783},
    "vggsound": {"train": 183_730, "test": 15_446},
    "youcook2": {"test": 3_350},
}
# The label that is learned from each, and how many classes it has.
CLASSES: dict[str, tuple[str, int]] = {
    "audioset": ("sound", 527),
    "esc50": ("sound", 50),
    "hmdb51": ("action", 51),
    "imagenet": ("class", 1_000),
    "kinetics400": ("action", 400),
    "kinetics600": ("action", 600),
    "kinetics700": ("action", 700),
    "moments": ("action", 339),
    "ucf101": ("action", 101),
    "vggsound": ("sound", 309),
}


def official_counts(sources: Iterable[str]) -> dict[str, int]:
    """Clips of each split in the published lists of all these sources; none when one has none."""
    known = [COUNTS.get(source) for source in sources]
    totals: Counter[str] = Counter()
    for counts in known:
        if counts is None:
            return {}
        totals.update(counts)
    return dict(totals)


class Faults:
    """Bad lines of a file; all of it is read, then they are named at once."""

    def __init__(self, path: Path, *, hint: str) -> None:
        self._path, self._hint = path, hint
        self._shown: list[tuple[int, str]] = []
        self._count = 0

    def add(self, line: int, problem: str) -> None:
        """Note what is wrong in a line."""
        self._count += 1
        if len(self._shown) < SHOWN:
            self._shown.append((line, f"{self._path}:{line}: {problem}"))

    def check(self) -> None:
        """Refuse the file if anything was wrong in it."""
        if self._count:
            more = self._count - len(self._shown)
            rest = [f"... and {more} more lines"] if more else []
            shown = [problem for _, problem in sorted(self._shown)]
            raise DataError("\n".join(shown + rest), hint=self._hint)


MANGLED = "get the official file again, and keep spreadsheet programs away from it"


def open_text(path: Path) -> Iterator[str]:
    """The lines of a text file, without their ends."""
    try:
        with path.open(encoding="utf-8-sig", newline=None) as file:
            for line in file:
                yield line.rstrip("\n")
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing", hint="docs/data-sources.md says where to get it"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error}", hint=MANGLED) from None


def csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a csv file with a header that names at least `columns`, with their lines."""
    reader = csv.reader(open_text(path), skipinitialspace=True)
    header = [name.strip() for name in next(reader, [])]
    missing = [name for name in columns if name not in header]
    if missing:
        raise DataError(
            f"{path}:1: no column {', '.join(missing)} among {', '.join(header) or 'none'}",
            hint=MANGLED,
        )
    faults = Faults(path, hint=MANGLED)
    for row in reader:
        if len(row) == len(header):
            yield reader.line_num, dict(zip(header, row, strict=True))
        elif row:
            faults.add(reader.line_num, f"{len(row)} fields under {len(header)} column names")
    faults.check()


def youtube_url(video_id: str) -> str:
    """The address of a video; ValueError when that is no video's id."""
    if not _VIDEO_ID.fullmatch(video_id):
        raise ValueError(f"'{video_id}' is no YouTube id")
    return f"https://www.youtube.com/watch?v={video_id}"


def file_clip(name: str, source: str, split: str, labels: dict[str, str]) -> Clip:
    """All of a file that lies in the person's own folder, data.location."""
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", Path(name).stem).strip("-")[:40] or "clip"
    short = hashlib.sha256(name.encode()).hexdigest()[:10]
    return Clip(
        clip_id=f"{readable}-{short}",
        source=source,
        url=f"folder:{name}",
        start=0.0,
        end=None,
        split=split,
        labels=labels,
        captions=(),
        licence=None,
    )


def listed_files(folder: Path, pattern: str) -> list[Path]:
    """Files of a pattern, in order; it is an error if there are none."""
    found = sorted(path for path in folder.glob(pattern) if skipped_as(path.name) is None)
    if not found:
        raise DataError(
            f"no {pattern} in {folder}", hint="docs/data-sources.md says where to get it"
        )
    return found


def number(value: str, what: str) -> float:
    """Seconds, from text; ValueError when it is no number."""
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{what} '{value}' is no number of seconds") from None


def youtube_span(
    video_id: str, start: float, end: float, *, sections: bool
) -> tuple[str, float, float]:
    """Address and span of a part of a video.

    With `sections` the address names that part alone (a media fragment, as browsers know it), so
    the file that is fetched for it begins at 0.
    """
    if end <= start or start < 0:
        raise ValueError(f"the span from {start:g} to {end:g} is empty")
    url = youtube_url(video_id)
    return (f"{url}#t={start:g},{end:g}", 0.0, end - start) if sections else (url, start, end)
