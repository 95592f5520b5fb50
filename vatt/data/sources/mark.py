"""A mark of the lists that the settings name: it changes when one of them does."""

import hashlib
import os
from pathlib import Path

from vatt.config import OWN_SOURCES, DataParams

ENDS = 2**16  # bytes at the beginning and the end that tell a file from another


def mark_of_lists(data: DataParams) -> str | None:
    """By names, sizes, beginnings and ends; None where clips come from no list."""
    if data.source == "urls":
        assert data.location is not None  # the schema asks for it
        files = [data.location]
    elif data.source in OWN_SOURCES:
        return None
    else:
        assert data.annotations is not None
        folders = [data.annotations / name for name in data.sources]
        files = sorted(path for folder in folders for path in folder.glob("[!.]*"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {_content(path)}\n".encode())
    return digest.hexdigest()[:16]


def _content(path: Path) -> str:
    """A folder counts by the number of its files: there may be a million."""
    if path.is_dir():
        return str(sum(1 for _ in os.scandir(path)))
    if not path.is_file():
        return "absent"
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        digest = hashlib.sha256(file.read(ENDS))
        file.seek(max(size - ENDS, 0))
        digest.update(file.read(ENDS))
    return f"{size} {digest.hexdigest()}"
