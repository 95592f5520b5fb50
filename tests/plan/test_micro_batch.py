"""`machine.micro_batch_size: auto`: the largest micro-batch that fits, proven by a trial."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.plan.test_forecast import PAPER
from tests.test_architecture import ROOT
from tests.training import tiny
from vatt.config import Params
from vatt.plan.forecast import GIB, Place, as_set, forecast_memory, named_place, widest
from vatt.plan.memory import BatchSettings, count, finetuning_memory
from vatt.plan.trial import CHOICE, Job, chosen, fits, last_trial, run_trial


def small(**pretrain) -> Params:
    """The tiny model, with `auto`."""
    task = tiny.DEMO.finetune.tasks["action"]
    task = task.model_copy(update={"batch_size": 4, "frames": 4, "frame_size": 16})
    finetuning = tiny.DEMO.finetune.model_copy(
        update={"run": ("action",), "tasks": {"action": task}}
    )
    machine = tiny.machine_params(micro_batch_size="auto")
    params = tiny.pretrain_params(**pretrain)
    more = {"model": tiny.model_params(), "pretrain": params, "finetune": finetuning}
    return tiny.DEMO.model_copy(update={"machine": machine, **more})


@pytest.mark.parametrize("device", ["a100-40gb", "h200-141gb", "rtx4090"])
def test_the_chosen_micro_batch_fits_and_a_larger_one_does_not(device):
    place, counts = named_place(device), count(PAPER.model)
    params = PAPER.model_copy(
        update={"machine": PAPER.machine.model_copy(update={"micro_batch_size": "auto"})}
    )
    found = as_set(params, place, counts)
    assert found.micro_batch_size is not None

    def needed(setting):
        return forecast_memory(params, setting, place, counts).total

    assert needed(found) <= 0.92 * place.memory
    parts = len(found.micro_batches(2048))
    fewer = replace(found, micro_batch_size=-(-found.rows(2048) // (parts - 1)))
    assert needed(fewer) > 0.92 * place.memory
    more = replace(found, kept_micro_batches=found.kept_micro_batches + 1)
    assert needed(more) > 0.92 * place.memory or found.kept_micro_batches == parts - 1


def test_as_many_micro_batches_are_kept_as_fit():
    def widest_of(kept, size):  # as if each clip took one byte, and 40 bytes were there
        return widest(BatchSettings(), 64, lambda s: s.kept_clips(64) <= kept, most=size)

    assert widest_of(40, 64) == BatchSettings(micro_batch_size=32, kept_micro_batches=1)
    found = widest_of(40, 8)
    assert (found.micro_batch_size, found.kept_micro_batches) == (8, 5)
    assert widest_of(64, 64) == BatchSettings() and widest_of(0, 64) is None


def test_fine_tuning_needs_more_for_more_clips_at_once_and_for_kept_ones():
    task = PAPER.finetune.tasks["kinetics400"]
    counts = count(PAPER.model)

    def needed(**setting):
        return finetuning_memory(PAPER.model, task, BatchSettings(**setting), counts).total

    few, more = needed(micro_batch_size=2), needed(micro_batch_size=4)
    assert few < more < needed(micro_batch_size=2, kept_micro_batches=4) < needed()


@pytest.mark.parametrize("task", [None, "action"])
def test_all_clips_of_a_small_training_fit_and_the_choice_is_kept(tmp_path, task):
    job = Job(small(), tmp_path, task, classes=3)
    machine, kept = chosen(job)
    assert machine.micro_batch_size is None and kept == 1
    noted = json.loads((tmp_path / CHOICE).read_text())
    (tmp_path / CHOICE).write_text(json.dumps(noted | {"micro_batch_size": 3, "kept": 2}))
    machine, kept = chosen(job)  # a training that goes on
    assert (machine.micro_batch_size, kept) == (3, 2)


def test_another_choice_than_before_is_reported(tmp_path, caplog):
    note = {"key": "another", "micro_batch_size": 3, "kept": 1}
    (tmp_path / CHOICE).write_text(json.dumps(note))
    with caplog.at_level(logging.WARNING):
        assert chosen(Job(small(), tmp_path))[0].micro_batch_size is None
    assert "auto is now all clips" in caplog.text and "was 3" in caplog.text


def test_a_number_is_left_as_it_is(tmp_path):
    params = small().model_copy(update={"machine": tiny.machine_params(micro_batch_size=5)})
    assert chosen(Job(params, tmp_path)) == (params.machine, 1)
    assert not list(tmp_path.iterdir())


def test_a_trial_is_taken_again_for_an_hour_with_the_same_settings(tmp_path):
    params = small().model_copy(update={"model": tiny.model_params(depth=4)})
    notes = tmp_path / "trial.json"
    found = run_trial(params, notes)
    # beside other work, noise may hide what a clip of so small a model takes
    assert found.fixed + found.clip > 0 and found.cached_clip >= found.clip >= 0
    assert set(found.losses) >= {tiny.BATCH_SIZE}
    first = json.loads(notes.read_text())
    notes.write_text(json.dumps(first | {"trial": first["trial"] | {"fixed": 123.0}}))
    assert last_trial(params, notes).fixed == 123.0
    assert last_trial(small(), notes) is None  # other settings
    os.utime(notes, (0, 0))
    assert last_trial(params, notes) is None  # too old
    notes.write_text('{"key": 1')
    assert last_trial(params, notes) is None  # damaged


def test_a_trial_that_finds_no_memory_says_so():
    size = {"size": 2, "kept": 1, "clips": 4, "task": None, "classes": 0}
    assert fits(small(), held=0, **size) and not fits(small(), held=10**16, **size)


LIMITED = """
import logging, resource, sys
from pathlib import Path
from tests.plan.test_micro_batch import small
from tests.training import tiny
from vatt.plan.trial import Job, chosen
logging.basicConfig(level=logging.WARNING, format="%(message)s")
model = tiny.DEMO.model
params = small(batch_size=128, drop_rate=0.0).model_copy(update={"model": model})
sizes = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
most = int(sizes["VmSize"].split()[0]) * 1024 + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (most, most))
print(chosen(Job(params, Path(sys.argv[1])))[0].micro_batch_size)
"""


@pytest.mark.skipif(
    torch.version.cuda is not None, reason="a CUDA build of torch takes more of the address space"
)
def test_the_micro_batch_is_halved_until_a_trial_fits(tmp_path):
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(int(0.9e9))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    size = int(done.stdout.split()[-1])
    assert f"needs more memory than there is; trying {size}" in done.stderr
    assert size in (64, 32, 16, 8, 4)


def test_the_formula_alone_decides_for_a_device_that_is_not_here():
    params = PAPER.model_copy(
        update={"machine": PAPER.machine.model_copy(update={"micro_batch_size": "auto"})}
    )
    none = as_set(params, Place("x", 1 * GIB, 0.0, True), count(PAPER.model))
    assert none.micro_batch_size == 1
