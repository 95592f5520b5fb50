"""Inside a job step of Slurm, processes find each other without a launcher of ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vatt.process import first_count, first_host, join_step
from vatt.training.distributed import free_port

SCRIPT = """
import json, torch
from tests.training import tiny
from vatt.process import run_stage
from vatt.training import distributed
from vatt.training.distributed import launch
def main():
    machine = tiny.machine_params(processes=8)
    assert launch("stages.pretrain", machine) is None
    with distributed.process_group(machine):
        ranks = distributed.gather(torch.tensor([[distributed.rank()]])).flatten().tolist()
        if distributed.rank() == 0:
            print(json.dumps(ranks))
run_stage("sample", main)
"""


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[07-12,15],login1", "gpu07"),
        ("rack-2-[1,5]-ib,x", "rack-2-1-ib"),
    ],
)
def test_the_first_machine_of_a_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(("tasks", "first"), [("4", "4"), ("4(x2)", "4"), ("8(x3),2", "8")])
def test_the_tasks_on_the_first_machine(tasks, first):
    assert first_count(tasks) == first


def test_outside_a_step_or_inside_torchrun_nothing_is_set(monkeypatch):
    for environment in ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, {"RANK": "1"}):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", environment.copy())
            join_step()
            assert os.environ == environment


def test_two_tasks_of_a_step_train_together(tmp_path):
    step = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": "7",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, **step, "SLURM_PROCID": number, "SLURM_LOCALID": number},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in ("0", "1")
    ]
    told = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    assert json.loads(told[0]) == [0, 1] and told[1] == ""
