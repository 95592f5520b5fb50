"""What the readers of published lists share; the published counts."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from vatt.data.clips.files import skipped_as
from vatt.data.clips.manifest import Clip
from vatt.errors import DataError

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


def youtube_url(video_id: str) -> str:
    """The address of a video; ValueError when it is not the id of a video."""
    if not _VIDEO_ID.fullmatch(video_id):
        raise ValueError(f"'{video_id}' is not a YouTube id")
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
