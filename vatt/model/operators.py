"""The two operators that take nearly all of the time, each on the fastest path of its machine.

The model calls `Linear` and `attention` and knows no more. Everything here gives the same numbers
as the plain operators, to 1e-5 in fp32 and 2e-2 in bf16; `plain_operators` turns the choice off.
Measured by bench/encoder.py.

B clips, N tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_plain: ContextVar[bool] = ContextVar("plain_operators", default=False)
_WORTH_IT = 2**26  # multiply-adds below which a convolution's preparation costs more than it saves


@contextmanager
def plain_operators() -> Iterator[None]:
    """Within it, `Linear` and `attention` are torch's own."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


class Linear(nn.Linear):
    """A linear layer."""

    def forward(self, inputs: Tensor) -> Tensor:
        work = inputs.numel() * self.out_features
        if work < _WORTH_IT or not _fast_on_cpu(inputs) or _type_of(inputs) != torch.float32:
            return F.linear(inputs, self.weight, self.bias)
        return _ConvolutionLinear.apply(inputs, self.weight, self.bias)


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
    bias = None if bias is None else bias.to(query.dtype)
    if not _fast_on_cpu(query):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale
        )
    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    if bias is not None:
        scores = scores + bias
    weights = scores.softmax(dim=-1)
    if dropout > 0:
        weights = F.dropout(weights, p=dropout)
    return torch.matmul(weights, value)


def full_precision(values: Tensor) -> Tensor:
    """At least fp32: what leaves the towers and goes through statistics and losses."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class _ConvolutionLinear(torch.autograd.Function):
    """A linear layer as a 1 x 1 convolution, which takes oneDNN's fp32 path."""

    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inputs, weight)
        ctx.has_bias = bias is not None
        return _convolve(inputs, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:  # type: ignore[no-untyped-def]
        inputs, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            _convolve(gradient, weight.t(), None),
            rows.t() @ inputs.reshape(-1, inputs.shape[-1]),
            rows.sum(0) if ctx.has_bias else None,
        )


def _convolve(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    image = inputs.reshape(1, -1, 1, inputs.shape[-1]).permute(0, 3, 1, 2)  # channels last
    product = F.conv2d(image, weight[:, :, None, None], bias)
    return product.permute(0, 2, 3, 1).reshape(*inputs.shape[:-1], weight.shape[0])


def _fast_on_cpu(inputs: Tensor) -> bool:
    tracing = torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()
    return inputs.device.type == "cpu" and not tracing and not _plain.get()


def _type_of(inputs: Tensor) -> torch.dtype:
    """The type in which a product of `inputs` is computed."""
    kind = inputs.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
