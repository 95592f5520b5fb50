"""Positions are sums of axes' tables, resized for other sizes."""

import numpy as np
import pytest
import torch

from tests.model.golden import group
from vatt.model.patches import AxisPositions, bicubic, fit_tables
from vatt.model.transformer import RelativeBias, relative_bucket
from vatt.release.model import NormedPositions, ScrambledPositions, spline

CASES = ["14_to_20", "8_to_16", "8_to_5", "3_to_7", "4_to_4"]


def released(kind, axes, name):
    found = {key: torch.from_numpy(value) for key, value in group("positions", f"{name}/").items()}
    tables = [found[f"table_{axis}"] if len(axes) > 1 else found["table"] for axis in axes]
    renamed = ["spectral" if axis == "spectoral" else axis for axis in axes]
    positions = kind(renamed, [len(table) for table in tables], 6)
    state = dict(zip(renamed, tables, strict=True))
    positions.load_state_dict(
        {**state, "norm.weight": found["ln_gamma"], "norm.bias": found["ln_beta"]}
    )
    return positions, found["out"] - found["in"]


@pytest.mark.parametrize("case", CASES)
def test_the_spline_equals_the_release_in_forward_and_restore(case):
    found = {key: torch.from_numpy(value) for key, value in group("positions", "interp/").items()}
    size = int(case.split("_")[-1])
    resized = spline(found[f"{case}/in"], size)
    torch.testing.assert_close(resized, found[f"{case}/restore"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(resized, found[f"{case}/forward_lookup"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "axes", "name", "grid"),
    [
        (NormedPositions, ("temporal",), "temporal", (12,)),
        (NormedPositions, ("temporal", "vertical", "horizontal"), "spatiotemporal", (4, 5, 4)),
        (ScrambledPositions, ("temporal", "spectoral"), "spectrotemporal", (3, 4)),
    ],
)
def test_positions_equal_the_release(kind, axes, name, grid):
    positions, expected = released(kind, axes, name)
    difference = positions(grid) - expected
    assert difference.abs().max() < 1e-3


def test_the_relative_bias_equals_t5():
    found = {key: torch.from_numpy(value) for key, value in group("positions", "t5_rel/").items()}
    place = torch.arange(90)
    buckets = relative_bucket(place[None] - place[:, None], 32, 64)
    assert torch.equal(buckets, found["bucket_ids_90x90"].long())
    relative = RelativeBias(2)
    relative.load_state_dict({"table.weight": found["table"]})
    torch.testing.assert_close(relative(20), found["bias_20x20"])


def cubic_weight(distance: float, a: float = -0.75) -> float:
    """Keys' cubic convolution kernel, as image libraries use it."""
    distance = abs(distance)
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    if distance < 2:
        return a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    return 0.0


@pytest.mark.parametrize(("old", "new"), [(14, 20), (8, 5), (3, 7), (1, 4)])
def test_bicubic_equals_the_convolution_kernel(old, new):
    table = torch.randn(old, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(new, 3)
    for i in range(new):
        place = (i + 0.5) * old / new - 0.5
        for j in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            expected[i] += cubic_weight(place - j) * table[min(max(j, 0), old - 1)]
    torch.testing.assert_close(bicubic(table, new), expected, rtol=1e-4, atol=1e-5)


def test_resizing_each_axis_equals_resizing_the_summed_image():
    generator = torch.Generator().manual_seed(0)
    vertical, horizontal = (torch.randn(14, 5, generator=generator) for _ in range(2))
    image = (vertical[:, None] + horizontal[None]).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(image, size=(20, 24), mode="bicubic")[0]
    ours = bicubic(vertical, 20)[:, None] + bicubic(horizontal, 24)[None]
    torch.testing.assert_close(ours.permute(2, 0, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisPositions, NormedPositions])
def test_restored_tables_give_the_positions_of_the_forward_pass(kind):
    small, large = (kind(("a", "b"), grid, 4) for grid in ((2, 3), (4, 5)))
    for table in small.parameters():
        torch.nn.init.normal_(table)
    large.load_state_dict(fit_tables(small.state_dict(), large))
    torch.testing.assert_close(large((4, 5)), small((4, 5)))


@pytest.mark.parametrize("resize", [bicubic, spline])
@pytest.mark.parametrize(("old", "new"), [(1, 3), (2, 5), (6, 3)])
def test_a_constant_table_stays_constant(resize, old, new):
    torch.testing.assert_close(resize(torch.full((old, 2), 3.0), new), torch.full((new, 2), 3.0))
