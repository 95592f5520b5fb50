"""Download against a server that behaves as servers do."""

import io
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from yt_dlp import YoutubeDL
from yt_dlp.networking import Response
from yt_dlp.networking.exceptions import HTTPError
from yt_dlp.utils import DownloadError

from tests.data.corpus import demo_params, make_clip, write_media
from vatt.data.clips.ledger import JOURNAL, missing_media, read_ledger, restore
from vatt.data.clips.media import find_ffmpeg, probe
from vatt.data.clips.storage import decode_frames, whole
from vatt.data.fetching import download as download_module
from vatt.data.fetching import fetch
from vatt.data.fetching.download import addresses_of, download
from vatt.data.fetching.fetch import Hosts, download_section, explain
from vatt.data.fetching.network import Guard
from vatt.data.sharding.cut import Cut, cut
from vatt.errors import DataError, MachineError


class Server:
    """Serves one video under any name; a name says how: fail-503-2-x fails twice, cut-x once."""

    def __init__(self, media: bytes) -> None:
        self.media = media
        self.asked: list[tuple[str, str | None]] = []  # path and Range
        self.begun: list[float] = []  # when
        self.spans: dict[str, list[list[int]]] = {}  # from where to where a body was sent
        self.sent = 0
        self.pause = 0.0  # seconds between two pieces of a body
        self.at_once = self.most_at_once = 0

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.at_once += 1
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.most_at_once = max(self.at_once, self.most_at_once)
        self.begun.append(time.monotonic())
        self.serve(request)

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.removeprefix("/")
        span = request.headers.get("Range")
        times = sum(path == name for path, _ in self.asked)
        self.asked.append((name, span))
        kind, *rest = name.removesuffix(".mp4").split("-")
        if kind == "endless":
            self.stream(request)
            return
        if kind == "fail" and times < int(rest[1]):
            request.send_error(int(rest[0]))
            return
        if kind == "wait" and times == 0:
            request.send_response(429)
            request.send_header("Retry-After", rest[0])
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        body = b"<html>no video here</html>" if kind == "page" else self.media
        first = int(span.removeprefix("bytes=").split("-")[0]) if span else 0
        request.send_response(206 if span else 200)
        request.send_header("Content-Type", "text/html" if kind == "page" else "video/mp4")
        request.send_header("Content-Length", str(len(body) - first))
        if span:
            request.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        request.end_headers()
        until = len(body) // 2 if kind in ("cut", "stall") and times == 0 else len(body)
        span = [first, first]
        self.spans.setdefault(name, []).append(span)
        for start in range(first, until, 4096):
            piece = body[start : min(start + 4096, until)]
            self.at_once -= start + 4096 >= until  # before the other side can ask again
            request.wfile.write(piece)
            self.sent += len(piece)
            span[1] += len(piece)
            time.sleep(self.pause)
        if until < len(body) and kind == "stall":
            time.sleep(1.5)

    def stream(self, request: BaseHTTPRequestHandler) -> None:
        """A body without length and end."""
        request.send_response(200)
        request.send_header("Content-Type", "video/mp4")
        request.end_headers()
        while True:
            request.wfile.write(bytes(8192))
            time.sleep(self.pause)


@contextmanager
def serving(server: Server):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.answer(self)

        def log_message(self, *args):
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            pass

    with Quiet(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("media") / "a.mp4"
    write_media(path)
    return path.read_bytes()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(fetch, "PAUSES", (0.01, 0.01, 0.01))


def long(media: bytes, *, size: int = 2**18) -> bytes:
    """The same video with a box behind it that players pass over."""
    rest = size - len(media)
    return media + rest.to_bytes(4, "big") + b"free" + bytes(rest - 8)


def clip(number: int, name: str):
    return replace(make_clip(number), url=f"demo:{name}.mp4")


def run(tmp_path, clips, base: str | None, *, workers=0, manners=None, **data):
    params = demo_params(base_urls=(base,) if base else (), **data)
    update = {"workers": workers}
    if manners:
        update["download"] = params.machine.download.model_copy(update=manners)
    machine = params.machine.model_copy(update=update)
    return download(
        clips, params.data, machine, media=tmp_path / "media", ledger=tmp_path / "ledger.jsonl"
    )


def test_every_answer_ends_in_its_state(tmp_path, media):
    names = {
        "a": "ok", "a b#%1": "ok", "fail-503-2": "ok", "fail-500-3": "ok", "cut": "ok",
        "fail-404-9": "not-found", "fail-410-9": "removed", "fail-403-9": "needs-login",
        "fail-429-9": "rate-limited", "fail-503-9": "rate-limited", "fail-502-9": "network",
        "fail-451-9": "geo", "page": "corrupt",
    }  # fmt: skip
    clips = [clip(number, name) for number, name in enumerate(names)]
    seen = []
    with serving(Server(media)) as base:
        params = demo_params(base_urls=(base,))
        counts = download(
            clips, params.data, params.machine, media=tmp_path / "media",
            ledger=tmp_path / "ledger.jsonl", progress=lambda *done: seen.append(done),
        )  # fmt: skip
    ledger = read_ledger(tmp_path / "ledger.jsonl")
    assert {c.url[5:-4]: ledger[c.clip_id].state for c in clips} == names
    assert sum(counts.values()) == len(clips) and seen[-1] == (13, 13)
    whole = [c for c in clips if ledger[c.clip_id].state == "ok"]
    for one in whole:
        assert (tmp_path / "media" / one.media_name).read_bytes() == media
        entry = ledger[one.clip_id]
        assert entry.has == ("video", "audio") and abs(entry.seconds - 1.0) < 0.01
    assert ledger[clips[5].clip_id].reason == "HTTP 404"


def test_a_second_run_asks_only_for_what_can_be_tried_again(tmp_path, media):
    clips = [clip(0, "a"), clip(1, "fail-404-9"), clip(2, "fail-503-6")]
    server = Server(media)
    with serving(server) as base:
        assert run(tmp_path, clips, base) == {"ok": 1, "rate-limited": 1, "not-found": 1}
        first, asked = (tmp_path / "ledger.jsonl").read_bytes(), len(server.asked)
        assert run(tmp_path, clips, base) == {"ok": 2, "not-found": 1}
        assert {path for path, _ in server.asked[asked:]} == {"fail-503-6.mp4"}
        second, asked = (tmp_path / "ledger.jsonl").read_bytes(), len(server.asked)
        assert run(tmp_path, clips, base) == {"ok": 2, "not-found": 1}
        assert len(server.asked) == asked
        assert (tmp_path / "ledger.jsonl").read_bytes() == second != first


def test_media_that_was_deleted_is_fetched_again(tmp_path, media):
    clips = [clip(0, "a"), clip(1, "b")]
    with serving(Server(media)) as base:
        run(tmp_path, clips, base)
        (tmp_path / "media" / clips[0].media_name).unlink()
        run(tmp_path, clips, base)
    assert (tmp_path / "media" / clips[0].media_name).read_bytes() == media


def test_lost_media_and_journal_are_fetched_again_but_nothing_that_was_never_there(tmp_path, media):
    clips = [clip(0, "a"), clip(1, "fail-404-9"), clip(2, "b"), replace(clip(3, "b"), end=0.5)]
    ledger, server = tmp_path / "ledger.jsonl", Server(media)
    with serving(server) as base:
        run(tmp_path, clips, base)
        before = ledger.read_bytes()
        shutil.rmtree(tmp_path / "media")
        data = demo_params().data
        lost = missing_media(clips, read_ledger(ledger), data, tmp_path / "media")
        assert lost == sorted({tmp_path / "media" / clips[k].media_name for k in (0, 2)})
        restore(tmp_path / "media" / JOURNAL, ledger)
        server.asked.clear()
        ledger.unlink()  # DVC deletes it before it runs the stage
        assert run(tmp_path, clips, base) == {"ok": 3, "not-found": 1}
    assert sorted(path for path, _ in server.asked) == ["a.mp4", "b.mp4"]
    assert ledger.read_bytes() == before
    assert missing_media(clips, read_ledger(ledger), data, tmp_path / "media") == []


def test_clips_of_one_file_share_one_download(tmp_path, media):
    clips = [replace(clip(0, "a"), clip_id=f"clip-{k}", start=k / 10, end=1.0) for k in range(5)]
    server = Server(media)
    with serving(server) as base:
        assert run(tmp_path, clips, base) == {"ok": 5}
    assert len(server.asked) == 1


def test_a_body_that_never_ends_is_cut_off(tmp_path, media, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_BYTES", 10**6)
    clips = [clip(0, "a"), clip(1, "endless")]
    with serving(Server(media)) as base:
        assert run(tmp_path, clips, base) == {"ok": 1, "filtered": 1}
    assert not any((tmp_path / "media" / ".partial").iterdir())


def test_a_body_that_drips_is_given_up(tmp_path, media, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_SECONDS", 0.5)
    server = Server(media)
    server.pause = 0.05
    with serving(server) as base:
        assert run(tmp_path, [clip(0, "a"), clip(1, "endless")], base) == {"ok": 1, "network": 1}


def test_a_body_that_stalls_is_continued_where_it_stopped(tmp_path, media, monkeypatch):
    monkeypatch.setattr(fetch, "SILENCE", 0.4)
    server = Server(long(media))
    with serving(server) as base:
        assert run(tmp_path, [clip(0, "stall")], base) == {"ok": 1}
    assert server.spans["stall.mp4"][1][0] > 0
    assert (tmp_path / "media" / clip(0, "stall").media_name).read_bytes() == server.media


def test_a_server_that_asks_to_wait_is_left_alone_so_long(tmp_path, media):
    server = Server(media)
    with serving(server) as base:
        clips = [clip(0, "wait-1"), *(clip(number, f"{number}") for number in range(1, 12))]
        assert run(tmp_path, clips, base, manners={"per_host": 1}) == {"ok": 12}
    gaps = [after - before for before, after in pairwise(server.begun)]
    assert max(gaps) > 0.95


def test_no_more_files_at_once_than_a_host_may_be_asked_for(tmp_path, media):
    server = Server(media)
    server.pause = 0.02
    with serving(server) as base:
        clips = [clip(number, str(number)) for number in range(24)]
        manners = {"per_host": 2}
        assert run(tmp_path, clips, base, workers=2, manners=manners) == {"ok": 24}
    assert server.most_at_once == 2


def test_a_host_that_refuses_everything_is_not_asked_on_and_on(tmp_path, media, monkeypatch):
    monkeypatch.setattr(download_module, "HOST_REFUSES", 4)
    server = Server(media)
    with serving(server) as base:
        clips = [clip(0, "a"), *(clip(number, f"fail-429-9-{number}") for number in range(1, 60))]
        assert run(tmp_path, clips, base) == {"ok": 1, "rate-limited": 59}
    assert len({path for path, _ in server.asked}) < 20
    reasons = {entry.reason for entry in read_ledger(tmp_path / "ledger.jsonl").values()}
    assert any("not tried" in reason and "refused 4 files" in reason for reason in reasons)


def test_the_folder_grows_no_larger_than_it_may(tmp_path, media):
    clips = [clip(number, str(number)) for number in range(24)]
    allowed = {"max_gb": 6 * len(media) / 1e9}
    with serving(Server(media)) as base:
        with pytest.raises(MachineError, match=r"machine\.download\.max_gb"):
            run(tmp_path, clips, base, manners=allowed)
        came = [path for path in (tmp_path / "media").iterdir() if len(path.name) == 24]
        assert 6 < len(came) < 20
        assert run(tmp_path, clips, base) == {"ok": 24}


def test_only_the_listed_part_of_a_video_is_fetched(tmp_path):
    """Frame k of the source is of grey level 2 k; the part begins between two key frames."""
    write_media(tmp_path / "long.mp4", seconds=12, step=2, gop=50)
    server = Server((tmp_path / "long.mp4").read_bytes())
    with serving(server) as base:
        part = replace(make_clip(0), url=f"{base}/v.mp4#t=6.5,8.5", start=0.0, end=2.0)
        assert run(tmp_path, [part], None) == {"ok": 1}
        entry = read_ledger(tmp_path / "ledger.jsonl")[part.clip_id]
        gone = replace(make_clip(1), url=f"{base}/fail-404-99.mp4#t=6.5,8.5")
        assert run(tmp_path, [part, gone], None) == {"ok": 1, "not-found": 1}
    assert entry.has == ("video", "audio") and 2.0 <= entry.seconds < 3.0
    item = tmp_path / "media" / part.media_name
    [piece] = cut(
        [Cut(item, probe(item), ((0.0, 2.0),))],
        demo_params().preprocess.model_copy(update={"short_side": 32}),
        program=find_ffmpeg(None),
        work=tmp_path,
    )[0].pieces
    [video] = piece.video
    frames = whole(decode_frames(video, range(piece.num_frames), fps=10), piece.num_frames)
    shown = frames.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(shown[[0, 5, 19]], [130, 140, 168], atol=3)


class FoundApart(YoutubeDL):
    """A yt-dlp that finds picture and sound as two streams on a page."""

    def __init__(self, *addresses: str) -> None:
        super().__init__({"quiet": True, "proxy": ""})
        headers = {"User-Agent": "x"}
        self.streams = [{"url": address, "http_headers": headers} for address in addresses]

    def extract_info(self, address: str, *, download: bool) -> dict:
        assert not download
        return {"requested_formats": self.streams}


def test_a_part_of_two_streams_becomes_one_file(tmp_path):
    write_media(tmp_path / "v.mp4", seconds=12, gop=50, sound=False)
    write_media(tmp_path / "a.mp4", seconds=12, gop=50)
    picture, both = (Server((tmp_path / name).read_bytes()) for name in ("v.mp4", "a.mp4"))
    with serving(picture) as first, serving(both) as second:
        tool, guard = FoundApart(f"{first}/v.mp4", f"{second}/a.mp4"), Guard(private=True)
        program, path = find_ffmpeg(None), tmp_path / "part.mp4"
        download_section(tool, "page", (6.0, 8.0), path, program=program, guard=guard)
    media = probe(tmp_path / "part.mp4")
    assert media.video is not None and media.audio is not None and 2.0 <= media.seconds < 3.0


def test_a_part_of_a_video_that_drips_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_SECONDS", 0.5)
    write_media(tmp_path / "long.mp4", seconds=12, gop=50)
    server = Server((tmp_path / "long.mp4").read_bytes())
    with serving(server) as base:
        good = replace(make_clip(0), url=f"{base}/v.mp4")
        assert run(tmp_path, [good], None) == {"ok": 1}
        server.pause = 0.3
        part = replace(make_clip(1), url=f"{base}/w.mp4#t=6,8", start=0.0, end=2.0)
        assert run(tmp_path, [good, part], None) == {"ok": 1, "network": 1}
    assert not any((tmp_path / "media" / ".partial").iterdir())


def test_a_web_page_without_a_video_is_no_media(tmp_path, media):
    with serving(Server(media)) as base:
        clips = [
            replace(make_clip(k), url=f"{base}/{name}") for k, name in enumerate(("a", "page"))
        ]
        assert run(tmp_path, clips, None) == {"ok": 1, "corrupt": 1}


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ("Private video. Sign in if you've been granted access to this video", "private"),
        ("Video unavailable. This video has been removed by the uploader", "removed"),
        ("Video unavailable. This video is no longer available because the YouTube account "
         "associated with this video has been terminated.", "removed"),
        ("Video unavailable", "rate-limited"),
        ("Video unavailable. This content isn't available, try again later. The current session "
         "has been rate-limited by YouTube for up to an hour.", "rate-limited"),
        ("Sign in to confirm you’re not a bot", "rate-limited"),
        ("Sign in to confirm your age. This video may be inappropriate for some users.", "age"),
        ("The uploader has not made this video available in your country", "geo"),
        ("Join this channel to get access to members-only content", "needs-login"),
        ("File is larger than max-filesize (10 bytes > 5 bytes). Aborting.", "filtered"),
        ("HTTP Error 429: Too Many Requests", "rate-limited"),
        ("unable to download video data: HTTP Error 503: Service Unavailable", "rate-limited"),
        ("HTTP error 404 Not Found", "not-found"),
        ("Something new", "network"),
    ],
)  # fmt: skip
def test_what_a_site_says_decides_the_state(said, state):
    assert explain(DownloadError(f"ERROR: [youtube] abc: {said}")).state == state


@pytest.mark.parametrize(
    ("host", "state"),
    [("rr3---sn-x.googlevideo.com", "rate-limited"), ("notgooglevideo.com", "needs-login")],
)
def test_a_403_of_youtubes_streams_is_throttling(host, state):
    answer = Response(io.BytesIO(), f"https://{host}/videoplayback?x=1", {}, status=403)
    try:
        raise HTTPError(answer)
    except HTTPError as error:
        seen = DownloadError(f"ERROR: {error}", sys.exc_info())
    assert explain(seen).state == state


@pytest.mark.parametrize(
    ("heights", "wanted", "chosen"),
    [((144, 360, 720), 360, 360), ((144, 240, 720), 360, 240), ((480, 1080), 360, 480)],
)
def test_the_stream_of_the_wanted_size_is_taken(tmp_path, heights, wanted, chosen):
    fetching = fetch.Fetching(
        tmp_path, "ffmpeg", False, wanted, None, None, 1, Hosts(tmp_path, 1, 0.0), None
    )
    tool = fetch._youtube_dl(tmp_path, "a", fetching, direct=False)
    tool.params["format_sort"] = [f"res:{wanted}"]
    formats = [
        {"format_id": str(h), "url": f"http://host/{h}", "height": h, "width": 2 * h, "ext": "mp4",
         "vcodec": "h264", "acodec": "aac"}
        for h in heights
    ]  # fmt: skip
    found = {"id": "a", "title": "a", "formats": formats, "extractor": "x", "webpage_url": "x"}
    assert tool.process_ie_result(found, download=False)["height"] == chosen


def test_the_proxy_stands_in_a_file(tmp_path):
    (tmp_path / "p").write_text("http://me:secret@proxy:3128\n")
    assert download_module._proxy_in(tmp_path / "p") == "http://me:secret@proxy:3128"
    with pytest.raises(MachineError, match=r"machine\.proxy"):
        download_module._proxy_in(tmp_path / "none")


def test_mirrors_are_asked_in_order_and_the_source_last(tmp_path, media):
    server = Server(media)
    with serving(server) as base:
        params = demo_params(base_urls=(f"{base}/fail-404-9-", base + "/"))
        away = replace(make_clip(0), url=f"{base}/fail-404-1-source.mp4")
        machine = params.machine
        counts = download(
            [away], params.data, machine, media=tmp_path / "media", ledger=tmp_path / "ledger.jsonl"
        )
    assert counts == {"ok": 1}
    assert [path for path, _ in server.asked][-2:] == ["fail-404-1-source.mp4"] * 2


def test_what_one_mirror_began_another_does_not_end(tmp_path, media):
    one, folder = clip(0, "a"), tmp_path / "media" / ".partial"
    folder.mkdir(parents=True)
    begun = fetch.part_name(one.media_name, "http://another.example.org/a.mp4")
    (folder / f"{begun}.mp4.part").write_bytes(bytes(100_000))
    with serving(Server(long(media))) as base:
        assert run(tmp_path, [one], base) == {"ok": 1}
    assert (tmp_path / "media" / one.media_name).read_bytes() == long(media)
    assert not any(folder.iterdir())


def test_youtube_only_when_allowed_but_mirrors_always():
    url = "https://www.youtube.com/watch?v=abc_-123"
    closed = demo_params(base_urls=("http://mirror/x",)).data
    assert addresses_of(url, closed) == (("http://mirror/x/abc_-123.mp4",), None)
    allowed = closed.model_copy(update={"allow_youtube": True, "base_urls": ()})
    assert addresses_of(url, allowed) == ((), url)
    webm = closed.model_copy(update={"base_urls": ("http://m/{id}.webm?x=1",)})
    assert addresses_of(url, webm) == (("http://m/abc_-123.webm?x=1",), None)
    part = addresses_of(url + "#t=30,40", allowed.model_copy(update={"base_urls": ("http://m",)}))
    assert part == (("http://m/abc_-123_000030_000040.mp4",), url)
    with pytest.raises(DataError, match=r"data\.base_urls"):
        addresses_of("demo:a.mp4", demo_params(base_urls=()).data)


def test_a_youtube_clip_that_is_not_allowed_is_left_out_with_the_reason(tmp_path, media):
    clips = [clip(0, "a"), replace(make_clip(1), url="https://youtu.be/abc")]
    with serving(Server(media)) as base:
        params = demo_params(base_urls=())
        clips[0] = replace(clips[0], url=f"{base}/a.mp4")
        download(
            clips,
            params.data,
            params.machine,
            media=tmp_path / "media",
            ledger=tmp_path / "l.jsonl",
        )
    entry = read_ledger(tmp_path / "l.jsonl")["clip-001"]
    assert entry.state == "filtered" and "allow_youtube" in entry.reason


def test_no_network_is_one_clear_error(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refused at once
        base = f"http://127.0.0.1:{taken.getsockname()[1]}"
        begun = time.monotonic()
        with pytest.raises(MachineError, match="nothing could be fetched") as caught:
            run(tmp_path, [clip(number, str(number)) for number in range(200)], base)
    assert caught.value.exit_code == 4
    assert time.monotonic() - begun < 20
    assert len(read_ledger(tmp_path / "ledger.jsonl")) == 200


def test_no_clip_left_or_too_few_stop_the_pipeline(tmp_path, media):
    with serving(Server(media)) as base:
        with pytest.raises(DataError, match=r"no clip is left after download \(1 not-found\)"):
            run(tmp_path, [clip(0, "fail-404-9")], base)
        with pytest.raises(DataError, match=r"data\.min_share requires 80%"):
            run(tmp_path, [clip(0, "fail-404-9"), clip(1, "a")], base, min_share=0.8)


def test_a_full_disk_is_the_machines_fault(tmp_path, media):
    one = clip(0, "a")
    partial = tmp_path / "media" / ".partial"
    partial.mkdir(parents=True)
    with serving(Server(media)) as base, pytest.raises(MachineError, match="disk") as caught:
        part = fetch.part_name(one.media_name, f"{base}/a.mp4")
        (partial / f"{part}.mp4.part").symlink_to("/dev/full")
        run(tmp_path, [one], base)
    assert caught.value.exit_code == 4


KILLED = """
import sys
from pathlib import Path
from tests.data.fetching.test_download import clip, run
run(Path(sys.argv[1]), [clip(n, str(n)) for n in range(12)], sys.argv[2], workers=int(sys.argv[3]))
"""


def kill_again_and_again(tmp_path, server: Server, *, kills: int, workers: int) -> None:
    """SIGKILL a download at random moments, then let it finish; look at every byte sent."""
    moments = random.Random(0)
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with serving(server) as base:
        for _ in range(kills):
            process = subprocess.Popen([*command, base, str(workers)])
            asked, patience = len(server.asked), time.monotonic() + 20
            while len(server.asked) == asked and time.monotonic() < patience:
                time.sleep(0.01)
            time.sleep(moments.uniform(0.0, 0.5))
            process.send_signal(signal.SIGKILL)
            process.wait()
        server.pause = 0.0
        clips = [clip(number, str(number)) for number in range(12)]
        assert run(tmp_path, clips, base) == {"ok": 12}
    for one in clips:
        assert (tmp_path / "media" / one.media_name).read_bytes() == server.media
    assert not any((tmp_path / "media" / ".partial").iterdir())
    piece, on_the_way = 4096, 2**17  # in the sockets of a client that has no time to read
    for spans in server.spans.values():
        for (_, until), (start, _) in pairwise(spans):
            assert until - start <= fetch.BLOCK + piece + on_the_way


def test_a_kill_loses_nothing_and_fetches_little_twice(tmp_path, media):
    server = Server(long(media, size=2**20))
    server.pause = 0.01
    kill_again_and_again(tmp_path, server, kills=1, workers=2)


@pytest.mark.slow
def test_ten_kills_lose_nothing_and_fetch_no_byte_twice_beyond_a_block(tmp_path, media):
    server = Server(long(media, size=2**20))
    server.pause = 0.01
    kill_again_and_again(tmp_path, server, kills=10, workers=2)
    again = {len(spans) for spans in server.spans.values()}
    assert max(again) > 1


def test_a_partial_file_is_continued_where_it_ends(tmp_path, media):
    server = Server(media)
    one = clip(0, "a")
    folder = tmp_path / "media" / ".partial"
    folder.mkdir(parents=True)
    half = len(media) // 2
    with serving(server) as base:
        part = fetch.part_name(one.media_name, f"{base}/a.mp4")
        (folder / f"{part}.mp4.part").write_bytes(media[:half])
        assert run(tmp_path, [one], base) == {"ok": 1}
    assert server.asked == [("a.mp4", f"bytes={half}-")] and server.sent == len(media) - half
    assert (Path(tmp_path) / "media" / one.media_name).read_bytes() == media
