"""Places at a host, pauses between files and delays hold for all threads and processes."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from yt_dlp.networking.exceptions import TransportError

from vatt.data.fetching.download import DOWN_SECONDS, HOST_IS_DOWN, SilentHosts
from vatt.data.fetching.fetch import Hosts, explain

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


def test_a_host_that_never_answers_is_given_up_and_one_that_stops_a_while_later():
    hosts = SilentHosts()
    for _ in range(HOST_IS_DOWN):
        assert not hosts.is_down("dead", 0.0)
        hosts.note("dead", reached=False, now=0.0)
        hosts.note("gone", reached=True, now=0.0)
    assert hosts.is_down("dead", 1.0)
    for _ in range(HOST_IS_DOWN):
        hosts.note("gone", reached=False, now=60.0)
    assert not hosts.is_down("gone", DOWN_SECONDS) and hosts.is_down("gone", DOWN_SECONDS + 1)
    hosts.note("gone", reached=True, now=DOWN_SECONDS + 2)
    assert not hosts.is_down("gone", 10 * DOWN_SECONDS)


@pytest.mark.parametrize(
    ("said", "reached"),
    [
        ("HTTPConnection(host='a', port=1): Failed to establish a new connection: refused", False),
        ("Connection to 10.0.0.1 timed out. (connect timeout=20.0)", False),
        ("HTTPConnectionPool(host='a', port=1): Read timed out. (read timeout=20.0)", True),
    ],
)
def test_an_error_says_whether_there_was_a_connection(said, reached):
    assert explain(TransportError(said)).reached == reached
