"""Parts of lists, and several lists in a set ratio: drawn by hash, so that nothing is held."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

from vatt.data.manifest import Clip

UNKNOWN_SECONDS = 390.0  # of a video without span and captions: HowTo100M's mean

Part = Callable[[], Iterator[Clip]]


def sampled(clips: Iterable[Clip], share: float, seed: int) -> Iterable[Clip]:
    """About a share of the clips, drawn one by one: the same whatever else the list holds."""
    return clips if share == 1 else (c for c in clips if _place(f"part:{seed}:{c.clip_id}") < share)


def union(parts: Mapping[str, Part], mix: Mapping[str, float] | None, seed: int) -> Iterator[Clip]:
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
