"""The source that the settings name: its clips, and where their files can be fetched meanwhile."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vatt.config import DataParams
from vatt.data.demo import make_demo, serve
from vatt.data.manifest import Clip
from vatt.data.sources.audioset import read_audioset
from vatt.data.sources.folder import scan
from vatt.data.sources.folds import read_esc50, read_hmdb51, read_ucf101
from vatt.data.sources.howto100m import read_howto100m
from vatt.data.sources.imagenet import read_imagenet
from vatt.data.sources.kinetics import read_kinetics
from vatt.data.sources.local import placed
from vatt.data.sources.mix import sampled, union
from vatt.data.sources.moments import read_moments
from vatt.data.sources.retrieval import read_msrvtt, read_youcook2
from vatt.data.sources.urls import read_urls
from vatt.data.sources.vggsound import read_vggsound

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
    progress: Callable[[int, int], None],
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
