"""Learned positions: one table for each axis, summed, and resized for inputs of other sizes.

N positions, D width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class AxisPositions(nn.Module):
    """The position of a token is the sum of its axes' entries."""

    def __init__(self, axes: Sequence[str], grid: Sequence[int], dim: int) -> None:
        super().__init__()
        self.axes = tuple(axes)
        for axis, size in zip(axes, grid, strict=True):
            self.register_parameter(axis, nn.Parameter(torch.empty(size, dim)))

    def forward(self, grid: Sequence[int]) -> Tensor:  # -> (N, D), the first axis slowest
        total: Tensor | None = None
        for axis, size in zip(self.axes, grid, strict=True):
            table = self.resize(self.get_parameter(axis), size)
            total = table if total is None else total[..., None, :] + table
        assert total is not None
        return total.flatten(0, -2)

    def resize(self, table: Tensor, size: int) -> Tensor:  # (n, D) -> (size, D)
        """A table for an axis of another size."""
        return bicubic(table, size)


def bicubic(table: Tensor, size: int) -> Tensor:  # (n, D) -> (size, D)
    """Resize a table as an image one pixel wide.

    The paper resizes the summed positions of an image. Cubic weights sum to one, so resizing each
    axis' table alone gives the same sum.
    """
    if len(table) == size:
        return table
    image = rearrange(table.float(), "n d -> 1 d n 1")
    resized = F.interpolate(image, size=(size, 1), mode="bicubic", align_corners=False)
    return rearrange(resized, "1 d n 1 -> n d")


def fit_tables(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """These weights with their position tables resized to the sizes in `model`.

    What is not a table stays as it is: the caller compares all forms.
    """
    fitted = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, AxisPositions):
            for axis in module.axes:
                key = f"{name}.{axis}" if name else axis
                if key in fitted and _is_table(fitted[key]):
                    size = len(module.get_parameter(axis))
                    fitted[key] = module.resize(fitted[key], size).to(fitted[key].dtype)
    return fitted


def _is_table(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and tensor.is_floating_point() and tensor.numel() > 0
