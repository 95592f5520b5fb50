"""A folder of a person's own media -> clips: which files, in which split, with which words."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from vatt.config import DataParams, PreprocessParams
from vatt.data.clips.files import (
    IMAGES,
    MEDIA,
    RECORDINGS,
    ContentHashes,
    Listing,
    composed,
    copied_link,
    list_files,
    why_missing,
)
from vatt.data.clips.manifest import LABEL_SEPARATOR, Clip
from vatt.data.clips.media import BrokenMediaError, Media, image_format, probe
from vatt.data.clips.samples import windows_of
from vatt.data.sources.subtitles import (
    SUFFIXES,
    Subtitles,
    embedded_captions,
    match_subtitles,
    read_subtitles,
)
from vatt.errors import DataError
from vatt.senses import files_beside

LABEL = "class"  # named after the sub-folder
SHOWN = 3  # names in a note
THUMBNAILS = 4  # of a recording, at most


@dataclass(frozen=True, slots=True)
class Found:
    """What a folder holds; every file of it is counted once."""

    clips: list[Clip]
    with_captions: int
    broken: list[tuple[str, str]]  # file and reason; they stay in the manifest, the ledger says why
    seconds: tuple[float, ...]  # of each file that could be opened; empty: none was looked at
    sounding: frozenset[str]  # addresses of the clips with sound, of those
    ignored: dict[str, int]  # other files, by what they are
    captions_dropped: int  # cues that could not be read
    mark: str  # changes when a file comes, goes or changes
    notes: tuple[str, ...]  # what was guessed, and the setting that overrides it

    def num_samples(self, preprocess: PreprocessParams) -> int:
        """Clips that can be cut from the files."""
        return sum(len(windows_of(0.0, length, preprocess)) for length in self.seconds)

    def counts(self, preprocess: PreprocessParams) -> dict[str, Any]:
        """Numbers, for `--json`."""
        return {
            "videos": len(self.clips),
            "by_split": dict(Counter(clip.split for clip in self.clips)),
            "labelled": sum(bool(clip.labels) for clip in self.clips),
            "with_captions": self.with_captions,
            "captions": sum(len(clip.captions) for clip in self.clips),
            "captions_dropped": self.captions_dropped,
            "clips": self.num_samples(preprocess),
            "broken": len(self.broken),
            "ignored": self.ignored,
            "notes": [*self.notes, *self._too_short(preprocess)],
        }

    def describe(self, preprocess: PreprocessParams) -> str:
        """Some lines for a person."""
        counts = self.counts(preprocess)
        splits = ", ".join(f"{count} {split}" for split, count in counts["by_split"].items())
        lines = [
            f"{counts['videos']} media files ({splits}), about {counts['clips']} clips",
            f"{counts['with_captions']} with captions ({counts['captions']} sentences), "
            f"{counts['labelled']} labelled",
        ]
        if self.captions_dropped:
            lines.append(f"{self.captions_dropped} captions could not be read")
        lines += [f"cannot be used: {name}: {reason}" for name, reason in self.broken]
        if self.ignored:
            lines.append(_left_out("left out: ", self.ignored))
        return "\n".join([*lines, *(f"note: {note}" for note in counts["notes"])])

    def _too_short(self, preprocess: PreprocessParams) -> list[str]:
        """A note on files that give no clip."""
        short = [length for length in self.seconds if not windows_of(0.0, length, preprocess)]
        does = "gives" if len(short) == 1 else "give"
        note = (
            f"{len(short)} of {len(self.clips)} files {does} no clip: shorter than "
            f"{preprocess.min_clip_seconds} s (the longest: {max(short, default=0.0):.2f} s); "
            "to change this set preprocess.min_clip_seconds"
        )
        return [note] if short else []


def _left_out(before: str, ignored: Mapping[str, int]) -> str:
    what = ", ".join(f"{count} {kind}" for kind, count in sorted(ignored.items()))
    return f"{before}{what}" if what else ""


def scan(
    folder: Path,
    data: DataParams,
    *,
    opens: bool = False,
    hashes: ContentHashes | None = None,
) -> Found:
    """List the media in a folder and below; a file that cannot be opened is listed too.

    With `opens` the files are also opened, to know their lengths and whether they have sound.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder} is {'not a folder' if folder.exists() else 'missing'}",
            hint="mount or restore it, or name its new place (`vattctl ingest FOLDER`)",
        )
    listing = list_files(folder)
    ignored = listing.skipped
    senses = _senses(folder, listing)
    files, texts = _sorted_out(folder, listing)
    files, notes = _of_one_kind(files, data.file_kind, ignored)
    if not files:
        raise DataError(
            f"no video, sound or image in {folder}{_left_out('; left out: ', +ignored)}",
            hint=f"known file names end in {', '.join(sorted(MEDIA))}",
        )
    layout = read_layout(files, data.split_folders)
    subtitles = match_subtitles(files, texts, data.caption_languages)
    read = {name: _captions(folder, name, subtitles.of.get(name, []), data) for name in files}
    digests = dict(
        zip(files, (hashes or ContentHashes()).of(folder / name for name in files), strict=True)
    )
    held_out = _held_out(digests, layout, data, spoken={n for n in files if read[n].captions})
    clips = [
        replace(
            _clip(name, read[name], layout.split_of(name) or held_out.get(name, "train"), layout),
            senses={sense: f"folder:{own}" for sense, own in senses.get(name, {}).items()},
        )
        for name in files
    ]
    opened, broken = _opened(folder, files) if opens else ({}, [])
    for name in subtitles.unmatched:
        ignored[".json files" if name.lower().endswith(".json") else "subtitles of no video"] += 1
    notes += [*layout.notes(), *layout.doubts(files), *subtitles.notes, *_tracks_note(read)]
    notes += [*_misnamed(folder, files), *_doubts(clips, digests, files)]
    return Found(
        clips,
        with_captions=sum(bool(subtitles.captions) for subtitles in read.values()),
        broken=broken,
        seconds=tuple(media.seconds for media in opened.values()),
        sounding=frozenset(
            clip.url
            for name, clip in zip(files, clips, strict=True)
            if name in opened and opened[name].audio is not None
        ),
        ignored=dict(+ignored),
        captions_dropped=sum(subtitles.dropped for subtitles in read.values()),
        mark=_mark(digests, clips, _contents(folder, clips, hashes or ContentHashes())),
        notes=tuple(notes),
    )


def _opened(folder: Path, files: Sequence[str]) -> tuple[dict[str, Media], list[tuple[str, str]]]:
    """What the files hold, and those that cannot be opened with the reason."""
    broken: list[tuple[str, str]] = []
    opened = {}
    for name in files:
        try:
            opened[name] = probe(folder / name)
        except BrokenMediaError as error:
            is_there = (folder / name).exists()
            broken.append((name, str(error) if is_there else why_missing(folder / name)))
    return opened, broken


def _misnamed(folder: Path, files: Sequence[str]) -> list[str]:
    """A note on recordings that are called like images, and on images that are called otherwise."""
    odd = []
    for name in files:
        try:
            is_image = image_format(folder / name) is not None
            if is_image and _suffix(name) not in IMAGES | {".gif"}:
                odd.append(f"{name} is an image")
            elif not is_image and _suffix(name) in IMAGES and probe(folder / name).image is None:
                odd.append(f"{name} is a recording")
        except (OSError, BrokenMediaError):
            continue  # named elsewhere
    return [f"{len(odd)} files are not what their names say: {_some(odd)}"] if odd else []


def _classes(clips: Iterable[Clip], split: str, label: str) -> set[str]:
    return {clip.labels[label] for clip in clips if clip.split == split and label in clip.labels}


# --- which files ----------------------------------------------------------------------------------

COVERS = {
    "albumart", "artist", "back", "backdrop", "banner", "cover", "disc", "fanart", "folder",
    "front", "landscape", "logo", "movie", "poster", "thumb", "thumbnail",
}  # fmt: skip


def _senses(folder: Path, listing: Listing) -> dict[str, dict[str, str]]:
    """The files of other senses, by media; they leave the listing, as they are no media."""
    media = [name for name in listing.files if _suffix(name) in MEDIA]
    found = {name: own for name in media if (own := files_beside(folder, name))}
    taken = {there for own in found.values() for there in own.values()}
    listing.files[:] = [
        name
        for name in listing.files
        if name not in taken and not taken.intersection(map(str, PurePosixPath(name).parents))
    ]
    return {name: own for name, own in found.items() if name not in taken}


def _sorted_out(folder: Path, listing: Listing) -> tuple[list[str], list[str]]:
    """The media and the subtitle files; anything else is counted as what it is."""
    files, texts = [], []
    for name in listing.files:
        suffix = _suffix(name)
        why = _why_not(folder / name, suffix)
        if why is not None:
            listing.skipped[why] += 1
        elif suffix in SUFFIXES:
            texts.append(name)
        else:
            files.append(name)
    named = sum(_suffix(name) in MEDIA for name in listing.folders)
    listing.skipped["folders named like a video"] += named
    return files, texts


def _why_not(path: Path, suffix: str) -> str | None:
    """What a path is if it is neither media nor subtitles."""
    if path.exists() and not path.is_file():
        return "pipes, sockets and devices"  # opening one may wait for ever
    if suffix in (".part", ".ytdl"):
        return "unfinished downloads"
    if suffix in MEDIA:
        return None if _is_text(path.name) else "files whose names are not UTF-8 (rename them)"
    if path.is_symlink() and not path.exists():
        return "links to nothing"
    if suffix in SUFFIXES:
        return None
    if not suffix and copied_link(path) is not None:
        return "links that were copied as text"
    return f"{suffix} files" if suffix else "files without an ending"


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _is_text(name: str) -> bool:
    """Whether a file's name is made of characters: most disks allow any bytes."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _of_one_kind(names: list[str], rule: str, ignored: Counter[str]) -> tuple[list[str], list[str]]:
    """Images or recordings, whichever are more, and a note if others are left out.

    A .gif counts as what its neighbours are. Thumbnails of recordings do not count.
    """
    images = [name for name in names if _suffix(name) in IMAGES]
    gifs = [name for name in names if _suffix(name) == ".gif"]
    recordings = [name for name in names if _suffix(name) in RECORDINGS and name not in set(gifs)]
    stems = {composed(str(PurePosixPath(name).with_suffix(""))) for name in recordings}
    thumbnails = sum(_is_thumbnail(name, stems) for name in images) if recordings else 0
    pictures = len(images) - min(thumbnails, THUMBNAILS * len(recordings))
    stills = pictures + (len(gifs) if len(gifs) < pictures else 0)
    use_images = stills > len(recordings) + len(gifs) * (len(gifs) >= pictures)
    if rule != "auto":
        use_images = rule == "images"
    kept = set(gifs) | set(images if use_images else recordings)
    left = [name for name in names if name not in kept]
    ignored.update(f"{_suffix(name)} files" for name in left)
    gif_note = f"{len(gifs)} .gif files count as images, as most files are"
    notes = [_with_setting(gif_note, "file_kind", "recordings")] if gifs and use_images else []
    if not left:
        return names, notes
    used, other = ("images", "recordings") if use_images else ("recordings", "images")
    note = f"the {len(kept)} {used} are used, the {len(left)} {other} next to them are not"
    kept_names = [name for name in names if name in kept]
    return kept_names, [*notes, _with_setting(note, "file_kind", other)]


def _is_thumbnail(name: str, stems: set[str]) -> bool:
    """Whether an image is a cover, or belongs to a recording: talk-thumb.jpg to talk.mp4."""
    path = PurePosixPath(composed(name))
    stem = str(path.with_suffix(""))
    shorter = re.sub(r"[ ._-]+[^/ ._-]*$", "", stem)
    return bool({stem, shorter} & stems) or path.stem.lower() in COVERS


def _with_setting(note: str, key: str, value: str) -> str:
    return f"{note}; to change this set data.{key}: {value}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


# --- splits and labels ----------------------------------------------------------------------------

SPLIT_WORDS = {
    "train": "train", "training": "train", "trn": "train",
    "val": "val", "valid": "val", "validate": "val", "validation": "val", "dev": "val",
    "development": "val",
    "test": "test", "testing": "test", "tst": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_SPLIT_NAME = re.compile(
    rf"({'|'.join(SPLIT_WORDS)})([ _.-]*(set|data|split|images|videos|clips|files))?"
    r"([ _.-]*\d{4})?"
)
_SPLIT_PART = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_WORDS)})(?![a-z])")
ROOT = PurePosixPath(".")


def split_word(name: str) -> str | None:
    """The split that a folder's name speaks of: Train, TEST, Validation, val2017, "test set"."""
    match = _SPLIT_NAME.fullmatch(composed(name).strip().lower())
    return SPLIT_WORDS[match[1]] if match else None


def _part_of_name(name: str) -> tuple[str, str] | None:
    """The split word within a longer name, and the rest: seg_train, val_256, testA."""
    plain = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", composed(name)).strip().lower()
    found = list(_SPLIT_PART.finditer(plain))
    if len(found) != 1:
        return None
    [match] = found
    rest = f"{plain[: match.start()]}*{plain[match.end() :]}"
    return SPLIT_WORDS[match[1]], re.sub(r"\d", "#", rest)


@dataclass(frozen=True, slots=True)
class Layout:
    """What the sub-folders mean."""

    splits: Mapping[PurePosixPath, str]
    classes: tuple[str, ...]  # folders called like a split that are taken for classes
    are_below_classes: bool  # cat/train and dog/train, not train/cat and train/dog

    def split_of(self, name: str) -> str | None:
        """The split that a folder above the file decides."""
        above = PurePosixPath(name).parents
        return next((self.splits[folder] for folder in above if folder in self.splits), None)

    def label_of(self, name: str) -> str:
        """The class: the folder that holds the file, or the one around its split folders."""
        return composed(self._class_folder(name).name)

    def _class_folder(self, name: str) -> PurePosixPath:
        folder = PurePosixPath(name).parent
        if folder in self.splits:
            folder = folder.parent if self.are_below_classes else ROOT
        return folder

    def doubts(self, names: Iterable[str]) -> list[str]:
        """Classes that may be meant otherwise: in folders within folders, a name says less."""
        places: dict[str, set[str]] = {}
        for name in names:
            folder = self._class_folder(name)
            line = [one.name for one in (folder, *folder.parents) if one not in self.splits]
            plain = "/".join(composed(one) for one in line[::-1] if one)
            places.setdefault(composed(folder.name), set()).add(plain)
        notes = []
        shared = [f"{label} ({', '.join(sorted(found))})" for label, found in sorted(places.items())
                  if label and len(found) > 1]  # fmt: skip
        if shared:
            notes.append(f"folders of one name are one class: {_some(shared)}; rename one of them")
        joined = sorted(label for label in places if LABEL_SEPARATOR in label)
        if joined:
            notes.append(f"names with {LABEL_SEPARATOR} are several classes: {_some(joined)}")
        known = {place for found in places.values() for place in found if place}
        inner = [f"{place} in {parent}" for place in sorted(known)
                 if (parent := next((str(p) for p in PurePosixPath(place).parents
                                     if str(p) in known), None)) is not None]  # fmt: skip
        if inner:
            notes.append(
                f"folders within class folders are classes of their own: {_some(inner)}; move "
                "their files up if they belong to the outer class"
            )
        return notes

    def notes(self) -> list[str]:
        """What was taken for what."""
        notes = []
        if self.splits:
            meanings = sorted(
                {f"{folder.name} is {split}" for folder, split in self.splits.items()}
            )
            note = f"folders decide the split: {_some(meanings)}"
            notes.append(_with_setting(note, "split_folders", "classes"))
        if self.classes:
            note = f"taken for classes, because they are next to classes: {_some(self.classes)}"
            notes.append(_with_setting(note, "split_folders", "splits"))
        return notes


def read_layout(names: Iterable[str], rule: str) -> Layout:
    """Which folders are splits: by their names and, with the rule `auto`, by what lies where."""
    inside: dict[PurePosixPath, set[PurePosixPath]] = {}
    for folder in {PurePosixPath(name).parent for name in names}:
        for child in (folder, *folder.parents):
            if child != ROOT:
                inside.setdefault(child.parent, set()).add(child)
    splits: dict[PurePosixPath, str] = {}
    classes: list[str] = []
    waiting = [ROOT]
    while waiting:
        children = inside.get(waiting.pop(), set())
        named = {child: word for child in children if (word := split_word(child.name))}
        found = _split_folders(named, children, inside, rule) if rule != "classes" else {}
        splits |= found
        classes += map(str, named.keys() - found.keys())
        waiting += children - found.keys()
    around = {folder.parent for folder in splits}
    are_below_classes = len(around) > 1 or any(
        folder != ROOT and inside[folder.parent] - around for folder in around
    )
    return Layout(splits, tuple(sorted(classes)) if rule == "auto" else (), are_below_classes)


def _split_folders(
    named: Mapping[PurePosixPath, str],
    siblings: set[PurePosixPath],
    inside: Mapping[PurePosixPath, set[PurePosixPath]],
    rule: str,
) -> dict[PurePosixPath, str]:
    """The folders that are splits: by their whole names, or next to others as parts of them.

    seg_train is a split next to seg_test, and test_256 next to train/cat, but not next to a class.
    """
    parts = {
        child: part
        for child in siblings - named.keys()
        if (part := _part_of_name(child.name)) is not None
    }
    words = {**named, **{child: word for child, (word, _) in parts.items()}}
    is_clear = bool(named) or not inside.keys().isdisjoint(words)  # train_station is a class
    if is_clear and len(words) == len(siblings) and len(set(words.values())) > 1:
        return words
    found = dict(named) if rule == "splits" or _are_splits(named, siblings, inside) else {}
    groups: dict[str, dict[PurePosixPath, str]] = {}
    for child, (word, rest) in parts.items():
        groups.setdefault(rest, {})[child] = word
    for group in groups.values():
        found |= group if len(set(group.values())) > 1 else {}
    lone = parts.keys() & inside.keys() - found.keys() if found else set()
    return found | {child: words[child] for child in lone if words[child] not in found.values()}


def _are_splits(
    named: Mapping[PurePosixPath, str],
    siblings: set[PurePosixPath],
    inside: Mapping[PurePosixPath, set[PurePosixPath]],
) -> bool:
    """A class may be called train: one folder of that name, without sub-folders, next to others."""
    alone = len(named) == len(siblings)
    return alone or len(set(named.values())) > 1 or any(child in inside for child in named)


def _held_out(
    digests: Mapping[str, str], layout: Layout, data: DataParams, *, spoken: set[str]
) -> dict[str, str]:
    """Files for test and val, drawn among those with words and those without; a split that folders
    give is not drawn again."""
    given = set(layout.splits.values())
    test_share = 0.0 if "test" in given else data.test_share
    val_share = 0.0 if "val" in given else data.val_share
    free = [name for name in digests if layout.split_of(name) is None]
    found: dict[str, str] = {}
    for part in ([n for n in free if n in spoken], [n for n in free if n not in spoken]):
        found |= _drawn({name: digests[name] for name in part}, test_share, val_share)
    return found


def _drawn(digests: Mapping[str, str], test_share: float, val_share: float) -> dict[str, str]:
    """Draw at least these shares of the files for test and val, and at least one file for each.

    By content: copies stay together, and nearly every file keeps its split when others are added.
    """
    groups: dict[str, list[str]] = {}
    for name, digest in digests.items():
        groups.setdefault(digest, []).append(name)
    marks = sorted(groups)
    tests = _first(marks, test_share)
    vals = 0
    if val_share > 0 and len(marks) > tests + 1:
        vals = max(_first(marks, test_share + val_share) - tests, 1)
    splits = ["test"] * tests + ["val"] * vals
    return {
        name: split for mark, split in zip(marks, splits, strict=False) for name in groups[mark]
    }


def _first(marks: list[str], share: float) -> int:
    """How many of the sorted marks make up a share; at least one, if there are two or more."""
    if share == 0 or len(marks) < 2:
        return 0
    return max(int(share * len(marks)), 1, sum(int(m[:12], 16) < share * 16**12 for m in marks))


def _doubts(clips: Sequence[Clip], digests: Mapping[str, str], files: Sequence[str]) -> list[str]:
    """What a person may not have meant."""
    notes = class_doubts(clips, LABEL)
    if not any(clip.split == "test" for clip in clips):
        same = len(files) > 1 and len(set(digests.values())) == 1
        why = " because all files are copies of one" if same else ""
        notes.append(
            f"no file is left for testing{why}: add files, raise data.test_share, "
            "or name a folder test"
        )
    notes += copies_in_test(zip((digests[name] for name in files), clips, strict=True))
    stems: dict[str, set[str]] = {}
    for name, clip in zip(files, clips, strict=True):
        stems.setdefault(str(PurePosixPath(name).with_suffix("")), set()).add(clip.split)
    alike = sum({"train", "test"} <= found for found in stems.values())
    if alike:
        notes.append(
            f"{alike} files of test have the name of a file of train, but for its ending: the "
            "same recording may be in both"
        )
    forms: dict[str, set[str]] = {}
    for folder in {PurePosixPath(name).parent.name for name in files}:
        forms.setdefault(composed(folder), set()).add(folder)
    twice = sorted(name for name, found in forms.items() if len(found) > 1)
    if twice:
        notes.append(f"written in two Unicode forms and taken for one class: {_some(twice)}")
    return notes


def copies_in_test(found: Iterable[tuple[str, Clip]]) -> list[str]:
    """A note on clips of test whose files, known by their hashes, are other files of train, too."""
    places: dict[str, dict[str, set[str]]] = {}
    for digest, clip in found:
        places.setdefault(digest, {}).setdefault(clip.url, set()).add(clip.split)
    shared = sum(
        len(urls) > 1 and {"train", "test"} <= set().union(*urls.values())
        for urls in places.values()
    )
    return [f"{shared} files of test are copies of files of train"] if shared else []


def class_doubts(clips: Sequence[Clip], label: str) -> list[str]:
    """Classes that cannot be learned, or whose names differ in what nobody sees.

    That is case, spaces, and characters without a picture.
    """
    train, test = (_classes(clips, split, label) for split in ("train", "test"))
    unknown = sorted(test - train)
    notes = []
    if unknown and train:
        notes.append(f"{len(unknown)} classes of test are not in train: {_some(unknown)}")
    alike: dict[str, set[str]] = {}
    for name in train | test | _classes(clips, "val", label):
        seen = "".join(c for c in name if unicodedata.category(c) != "Cf")
        alike.setdefault(" ".join(seen.split()).casefold(), set()).add(name)
    twins = [" and ".join(map(repr, sorted(names))) for names in alike.values() if len(names) > 1]
    if twins:
        shown = _some(sorted(twins))
        notes.append(f"different classes with nearly equal names: {shown}; rename them")
    return notes


def _contents(folder: Path, clips: Sequence[Clip], hashes: ContentHashes) -> list[str]:
    """Names and hashes of the files of other senses."""
    named = {folder / url.removeprefix("folder:") for clip in clips for url in clip.senses.values()}
    files: list[Path] = []
    for path in sorted(named):
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        files += [file for file in inside if file.is_file()]
    digests = zip(files, hashes.of(files), strict=True)
    return [f"{file.relative_to(folder)} {digest}" for file, digest in digests]


def _mark(digests: Mapping[str, str], clips: Sequence[Clip], others: Sequence[str]) -> str:
    """The names, contents and captions of all files, in short."""
    marks = [f"{name} {digest}" for name, digest in digests.items()]
    marks += [repr(clip.captions) for clip in clips]
    marks += others
    return hashlib.sha256("\n".join(marks).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _clip(name: str, read: Subtitles, split: str, layout: Layout) -> Clip:
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", PurePosixPath(name).stem).strip("-")[:40] or "clip"
    short = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:10]
    label = layout.label_of(name)
    return Clip(
        clip_id=f"{readable}-{short}",
        source="folder",
        url=f"folder:{name}",
        start=0.0,
        end=None,
        split=split,
        labels={LABEL: label} if label else {},
        captions=read.captions,
        licence=None,
        caption_faults=read.faults,
    )


def _tracks_note(read: Mapping[str, Subtitles]) -> list[str]:
    """Which text track is read, where videos have several."""
    several = [name for name, subtitles in read.items() if subtitles.choice]
    if not several:
        return []
    return [
        f"several text tracks in {len(several)} files: of {several[0]}, "
        f"{read[several[0]].choice} is read; set data.caption_languages to change this"
    ]


def _captions(folder: Path, name: str, beside: Sequence[str], data: DataParams) -> Subtitles:
    """From the files next to a video, else from a track inside it."""
    dropped = 0
    for text in beside:
        read = read_subtitles(folder / text, sentences=data.sentences)
        dropped += read.dropped
        if read.captions:
            return Subtitles(read.captions, replace(read.faults, dropped=dropped))
    inside = embedded_captions(
        folder / name, sentences=data.sentences, languages=data.caption_languages
    )
    return replace(inside, faults=replace(inside.faults, dropped=dropped + inside.dropped))
