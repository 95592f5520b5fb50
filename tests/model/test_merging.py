"""Merging tokens equals the same rules written token by token, and loses nothing of duplicates."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from tests.model.golden import DEVICES
from tests.model.small import small_inputs, small_params
from tests.training import tiny
from tests.training.tiny import needs_compiler
from vatt.checkpoint import build
from vatt.config import SizeParams
from vatt.model.merging import STEPS, merge, num_merged, token_counts
from vatt.model.transformer import Encoder, set_merging
from vatt.training.engine import apply_options

SIZE = SizeParams(depth=3, dim=12, mlp_dim=24, heads=2, head_dim=4)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def naive_merge(tokens, keys, sizes, count):
    """One clip: tokens (N, D), keys (heads, N, head_dim), sizes (N,) -> merged tokens and sizes."""
    directions = [key / key.norm() for key in keys.mean(0)]
    first, second = range(1, len(tokens), 2), range(2, len(tokens), 2)
    partner, likeness = {}, {}
    for one in first:
        cosines = {
            other: round((directions[one] @ directions[other]).item() * STEPS) for other in second
        }
        partner[one] = max(cosines, key=lambda other: (cosines[other], -other))
        likeness[one] = cosines[partner[one]]
    leaving = sorted(first, key=lambda one: (-likeness[one], one))[:count]
    groups = [[0], *([one] for one in first if one not in leaving)]
    groups += [[other, *(one for one in leaving if partner[one] == other)] for other in second]
    means = [
        sum(sizes[place] * tokens[place] for place in group) / sum(sizes[place] for place in group)
        for group in groups
    ]
    return torch.stack(means), torch.stack([sum(sizes[place] for place in g) for g in groups])


def norm(x, module):
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-6) * module.weight + module.bias


def naive_encoder(encoder, tokens, rate):
    """One clip (N, D); a key of size s counts as s keys."""
    sizes = torch.ones(len(tokens)).double()
    for number, block in enumerate(encoder.blocks, start=1):
        normed = norm(tokens, block.attention_norm)
        qkv = normed @ block.attention.qkv.weight.T + block.attention.qkv.bias
        query, key, value = (part.unflatten(1, (2, 4)) for part in qkv.split(8, dim=-1))
        mixed = torch.empty(len(tokens), 2, 4).double()
        for head in range(2):
            for row in range(len(tokens)):
                counts = sizes * torch.exp(query[row, head] @ key[:, head].T / 2)
                mixed[row, head] = counts @ value[:, head] / counts.sum()
        out = block.attention.out
        tokens = tokens + mixed.flatten(1) @ out.weight.T + out.bias
        count = int(rate * (len(tokens) - 1))
        if count and number < len(encoder.blocks):
            tokens, sizes = naive_merge(tokens, key.transpose(0, 1), sizes, count)
        hidden = norm(tokens, block.mlp_norm) @ block.mlp.hidden.weight.T + block.mlp.hidden.bias
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        tokens = tokens + hidden @ block.mlp.out.weight.T + block.mlp.out.bias
    return norm(tokens, encoder.norm)


@pytest.mark.parametrize(("tokens", "rate"), [(14, 0.25), (9, 0.5), (3, 0.5), (12, 0.1), (4, 0.0)])
def test_the_encoder_equals_merging_token_by_token(tokens, rate):
    torch.manual_seed(0)
    encoder, inputs = Encoder(SIZE, dropout=0.0).double(), random(3, tokens, 12)
    found = encoder(inputs, merge_rate=rate)
    expected = torch.stack([naive_encoder(encoder, clip, rate) for clip in inputs])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(encoder(inputs, merge_rate=rate, wanted=1), expected[:, :1])


@given(tokens=st.integers(2, 25), rate=st.floats(0, 0.5), seed=st.integers(0, 99))
def test_merging_keeps_agg_and_the_sum_of_all_tokens(tokens, rate, seed):
    count = num_merged(tokens, rate)
    assume(count)
    inputs, keys = random(2, tokens, 6, seed=seed), random(2, 3, tokens, 4, seed=seed + 1)
    sizes = torch.randint(1, 9, (2, tokens), generator=torch.Generator().manual_seed(seed)).double()
    merged, new_sizes = merge(inputs, keys, sizes, count)
    assert merged.shape == (2, tokens - count, 6) and new_sizes.shape == merged.shape[:2]
    assert torch.equal(merged[:, 0], inputs[:, 0]) and torch.equal(new_sizes[:, 0], sizes[:, 0])
    assert torch.equal(new_sizes.sum(1), sizes.sum(1))
    weighted = (merged * new_sizes[..., None]).sum(1)
    torch.testing.assert_close(weighted, (inputs * sizes[..., None]).sum(1))


@pytest.mark.parametrize(("copies", "depth"), [(2, 2), (4, 3)])
def test_merged_duplicates_are_attended_to_as_often_as_there_were_copies(copies, depth):
    """AGG and every copy of 5 tokens: merging all copies changes no output at all."""
    torch.manual_seed(0)
    size = SIZE.model_copy(update={"depth": depth})
    encoder, different = Encoder(size, dropout=0.0).double(), random(2, 6, 12)
    tokens = torch.cat([different[:, :1], different[:, 1:].repeat_interleave(copies, 1)], dim=1)
    assert token_counts(tokens.shape[1], 0.5, depth)[-1] == 6
    whole, merged = encoder(tokens), encoder(tokens, merge_rate=0.5)
    assert merged.shape[1] == 6
    torch.testing.assert_close(merged[:, 0], whole[:, 0])
    torch.testing.assert_close(merged[:, 1:], whole[:, 1::copies])


def test_the_counts_of_all_blocks_are_those_that_the_encoder_sees():
    encoder, seen = Encoder(SIZE, dropout=0.0), []
    for block in encoder.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    encoder(torch.randn(2, 21, 12), merge_rate=0.3)
    assert seen == token_counts(21, 0.3, 3) == [21, 15, 11]


@pytest.mark.parametrize("device", DEVICES)
def test_a_clip_is_merged_alike_in_any_batch(device):
    torch.manual_seed(0)
    encoder, tokens = Encoder(SIZE, dropout=0.0).to(device), torch.randn(5, 30, 12).to(device)
    whole = encoder(tokens, merge_rate=0.4)
    alone = torch.cat([encoder(clip, merge_rate=0.4) for clip in tokens.split(1)])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_merging_gives_the_same_bits_again(device):
    torch.manual_seed(0)
    encoder = Encoder(SIZE, dropout=0.0).to(device)
    tokens = torch.randn(4, 40, 12).round().to(device)  # many equal similarities
    found = []
    for _ in range(5):
        output = encoder(tokens, merge_rate=0.5)
        found.append((output, torch.autograd.grad(output.sum(), list(encoder.parameters()))))
    for output, gradients in found[1:]:
        assert torch.equal(output, found[0][0])
        assert all(map(torch.equal, gradients, found[0][1]))


@pytest.mark.parametrize("recipe", ["paper", "release"])
@pytest.mark.parametrize("backbone", ["specific", "agnostic"])
def test_pictures_and_sound_merge_and_words_never_do(recipe, backbone):
    torch.manual_seed(0)
    model = build(small_params(recipe=recipe, backbone=backbone)).eval()
    inputs = small_inputs()
    before = model.encode(*inputs)
    set_merging(model, 0.5)
    merged = model.encode(*inputs)
    assert torch.equal(merged["text"], before["text"])
    assert not torch.allclose(merged["video"], before["video"], atol=1e-4)
    assert not torch.allclose(merged["audio"], before["audio"], atol=1e-4)
    set_merging(model, 0.0)
    again = model.encode(*inputs)
    assert torch.equal(again["video"], before["video"]) and torch.equal(
        again["audio"], before["audio"]
    )


def test_products_in_bf16_change_a_merged_feature_a_little():
    torch.manual_seed(0)
    encoder, tokens = Encoder(SIZE, dropout=0.0), torch.randn(8, 30, 12)
    exact = encoder(tokens, wanted=1, merge_rate=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        rough = encoder(tokens, wanted=1, merge_rate=0.3)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    assert (rough - exact).square().mean() < 0.01 * exact.square().mean()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"activation_checkpointing": True}, id="checkpointed"),
        pytest.param({"compile": True, "micro_batch_size": 4}, id="compiled", marks=needs_compiler),
    ],
)
def test_computing_again_and_compiling_change_no_gradient(options):
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encoder = Encoder(SIZE, dropout=0.0).double()

        def gradients(self):
            output = self.encoder(random(4, 20, 12), wanted=1, merge_rate=0.3)
            return torch.autograd.grad(output.square().sum(), list(self.parameters()))

    plain, changed = Towers(), Towers()
    apply_options(changed, tiny.machine_params(**options), backend="eager")
    for ours, expected in zip(changed.gradients(), plain.gradients(), strict=True):
        torch.testing.assert_close(ours, expected)


@needs_compiler  # which is looked for, though the backend does not use it
def test_blocks_of_many_lengths_compile_into_few_forms():
    """Each block sees another number of tokens; torch stops compiling at too many forms."""
    forms = []

    def backend(graph, inputs):
        forms.append(len(inputs))
        return graph.forward

    encoder = Encoder(SIZE.model_copy(update={"depth": 16}), dropout=0.0).eval()
    tokens = torch.randn(2, 200, 12)
    expected = encoder(tokens, merge_rate=0.1)
    torch._dynamo.reset()
    apply_options(encoder, tiny.machine_params(compile=True), backend=backend)
    torch.testing.assert_close(encoder(tokens, merge_rate=0.1), expected)
    assert len(forms) <= 6
