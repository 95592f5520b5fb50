"""The operators' fast paths give torch's own numbers."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from vatt.model import operators
from vatt.model.operators import Linear, attention, plain_operators


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    monkeypatch.setattr(operators, "_WORTH_IT", 0)
    monkeypatch.setattr(operators, "_CHUNK", 4 * 17 * 17)  # six heads: four, then two


def gradients(output, *inputs):
    torch.manual_seed(1)
    cotangent = torch.randn(output.shape).to(output.dtype)  # the same numbers in each type
    return torch.autograd.grad(output, inputs, cotangent)


def close(left, right, tolerance):
    for one, other in zip(left, right, strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_takes_torchs_linear(dtype):
    layer, inputs = Linear(8, 8).to(dtype), torch.randn(4, 8, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float64):
        output = layer(inputs)
    assert output.dtype == dtype
    assert "Addmm" in str(output.grad_fn)


@pytest.fixture(params=[True, False])
def halves(request, monkeypatch):
    """A processor for which the rows of a product are halved, and one for which they are not."""
    monkeypatch.setattr(operators, "_one_thread_works", lambda *_: request.param)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 7, 24), (5, 24), (2, 3, 4, 24)])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_linear_equals_torchs_in_bf16(given, weights, shape, bias, halves):
    torch.manual_seed(0)
    layer = Linear(24, 40, bias=bias).to(weights)
    inputs = torch.randn(*shape, dtype=given, requires_grad=True)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(inputs)
        return [output, *gradients(output, inputs, *layer.parameters())]

    fast = run()
    with plain_operators():
        plain = run()
    assert "Half" in str(fast[0].grad_fn)
    assert "Half" not in str(plain[0].grad_fn)
    assert [one.dtype for one in fast] == [one.dtype for one in plain]
    close(fast, plain, 2e-2)


def test_a_frozen_linear_gives_gradients_of_its_inputs_alone():
    layer = Linear(8, 8).requires_grad_(False)
    inputs = torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (to_inputs,) = gradients(layer(inputs), inputs)
    close([to_inputs], [gradients(inputs @ layer.weight.t(), inputs)[0]], 2e-2)


def test_weights_changed_between_forward_and_backward_are_an_error():
    """The backward pass casts them again, and would use the wrong ones."""
    layer, inputs = Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(inputs)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.fixture(params=[2**24, 0])
def kept(request, monkeypatch):
    """Attention weights that are kept, or computed again."""
    monkeypatch.setattr(operators, "KEPT", request.param)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_equals_torchs(dtype, tolerance, biased, kept):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 17, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    bias = torch.randn(2, 1, 1, 17) * 3 if biased else None

    def run():
        output = attention(*inputs, bias=bias, scale=0.35, dropout=0.0)
        return [output, *gradients(output, *inputs)]

    fast = run()
    with plain_operators():
        plain = run()
    assert ("Chunked" in str(fast[0].grad_fn)) == (dtype == torch.bfloat16 and not biased)
    close(fast, plain, tolerance)


def test_fewer_queries_than_keys_equal_the_first_of_all():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 17, 8).bfloat16()
    some, all_ = (
        attention(part, key, value, bias=None, scale=0.35, dropout=0.0)
        for part in (query[:, :, :2], query)
    )
    close([some], [all_[:, :, :2]], 2e-2)


def test_the_switch_is_off_again_afterwards():
    with pytest.raises(RuntimeError), plain_operators():
        raise RuntimeError
    with torch.autocast("cpu", torch.bfloat16):
        assert "Half" in str(Linear(4, 4)(torch.randn(2, 4)).grad_fn)


def test_attention_computed_again_gives_the_same_gradients(kept):
    """Under activation checkpointing a backward pass may read saved tensors once only."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 17, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def attend(query, key, value):
        return attention(query, key, value, bias=None, scale=0.3, dropout=0.0)

    direct = gradients(attend(*inputs), *inputs)
    again = gradients(checkpoint(attend, *inputs, use_reentrant=False), *inputs)
    close(again, direct, 0.0)


@pytest.mark.parametrize(
    ("rows", "columns", "threads", "tiles", "cut"),
    [
        (785, 768, 2, True, True),
        (640, 768, 2, True, False),
        (3140, 768, 2, True, False),
        (785, 3072, 2, True, False),
        (785, 768, 4, True, False),
        (785, 768, 2, False, False),
    ],
)
def test_which_products_are_cut_in_halves(rows, columns, threads, tiles, cut, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert operators._one_thread_works(rows, columns) == cut
