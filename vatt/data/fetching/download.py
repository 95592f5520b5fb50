"""Manifest -> media. A journal next to the media has every event; the ledger, the last states."""

import logging
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

from vatt.config import DataParams, MachineParams
from vatt.data.clips.files import ContentHashes, Stamp, stamp_of
from vatt.data.clips.ledger import (
    JOURNAL,
    RETRYABLE,
    Entry,
    Ledger,
    read_entries,
    with_captions,
    write_ledger,
)
from vatt.data.clips.manifest import Clip, media_name, path_in_folder
from vatt.data.clips.media import find_ffmpeg
from vatt.data.fetching.fetch import (
    PARTIAL,
    TOOLS,
    Fetching,
    FetchRequest,
    Hosts,
    Outcome,
    TimeRange,
    fetch_all,
    without_deadly,
)
from vatt.data.fetching.network import SETTING as ALLOW_PRIVATE
from vatt.data.fetching.network import place_of
from vatt.data.workers import Workers, start_workers
from vatt.errors import DataError, MachineError
from vatt.files import lock
from vatt.progress import Progress

STAGE = "download"
CHUNK = 8  # files a worker is given at a time
THREADS = 4  # files a worker fetches at once: most of it is waiting
# The rest of a host's files are not tried after so many in a row without a connection to it, if it
# was never reached or not for so long. The next run tries them.
HOST_IS_DOWN, DOWN_SECONDS = 8, 60.0
HOST_REFUSES = 24  # files in a row that a host was too busy for: the others wait for another run
LOCKS = ".hosts"
YOUTUBE_IS_OFF = "YouTube is off: data.allow_youtube"
YOUTUBE = ("youtube.com", "youtu.be", "youtube-nocookie.com")

log = logging.getLogger(__name__)


def download(
    clips: Iterable[Clip],
    params: DataParams,
    machine: MachineParams,
    *,
    media: Path,
    ledger: Path,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Fetch the media of all clips; returns the number of clips in each state.

    `clips` are read twice and not kept in memory: a list, or a `Manifest`. Files of a folder are
    probed in place. A clip that is lost for good is not tried again; one that a weak network lost
    is.
    """
    manners = machine.download
    if params.allow_private_hosts and params.source not in ("demo", "folder"):
        log.warning("%s is on: a list may name this machine and its network", ALLOW_PRIVATE)
    (media / PARTIAL).mkdir(parents=True, exist_ok=True)
    fetching = Fetching(
        media=media.absolute(),
        ffmpeg=find_ffmpeg(machine.ffmpeg),
        allow_youtube=params.allow_youtube,
        height=params.height,
        proxy=_proxy_in(machine.proxy),
        cookies=machine.cookies and machine.cookies.absolute(),
        threads=THREADS,
        hosts=Hosts(media.absolute() / LOCKS, manners.per_host, manners.pause_seconds),
        max_rate=manners.max_mb_per_second and manners.max_mb_per_second * 1e6,
        private=params.allow_private_hosts,
        trusted=tuple(filter(None, map(place_of, params.base_urls))),
    )
    with lock(media / ".download.lock"), Ledger(media / JOURNAL) as journal:
        entries = read_entries(media / JOURNAL)
        known = {entry.clip_id: replace(entry, time=None) for entry in entries}
        groups: dict[str, list[str]] = {}
        total = 0
        for clip in clips:
            total += 1
            if not _is_settled(clip, known.get(clip.clip_id), params, media):
                groups.setdefault(clip.url, []).append(clip.clip_id)
        work = _Work(
            list(groups.items())[::-1], params, fetching, journal, known,
            progress or (lambda *_: None), _room(media, manners.max_gb),
            ContentHashes.beside(media), total=total,
        )  # fmt: skip
        del groups
        with start_workers(machine, preload=["vatt.data.fetching.fetch"]) as workers:
            work.run(workers)
        work.hashes.save()
        final = [with_captions(known[clip.clip_id], clip) for clip in clips]
        counts = write_ledger(ledger, final)
        _check(final, params)
    return counts


def _is_settled(clip: Clip, entry: Entry | None, params: DataParams, media: Path) -> bool:
    """Whether nothing is left to do for a clip."""
    if entry is None or entry.state in RETRYABLE or clip.url.startswith("folder:"):
        return False
    if entry.reason == YOUTUBE_IS_OFF:
        return not params.allow_youtube
    if entry.reason.endswith(ALLOW_PRIVATE):
        return not params.allow_private_hosts
    return entry.state != "ok" or (media / clip.media_name).is_file()


@dataclass(slots=True)
class SilentHosts:
    """Hosts to which there is no connection."""

    lost: Counter[str] = field(default_factory=Counter)  # files in a row
    answered: dict[str, float] = field(default_factory=dict)  # when a host did, the last time

    def note(self, host: str, *, reached: bool, now: float) -> None:
        """Count a file of a host, and whether there was a connection to it."""
        self.lost[host] = 0 if reached else self.lost[host] + 1
        if reached:
            self.answered[host] = now

    def is_down(self, host: str, now: float) -> bool:
        """Whether its other files need not be tried now."""
        silence = now - self.answered.get(host, -math.inf)
        return self.lost[host] >= HOST_IS_DOWN and silence > DOWN_SECONDS


@dataclass(slots=True)
class _Work:
    """The files still to be fetched, and the outcomes so far."""

    todo: list[tuple[str, list[str]]]  # urls and their clips, the first one at the end
    params: DataParams
    fetching: Fetching
    journal: Ledger
    known: dict[str, Entry]
    progress: Progress
    room: float  # bytes that may still come
    hashes: ContentHashes
    stamps: dict[str, tuple[Path, Stamp | None]] = field(default_factory=dict)  # before reading
    out: dict[str, list[str]] = field(default_factory=dict)  # clips by the requested file
    done: int = 0
    total: int = 0  # clips, settled ones too
    silent: SilentHosts = field(default_factory=SilentHosts)
    refused: Counter[str] = field(default_factory=Counter)  # in a row

    def run(self, workers: Workers) -> None:
        """Hand the requests out in chunks, a limited number ahead, and record the outcomes."""
        self.done = self.total - sum(len(clip_ids) for _, clip_ids in self.todo)
        self.progress(self.done, self.total)
        fetch = partial(fetch_all, fetching=self.fetching)
        requests = _chunks(self._requests())
        for _, outcomes in workers.map(fetch, requests, instead=without_deadly):
            for outcome in outcomes:
                self._note(self.out.pop(outcome.name), outcome)
                self.room -= outcome.num_bytes
                if outcome.name in self.stamps and outcome.sha256 is not None:
                    path, before = self.stamps.pop(outcome.name)
                    self.hashes.learn(path, outcome.sha256, before=before)
            if self.room < 0:
                raise MachineError(
                    f"{self.fetching.media} has grown to machine.download.max_gb",
                    hint="raise it, or lower data.sample_share; what is fetched is kept",
                )

    def _requests(self) -> Iterator[FetchRequest]:
        while self.todo:
            url, clip_ids = self.todo.pop()
            name = media_name(url)
            self.out[name] = clip_ids
            if url.startswith("folder:"):
                path = path_in_folder(
                    url, self.params.location, absolute=self.params.allow_absolute_paths
                ).absolute()
                self.stamps[name] = path, stamp_of(path)
                yield FetchRequest(name, here=path, sha256=self.hashes.known(path))
                continue
            mirrors, page = addresses_of(url, self.params)
            addresses = [*mirrors, *([page] if page else [])]
            now = time.monotonic()
            hosts = {urlsplit(address).netloc.rpartition("@")[2] for address in addresses}
            if not addresses:
                self._note(self.out.pop(name), Outcome(name, "filtered", YOUTUBE_IS_OFF))
            elif all(self.silent.is_down(host, now) for host in hosts):
                reason = f"{', '.join(sorted(hosts))} cannot be reached"
                self._note(self.out.pop(name), Outcome(name, "network", reason, reached=False))
            elif all(
                self.silent.is_down(host, now) or self.refused[host] >= HOST_REFUSES
                for host in hosts
            ):
                reason = f"not tried: {', '.join(sorted(hosts))} has refused {HOST_REFUSES} files"
                self._note(self.out.pop(name), Outcome(name, "rate-limited", reason))
            else:
                yield FetchRequest(name, mirrors, page, section_of(url))

    def _note(self, clip_ids: Sequence[str], outcome: Outcome) -> None:
        """One line of the journal for each clip of a file."""
        self.silent.note(outcome.host, reached=outcome.reached, now=time.monotonic())
        is_busy = outcome.state == "rate-limited"
        self.refused[outcome.host] = self.refused[outcome.host] + 1 if is_busy else 0
        entries = [
            Entry(
                clip_id,
                outcome.state,
                STAGE,
                outcome.reason,
                outcome.has,
                seconds=outcome.seconds,
                sha256=outcome.sha256,
                tools=TOOLS if outcome.sha256 else None,
            )
            for clip_id in clip_ids
        ]
        self.journal.record(*entries)
        self.known.update((entry.clip_id, entry) for entry in entries)
        self.done += len(clip_ids)
        self.progress(self.done, self.total)


def _chunks(orders: Iterator[FetchRequest]) -> Iterator[list[FetchRequest]]:
    while chunk := list(islice(orders, CHUNK)):
        yield chunk


def addresses_of(url: str, params: DataParams) -> tuple[tuple[str, ...], str | None]:
    """Where a url's media can be fetched: the mirrors, and the source itself."""
    parts = urlsplit(url)
    at_home = parts.scheme in ("http", "https")
    host = parts.hostname or ""
    is_youtube = at_home and any(host == name or host.endswith("." + name) for name in YOUTUBE)
    section = section_of(url)
    if is_youtube:
        name = parse_qs(parts.query).get("v", [parts.path.rpartition("/")[2]])[0]
        name += f"_{int(section[0]):06d}_{int(section[1]):06d}.mp4" if section else ".mp4"
    else:
        name = parts.path.rpartition("/")[2] if at_home else url.partition(":")[2]
    mirrors = tuple(_on_mirror(base, name) for base in params.base_urls if name)
    if at_home and (params.allow_youtube or not is_youtube):
        return mirrors, url.partition("#t=")[0]
    if not mirrors and not at_home:
        raise DataError(
            f"{url} is only a path: no server is set", hint="set data.base_urls in params.yaml"
        )
    return mirrors, None


def _on_mirror(base: str, name: str) -> str:
    """A file's address below a mirror; `{id}` in it stands for the name without its ending."""
    if "{id}" in base:
        return base.replace("{id}", quote(name.rpartition(".")[0] or name))
    return base.rstrip("/") + "/" + quote(name)


def section_of(url: str) -> TimeRange | None:
    """The part of a video that an address names, as `#t=30,40`; None when it names none."""
    found = re.fullmatch(r"t=(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)", urlsplit(url).fragment)
    return (float(found[1]), float(found[2])) if found else None


def _proxy_in(file: Path | None) -> str | None:
    """The address in a file: it may hold a password, which must not be in the settings."""
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise MachineError(
            f"machine.proxy: {file} cannot be read: {getattr(error, 'strerror', 'not UTF-8')}",
            hint="name a file that holds the proxy's address, or null",
        ) from None


def _room(media: Path, max_gb: float | None) -> float:
    """Bytes that may still come into the folder."""
    if max_gb is None:
        return math.inf
    return max_gb * 1e9 - sum(entry.stat().st_size for entry in os.scandir(media))


def _check(final: Sequence[Entry], params: DataParams) -> None:
    """Stop when there is no network, or too little came."""
    states = Counter(entry.state for entry in final)
    why = ", ".join(f"{count} {state}" for state, count in states.most_common() if state != "ok")
    if final and states["network"] == len(final):
        raise MachineError(
            f"nothing could be fetched: {final[0].reason}",
            hint="check the network, data.base_urls and machine.proxy, then run it again",
        )
    if states["ok"] == 0:
        raise DataError(
            f"no clip is left after download{f' ({why})' if why else ''}",
            hint="`vattctl ledger` says why; check data.source, data.location and data.base_urls",
        )
    if states["ok"] < params.min_share * len(final):
        raise DataError(
            f"{states['ok']} of {len(final)} clips arrived ({why}); data.min_share requires "
            f"{params.min_share:.0%}",
            hint="run it again for those that can be retried, or lower data.min_share",
        )
