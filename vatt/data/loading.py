"""How samples are loaded: settings that change the speed of it, never what comes out."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from vatt.config import MachineParams
from vatt.data.order import OPEN_SHARDS
from vatt.data.reader import ShardIndex, extents
from vatt.data.remote import ShardCache
from vatt.data.samples import INDEX, Row
from vatt.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Loading:
    """Where samples are made and kept."""

    workers: int = 0
    cache_gb: float = 0.0  # decoded clips kept in memory
    prefetch_gb: float = 1.0  # batches made before they are asked for; one always is
    max_broken_share: float = 0.0  # more broken samples than this stop a training
    ledger: Path | None = None  # where broken samples are noted
    shards_url: str | None = None  # where shards lie that are not beside their index
    shard_cache: Path = Path()  # and where they are kept
    shard_cache_gb: float = 0.0

    @classmethod
    def of(cls, machine: MachineParams) -> Self:
        """As the settings want it."""
        return cls(
            workers=machine.workers,
            cache_gb=machine.cache_gb,
            prefetch_gb=machine.prefetch_gb,
            max_broken_share=machine.max_broken_share,
            ledger=machine.load_ledger,
            shards_url=machine.shards_url,
            shard_cache=machine.shard_cache,
            shard_cache_gb=machine.shard_cache_gb,
        )


HERE = Loading()  # in this process, from local shards, no sample broken


def open_index(
    shards: Path, how: Loading, *, split: str, keys: Collection[str] | None = None
) -> ShardIndex:
    """The index of a split, and where its shards come from."""
    index = ShardIndex.load(shards, split=split, keys=keys)
    if how.shards_url is None:
        return index
    cache = ShardCache.of(
        how.shards_url, shards / INDEX, folder=how.shard_cache, gigabytes=how.shard_cache_gb
    )
    needed = largest(index.rows, OPEN_SHARDS + 1)
    if needed > cache.limit:
        raise SettingsError(
            f"machine.shard_cache_gb: {how.shard_cache_gb} holds too few shards: {OPEN_SHARDS} "
            "are read at a time",
            hint=f"raise it to {needed / 1e9 + 0.1:.1f} or more",
        )
    return replace(index, remote=cache)


def largest(rows: Sequence[Row], count: int) -> int:
    """Bytes of the `count` largest shards."""
    ends: dict[str, int] = {}
    for shard, first, size in extents(rows):
        ends[shard] = max(ends.get(shard, 0), first + size)
    return sum(sorted(ends.values())[-count:])
