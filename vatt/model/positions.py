"""Learned positions: one table for each axis, summed, and resized for inputs of other sizes.

N positions, D width.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vatt.errors import SettingsError

Resize = Callable[[Tensor, int], Tensor]


def bicubic(table: Tensor, size: int) -> Tensor:  # (n, D) -> (size, D)
    """Resize a table as an image one pixel wide.

    The paper resizes the summed positions of an image; cubic weights sum to one, so resizing each
    axis' table alone gives the same sum.
    """
    if len(table) == size:
        return table
    image = rearrange(table.float(), "n d -> 1 d n 1")
    resized = F.interpolate(image, size=(size, 1), mode="bicubic", align_corners=False)
    return rearrange(resized, "1 d n 1 -> n d")


def spline(table: Tensor, size: int) -> Tensor:  # (n, D) -> (size, D)
    """Resize a table as the release does: a polyharmonic spline of order 3 with an affine term.

    Its nodes are i / n, its queries j / size. The small linear system is solved in fp64.
    """
    num = len(table)
    if num == size:
        return table
    nodes = torch.arange(num, dtype=torch.float64, device=table.device)[:, None] / num
    queries = torch.arange(size, dtype=torch.float64, device=table.device)[:, None] / size
    affine = torch.cat([nodes, torch.ones_like(nodes)], dim=1)
    corner = torch.zeros(2, 2, dtype=torch.float64, device=table.device)
    system = torch.cat(
        [
            torch.cat([(nodes - nodes.T).abs() ** 3, affine], dim=1),
            torch.cat([affine.T, corner], dim=1),
        ]
    )
    values = torch.cat([table.double(), table.new_zeros(2, table.shape[1], dtype=torch.float64)])
    basis = torch.cat([(queries - nodes.T).abs() ** 3, queries, torch.ones_like(queries)], dim=1)
    # A table of one row has no slope; the least-squares inverse then leaves it constant.
    return (basis @ torch.linalg.pinv(system) @ values).to(table.dtype)


def first(table: Tensor, size: int) -> Tensor:  # (n, D) -> (size, D)
    """The first rows, for words: a sentence's length says nothing of how far apart they are."""
    if size > len(table):
        raise SettingsError(
            f"the input's words are {size}; allowed are 1 to {len(table)}, the model's positions",
            hint="cut the text",
        )
    return table[:size]


class AxisPositions(nn.Module):
    """The position of a token is the sum of its axes' entries, then `norm`."""

    def __init__(
        self, axes: Sequence[str], grid: Sequence[int], dim: int, *, norm: nn.Module, resize: Resize
    ) -> None:
        super().__init__()
        self.axes = tuple(axes)
        for axis, size in zip(axes, grid, strict=True):
            self.register_parameter(axis, nn.Parameter(torch.empty(size, dim)))
        self.norm = norm
        self.resize = resize

    def forward(self, grid: Sequence[int]) -> Tensor:  # -> (N, D), the first axis slowest
        total: Tensor | None = None
        for axis, size in zip(self.axes, grid, strict=True):
            table = self.resize(self.get_parameter(axis), size)
            total = table if total is None else total[..., None, :] + table
        assert total is not None
        return self.norm(total.flatten(0, -2))


class ReleasedSpectrogramPositions(AxisPositions):
    """The release's fault, for its weights only: positions run along time first, tokens do not."""

    def __init__(
        self, axes: Sequence[str], grid: Sequence[int], dim: int, *, norm: nn.Module, resize: Resize
    ) -> None:
        super().__init__(axes[::-1], grid[::-1], dim, norm=norm, resize=resize)

    def forward(self, grid: Sequence[int]) -> Tensor:
        return super().forward(grid[::-1])


def fit_tables(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights whose position tables have `model`'s sizes: the others' are resized."""
    fitted = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, AxisPositions):
            for axis in module.axes:
                key = f"{name}.{axis}" if name else axis
                if key in fitted:
                    size = len(module.get_parameter(axis))
                    fitted[key] = module.resize(fitted[key], size).to(fitted[key].dtype)
    return fitted
