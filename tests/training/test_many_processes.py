"""Any number of processes, at any ZeRO stage, train as plain torch does alone."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training import tiny, worker
from vatt.training.distributed import launch
from vatt.training.engine import LocalEngine
from vatt.training.pretrain import Pretraining

ROOT = Path(__file__).parents[2]
slow = pytest.mark.slow


def start(processes, environment):
    """Two by DeepSpeed's launcher, other numbers by torchrun."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.chdir(ROOT)
        if processes == 2:
            return launch("tests.training.worker", tiny.machine_params(processes=2))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        number = ["--nproc_per_node", str(processes)]
        command = [*torchrun, *number, "-m", "tests.training.worker"]
        return subprocess.run(command, env=os.environ | environment, check=False).returncode


@pytest.fixture(
    scope="module",
    params=[
        (1, "one"),
        (2, "quick"),
        *(pytest.param((processes, "all"), marks=slow) for processes in (1, 2, 4)),
    ],
    ids=str,
)
def found(request, alone, tmp_path_factory):
    """What the processes found, started once for all tests."""
    processes, cases = request.param
    folder = tmp_path_factory.mktemp("processes")
    environment = {
        "VATT_TEST_RESULTS": str(folder),
        "VATT_TEST_CASES": cases,
        "VATT_TEST_START": str(alone["folder"]),
        "OMP_NUM_THREADS": "1",
    }
    assert start(processes, environment) == 0
    results = torch.load(folder / "results.pt", weights_only=True)
    return processes, results, {case: results[case] for case in worker.CASES[cases]}, folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same training in this process, with plain torch, on the whole batch at once."""
    folder = tmp_path_factory.mktemp("alone")
    return {"folder": folder} | {
        name: worker.follow(*plain_torch(name), folder / name) for name in worker.BACKBONES
    }


def plain_torch(backbone):
    model = worker.model_of(backbone)
    module = Pretraining(model, tiny.pretrain_params())
    return LocalEngine(module, worker.OPTIMIZER, "fp32"), model


def close(histories, expected):
    torch.testing.assert_close(histories, expected, rtol=1e-4, atol=1e-5)


def test_gather_joins_rows_and_gives_each_process_its_gradient(found):
    processes, results, *_ = found
    whole, gradient = results["gather"]
    expected = torch.cat([torch.arange(6.0).view(2, 3) + 10 * rank for rank in range(processes)])
    assert torch.equal(whole, expected)
    weights = torch.arange(6.0 * processes).view(3, 2 * processes)
    assert torch.equal(gradient, weights.T * processes)  # every process adds the same sum


@pytest.mark.parametrize("backbone", worker.BACKBONES)
def test_cached_gradients_in_fp64_equal_the_whole_batch_s(found, backbone):
    _, results, *_ = found
    kinds = {kind: worker.EXACT[kind] for kind in worker.EXACT if (kind, backbone) in results}
    assert "exact" in kinds
    for kind, changes in kinds.items():
        expected = worker.exact_gradients(backbone, micro_batch_size=None, **changes)
        for (losses, gradients), (whole_losses, whole) in zip(
            results[kind, backbone], expected, strict=True
        ):
            for name, value in (losses | gradients).items():
                wanted = (whole_losses | whole)[name]
                assert value.dtype == torch.float64 or name.startswith("kept_energy")
                case = f"{kind}: {name}"
                torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-9, msg=case)


def test_losses_norms_and_gradients_equal_plain_torch(found, alone):
    for (zero, backbone, cached), result in found[2].items():
        expected = alone[backbone]
        assert expected["history"][0][1] > worker.OPTIMIZER.clip_norm  # clipping is at work
        close(torch.tensor(result["history"]), torch.tensor(expected["history"]))
        for step, moments in enumerate(result["moments"]):
            for name, value in moments.items():
                wanted = expected["moments"][step][name]
                error = (value - wanted).abs().max().item()
                case = f"ZeRO-{zero}, {backbone}, cached: {cached}, step {step}: {name}"
                # Some gradients are zero but for rounding: a key's bias, a bias before batch norm.
                assert error <= 1e-4 * wanted.abs().max().item() + 1e-7, case


def test_twenty_steps_equal_plain_torch(found, alone):
    for (_, backbone, _), result in found[2].items():
        expected = alone[backbone]["weights"]
        assert result["weights"].keys() == expected.keys()
        # Adam lets weights whose gradient is zero but for rounding drift.
        drift = 0.02 * worker.LEARNING_RATE * worker.STEPS
        for name, value in result["weights"].items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=drift, msg=name)


@pytest.mark.parametrize("option", [*worker.OPTIONS, *worker.COMPILED])
def test_what_machine_says_changes_no_result(found, alone, option):
    if option not in found[1]:
        pytest.skip("tried with more cases")
    expected = torch.tensor(alone["specific"]["history"][: worker.RESUMED_STEPS])
    close(torch.tensor(found[1][option]), expected)


def test_a_state_goes_on_in_another_number_of_processes(found, alone):
    done = len(worker.TEXTLESS)
    for number, ((_, backbone, _), result) in enumerate(found[2].items()):
        expected = torch.tensor(alone[backbone]["history"])
        resumed = torch.tensor(result["resumed"])  # in many processes, from a state of one
        close(resumed, expected[done : done + worker.RESUMED_STEPS])
        engine, model = plain_torch(backbone)  # in one process, from a state of many
        engine.load(found[3] / str(number) / worker.state_name(done))
        rows = [worker.update(engine, model, step) for step in range(done, worker.STEPS)]
        close(torch.tensor(rows), expected[done:])


def test_a_gradient_that_is_not_finite_is_noticed_at_every_zero_stage(found):
    if "spoiled" not in found[1]:
        pytest.skip("tried with the quick cases")
    assert [loss for loss, _ in found[1]["spoiled"]] == [0.0] * 4
    assert not any(math.isfinite(norm) for _, norm in found[1]["spoiled"])


def test_an_automatic_micro_batch_is_the_same_in_every_process(found):
    if "chosen" not in found[1]:
        pytest.skip("tried with the quick cases")
    assert found[1]["chosen"] == [(None, 1)] * found[0]


def test_linear_layers_in_bf16_find_their_weights_at_every_zero_stage(found):
    if "bf16" not in found[1]:
        pytest.skip("tried with the quick cases")
    first, *others = torch.tensor(found[1]["bf16"])
    assert first.isfinite().all() and (first > 0).all()
    torch.testing.assert_close(torch.stack(others), first.expand(3, 2), rtol=1e-5, atol=0)


def test_bf16_is_bf16_where_deepspeed_ends_an_autocast_that_began_outside(found):
    assert found[1]["types as on a GPU"] == [["torch.bfloat16"]] * 4  # at ZeRO 0 to 3


def test_an_evaluation_on_the_way_happens_once_and_changes_no_weight(found):
    processes, results, *_ = found
    if "evaluated" not in results:
        pytest.skip("tried with the quick cases")
    with_it, without = results["evaluated"]
    assert with_it["hash"] == without["hash"] and with_it["asked"] == [2, 4, 6]
    ranks = {name for name in with_it["metrics"] if name.startswith("peak_memory_gb.")}
    assert ranks == {f"peak_memory_gb.rank_{rank}" for rank in range(processes)}
