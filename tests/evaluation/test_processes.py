"""The same bytes for any number of processes and of loader workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluation.project import make_project

ROOT = Path(__file__).parents[2]
RUNS = ((1, 0), (1, 3), (2, 0), (2, 1), (3, 1))  # processes, workers; 12 clips are 3 batches


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All files of each run."""
    folder = tmp_path_factory.mktemp("processes")
    make_project(folder)
    return {run: files_of(folder, *run) for run in RUNS}


def files_of(project, processes, workers):
    out = project / f"{processes}-{workers}"
    out.mkdir()
    environment = {
        "VATT_TEST_PROJECT": str(project),
        "VATT_TEST_OUT": str(out),
        "VATT_TEST_WORKERS": str(workers),
        "OMP_NUM_THREADS": "1",
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    number = ["--nproc_per_node", str(processes)]
    command = [*torchrun, *number, "-m", "tests.evaluation.worker"]
    subprocess.run(command, env=os.environ | environment, cwd=ROOT, check=True)
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("run", RUNS[1:], ids=str)
def test_every_file_has_the_same_bytes(results, run):
    alone, found = results[RUNS[0]], results[run]
    assert {"evaluate.json", "arrays/similarities.npz", "arrays/features.npz"} <= alone.keys()
    assert found.keys() == alone.keys()
    assert [name for name in alone if found[name] != alone[name]] == []


def test_the_cache_is_written_once_by_the_first_process(results):
    kept = [name for name in results[2, 0] if name.startswith("cache/")]
    assert len(kept) == 6
