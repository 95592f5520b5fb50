"""A GPU gives the CPU's numbers; bf16 takes flash attention; compiled equals eager."""

import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.model.golden import CUDA
from tests.model.small import small_inputs, small_params
from vatt.checkpoint import build
from vatt.config import SizeParams
from vatt.losses import FORMS, pretraining_loss
from vatt.model.transformer import Encoder

pytestmark = pytest.mark.parametrize("device", [CUDA])
KINDS = list(itertools.product(["paper", "release"], ["specific", "agnostic"]))


def trained_once(recipe, backbone, device):
    """Embeddings, loss and gradients of one step, in fp32, without dropout."""
    torch.manual_seed(0)
    model = build(small_params(recipe=recipe, backbone=backbone, dropout=0.0)).train().to(device)
    video, audio, text = (part.to(device) for part in small_inputs(6))
    has_text = (text != 0).any(-1)
    kept = torch.tensor([[5, 0, 3]], device=device).expand(6, -1)
    features = model.encode(video, audio, text, kept_video=kept)
    embeddings = model.project(features, {"text": has_text})
    everyone = torch.ones(6, dtype=torch.bool, device=device)
    losses = pretraining_loss(
        embeddings,
        {"video": everyone, "audio": everyone, "text": has_text},
        temperature=0.07,
        mil_nce_weight=1.0,
        form=FORMS[recipe],
    )
    losses.total.backward()
    found = embeddings.named() | {"loss": losses.total}
    found |= {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    return {name: value.detach().cpu() for name, value in found.items()}


@pytest.mark.parametrize(("recipe", "backbone"), KINDS)
def test_a_training_step_equals_the_cpus(recipe, backbone, device):
    ours, expected = (trained_once(recipe, backbone, place) for place in (device, "cpu"))
    floor = 1e-5 * max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=floor)


def encoder(device):
    torch.manual_seed(0)
    size = SizeParams(depth=2, dim=128, mlp_dim=256, heads=2, head_dim=64)
    return Encoder(size, dropout=0.0).to(device), torch.randn(2, 40, 128).to(device)


def test_bf16_runs_on_flash_attention_alone(device):
    model, tokens = encoder(device)
    exact = model(tokens)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast(device, torch.bfloat16):
        flash = model(tokens)
        flash.sum().backward()
    torch.testing.assert_close(
        flash.float(), exact, rtol=2e-2, atol=2e-2 * exact.abs().max().item()
    )


def test_compiled_equals_eager(device):
    model, tokens = encoder(device)
    torch.testing.assert_close(torch.compile(model)(tokens), model(tokens), rtol=1e-4, atol=1e-4)
