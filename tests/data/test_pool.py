"""Worker processes never outlive their parent."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.test_architecture import ROOT
from vatt.data.workers import worker_pool

PARENT = """
import os, time
from vatt.data.workers import worker_pool
with worker_pool(2) as pool:
    pids = set()
    while len(pids) < 2:
        pids |= {future.result() for future in [pool.submit(os.getpid) for _ in range(8)]}
    print(*pids, flush=True)
    for _ in range(4):
        pool.submit(time.sleep, 60)
    time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_end_when_the_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(map(alive, workers))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 15
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


CORPUS = """
import sys
from pathlib import Path
from vatt.config import DemoParams
from vatt.data.sources.demo import make_demo
from vatt.progress import unseen
clips = DemoParams(train_clips=5000, test_clips=6, no_text_share=0.5, dead_links=2)
make_demo(Path(sys.argv[1]), clips, seed=0, workers=2, progress=unseen)
"""


def test_the_makers_of_the_demo_corpus_end_too(tmp_path):
    parent = psutil.Popen([sys.executable, "-c", CORPUS, tmp_path / "corpus"])
    while not list(tmp_path.glob("corpus/*.mp4")):
        assert parent.poll() is None
        time.sleep(0.02)
    family = parent.children(recursive=True)
    assert len(family) >= 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _, left = psutil.wait_procs(family, timeout=30)
    for process in left:
        process.kill()
    assert not left


def test_only_one_module_starts_worker_processes():
    starts = re.compile(r"\b(ProcessPoolExecutor|get_context)\(|\b(multiprocessing|mp)\.Pool\(")
    files = [file for room in ("vatt", "vattctl", "stages") for file in (ROOT / room).rglob("*.py")]
    found = [file for file in files if starts.search(file.read_text())]
    assert found == [ROOT / "vatt/data/workers.py"]


def test_an_error_ends_them_at_once():
    begun = time.monotonic()
    with pytest.raises(KeyError), worker_pool(2) as pool:
        for _ in range(4):
            pool.submit(time.sleep, 60)
        raise KeyError
    assert time.monotonic() - begun < 20


def test_without_workers_the_calls_are_made_here():
    with worker_pool(0) as pool:
        assert pool.submit(os.getpid).result() == os.getpid()
        with pytest.raises(ZeroDivisionError):
            pool.submit(divmod, 1, 0).result()
