"""The ledger: one state a clip, whatever dies while it is written."""

import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from tests.data.corpus import make_clip
from vatt.data.clips.ledger import (
    Entry,
    Ledger,
    forget,
    read_ledger,
    summary,
    with_captions,
    write_ledger,
)
from vatt.data.clips.manifest import CaptionFaults
from vatt.errors import DataError

WRITER = """
import sys
from pathlib import Path
from vatt.data.clips.ledger import Entry, Ledger
with Ledger(Path(sys.argv[1])) as ledger:
    for number in range(200):
        ledger.record(Entry(f"{sys.argv[2]}-{number}", "ok", "download", reason="x" * 50))
"""


def test_the_last_word_on_a_clip_counts(tmp_path):
    with Ledger(tmp_path / "j") as journal:
        journal.record(
            Entry("a", "network", "download"), Entry("b", "ok", "download", has=("video",))
        )
        journal.record(Entry("a", "ok", "download", seconds=1.5, sha256="f"))
    entries = read_ledger(tmp_path / "j")
    assert summary(entries.values()) == {"ok": 2}
    assert entries["a"].seconds == 1.5 and entries["b"].has == ("video",)
    assert all(entry.time for entry in entries.values())


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_cut_off_by_a_kill_costs_only_itself(tmp_path, cut):
    path = tmp_path / "j"
    with Ledger(path) as journal:
        journal.record(Entry("a", "ok", "download"))
        journal.record(Entry("b", "ok", "download"))
    path.write_bytes(path.read_bytes()[:-cut])
    with Ledger(path) as journal:
        journal.record(Entry("c", "not-found", "download"))
    assert {"a", "c"} <= set(read_ledger(path)) <= {"a", "b", "c"}


def test_several_writers_lose_no_line(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "j")]
    writers = [subprocess.Popen([*command, str(number)]) for number in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len(read_ledger(tmp_path / "j")) == 600


def test_writers_killed_in_the_middle_spoil_no_line_of_others(tmp_path):
    """Each writer's clips are there up to where it was killed, and every line tells one state."""
    waits = random.Random(0)
    path = tmp_path / "j"
    for turn in range(4):
        command = [sys.executable, "-c", WRITER.replace("200", "10**9"), str(path)]
        writers = [subprocess.Popen([*command, f"{turn}.{number}"]) for number in range(2)]
        names = [f'"{turn}.{number}-20"'.encode() for number in range(2)]
        while not path.exists() or any(name not in path.read_bytes() for name in names):
            time.sleep(0.01)  # until both are at work
        for writer in writers:
            time.sleep(waits.random() / 50)
            writer.send_signal(signal.SIGKILL)
            writer.wait()
    numbers = {}
    for name in read_ledger(path):
        writer, number = name.rsplit("-", 1)
        numbers.setdefault(writer, []).append(int(number))
    assert len(numbers) == 8
    assert all(found == list(range(len(found))) for found in numbers.values())


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe", b"[]", b"17", b"[" * 100_000, b'{"clip_id": {}, "state": "ok", "stage": "x"}',
        b'{"clip_id": "c", "state": [], "stage": "x"}', b'{"clip_id": "c", "state": "ok"}',
        b'{"clip_id": "c", "state": "ok", "stage": "x", "seconds": NaN}',
        b'{"clip_id": "c", "state": "ok", "stage": "x", "has": 3}',
        b'{"clip_id": "c", "state": "ok", "stage": "x", "samples": "many"}',
        b'{"clip_id": "c", "state": "ok", "stage": "x", "seconds": ' + b"9" * 5000 + b"}",
        b" " * 3_000_000,
    ],
)  # fmt: skip
def test_a_damaged_line_costs_only_itself(tmp_path, line):
    good = b'{"clip_id": "%s", "stage": "download", "state": "ok"}\n'
    (tmp_path / "j").write_bytes(good % b"a" + line + b"\n" + good % b"b")
    assert list(read_ledger(tmp_path / "j")) == ["a", "b"]


def test_the_ledger_says_what_was_wrong_with_captions(tmp_path):
    clip = replace(make_clip(1), caption_faults=CaptionFaults(2, 1, "cp1251"))
    entry = with_captions(Entry(clip.clip_id, "ok", "download"), clip)
    write_ledger(tmp_path / "l", [entry, with_captions(Entry("b", "ok", "download"), make_clip(2))])
    read = read_ledger(tmp_path / "l")
    assert (read[clip.clip_id].captions_dropped, read[clip.clip_id].captions_repaired) == (2, 1)
    assert read[clip.clip_id].encoding == "cp1251"
    assert "captions" not in (tmp_path / "l").read_text().splitlines()[0]  # of b


def test_forgotten_states_are_tried_again_and_others_are_not(tmp_path):
    states = {"a": "ok", "b": "geo", "c": "network", "d": "removed"}
    with Ledger(tmp_path / "j") as journal:
        journal.record(*(Entry(name, state, "download") for name, state in states.items()))
    assert forget(tmp_path / "j", {"geo", "network"}) == 2
    after = {name: entry.state for name, entry in read_ledger(tmp_path / "j").items()}
    assert after == states | {"b": "network"}
    assert forget(tmp_path / "j", {"private"}) == 0


def test_the_final_ledger_is_sorted_and_without_times(tmp_path):
    first = [Entry("b", "ok", "download", time="2026-01-01"), Entry("a", "corrupt", "preprocess")]
    assert write_ledger(tmp_path / "1", first) == {"ok": 1, "corrupt": 1}
    write_ledger(tmp_path / "2", first[::-1])
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert list(read_ledger(tmp_path / "1")) == ["a", "b"]


def test_two_states_for_a_clip_and_unknown_states_are_refused(tmp_path):
    with pytest.raises(DataError, match="two states"):
        write_ledger(tmp_path / "1", [Entry("a", "ok", "x"), Entry("a", "geo", "x")])
    with pytest.raises(ValueError, match="vanished"):
        Entry("a", "vanished", "x")
