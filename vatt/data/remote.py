"""Shards that lie elsewhere (S3, HTTPS, ...): fetched whole into a bounded local cache.

Whole, not by ranges: an epoch reads every byte of a shard, so one long request replaces thousands
of short ones, and the disk serves the shuffling. Any number of processes may share a cache.
"""

import fcntl
import hashlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from vatt.errors import DataError, MachineError, SettingsError
from vatt.files import atomic_write

PROTOCOLS = ("s3", "gs", "gcs", "http", "https", "memory", "file")
RANGE_BYTES = 16 * 2**20  # of one request: what a broken connection costs at most
ATTEMPTS = 6
PAUSE_SECONDS = 0.5  # before the second attempt; doubled each time

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShardCache:
    """The shards of a folder at `url`, as far as they fit `limit` bytes of a local one."""

    url: str
    folder: Path
    limit: int  # finished shards; those under way come on top

    @classmethod
    def of(cls, url: str, index: Path, *, folder: Path, gigabytes: float) -> Self:
        """The cache of the shards of one index: those of another may have the same names."""
        with index.open("rb") as file:
            key = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return cls(url, folder / key, int(gigabytes * 1e9))

    def open(self, shard: str) -> int:
        """A handle of a shard, fetched when it is not there."""
        path = self.folder / shard
        while True:
            with suppress(FileNotFoundError):
                handle = os.open(path, os.O_RDONLY)
                now = time.time_ns()
                os.utime(handle, ns=(now, now))  # the least recently opened shard goes first
                return handle
            self._fetch(shard, path)

    def fetch(self, shard: str) -> None:
        """Have a shard here before it is needed."""
        os.close(self.open(shard))

    def _fetch(self, shard: str, path: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with _waiting_lock(self.folder / f".{shard}.lock"):
            if path.exists():
                return  # another process was faster
            for left in self.folder.glob(f".{shard}.*.tmp"):  # by a process that was killed
                left.unlink()
            with atomic_write(path) as temporary:
                download(f"{self.url.rstrip('/')}/{shard}", temporary)
                self._make_room(temporary.stat().st_size)

    def _make_room(self, needed: int) -> None:
        with _waiting_lock(self.folder / ".room.lock"):
            there = [(path.stat(), path) for path in self.folder.glob("*.tar")]
            there.sort(key=lambda entry: entry[0].st_mtime_ns)
            total = needed + sum(stat.st_size for stat, _ in there)
            for stat, path in there:
                if total <= self.limit:
                    return
                path.unlink()  # who has it open goes on reading it
                total -= stat.st_size


def download(url: str, target: Path) -> None:
    """Copy one remote file, range by range, each tried again when the connection fails."""
    filesystem, remote = _open_url(url)
    size = int(_retry(url, lambda: filesystem.info(remote)["size"] or 0))
    log.info("fetching %s, %.1f MB", url, size / 1e6)
    with target.open("wb") as out:
        while out.tell() < size:
            first, last = out.tell(), min(out.tell() + RANGE_BYTES, size)
            part = _retry(url, lambda: _range(filesystem, remote, first, last))  # noqa: B023
            if len(part) == size:  # all of it: the server knows no ranges
                out.seek(0)
            out.write(part)


def _range(filesystem: Any, remote: str, first: int, last: int) -> bytes:
    part = filesystem.cat_file(remote, start=first, end=last)
    if len(part) < last - first:
        raise OSError("the connection ended early")
    return part


def _open_url(url: str) -> tuple[Any, str]:
    import fsspec  # slow to import, and seldom needed

    protocol = url.partition("://")[0]
    if protocol not in PROTOCOLS or "::" in url:
        raise SettingsError(
            f"machine.shards_url: {protocol}:// is not fetched",
            hint=f"allowed are {', '.join(PROTOCOLS[:-2])}",
        )
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = {"s3": "s3fs"}.get(protocol, "gcsfs")
        raise MachineError(f"{url}: {error}", hint=f"pip install {package}") from None


def _retry(url: str, ask: Callable[[], T]) -> T:
    from aiohttp import ClientError

    for attempt in range(ATTEMPTS):
        try:
            return ask()
        except (OSError, ClientError, TimeoutError) as error:
            if _is_final(error):
                raise DataError(
                    f"{url} is not there: {error.__cause__ or error!r}",
                    hint="check machine.shards_url, and that the index belongs to it",
                ) from None
            if attempt == ATTEMPTS - 1:
                raise MachineError(
                    f"{url} cannot be fetched: {error.__cause__ or error!r}",
                    hint="run the same command again to continue",
                ) from None
            # Many processes meet the same trouble: they should not come back all at once.
            time.sleep(PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def _is_final(error: BaseException) -> bool:
    """Whether asking again is useless; fsspec calls every failed first request 'not found'."""
    status = getattr(error.__cause__ or error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, FileNotFoundError | PermissionError) and error.__cause__ is None


@contextmanager
def _waiting_lock(path: Path) -> Iterator[None]:
    with path.open("a", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
