"""The source that the settings name: its clips, parts and mixtures of lists, and its servers."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from vatt.config import DataParams
from vatt.data.clips.manifest import Clip
from vatt.data.sources.audioset import read_audioset
from vatt.data.sources.demo import make_demo, serve
from vatt.data.sources.folder import placed, scan
from vatt.data.sources.howto100m import read_howto100m
from vatt.data.sources.imagenet import read_imagenet
from vatt.data.sources.labelled import (
    read_esc50,
    read_hmdb51,
    read_kinetics,
    read_moments,
    read_ucf101,
    read_vggsound,
)
from vatt.data.sources.retrieval import read_msrvtt, read_youcook2
from vatt.data.sources.urls import read_urls
from vatt.progress import Progress

READERS: dict[str, Callable[[Path, DataParams], Iterator[Clip]]] = {
    "audioset": read_audioset,
    "esc50": read_esc50,
    "hmdb51": read_hmdb51,
    "howto100m": read_howto100m,
    "imagenet": read_imagenet,
    "kinetics400": partial(read_kinetics, source="kinetics400"),
    "kinetics600": partial(read_kinetics, source="kinetics600"),
    "kinetics700": partial(read_kinetics, source="kinetics700"),
    "moments": read_moments,
    "msrvtt": read_msrvtt,
    "ucf101": read_ucf101,
    "vggsound": read_vggsound,
    "youcook2": read_youcook2,
}


@dataclass(frozen=True, slots=True)
class Source:
    """Clips, and the settings with the servers that are up as long as the source is open."""

    clips: Iterable[Clip]  # to be read once
    data: DataParams


@contextmanager
def open_source(
    data: DataParams,
    *,
    seed: int,
    corpus: Path,
    workers: int,
    progress: Progress,
) -> Iterator[Source]:
    """List the clips of `data.source`; the demo makes its corpus and serves it on loopback."""
    if data.source == "demo":
        clips = make_demo(corpus, data.demo, seed=seed, workers=workers, progress=progress)
        with serve(corpus) as base_url:
            mirrored = data.model_copy(update={"base_urls": (base_url,)})
            yield Source(sampled(clips, data.sample_share, seed), mirrored)
        return
    yield Source(sampled(listed(data, seed), data.sample_share, seed), data)


def listed(data: DataParams, seed: int) -> Iterable[Clip]:
    """The clips of a folder, a list of addresses, or official lists in their ratio."""
    if data.source == "folder":
        assert data.location is not None  # the schema asks for it
        return scan(data.location, data).clips
    if data.source == "urls":
        assert data.location is not None
        return read_urls(data.location, data)
    assert data.annotations is not None
    parts = {name: partial(READERS[name], data.annotations / name, data) for name in data.sources}
    clips = union(parts, data.mix, seed)
    return clips if data.location is None else placed(clips, data.location)


UNKNOWN_SECONDS = 390.0  # of a video without span and captions: HowTo100M's mean

ListPart = Callable[[], Iterator[Clip]]


def sampled(clips: Iterable[Clip], share: float, seed: int) -> Iterable[Clip]:
    """About a share of the clips, drawn one by one: the same whatever else the list holds."""
    return clips if share == 1 else (c for c in clips if _place(f"part:{seed}:{c.clip_id}") < share)


def union(
    parts: Mapping[str, ListPart], mix: Mapping[str, float] | None, seed: int
) -> Iterator[Clip]:
    """The clips of all lists; with a mix, as much of each as makes that ratio of their hours."""
    if mix is None:
        yield from chain.from_iterable(part() for part in parts.values())
        return
    hours = {name: sum(map(_seconds, part())) / 3600 for name, part in parts.items()}
    total = min(hours[name] / mix[name] for name in parts)
    for name, part in parts.items():
        share = mix[name] * total / hours[name] if hours[name] else 0.0
        for clip in part():
            if _place(f"mix:{seed}:{clip.clip_id}") < share:
                yield clip


def _place(name: str) -> float:
    """Where a name falls between 0 and 1."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _seconds(clip: Clip) -> float:
    if clip.end is not None:
        return clip.end - clip.start
    return clip.captions[-1].end if clip.captions else UNKNOWN_SECONDS
