"""Random weights, as the release draws them (SPEC section 3)."""

import math
from collections.abc import Iterable

from torch import Tensor, nn

from vatt.model.positions import AxisPositions
from vatt.model.tower import TextTower, Tower
from vatt.model.transformer import Attention


def initialise(model: nn.Module) -> None:
    """Draw every weight of a model anew from torch's global generator."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            _glorot(module)
        elif isinstance(module, nn.Embedding):
            nn.init.uniform_(module.weight, -0.05, 0.05)
        elif isinstance(module, AxisPositions | Tower | TextTower):
            for parameter in module.parameters(recurse=False):
                _truncated_normal(parameter)
    for module in model.modules():
        if isinstance(module, Attention):
            _glorot_each(module.qkv.weight.chunk(3))  # three layers, kept as one


def _glorot_each(weights: Iterable[Tensor]) -> None:
    for weight in weights:
        nn.init.xavier_uniform_(weight)


def _glorot(linear: nn.Linear) -> None:
    nn.init.xavier_uniform_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def _truncated_normal(tensor: Tensor) -> None:
    """Cut at two standard deviations of dim^-0.5."""
    std = 1 / math.sqrt(tensor.shape[-1])
    nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)
