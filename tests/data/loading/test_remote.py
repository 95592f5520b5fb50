"""Shards fetched from a server that knows ranges, that does not, that fails, or does not exist."""

import os
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from tests.data.corpus import demo_params, make_corpus
from tests.data.loading.test_batches import same
from tests.data.loading.test_loading import SAMPLING
from tests.data.sharding.test_shards import write
from vatt.data.loading import reader
from vatt.data.loading.batches import Loading, open_index, train_batches
from vatt.data.loading.reader import ShardCache
from vatt.errors import DataError, MachineError, SettingsError


class Server(ThreadingHTTPServer):
    """Serves a folder; counts bytes and whole-file openings, and fails as it is told."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.ranges, self.failures = folder, True, Counter()
        self.sent: Counter[str] = Counter()
        self.moved_to = ""  # the address of another server
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/shards"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, *, body=True):
        name = self.path.rpartition("/")[2]
        path = self.server.folder / name
        if self.server.moved_to:
            self.send_response(302)
            self.send_header("Location", f"{self.server.moved_to}/{name}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if body and self.server.failures[name] > 0:
            self.server.failures[name] -= 1
            self.send_error(503)
            return
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        asked = self.headers.get("Range") if self.server.ranges else None
        self.send_response(206 if asked else 200)
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            end = min(int(last or len(data)), len(data) - 1)
            self.send_header("Content-Range", f"bytes {first}-{end}/{len(data)}")
            data = data[int(first) : end + 1]
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.server.sent[name] += len(data)
            self.wfile.write(data)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("remote")
    params = demo_params()
    corpus = make_corpus(root / "media", 12)
    write(root, *corpus, params=params, samples_per_shard=3, short_side=16, video_storage="jpeg")
    return root / "shards"


@pytest.fixture
def server(shards, monkeypatch):
    monkeypatch.setattr(reader, "PAUSE_SECONDS", 0.01)
    server = Server(shards)
    yield server
    server.shutdown()


@pytest.fixture
def bare(shards, tmp_path):
    """What a training machine has: index and vocabulary."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("index.jsonl", "vocabulary.txt"):
        (folder / name).write_bytes((shards / name).read_bytes())
    return folder


def train(folder, loading):
    return list(
        train_batches(
            open_index(folder, loading, split="train"), SAMPLING, batch_size=6, steps=range(6),
            seed=1, loading=loading,
        )
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_give_the_same_batches_and_are_fetched_once(
    shards, server, bare, tmp_path, workers
):
    how = Loading(
        workers, shards_url=server.url, shard_cache=tmp_path / "cache", shard_cache_gb=1.0
    )
    local = train(shards, Loading())
    for _ in range(2):
        assert all(same(*pair) for pair in zip(local, train(bare, how), strict=True))
    sizes = {path.name: path.stat().st_size for path in shards.glob("*.tar")}
    assert server.sent == sizes
    kept = {path.name: path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar")}
    assert kept == sizes
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_cache_too_small_for_the_open_shards_is_refused(server, bare, tmp_path):
    how = Loading(shards_url=server.url, shard_cache=tmp_path, shard_cache_gb=1e-5)
    with pytest.raises(SettingsError, match="shard_cache_gb"):
        train(bare, how)


def test_the_least_recently_used_shards_make_room(shards, server, tmp_path):
    names = sorted(path.name for path in shards.glob("*.tar"))
    size = max((shards / name).stat().st_size for name in names)
    cache = ShardCache(server.url, tmp_path / "cache", int(2.5 * size))
    for name in (names[0], names[1], names[0], names[2]):
        cache.fetch(name)
    assert sorted(path.name for path in cache.folder.glob("*.tar")) == [names[0], names[2]]
    handle = cache.open(names[0])
    cache.fetch(names[3])
    cache.fetch(names[1])
    assert not (cache.folder / names[0]).exists()
    assert os.pread(handle, 10**9, 0) == (shards / names[0]).read_bytes()  # who has it reads on
    os.close(handle)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_shard_arrives_whole_by_ranges_and_without(shards, server, tmp_path, monkeypatch, ranges):
    monkeypatch.setattr(reader, "RANGE_BYTES", 10_000)
    server.ranges = ranges
    name = min(path.name for path in shards.glob("*.tar"))
    server.failures[name] = 3
    cache = ShardCache(server.url, tmp_path, 10**9)
    cache.fetch(name)
    assert (tmp_path / name).read_bytes() == (shards / name).read_bytes()
    assert server.sent[name] == (shards / name).stat().st_size


def test_failures_are_told_apart(server, tmp_path):
    cache = ShardCache(server.url, tmp_path, 10**9)
    with pytest.raises(DataError, match=r"train-99999\.tar does not exist"):
        cache.fetch("train-99999.tar")
    server.failures["train-00000.tar"] = 99
    with pytest.raises(MachineError, match="cannot be fetched"):
        cache.fetch("train-00000.tar")
    with pytest.raises(SettingsError, match="ftp:// is not supported"):
        ShardCache("ftp://somewhere", tmp_path, 10**9).fetch("train-00000.tar")
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob("*.tmp"))


def test_a_server_of_the_settings_may_be_private_but_its_redirects_may_not(
    shards, server, tmp_path
):
    inner = Server(shards)
    server.moved_to = inner.url
    with pytest.raises(DataError, match=r"leads to another host: 127\.0\.0\.1 is a private"):
        reader.download(f"{server.url}/train-00000.tar", tmp_path / "shard")
    assert not inner.sent
    inner.shutdown()


def test_any_fsspec_address_will_do(shards, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    name = min(path.name for path in shards.glob("*.tar"))
    memory.pipe(f"/bucket/{name}", (shards / name).read_bytes())
    ShardCache("memory://bucket", tmp_path, 10**9).fetch(name)
    assert (tmp_path / name).read_bytes() == (shards / name).read_bytes()


FETCH = """
import sys
from pathlib import Path
from vatt.data.loading.reader import ShardCache
for name in sys.argv[3:]:
    ShardCache(sys.argv[1], Path(sys.argv[2]), 10**9).fetch(name)
"""


def test_processes_that_want_the_same_shards_fetch_them_once(shards, server, tmp_path):
    names = sorted(path.name for path in shards.glob("*.tar"))
    left = tmp_path / f".{names[0]}.123.tmp"
    left.write_bytes(b"of a process that was killed")
    command = [sys.executable, "-c", FETCH, server.url, str(tmp_path), *names]
    others = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in others] == [0, 0, 0]
    assert server.sent == {name: (shards / name).stat().st_size for name in names}
    assert not left.exists()
