"""Download a checkpoint from a web address or a bucket, resumably, and only the needed parts."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import fsspec
from aiohttp import ClientError

from vatt.errors import DataError, MachineError, SettingsError, VattError
from vatt.files import UNREADABLE
from vatt.progress import Progress
from vatt.release.sstable import MalformedTableError
from vatt.release.tf_checkpoint import INDEX_SUFFIX, MAX_INDEX_BYTES, parse_index, shard_path

PROTOCOLS = ("http", "https", "gs", "gcs", "s3")
_CHUNK_BYTES = 8 << 20
_ATTEMPTS = 5  # in a row without a byte gained
_PAUSE_SECONDS = 1.0  # doubles
_PARTIAL, _NOTE = ".part", ".part.json"


def is_url(prefix: str) -> bool:
    """Whether a prefix names something that is not a local file."""
    return "://" in prefix


def fetch_checkpoint(url: str, folder: Path, *, progress: Progress | None = None) -> Path:
    """Fetch the index and the shards of `url` into `folder`; returns the prefix there.

    What an earlier call left in `folder` is continued, if the source has not changed since.
    """
    from vatt.data.fetching.network import guard_address

    url = url.removesuffix(INDEX_SUFFIX)
    guard_address(url).refused = ""
    filesystem, remote = _open_url(url)
    folder.mkdir(parents=True, exist_ok=True)
    name = remote.rpartition("/")[2]
    if not name or name.startswith("."):
        raise SettingsError(f"{url} does not end in a checkpoint's name, such as ckpt-500000")
    prefix = folder / name
    index = folder / (name + INDEX_SUFFIX)
    _fetch(filesystem, remote + INDEX_SUFFIX, index, limit=MAX_INDEX_BYTES, progress=None)
    try:
        num_shards, entries = parse_index(index.read_bytes())
    except MalformedTableError as error:
        index.unlink()
        raise DataError(
            f"{url}{INDEX_SUFFIX} is not the index of a TensorFlow checkpoint: {error.problem}",
            hint="give the address without '.index' and '.data-...'",
        ) from None
    for shard in range(num_shards):
        path = shard_path(prefix, shard, num_shards)
        needed = max((e.offset + e.size for e in entries.values() if e.shard == shard), default=0)
        source = remote + path.name.removeprefix(name)
        _fetch(filesystem, source, path, limit=needed, progress=progress)
    return prefix


def download_folder(url: str, out: Path) -> Path:
    """Where an unfinished download of `url` lies until `out` is written."""
    key = hashlib.sha256(url.encode()).hexdigest()[:12]
    return out.with_name(f".{out.name}.download-{key}")


def _open_url(url: str) -> tuple[Any, str]:
    protocol = url.partition("://")[0]
    if protocol not in PROTOCOLS or "::" in url:
        raise SettingsError(
            f"{protocol}:// is not fetched", hint=f"allowed are {', '.join(PROTOCOLS)}"
        )
    try:
        return fsspec.core.url_to_fs(url, **_anonymous(protocol))
    except ImportError as error:
        package = {"s3": "s3fs"}.get(protocol, "gcsfs")
        raise MachineError(f"{url}: {error}", hint=f"pip install {package}") from None


def _anonymous(protocol: str) -> dict[str, Any]:
    """The published buckets are public; asking for credentials first would fail without any."""
    options: dict[str, dict[str, Any]] = {
        "s3": {"anon": True},
        "gs": {"token": "anon"},
        "gcs": {"token": "anon"},
    }
    return options.get(protocol, {})


def _fetch(
    filesystem: Any, remote: str, target: Path, *, limit: int, progress: Progress | None
) -> None:
    """Copy one file of at most `limit` bytes, starting where an earlier try ended."""
    size, version = _describe(filesystem, remote)
    if size is not None and size > limit:
        raise DataError(
            f"{remote} has {size} bytes where its index names {limit}",
            hint="it does not belong to that index",
        )
    if target.exists() and target.stat().st_size == size and _noted(target) == version:
        return
    partial = target.with_name(target.name + _PARTIAL)
    if not partial.exists() or _noted(target) != version:
        partial.unlink(missing_ok=True)
        _note_path(target).write_text(json.dumps(version), encoding="utf-8")
    _check_space(
        target.parent, (size or limit) - (partial.stat().st_size if partial.exists() else 0)
    )
    _copy(filesystem, remote, partial, size=size, limit=limit, progress=progress)
    partial.replace(target)


def _copy(
    filesystem: Any,
    remote: str,
    partial: Path,
    *,
    size: int | None,
    limit: int,
    progress: Progress | None,
) -> None:
    failures, can_seek = 0, size is not None
    with partial.open("ab") as out:
        while size is None or out.tell() < size:
            before = out.tell()
            try:
                if can_seek:
                    _copy_ranges(filesystem, remote, out, size or 0, progress)
                else:
                    out.truncate(0)
                    _copy_stream(filesystem, remote, out, size or limit, progress)
                    break
            except ValueError:  # the server answers a range with the whole file
                can_seek = False
            except (OSError, ClientError) as error:
                failures = 1 if out.tell() > before else failures + 1
                if failures == _ATTEMPTS or _is_final(error):
                    raise _unreachable(remote, error) from None
                time.sleep(_PAUSE_SECONDS * 2 ** (failures - 1))
        out.flush()
        os.fsync(out.fileno())
        done = out.tell()
    if done > limit or (size is not None and done != size):
        partial.unlink()
        raise DataError(f"{remote} sent {done} bytes instead of {size or limit}")


def _copy_ranges(
    filesystem: Any, remote: str, out: Any, size: int, progress: Progress | None
) -> None:
    with filesystem.open(remote, "rb", block_size=_CHUNK_BYTES, cache_type="none") as source:
        if not source.seekable():
            raise ValueError("no ranges")
        while out.tell() < size:
            source.seek(out.tell())
            chunk = source.read(min(_CHUNK_BYTES, size - out.tell()))
            if not chunk:
                raise OSError("the connection ended early")
            out.write(chunk)
            out.flush()
            if progress:
                progress(out.tell(), size)


def _copy_stream(
    filesystem: Any, remote: str, out: Any, limit: int, progress: Progress | None
) -> None:
    with filesystem.open(remote, "rb", block_size=0) as source:
        while chunk := source.read(_CHUNK_BYTES):
            out.write(chunk)
            if out.tell() > limit:
                return
            if progress:
                progress(out.tell(), limit)


def _describe(filesystem: Any, remote: str) -> tuple[int | None, dict[str, Any]]:
    """The size of a remote file, and what identifies its version."""
    info: dict[str, Any] = {}
    for attempt in range(_ATTEMPTS):
        try:
            info = filesystem.info(remote)
            break
        except (OSError, ClientError) as error:
            if attempt == _ATTEMPTS - 1 or _is_final(error):
                raise _unreachable(remote, error) from None
            time.sleep(_PAUSE_SECONDS * 2**attempt)
    marks = ("size", "ETag", "etag", "Last-Modified", "LastModified", "md5Hash")
    return info.get("size"), {mark: str(info[mark]) for mark in marks if info.get(mark)}


def _is_final(error: BaseException) -> bool:
    """Whether asking again is useless; fsspec calls every failed first request 'not found'."""
    if _refused():
        return True
    status = getattr(error.__cause__ or error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, FileNotFoundError | PermissionError) and error.__cause__ is None


def _refused() -> str:
    """The last host that may not be reached."""
    from vatt.data.fetching.network import guard_address

    return guard_address("").refused


def _unreachable(remote: str, error: BaseException) -> VattError:
    if refused := _refused():
        return DataError(
            f"{remote} leads to another host: {refused.partition(': ')[0]}",
            hint="only the host of the address itself may be a private one",
        )
    return MachineError(
        f"{remote} cannot be fetched: {error.__cause__ or error!r}",
        hint="check the address; run the same command again to continue",
    )


def _note_path(target: Path) -> Path:
    return target.with_name(target.name + _NOTE)


def _noted(target: Path) -> Any:
    try:
        return json.loads(_note_path(target).read_text(encoding="utf-8"))
    except UNREADABLE:
        return None


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise MachineError(
            f"{needed / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} GB are free",
            hint="free some space, or give another --out",
        )
