"""A patch embedding is a convolution whose kernel is its stride."""

import pytest
import torch
from einops import rearrange

from tests.model.golden import DEVICES
from vatt.model.patches import PatchEmbedding, cut, num_patches
from vatt.senses import SENSES


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("sizes", "patch"),
    [
        ((8, 8, 12), (4, 4, 4)),
        ((5, 6, 7), (2, 4, 4)),
        ((3, 4, 4), (1, 2, 2)),
        ((1, 4, 4), (1, 4, 4)),
    ],
)
def test_a_videos_energy_is_the_change_of_every_value_summed_by_voxel(sizes, patch, device):
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (2, *sizes, 3), generator=generator, dtype=torch.uint8)
    grid = num_patches(sizes, patch)
    expected = torch.zeros(2, *grid, dtype=torch.long)
    for clip in range(2):
        for frame in range(sizes[0]):
            other = frame - 1 if frame else min(1, sizes[0] - 1)
            for row in range(sizes[1]):
                for column in range(sizes[2]):
                    one, before = (video[clip, t, row, column].tolist() for t in (frame, other))
                    change = sum(abs(a - b) for a, b in zip(one, before, strict=True))
                    place = (frame // patch[0], row // patch[1], column // patch[2])
                    expected[(clip, *place)] += change
    found = cut(SENSES["video"].energy(video.to(device)), patch).sum(-1)
    assert found.cpu().tolist() == expected.flatten(1).tolist()


def test_a_voxel_that_nothing_crosses_has_no_motion():
    video = torch.full((1, 4, 8, 8, 3), 200, dtype=torch.uint8)
    video[:, 2:, 4:, :4] = 0
    energy = cut(SENSES["video"].energy(video), (2, 4, 4)).sum(-1)
    assert energy.tolist() == [[0] * 6 + [200 * 4 * 4 * 3, 0]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("patch", [4, 5])
def test_a_waveforms_energy_is_the_sum_of_squares_by_segment(patch, device):
    wave = torch.randint(-(2**15), 2**15, (2, 16), dtype=torch.int16)
    wave[0, 0] = -(2**15)
    parts = [[row[at : at + patch] for at in range(0, 16, patch)] for row in wave.tolist()]
    expected = [[sum(value**2 for value in part) for part in row] for row in parts]
    energy = SENSES["audio"].energy(wave.to(device))
    assert cut(energy[..., None], (patch,)).sum(-1).tolist() == expected


@pytest.mark.parametrize("device", DEVICES)
def test_a_spectrogram_s_energy_counts_from_the_clip_s_lowest_level(device):
    levels = torch.randint(-9, 9, (2, 5, 4)) / 4
    energy = SENSES["audio"].energy(levels.to(device))
    found = cut(energy[..., None], (2, 2)).sum(-1).view(2, 3, 2)
    for clip in range(2):
        above = (levels[clip] - levels[clip].min()) * 4096
        for row in range(3):
            for column in range(2):
                part = above[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                assert found[clip, row, column].item() == part.sum().item()  # 0 in the padding
