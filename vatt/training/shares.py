"""An engine's state as whole tensors by name, shared out over files, for any engine to read.

Each process writes an equal share of a module's tensors, a weight with its optimiser's moments. How
many processes there were and at which ZeRO stage leaves no trace: any other number goes on.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from vatt.training import distributed

Entry = dict[str, Tensor]  # "value", and for a trained weight its moments by name


def write_share(folder: Path, entries: Iterable[tuple[str, Entry]], *, updates: int) -> None:
    """Write this process's share; `entries`, the same in every process, may talk to the others."""
    share = {
        name: {key: tensor.detach().to("cpu", copy=True) for key, tensor in entry.items()}
        for number, (name, entry) in enumerate(entries)
        if number % distributed.world_size() == distributed.rank()
    }
    path = folder / f"share-{distributed.rank():05d}.pt"
    torch.save({"updates": updates, "entries": share}, path)


def read_shares(folder: Path) -> tuple[int, dict[str, Entry]]:
    """How many updates were made, and every tensor by name; read from disk as it is used."""
    updates = 0
    entries: dict[str, Entry] = {}
    for path in sorted(folder.glob("share-*.pt")):
        share = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        updates = share["updates"]
        entries |= share["entries"]
    return updates, entries
