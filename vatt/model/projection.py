"""Features -> common spaces: a fine one of video and audio, a coarser one of video and text.

B clips, K candidate texts of a clip, D feature width, E common-space width.
"""

import torch
from torch import Tensor, nn

from vatt.model.operators import Linear, full_precision
from vatt.senses.form import Sense


class BatchNorm(nn.Module):
    """Batch norm whose statistics can leave rows out; if no row is left, it uses the running ones.

    The running variance is updated with the biased variance of the batch, as in the release.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, rows: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, E) -> (B, E), fp32; statistics come from rows where `valid` (B,) holds."""
        rows = full_precision(rows)
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = self._observe(rows, valid)
        return (rows - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias

    def _observe(self, rows: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        if valid is None:
            mean = rows.sum(0) / len(rows)
            var = (rows - mean).square().sum(0) / len(rows)
        else:
            weights = valid[:, None].to(rows.dtype)
            count = weights.sum()
            mean = (rows * weights).sum(0) / count.clamp(min=1)
            var = ((rows - mean).square() * weights).sum(0) / count.clamp(min=1)
            mean = torch.where(count > 0, mean, self.running_mean)
            var = torch.where(count > 0, var, self.running_var)
        with torch.no_grad():
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(var.detach(), self.momentum)
        return mean, var


class NormalisedLinear(nn.Module):
    """A linear layer and its batch norm; the norm has a bias, so the layer needs none."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear = Linear(in_dim, out_dim, bias=False)
        self.norm = BatchNorm(out_dim)

    def forward(self, rows: Tensor, valid: Tensor | None = None) -> Tensor:
        return self.norm(self.linear(rows), valid)


class Heads(nn.Module):
    """g_v->va, g_a->va, g_v->vt (which starts from the va vector) and g_t->vt.

    A head is called <sense>_to_<space>; `va_to_vt` leads from one space to the other.
    """

    va_to_vt: nn.Module

    def __init__(self, **heads: nn.Module) -> None:
        super().__init__()
        for name, head in heads.items():
            self.add_module(name, head)

    def into(self, sense: Sense, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """Features (B, D) or (B, K, D) in the space that the sense joins, not yet of length 1.

        Statistics of batch norm come from the rows where `valid` holds, if that is known.
        """
        head = self.get_submodule(f"{sense.name}_to_{sense.space}")
        rows, several = features.flatten(0, -2), features.shape[:-1]
        known = () if valid is None else (valid.flatten(),)
        projected: Tensor = head(rows, *known)
        return projected.unflatten(0, several)
