"""A person's own files: which of them count, how their names compare, and what they hold.

Every source follows these rules, so that a folder, a csv and a published list skip, follow and
count the same files.
"""

import hashlib
import json
import os
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Self

from vatt.files import atomic_write

AUDIO = {".aac", ".aif", ".aiff", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".wav"}
RECORDINGS = AUDIO | {
    ".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg",
    ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv",
}  # fmt: skip
IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
MEDIA = RECORDINGS | IMAGES

# What Windows, macOS and storage boxes leave in folders, in small letters. Names that begin with a
# dot are hidden: .DS_Store, ._x.jpg, .Spotlight-V100, .@__thumb and others need no entry.
SYSTEM_FILES = {
    "#recycle", "#snapshot", "$recycle.bin", "@eadir", "@recently-snapshot", "@recycle",
    "@sharesnap", "@snapshot", "@tmp", "__macosx", "autorun.inf", "desktop.ini", "ehthumbs.db",
    "ehthumbs_vista.db", "found.000", "icon\r", "lost+found", "network trash folder",
    "picasa.ini", "recycled", "recycler", "system volume information", "temporary items",
    "thumbs.db", "thumbs.db:encryptable", "zbthumbnail.info",
}  # fmt: skip
SYSTEM_ENDINGS = (":zone.identifier", "@synoeastream", "@synoresource")  # next to a real file


def skipped_as(name: str) -> str | None:
    """Why no source uses a file or folder of that name; None when nothing is against it."""
    small = name.lower()
    if small in SYSTEM_FILES or small.endswith(SYSTEM_ENDINGS):
        return "system files"
    return "hidden files" if name.startswith(".") else None


def composed(name: str) -> str:
    """A name in the one Unicode form (NFC) in which names are compared: macOS writes another."""
    return unicodedata.normalize("NFC", name)


@dataclass(slots=True)
class Listing:
    """What lies in a folder and below."""

    files: list[str] = field(default_factory=list)  # relative names, sorted; all but folders
    folders: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)  # files, and links, by the reason


def list_files(root: Path) -> Listing:
    """Everything in a folder; links are followed, and each folder is listed once.

    Folders that lie near the root come first, and real ones before links, so that a link back into
    the tree ends there.
    """
    found = Listing()
    seen = {root.resolve()}
    level = [root]
    while level:
        folders = [path for folder in level for path in _folders_in(folder, root, found)]
        level = []
        for path in sorted(folders, key=Path.is_symlink):
            if (place := path.resolve()) not in seen:
                seen.add(place)
                level.append(path)
                found.folders.append(path.relative_to(root).as_posix())
            elif path.is_symlink():
                found.skipped["links to folders that are listed already"] += 1
    found.files.sort(key=lambda name: PurePosixPath(name).parts)
    return found


def _folders_in(folder: Path, root: Path, found: Listing) -> Iterator[Path]:
    """The folders in a folder; its files are added to what is found."""
    try:
        entries = sorted(folder.iterdir()) if os.access(folder, os.X_OK) else None
    except OSError:
        entries = None
    if entries is None:
        found.skipped["folders that cannot be read"] += 1
        return
    for path in entries:
        reason = skipped_as(path.name)
        if reason is not None:
            found.skipped[reason] += _count(path)
        elif path.is_dir():
            yield path
        else:
            found.files.append(path.relative_to(root).as_posix())


def _count(path: Path) -> int:
    """The files that are passed over with a name."""
    if path.is_symlink() or not path.is_dir():
        return 1
    return sum(len(names) for _, _, names in os.walk(path))


LONGEST_PATH = 4096  # bytes


def exists(path: Path, test: Callable[[Path], bool] = Path.exists) -> bool:
    """Whether a path is there; one that is too long for any disk is not."""
    try:
        return test(path)
    except OSError:
        return False


def find_file(folder: Path, name: str) -> str | None:
    """The relative name under which a file is there: in another Unicode form, or with / for \\."""
    if len(os.fsencode(name)) > LONGEST_PATH:
        return None
    for candidate in dict.fromkeys((name, name.replace("\\", "/"))):
        path = PurePosixPath(candidate)
        leads_out = path.is_absolute() or ".." in path.parts
        there = None if leads_out else _find(folder, path.parts)
        if there is not None:
            return there.relative_to(folder).as_posix()
    return None


def _find(folder: Path, parts: Sequence[str]) -> Path | None:
    if not parts:
        return folder if exists(folder, Path.is_file) else None
    if (there := _find(folder / parts[0], parts[1:])) is not None:
        return there
    if parts[0].isascii() or not folder.is_dir():
        return None
    alike = [
        path for path in sorted(folder.iterdir())
        if path.name != parts[0] and composed(path.name) == composed(parts[0])
    ]  # fmt: skip
    return next(filter(None, (_find(path, parts[1:]) for path in alike)), None)


def why_missing(path: Path) -> str:
    """Why there is no file at a path: a link on the way that leads nowhere is named."""
    for part in (*reversed(path.parents), path):
        if exists(part, Path.is_symlink) and not exists(part):
            return f"{part} is a link to {part.readlink()}, which is not there"
        if part != path and exists(part, Path.is_file):
            target = copied_link(part)
            link = f": a link to {target} that was copied as text" if target else ""
            return f"{part} is a file, not a folder{link}"
    return "a folder, not a file" if exists(path, Path.is_dir) else "no such file"


LONGEST_LINK = 4096  # bytes
_CYGWIN = b"!<symlink>"


def copied_link(path: Path) -> str | None:
    """Where a link led that became a text file, as in a checkout on Windows; None for others.

    The text is one line that names a file of the same ending, or a folder for a link to a folder.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LONGEST_LINK + 1)
    except OSError:
        return None
    text = data.removeprefix(_CYGWIN)
    marked = len(text) < len(data)
    encoding = "utf-16" if marked and text.startswith(b"\xff\xfe") else "utf-8"
    target = text.decode(encoding, "surrogateescape").rstrip("\0")
    named = PurePosixPath(target.replace("\\", "/"))
    if len(data) > LONGEST_LINK or not target.strip() or not target.isprintable():
        return None
    leads_away = len(named.parts) > 1 or exists(path.parent / named)
    is_link = named.suffix.lower() == path.suffix.lower() and leads_away
    return target if marked or is_link else None


BLOCK = 1000  # files hashed before what is known may be saved
SAVE_SECONDS = 30.0  # of hashing, which a kill may cost
SETTLED_NS = 50_000_000  # a file that was changed so shortly ago may change again unseen
SETTLED_COARSE_NS = 2_000_000_000  # the same where the disk notes whole seconds only
Stamp = tuple[int, int, int, int]  # size, time of content, time of the entry, inode


class ContentHashes:
    """The sha256 of whole files, kept in a file by size, times and inode: each is read once.

    A line of that file which is torn or damaged costs one more reading.
    """

    def __init__(self, file: Path | None = None, *, writes: bool = True) -> None:
        self._file, self._writes = file, writes
        self._known: dict[str, tuple[Stamp, str]] = dict(_read(file)) if file else {}
        self._is_new = False

    @classmethod
    def beside(cls, media: Path, *, writes: bool = True) -> Self:
        """The hashes of a project, which are kept in the folder of its media."""
        return cls(media.with_name("content-hashes.tsv"), writes=writes)

    def of(self, paths: Iterable[Path]) -> list[str]:
        """The hash of each file, in order; a file that cannot be read gets a unique one."""
        hashes: list[str] = []
        begun = time.monotonic()
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            waiting = iter(paths)
            while block := list(islice(waiting, BLOCK)):
                hashes += pool.map(self._one, block)
                if time.monotonic() - begun > SAVE_SECONDS:
                    self.save()
                    begun = time.monotonic()
        self.save()
        return hashes

    def known(self, path: Path) -> str | None:
        """The hash of a file that has not changed since it was read; None for any other."""
        stamp, digest = self._known.get(str(path.absolute()), (None, None))
        return digest if stamp is not None and stamp == stamp_of(path) else None

    def learn(self, path: Path, digest: str, *, before: Stamp | None) -> None:
        """Keep the hash of a file that was read since `before`, unless it has changed meanwhile."""
        if before is None or stamp_of(path) != before:
            return
        times = before[1:3]
        is_coarse = all(one % 1_000_000_000 == 0 for one in times)
        if time.time_ns() - max(times) > (SETTLED_COARSE_NS if is_coarse else SETTLED_NS):
            self._known[str(path.absolute())] = (before, digest)
            self._is_new = True

    def save(self) -> None:
        """Write what is new."""
        if self._file is None or not self._writes or not self._is_new:
            return
        self._is_new = False
        with atomic_write(self._file) as temporary, temporary.open("w", encoding="utf-8") as file:
            for path, (stamp, digest) in self._known.items():
                record = json.dumps([path, *stamp, digest])
                file.write(f"{zlib.crc32(record.encode()):08x}\t{record}\n")

    def _one(self, path: Path) -> str:
        digest = self.known(path)
        if digest is not None:
            return digest
        before = stamp_of(path)
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return hashlib.sha256(b"unreadable " + os.fsencode(path)).hexdigest()
        self.learn(path, digest, before=before)
        return digest


def stamp_of(path: Path) -> Stamp | None:
    """What changes when a file's content does; None where there is no file."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino


def _read(file: Path) -> Iterator[tuple[str, tuple[Stamp, str]]]:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        check, _, record = line.partition("\t")
        if check == f"{zlib.crc32(record.encode()):08x}":
            path, size, changed, entered, inode, digest = json.loads(record)
            yield path, ((size, changed, entered, inode), digest)
