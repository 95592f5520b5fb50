"""A folder of one's own media -> clips; and the files of listed clips that are there already."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlsplit

from vatt.config import DataParams, Params, PreprocessParams
from vatt.data.clips.manifest import SPLITS, Caption, Clip
from vatt.data.clips.media import BrokenMediaError, probe
from vatt.data.clips.samples import windows_of
from vatt.data.sources.subtitles import SUFFIXES, Subtitles, embedded_captions, read_subtitles
from vatt.errors import DataError

AUDIO = {".aac", ".aif", ".aiff", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".wav"}
VIDEO = {".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg"}
IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
PLAYED = AUDIO | VIDEO | {".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"}
MEDIA = PLAYED | IMAGES
LABEL = "class"  # named after the sub-folder
SPLIT_FOLDERS = {name: name for name in SPLITS} | {
    "training": "train", "valid": "val", "validate": "val", "validation": "val", "testing": "test",
}  # fmt: skip
HEAD = 2**16  # bytes that tell a file from another


@dataclass(frozen=True, slots=True)
class Found:
    """What a folder holds; every file of it is counted once."""

    clips: list[Clip]
    with_captions: int
    broken: list[tuple[str, str]]  # file and reason; they stay in the manifest, the ledger says why
    num_samples: int  # clips of preprocess.clip_seconds that can be cut
    ignored: dict[str, int]  # other files, by what they are
    captions_dropped: int  # cues that could not be read
    mark: str  # changes when a file comes, goes or changes

    def counts(self) -> dict[str, Any]:
        """Numbers, for `--json`."""
        return {
            "videos": len(self.clips),
            "by_split": dict(Counter(clip.split for clip in self.clips)),
            "labelled": sum(bool(clip.labels) for clip in self.clips),
            "with_captions": self.with_captions,
            "captions": sum(len(clip.captions) for clip in self.clips),
            "captions_dropped": self.captions_dropped,
            "clips": self.num_samples,
            "broken": len(self.broken),
            "ignored": self.ignored,
        }

    def describe(self) -> str:
        """Some lines for a person."""
        counts = self.counts()
        splits = ", ".join(f"{count} {split}" for split, count in counts["by_split"].items())
        lines = [
            f"{counts['videos']} media files ({splits}), about {counts['clips']} clips",
            f"{counts['with_captions']} with captions ({counts['captions']} sentences), "
            f"{counts['labelled']} labelled by their folder",
        ]
        if self.captions_dropped:
            lines.append(f"{self.captions_dropped} captions could not be read")
        lines += [f"cannot be used: {name}: {reason}" for name, reason in self.broken]
        if self.ignored:
            what = ", ".join(f"{count} {kind}" for kind, count in sorted(self.ignored.items()))
            lines.append(f"left out: {what}")
        return "\n".join(lines)


def scan(folder: Path, data: DataParams, preprocess: PreprocessParams | None = None) -> Found:
    """List the media in a folder and below; a file that cannot be opened is listed too.

    With `preprocess` the files are also opened, to tell how many clips they will give.
    """
    files, ignored = _files(folder)
    if not files:
        raise DataError(
            f"no video, sound or image in {folder}",
            hint=f"known file names end in {', '.join(sorted(MEDIA))}",
        )
    subtitles = _subtitles_of(folder, ignored)
    read = {name: _captions(folder / name, subtitles.get(_stem(name), [])) for name in files}
    spoken = [name for name in files if read[name].captions]
    mute = [name for name in files if not read[name].captions]
    held_out = _held_out(folder, spoken, data) | _held_out(folder, mute, data)
    clips = [_clip(name, read[name].captions, held_out.get(name, "train")) for name in files]
    broken: list[tuple[str, str]] = []
    num_samples = 0
    for name in files:
        if preprocess is None:
            break
        try:
            num_samples += len(windows_of(0.0, probe(folder / name).seconds, preprocess))
        except BrokenMediaError as error:
            broken.append((name, str(error)))
    for stem in sorted(set(subtitles) - {_stem(name) for name in files}):
        for path in subtitles[stem]:
            is_json = path.suffix.lower() == ".json"
            ignored[".json files" if is_json else "subtitles of no video"] += 1
    dropped = sum(subtitles.dropped for subtitles in read.values())
    return Found(
        clips,
        len(spoken),
        broken,
        num_samples,
        dict(+ignored),
        dropped,
        _mark_of_all(folder, files, clips),
    )


def ingest_settings(found: Found, folder: Path, params: Params) -> dict[tuple[str, ...], Any]:
    """The settings that make the pipeline run on what was found."""
    tests = sum(clip.split == "test" for clip in found.clips)
    samples_a_file = found.num_samples / len(found.clips)
    settings: dict[tuple[str, ...], Any] = {
        ("data", "source"): "folder",
        ("data", "location"): str(folder),
        ("data", "location_hash"): found.mark,
    }
    if found.num_samples < params.data.min_clips:
        settings["data", "min_clips"] = max(found.num_samples // 2, 1)
    if tests * samples_a_file < params.evaluate.retrieval_pool:
        settings["evaluate", "retrieval_pool"] = max(int(tests * samples_a_file), 2)
    return settings | _label_settings(found, params)


def _label_settings(found: Found, params: Params) -> dict[tuple[str, ...], Any]:
    """Tasks learn the sub-folders' names; where there are not two to tell apart, there is none."""
    labels = {
        split: {clip.labels.get(LABEL, "") for clip in found.clips if clip.split == split} - {""}
        for split in ("train", "test")
    }
    if len(labels["train"]) < 2 or not labels["test"]:
        return {
            ("finetune", "run"): [],
            ("evaluate", "class_labels"): [],
            ("evaluate", "probes"): {},
        }
    tasks = {("finetune", "tasks", name, "label"): LABEL for name in params.finetune.run}
    probes = {("evaluate", "probes", name, "label"): LABEL for name in params.evaluate.probes}
    return tasks | probes | {("evaluate", "class_labels"): [LABEL]}


def _files(folder: Path) -> tuple[list[str], Counter[str]]:
    """The media below a folder, as sorted relative names, and what else there is."""
    names = []
    ignored: Counter[str] = Counter()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        why = _why_not(path, name)
        if why is None:
            names.append(name)
        elif why:
            ignored[why] += 1
    return _without_covers(names, ignored), ignored


def _without_covers(names: list[str], ignored: Counter[str]) -> list[str]:
    """Images are media where there is nothing else; beside videos they are thumbnails."""
    played = [name for name in names if Path(name).suffix.lower() in PLAYED]
    if not played:
        return names
    suffixes = (Path(name).suffix.lower() for name in names)
    ignored.update(f"{suffix} files" for suffix in suffixes if suffix in IMAGES)
    return played


def _why_not(path: Path, name: str) -> str | None:
    """What a path is that is no medium; "" when that need not be told, None for a medium."""
    suffix = path.suffix.lower()
    if path.is_dir():
        if path.is_symlink():
            return "links to folders"
        return "folders named like a video" if suffix in MEDIA else ""
    if any(part.startswith(".") for part in Path(name).parts):
        return "hidden files"
    if path.exists() and not path.is_file():
        return "pipes, sockets and devices"  # opening one may wait for ever
    if suffix in (".part", ".ytdl"):
        return "unfinished downloads"
    if suffix in MEDIA:
        return None if _is_text(name) else "files whose names are not UTF-8 (rename them)"
    if suffix in SUFFIXES:
        return ""
    return f"{suffix} files" if suffix else "files without an ending"


def _is_text(name: str) -> bool:
    """Whether a file's name is made of characters: on most disks any bytes will do."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _subtitles_of(folder: Path, ignored: Counter[str]) -> dict[str, list[Path]]:
    """Subtitle files by the name, without ending and language, of the video they belong to."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() in SUFFIXES and path.is_file() and not name.startswith("."):
            stem = re.sub(r"\.[A-Za-z]{2,3}(-[A-Za-z]+)?$", "", _stem(name))
            found.setdefault(stem, []).append(path)
    return found


def _stem(name: str) -> str:
    return str(Path(name).with_suffix(""))


def _captions(path: Path, beside: list[Path]) -> Subtitles:
    """From the files beside a video, else from a track inside it."""
    dropped = 0
    for file in beside:
        read = read_subtitles(file)
        dropped += read.dropped
        if read.captions:
            return Subtitles(read.captions, dropped)
    return Subtitles(embedded_captions(path).captions, dropped)


def _held_out(folder: Path, files: list[str], data: DataParams) -> dict[str, str]:
    """About a share of the files to test and one to validate, not less, and at least one of each.

    By content: copies stay together, and nearly every file stays on its side when others come.
    """
    groups: dict[str, list[str]] = {}
    for name in files:
        if _split_of(name) is None:
            groups.setdefault(_mark(folder / name), []).append(name)
    marks = sorted(groups)
    tests = _first(marks, data.test_share)
    vals = 0
    if data.val_share > 0 and len(marks) > tests + 1:
        vals = max(_first(marks, data.test_share + data.val_share) - tests, 1)
    splits = ["test"] * tests + ["val"] * vals
    return {
        name: split for mark, split in zip(marks, splits, strict=False) for name in groups[mark]
    }


def _first(marks: list[str], share: float) -> int:
    """How many of the sorted marks are a share of them; of two or more, at least one."""
    if share == 0 or len(marks) < 2:
        return 0
    return max(int(share * len(marks)), 1, sum(int(m[:12], 16) < share * 16**12 for m in marks))


def _split_of(name: str) -> str | None:
    """The split that a sub-folder of that name decides."""
    folders = Path(name).parts[:-1]
    return next((SPLIT_FOLDERS[part] for part in folders if part in SPLIT_FOLDERS), None)


def _mark(path: Path) -> str:
    """Equal for equal content, without reading all of it."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
        return hashlib.sha256(head + str(path.stat().st_size).encode()).hexdigest()
    except OSError:
        return hashlib.sha256(str(path).encode()).hexdigest()


def _mark_of_all(folder: Path, files: list[str], clips: list[Clip]) -> str:
    """The names, contents and captions of all files, in short."""
    marks = [f"{name} {_mark(folder / name)}" for name in files]
    marks += [repr(clip.captions) for clip in clips]
    return hashlib.sha256("\n".join(marks).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _clip(name: str, captions: tuple[Caption, ...], split: str) -> Clip:
    path = Path(name)
    label = path.parent.name if path.parent.name not in SPLIT_FOLDERS else ""
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", path.stem).strip("-")[:40] or "clip"
    short = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:10]
    return Clip(
        clip_id=f"{readable}-{short}",
        source="folder",
        url=f"folder:{name}",
        start=0.0,
        end=None,
        split=_split_of(name) or split,
        labels={LABEL: label} if label else {},
        captions=captions,
        licence=None,
    )


SLACK = 1.0  # seconds by which a cut part may be longer than its span


def placed(clips: Iterable[Clip], location: Path) -> Iterator[Clip]:
    """Point clips to the files that are there; those of YouTube videos else keep their address.

    A file of an archive lies under its name, in whatever sub-folder. A video's is <id>.mp4, or a
    part of it: <id>_<from>_<to>.mp4 or <id>_<from>.mp4, in whole seconds of six digits, as Kinetics
    and VGGSound are handed on; Y<id>.wav, as AudioSet is; any media ending will do. A file <id>.mp4
    that is no longer than the span is the part too.
    """
    place = _Location(location)
    for clip in clips:
        yield place.archived(clip) if clip.url.startswith("folder:") else place.fetched(clip)


class _Location:
    """A folder of media; gone through once, and only when that is needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._by_stem: dict[str, list[str]] | None = None

    def find(self, name: str) -> str | None:
        """The file of that name, in the most similar folder; its ending may be another."""
        if self._by_stem is None:
            self._by_stem = _files_by_stem(self._folder)
        there = self._by_stem.get(Path(name).stem, [])
        return max(there, key=lambda other: _alike(name, other), default=None)

    def archived(self, clip: Clip) -> Clip:
        """A file of a set that comes as an archive."""
        name = clip.url.removeprefix("folder:")
        if (self._folder / name).is_file():
            return clip
        there = self.find(name)
        return clip if there is None else replace(clip, url=f"folder:{there}")

    def fetched(self, clip: Clip) -> Clip:
        """A video, or the part of it that the clip is."""
        parts = urlsplit(clip.url)
        video_id = parse_qs(parts.query).get("v", [""])[0]
        begin, end = clip.start, clip.end
        if parts.fragment.startswith("t="):  # the span counts from the part's beginning
            begin, end = map(float, parts.fragment.removeprefix("t=").split(","))
        if end is not None:
            since = f"{video_id}_{int(begin):06d}"
            for name in (f"{since}_{int(end):06d}", since, f"Y{video_id}"):
                if (there := self.find(name)) is not None:
                    return replace(clip, url=f"folder:{there}", start=0.0, end=end - begin)
        there = self.find(video_id)
        if there is None:
            return clip
        if end is not None and begin > 0 and self._is_part(there, end - begin):
            begin, end = 0.0, end - begin
        return replace(clip, url=f"folder:{there}", start=begin, end=end)

    def _is_part(self, name: str, seconds: float) -> bool:
        try:
            return probe(self._folder / name).seconds <= seconds + SLACK
        except BrokenMediaError:
            return False  # the ledger will say why


def _files_by_stem(location: Path) -> dict[str, list[str]]:
    """Names below the folder, sorted, by what they are called without folder and ending."""
    found: dict[str, list[str]] = {}
    for folder, folders, names in os.walk(location):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix.lower() in MEDIA:
                found.setdefault(path.stem, []).append(path.relative_to(location).as_posix())
    return found


def _alike(one: str, other: str) -> int:
    """How many folders right above the file have the same names."""
    pairs = zip(PurePosixPath(one).parents, PurePosixPath(other).parents, strict=False)
    count = 0
    for mine, theirs in pairs:
        if mine.name != theirs.name or not mine.name:
            break
        count += 1
    return count
