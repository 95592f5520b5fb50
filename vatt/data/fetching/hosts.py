"""Rules for hosts: how often to contact them, and what their refusals mean."""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from yt_dlp.networking.exceptions import HTTPError, TransportError
from yt_dlp.utils import GeoRestrictedError, UnsupportedError

from vatt.errors import MachineError, redact

LOOK_EVERY = 0.05  # seconds, while all places are taken
LONGEST_WORD = 80  # characters: an address must not hide what is wrong with it
LONGEST = 120.0  # seconds that a host can make us wait


@dataclass(frozen=True, slots=True)
class Hosts:
    """The limits for each host, and the folder of the locks."""

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
        """Keep every process from contacting the host for this time."""
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
        """Seconds until our turn; the next turn is recorded, a pause or a delay later."""
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


# Words of sites and the state that each means; throttling is never taken for removal.
_SAYS = (
    (r"not a bot|rate.?limit|too many requests|try again later", "rate-limited"),
    (r"private video|video is private", "private"),
    (r"in your country|geo.?restrict|not made this video available", "geo"),
    (r"confirm your age|age.?restrict", "age"),
    (r"members.?only|sign in|log ?in|login required", "needs-login"),
    (r"removed|terminated|no longer available|deleted", "removed"),
    (r"video unavailable", "rate-limited"),
    (r"max-filesize|more than \d+ bytes|a live stream", "filtered"),
)


# YouTube's stream servers answer 403 to clients that they throttle and to links that are too old.
THROTTLES_BY_403 = ".googlevideo.com/"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a file was not fetched."""

    state: str
    reason: str
    reached: bool = True  # False: no connection to the host
    wait: float = 0.0  # seconds that the server asks for


def explain(error: Exception) -> Refusal:
    """What an error of yt-dlp means; a full disk is not the fault of a clip."""
    said = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).removeprefix("ERROR: ")
    words = (word if len(word) <= LONGEST_WORD else f"{word[:30]}..." for word in said.split())
    reason = redact(" ".join(words))[:200]
    if "No space left on device" in said or "Errno 122" in said:
        raise MachineError("the disk of the media folder is full", hint="free some space")
    cause = _cause(error)
    status = cause.status if isinstance(cause, HTTPError) else _status_in(said)
    if status == 403 and THROTTLES_BY_403 in _address(cause):
        return Refusal("rate-limited", "HTTP 403", wait=_asked_to_wait(cause))
    if status is not None:
        return Refusal(_state_of_status(status), f"HTTP {status}", wait=_asked_to_wait(cause))
    if isinstance(cause, TransportError) or "Got error: " in said:
        reached = not re.search(r"Failed to (establish|resolve)|unreachable|ProxyError", said)
        return Refusal("network", reason, reached=reached)
    return Refusal(_state_said(cause, said), reason)


def _address(cause: BaseException) -> str:
    """The address that answered."""
    return cause.response.url if isinstance(cause, HTTPError) else ""


def _asked_to_wait(cause: BaseException) -> float:
    """Seconds that the server asks for; 0 when it names none."""
    header = cause.response.headers.get("Retry-After") if isinstance(cause, HTTPError) else None
    return float(header) if header and header.isdigit() else 0.0


def _status_in(said: str) -> int | None:
    """The status in a message: yt-dlp's file downloader gives nothing else."""
    found = re.search(r"(?:HTTP [Ee]rror|Server returned) (\d{3})", said)
    return int(found[1]) if found else None


def _state_said(cause: BaseException, said: str) -> str:
    if isinstance(cause, GeoRestrictedError):
        return "geo"
    if isinstance(cause, UnsupportedError):
        return "corrupt"  # a page, no media
    for pattern, state in _SAYS:
        if re.search(pattern, said, re.IGNORECASE):
            return state
    return "network"


def _cause(error: BaseException) -> BaseException:
    """The error inside a DownloadError, or the one that an extractor met."""
    info = getattr(error, "exc_info", None)
    inner = info[1] if info else error
    if isinstance(inner, (HTTPError, TransportError)):
        return inner
    return getattr(inner, "cause", None) or getattr(inner, "source_error", None) or inner


def _state_of_status(status: int) -> str:
    known = {
        401: "needs-login", 403: "needs-login", 404: "not-found", 408: "network",
        410: "removed", 429: "rate-limited", 451: "geo", 503: "rate-limited",
    }  # fmt: skip
    return known.get(status, "network" if status >= 500 else "not-found")
