"""A part of a video that yt-dlp finds: its streams are copied from the nearest key frame on.

The mp4's edit list hides what lies before the part, so the file begins where the part does, as
exactly as if it had been encoded anew.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import yt_dlp
from yt_dlp.utils import DownloadError

Section = tuple[float, float]  # from, to, in seconds of the video
_PROTOCOLS = "http,https,httpproxy,tls,tcp,crypto"


def download_section(
    tool: yt_dlp.YoutubeDL,
    address: str,
    section: Section,
    path: Path,
    *,
    program: str,
    seconds: float,
    silence: float,
    max_bytes: int,
) -> dict[str, Any]:
    """Find the streams of a page and copy a part of them into a file."""
    found = tool.extract_info(address, download=False)
    streams = found.get("requested_formats") or [found]
    start, end = section
    command = [program, "-nostdin", "-hide_banner", "-loglevel", "error", "-y"]
    for stream in streams:
        command += _input(tool, stream, silence)
        command += ["-ss", str(start), "-t", str(end - start), "-i", stream["url"]]
    for number in range(len(streams)):
        command += ["-map", f"{number}:v?", "-map", f"{number}:a?"]
    partial = path.with_suffix(".section")
    command += ["-c", "copy", "-sn", "-dn", "-fs", str(max_bytes), "-f", "mp4", f"file:{partial}"]
    proxy = tool.params.get("proxy")
    environment = {**os.environ, **({"http_proxy": proxy} if proxy else {})}
    if proxy == "":
        environment["no_proxy"] = "*"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds,
            check=False, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        partial.unlink(missing_ok=True)
        raise DownloadError("timed out: too slow") from None
    if done.returncode != 0:
        partial.unlink(missing_ok=True)
        raise DownloadError(f"Got error: {done.stderr.strip() or 'ffmpeg failed'}")
    partial.replace(path)
    return {"requested_downloads": [{"filepath": str(path)}]}


def _input(tool: yt_dlp.YoutubeDL, stream: dict[str, Any], silence: float) -> list[str]:
    """Who asks, and what may be answered."""
    headers = dict(stream.get("http_headers") or {})
    cookies = tool.cookiejar.get_cookie_header(stream["url"])
    if cookies:
        headers["Cookie"] = cookies
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    options = ["-protocol_whitelist", _PROTOCOLS, "-rw_timeout", str(int(silence * 1e6))]
    return [*options, *(["-headers", lines] if lines else [])]
