"""Measures, pure: scores in, numbers out; fractions, never percent.

n queries or clips, m targets, C classes. What is averaged over clips also exists clip by clip
(`correct_at_k`, `ranks`), because the intervals resample clips.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

Floats = NDArray[np.floating]
Integers = NDArray[np.integer]
Booleans = NDArray[np.bool_]
Statistic = Callable[..., Floats]  # as numpy.mean: (values, axis=) -> values
Metric = dict[str, float | int | None]

CONFIDENCE = 0.95
DRAWS_AT_ONCE = 100  # bounds memory


def ranks(scores: ArrayLike, targets: ArrayLike) -> Floats:
    """The rank, from 1, of each row's target column; ties share their middle rank.

    A collapsed model scores all columns alike and must get chance, not first place.
    """
    table = np.asarray(scores)
    if np.isnan(table).any():
        raise ValueError("scores hold NaN")
    own = np.take_along_axis(table, np.asarray(targets)[:, None], axis=1)
    return 1 + (table > own).sum(axis=1) + ((table == own).sum(axis=1) - 1) / 2


def correct_at_k(scores: ArrayLike, targets: ArrayLike, k: int) -> Booleans:
    """Whether the target is among a row's k highest scores: (n, m), (n,) -> (n,)."""
    return ranks(scores, targets) <= k


def top_k_accuracy(scores: ArrayLike, targets: ArrayLike, k: int) -> float:
    """The share of rows whose class is among the k highest scores."""
    return float(correct_at_k(scores, targets, k).mean())


def recall_at_k(similarities: ArrayLike, k: int) -> float:
    """The share of queries whose own target, on the diagonal, is among the k nearest."""
    return top_k_accuracy(similarities, np.arange(len(np.asarray(similarities))), k)


def median_rank(similarities: ArrayLike) -> float:
    """The median rank, from 1, of the queries' own targets on the diagonal."""
    return float(np.median(ranks(similarities, np.arange(len(np.asarray(similarities))))))


def mean_ap(scores: ArrayLike, truth: ArrayLike) -> float:
    """Average precision of each class that occurs, averaged over classes: (n, C), (n, C) -> mAP."""
    return float(np.mean(_per_class(average_precision_score, scores, truth)))


def auc(scores: ArrayLike, truth: ArrayLike) -> float:
    """Area under the ROC curve, averaged over the classes that occur."""
    return float(np.mean(_per_class(roc_auc_score, scores, truth)))


def d_prime(scores: ArrayLike, truth: ArrayLike) -> float:
    """sqrt(2) times the inverse normal of each class's AUC, averaged; infinite when one is 1."""
    areas = torch.tensor(_per_class(roc_auc_score, scores, truth), dtype=torch.float64)
    return float(math.sqrt(2) * torch.special.ndtri(areas).mean())


def _per_class(
    measure: Callable[[Floats, Floats], float], scores: ArrayLike, truth: ArrayLike
) -> list[float]:
    table, wanted = np.asarray(scores), np.asarray(truth)
    # Without both a positive and a negative clip neither measure is defined.
    occurring = [c for c in range(wanted.shape[1]) if 0 < wanted[:, c].sum() < len(wanted)]
    if not occurring:
        raise ValueError("no class has both positive and negative clips")
    return [float(measure(wanted[:, c], table[:, c])) for c in occurring]


def bootstrap_interval(
    values: ArrayLike, resamples: int, seed: int, statistic: Statistic = np.mean
) -> tuple[float, float]:
    """The 95 % interval of a statistic of per-clip values; clips are drawn with replacement.

    A clip may have several values (n, k), or NaN for none: all of them come when it is drawn.
    """
    return interval(_resampled(np.asarray(values, dtype=np.float64), resamples, seed, statistic))


def paired_difference_interval(
    ours: ArrayLike, theirs: ArrayLike, resamples: int, seed: int, statistic: Statistic = np.mean
) -> tuple[float, float]:
    """The 95 % interval of a statistic's difference, measured on the same clips in one order."""
    drawn = [_resampled(one, resamples, seed, statistic) for one in _same_clips(ours, theirs)]
    return interval(drawn[0] - drawn[1])


def _resampled(sample: Floats, resamples: int, seed: int, statistic: Statistic) -> Floats:
    """The statistic of each draw (resamples,); the same seed draws the same clips."""
    generator, clips = np.random.default_rng(seed), len(sample)
    parts = []
    for first in range(0, resamples, DRAWS_AT_ONCE):
        draws = min(DRAWS_AT_ONCE, resamples - first)
        rows = generator.integers(clips, size=(draws, clips))
        parts.append(statistic(sample[rows].reshape(draws, -1), axis=1))
    return np.concatenate(parts)


def interval(statistics: Floats) -> tuple[float, float]:
    """What holds 95 % of the draws."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(statistics[~np.isnan(statistics)], [tail, 1 - tail])
    return float(low), float(high)


def measured(
    values: ArrayLike,
    *,
    chance: float | None,
    resamples: int,
    seed: int,
    statistic: Statistic = np.mean,
) -> Metric:
    """A statistic of per-clip values with its interval, chance level and number of clips."""
    sample = np.asarray(values, dtype=np.float64)
    low, high = bootstrap_interval(sample, resamples, seed, statistic)
    return {
        "value": round(float(statistic(sample.ravel(), axis=0)), 6),
        "low": round(low, 6),
        "high": round(high, 6),
        "chance": None if chance is None else round(float(chance), 6),
        "n": len(sample),
    }


def measured_difference(
    ours: ArrayLike,
    theirs: ArrayLike,
    *,
    resamples: int,
    seed: int,
    statistic: Statistic = np.mean,
) -> Metric:
    """statistic(ours) - statistic(theirs) over the same clips, with its paired interval."""
    first, second = _same_clips(ours, theirs)
    low, high = paired_difference_interval(first, second, resamples, seed, statistic)
    return {
        "value": round(
            float(statistic(first.ravel(), axis=0) - statistic(second.ravel(), axis=0)), 6
        ),
        "low": round(low, 6),
        "high": round(high, 6),
        "chance": 0.0,
        "n": len(first),
    }


def over_folds(folds: int) -> Statistic:
    """The mean over folds of a fold's mean, for values (n, folds), NaN where a clip is not tested.

    A draw that misses a fold is NaN.
    """

    def statistic(values: Floats, axis: int) -> Floats:
        by_fold = values.reshape(*values.shape[:-1], -1, folds)
        counts = (~np.isnan(by_fold)).sum(axis=-2)
        means = np.where(counts, np.nansum(by_fold, axis=-2) / np.maximum(counts, 1), np.nan)
        return means.mean(axis=-1)

    return statistic


def by_clip(values: ArrayLike, owners: Integers, clips: int) -> Floats:
    """Values of queries -> a row for each clip that asked, NaN where it asked fewer: (n, k)."""
    counts = np.bincount(owners, minlength=clips)
    table = np.full((clips, max(int(counts.max(initial=0)), 1)), np.nan)
    order = np.argsort(owners, kind="stable")
    first = np.cumsum(counts) - counts
    table[owners[order], np.arange(len(order)) - first[owners[order]]] = np.asarray(values)[order]
    return table


def majority_share(labels: Sequence[str]) -> float:
    """What always answering the most frequent label would score: the chance level of accuracy."""
    return float(np.unique(np.asarray(labels), return_counts=True)[1].max() / len(labels))


def _same_clips(ours: ArrayLike, theirs: ArrayLike) -> tuple[Floats, Floats]:
    first, second = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"not paired: {first.shape} against {second.shape}")
    return first, second
