"""Killed at any instruction, a training ends with the weights of an undisturbed one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 24  # of victim.py


class Training:
    """One training in a folder, started as often as it takes."""

    def __init__(self, folder, **environment):
        self.losses, self.result = folder / "losses", folder / "result"
        self.states = folder / "state"
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.environment["VATT_TEST_FOLDER"] = str(folder)

    def start(self):
        command = [sys.executable, "-m", "tests.training.victim"]
        return subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stderr=subprocess.PIPE, text=True
        )

    def steps(self):
        """(step, loss, norm) as reported, in order."""
        if not self.losses.exists():
            return []
        return [json.loads(line) for line in self.losses.read_text().splitlines()]

    def wait_for_steps(self, count, process):
        while len(self.steps()) < count and process.poll() is None:
            time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    training = Training(tmp_path_factory.mktemp("undisturbed"))
    process = training.start()
    assert process.wait() == 0, process.stderr.read()
    assert len(training.steps()) == STEPS
    return training


def by_step(rows):
    """Each step's numbers; a step that was made twice must have come out the same."""
    found = {}
    for step, *numbers in rows:
        assert found.setdefault(step, numbers) == numbers
    return found


def test_a_training_killed_again_and_again_ends_as_the_undisturbed_one(undisturbed, tmp_path):
    training = Training(tmp_path, VATT_TEST_SLEEP="0.02")
    chance = random.Random(0)
    kills = 0
    while True:
        process = training.start()
        if kills < 4:
            # Anywhere: in a step, while a state is written, between a state and its report.
            training.wait_for_steps(len(training.steps()) + 1, process)
            time.sleep(chance.uniform(0, 0.15))
            process.kill()
        if process.wait() != -signal.SIGKILL:
            break
        kills += 1
    assert process.returncode == 0, process.stderr.read()
    assert kills >= 3
    assert by_step(training.steps()) == by_step(undisturbed.steps())
    assert training.result.read_text() == undisturbed.result.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_saves_at_the_step_s_end(undisturbed, tmp_path, number):
    training = Training(tmp_path, VATT_TEST_SLEEP="0.05")
    process = training.start()
    training.wait_for_steps(4, process)
    process.send_signal(number)
    assert process.wait() == 75
    last = training.steps()[-1][0]
    assert f"stopped after step {last} of {STEPS}" in process.stderr.read()
    assert training.start().wait() == 0
    assert [step for step, *_ in training.steps()] == list(range(1, STEPS + 1))
    assert training.result.read_text() == undisturbed.result.read_text()


def test_a_second_start_beside_a_running_one_is_refused(tmp_path):
    training = Training(tmp_path, VATT_TEST_SLEEP="3")
    first = training.start()
    training.wait_for_steps(1, first)
    second = training.start()
    assert second.wait() == 4
    assert "busy: another process holds" in second.stderr.read()
    first.kill()
    first.wait()


def test_a_damaged_newest_state_is_passed_over(undisturbed, tmp_path):
    training = Training(tmp_path, VATT_TEST_SLEEP="0.05")
    process = training.start()
    training.wait_for_steps(8, process)
    process.kill()
    process.wait()
    newest = max(training.states.glob("step-*"))
    file = newest / "share-00000.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    again = training.start()
    assert again.wait() == 0
    assert f"{newest} is damaged" in again.stderr.read()
    assert by_step(training.steps()) == by_step(undisturbed.steps())
    assert training.result.read_text() == undisturbed.result.read_text()


def test_a_finished_training_starts_from_zero_when_it_is_run_again(undisturbed, tmp_path):
    training = Training(tmp_path)
    for _ in range(2):
        assert training.start().wait() == 0
    assert [step for step, *_ in training.steps()] == [*range(1, STEPS + 1)] * 2
    assert training.result.read_text() == undisturbed.result.read_text()


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_samples(tmp_path):
    def train(name, *numbers):
        (tmp_path / name).mkdir()
        for place, number in enumerate(numbers, start=1):
            training = Training(
                tmp_path / name,
                VATT_TEST_DEEPSPEED="1",
                VATT_TEST_DROPOUT="0",
                VATT_TEST_PROCESSES=str(number),
                VATT_TEST_SLEEP="0.1" if place < len(numbers) else "0",
            )
            process = training.start()
            if place < len(numbers):
                training.wait_for_steps(6 * place, process)
                process.terminate()
                assert process.wait() == 75
            else:
                assert process.wait() == 0, process.stderr.read()
                if place > 1:
                    assert f"processes: {numbers[-2]}; now" in process.stderr.read()
        rows = training.steps()
        assert [step for step, *_ in rows] == list(range(1, STEPS + 1))
        return [number for row in rows for number in row]

    calm = train("calm", 1)
    assert train("there and back", 2, 1, 2) == pytest.approx(calm, rel=1e-3)


@pytest.mark.slow
def test_deepspeed_resumes_exactly_after_twenty_kills(tmp_path):
    (tmp_path / "calm").mkdir()
    calm = Training(tmp_path / "calm", VATT_TEST_DEEPSPEED="1")
    process = calm.start()
    assert process.wait() == 0, process.stderr.read()
    (tmp_path / "killed").mkdir()
    training = Training(tmp_path / "killed", VATT_TEST_DEEPSPEED="1", VATT_TEST_SLEEP="0.05")
    chance = random.Random(1)
    for _ in range(20):
        process = training.start()
        training.wait_for_steps(len(training.steps()) + 1, process)
        time.sleep(chance.uniform(0, 0.2))
        process.kill()
        process.wait()
        if training.result.exists():
            break
    process = training.start()
    assert process.wait() == 0, process.stderr.read()
    assert by_step(training.steps()) == by_step(calm.steps())
    assert training.result.read_text() == calm.result.read_text()
