"""The encoder equals a naive loop over the pre-norm Transformer's formulas."""

import math

import pytest
import torch
from torch import Tensor

from vatt.config import SizeParams
from vatt.model.operators import attention
from vatt.model.transformer import Encoder

SIZE = SizeParams(depth=2, dim=12, mlp_dim=24, heads=2, head_dim=4)


def norm(x: Tensor, module: torch.nn.Module) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-6) * module.weight + module.bias


def naive(encoder: Encoder, tokens: Tensor, biases: list[Tensor]) -> Tensor:
    for block, bias in zip(encoder.blocks, biases, strict=True):
        normed = norm(tokens, block.attention_norm)
        qkv = normed @ block.attention.qkv.weight.T + block.attention.qkv.bias
        query, key, value = qkv.split(8, dim=-1)
        heads = []
        for h in range(2):
            part = slice(4 * h, 4 * h + 4)
            scores = query[..., part] @ key[..., part].transpose(1, 2) / 2 + bias[:, h]
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            heads.append(weights @ value[..., part])
        mixed = torch.cat(heads, dim=-1)
        tokens = tokens + mixed @ block.attention.out.weight.T + block.attention.out.bias
        hidden = norm(tokens, block.mlp_norm) @ block.mlp.hidden.weight.T + block.mlp.hidden.bias
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        tokens = tokens + hidden @ block.mlp.out.weight.T + block.mlp.out.bias
    return norm(tokens, encoder.norm)


def test_the_encoder_equals_the_formulas():
    torch.manual_seed(0)
    encoder = Encoder(SIZE, dropout=0.1).double().eval()
    tokens = torch.randn(3, 5, 12, dtype=torch.float64)
    biases = [torch.randn(3, 2, 5, 5, dtype=torch.float64) for _ in range(2)]
    torch.testing.assert_close(encoder(tokens, biases), naive(encoder, tokens, biases))


@pytest.mark.parametrize("biased", [True, False])
def test_the_first_tokens_alone_are_those_of_all(biased):
    torch.manual_seed(0)
    encoder, tokens = Encoder(SIZE, dropout=0.0).double(), torch.randn(3, 5, 12).double()
    biases = [torch.randn(3, 1, 1, 5).double(), torch.randn(1, 2, 5, 5).double()] if biased else ()
    whole, first = encoder(tokens, biases), encoder(tokens, biases, wanted=2)
    torch.testing.assert_close(first, whole[:, :2])
    gradients = [
        torch.autograd.grad(part.square().sum(), list(encoder.parameters()))
        for part in (whole[:, :2], first)
    ]
    for ours, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, expected)


def test_without_positions_permuting_tokens_permutes_the_output():
    torch.manual_seed(0)
    encoder = Encoder(SIZE, dropout=0.0)
    tokens, order = torch.randn(2, 6, 12), torch.randperm(6)
    torch.testing.assert_close(encoder(tokens[:, order]), encoder(tokens)[:, order])


def test_training_drops_and_evaluation_does_not():
    torch.manual_seed(0)
    encoder, tokens = Encoder(SIZE, dropout=0.5), torch.randn(2, 6, 12)
    assert not torch.equal(encoder(tokens), encoder(tokens))
    encoder.eval()
    assert torch.equal(encoder(tokens), encoder(tokens))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_weights_sum_to_one_on_average(dropout):
    torch.manual_seed(0)
    query, value = torch.randn(2, 3, 50, 4), torch.ones(2, 3, 50, 4)
    mixed = attention(query, query, value, bias=None, scale=0.5, dropout=dropout)
    assert mixed.mean().item() == pytest.approx(1.0, abs=0.05)
