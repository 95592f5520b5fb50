"""Adam and momentum SGD as the release computes them, and the learning-rate schedule."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vatt.config import OptimizerParams

PERIOD_SHARE = {"quarter_cosine": 0.25, "half_cosine": 0.5}  # of a full cosine period


def learning_rate(step: int, *, steps: int, params: OptimizerParams) -> float:
    """The rate of update `step`, counted from 0; the final rate is reached at `steps`."""
    if step < params.warmup_steps:
        return params.learning_rate * step / params.warmup_steps
    done = min(1.0, (step - params.warmup_steps) / max(1, steps - params.warmup_steps))
    angle = 2 * math.pi * PERIOD_SHARE[params.schedule]
    # 1 at the start, 0 at the end, whatever the share of the period.
    height = (math.cos(angle * done) - math.cos(angle)) / (1 - math.cos(angle))
    return params.final_learning_rate + height * (params.learning_rate - params.final_learning_rate)


ADAM_EPS = 1e-7
MOMENTUM = 0.9


class Adam(torch.optim.Adam):
    """`w -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)`: eps is added before correction.

    torch adds eps to the corrected root instead, so that its eps has to shrink with the step.
    Weight decay takes its share of `w` first and is not scaled by the learning rate.
    """

    moments = ("exp_avg", "exp_avg_sq")

    def __init__(self, parameters: Iterable[nn.Parameter], *, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, lr=0.0, eps=ADAM_EPS, fused=True)
        for group in self.param_groups:
            group.update(updates=0, decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Make one update."""
        assert closure is None
        for group in self.param_groups:
            group["updates"] += 1
            group["eps"] = ADAM_EPS / math.sqrt(1 - group["betas"][1] ** group["updates"])
            _decay(group)
        super().step()

    @property
    def updates(self) -> int:
        """How many updates were made."""
        return int(self.param_groups[0]["updates"])

    def restore(self, weight: Tensor, moments: dict[str, Tensor], *, updates: int) -> None:
        """Go on with a weight from what earlier updates left."""
        step = torch.tensor(float(updates), device=weight.device)
        self.state[weight] = {"step": step, **moments}
        for group in self.param_groups:
            group["updates"] = updates


class Sgd(torch.optim.Optimizer):
    """`v = 0.9 v - lr g; w += v`: the learning rate sits inside the velocity."""

    moments = ("velocity",)
    updates = 0  # its formula does not count them

    def __init__(self, parameters: Iterable[nn.Parameter], *, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": 0.0, "decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Make one update."""
        assert closure is None
        for group in self.param_groups:
            _decay(group)
            trained = [weight for weight in group["params"] if weight.grad is not None]
            velocities = [self._velocity(weight) for weight in trained]
            torch._foreach_mul_(velocities, MOMENTUM)
            torch._foreach_add_(velocities, [w.grad for w in trained], alpha=-group["lr"])
            torch._foreach_add_(trained, velocities)

    def restore(self, weight: Tensor, moments: dict[str, Tensor], *, updates: int) -> None:
        """Go on with a weight from what earlier updates left."""
        self.state[weight] = dict(moments)

    def _velocity(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(weight)
        return state["velocity"]


def make_optimizer(parameters: Iterable[nn.Parameter], params: OptimizerParams) -> Adam | Sgd:
    """The optimiser that the settings name; its learning rate is set before each update."""
    trained = [weight for weight in parameters if weight.requires_grad]
    if params.name == "adam":
        return Adam(trained, weight_decay=params.weight_decay)
    return Sgd(trained, weight_decay=params.weight_decay)


def _decay(group: dict[str, Any]) -> None:
    if group["decay"]:
        torch._foreach_mul_(group["params"], 1 - group["decay"])
