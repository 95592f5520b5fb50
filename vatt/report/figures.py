"""The charts of the report, as SVG; a chart without data is left out.

Every chart is drawn on a board of 420 x 300, so that its text has the same size on a phone (one
chart in a row) and on a desktop (three in a row).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import east_asian_width

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import ArrayLike, NDArray

from vatt.report.inputs import Inputs, NamedArrays

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 44
HEAT_COLUMNS, HEAT_LEVELS = 64, 10
LEGEND_LETTERS = 60
NAME_LETTERS = 12  # of a class next to a matrix
NAME_ROOM = 0.08  # share of an axis that stays free for the names of points
LETTER = 7.4  # the width of a letter
FEW_CLASSES, TALL = 7, 420  # a matrix of more classes is drawn on a taller board
COLOURS = 10  # --c0 to --c9 in the style sheet


@dataclass(frozen=True, slots=True)
class Picture:
    """A chart, with its content in words for readers who cannot see it."""

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
    """The name of a class, cut to the room of one word."""
    return name if len(name) <= NAME_LETTERS else f"{name[: NAME_LETTERS - 1]}…"


def _room(names: Sequence[str]) -> float:
    """The width of the longest of these shortened names; East Asian letters are twice as wide."""
    letters = [sum(1 + (east_asian_width(one) in "WF") for one in _short(name)) for name in names]
    return LETTER * max(letters) + 10


def _svg(body: str, alt: str, height: int = HEIGHT) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(alt)}">{body}</svg>'
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
    """Curves over a common axis; `points` adds a dot to each value and names the values."""
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
    """Points in a plane whose axes mean nothing, coloured by label."""
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
    low, high = low - 0.06 * (high - low), high + 0.06 * (high - low)  # for the kernel's tails
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
    """A Gaussian kernel with Scott's width over a histogram, because there are many pairs."""
    width = max(values.std() * len(values) ** -0.2, (grid[-1] - grid[0]) / 200)
    counts, edges = np.histogram(values, bins=400, range=(grid[0], grid[-1]))
    centres = (edges[:-1] + edges[1:]) / 2
    kernel = np.exp(-0.5 * ((grid[:, None] - centres[None]) / width) ** 2)
    return kernel @ counts / (counts.sum() * width * math.sqrt(2 * math.pi))


def matrix(
    title: str, counts: NDArray[np.integer], names: Sequence[str], *, caption: str = ""
) -> Picture:
    """A confusion matrix: rows are the true classes, columns the predictions."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    many, room, top = len(names) > FEW_CLASSES, _room(names), 6
    height = TALL if many else HEIGHT
    turned = -90 if many else -35  # so that names of narrow columns do not overlap
    below = room if many else room * 0.6 + 8
    size = min(WIDTH - room - 10, height - top - below) / len(names)
    left = room + max(0.0, (WIDTH - room - 10 - size * len(names)) / 2)
    cells = []
    for i, name in enumerate(names):
        middle = top + (i + 0.5) * size
        cells.append(_text(left - 6, middle + 4, _short(name), anchor="end"))
        for j, answer in enumerate(names):
            share = shares[i, j]
            tip = f"{name} predicted as {answer}: {counts[i, j]} ({100 * share:.0f} %)"
            cells.append(
                f'<rect class="cell" x="{left + j * size:.1f}" y="{top + i * size:.1f}" '
                f'width="{size - 1.5:.1f}" height="{size - 1.5:.1f}" '
                f'fill-opacity="{0.05 + 0.95 * share:.2f}"><title>{escape(tip)}</title></rect>'
            )
    bottom = top + size * len(names)
    for j, answer in enumerate(names):
        x = left + (j + 0.5) * size
        across, down = (x + 4, bottom + 4) if many else (x, bottom + 12)
        cells.append(_text(across, down, _short(answer), anchor="end", turned=turned))
    right = float(np.trace(counts) / max(counts.sum(), 1))
    alt = f"{title}: {100 * right:.1f} % of {counts.sum()} clips on the diagonal"
    svg = _svg("".join(cells), alt, height)
    return Picture(title=title, svg=svg, alt=alt, caption=caption)


def heat(
    title: str,
    values: NDArray[np.floating],
    *,
    top: float,
    x_label: str,
    y_label: str,
    caption: str = "",
) -> Picture:
    """Values from 0 to `top` as shades: rows from the bottom up, columns averaged in bins."""
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


ENCODERS = {"pretrained": "pre-trained", "untrained": "untrained"}  # name in the arrays: in words
STARTS = {"pretrained": "from the pre-trained weights", "scratch": "from scratch"}
FEWEST_CLIPS = 8  # in a map
SMOOTH_SHARE = 0.02  # of a curve: half the width of its moving mean
MATRIX_CLASSES = 16  # more do not fit into a chart


def learning_curves(inputs: Inputs) -> list[Picture]:
    """The losses of pre-training, then those of each fine-tuning task, both starts in one chart."""
    pictures = []
    history = inputs.curves.get("pretrain")
    if history:
        losses = {"nce": "video–audio (NCE)", "mil_nce": "video–text (MIL-NCE)"}
        others = [key for key in history[0] if key.startswith("nce_")]
        losses |= {key: f"video–{key.removeprefix('nce_')} (NCE)" for key in others}
        series = [
            (name, *_curve(history, key)) for key, name in losses.items() if key in history[0]
        ]
        series = series or [("loss", *_curve(history, "loss"))]
        pictures.append(
            lines(
                "Pre-training",
                series,
                x_label="step",
                y_label="loss",
                caption=f"The {'two ' if len(series) == 2 else ''}contrastive losses over the "
                "global batch.",
            )
        )
    by_task: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name, curve in inputs.curves.items():
        if name.startswith("finetune-"):
            task, _, init = name.removeprefix("finetune-").rpartition("-")
            by_task.setdefault(task, {})[init] = curve
    for task, curves in by_task.items():
        series = [
            (STARTS.get(init, init), *_curve(curve, "loss"))
            for init, curve in sorted(curves.items())
        ]
        title = f"Fine-tuning: {task}"
        pictures.append(lines(title, series, x_label="step", y_label="training loss"))
    return pictures


def _curve(
    history: Sequence[dict[str, float]], key: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and their smoothed values."""
    rows = [row for row in history if key in row]
    values = np.asarray([row[key] for row in rows], dtype=float)
    half = max(int(len(values) * SMOOTH_SHARE), 0)
    smooth = [values[max(i - half, 0) : i + half + 1].mean() for i in range(len(values))]
    return np.asarray([row["step"] for row in rows], dtype=float), np.asarray(smooth)


def feature_maps(inputs: Inputs, *, clips: int) -> list[Picture]:
    """t-SNE of the test clips' video features, coloured by label, for both encoders (figure 2)."""
    features = inputs.arrays.get("features")
    if features is None or len(features["clip_ids"]) < FEWEST_CLIPS:
        return []
    labels = {
        name.removeprefix("labels/"): values
        for name, values in features.items()
        if name.startswith("labels/") and 1 < len(set(values)) <= COLOURS
    }
    planes = {
        name: _tsne(features[f"{encoder}/video"][:clips])
        for encoder, name in ENCODERS.items()
        if labels and f"{encoder}/video" in features
    }
    return [
        scatter(f"Video features by {label}, {encoder}", plane, values[:clips].tolist())
        for label, values in labels.items()
        for encoder, plane in planes.items()
    ]


def _tsne(features: NDArray[np.floating]) -> NDArray[np.floating]:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, max(2.0, (len(features) - 1) / 3))
    plane = TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=0)
    return plane.fit_transform(features.astype(np.float64))


def space_maps(inputs: Inputs, *, clips: int) -> list[Picture]:
    """t-SNE of two modalities of the same clips, before the encoder and in the common space."""
    features, insides = inputs.arrays.get("features", {}), inputs.arrays.get("insides", {})
    pictures = []
    for space, other, name in (("vt", "text", "words"), ("va", "audio", "sound")):
        output = _pairs(features.get(f"{space}/video"), features.get(f"{space}/{other}"), unit=True)
        for title, pair in (("input", _input_pairs(insides, other)), ("output", output)):
            if pair is not None and len(pair[0]) >= FEWEST_CLIPS:
                few = [part[:clips] for part in pair]
                plane = _tsne(np.concatenate(few))
                names = ["picture"] * len(few[0]) + [name] * len(few[1])
                pictures.append(scatter(f"Picture and {name}, {title} space", plane, names))
    return pictures


def _pairs(
    left: NDArray[Any] | None, right: NDArray[Any] | None, *, unit: bool
) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Rows of the same clips in one space; None when there is no such space."""
    if left is None or right is None or left.shape != right.shape:
        return None
    if not unit:
        return left, right
    one, other = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12)
                  for v in (left, right))  # fmt: skip
    return one, other


def similarity_densities(inputs: Inputs) -> list[Picture]:
    """Cosines of matching pairs and of pairs from different clips (figure 3).

    In the output space, and in the input space if both modalities have tokens of the same width.
    """
    tables = inputs.arrays.get("similarities", {})
    insides = inputs.arrays.get("insides", {})
    pictures = []
    for direction, other, title in (
        ("text_to_video", "text", "Text and video"),
        ("audio_to_video", "audio", "Sound and video"),
    ):
        spaces = {"output": tables.get(direction), "input": _input_cosines(insides, other)}
        for space, table in spaces.items():
            if table is not None and len(table) > 2:
                columns = np.arange(len(table))
                if space == "output":  # each caption of a clip may be a row
                    columns = tables.get(f"{direction}/own", columns)
                own = columns[:, None] == np.arange(table.shape[1])
                groups = [("same clip", table[own]), ("different clips", table[~own])]
                pictures.append(densities(f"{title}, {space} space", groups, x_label="cosine"))
    return pictures


def _input_cosines(insides: NamedArrays, other: str) -> NDArray[np.floating] | None:
    """Cosines of mean input tokens, rows `other`, columns video; None when widths differ."""
    pair = _input_pairs(insides, other)
    if pair is None:
        return None
    right, left = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in pair)
    return np.asarray(left @ right.T)


def _input_pairs(insides: NamedArrays, other: str) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Mean input tokens of the clips that have video and `other`; None when widths differ."""
    if not {"input/video", f"input/{other}"} <= insides.keys():
        return None
    if insides["input/video"].shape[1] != insides[f"input/{other}"].shape[1]:
        return None
    names = ("video", other)
    ids = [insides[f"input/{name}/clip_ids"] for name in names]
    _, *rows = np.intersect1d(ids[0], ids[1], return_indices=True)
    one, two = (insides[f"input/{name}"][own] for name, own in zip(names, rows, strict=True))
    return one, two


def node_activations(inputs: Inputs) -> list[Picture]:
    """The mean activation of every MLP node by layer, a chart for each modality (figure 4)."""
    insides = inputs.arrays.get("insides", {})
    nodes = {
        key.removeprefix("nodes/"): values
        for key, values in insides.items()
        if key.startswith("nodes/")
    }
    if not nodes:
        return []
    shared = (inputs.model or {}).get("model", {}).get("backbone") == "agnostic"
    first = next(iter(nodes.values()))
    top = max(float(np.quantile(values, 0.99)) for values in nodes.values())
    order = "activation on video" if shared else "activation"
    return [
        heat(
            f"MLP nodes, {name}",
            np.take_along_axis(values, np.argsort(first if shared else values, axis=1), axis=1),
            top=top,
            x_label=f"nodes of a layer, ordered by {order}",
            y_label="layer",
            caption=f"Mean activation after the GELU, from 0 (empty) to {top:.2f} (full).",
        )
        for name, values in nodes.items()
    ]


MOST_BLOCKS = 6  # with a chart of their experts


def expert_shares(inputs: Inputs) -> list[Picture]:
    """Which experts each modality's tokens take, a chart for each block with experts."""
    shares = inputs.lookup("experts", "pretrained", "shares") or {}
    blocks = max((len(of) for of in shares.values()), default=0)
    chosen = np.linspace(0, blocks - 1, min(blocks, MOST_BLOCKS)).round().astype(int).tolist()
    return [
        _shares_picture(
            f"Experts, block {block + 1} of {blocks}",
            {name: np.asarray(of[block]) for name, of in shares.items()},
        )
        for block in chosen
    ]


def _shares_picture(title: str, shares: Mapping[str, NDArray[np.floating]]) -> Picture:
    """Rows are modalities, columns experts; darker cells have a larger share of the row."""
    room, top = _room(list(shares)), 20
    columns = max(map(len, shares.values()))
    wide, high = (WIDTH - room - 10) / columns, (HEIGHT - top - BOTTOM) / len(shares)
    body, words = "", []
    for row, (name, own) in enumerate(shares.items()):
        y = top + row * high
        body += _text(room - 6, y + high / 2 + 4, _short(name), anchor="end")
        for column, share in enumerate(own):
            tip = f"{name}, expert {column + 1}: {100 * share:.0f} %"
            body += (
                f'<rect class="cell" x="{room + column * wide:.1f}" y="{y:.1f}" '
                f'width="{wide - 1.5:.1f}" height="{high - 1.5:.1f}" '
                f'fill-opacity="{0.05 + 0.95 * share:.2f}"><title>{escape(tip)}</title></rect>'
            )
        words.append(f"{name} {', '.join(f'{100 * share:.0f} %' for share in own)}")
    step = max(1, math.ceil(columns / 16))
    for column in range(0, columns, step):
        body += _text(room + (column + 0.5) * wide, HEIGHT - BOTTOM + 16, str(column + 1))
    body += _text(room + (WIDTH - room - 10) / 2, HEIGHT - 8, "expert")
    alt = f"{title}: share of the tokens at experts 1 to {columns}: {'; '.join(words)}"
    return Picture(title=title, svg=_svg(body, alt), alt=alt)


def confusions(inputs: Inputs) -> list[Picture]:
    """Confusion matrices of the classifiers that were fine-tuned from pre-trained weights."""
    pictures = []
    for name, arrays in inputs.arrays.items():
        if name.startswith("predictions-") and name.endswith("-pretrained"):
            picture = _confusion(name.split("-", 1)[1].removesuffix("-pretrained"), arrays)
            pictures += [picture] if picture else []
    return pictures


def _confusion(task: str, arrays: NamedArrays) -> Picture | None:
    counts, classes = arrays["confusion"], [str(name) for name in arrays["classes"]]
    if not len(classes) or not counts.any():
        return None
    caption = "Rows: true class. Columns: predicted class."
    if len(classes) > MATRIX_CLASSES:
        counts, classes = _worst(counts, classes)
        caption += (
            f" The {MATRIX_CLASSES} of {len(arrays['classes'])} classes with most errors; "
            "“other” stands for all others."
        )
    return matrix(f"Confusions: {task}", counts, classes, caption=caption)


def _worst(
    counts: NDArray[np.integer], classes: Sequence[str]
) -> tuple[NDArray[np.integer], list[str]]:
    """The counts for the classes with most errors, and for one that stands for all others."""
    wrong = counts.sum(axis=1) - np.diagonal(counts)
    chosen = np.sort(np.argsort(-wrong, kind="stable")[:MATRIX_CLASSES])
    group = np.full(len(classes), MATRIX_CLASSES)
    group[chosen] = np.arange(MATRIX_CLASSES)
    small = np.zeros((MATRIX_CLASSES + 1, MATRIX_CLASSES + 1), dtype=np.int64)
    np.add.at(small, (group[:, None], group[None]), counts)
    return small, [*(classes[place] for place in chosen), "other"]
