"""Measures, pure: scores in, numbers out; fractions, never percent.

n queries or clips, m targets, C classes, R bootstrap draws. What is averaged over clips also exists
clip by clip (`correct_at_k`, `ranks`), because the intervals resample clips.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri
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


MEASURES = ("mean_ap", "auc", "d_prime")
DRAWS_AT_ONCE = 100  # bounds memory


def measured_multi_label(
    scores: Floats, truth: NDArray[np.bool_], *, resamples: int, seed: int
) -> dict[str, Metric]:
    """mAP, AUC and d' with their 95 % intervals; chance is the mean share of positives, 0.5, 0.

    Raises ValueError when no class has both positive and negative clips.
    """
    whole = _whole(scores, truth)
    drawn = resampled(scores, truth, _draws(len(scores), resamples, seed))
    shares = truth.mean(axis=0)
    chances = {"mean_ap": float(shares[(shares > 0) & (shares < 1)].mean()), "auc": 0.5}
    return {
        name: _metric(whole[name], drawn[name], chance=chances.get(name, 0.0), n=len(scores))
        for name in MEASURES
    }


def measured_multi_label_difference(
    ours: Floats, theirs: Floats, truth: NDArray[np.bool_], *, resamples: int, seed: int
) -> dict[str, Metric]:
    """Each measure of `ours` less that of `theirs`, for the same clips, with paired intervals."""
    draws = _draws(len(truth), resamples, seed)
    left, right = _whole(ours, truth), _whole(theirs, truth)
    one, other = resampled(ours, truth, draws), resampled(theirs, truth, draws)
    return {
        name: _metric(left[name] - right[name], one[name] - other[name], chance=0.0, n=len(truth))
        for name in MEASURES
    }


def resampled(scores: Floats, truth: NDArray[np.bool_], weights: Floats) -> dict[str, Floats]:
    """Each measure for each row of `weights`: (n, C), (n, C), (R, n) -> (R,) by name.

    Means over the classes that have positive and negative clips in a draw. An AUC of 0 or 1 is
    moved in by half a pair, so that its d' is finite.
    """
    parts = [
        _weighted_measures(scores, truth, weights[first : first + DRAWS_AT_ONCE])
        for first in range(0, len(weights), DRAWS_AT_ONCE)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in MEASURES}


def _weighted_measures(
    scores: Floats, truth: NDArray[np.bool_], weights: Floats
) -> dict[str, Floats]:
    sums = {name: np.zeros(len(weights)) for name in MEASURES}
    counted = np.zeros(len(weights))
    for column in range(scores.shape[1]):
        order = np.argsort(-scores[:, column], kind="stable")
        ordered = scores[order, column]
        # Clips of equal scores are told apart by nothing: they come in at once.
        ends = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
        drawn = weights[:, order].astype(np.float64)
        hits = np.cumsum(drawn * truth[order, column], axis=1)[:, ends]
        seen = np.cumsum(drawn, axis=1)[:, ends]
        positives, all_clips = hits[:, -1], seen[:, -1]
        pairs = positives * (all_clips - positives)
        defined = pairs > 0
        counted += defined
        gained = np.diff(hits, axis=1, prepend=0)
        precision = hits / np.maximum(seen, 1e-300)
        wrong = np.diff(seen - hits, axis=1, prepend=0)
        below = hits - gained / 2  # a tie counts half
        safe = np.where(defined, pairs, 1.0)
        area = (wrong * below).sum(axis=1) / safe
        inside = np.clip(area, 0.5 / safe, 1 - 0.5 / safe)
        values = {
            "mean_ap": (gained * precision).sum(axis=1) / np.maximum(positives, 1e-300),
            "auc": area,
            "d_prime": np.sqrt(2) * ndtri(inside),
        }
        for name, value in values.items():
            sums[name] += np.where(defined, value, 0.0)
    return {
        name: np.where(counted > 0, total / np.maximum(counted, 1), np.nan)
        for name, total in sums.items()
    }


def _whole(scores: Floats, truth: NDArray[np.bool_]) -> Mapping[str, float]:
    found = resampled(scores, truth, np.ones((1, len(scores))))
    if np.isnan(found["auc"]).any():
        raise ValueError("no class has both positive and negative clips")
    return {name: float(values[0]) for name, values in found.items()}


def _draws(clips: int, resamples: int, seed: int) -> Floats:
    generator = np.random.default_rng(seed)
    return generator.multinomial(clips, np.full(clips, 1 / clips), size=resamples).astype(
        np.float32
    )


def _metric(value: float, drawn: Floats, *, chance: float, n: int) -> Metric:
    low, high = interval(drawn[~np.isnan(drawn)])
    return {
        "value": round(value, 6),
        "low": round(low, 6),
        "high": round(high, 6),
        "chance": round(chance, 6),
        "n": n,
    }
