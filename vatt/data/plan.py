"""Which samples stand in which shard: a pure function of manifest, ledger, settings and seed."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from vatt.config import DataParams, PreprocessParams
from vatt.data.cut import Window, windows_of
from vatt.data.ledger import Entry
from vatt.data.manifest import Clip, media_path
from vatt.errors import DataError

STAGE = "preprocess"


@dataclass(frozen=True, slots=True)
class Job:
    """A clip's windows that go into one shard."""

    clip: Clip
    source: Path
    windows: tuple[tuple[str, Window], ...]  # key and span
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard to write."""

    name: str
    split: str
    jobs: tuple[Job, ...]

    @property
    def num_samples(self) -> int:
        """As planned; broken clips make it fewer."""
        return sum(len(job.windows) for job in self.jobs)


def plan_shards(
    clips: Sequence[Clip],
    downloads: Mapping[str, Entry],
    preprocess: PreprocessParams,
    data: DataParams,
    *,
    media: Path,
    seed: int,
) -> tuple[list[Shard], dict[str, Entry]]:
    """The shards, and the states that are known before any work."""
    entries: dict[str, Entry] = {}
    jobs: list[Job] = []
    for clip in clips:
        before = downloads.get(clip.clip_id)
        if before is None:
            raise DataError(
                f"the download ledger does not know clip {clip.clip_id}",
                hint="run `vattctl download`",
            )
        if before.state != "ok":
            entries[clip.clip_id] = before
            continue
        seconds = before.seconds or 0.0
        end = seconds if clip.end is None else min(clip.end, seconds)
        windows = windows_of(clip.start, end, preprocess)
        if not windows:
            reason = f"{max(end - clip.start, 0):.2f} s of {preprocess.min_clip_seconds} s"
            entries[clip.clip_id] = Entry(clip.clip_id, "too-short", STAGE, reason)
            continue
        source = media_path(clip, media=media, location=data.location)
        jobs.append(Job(clip, source, tuple(_keyed(clip, windows)), before.sha256))

    def order(job: Job) -> tuple[str, str, float, str]:
        mixed = hashlib.sha256(f"{seed}:{job.clip.url}".encode()).hexdigest()
        return job.clip.split, mixed, job.clip.start, job.clip.clip_id

    jobs.sort(key=order)  # the clips of one file stay together: it is decoded once
    shards = []
    for split, group in groupby(jobs, key=lambda job: job.clip.split):
        for number, part in enumerate(_fill(list(group), preprocess.samples_per_shard)):
            shards.append(Shard(f"{split}-{number:05d}.tar", split, tuple(part)))
    return shards, entries


def _keyed(clip: Clip, windows: Sequence[Window]) -> list[tuple[str, Window]]:
    if len(windows) == 1:
        return [(clip.clip_id, windows[0])]
    return [(f"{clip.clip_id}+{number:04d}", window) for number, window in enumerate(windows)]


def _fill(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """Deal the windows out in order, `size` to a shard; a long clip may stand in several."""
    shards: list[list[Job]] = []
    room = 0
    for job in jobs:
        windows = job.windows
        while windows:
            if room == 0:
                shards.append([])
                room = size
            shards[-1].append(Job(job.clip, job.source, windows[:room], job.sha256))
            taken = min(room, len(windows))
            windows, room = windows[taken:], room - taken
    return shards
