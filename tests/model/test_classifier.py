"""A classifier is a tower of VATT and a linear layer."""

import math

import pytest
import torch

from tests.model.small import small_inputs, small_params
from vatt.checkpoint import load_weights
from vatt.model.patches import fit_tables
from vatt.model.vatt import VATT, Classifier


@pytest.mark.parametrize("backbone", ["specific", "agnostic"])
@pytest.mark.parametrize("modality", ["video", "audio"])
def test_a_towers_weights_move_over_by_name(backbone, modality):
    model = VATT(small_params(backbone=backbone)).eval()
    classifier = Classifier(model.params, modality=modality, num_classes=5, head_dropout=0.5).eval()
    tower = getattr(model, modality)
    load_weights(classifier.backbone, tower.state_dict())
    video, audio, _ = small_inputs()
    features = model.encode(video=video, audio=audio)
    expected = classifier.head(features[modality])
    logits = classifier(video if modality == "video" else audio)
    assert logits.shape == (3, 5)
    torch.testing.assert_close(logits, expected)


def test_an_image_is_a_video_one_voxel_deep():
    model = VATT(small_params()).eval()
    video = model.params.video.model_copy(update={"frames": 2, "frame_size": 48})
    params = model.params.model_copy(update={"video": video})
    classifier = Classifier(params, modality="image", num_classes=4, head_dropout=0.0).eval()
    weights = fit_tables(model.video.state_dict(), classifier.backbone)
    classifier.backbone.load_state_dict(weights)
    assert weights["embed.positions.temporal"].shape[0] == 1
    assert weights["embed.positions.vertical"].shape[0] == 3
    image = torch.rand(2, 1, 48, 48, 3).expand(-1, 2, -1, -1, -1)
    assert classifier(image).shape == (2, 4)
    assert classifier.num_tokens == 9


def test_audio_classes_start_out_rare():
    classifier = Classifier(small_params(), modality="audio", num_classes=9, head_dropout=0.0)
    torch.testing.assert_close(classifier.head.bias, torch.full((9,), -math.log(8)))
    shares = classifier(torch.rand(2, 64)).sigmoid()
    assert 0.02 < shares.mean().item() < 0.4
