"""Run ffmpeg on files that nobody trusts: within limits of time, memory and output."""

import contextlib
import os
import re
import resource
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MEMORY = (
    4 * 2**30
)  # bytes; 32 clips of a film of 3840 x 2160 take 0.9 GiB, 7680 x 4320 half of that
LOG_BYTES = 2**20  # of complaints that are read

_SIGNALS = {
    signal.SIGXCPU: "decoding takes too long",
    signal.SIGXFSZ: "what comes out is too large",
    signal.SIGKILL: "ffmpeg was killed, perhaps for want of memory",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may take."""

    seconds: float  # by the clock, and of computing
    file_bytes: int  # of each file that it writes
    memory: int = MEMORY


def run_limited(command: Sequence[str], limits: Limits, *, log: Path) -> str:
    """Run a command; returns what it complains of, empty for a clean run. No shell reads it."""
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
            process_group=0,
        )  # fmt: skip
        _limit(process.pid, limits)
        try:
            code = process.wait(timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return _SIGNALS[signal.SIGXCPU]
        finally:
            _end(process)
    with log.open("rb") as errors:
        lines = errors.read(LOG_BYTES).decode(errors="replace").strip().splitlines()
    if code < 0:
        return _SIGNALS.get(signal.Signals(-code), f"ffmpeg ended by signal {-code}")
    if code and not lines:
        return f"ffmpeg ended with code {code}"
    return _sum_up([line for line in lines if "No space left on device" in line] or lines)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of it, with what it may have started: a wrapper's ffmpeg too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _limit(pid: int, limits: Limits) -> None:
    """Set the limits from outside: nothing of ours runs between fork and exec, threads or not."""
    if not hasattr(resource, "prlimit"):
        return  # not Linux: the clock alone limits
    seconds = int(limits.seconds) + 1
    most = {
        resource.RLIMIT_CPU: (seconds, seconds + 1),  # a signal that names it, then the end
        resource.RLIMIT_DATA: (limits.memory, limits.memory),
        resource.RLIMIT_FSIZE: (limits.file_bytes, limits.file_bytes),
        resource.RLIMIT_CORE: (0, 0),
    }
    with contextlib.suppress(ProcessLookupError):  # it is done already
        for kind, values in most.items():
            resource.prlimit(pid, kind, values)


def _sum_up(lines: Sequence[str]) -> str:
    """The first complaint of each part of ffmpeg, those that read the file before the others.

    The parts run at once: only the order within each is the same every time. Nor are addresses.
    """
    firsts: dict[tuple[bool, str], str] = {}
    for line in lines:
        part = re.match(r"\[([^@\]]*) @ 0x", line)
        name = part[1] if part else "#"
        firsts.setdefault(("#" in name, name), re.sub(r"\[[^\]]*@ 0x[0-9a-f]+\]\s*", "", line))
    said = "; ".join(firsts[name] for name in sorted(firsts))[:200]
    # Nor is their number: ffmpeg reads on for a while beyond the end of what is wanted.
    return f"several complaints: {said}" if len(lines) > 1 else said
