"""Charts as small SVG pictures: text in the page's own letters and colours, light and dark.

Every picture is drawn on a 420 x 300 board, so that a letter is as large on a phone, where one
stands in a row, as on a desk, where there are three.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import ArrayLike, NDArray

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 44
HEAT_COLUMNS, HEAT_LEVELS = 64, 10
LEGEND_LETTERS = 60
NAME_LETTERS = 12  # of a class beside a matrix
NAME_ROOM = 0.08  # of an axis, beyond points that bear names
COLOURS = 10  # --c0 to --c9 of the style sheet


@dataclass(frozen=True, slots=True)
class Picture:
    """A chart with what it says in words, for those who cannot see it."""

    title: str
    svg: Markup
    alt: str
    legend: tuple[tuple[int, str], ...] = ()  # colour, name
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Axes:
    """Maps values to the board, with round ticks."""

    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, xs: ArrayLike, ys: ArrayLike) -> NDArray[np.float64]:
        """Values -> points on the board: (n,), (n,) -> (n, 2)."""
        across = (np.asarray(xs, dtype=float) - self.x[0]) / (self.x[1] - self.x[0])
        up = (np.asarray(ys, dtype=float) - self.y[0]) / (self.y[1] - self.y[0])
        return np.stack(
            [
                LEFT + across * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
            ],
            axis=-1,
        )

    def frame(self, x_label: str, y_label: str) -> str:
        """Grid lines, ticks and the names of the axes."""
        parts = []
        for tick in ticks(*self.y):
            ((_, y),) = self.place([self.x[0]], [tick])
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            parts.append(_text(LEFT - 7, y + 4, _tick(tick), anchor="end"))
        for tick in ticks(*self.x):
            ((x, _),) = self.place([tick], [self.y[0]])
            parts.append(_text(x, HEIGHT - BOTTOM + 18, _tick(tick)))
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label))
        parts.append(_text(13, (TOP + HEIGHT - BOTTOM) / 2, y_label, turned=-90))
        return "".join(parts)


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between two values."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (5, 2, 1) if (high - low) / (step * factor) >= 2)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [count * step for count in range(first, last + 1)]


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _text(x: float, y: float, words: str, *, anchor: str = "middle", turned: float = 0.0) -> str:
    turn = f' transform="rotate({turned:g} {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turn}>{escape(words)}</text>'


def _short(name: str) -> str:
    """A class's name where there is room for a word."""
    return name if len(name) <= NAME_LETTERS else f"{name[: NAME_LETTERS - 1]}…"


def _svg(body: str, alt: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(alt)}">{body}</svg>'
    )


def lines(
    title: str,
    series: Sequence[tuple[str, ArrayLike, ArrayLike]],
    *,
    x_label: str,
    y_label: str,
    caption: str = "",
    from_zero: bool = False,
    points: Sequence[str] = (),
) -> Picture:
    """Curves over a common axis; with `points`, dots, and a name over each place of the curves."""
    all_x = np.concatenate([np.asarray(xs, dtype=float) for _, xs, _ in series])
    all_y = np.concatenate([np.asarray(ys, dtype=float) for _, _, ys in series])
    room = NAME_ROOM if points else 0.0
    axes = Axes(x=_span(all_x, room=room), y=_span(all_y, from_zero=from_zero, room=room))
    body = axes.frame(x_label, y_label)
    placed = [axes.place(xs, ys) for _, xs, ys in series]
    for colour, curve in enumerate(placed):
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in curve)
        body += f'<polyline class="curve s{colour % COLOURS}" points="{corners}"/>'
        for (x, y), _ in zip(curve, points, strict=False):
            body += f'<circle class="f{colour % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
    for place, name in enumerate(points):
        x, y = min((curve[place] for curve in placed), key=lambda at: at[1])
        body += _text(x, y - 7, name)
    ends = ", ".join(
        f"{name} from {np.asarray(ys)[0]:.3g} to {np.asarray(ys)[-1]:.3g}" for name, _, ys in series
    )
    alt = f"{title}: {ends}, over {x_label} {all_x.min():g} to {all_x.max():g}"
    legend = tuple((i, name) for i, (name, _, _) in enumerate(series)) if len(series) > 1 else ()
    return Picture(title=title, svg=_svg(body, alt), alt=alt, legend=legend, caption=caption)


def scatter(
    title: str, points: NDArray[np.floating], labels: Sequence[str], *, caption: str = ""
) -> Picture:
    """Points of a plane without meaningful axes, coloured by label."""
    names = sorted(set(labels))
    colour = {name: i % COLOURS for i, name in enumerate(names)}
    low, high = points.min(axis=0), points.max(axis=0)
    scaled = (points - low) / np.maximum(high - low, 1e-12)
    placed = np.stack([10 + scaled[:, 0] * (WIDTH - 20), 10 + scaled[:, 1] * (HEIGHT - 20)], axis=1)
    body = "".join(
        f'<circle class="f{colour[label]}" cx="{x:.1f}" cy="{y:.1f}" r="3.4">'
        f"<title>{escape(label)}</title></circle>"
        for (x, y), label in zip(placed, labels, strict=True)
    )
    alt = f"{title}: {len(labels)} clips coloured by {len(names)} labels"
    legend = tuple((colour[name], name[:LEGEND_LETTERS]) for name in names)
    legend = legend if len(names) <= COLOURS else ()
    return Picture(title=title, svg=_svg(body, alt), alt=alt, legend=legend, caption=caption)


def densities(
    title: str, groups: Sequence[tuple[str, ArrayLike]], *, x_label: str, caption: str = ""
) -> Picture:
    """Smooth densities of several groups of values, each of area 1."""
    values = [np.asarray(group, dtype=float).ravel() for _, group in groups]
    low, high = _span(np.concatenate(values))
    low, high = low - 0.06 * (high - low), high + 0.06 * (high - low)  # where the kernel ends
    grid = np.linspace(low, high, 120)
    series = [
        (name, grid, _density(group, grid)) for (name, _), group in zip(groups, values, strict=True)
    ]
    picture = lines(title, series, x_label=x_label, y_label="density", from_zero=True)
    means = ", ".join(
        f"{name} mean {group.mean():.2f}" for (name, _), group in zip(groups, values, strict=True)
    )
    alt = f"{title}: {means}"
    return Picture(title=title, svg=picture.svg, alt=alt, legend=picture.legend, caption=caption)


def _density(values: NDArray[np.float64], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """A Gaussian kernel with Scott's width, over a histogram: pairs are many."""
    width = max(values.std() * len(values) ** -0.2, (grid[-1] - grid[0]) / 200)
    counts, edges = np.histogram(values, bins=400, range=(grid[0], grid[-1]))
    centres = (edges[:-1] + edges[1:]) / 2
    kernel = np.exp(-0.5 * ((grid[:, None] - centres[None]) / width) ** 2)
    return kernel @ counts / (counts.sum() * width * math.sqrt(2 * math.pi))


def matrix(
    title: str, counts: NDArray[np.integer], names: Sequence[str], *, caption: str = ""
) -> Picture:
    """A confusion matrix: rows are what it is, columns what was answered."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = min(WIDTH - 76, HEIGHT - 40) / len(names)
    left, top = WIDTH - size * len(names) - 40, 6
    cells = []
    for i, name in enumerate(names):
        middle = top + (i + 0.5) * size
        cells.append(_text(left - 6, middle + 4, _short(name), anchor="end"))
        for j, answer in enumerate(names):
            share = shares[i, j]
            tip = f"{name} answered as {answer}: {counts[i, j]} ({100 * share:.0f} %)"
            cells.append(
                f'<rect class="cell" x="{left + j * size:.1f}" y="{top + i * size:.1f}" '
                f'width="{size - 1.5:.1f}" height="{size - 1.5:.1f}" '
                f'fill-opacity="{0.05 + 0.95 * share:.2f}"><title>{escape(tip)}</title></rect>'
            )
    bottom = top + size * len(names)
    for j, answer in enumerate(names):
        x = left + (j + 0.5) * size
        cells.append(_text(x, bottom + 12, _short(answer), anchor="end", turned=-35))
    right = float(np.trace(counts) / max(counts.sum(), 1))
    alt = f"{title}: {100 * right:.1f} % of {counts.sum()} clips on the diagonal"
    return Picture(title=title, svg=_svg("".join(cells), alt), alt=alt, caption=caption)


def heat(
    title: str,
    values: NDArray[np.floating],
    *,
    top: float,
    x_label: str,
    y_label: str,
    caption: str = "",
) -> Picture:
    """Values from 0 to `top` as shades; rows from the bottom up, columns put together in bins."""
    columns = min(HEAT_COLUMNS, values.shape[1])
    bins = np.stack([part.mean(axis=1) for part in np.array_split(values, columns, axis=1)], axis=1)
    levels = np.rint(np.clip(bins / max(top, 1e-12), 0, 1) * HEAT_LEVELS).astype(int)
    wide, high = (WIDTH - LEFT - RIGHT) / columns, (HEIGHT - TOP - BOTTOM) / len(values)
    body = ""
    for level in range(1, HEAT_LEVELS + 1):
        cells = "".join(
            f"M{LEFT + column * wide:.1f} {HEIGHT - BOTTOM - (row + 1) * high:.1f}"
            f"h{wide:.1f}v{high:.1f}h{-wide:.1f}z"
            for row, column in np.argwhere(levels == level)
        )
        if cells:
            body += f'<path class="cell" fill-opacity="{level / HEAT_LEVELS:.2f}" d="{cells}"/>'
    for row in {0, len(values) // 2, len(values) - 1}:
        y = HEIGHT - BOTTOM - (row + 0.5) * high
        body += _text(LEFT - 7, y + 4, str(row + 1), anchor="end")
    body += _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, anchor="middle")
    body += _text(12, HEIGHT / 2, y_label, anchor="middle", turned=-90)
    active = ", ".join(f"{row + 1}: {mean:.3f}" for row, mean in enumerate(values.mean(axis=1)))
    alt = f"{title}: mean by {y_label} {active}"
    return Picture(title=title, svg=_svg(body, alt), alt=alt, caption=caption)


def _span(
    values: NDArray[np.float64], *, from_zero: bool = False, room: float = 0.0
) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    low = min(low, 0.0) if from_zero else low
    spare = room * (high - low)
    return (low - spare, high + spare) if high > low else (low - 0.5, high + 0.5)
