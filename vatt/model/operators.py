"""The two operators that take nearly all of the time, each on the fastest path of its machine.

The model calls `Linear` and `attention` and knows no more. Everything here gives the same numbers
as the plain operators, to 1e-5 in fp32 and 2e-2 in bf16; `plain_operators` turns the choice off.
Measured by bench/encoder.py.

B clips, N tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_plain: ContextVar[bool] = ContextVar("plain_operators", default=False)
_CHUNK = 5 * 2**19  # attention weights at a time: 5 MB in bf16
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
        large = inputs.numel() * self.out_features >= _WORTH_IT
        suits = large and _fast_on_cpu(inputs) and _type_of(inputs) == torch.float32
        if suits and _library_is_narrow():
            return _ConvolutionLinear.apply(inputs, self.weight, self.bias)
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
    """Softmax attention over (B, heads, N, head_dim); `bias` is added to the scaled scores.

    There may be fewer queries than keys and values.
    """
    plain = bias is None and not dropout and query.shape == key.shape
    if plain and query.dtype == torch.bfloat16 and _fast_on_cpu(query):
        return _ChunkedAttention.apply(query, key, value, scale, torch.is_grad_enabled())
    bias = None if bias is None else bias.to(query.dtype)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale
    )


def full_precision(values: Tensor) -> Tensor:
    """At least fp32: what leaves the towers and goes through statistics and losses."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@cache
def _library_is_narrow() -> bool:
    """Whether torch's fp32 matrix library (MKL) uses half of this processor's vector width.

    So it is on AMD's from Zen 5 (family 26) on. Up to Zen 4, and on Intel's, it reaches the peak.
    """
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    families = [line.split(":")[1] for line in facts.splitlines() if line.startswith("cpu family")]
    return "AuthenticAMD" in facts and int(families[0]) >= 26


class _ConvolutionLinear(torch.autograd.Function):
    """A linear layer whose products are 1 x 1 convolutions, which take oneDNN's fp32 path."""

    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inputs, weight)
        ctx.has_bias = bias is not None
        return _convolve(inputs, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        inputs, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        asked = ctx.needs_input_grad[0]
        return (
            _convolve(gradient, weight.t(), None) if asked else None,
            _outer(rows, inputs.reshape(-1, inputs.shape[-1])),
            rows.sum(0) if ctx.has_bias else None,
        )


def _convolve(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    image = inputs.reshape(1, -1, 1, inputs.shape[-1]).permute(0, 3, 1, 2)  # channels last
    product = F.conv2d(image, weight[:, :, None, None], bias)
    return product.permute(0, 2, 3, 1).reshape(*inputs.shape[:-1], weight.shape[0])


def _outer(left: Tensor, right: Tensor) -> Tensor:  # (N, n), (N, m) -> (n, m)
    """left.t() @ right: the rows are the channels of an image of m pixels."""
    return F.conv2d(right[None, :, :, None], left.t()[:, :, None, None])[0, :, :, 0]


class _ChunkedAttention(torch.autograd.Function):
    """Attention as matrix products of a few heads at a time, whose weights stay in the cache."""

    @staticmethod
    def forward(ctx, query, key, value, scale: float, keep: bool) -> Tensor:  # type: ignore[no-untyped-def]
        heads = [(inputs.flatten(0, 1)).contiguous() for inputs in (query * scale, key, value)]
        output, kept = torch.empty_like(heads[2]), []
        for queries, keys, values, mixed in zip(*map(_chunks, (*heads, output)), strict=True):
            weights = _softmax(torch.bmm(queries, keys.transpose(1, 2)))
            torch.bmm(weights, values, out=mixed)
            if keep:
                kept.append(weights)
        ctx.save_for_backward(*heads, *kept)
        ctx.scale = scale
        return output.view(value.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        saved = ctx.saved_tensors  # asked for once: activation checkpointing gives it once
        heads, gradients = saved[:3], gradient.flatten(0, 1).contiguous()
        to_inputs = [torch.empty_like(inputs) for inputs in heads]
        parts = zip(*map(_chunks, (*heads, gradients, *to_inputs)), strict=True)
        for weights, part in zip(saved[3:], parts, strict=True):
            queries, keys, values, mixed, to_queries, to_keys, to_values = part
            torch.bmm(weights.transpose(1, 2), mixed, out=to_values)
            to_weights = torch.bmm(mixed, values.transpose(1, 2))
            to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
            torch.bmm(to_scores, keys, out=to_queries)
            torch.bmm(to_scores.transpose(1, 2), queries, out=to_keys)
        to_query, to_key, to_value = (inputs.view(gradient.shape) for inputs in to_inputs)
        return to_query * ctx.scale, to_key, to_value, None, None


def _chunks(heads: Tensor) -> tuple[Tensor, ...]:
    """Heads (B x heads, N, head_dim) in parts whose attention weights fit a processor's cache."""
    return heads.split(max(1, _CHUNK // heads.shape[1] ** 2))


def _softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1, dtype=scores.dtype)


def _fast_on_cpu(inputs: Tensor) -> bool:
    tracing = torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()
    return inputs.device.type == "cpu" and not tracing and not _plain.get()


def _type_of(inputs: Tensor) -> torch.dtype:
    """The type in which a product of `inputs` is computed."""
    kind = inputs.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
