"""Checkpoints from a web server on the loopback: ranges, none, broken lines, changed files."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from tests import tf_bundle
from vatt.errors import DataError, MachineError, SettingsError
from vatt.release import fetch
from vatt.release.fetch import fetch_checkpoint
from vatt.release.tf_checkpoint import TensorFlowCheckpoint
from vattctl.cli import main

TENSORS = {"big": np.arange(50_000, dtype=np.float32), "small": np.ones(3, np.float32)}
DATA = "ckpt-9.data-00000-of-00001"


class Server(ThreadingHTTPServer):
    """Serves a folder; `requests` holds (name, first requested byte) of every GET."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.ranges = True
        self.cut_after: int | None = None  # bytes of a response before the line breaks
        self.version = "one"
        self.moved_to = ""
        self.requests: list[tuple[str, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        if self.server.moved_to:
            self.send_response(302)
            self.send_header("Location", self.server.moved_to + self.path)
            self.end_headers()
            return
        file = self.server.folder / self.path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        content, first, asked = file.read_bytes(), 0, self.headers.get("Range")
        total = len(content)
        if asked and self.server.ranges:
            start, _, end = asked.removeprefix("bytes=").partition("-")
            first, content = int(start), content[int(start) : int(end or total) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/{total}")
        else:
            self.send_response(200)
        if with_body:
            self.server.requests.append((file.name, first))
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{self.server.version}"')
        self.send_header("Accept-Ranges", "bytes" if self.server.ranges else "none")
        self.end_headers()
        if with_body:
            self.wfile.write(content[: self.server.cut_after])
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetch, "_CHUNK_BYTES", 64_000)
    monkeypatch.setattr(fetch, "_PAUSE_SECONDS", 0.001)
    tf_bundle.write(tmp_path / "served" / "ckpt-9", TENSORS)
    server = Server(tmp_path / "served")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def assert_fetched(prefix: Path, server: Server) -> None:
    checkpoint = TensorFlowCheckpoint(prefix)
    np.testing.assert_array_equal(checkpoint.read("big").numpy(), TENSORS["big"])
    for file in (f"{prefix.name}.index", DATA):
        assert prefix.with_name(file).read_bytes() == (server.folder / file).read_bytes()


def test_index_and_shards_come_over_in_ranges(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    prefix = fetch_checkpoint(
        f"{server.url}/ckpt-9", tmp_path / "here", progress=lambda done, of: seen.append((done, of))
    )
    assert_fetched(prefix, server)
    size = (server.folder / DATA).stat().st_size
    assert [done for done, of in seen if of == size] == [64_000, 128_000, 192_000, size]
    before = len(server.requests)
    fetch_checkpoint(f"{server.url}/ckpt-9.index", tmp_path / "here")
    assert len(server.requests) == before  # all there: nothing is requested again


def test_a_broken_download_goes_on_where_it_ended(server: Server, tmp_path: Path) -> None:
    server.cut_after = 20_000
    with pytest.raises(MachineError, match="again to continue"):
        fetch_checkpoint(f"{server.url}/ckpt-9", tmp_path / "here")
    partial = tmp_path / "here" / f"{DATA}.part"
    partial.write_bytes((server.folder / DATA).read_bytes()[:100_000])  # as after some chunks
    server.cut_after = None
    server.requests.clear()
    prefix = fetch_checkpoint(f"{server.url}/ckpt-9", tmp_path / "here")
    assert_fetched(prefix, server)
    assert [first for name, first in server.requests if name == DATA] == [100_000, 164_000]


def test_a_source_that_changed_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    fetch_checkpoint(f"{server.url}/ckpt-9", tmp_path / "here")
    server.version = "two"
    changed = {name: array + 1 for name, array in TENSORS.items()}
    tf_bundle.write(server.folder / "ckpt-9", changed)
    prefix = fetch_checkpoint(f"{server.url}/ckpt-9", tmp_path / "here")
    np.testing.assert_array_equal(TensorFlowCheckpoint(prefix).read("big").numpy(), changed["big"])


def test_a_server_without_ranges_sends_everything_at_once(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    assert_fetched(fetch_checkpoint(f"{server.url}/ckpt-9", tmp_path / "here"), server)


def test_the_command_imports_from_an_address(server: Server, tmp_path: Path) -> None:
    server.folder = Path(__file__).parents[1] / "golden" / "ckpt_ft_audio"
    url, out = f"{server.url}/ckpt-1", tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(["import", url, "--out", str(out), "--heads", "3"])
    assert not ended.value.code
    source = json.loads((out / "config.json").read_text())["source"]
    assert source["prefix"] == url
    assert list(source["sha256"]) == ["ckpt-1.index", "ckpt-1.data-00000-of-00001"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "served"]  # no leftovers


def test_files_that_do_not_belong_are_refused(server: Server, tmp_path: Path) -> None:
    data = server.folder / DATA
    data.write_bytes(data.read_bytes() + b"more")
    with pytest.raises(DataError, match="where its index names"):
        fetch_checkpoint(f"{server.url}/ckpt-9", tmp_path / "here")
    (server.folder / "page.index").write_text("<html>" + 60 * "-" + "</html>")
    with pytest.raises(DataError, match="not the index of a TensorFlow checkpoint"):
        fetch_checkpoint(f"{server.url}/page", tmp_path / "here")
    with pytest.raises(MachineError, match="404"):
        fetch_checkpoint(f"{server.url}/none", tmp_path / "here")


def test_a_redirect_to_a_private_host_is_not_followed(server: Server, tmp_path: Path) -> None:
    server.moved_to = f"http://127.0.0.1:{server.server_address[1] - 1}"
    with pytest.raises(DataError, match=r"leads to another host: 127\.0\.0\.1 is a private"):
        fetch_checkpoint(f"{server.url}/ckpt-9", tmp_path / "here")


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "memory://a/ckpt", "zip://a::http://127.0.0.1/b", "ftp://a/ckpt"]
)
def test_other_protocols_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is not fetched"):
        fetch_checkpoint(url, tmp_path)
