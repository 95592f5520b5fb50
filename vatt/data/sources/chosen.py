"""The source that the settings name: its clips, and where their files can be fetched meanwhile."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vatt.config import DataParams
from vatt.data.demo import make_demo, serve
from vatt.data.manifest import Clip
from vatt.data.sources.folder import scan
from vatt.data.sources.urls import read_urls


@dataclass(frozen=True, slots=True)
class Source:
    """Clips, and the settings with the servers that are up as long as the source is open."""

    clips: Sequence[Clip]
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
            yield Source(clips, data.model_copy(update={"base_urls": (base_url,)}))
        return
    assert data.location is not None  # the schema asks for it
    if data.source == "folder":
        yield Source(scan(data.location, data).clips, data)
    else:
        yield Source(read_urls(data.location, data), data)
