"""Resumable states: each appears whole, the last few are kept, a damaged one is skipped.

folder/lock                     held by the writer
folder/step-00000100/meta.json  step, fingerprint, engine, sha256 of the other files
folder/step-00000100/...        what the engine wrote
folder/done.json                the training has ended and its result is exported
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vatt.files import atomic_write, lock
from vatt.training import distributed
from vatt.training.engine import Engine

FORMAT = 2  # of the state folder; with another number, training starts from step 0
FULL = 2**20  # free bytes on a disk that counts as full

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class States:
    """The states of one training; resumed only by a training with an equal fingerprint."""

    folder: Path
    fingerprint: dict[str, Any]  # dotted key -> value: what shapes the result
    keep: int  # the last ones
    keep_every: int | None = None  # steps: these stay for good

    def resume(self, engine: Engine) -> int:
        """Load the newest whole state of this very training; returns the updates made so far."""
        found = distributed.from_rank_0(self._choose() if _speaks() else None)
        if found is None:
            return 0
        folder, step, kind = found
        engine.load(folder)
        if _speaks():
            log.warning("resuming at step %d from %s", step, folder)
            if kind != engine.kind:
                log.warning(
                    "it was written by another engine (%s; now %s): same samples in the same "
                    "order; numbers differ only by rounding", kind, engine.kind,
                )  # fmt: skip
        return step

    def save(self, engine: Engine, step: int) -> None:
        """Write the state after `step` updates; it becomes visible when it is complete."""
        temporary = self.folder / f".step-{step:08d}.tmp"
        if _speaks():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        distributed.barrier()
        try:
            engine.save(temporary)
        except RuntimeError as error:
            self._explain(error, temporary)
            raise
        distributed.barrier()
        if _speaks():
            self._publish(temporary, step, engine.kind)
        distributed.barrier()

    def _explain(self, error: RuntimeError, temporary: Path) -> None:
        """Raise an error that says so when the disk is full; torch does not."""
        free = shutil.disk_usage(self.folder).free
        shutil.rmtree(temporary, ignore_errors=True)
        if free < FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder)) from error

    def finish(self) -> None:
        """Mark the training as done: the next start begins from zero."""
        if _speaks():
            with atomic_write(self.folder / "done.json") as path:
                path.write_text(json.dumps({"finished": True}))

    def _choose(self) -> tuple[Path, int, str] | None:
        for leftover in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover)
        if (self.folder / "done.json").exists():
            log.info("%s holds a finished training; starting from zero", self.folder)
            for folder in self._newest_first():
                shutil.rmtree(folder)
            (self.folder / "done.json").unlink()
        for folder in self._newest_first():
            meta = _read_whole(folder)
            if meta is None:
                log.warning("%s is damaged; trying the state before it", folder)
            elif difference := _difference(meta, self._identity()):
                log.warning("not resuming from %s, because %s", folder, difference)
            else:
                return folder, int(meta["step"]), str(meta["engine"])
        return None

    def _publish(self, temporary: Path, step: int, kind: str) -> None:
        hashes = {
            str(file.relative_to(temporary)): _sha256(file, flush=True)
            for file in sorted(temporary.rglob("*"))
            if file.is_file()
        }
        meta = {"step": step, "files": hashes, "engine": kind, "identity": self._identity()}
        with atomic_write(temporary / "meta.json") as path:
            path.write_text(json.dumps(meta, indent=1))
        final = self.folder / f"step-{step:08d}"
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        self._prune(step)

    def _prune(self, step: int) -> None:
        """Keep the last few states up to `step` and each `keep_every`-th.

        Others are from before or of other settings.
        """
        kept = 0
        for folder in self._newest_first():
            meta = _read_meta(folder)
            ours = meta is not None and not _difference(meta, self._identity())
            at = int(meta["step"]) if meta is not None else 0
            if ours and at <= step and kept < self.keep:
                kept += 1
            elif not (ours and at <= step and self.keep_every and at % self.keep_every == 0):
                shutil.rmtree(folder)

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True)

    def _identity(self) -> dict[str, Any]:
        return json.loads(json.dumps({"format": FORMAT} | self.fingerprint))


@contextmanager
def open_states(
    folder: Path, fingerprint: dict[str, Any], *, keep: int, keep_every: int | None = None
) -> Iterator[States]:
    """Hold a folder of states alone; a second writer is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    states = States(folder, fingerprint, keep, keep_every)
    if not _speaks():
        yield states
        return
    with lock(folder / "lock"):
        yield states


def flatten(settings: dict[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Nested settings as `a.b.c: value`, so that a difference can be named."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, prefix=f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _speaks() -> bool:
    return distributed.rank() == 0


def _difference(meta: dict[str, Any], identity: dict[str, Any]) -> str:
    theirs = meta["identity"]
    changed = sorted(
        key for key in theirs.keys() | identity.keys() if theirs.get(key) != identity.get(key)
    )
    return ", ".join(f"{key} was {theirs.get(key)} and is {identity.get(key)}" for key in changed)


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """What a state's meta.json says; None when it is damaged. Its step is in the folder's name."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        is_sound = all(isinstance(meta[name], kind) for name, kind in _META.items())
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return meta if is_sound and folder.name == f"step-{meta['step']:08d}" else None


_META = {"step": int, "files": dict, "engine": str, "identity": dict}


def _read_whole(folder: Path) -> dict[str, Any] | None:
    """The metadata of a state, or None if a file is not as it was written."""
    meta = _read_meta(folder)
    if meta is None:
        return None
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    files.pop("meta.json")
    whole = files.keys() == meta["files"].keys() and all(
        _sha256(file) == meta["files"][name] for name, file in files.items()
    )
    return meta if whole else None


def _sha256(file: Path, *, flush: bool = False) -> str:
    with file.open("rb") as handle:
        if flush:
            os.fsync(handle.fileno())
        return hashlib.file_digest(handle, "sha256").hexdigest()
