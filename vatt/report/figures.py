"""Which pictures the report shows, made from curves and arrays; an absent one is left out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vatt.report.inputs import Arrays, Inputs
from vatt.report.svg import COLOURS, Picture, densities, heat, lines, matrix, scatter

ENCODERS = {"pretrained": "pre-trained", "untrained": "untrained"}  # in the arrays: in words
STARTS = {"pretrained": "from the pre-trained weights", "scratch": "from scratch"}
FEWEST_CLIPS = 8  # that make a map
SMOOTH_SHARE = 0.02  # of a curve, for its moving mean
MODALITIES = ("video", "audio", "text")
MATRIX_CLASSES = 16  # more do not fit a picture


def learning_curves(inputs: Inputs) -> list[Picture]:
    """Pre-training's losses, then each fine-tuning task's, starts side by side."""
    pictures = []
    history = inputs.curves.get("pretrain")
    if history:
        series = [
            (name, *_curve(history, key))
            for key, name in (("nce", "video–audio (NCE)"), ("mil_nce", "video–text (MIL-NCE)"))
            if key in history[0]
        ]
        series = series or [("loss", *_curve(history, "loss"))]
        pictures.append(
            lines(
                "Pre-training",
                series,
                x_label="step",
                y_label="loss",
                caption="The two contrastive losses over the global batch.",
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
    """t-SNE of the test clips' video features by label, both encoders (figure 2)."""
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
    """t-SNE of both partners of the same clips, before the encoder and in the common space."""
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
    """Rows of the same clips, in one space; None when there are none."""
    if left is None or right is None or left.shape != right.shape:
        return None
    if not unit:
        return left, right
    one, other = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12)
                  for v in (left, right))  # fmt: skip
    return one, other


def similarity_densities(inputs: Inputs) -> list[Picture]:
    """Cosines of a clip with its own partner and with the others' (figure 3).

    In the output space, and in the input space where two modalities have tokens of one width.
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
                if space == "output":  # a clip's captions may each be a row
                    columns = tables.get(f"{direction}/own", columns)
                own = columns[:, None] == np.arange(table.shape[1])
                groups = [("own partner", table[own]), ("another clip's", table[~own])]
                pictures.append(densities(f"{title}, {space} space", groups, x_label="cosine"))
    return pictures


def _input_cosines(insides: Arrays, other: str) -> NDArray[np.floating] | None:
    """Cosines of mean input tokens, rows `other`, columns video; None when widths differ."""
    pair = _input_pairs(insides, other)
    if pair is None:
        return None
    right, left = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in pair)
    return np.asarray(left @ right.T)


def _input_pairs(insides: Arrays, other: str) -> tuple[NDArray[Any], NDArray[Any]] | None:
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
    """How active every MLP node is on average, by layer, a picture a modality (figure 4)."""
    insides = inputs.arrays.get("insides", {})
    nodes = {name: insides[f"nodes/{name}"] for name in MODALITIES if f"nodes/{name}" in insides}
    if not nodes:
        return []
    shared = (inputs.model or {}).get("model", {}).get("backbone") == "agnostic"
    first = next(iter(nodes.values()))
    top = max(float(np.quantile(values, 0.99)) for values in nodes.values())
    order = "video's activation" if shared else "their activation"
    return [
        heat(
            f"MLP nodes, {name}",
            np.take_along_axis(values, np.argsort(first if shared else values, axis=1), axis=1),
            top=top,
            x_label=f"nodes of a layer, by {order}",
            y_label="layer",
            caption=f"Mean activation after the GELU, from 0 (empty) to {top:.2f} (full).",
        )
        for name, values in nodes.items()
    ]


def confusions(inputs: Inputs) -> list[Picture]:
    """Confusion matrices of the fine-tuned classifiers, pre-trained start."""
    pictures = []
    for name, arrays in inputs.arrays.items():
        if name.startswith("predictions-") and name.endswith("-pretrained"):
            picture = _confusion(name.split("-", 1)[1].removesuffix("-pretrained"), arrays)
            pictures += [picture] if picture else []
    return pictures


def _confusion(task: str, arrays: Arrays) -> Picture | None:
    counts, classes = arrays["confusion"], [str(name) for name in arrays["classes"]]
    if not len(classes) or not counts.any():
        return None
    caption = "Rows: what it is. Columns: what was answered."
    if len(classes) > MATRIX_CLASSES:
        counts, classes = _worst(counts, classes)
        caption += (
            f" Of {len(arrays['classes'])} classes the {MATRIX_CLASSES} with most errors; "
            "“other” is all the rest."
        )
    return matrix(f"Confusions: {task}", counts, classes, caption=caption)


def _worst(
    counts: NDArray[np.integer], classes: Sequence[str]
) -> tuple[NDArray[np.integer], list[str]]:
    """The classes with most errors, and one that stands for all others."""
    wrong = counts.sum(axis=1) - np.diagonal(counts)
    chosen = np.sort(np.argsort(-wrong, kind="stable")[:MATRIX_CLASSES])
    group = np.full(len(classes), MATRIX_CLASSES)
    group[chosen] = np.arange(MATRIX_CLASSES)
    small = np.zeros((MATRIX_CLASSES + 1, MATRIX_CLASSES + 1), dtype=np.int64)
    np.add.at(small, (group[:, None], group[None]), counts)
    return small, [*(classes[place] for place in chosen), "other"]
