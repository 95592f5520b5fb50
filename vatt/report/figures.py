"""Which pictures the report shows, made from curves and arrays; an absent one is left out."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vatt.report.inputs import Arrays, Inputs
from vatt.report.svg import COLOURS, Picture, densities, lines, matrix, scatter

ENCODERS = {"pretrained": "pre-trained", "untrained": "untrained"}  # in the arrays: in words
STARTS = {"pretrained": "from the pre-trained weights", "scratch": "from scratch"}
FEWEST_CLIPS = 8  # that make a map
SMOOTH_SHARE = 0.02  # of a curve, for its moving mean
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


def similarity_densities(inputs: Inputs) -> list[Picture]:
    """Cosines of a clip with its own partner and with the others' (figure 3, output space)."""
    tables = inputs.arrays.get("similarities", {})
    pictures = []
    for direction, title in (
        ("text_to_video", "Text and video"),
        ("audio_to_video", "Sound and video"),
    ):
        if direction in tables and len(tables[direction]) > 2:
            table = tables[direction]
            own = np.eye(len(table), dtype=bool)
            groups = [("own partner", table[own]), ("another clip's", table[~own])]
            pictures.append(densities(title, groups, x_label="cosine"))
    return pictures


def confusions(inputs: Inputs) -> list[Picture]:
    """Confusion matrices of the fine-tuned classifiers, pre-trained start."""
    pictures = []
    for name, arrays in inputs.arrays.items():
        if name.startswith("predictions-") and name.endswith("-pretrained"):
            picture = _confusion(name.split("-", 1)[1].removesuffix("-pretrained"), arrays)
            pictures += [picture] if picture else []
    return pictures


def _confusion(task: str, arrays: Arrays) -> Picture | None:
    classes = [str(name) for name in arrays["classes"]]
    if len(classes) > MATRIX_CLASSES:
        return None
    return matrix(
        f"Confusions: {task}",
        arrays["confusion"],
        classes,
        caption="Rows: what it is. Columns: what was answered.",
    )
