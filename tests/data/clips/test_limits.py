"""ffmpeg on hostile input is ended in time, and takes no more than it may."""

import time

import psutil
import pytest

from tests.test_dvc import wait_until
from vatt.data.clips.media import Limits, find_ffmpeg, run_limited

ENDLESS = ("-f", "lavfi", "-i", "testsrc2=s=640x360:r=100", "-threads", "1")
ROOM = Limits(seconds=20, file_bytes=2**20)


def ffmpeg(folder, *arguments, limits=ROOM):
    command = [find_ffmpeg(None), "-v", "error", "-nostdin", "-y", *arguments]
    return run_limited(command, limits, log=folder / "log")


def test_a_clean_run_says_nothing(tmp_path):
    assert ffmpeg(tmp_path, *ENDLESS, "-t", "0.1", "-f", "null", "-") == ""


def test_output_beyond_its_size_ends_the_run(tmp_path):
    out = tmp_path / "out.yuv"
    said = ffmpeg(tmp_path, *ENDLESS, "-f", "rawvideo", str(out))
    assert said == "the output is too large" and out.stat().st_size <= 2**20


def test_memory_beyond_its_share_is_refused(tmp_path):
    little = Limits(seconds=20, file_bytes=2**20, memory=2**27)
    said = ffmpeg(tmp_path, *ENDLESS, "-vf", "scale=16000:9000", "-f", "null", "-", limits=little)
    assert "memory" in said or "alloc" in said


@pytest.mark.parametrize("source", [ENDLESS, ("-re", *ENDLESS)])
def test_time_ends_work_and_waiting_alike(tmp_path, source):
    begun = time.monotonic()
    said = ffmpeg(tmp_path, *source, "-f", "null", "-", limits=Limits(1, 2**20))
    assert said == "decoding takes too long" and time.monotonic() - begun < 10


def test_endless_complaints_are_not_kept(tmp_path):
    said = run_limited(["sh", "-c", "exec yes bad >&2"], ROOM, log=tmp_path / "log")
    assert said == "the output is too large"
    # Limits come some microseconds after the start; what is written before them stays.
    assert (tmp_path / "log").stat().st_size <= 2**26


def test_nothing_of_a_wrapper_goes_on_after_its_time(tmp_path):
    limits = Limits(1, 2**20)
    script = f"sleep 60 & echo $! > {tmp_path / 'child'}; wait"
    assert run_limited(["sh", "-c", script], limits, log=tmp_path / "log") != ""
    child = int((tmp_path / "child").read_text())
    wait_until(lambda: not is_running(child), seconds=20)  # a kill may take a moment


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_program_that_crashes_is_told_from_one_that_ends(tmp_path):
    def shell(script):
        return run_limited(["sh", "-c", script], ROOM, log=tmp_path / "log")

    assert shell("kill -SEGV $$") == "ffmpeg ended by signal 11"
    assert shell("exit 3") == "ffmpeg ended with code 3"
    assert shell("echo '[h264 @ 0x12] bad' >&2; exit 1") == "bad"
