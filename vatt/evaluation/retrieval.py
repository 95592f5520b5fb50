"""Zero-shot retrieval: a clip's text finds its video, its sound finds its video, and back.

n clips of the pool, K candidate texts, E common-space width. Only a clip's own partner is a hit.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vatt.evaluation.features import Array, FeatureSet
from vatt.metrics import Floats, Metric, measured, ranks

RECALLS = (1, 5, 10)


def draw_pool(clip_ids: NDArray[np.str_], usable: Array, size: int) -> NDArray[np.integer]:
    """Rows of the clips searched: usable ones in the order of their id's hash, fixed for good."""
    rows = np.flatnonzero(usable)
    order = sorted(rows, key=lambda row: hashlib.sha256(str(clip_ids[row]).encode()).digest())
    return np.asarray(order[:size], dtype=np.int64)


def cosine(queries: Array, targets: Array) -> Floats:
    """Cosine of every query with every target: (n, E), (m, E) -> (n, m)."""
    return _unit(queries) @ _unit(targets).T


def average_embeddings(queries: Array, several: Array, valid: Array) -> Floats:
    """Cosine with the mean of a target's valid vectors: (n, E), (m, K, E), (m, K) -> (n, m)."""
    weights = valid[..., None].astype(np.float64)
    means = (several * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1)
    return cosine(queries, means)


def average_similarities(queries: Array, several: Array, valid: Array) -> Floats:
    """Mean of the cosines with a target's valid vectors: (n, E), (m, K, E), (m, K) -> (n, m)."""
    each = np.einsum("ne,mke->nmk", _unit(queries), _unit(several))
    weights = valid[None].astype(np.float64)
    return (each * weights).sum(axis=-1) / np.maximum(weights.sum(axis=-1), 1)


def similarities(features: FeatureSet, *, pool: int) -> dict[str, tuple[Floats, FeatureSet]]:
    """Rows = queries, columns = what is searched, by direction; with the clips of the pool."""
    found: dict[str, tuple[Floats, FeatureSet]] = {}
    usable = features.has_video & features.has_text.any(axis=1)
    if usable.any():
        clips = features.take(draw_pool(features.clip_ids, usable, pool))
        for name, average in (
            ("", average_embeddings),
            ("_similarities_averaged", average_similarities),
        ):
            from_video = average(clips.video_vt, clips.text_vt, clips.has_text)
            found[f"text_to_video{name}"] = (from_video.T, clips)
            found[f"video_to_text{name}"] = (from_video, clips)
    usable = features.has_video & features.has_audio
    if usable.any():
        clips = features.take(draw_pool(features.clip_ids, usable, pool))
        from_audio = cosine(clips.audio_va, clips.video_va)
        found["audio_to_video"] = (from_audio, clips)
        found["video_to_audio"] = (from_audio.T, clips)
    return found


def retrieval_metrics(
    table: Floats,
    clips: FeatureSet,
    *,
    class_labels: Sequence[str],
    resamples: int,
    seed: int,
) -> dict[str, Metric]:
    """Recall, median rank and class@1 of one direction, with the levels that chance reaches."""
    size = len(table)
    own = ranks(table, np.arange(size))
    metrics = {
        f"recall_at_{k}": measured(
            own <= k, chance=min(k / size, 1.0), resamples=resamples, seed=seed
        )
        for k in RECALLS
    }
    metrics["median_rank"] = measured(
        own, chance=(size + 1) / 2, resamples=resamples, seed=seed, statistic=np.median
    )
    agree = _agreement(clips, class_labels)
    if agree is not None:
        best = table == table.max(axis=1, keepdims=True)
        hits = (agree & best).sum(axis=1) / best.sum(axis=1)  # equally near hits share the place
        metrics["class_at_1"] = measured(hits, chance=agree.mean(), resamples=resamples, seed=seed)
    return metrics


def _agreement(clips: FeatureSet, class_labels: Sequence[str]) -> NDArray[np.bool_] | None:
    """Whether two clips have the same classes: (n, n); None when the corpus has no such labels."""
    if not class_labels or any(name not in clips.labels for name in class_labels):
        return None
    columns = [clips.labels[name] for name in class_labels]
    if any((values == "").any() for values in columns):
        return None
    return np.logical_and.reduce([values[:, None] == values[None] for values in columns])


def _unit(vectors: Array) -> Floats:
    wide = vectors.astype(np.float64)
    # The floor of the release: a zero vector stays zero instead of becoming NaN.
    return wide / np.sqrt(np.maximum((wide**2).sum(axis=-1, keepdims=True), 1e-12))
