"""One clip: its address -> a media file, by yt-dlp, at the pace that its host allows.

A part of a video is copied from its streams, from the nearest key frame on. The mp4's edit list
hides what lies before the part, so that the file begins exactly where the part does.
"""

import fcntl
import hashlib
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import av
import yt_dlp
from yt_dlp.networking.exceptions import HTTPError, TransportError
from yt_dlp.utils import DownloadError, GeoRestrictedError, UnsupportedError, YoutubeDLError

from vatt.data.clips.files import why_missing
from vatt.data.clips.ledger import RETRYABLE
from vatt.data.clips.media import BrokenMediaError, probe
from vatt.data.fetching.network import (
    STREAMED,
    Guard,
    Place,
    Relay,
    guarding,
    proxies_of,
)
from vatt.errors import MachineError, redact

TimeRange = tuple[float, float]  # from, to, in seconds of the video
# The relay is plain http. tcp is what http itself needs; `crypto` decrypts segments.
_PROTOCOLS = "http,tcp,crypto"
_RELAYED = ("http", "https", "m3u8", "m3u8_native")


# --- hosts: how often to contact them, and what their refusals mean ------------------------------

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
        reached = not _NO_CONNECTION.search(said)
        return Refusal("network", reason, reached=reached)
    return Refusal(_state_said(cause, said), reason)


_NO_CONNECTION = re.compile(
    "Failed to (establish|resolve)|unreachable|ProxyError|connect timeout|handshake operation timed"
)


def _address(cause: BaseException) -> str:
    """The address that answered."""
    return cause.response.url if isinstance(cause, HTTPError) else ""


def _asked_to_wait(cause: BaseException) -> float:
    """Seconds that the server asks for; 0 when it names none."""
    header = cause.response.headers.get("Retry-After", "") if isinstance(cause, HTTPError) else ""
    return float(header) if re.fullmatch(r"[0-9]{1,9}", header) else 0.0


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


# --- files: from an address to a file -----------------------------------------------------------


def download_section(
    tool: yt_dlp.YoutubeDL,
    address: str,
    section: TimeRange | None,
    path: Path,
    *,
    program: str,
    guard: Guard,
) -> dict[str, Any]:
    """Find the streams of a page and copy a part of them, or all, into a file.

    ffmpeg reads them from a relay, which fetches by yt-dlp; streams that come in parts which
    ffmpeg would not find there (DASH) are fetched whole first.
    """
    with guarding(guard):
        found = tool.extract_info(address, download=False)
        streams = found.get("requested_formats") or [found]
        if found.get("is_live"):
            raise DownloadError("a live stream: it has no end")
        files: list[str] = []
        if not all(stream.get("protocol", "http") in _RELAYED for stream in streams):
            whole = tool.extract_info(address)
            files = [f"file:{_file_of(whole, path.parent, path.stem)}"]
    relay = Relay(tool.urlopen, guard, MAX_BYTES)
    with relay.serving():
        inputs = files or [relay.path_to(one["url"], _headers(one)) for one in streams]
        partial = path.with_suffix(".section")
        done = _copy(program, inputs, section, partial, relay.environment)
    if done is None or done.returncode != 0 or relay.errors:
        partial.unlink(missing_ok=True)
        if relay.errors:
            raise relay.errors[0]
        if done is None:
            raise DownloadError("timed out: too slow")
        raise DownloadError(f"Got error: {done.stderr.strip() or 'ffmpeg failed'}")
    partial.replace(path)
    return {"requested_downloads": [{"filepath": str(path)}]}


def _copy(
    program: str,
    inputs: Sequence[str],
    section: TimeRange | None,
    path: Path,
    environment: dict[str, str],
) -> "subprocess.CompletedProcess[str] | None":
    """Copy the streams of some inputs into one mp4; None when it takes too long."""
    part = ["-ss", str(section[0]), "-t", str(section[1] - section[0])] if section else []
    command = [program, "-nostdin", "-hide_banner", "-loglevel", "error", "-y"]
    for one in inputs:
        local = one.startswith("file:")
        protocols = "file,crypto" if local else _PROTOCOLS
        command += ["-protocol_whitelist", protocols, *part, "-i", one]
    for number in range(len(inputs)):
        command += ["-map", f"{number}:v?", "-map", f"{number}:a?"]
    command += ["-c", "copy", "-sn", "-dn", "-fs", str(MAX_BYTES), "-f", "mp4", f"file:{path}"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=MAX_SECONDS,
            check=False, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None


def _headers(stream: dict[str, Any]) -> dict[str, str]:
    """The headers for a stream, without credentials: only yt-dlp sends those, to their own site."""
    headers = stream.get("http_headers") or {}
    return {k: v for k, v in headers.items() if k.lower() not in ("cookie", "authorization")}


KILLED = "the process that read it was killed, perhaps because memory ran out"
PARTIAL = ".partial"
PAUSES = (1.0, 2.0, 4.0)  # seconds before another try
MAX_BYTES = 4 * 2**30  # of one file
MAX_SECONDS = 3600.0  # for one file
SILENCE = 20.0  # seconds without a byte
BLOCK = 2**16  # bytes written at once: what a kill can cost of a file
TOOLS = f"yt-dlp {yt_dlp.version.__version__}, PyAV {av.__version__}"


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """A file to fetch: its final name, and where it can come from."""

    name: str
    mirrors: tuple[str, ...] = ()  # tried first; each is the file itself, no page about it
    page: str | None = None  # the page that yt-dlp's extractors read
    section: TimeRange | None = None  # the part of the video that is wanted; None: all
    here: Path | None = None  # a file of the user: probed, not moved
    sha256: str | None = None  # of that file, where it is known
    is_deadly: bool = False  # the worker that fetched it was killed: it is not tried again now


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request."""

    name: str
    state: str
    reason: str = ""
    has: tuple[str, ...] = ()
    seconds: float | None = None
    sha256: str | None = None
    num_bytes: int = 0  # fetched now
    host: str = ""
    reached: bool = True  # False: no connection to the host


@dataclass(frozen=True, slots=True)
class Fetching:
    """What all requests share."""

    media: Path
    ffmpeg: str
    allow_youtube: bool
    height: int  # of the picture: the largest stream that is not above it
    proxy: str | None
    cookies: Path | None
    threads: int
    hosts: Hosts
    max_rate: float | None  # bytes a second and file
    private: bool = False  # data.allow_private_hosts
    trusted: tuple[Place, ...] = ()  # the mirrors of the settings, private or not


def fetch_all(orders: Sequence[FetchRequest], fetching: Fetching) -> list[Outcome]:
    """What a worker does: fetch some files, a few at a time."""
    with ThreadPoolExecutor(fetching.threads) as pool:
        return list(pool.map(partial(fetch, fetching=fetching), orders))


def without_deadly(orders: list[FetchRequest]) -> list[list[FetchRequest]]:
    """What to fetch instead of files on which a worker died: each by itself, then not that one."""
    if len(orders) > 1:
        return [[order] for order in orders]
    return [[replace(order, is_deadly=True) for order in orders]]


def fetch(order: FetchRequest, fetching: Fetching) -> Outcome:
    """Fetch a file unless it is there; the best outcome of its addresses."""
    if order.is_deadly:
        return Outcome(order.name, "corrupt", KILLED)
    if order.here is not None and not order.here.exists():
        return Outcome(order.name, "not-found", f"{why_missing(order.here)} in data.location")
    if order.here is not None:
        return _examine(order.name, order.here, None, known=order.sha256)
    path = fetching.media / order.name
    if path.is_file():
        return _examine(order.name, path, path)
    outcomes = []
    for address in (*order.mirrors, *([order.page] if order.page else [])):
        outcome = _fetch_from(address, order, fetching)
        if outcome.state == "ok":
            return outcome
        outcomes.append(outcome)
    # What can be tried again must be: a mirror's 404 does not outweigh a time-out at the source.
    retryable = [one for one in outcomes if one.state in RETRYABLE]
    return (retryable or outcomes)[-1]


def _fetch_from(address: str, order: FetchRequest, fetching: Fetching) -> Outcome:
    folder, name = fetching.media / PARTIAL, order.name
    part, parts = part_name(name, address), urlsplit(address)
    host = parts.netloc.rpartition("@")[2]
    failed = Outcome(name, "network", host=host)
    with fetching.hosts.turn(host):
        for pause in (*PAUSES, None):
            guard = _guard(address, fetching)
            try:
                got = _get(address, order, fetching, guard)
            except (YoutubeDLError, HTTPException, OSError, ValueError) as error:
                refusal = explain(error)
                if guard.refused:
                    refusal = Refusal("filtered", guard.refused)
                failed = replace(
                    failed, state=refusal.state, reason=refusal.reason, reached=refusal.reached
                )
                if refusal.wait:
                    fetching.hosts.delay(host, refusal.wait)
                if failed.state not in RETRYABLE:
                    _clear(folder, part)
                    return failed
                if pause is None:
                    return failed
                time.sleep(max(pause, min(refusal.wait, LONGEST)))
                continue
            outcome = _examine(name, _file_of(got, folder, part), fetching.media / name)
            _clear(folder, name)
            return replace(outcome, host=host)
    return failed


def _guard(address: str, fetching: Fetching) -> Guard:
    """What the download of an address may reach."""
    proxies = () if _is_direct(address) else proxies_of(fetching.proxy)
    return Guard(fetching.private, (*fetching.trusted, *proxies), proxied=bool(proxies))


def _is_direct(address: str) -> bool:
    """Whether an address is of this machine: a proxy leads elsewhere."""
    return urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1")


def part_name(name: str, address: str) -> str:
    """The name of a file until it is complete: two mirrors may have different bytes."""
    parts = urlsplit(address)
    place = f"{parts.hostname}{parts.path}?{parts.query}"  # a port may change from run to run
    return f"{name}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


def _clear(folder: Path, name: str) -> None:
    for rest in folder.glob(f"{name}*"):
        rest.unlink()


def _get(address: str, order: FetchRequest, fetching: Fetching, guard: Guard) -> Any:
    """Download into the folder of partial files; returns what yt-dlp reports."""
    folder, part = fetching.media / PARTIAL, part_name(order.name, address)
    tool = _youtube_dl(folder, part, fetching, direct=_is_direct(address))
    if order.section is None or address != order.page:
        try:
            with guarding(guard):
                if address != order.page:
                    return _download_file(tool, address, part)
                return tool.extract_info(address)
        except YoutubeDLError:
            if guard.refused != STREAMED or address != order.page:
                raise
            guard.refused = ""
    return download_section(
        tool, address, order.section, folder / f"{part}.mp4",
        program=fetching.ffmpeg, guard=guard,
    )  # fmt: skip


def _download_file(tool: yt_dlp.YoutubeDL, address: str, name: str) -> Any:
    """Download an address that is known to be a file, without probing it first."""
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


def _examine(name: str, path: Path, final: Path | None, *, known: str | None = None) -> Outcome:
    """Probe a file; media gets its final name, anything else that was fetched is deleted."""
    try:
        media = probe(path)
        if media.seconds <= 0:
            raise BrokenMediaError("it lasts no time")
    except BrokenMediaError as error:
        if final is not None:
            path.unlink(missing_ok=True)
        return Outcome(name, "corrupt", str(error))
    num_bytes = path.stat().st_size if final is not None and final != path else 0
    with path.open("rb") as file:
        digest = known or hashlib.file_digest(file, "sha256").hexdigest()
        if final is not None:
            os.fsync(file.fileno())
            path.replace(final)
    has = (("video",) if media.video is not None else ()) + (
        ("audio",) if media.audio is not None else ()
    )
    return Outcome(name, "ok", "", has, round(media.seconds, 3), digest, num_bytes)


class _Silent:
    """A logger for yt-dlp that drops all messages: its errors are exceptions."""

    def debug(self, message: str) -> None:
        """Nothing."""

    info = warning = error = debug


_local = threading.local()


def _youtube_dl(folder: Path, name: str, fetching: Fetching, *, direct: bool) -> yt_dlp.YoutubeDL:
    """This thread's YoutubeDL (making one takes 0.1 s), set to write there."""
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
        "buffersize": BLOCK,
        "cachedir": False,
        "cookiefile": str(fetching.cookies) if fetching.cookies else None,
        "external_downloader": "native",
        "ffmpeg_location": fetching.ffmpeg,
        "fixup": "never",
        "format": "bv*+ba/b",
        "format_sort": [f"res:{fetching.height}"],
        "logger": _Silent(),
        "max_filesize": MAX_BYTES,
        "merge_output_format": "mkv",
        "no_warnings": True,
        "noplaylist": True,
        "noresizebuffer": True,
        "noprogress": True,
        "playlist_items": "1",
        "quiet": True,
        "ratelimit": fetching.max_rate,
        "retries": 0,  # ours, which also cover the first request, are enough
        "skip_unavailable_fragments": False,  # what follows a lost one would move in time
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
