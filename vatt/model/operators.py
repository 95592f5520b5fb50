"""The two operators that take nearly all of the time, with faster forms for bf16 on a CPU.

The model only calls `Linear` and `attention`. In fp32, and on a GPU, both are torch's own. The bf16
forms agree with torch's to 2e-2; `plain_operators` turns them off. bench/encoder.py measures them,
and docs/benchmarks.md has the figures.

B clips, N tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_plain: ContextVar[bool] = ContextVar("plain_operators", default=False)
_CHUNK = 5 * 2**19  # attention weights computed at a time: 5 MB in bf16, which stay in the cache
KEPT = 2**24  # the most attention weights of a layer that are kept for the backward pass: 32 MB
_WORTH_IT = 2**26  # multiply-adds of a linear layer; our form is slower for smaller ones


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
        is_large = inputs.numel() * self.out_features >= _WORTH_IT
        if is_large and _eager_on_cpu(inputs) and product_type(inputs) == torch.bfloat16:
            return _HalfLinear.apply(inputs, self.weight, self.bias)
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
    is_plain = bias is None and not dropout and query.shape == key.shape
    if is_plain and query.dtype == torch.bfloat16 and _eager_on_cpu(query):
        keep = torch.is_grad_enabled() and key.shape[-2] * query.shape[:-1].numel() <= KEPT
        return _ChunkedAttention.apply(query, key, value, scale, keep)
    bias = None if bias is None else bias.to(query.dtype)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale
    )


def full_precision(values: Tensor) -> Tensor:
    """At least fp32: for features, for the statistics of batch norm, and for losses."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in the type of the two, also where autocast would round them to bf16."""
    kind = left.device.type
    with nullcontext() if left.is_meta else torch.autocast(kind, enabled=False):
        return left @ right


class Fused(nn.Module):
    """A part without weights that is compiled as one where blocks are."""


class FusedFunction(Fused):
    """A function as such a part; the first dimension of its first tensor is that of the clips.

    Outside of a forward pass its `forward` is called: ZeRO-3 counts the calls of every module.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        """Call the function."""
        return self.function(*inputs)


class _HalfLinear(torch.autograd.Function):
    """A linear layer in bf16 that keeps no bf16 copy of its weights or of their gradient.

    Autocast keeps a copy of the weights from the forward pass for the backward pass. Casting them
    again is faster, because the memory for the copy comes from the system page by page.
    """

    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        half = inputs.bfloat16()
        ctx.save_for_backward(half, weight)
        ctx.types = inputs.dtype, None if bias is None else bias.dtype
        return _multiply(half, weight.bfloat16().t(), None if bias is None else bias.bfloat16())

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        inputs, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        to_inputs = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_inputs = _multiply(gradient, weight.bfloat16(), None).to(ctx.types[0])
        if ctx.needs_input_grad[1]:
            product = torch.mm(rows.t(), inputs.reshape(-1, inputs.shape[-1]))
            to_weight = product.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            to_bias = rows.sum(0).to(ctx.types[1])
        return to_inputs, to_weight, to_bias


def _multiply(inputs: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """inputs @ matrix + bias: (..., n), (n, m), (m,) -> (..., m)."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    multiply = torch.mm if bias is None else partial(torch.addmm, bias)
    if _one_thread_works(len(rows), matrix.shape[1]):
        product = rows.new_empty(len(rows), matrix.shape[1])
        for some, place in zip(rows.chunk(2), product.chunk(2), strict=True):
            multiply(some, matrix, out=place)
    else:
        product = multiply(rows, matrix)
    return product.view(*inputs.shape[:-1], matrix.shape[1])


def _one_thread_works(rows: int, columns: int) -> bool:
    """Whether oneDNN leaves one of two threads idle in a product of this size.

    It does on processors with matrix tiles (Intel's AMX), for the products of one clip in the base
    tower. Given the halves of the rows one after the other, it uses both threads for each.
    """
    is_unshared = columns == 768 and 768 <= rows <= 1280
    return is_unshared and torch.get_num_threads() == 2 and torch.cpu._is_amx_tile_supported()


class _ChunkedAttention(torch.autograd.Function):
    """Attention as matrix products of a few heads at a time, so that weights stay in the cache.

    Without `keep`, the backward pass computes the weights again instead of reading them back.
    """

    @staticmethod
    def forward(ctx, query, key, value, scale: float, keep: bool) -> Tensor:  # type: ignore[no-untyped-def]
        heads = [(inputs.flatten(0, 1)).contiguous() for inputs in (query * scale, key, value)]
        output = torch.empty_like(heads[2])
        weights = _room(heads[0], whole=keep)
        for part, (queries, keys, values, mixed) in _parts(*heads, output):
            place = weights[part] if keep else weights[: len(queries)]
            torch.bmm(_weights(queries, keys, place), values, out=mixed)
        ctx.save_for_backward(*heads, weights if keep else None)
        ctx.scale = scale
        return output.view(value.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        *heads, kept = ctx.saved_tensors  # activation checkpointing allows one read only
        gradients = gradient.flatten(0, 1).contiguous()
        to_inputs = [torch.empty_like(inputs) for inputs in heads]
        room = _room(heads[0])
        spare = torch.empty_like(room) if kept is None else kept
        for part, tensors in _parts(*heads, gradients, *to_inputs):
            queries, keys, values, mixed, to_queries, to_keys, to_values = tensors
            again = kept is None
            weights = _weights(queries, keys, spare[: len(queries)]) if again else kept[part]
            torch.bmm(weights.transpose(1, 2), mixed, out=to_values)
            to_weights = torch.bmm(mixed, values.transpose(1, 2), out=room[: len(queries)])
            to_scores = torch._softmax_backward_data(
                to_weights, weights, -1, weights.dtype, grad_input=to_weights
            )
            torch.bmm(to_scores, keys, out=to_queries)
            torch.bmm(to_scores.transpose(1, 2), queries, out=to_keys)
        to_query, to_key, to_value = (inputs.view(gradient.shape) for inputs in to_inputs)
        return to_query * ctx.scale, to_key, to_value, None, None


def _parts(*tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Heads (B x heads, N, head_dim) in parts, each with attention weights that fit the cache."""
    heads, tokens, _ = tensors[0].shape
    size = _at_a_time(tokens)
    for first in range(0, heads, size):
        part = slice(first, first + size)
        yield part, [tensor[part] for tensor in tensors]


def _at_a_time(tokens: int) -> int:
    return max(1, _CHUNK // tokens**2)


def _room(heads: Tensor, *, whole: bool = False) -> Tensor:
    """Memory for the attention weights of all heads, or of one part."""
    count, tokens, _ = heads.shape
    return heads.new_empty(count if whole else min(_at_a_time(tokens), count), tokens, tokens)


def _weights(queries: Tensor, keys: Tensor, out: Tensor) -> Tensor:
    torch.bmm(queries, keys.transpose(1, 2), out=out)
    return torch.softmax(out, dim=-1, out=out)


def _eager_on_cpu(inputs: Tensor) -> bool:
    tracing = torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()
    return inputs.device.type == "cpu" and not tracing and not _plain.get()


def product_type(inputs: Tensor) -> torch.dtype:
    """The type in which a product of `inputs` is computed under the present autocast."""
    kind = inputs.device.type
    if kind == "meta":  # which has no autocast
        return inputs.dtype
    cast = torch.is_autocast_enabled(kind) and inputs.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if cast else inputs.dtype
