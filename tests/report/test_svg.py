"""Charts: values land where they belong."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vatt.report.figures import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axes,
    densities,
    heat,
    lines,
    matrix,
    scatter,
    ticks,
)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_inside(low, width):
    marks = ticks(low, low + width)
    assert 2 <= len(marks) <= 8
    assert all(low - 1e-6 * width <= mark <= low + width * (1 + 1e-6) for mark in marks)


def test_the_corners_of_the_axes_are_the_corners_of_the_frame():
    axes = Axes(x=(0, 10), y=(-1, 1))
    corners = axes.place([0, 10], [-1, 1])
    assert corners.tolist() == [[LEFT, HEIGHT - BOTTOM], [WIDTH - RIGHT, TOP]]


def test_a_curve_has_a_point_for_every_value_and_says_where_it_begins_and_ends():
    picture = lines("Loss", [("loss", [0, 1, 2], [3.0, 2.0, 1.0])], x_label="step", y_label="loss")
    (points,) = re.findall(r'points="([^"]*)"', picture.svg)
    assert len(points.split()) == 3
    assert "loss from 3 to 1" in picture.alt


def test_a_name_stands_over_the_highest_of_the_curves_points():
    series = [("low", [1, 2], [0.0, 1.0]), ("high", [1, 2], [2.0, 0.5])]
    svg = lines("rates", series, x_label="x", y_label="y", points=["first", "second"]).svg
    dots = [float(y) for y in re.findall(r'<circle[^>]*cy="([^"]*)"', svg)]
    named = [float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>(?:first|second)', svg)]
    assert len(dots) == 4 and min(named) > TOP
    assert named == pytest.approx([min(dots[0], dots[2]) - 7, min(dots[1], dots[3]) - 7])


def test_a_constant_curve_can_be_drawn():
    assert "polyline" in lines("flat", [("y", [1], [2.0])], x_label="x", y_label="y").svg


def test_a_density_has_area_one_and_stands_where_the_values_are():
    values = np.random.default_rng(0).normal(0.3, 0.05, 4000)
    picture = densities("cosines", [("own", values)], x_label="cosine")
    (points,) = re.findall(r'points="([^"]*)"', picture.svg)
    x, y = np.array([point.split(",") for point in points.split()], float).T
    peak = x[y.argmin()]
    across = (peak - LEFT) / (WIDTH - LEFT - RIGHT)
    span = values.max() - values.min()
    assert values.min() - 0.06 * span + across * 1.12 * span == pytest.approx(0.3, abs=0.03)
    assert "own mean 0.30" in picture.alt


def test_a_scatter_has_a_named_dot_for_every_clip():
    picture = scatter("map", np.random.default_rng(0).random((5, 2)), ["b", "a", "b", "a", "<a>"])
    assert picture.svg.count("<circle") == 5
    assert "&lt;a&gt;" in picture.svg
    assert [name for _, name in picture.legend] == ["<a>", "a", "b"]


def test_a_confusion_matrix_counts_and_shades_by_row():
    picture = matrix("answers", np.array([[3, 1], [0, 0]]), ["x", "y"])
    assert "75.0 % of 4 clips on the diagonal" in picture.alt
    assert picture.svg.count("<rect") == 4
    assert "x predicted as y: 1 (25 %)" in picture.svg


def test_a_heat_map_shades_the_cells_that_are_not_zero_from_the_bottom_up():
    values = np.asarray([[0.0, 1.0], [0.5, 0.0]])
    picture = heat("nodes", values, top=1.0, x_label="node", y_label="layer")
    shades = dict(re.findall(r'fill-opacity="([^"]*)" d="M([^h]*)h', picture.svg))
    assert shades.keys() == {"0.50", "1.00"}
    (low_x, low_y), (high_x, high_y) = (map(float, shades[s].split()) for s in ("1.00", "0.50"))
    assert (low_x, high_x) == ((LEFT + WIDTH - RIGHT) / 2, LEFT)
    assert (low_y, high_y) == ((TOP + HEIGHT - BOTTOM) / 2, TOP)
    assert "1: 0.500, 2: 0.250" in picture.alt
