"""Places at a host, pauses between files and delays hold for all threads and processes."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

from vatt.data.fetching.fetch import Hosts

HOLD = """
import sys, time
from pathlib import Path
from vatt.data.fetching.fetch import Hosts
with Hosts(Path(sys.argv[1]), 1, 0.0).turn("host"):
    print("mine", flush=True)
    time.sleep(60)
"""


def test_files_begin_a_pause_apart(tmp_path):
    hosts = Hosts(tmp_path, 4, 0.1)

    def begin(_: int) -> float:
        with hosts.turn("host"):
            return time.monotonic()

    with ThreadPoolExecutor(6) as pool:
        begun = sorted(pool.map(begin, range(6)))
    assert min(after - before for before, after in pairwise(begun)) > 0.08
    with hosts.turn("another"):
        assert time.monotonic() - begun[-1] < 0.08


def test_a_delay_keeps_everybody_away_for_its_time(tmp_path):
    hosts = Hosts(tmp_path, 2, 0.0)
    hosts.delay("host", 0.3)
    begun = time.monotonic()
    with hosts.turn("host"):
        assert 0.25 < time.monotonic() - begun < 2.0


def test_the_place_of_a_process_that_was_killed_is_free_again(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "mine\n"
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(lambda: Hosts(tmp_path, 1, 0.0).turn("host").__enter__())
            time.sleep(0.3)
            assert not waiting.done()
            holder.send_signal(signal.SIGKILL)
            waiting.result(timeout=10)
