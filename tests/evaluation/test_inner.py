"""Inside the encoders: mean input tokens and mean activations, equal to naive loops."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.evaluation.clips import MODEL, batches
from vatt.data.loading.batches import model_inputs
from vatt.evaluation.passes import inner_views, untrained


@pytest.fixture(scope="module")
def encoder():
    torch.set_num_threads(1)
    return untrained(MODEL, seed=0)


@torch.inference_mode()
def test_a_videos_nodes_and_input_equal_a_loop_over_clips_and_layers(encoder):
    found = inner_views(encoder, batches(clips=5, batch_size=2))
    (batch,) = batches(clips=5, batch_size=5)
    video, _, _ = model_inputs(batch)
    tokens = encoder.video.embed(video)
    np.testing.assert_allclose(found["input/video"], tokens.mean(1), atol=1e-5)
    state = torch.cat([encoder.video.agg_token.expand(5, 1, -1), tokens], dim=1)
    for layer, block in enumerate(encoder.video.encoder.blocks):
        half = state + block.attention(block.attention_norm(state))
        active = torch.nn.functional.gelu(block.mlp.hidden(block.mlp_norm(half)))
        np.testing.assert_allclose(found["nodes/video"][layer], active.mean((0, 1)), atol=1e-5)
        state = block(state)
    assert found["input/video/clip_ids"].tolist() == batch.clip_ids


def test_pads_count_nowhere(encoder):
    (batch,) = batches(clips=4, batch_size=4)
    longer = torch.cat([batch.text, torch.zeros_like(batch.text)], dim=2)
    plain, padded = (
        inner_views(encoder, [replace(batch, text=text)]) for text in (batch.text, longer)
    )
    for name in ("input/text", "nodes/text"):
        np.testing.assert_allclose(plain[name], padded[name], atol=1e-5)


def test_a_clip_without_a_modality_is_left_out_of_it(encoder):
    (batch,) = batches(clips=4, batch_size=4)
    has_audio = torch.tensor([True, False, True, False])
    found = inner_views(encoder, [replace(batch, has_audio=has_audio)])
    assert found["input/audio/clip_ids"].tolist() == [batch.clip_ids[0], batch.clip_ids[2]]
    silent = inner_views(encoder, [replace(batch, has_audio=has_audio & False)])
    assert "nodes/audio" not in silent
