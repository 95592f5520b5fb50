"""Starting several processes: the command, their exit codes, and stop signals on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training import tiny
from vatt.training.distributed import launch, launch_line

ROOT = Path(__file__).parents[2]


def test_one_process_or_a_started_one_needs_no_launcher(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert launch("stages.pretrain", tiny.machine_params()) is None
    monkeypatch.setenv("RANK", "1")  # as torchrun and Slurm's wrapper do
    assert launch("stages.pretrain", tiny.machine_params(processes=2)) is None


def test_launcher_arguments_come_last_but_for_the_module(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=16\n")
    line = launch_line("stages.pretrain", tiny.machine_params(processes=3))
    assert line[line.index("--num_gpus") + 1] == "3"
    machine = tiny.machine_params(processes=16, launcher_arguments=["--hostfile", str(hosts)])
    line = launch_line("stages.pretrain", machine)
    assert "--num_gpus" not in line
    assert line[-3:] == ["--hostfile", str(hosts), "stages.pretrain"]


def reaches_itself():
    """Whether DeepSpeed's first step, ssh to the machine, works without a password here."""
    command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "localhost", "hostname"]
    return shutil.which("ssh") and not subprocess.run(command, capture_output=True).returncode


@pytest.mark.slow
@pytest.mark.skipif(not reaches_itself(), reason="`ssh localhost` does not work here")
def test_a_hostfile_counts_whatever_the_number_of_processes(tmp_path, monkeypatch, caplog):
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(ROOT)
    settings = {"OMP_NUM_THREADS": "1", "VATT_TEST_FOLDER": str(tmp_path)}
    for name, value in (settings | {"VATT_TEST_DEEPSPEED": "1"}).items():
        monkeypatch.setenv(name, value)
    machine = tiny.machine_params(processes=1, launcher_arguments=["--hostfile", str(hosts)])
    assert launch("tests.training.victim", machine) == 0
    assert f"--hostfile {hosts} tests.training.victim" in caplog.text
    meta = json.loads((tmp_path / "state" / "step-00000024" / "meta.json").read_text())
    assert meta["engine"].endswith("processes: 2")


@pytest.mark.slow
def test_a_stop_signal_reaches_all_processes_and_the_rerun_continues(tmp_path):
    losses = tmp_path / "losses"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VATT_TEST_FOLDER": str(tmp_path),
        "VATT_TEST_DEEPSPEED": "1",
        "VATT_TEST_SLEEP": "0.1",
        "VATT_TEST_PROCESSES": "2",
    }

    def start():
        return subprocess.Popen(
            [sys.executable, "-m", "tests.training.victim"], cwd=ROOT, env=environment
        )

    process = start()
    while not losses.exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    assert not (tmp_path / "result").exists()
    assert start().wait() == 0
    steps = [json.loads(line)[0] for line in losses.read_text().splitlines()]
    assert steps == list(range(1, 25))
    assert (tmp_path / "result").exists()
