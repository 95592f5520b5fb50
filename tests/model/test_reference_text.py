"""The release's two other text models, built from our parts: they are not in the product."""

import torch
from torch import nn

from tests.model.golden import group, ours, tensor
from vatt.config import SizeParams
from vatt.model.transformer import Encoder
from vatt.release.model import NormedPositions, PositionedWords, SharedTextTower


def test_the_bert_tower_equals_the_reference():
    size = SizeParams(depth=2, dim=16, mlp_dim=40, heads=2, head_dim=12)
    tower = SharedTextTower(
        PositionedWords(
            nn.Embedding(128, 20),
            lift=nn.Sequential(nn.Linear(20, 16, bias=False), nn.GELU()),
            positions=NormedPositions(("temporal",), (16,), 16),
            dropout=0.0,
        ),
        Encoder(size, dropout=0.0),
        dim=16,
        width=16,
    )
    tower.post = nn.Identity()
    theirs = {key.removeprefix("model/"): value for key, value in group("text_bert", "w:").items()}
    weights = {
        "embed.table.weight": torch.from_numpy(theirs.pop("embedding/embeddings")),
        "embed.lift.0.weight": torch.from_numpy(theirs.pop("pre_proj/kernel")).T,
    }
    weights |= ours({key.removeprefix("base_lm/"): value for key, value in theirs.items()})
    tower.load_state_dict(weights)
    features = tower.eval()(tensor("text_bert", "in/word_ids").long())
    expected = tensor("text_bert", "out/sentence_embeddings")
    # The spline's tolerance: 8 words in a table of 16 are interpolated, in fp32 by the reference.
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3)


def test_the_linear_tower_equals_the_reference():
    weights = {
        key: torch.from_numpy(value) for key, value in group("text_linear", "w:model/").items()
    }
    words = weights["embedding/embeddings"][tensor("text_linear", "in/word_ids").long()]
    encoded = (words @ weights["base_lm/conv1d/kernel"][0] + weights["base_lm/conv1d/bias"]).relu()
    expected = tensor("text_linear", "out/sentence_embeddings")
    torch.testing.assert_close(encoded.amax(1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        encoded, tensor("text_linear", "out/word_embeddings"), rtol=1e-4, atol=1e-4
    )
