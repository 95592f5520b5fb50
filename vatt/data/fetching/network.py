"""Which addresses a download may reach, and the only way from ffmpeg to the network.

A page, a redirect or a playlist can name any address, also one of this machine or of its network.
A name can resolve to another address from one moment to the next. So each connection is checked
when it is made, with the address that it really goes to: Python reports every socket to an audit
hook, whatever library opens it. ffmpeg opens its own sockets, so it may only talk to a `Relay`.
"""

import http.client
import ipaddress
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit
from urllib.request import getproxies

from fsspec.asyn import get_loop
from yt_dlp.networking import Request, Response
from yt_dlp.networking.exceptions import HTTPError, RequestError

from vatt.errors import redact

SETTING = "data.allow_private_hosts"
LONGEST_PLAYLIST = 2**24  # bytes
BLOCK = 2**16
STREAMED = "a live or encrypted stream, which only ffmpeg can fetch"

Place = tuple[str, int]  # host and port
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
_TRANSLATED = tuple(map(ipaddress.IPv6Network, ("::/96", "64:ff9b::/96")))


class RefusedHostError(OSError):
    """A connection that the settings forbid."""


@dataclass(slots=True)
class Guard:
    """What one download may reach; `refused` is the last thing that it may not."""

    private: bool  # data.allow_private_hosts
    trusted: tuple[Place, ...] = ()  # named in the settings: mirrors and the proxy
    proxied: bool = False
    refused: str = ""

    def check_address(self, host: str, port: int) -> None:
        """Refuse a connection to a private address."""
        found = _addresses(host, port)
        why = next(filter(None, (_why_refused(one, private=self.private) for one in found)), None)
        if why is None:
            return
        for trusted, its_port in self.trusted:
            if port == its_port and found <= _addresses(trusted, port):
                return
        self.refuse(f"{host} is {why}")

    def check_request(self, data: Any) -> None:
        """Refuse a request to a private host by a proxy, which would connect in our place."""
        if not self.proxied or not isinstance(data, bytes):
            return
        said = re.match(rb"CONNECT (\S+)", data) or re.search(rb"(?im)^host:[ \t]*(\S+)", data)
        if said:
            place = urlsplit(f"//{said[1].decode('latin-1')}")
            self.check_address(place.hostname or "", place.port or 80)

    def check_program(self, arguments: Any) -> None:
        """Refuse a program with an address: it would connect unchecked, with cookies in `ps`."""
        words = [arguments] if isinstance(arguments, (str, bytes)) else arguments or ()
        if any(re.match(r"(?!file:)[a-z0-9]+://", os.fsdecode(word)) for word in words):
            self.refuse(STREAMED)

    def refuse(self, what: str) -> None:
        """Note it and stop whoever asked."""
        self.refused = redact(what)
        raise RefusedHostError(self.refused)


def _addresses(host: str, port: int) -> set[IPAddress]:
    """The addresses of a host; none where only a proxy can resolve its name."""
    try:
        return {ipaddress.ip_address(host.partition("%")[0])}
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return set()
    return {ipaddress.ip_address(str(place[0]).partition("%")[0]) for *_, place in found}


def _why_refused(address: IPAddress, *, private: bool) -> str | None:
    """Why an address may not be reached; None where it may."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and int(address) > 1 and any(address in n for n in _TRANSLATED):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return _why_refused(inner, private=private)
        local = address.is_site_local
    else:
        local = False
    if address.is_link_local:  # where clouds keep the passwords of their machines
        return f"a link-local address, refused even with {SETTING}"
    if address.is_multicast or address.is_unspecified:
        return f"not the address of one host, refused even with {SETTING}"
    if (local or not address.is_global) and not private:
        return f"a private address: {SETTING}"
    return None


_local = threading.local()


@contextmanager
def guarding(guard: Guard) -> Iterator[None]:
    """Check all connections that this thread makes in the body."""
    _install_hook()
    _local.guard = guard
    try:
        yield
    finally:
        _local.guard = None


_named = Guard(private=False)


def guard_address(address: str) -> Guard:
    """Check all connections that fsspec makes in this process, now and later.

    Reached are public hosts and those of addresses that a person gave here: an address of the
    settings may be private, what it redirects to may not. Buckets have servers of their own.
    """
    place = place_of(address)
    if urlsplit(address).scheme in ("http", "https") and place is not None:
        if place not in _named.trusted:
            _named.trusted += (place,)
        _install_hook()
        ready = threading.Event()

        def begin() -> None:
            _local.guard = _named
            ready.set()

        get_loop().call_soon_threadsafe(begin)  # all connections of fsspec are made in its thread
        ready.wait()
    return _named


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in _EVENTS:
        return
    guard: Guard | None = getattr(_local, "guard", None)
    if guard is None:
        return
    if event == "socket.connect":
        if isinstance(arguments[1], tuple):
            guard.check_address(*arguments[1][:2])
    elif event == "http.client.send":
        guard.check_request(arguments[1])
    elif event == "subprocess.Popen":
        guard.check_program(arguments[1])
    else:
        guard.refuse("an address of ftp: only http and https are fetched")


_EVENTS = frozenset({"socket.connect", "http.client.send", "subprocess.Popen", "ftplib.connect"})
_hook_lock = threading.Lock()
_hooks: list[Callable[[str, tuple[Any, ...]], None]] = []


def _install_hook() -> None:
    """Once in a process: a hook cannot be taken away."""
    with _hook_lock:
        if not _hooks:
            sys.addaudithook(_audit)
            _hooks.append(_audit)


def proxies_of(proxy: str | None) -> tuple[Place, ...]:
    """Where the proxies listen: the one of the settings, or those of the environment."""
    named = [proxy] if proxy is not None else list(getproxies().values())
    return tuple(place for name in named if name and (place := place_of(name)))


def place_of(address: str) -> Place | None:
    """Host and port of an address; None where it has none."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        port = parts.port or {"https": 443, "socks5": 1080, "socks5h": 1080}.get(parts.scheme, 80)
        return (parts.hostname, port) if parts.hostname else None
    except ValueError:
        return None


@dataclass(slots=True)
class Relay:
    """A server on this machine for one ffmpeg: it fetches what ffmpeg may see, and nothing else.

    Cookies, headers and addresses stay out of ffmpeg's command line, which every user can read,
    and yt-dlp's own rules keep each cookie to its domain, through redirects and segments.
    Playlists are rewritten, so that their segments come through here too.
    """

    urlopen: Callable[[Request], Response]
    guard: Guard
    max_bytes: int
    errors: list[Exception] = field(default_factory=list)
    _addresses: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    _numbers: dict[str, int] = field(default_factory=dict)
    _base: str = ""
    _sent: int = 0

    @contextmanager
    def serving(self) -> Iterator["Relay"]:
        """Listen on a free port for the body."""

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:  # noqa: N805 - `self` is the relay
                with guarding(self.guard):
                    self._answer(handler)

            def log_message(handler, *_: Any) -> None:  # noqa: N805
                """Nothing: the ledger says what happened."""

        class Server(ThreadingHTTPServer):
            daemon_threads, block_on_close = True, False

            def handle_error(self, request: Any, client_address: Any) -> None:
                """ffmpeg has read enough and hung up."""

        with Server(("127.0.0.1", 0), Handler) as server:
            self._base = f"http://127.0.0.1:{server.server_port}"
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            try:
                yield self
            finally:
                server.shutdown()

    @property
    def environment(self) -> dict[str, str]:
        """For ffmpeg: all its requests come here, whatever a file or playlist names."""
        kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        return {**kept, "http_proxy": self._base}

    def path_to(self, address: str, headers: dict[str, str]) -> str:
        """What ffmpeg asks for to get an address."""
        if address not in self._numbers:
            self._numbers[address] = len(self._addresses)
            self._addresses.append((address, headers))
        name = PurePosixPath(unquote(urlsplit(address).path)).name or "file"
        return f"{self._base}/{self._numbers[address]}/{quote(name)}"

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        known = re.fullmatch(re.escape(self._base) + r"/(\d+)/.*", handler.path)
        if known is None or int(known[1]) >= len(self._addresses):
            try:
                self.guard.refuse("an address inside a file")
            except RefusedHostError as error:
                self.errors.append(error)
            handler.send_error(403)
            return
        address, headers = self._addresses[int(known[1])]
        asked = {**headers, "Accept-Encoding": "identity"}
        if span := handler.headers.get("Range"):
            asked["Range"] = span
        try:
            if urlsplit(address).scheme not in ("http", "https"):
                self.guard.refuse(f"an address that is not http or https: {address[:80]}")
            answer = self.urlopen(Request(address, headers=asked))
        except (RequestError, OSError, http.client.HTTPException, ValueError) as error:
            handler.send_error(error.status if isinstance(error, HTTPError) else 502)
            # a server that counts the bytes of a file otherwise: ffmpeg asks past the end
            if not (isinstance(error, HTTPError) and error.status == 416):
                self.errors.append(error)
            return
        with answer:
            try:
                self._pass_on(answer, handler, headers)
            except ValueError as error:
                self.errors.append(RequestError(f"an address in a playlist is wrong: {error}"))
                raise

    def _pass_on(
        self, answer: Response, handler: BaseHTTPRequestHandler, headers: dict[str, str]
    ) -> None:
        head = self._read(answer, BLOCK)
        if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"#EXTM3U"):
            while len(head) < LONGEST_PLAYLIST and (more := self._read(answer, BLOCK)):
                head += more
            head = self._rewritten(head, answer.url, headers)
            handler.send_response(200)
            handler.send_header("Content-Type", "application/vnd.apple.mpegurl")
            handler.send_header("Content-Length", str(len(head)))
        else:
            handler.send_response(answer.status)
            for name in ("Content-Type", "Content-Length", "Content-Range", "Accept-Ranges"):
                if name in answer.headers and "Content-Encoding" not in answer.headers:
                    handler.send_header(name, answer.headers[name])
        handler.end_headers()
        while head:
            handler.wfile.write(head)
            head = self._read(answer, BLOCK)

    def _read(self, answer: Response, size: int) -> bytes:
        try:
            block = answer.read(size)
        except (RequestError, OSError, http.client.HTTPException) as error:
            self.errors.append(error)
            raise
        self._sent += len(block)
        if self._sent > self.max_bytes:
            self.errors.append(RequestError(f"more than {self.max_bytes} bytes"))
            raise self.errors[-1]
        return block

    def _rewritten(self, playlist: bytes, base: str, headers: dict[str, str]) -> bytes:
        """A playlist (HLS) whose addresses lead here."""

        def here(address: str) -> str:
            return self.path_to(urljoin(base, address), headers)

        lines = []
        for line in playlist.decode("utf-8-sig", "replace").splitlines():
            if line.startswith("#"):
                line = re.sub(r'URI="([^"]*)"', lambda found: f'URI="{here(found[1])}"', line)
            elif line.strip():
                line = here(line.strip())
            lines.append(line)
        return "\n".join(lines).encode() + b"\n"
