"""Progress: plain lines with rate and time left where there is no terminal."""

import pytest

from vatt.progress import describe, duration, progress


def test_durations_read_as_people_say_them() -> None:
    assert [duration(s) for s in (48, 200, 7500)] == ["48 s", "3 min 20 s", "2 h 5 min"]


def test_rate_and_time_left_count_only_what_was_done_here() -> None:
    assert describe(300, 700, 100.0, "steps", first=100) == "300/700 steps, 2.0/s, 3 min 20 s left"


def test_slow_work_says_seconds_each() -> None:
    assert describe(2, 10, 8.0, "files") == "2/10 files, 4.0 s each, 32 s left"


def test_plain_lines_go_to_stderr_and_end_once(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("download", "clips") as tick:
        for done in range(11):
            tick(done, 10)
        tick(10, 10)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("10/10 clips") == 1
