"""Damage a file a thousand times: its reader reads it or names it, in bounded time and memory.

A `Reader` is a file, good bytes of it (the seed corpus, made here) and the function that reads it.
"""

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from vatt.errors import VattError

SECONDS = float(os.environ.get("VATT_FUZZ_SECONDS", "20"))  # of each reader, in the long form
LOG = os.environ.get("VATT_FUZZ_LOG")  # a file that gets a line for each reader
LONG = 500  # mutations at a time
A_HANG = 10.0  # seconds of computing
MEMORY = 2 * 10**9  # bytes
SPLICES = [
    b"\0", b"\xff", b"\xc3", b'"', b"'", b",", b"\n", b"\r", b"\r\r\n", b"-->", b"00:", b"[", b"{",
    b"}]", b"NaN", b"1e999", b"-1", b"9" * 400, b"\\ud800", b"\xef\xbb\xbf", b"\xff\xfe",
    b"&#x110000;", b"<", b"null", b"true", b"[" * 2000, b"\0\0\0\0", b"\xff\xff\xff\xff",
    b"\xff\xff\xff\x7f", b"\0" * 512, b"&a [*a,*a]", b": ", b"- ", b"1e9", b"{}",
    b"\t", b"9" * 5000,
]  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """What reads a file, and good bytes of that file."""

    file: str
    seed: bytes
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...] = (VattError,)  # these must name a file
    others: Mapping[str, bytes] = field(default_factory=dict)  # files that lie around it


@st.composite
def mutated(draw: st.DrawFn, seed: bytes) -> bytes:
    """A seed with some bytes changed, lost, repeated, put in or cut off."""
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 12))
        how = draw(st.integers(0, 5))
        if how == 0:
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif how == 1:
            del data[at : at + length]
        elif how == 2:
            data[at:at] = draw(st.sampled_from(SPLICES))
        elif how == 3:
            data[at:at] = data[max(at - length, 0) : at] * draw(st.integers(1, 3))
        elif how == 4:
            data[at : at + 1] = bytes([(data[at] if at < len(data) else 0) ^ 1 << length % 8])
        elif draw(st.integers(0, 3)) == 0:
            del data[at:]
    return bytes(data)


def run(reader: Reader, folder: Path, data: bytes) -> None:
    """Read it; only an error that names the file is allowed, and only within the bounds."""
    for name, content in {**reader.others, reader.file: data}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    path = folder / reader.file
    with bounded():
        try:
            reader.read(path)
        except reader.errors as error:
            names = {Path(name).name for name in (reader.file, *reader.others)}
            if path.parent != folder:  # a checkpoint's files belong together
                names.add(str(path.parent))
            assert any(name in str(error) for name in names), error


def fuzz(reader: Reader, folder: Path, *, examples: int) -> int:
    """Read so many mutations of the seed; returns their number."""
    made = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples < LONG,
        phases=[Phase.generate] if examples >= LONG else list(Phase),
        suppress_health_check=list(HealthCheck),
    )
    @given(mutated(reader.seed))
    def each(data: bytes) -> None:
        nonlocal made
        made += 1
        run(reader, folder, data)

    each()
    return made


def fuzz_long(name: str, reader: Reader, folder: Path) -> None:
    """The same for SECONDS, with a line in LOG."""
    begun, made = time.monotonic(), 0
    while time.monotonic() - begun < SECONDS:
        made += fuzz(reader, folder, examples=LONG)
    note(name, made, time.monotonic() - begun)


def note(name: str, made: int, seconds: float) -> None:
    """Add a line to LOG."""
    if LOG is not None:
        with Path(LOG).open("a", encoding="utf-8") as file:
            file.write(f"| {name} | {made:,} | {seconds:.0f} s | {_peak() / 1e6:.0f} MB |\n")


@contextmanager
def bounded() -> Iterator[None]:
    """Fail when the body computes for ten seconds, or this process takes two gigabytes."""

    def give_up(signum: int, frame: object) -> None:
        raise AssertionError(f"a hang: no end after {A_HANG:.0f} s of computing")

    handler = signal.signal(signal.SIGPROF, give_up)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(_status("VmSize"))
    # More than the bound, which is on memory that is used: this one protects the machine.
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2 * MEMORY, limit[1]))
    signal.setitimer(signal.ITIMER_PROF, A_HANG)
    _forget_peak()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert _peak() < MEMORY, f"{_peak() / 1e9:.1f} GB"


def _peak() -> float:
    return _status("VmHWM")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(name: str) -> float:
    """A figure of this process in bytes."""
    lines: Sequence[str] = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    line = next(line for line in lines if line.startswith(f"{name}:"))
    return 1024 * float(line.split()[1])
