"""Any number of processes, at any ZeRO stage, train as plain torch does alone."""

from pathlib import Path

import pytest
import torch

from tests.training import tiny, worker
from vatt.training.engine import LocalEngine
from vatt.training.launch import launch
from vatt.training.pretrain import Pretraining, pretraining_inputs


@pytest.fixture(scope="module", params=[2])
def found(request, tmp_path_factory):
    """What the processes found, started once for all tests."""
    results = tmp_path_factory.mktemp("processes") / "results.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VATT_TEST_RESULTS", str(results))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(Path(__file__).parents[2])
        code = launch("tests.training.worker", tiny.machine_params(processes=request.param))
    assert code == 0
    return request.param, torch.load(results, weights_only=True)


@pytest.fixture(scope="module")
def alone():
    """The same training in this process, with plain torch."""
    return {backbone: train_alone(backbone) for backbone in ("specific", "agnostic")}


def train_alone(backbone):
    params = tiny.pretrain_params()
    model = tiny.make_model(tiny.model_params(backbone=backbone))
    engine = LocalEngine(Pretraining(model, params), worker.OPTIMIZER, "fp32")
    history = []
    for step in range(worker.STEPS):
        batch = tiny.make_batch(step, textless=worker.TEXTLESS)
        losses = engine(*pretraining_inputs(model, batch, step, drop_rate=0.5, seed=0))
        norm = engine.update(losses["loss"], learning_rate=worker.LEARNING_RATE)
        history.append((losses["loss"].item(), norm))
    return history, engine.weights()


def test_gather_joins_rows_and_gives_each_process_its_gradient(found):
    processes, results = found
    whole, gradient = results["gather"]
    expected = torch.cat([torch.arange(6.0).view(2, 3) + 10 * rank for rank in range(processes)])
    assert torch.equal(whole, expected)
    weights = torch.arange(6.0 * processes).view(3, 2 * processes)
    assert torch.equal(gradient, weights.T * processes)  # every process adds the same sum


@pytest.mark.parametrize("case", worker.CASES, ids=str)
def test_twenty_steps_equal_plain_torch(found, alone, case):
    history, weights = found[1][case]
    expected_history, expected_weights = alone[case[1]]
    assert expected_history[0][1] > worker.OPTIMIZER.clip_norm  # so that clipping is at work
    torch.testing.assert_close(
        torch.tensor(history), torch.tensor(expected_history), rtol=1e-4, atol=1e-5
    )
    assert weights.keys() == expected_weights.keys()
    # Adam lets weights without a gradient (a bias before a batch norm) drift with the rounding.
    drift = 0.02 * worker.LEARNING_RATE * worker.STEPS
    for name, value in weights.items():
        torch.testing.assert_close(value, expected_weights[name], rtol=0, atol=drift, msg=name)


def test_an_evaluation_on_the_way_happens_once_and_changes_no_weight(found):
    processes, results = found
    with_it, without = results["evaluated"]
    assert with_it["hash"] == without["hash"] and with_it["asked"] == [2, 4, 6]
    ranks = {name for name in with_it["told"] if name.startswith("peak_memory_gb.")}
    assert ranks == {f"peak_memory_gb.rank_{rank}" for rank in range(processes)}
