"""Inside the encoders: mean input tokens and mean activations, equal to naive loops."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.evaluation.clips import MODEL, batches
from vatt.config import ExpertsParams
from vatt.data.loading.batches import model_inputs
from vatt.evaluation.evaluate import routing_metrics
from vatt.evaluation.passes import inner_views, untrained


@pytest.fixture(scope="module")
def encoder():
    torch.set_num_threads(1)
    return untrained(MODEL, seed=0)


@torch.inference_mode()
def test_a_videos_nodes_and_input_equal_a_loop_over_clips_and_layers(encoder):
    found = inner_views(encoder, batches(clips=5, batch_size=2))
    (batch,) = batches(clips=5, batch_size=5)
    video = model_inputs(batch)["video"]
    tokens = encoder.video.embed(video)
    np.testing.assert_allclose(found["input/video"], tokens.mean(1), atol=1e-5)
    state = torch.cat([encoder.video.agg_token.expand(5, 1, -1), tokens], dim=1)
    for layer, block in enumerate(encoder.video.encoder.blocks):
        half = state + block.attention(block.attention_norm(state))[0]
        active = torch.nn.functional.gelu(block.mlp.hidden(block.mlp_norm(half)))
        np.testing.assert_allclose(found["nodes/video"][layer], active.mean((0, 1)), atol=1e-5)
        state = block(state)
    assert found["input/video/clip_ids"].tolist() == batch.clip_ids


def test_pads_count_nowhere(encoder):
    (batch,) = batches(clips=4, batch_size=4)
    longer = torch.cat([batch.text, torch.zeros_like(batch.text)], dim=2)
    plain, padded = (
        inner_views(encoder, [replace(batch, signals=batch.signals | {"text": text})])
        for text in (batch.text, longer)
    )
    for name in ("input/text", "nodes/text"):
        np.testing.assert_allclose(plain[name], padded[name], atol=1e-5)


def test_a_clip_without_a_modality_is_left_out_of_it(encoder):
    (batch,) = batches(clips=4, batch_size=4)
    has_audio = torch.tensor([True, False, True, False])
    found = inner_views(encoder, [replace(batch, present=batch.present | {"audio": has_audio})])
    assert found["input/audio/clip_ids"].tolist() == [batch.clip_ids[0], batch.clip_ids[2]]
    silent = inner_views(
        encoder, [replace(batch, present=batch.present | {"audio": has_audio & False})]
    )
    assert "nodes/audio" not in silent


def sparse(backbone="agnostic"):
    deep = MODEL.video.size.model_copy(update={"depth": 3})
    towers = {
        name: getattr(MODEL, name).model_copy(update={"size": deep})
        for name in ("video", "audio", "text")
    }
    experts = ExpertsParams(number=3, top_k=2)
    params = MODEL.model_copy(update={**towers, "experts": experts, "backbone": backbone})
    return untrained(params, seed=0)


@torch.inference_mode()
def test_choices_of_experts_are_those_of_the_routers():
    model = sparse()
    found = inner_views(model, batches(clips=5, batch_size=2))
    (batch,) = batches(clips=5, batch_size=5)
    video, _, texts = model_inputs(batch).values()
    encoder = model.video.encoder
    tokens = model.video.prepend_agg(model.video.embed(video))
    block = encoder.blocks[1]
    state, _ = encoder.blocks[0](tokens)
    half, _ = block.attend(state, None, None)
    chosen = block.mlp.router(block.mlp_norm(half)).topk(2).indices
    counts = np.stack([np.bincount(one.flatten(), minlength=3) for one in chosen])
    assert np.array_equal(found["experts/video"], counts[:, None])
    words = 1 + (texts[:, 0] != 0).sum(1)  # pads take no expert
    assert np.array_equal(found["experts/text"].sum((1, 2)), 2 * words.numpy())
    assert found["nodes/video"].shape == (3, 16)


def test_specialisation_is_that_of_the_shares_and_has_an_interval():
    views = inner_views(sparse(), batches(clips=12, batch_size=4))
    views |= {f"untrained/{name}": views[name] for name in views if name.startswith("experts/")}
    metrics = routing_metrics(views, resamples=50, seed=0)
    found = metrics["pretrained"]
    assert {name: len(of) for name, of in found["shares"].items()} == {
        "video": 1, "audio": 1, "text": 1
    }  # fmt: skip
    for of in found["shares"].values():
        np.testing.assert_allclose(np.sum(of, axis=1), 1, atol=1e-3)
    one = found["specialisation"]
    assert 0 <= one["low"] <= one["value"] <= one["high"] <= 1 and one["n"] <= 12
    assert metrics["untrained"]["specialisation"] == one
    dense = inner_views(untrained(MODEL, seed=0), batches(clips=4, batch_size=4))
    assert routing_metrics(dense, resamples=50, seed=0) == {}
