"""Redirects, playlists and names never lead to a private host; cookies stay with their domain."""

import ipaddress
import socket
import subprocess
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.data.corpus import demo_params, make_clip, write_media
from vatt.data.clips.ledger import RETRYABLE, read_ledger
from vatt.data.clips.media import find_ffmpeg, probe
from vatt.data.fetching import fetch, network
from vatt.data.fetching.download import download
from vatt.data.fetching.network import Guard, RefusedHostError, guarding

SETTING = "data.allow_private_hosts"


class Site:
    """A server of files by name; a name of `moved` is answered by a redirect."""

    def __init__(self, files: dict[str, bytes], moved: dict[str, str] | None = None) -> None:
        self.files, self.moved = files, moved or {}
        self.asked: list[tuple[str, str | None]] = []  # path and cookies

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.removeprefix("/").partition("?")[0]
        self.asked.append((name, request.headers.get("Cookie")))
        if name in self.moved:
            request.send_response(302)
            request.send_header("Location", self.moved[name])
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if name not in self.files:
            request.send_error(404)
            return
        body = self.files[name]
        span = request.headers.get("Range")
        first = int(span.removeprefix("bytes=").split("-")[0]) if span else 0
        kinds = {"m3u8": "application/vnd.apple.mpegurl", "ts": "video/mp2t", "mp4": "video/mp4"}
        request.send_response(206 if span else 200)
        request.send_header("Content-Type", kinds.get(name.rpartition(".")[2], "text/html"))
        request.send_header("Content-Length", str(len(body) - first))
        if span:
            request.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        request.end_headers()
        request.wfile.write(body[first:])


@contextmanager
def online(site: Site, host: str = "127.0.0.1"):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            site.answer(self)

        def log_message(self, *args):
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            pass

    with Quiet((host, 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://{host}:{http.server_port}"
        http.shutdown()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(fetch, "PAUSES", (0.01,))


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> dict[str, bytes]:
    """A video of 12 seconds as one file, and as a playlist with its segments."""
    folder = tmp_path_factory.mktemp("stream")
    write_media(folder / "v.mp4", seconds=12, step=2, gop=10)
    subprocess.run(
        [find_ffmpeg(None), "-loglevel", "error", "-i", folder / "v.mp4", "-c", "copy", "-f", "hls",
         "-hls_time", "2", "-hls_list_size", "0", folder / "list.m3u8"],
        check=True,
    )  # fmt: skip
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fetched(tmp_path, *urls: str, allow=False, base_urls=(), machine=None):
    """The ledger's entries after a download of some addresses and of one file that is there."""
    params = demo_params(base_urls=base_urls, allow_private_hosts=allow)
    write_media(tmp_path / "own.mp4")
    here = [replace(make_clip(99), url="folder:own.mp4")]
    clips = [replace(make_clip(number), url=url) for number, url in enumerate(urls)] + here
    download(
        clips, params.data.model_copy(update={"location": tmp_path}),
        params.machine.model_copy(update=machine or {}), media=tmp_path / "media",
        ledger=tmp_path / "ledger.jsonl",
    )  # fmt: skip
    ledger = read_ledger(tmp_path / "ledger.jsonl")
    return [ledger[clip.clip_id] for clip in clips[:-1]]


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1",
        "169.254.169.254", "0.0.0.0", "255.255.255.255", "224.0.0.1", "::1", "::", "fe80::1",
        "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
        "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "::7f00:1", "198.18.0.1",
    ],
)  # fmt: skip
def test_an_address_that_is_not_public_is_refused(address):
    with pytest.raises(RefusedHostError):
        Guard(private=False).check_address(address, 80)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "172.32.0.1"])
def test_a_public_address_is_allowed(address):
    Guard(private=False).check_address(address, 80)


def test_a_private_address_may_be_allowed_but_not_that_of_a_cloud_s_secrets():
    guard = Guard(private=True)
    for address in ("127.0.0.1", "10.0.0.1", "fd12::1", "::ffff:192.168.0.1"):
        guard.check_address(address, 80)
    for address in ("169.254.169.254", "::ffff:169.254.169.254", "fe80::1", "0.0.0.0"):
        with pytest.raises(RefusedHostError):
            guard.check_address(address, 80)


def test_the_address_is_checked_when_a_socket_connects_and_only_in_the_guarded_thread():
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = server.getsockname()
        with guarding(Guard(private=False)), pytest.raises(RefusedHostError):
            socket.create_connection(place)
        with guarding(Guard(private=False, trusted=(place,))):
            socket.create_connection(place).close()
        with guarding(Guard(private=False)):
            others = []
            thread = threading.Thread(target=lambda: others.append(socket.create_connection(place)))
            thread.start()
            thread.join()
        others[0].close()


def test_a_name_that_resolves_to_another_address_the_second_time_is_refused(tmp_path, monkeypatch):
    """DNS rebinding: what counts is the address of the connection."""
    real, answers = socket.getaddrinfo, iter(["8.8.8.8"])

    def resolve(host, port, *args, **kwargs):
        if host == "rebind.example":
            host = next(answers, "127.0.0.1")
        return real(host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with online(Site({"a.mp4": b"secret"})) as base:
        port = int(base.rpartition(":")[2])
        assert network._addresses("rebind.example", port) == {ipaddress.ip_address("8.8.8.8")}
        [entry] = fetched(tmp_path, f"http://rebind.example:{port}/a.mp4")
    assert entry.state == "filtered" and SETTING in entry.reason and "127.0.0.1" in entry.reason


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001"])
def test_a_host_of_this_machine_in_a_list_needs_the_setting(tmp_path, stream, host):
    site = Site(stream)
    with online(site) as base:
        url = f"http://{host}:{base.rpartition(':')[2]}/v.mp4"
        [entry] = fetched(tmp_path, url)
        assert not site.asked
        assert entry.state == "filtered" and entry.reason.endswith(SETTING)
        [entry] = fetched(tmp_path, url, allow=True)
    assert entry.state == "ok"


def test_a_cloud_s_metadata_is_never_asked_for(tmp_path):
    entries = fetched(tmp_path, "http://169.254.169.254/latest", allow=True)
    assert entries[0].state == "filtered" and "link-local" in entries[0].reason


def test_a_mirror_of_the_settings_may_be_private_but_its_redirects_may_not(tmp_path, stream):
    inside = Site(stream)
    with online(inside, "127.0.0.2") as private:
        mirror = Site(stream, moved={"moved.mp4": f"{private}/v.mp4", "own.mp4": "/v.mp4"})
        with online(mirror) as base:
            good, same, moved = fetched(
                tmp_path, "demo:v.mp4", "demo:own.mp4", "demo:moved.mp4", base_urls=(base,)
            )
            assert (good.state, same.state) == ("ok", "ok")
            assert moved.state == "filtered" and "127.0.0.2" in moved.reason
            assert moved.reason.endswith(SETTING) and not inside.asked
            assert fetched(tmp_path, "demo:v.mp4", "demo:own.mp4", "demo:moved.mp4",
                           base_urls=(base,), allow=True)[2].state == "ok"  # fmt: skip


@pytest.mark.parametrize("section", ["", "#t=6,8"])
def test_a_segment_of_a_playlist_on_a_private_host_is_refused(tmp_path, stream, section):
    inside = Site(stream)
    with online(inside, "127.0.0.2") as private:
        text = stream["list.m3u8"].decode().replace("list", f"{private}/list")
        public = Site(stream | {"evil.m3u8": text.encode()})
        with online(public) as base:
            urls = (f"{base}/list.m3u8{section}", f"{base}/evil.m3u8{section}")
            good, evil = fetched(tmp_path, *urls, base_urls=(f"{base}/none",))
    assert good.state == "ok"
    assert evil.state == "filtered" and evil.reason.endswith(SETTING)
    assert not inside.asked


@pytest.mark.parametrize(
    "line", ["file:///etc/passwd", "concat:a|b", "ftp://8.8.8.8/a.ts", "gopher://8.8.8.8/a.ts"]
)
@pytest.mark.parametrize("section", ["", "#t=6,8"])
def test_a_playlist_leads_to_no_other_protocol(tmp_path, stream, line, section):
    text = stream["list.m3u8"].decode()
    text = text.replace("list0.ts", line)
    public = Site(stream | {"evil.m3u8": text.encode()})
    with online(public) as base:
        [entry] = fetched(tmp_path, f"{base}/evil.m3u8{section}", base_urls=(f"{base}/none",))
    assert entry.state != "ok"


@pytest.mark.parametrize("section", ["", "#t=1,8"])
def test_a_lost_segment_is_a_failed_download_not_a_shorter_video(tmp_path, stream, section):
    site = Site({name: body for name, body in stream.items() if name != "list1.ts"})
    with online(site) as base:
        [entry] = fetched(tmp_path, f"{base}/list.m3u8{section}", allow=True)
    assert entry.state == "not-found" and entry.reason == "HTTP 404"


@pytest.mark.parametrize("section", ["", "#t=6,8"])
def test_redirects_in_a_circle_end(tmp_path, section):
    site = Site({}, moved={"a.mp4": "/b.mp4", "b.mp4": "/a.mp4"})
    with online(site) as base:
        [entry] = fetched(tmp_path, f"{base}/a.mp4{section}", allow=True)
    assert entry.state != "ok" and len(site.asked) < 200


def test_a_section_s_cookies_reach_their_domain_only_and_no_command_line(tmp_path, stream):
    spy = tmp_path / "ffmpeg"
    spy.write_text(
        f'#!/bin/sh\n(echo "$@"; env) >> {tmp_path}/commands\nexec {find_ffmpeg(None)} "$@"\n'
    )
    spy.chmod(0o755)
    other = Site(stream)
    with ExitStack() as sites:
        elsewhere = sites.enter_context(online(other, "127.0.0.2"))
        text = stream["list.m3u8"].decode().replace("list3", f"{elsewhere}/list3")
        own = Site(stream | {"mixed.m3u8": text.encode()}, moved={"away.mp4": f"{elsewhere}/v.mp4"})
        base = sites.enter_context(online(own))
        (tmp_path / "cookies.txt").write_text(
            "# Netscape HTTP Cookie File\n127.0.0.1\tFALSE\t/\tFALSE\t2147483647\tsid\tS3CRET\n"
        )
        names = ("v.mp4", "mixed.m3u8", "away.mp4")
        entries = fetched(
            tmp_path, *(f"{base}/{name}?token=T0KEN#t=5,9" for name in names), allow=True,
            machine={"cookies": tmp_path / "cookies.txt", "ffmpeg": spy},
        )  # fmt: skip
    assert [entry.state for entry in entries] == ["ok"] * 3
    for path in (tmp_path / "media").glob("*.mp4"):
        assert 3.5 <= probe(path).seconds < 6
    assert {cookie for _, cookie in own.asked} == {"sid=S3CRET"}
    assert {name for name, _ in other.asked} == {"list3.ts", "v.mp4"}
    assert {cookie for _, cookie in other.asked} == {None}
    commands = (tmp_path / "commands").read_text()
    assert "-map" in commands and "S3CRET" not in commands and "T0KEN" not in commands


def test_an_encrypted_playlist_is_fetched_through_the_relay(tmp_path, stream):
    key = bytes(range(16))
    work = tmp_path / "hls"
    work.mkdir()
    (work / "key").write_bytes(key)
    (work / "v.mp4").write_bytes(stream["v.mp4"])
    (work / "info").write_text(f"key\n{work}/key\n")
    subprocess.run(
        [find_ffmpeg(None), "-loglevel", "error", "-i", work / "v.mp4", "-c", "copy", "-f", "hls",
         "-hls_time", "4", "-hls_key_info_file", work / "info", "-hls_list_size", "0",
         work / "e.m3u8"],
        check=True,
    )  # fmt: skip
    site = Site({path.name: path.read_bytes() for path in work.iterdir()})
    with online(site) as base:
        entries = fetched(tmp_path, f"{base}/e.m3u8", f"{base}/e.m3u8#t=5,9", allow=True)
    assert [entry.state for entry in entries] == ["ok", "ok"]
    assert abs(entries[0].seconds - 12) < 0.5 and entries[1].seconds < 6


def test_a_request_by_a_proxy_is_checked_by_the_name_it_asks_for(tmp_path, stream):
    proxy = Site({})
    with online(proxy) as base:
        (tmp_path / "proxy").write_text(base)
        entries = fetched(
            tmp_path, "http://10.0.0.1/a.mp4", "http://169.254.169.254/a.mp4",
            "https://192.168.0.1/a.mp4", "http://8.8.8.8/a.mp4",
            machine={"proxy": Path(tmp_path / "proxy")},
        )  # fmt: skip
    assert [entry.state for entry in entries] == ["filtered"] * 3 + ["not-found"]
    assert len(proxy.asked) == 1


class BadSite(Site):
    """Sends a body in a wrong way, named before the first dash of the file's name."""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.removeprefix("/")
        self.asked.append((name, None))
        how, _, file = name.partition("-")
        if how == "busy":
            request.send_error(503)
            return
        body = self.files[file]
        span = request.headers.get("Range")
        first = int(span.removeprefix("bytes=").split("-")[0]) if span else 0
        request.send_response(206 if span else 200)
        request.send_header("Content-Type", "text/html" if how == "html" else "video/mp4")
        if span:
            request.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        if how != "endless":
            request.send_header("Content-Length", str(len(body) - first))
        request.end_headers()
        request.wfile.write(body[first : len(body) // 8] if how == "cut" else body[first:])
        while how == "endless":
            request.wfile.write(bytes(2**16))


@pytest.mark.parametrize(
    ("name", "section", "state"),
    [
        ("cut-v.mp4", "", "network"),
        ("cut-v.mp4", "#t=9,11", "network"),
        ("busy-v.mp4", "", "rate-limited"),
        ("busy-v.mp4", "#t=9,11", "rate-limited"),
        ("endless-v.mp4", "", "filtered"),
        ("html-v.mp4", "", "ok"),
        ("html-v.mp4", "#t=9,11", "ok"),
    ],
)
def test_a_body_that_is_wrong_ends_in_its_state(
    tmp_path, stream, monkeypatch, name, section, state
):
    monkeypatch.setattr(fetch, "MAX_BYTES", 4 * len(stream["v.mp4"]))
    with online(BadSite(stream)) as base:
        [entry] = fetched(tmp_path, f"{base}/{name}{section}", allow=True)
    assert entry.state == state and bool(entry.reason) == (state != "ok")
    if state not in RETRYABLE:
        assert not any((tmp_path / "media" / ".partial").iterdir())


def test_a_mirror_s_wrong_content_type_does_not_matter(tmp_path, stream):
    with online(BadSite(stream)) as base:
        [entry] = fetched(tmp_path, "demo:html-v.mp4", base_urls=(base,))
    assert entry.state == "ok"
