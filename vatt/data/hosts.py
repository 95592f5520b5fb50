"""Manners towards hosts: some files at once from each, a pause between them, waiting when told to.

The places of a host are locks on files, so that they hold for all threads and processes that
download into one folder, and are free again when one is killed.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LOOK_EVERY = 0.05  # seconds, while all places are taken
LONGEST = 120.0  # seconds that a host can make us wait


@dataclass(frozen=True, slots=True)
class Hosts:
    """The rules, and the folder where the locks lie."""

    folder: Path
    at_once: int  # files from one host
    pause: float  # seconds between the beginnings of two

    @contextmanager
    def turn(self, host: str) -> Iterator[None]:
        """Wait for a place at the host and for its pause; the place is held for the body."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(host.encode()).hexdigest()[:16]
        place = self._take(name)
        try:
            time.sleep(self._until_next(name, pause=self.pause, delay=0.0))
            yield
        finally:
            os.close(place)

    def delay(self, host: str, seconds: float) -> None:
        """Let nobody ask the host for so long."""
        name = hashlib.sha256(host.encode()).hexdigest()[:16]
        self._until_next(name, pause=0.0, delay=min(seconds, LONGEST))

    def _take(self, name: str) -> int:
        while True:
            for number in range(self.at_once):
                place = os.open(self.folder / f"{name}.{number}", os.O_RDWR | os.O_CREAT, 0o644)
                try:
                    fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return place
                except BlockingIOError:
                    os.close(place)
            time.sleep(LOOK_EVERY)

    def _until_next(self, name: str, *, pause: float, delay: float) -> float:
        """Seconds until our turn; the next one's is written down, a pause or a delay later."""
        file = os.open(self.folder / f"{name}.next", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            now = time.time()
            try:
                planned = float(os.pread(file, 64, 0) or 0)
            except ValueError:
                planned = 0.0
            ours = max(now, min(planned, now + LONGEST))
            following = max(ours + pause, now + delay)
            os.pwrite(file, f"{following:<20.3f}".encode(), 0)
            return ours - now
        finally:
            os.close(file)
