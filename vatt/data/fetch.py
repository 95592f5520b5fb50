"""One address -> one media file, with yt-dlp as a library; runs in worker processes.

A partial file stays under .partial/ and is continued by Range; a file that has its final name is
whole and has been probed.
"""

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yt_dlp
from yt_dlp.networking.exceptions import HTTPError, TransportError
from yt_dlp.utils import (
    DownloadError,
    GeoRestrictedError,
    UnsupportedError,
    YoutubeDLError,
)

from vatt.data.ledger import RETRYABLE
from vatt.data.media import BrokenMediaError, probe
from vatt.errors import MachineError

PARTIAL = ".partial"
PAUSES = (1.0, 2.0, 4.0)  # seconds before another try
MAX_BYTES = 4 * 2**30  # of one file
MAX_SECONDS = 3600.0  # for one file
SILENCE = 20.0  # seconds without a byte
_FORMAT = "bv*[height<=480]+ba/b[height<=480]/bv*+ba/b"

# What a site says, and the state it means; throttling is never taken for removal.
_SAYS = (
    (r"not a bot|rate.?limit|too many requests|try again later", "rate-limited"),
    (r"private video|video is private", "private"),
    (r"in your country|geo.?restrict|not made this video available", "geo"),
    (r"confirm your age|age.?restrict", "age"),
    (r"members.?only|sign in|log ?in|login required", "needs-login"),
    (r"removed|terminated|no longer available|deleted", "removed"),
    (r"video unavailable", "rate-limited"),
    (r"max-filesize|more than \d+ bytes", "filtered"),
)


@dataclass(frozen=True, slots=True)
class Order:
    """A file to fetch: its final name, and where it can come from."""

    name: str
    mirrors: tuple[str, ...] = ()  # tried first; each is the file itself, no page about it
    page: str | None = None  # what yt-dlp's extractors look into
    here: Path | None = None  # a file of the user's own: looked at, not moved


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an order."""

    name: str
    state: str
    reason: str = ""
    has: tuple[str, ...] = ()
    seconds: float | None = None
    sha256: str | None = None
    host: str = ""
    reached: bool = True  # False: the network did not even lead to the host


@dataclass(frozen=True, slots=True)
class Fetching:
    """What all orders share."""

    media: Path
    ffmpeg: str
    allow_youtube: bool
    proxy: str | None
    cookies: Path | None
    threads: int


def fetch_all(orders: Sequence[Order], fetching: Fetching) -> list[Outcome]:
    """What a worker does: fetch some files, a few at a time."""
    with ThreadPoolExecutor(fetching.threads) as pool:
        return list(pool.map(partial(fetch, fetching=fetching), orders))


def fetch(order: Order, fetching: Fetching) -> Outcome:
    """Fetch a file unless it is there; the best outcome of its addresses."""
    if order.here is not None:
        return _examine(order.name, order.here, None)
    path = fetching.media / order.name
    if path.is_file():
        return _examine(order.name, path, path)
    outcomes = []
    for address in (*order.mirrors, *([order.page] if order.page else [])):
        is_page = address == order.page
        outcome = _fetch_from(address, order.name, fetching, is_page=is_page)
        if outcome.state == "ok":
            return outcome
        outcomes.append(outcome)
    # What can be tried again must be: a mirror's 404 does not outweigh a time-out at the source.
    retryable = [one for one in outcomes if one.state in RETRYABLE]
    return (retryable or outcomes)[-1]


def _fetch_from(address: str, name: str, fetching: Fetching, *, is_page: bool) -> Outcome:
    folder = fetching.media / PARTIAL
    host = urlsplit(address).hostname or ""
    failed = Outcome(name, "network", host=host)
    for pause in (*PAUSES, None):
        try:
            tool = _youtube_dl(folder, name, host, fetching)
            got = tool.extract_info(address) if is_page else _download_file(tool, address, name)
        except (YoutubeDLError, HTTPException, OSError, ValueError) as error:
            failed = _explain(error, name, host)
            if failed.state not in RETRYABLE:
                for rest in folder.glob(f"{name}.*"):
                    rest.unlink()
                return failed
            if pause is None:
                return failed
            time.sleep(pause)
            continue
        outcome = _examine(name, _file_of(got, folder, name), fetching.media / name)
        return replace(outcome, host=host)
    return failed


def _download_file(tool: yt_dlp.YoutubeDL, address: str, name: str) -> Any:
    """Download what is known to be a file, without asking first what it is."""
    found = {
        "id": name,
        "title": name,
        "url": address,
        "ext": "mp4",  # yt-dlp refuses names it does not know; the content decides in the end
        "extractor": "generic",
        "extractor_key": "Generic",
        "webpage_url": address,
    }
    return tool.process_ie_result(found, download=True)


def _file_of(got: Any, folder: Path, name: str) -> Path:
    """Where yt-dlp put the file."""
    downloads = (got or {}).get("requested_downloads") or [{}]
    return Path(downloads[0].get("filepath") or folder / name)


def _examine(name: str, path: Path, final: Path | None) -> Outcome:
    """Probe what came; media gets its final name, anything else that was fetched is deleted."""
    try:
        media = probe(path)
        if media.seconds <= 0:
            raise BrokenMediaError("it lasts no time")
    except BrokenMediaError as error:
        if final is not None:
            path.unlink(missing_ok=True)
        return Outcome(name, "corrupt", str(error))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if final is not None:
            os.fsync(file.fileno())
            path.replace(final)
    has = (("video",) if media.video is not None else ()) + (
        ("audio",) if media.audio is not None else ()
    )
    return Outcome(name, "ok", "", has, round(media.seconds, 3), digest)


class _Silent:
    """yt-dlp's logger: what matters comes as an exception."""

    def debug(self, message: str) -> None:
        """Nothing."""

    info = warning = error = debug


_local = threading.local()


def _youtube_dl(folder: Path, name: str, host: str, fetching: Fetching) -> yt_dlp.YoutubeDL:
    """This thread's YoutubeDL (making one takes 0.1 s), told where to write."""
    direct = host in ("127.0.0.1", "localhost", "::1")  # a proxy leads elsewhere
    made: dict[bool, yt_dlp.YoutubeDL] = _local.__dict__.setdefault("made", {})
    if direct not in made:
        made[direct] = yt_dlp.YoutubeDL(_options(fetching, direct=direct))
    tool = made[direct]
    path = str(folder / name).replace("%", "%%")
    tool.params["outtmpl"] = {**tool.params["outtmpl"], "default": f"{path}.%(ext)s"}
    tool.params["progress_hooks"] = []
    tool._progress_hooks = [_limits()]
    return tool


def _options(fetching: Fetching, *, direct: bool) -> dict[str, Any]:
    extractors = ["generic", *(["youtube"] if fetching.allow_youtube else [])]
    options: dict[str, Any] = {
        "allowed_extractors": extractors,
        "cachedir": False,
        "cookiefile": str(fetching.cookies) if fetching.cookies else None,
        "ffmpeg_location": fetching.ffmpeg,
        "fixup": "never",
        "format": _FORMAT,
        "logger": _Silent(),
        "max_filesize": MAX_BYTES,
        "merge_output_format": "mkv",
        "no_warnings": True,
        "noplaylist": True,
        "noprogress": True,
        "playlist_items": "1",
        "quiet": True,
        "retries": 0,  # ours, which also cover the first request, are enough
        "socket_timeout": SILENCE,
        "updatetime": False,
    }
    if direct or fetching.proxy is not None:
        options["proxy"] = "" if direct else fetching.proxy
    return options


def _limits() -> Callable[[dict[str, Any]], None]:
    """A hook that ends a download which never ends."""
    begun = time.monotonic()

    def check(progress: dict[str, Any]) -> None:
        if (progress.get("downloaded_bytes") or 0) > MAX_BYTES:
            raise DownloadError(f"more than {MAX_BYTES} bytes")
        if time.monotonic() - begun > MAX_SECONDS:
            raise DownloadError("timed out: too slow")

    return check


def _explain(error: Exception, name: str, host: str) -> Outcome:
    """The state that an error of yt-dlp means; a full disk is no clip's fault."""
    said = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).removeprefix("ERROR: ")
    reason = " ".join(said.split())[:200]
    if "No space left on device" in said or "Errno 122" in said:
        raise MachineError("the disk of the media folder is full", hint="free some space")
    cause = _cause(error)
    status = cause.status if isinstance(cause, HTTPError) else _status_in(said)
    if status is not None:
        return Outcome(name, _state_of_status(status), f"HTTP {status}", host=host)
    if isinstance(cause, TransportError) or "Got error: " in said:
        reached = not re.search(r"Failed to (establish|resolve)|unreachable|ProxyError", said)
        return Outcome(name, "network", reason, host=host, reached=reached)
    return Outcome(name, _state_said(cause, said), reason, host=host)


def _status_in(said: str) -> int | None:
    """The status in the words that are all yt-dlp's file downloader gives."""
    found = re.search(r"HTTP Error (\d{3})", said)
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
    return getattr(inner, "cause", None) or inner


def _state_of_status(status: int) -> str:
    known = {
        401: "needs-login", 403: "needs-login", 404: "not-found", 408: "network",
        410: "removed", 429: "rate-limited", 451: "geo", 503: "rate-limited",
    }  # fmt: skip
    return known.get(status, "network" if status >= 500 else "not-found")
