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


@pytest.fixture(params=[True, False])
def narrow(request, monkeypatch):
    """A processor on which convolutions are the faster, and one on which they are not."""
    monkeypatch.setattr(operators, "_library_is_narrow", lambda: request.param)
    return request.param


def gradients(output, *inputs):
    torch.manual_seed(1)
    return torch.autograd.grad(output, inputs, torch.randn_like(output))


def close(left, right, tolerance):
    for one, other in zip(left, right, strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 7, 24), (5, 24), (2, 3, 4, 24)])
def test_linear_equals_torchs_in_fp32(shape, bias, narrow):
    torch.manual_seed(0)
    layer, inputs = Linear(24, 40, bias=bias), torch.randn(*shape, requires_grad=True)
    fast = layer(inputs)
    fast_gradients = gradients(fast, inputs, *layer.parameters())
    with plain_operators():
        plain = layer(inputs)
    plain_gradients = gradients(plain, inputs, *layer.parameters())
    assert ("Convolution" in str(fast.grad_fn)) == narrow
    assert "Convolution" not in str(plain.grad_fn)
    close([fast, *fast_gradients], [plain, *plain_gradients], 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_take_torchs_linear(dtype, narrow):
    layer = Linear(8, 8).to(dtype)
    assert "Convolution" not in str(layer(torch.randn(4, 8, dtype=dtype)).grad_fn)


def test_linear_under_bf16_autocast_is_torchs():
    layer = Linear(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(4, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_equals_torchs(dtype, tolerance, biased):
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


@pytest.mark.parametrize(
    ("vendor", "family", "narrow"),
    [("AuthenticAMD", 26, True), ("AuthenticAMD", 25, False), ("GenuineIntel", 26, False)],
)
def test_the_processor_says_whether_the_library_is_narrow(vendor, family, narrow, monkeypatch):
    facts = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 2\n"
    monkeypatch.setattr(operators.Path, "read_text", lambda *_, **__: facts)
    assert operators._library_is_narrow.__wrapped__() == narrow


def test_the_switch_is_off_again_afterwards(monkeypatch):
    monkeypatch.setattr(operators, "_library_is_narrow", lambda: True)
    with pytest.raises(RuntimeError), plain_operators():
        raise RuntimeError
    assert "Convolution" in str(Linear(4, 4)(torch.randn(2, 4)).grad_fn)


def test_attention_computed_again_gives_the_same_gradients():
    """Activation checkpointing lets a backward pass ask for what was saved just once."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 17, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def attend(query, key, value):
        return attention(query, key, value, bias=None, scale=0.3, dropout=0.0)

    direct = gradients(attend(*inputs), *inputs)
    again = gradients(checkpoint(attend, *inputs, use_reentrant=False), *inputs)
    close(again, direct, 0.0)
