"""Optimisers against the trajectories of the released ones, and against their formulas."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.tiny import DEMO
from vatt.training.optimizer import Adam, Sgd, make_optimizer

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "optim.npz")
RATES = next(GOLDEN[name] for name in GOLDEN.files if "three_level" in name)


def trajectory(kind, weight_decay, dtype=torch.float32):
    weight = torch.nn.Parameter(torch.tensor(GOLDEN["optim/x0"], dtype=dtype))
    optimizer = kind([weight], weight_decay=weight_decay)
    states = []
    for rate, gradient in zip(RATES, GOLDEN["optim/grads"], strict=False):
        optimizer.param_groups[0]["lr"] = float(rate)
        weight.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.step()
        states.append(weight.detach().clone().numpy())
    return np.stack(states)


@pytest.mark.parametrize(
    ("kind", "weight_decay", "name"),
    [
        (Adam, 0.0, "adam"),
        (Sgd, 0.0, "momentum"),
        (Adam, 0.01, "adamw"),
        (Sgd, 0.01, "momentumw"),
    ],
)
def test_updates_are_the_release_s(kind, weight_decay, name):
    expected = GOLDEN[f"optim/{name}_trajectory"]
    np.testing.assert_allclose(trajectory(kind, weight_decay), expected, rtol=1e-5, atol=1e-6)


def test_adam_adds_eps_before_the_correction():
    weight, m, v = GOLDEN["optim/x0"].astype(np.float64), 0.0, 0.0
    for t, (rate, gradient) in enumerate(zip(RATES, GOLDEN["optim/grads"], strict=False), 1):
        gradient = gradient.astype(np.float64)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        scale = float(rate) * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        weight = weight - scale * m / (np.sqrt(v) + 1e-7)
    got = trajectory(Adam, 0.0, dtype=torch.float64)[-1]
    np.testing.assert_allclose(got, weight, rtol=1e-12)


def test_frozen_weights_are_left_out():
    free, frozen = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    frozen.requires_grad_(False)
    optimizer = make_optimizer([free, frozen], DEMO.pretrain.optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


def test_a_loaded_optimizer_goes_on_as_if_it_had_not_stopped():
    for kind in (Adam, Sgd):
        torch.manual_seed(0)
        first = torch.nn.Parameter(torch.randn(4))
        optimizer = kind([first])
        second = torch.nn.Parameter(torch.empty(4))
        resumed = kind([second])
        for step in range(6):
            if step == 3:
                second.data.copy_(first.data)
                resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for one, weight in ((optimizer, first), (resumed, second)):
                weight.grad = torch.full((4,), 1.0 + step)
                one.param_groups[0]["lr"] = 0.1
                if step >= 3 or one is optimizer:
                    one.step()
        assert torch.equal(first, second), kind
