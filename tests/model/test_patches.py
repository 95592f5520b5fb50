"""A patch embedding is a convolution whose kernel is its stride."""

import torch
from einops import rearrange

from vatt.model.patches import PatchEmbedding, cut, num_patches


def test_video_patches_equal_a_strided_convolution():
    positions = torch.nn.Module()
    positions.forward = lambda grid: torch.zeros(1)
    embed = PatchEmbedding(
        ("frames", "height", "width"),
        (2, 4, 4),
        channels=3,
        dim=5,
        positions=positions,
        dropout=0.0,
    )
    video = torch.randn(2, 4, 8, 12, 3)
    kernel = rearrange(embed.project.weight, "d (t h w c) -> d c t h w", t=2, h=4, w=4)
    expected = torch.nn.functional.conv3d(
        rearrange(video, "b t h w c -> b c t h w"), kernel, embed.project.bias, stride=(2, 4, 4)
    )
    torch.testing.assert_close(
        embed(video), rearrange(expected, "b d t h w -> b (t h w) d"), rtol=1e-4, atol=1e-5
    )


def test_counts_round_up():
    assert num_patches((32, 224, 224), (4, 16, 16)) == (8, 14, 14)
    assert num_patches((32, 320, 320), (4, 16, 16)) == (8, 20, 20)
    assert num_patches((153600,), (128,)) == (1200,)
    assert num_patches((150, 80), (16, 5)) == (10, 16)
    assert num_patches((5, 17), (4, 16)) == (2, 2)


def test_a_waveform_is_cut_in_order_and_filled_with_silence():
    waveform = torch.arange(1.0, 6.0)[None, :, None]
    assert cut(waveform, (2,)).tolist() == [[[1, 2], [3, 4], [5, 0]]]
