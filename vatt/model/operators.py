"""The two operators that take nearly all of the time: `linear` and `attention`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear layer that runs on the fastest operator for its device and type."""

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight, self.bias)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """Softmax attention over (B, heads, N, head_dim); `bias` is added to the scaled scores."""
    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    if bias is not None:
        scores = scores + bias
    weights = F.dropout(scores.softmax(dim=-1), p=dropout, training=dropout > 0)
    return torch.matmul(weights.to(value.dtype), value)


def full_precision(values: Tensor) -> Tensor:
    """At least fp32: what leaves the towers and goes through statistics and losses."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
