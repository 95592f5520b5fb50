"""Files that appear whole: written under a temporary name, flushed to disk, then renamed."""

import fcntl
import json
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from vatt.errors import DataError, MachineError

T = TypeVar("T")

# What reading JSON of ours may raise where a file is not there, damaged, or holds something else.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; it takes the real name only when the body succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder; it replaces `path` only when the body succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                # Some writers (safetensors) make files that only their owner may read.
                file.chmod(temporary.stat().st_mode & 0o666)
                _flush(file)
        shutil.rmtree(path, ignore_errors=True)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: Path, kind: type[T], *, hint: str) -> T:
    """The dict or list of a JSON file of ours; a damaged file is an error that names it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, kind):
            raise ValueError(f"it holds no {kind.__name__}")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}", hint=hint) from None
    return content


def read_arrays(path: Path, *, hint: str) -> dict[str, Any]:
    """The arrays of an npz file by name; a damaged file is an error that names it."""
    import numpy as np  # slow to import

    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except FileNotFoundError:
        raise
    except (*_BAD_ARRAYS, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged: {error}", hint=hint) from None


# What numpy and zipfile raise for damaged bytes.
_BAD_ARRAYS = (
    OSError, ValueError, EOFError, LookupError, TypeError, MemoryError, SyntaxError, RuntimeError,
)  # fmt: skip


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in another folder for a while, as the stages do: their paths count from there."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def lock(path: Path, *, shared: bool = False, busy: str | None = None) -> Iterator[None]:
    """Hold a lock: a shared one waits for its turn, an exclusive one is refused when it is taken.

    `busy` is the error of a refused one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MachineError(
                busy or f"busy: another process holds {path}",
                hint="wait until it has ended, or stop it",
            ) from None
        yield


def _temporary(path: Path) -> Path:
    """A name that no other process has, on any machine that shares the folder."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
