"""Measures and their intervals, pure: scores in, numbers out; fractions, never percent.

n queries or clips, m targets, C classes, R bootstrap draws. Measures that are means over clips are
computed clip by clip (`correct_at_k`, `ranks`), because the intervals resample clips.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

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


def bootstrap_interval(
    values: ArrayLike, resamples: int, seed: int, statistic: Statistic = np.mean
) -> tuple[float, float]:
    """The 95 % interval of a statistic of per-clip values; clips are drawn with replacement.

    A clip may have several values (n, k), with NaN where it has fewer; it is drawn with all of
    them.
    """
    return interval(_resampled(np.asarray(values, dtype=np.float64), resamples, seed, statistic))


def paired_difference_interval(
    ours: ArrayLike, theirs: ArrayLike, resamples: int, seed: int, statistic: Statistic = np.mean
) -> tuple[float, float]:
    """The 95 % interval of the difference of a statistic on the same clips in the same order."""
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
    """The limits between which 95 % of the draws lie; NaN draws do not count."""
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
    value = float(statistic(sample.ravel(), axis=0))
    return _metric(value, (low, high), chance=chance, n=len(sample))


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
    value = float(statistic(first.ravel(), axis=0) - statistic(second.ravel(), axis=0))
    return _metric(value, (low, high), chance=0.0, n=len(first))


def _metric(value: float, limits: tuple[float, float], *, chance: float | None, n: int) -> Metric:
    return {
        "value": round(value, 6),
        "low": round(limits[0], 6),
        "high": round(limits[1], 6),
        "chance": None if chance is None else round(float(chance), 6),
        "n": n,
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
    """Values of queries -> a row for each clip (n, k), with NaN where a clip has fewer queries."""
    counts = np.bincount(owners, minlength=clips)
    table = np.full((clips, max(int(counts.max(initial=0)), 1)), np.nan)
    order = np.argsort(owners, kind="stable")
    first = np.cumsum(counts) - counts
    table[owners[order], np.arange(len(order)) - first[owners[order]]] = np.asarray(values)[order]
    return table


def majority_share(labels: Sequence[str]) -> float:
    """The accuracy of always answering with the most frequent label: its chance level."""
    return float(np.unique(np.asarray(labels), return_counts=True)[1].max() / len(labels))


def _same_clips(ours: ArrayLike, theirs: ArrayLike) -> tuple[Floats, Floats]:
    first, second = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"not paired: {first.shape} against {second.shape}")
    return first, second


MEASURES = ("mean_ap", "auc", "d_prime")  # of clips with several labels


def measured_multi_label(
    scores: Floats, truth: NDArray[np.bool_], *, resamples: int, seed: int
) -> dict[str, Metric]:
    """mAP, AUC and d' with their 95 % intervals; chance is the mean share of positives, 0.5, 0.

    Raises ValueError when no class has both positive and negative clips.
    """
    values = _values(scores, truth)
    drawn = resampled(scores, truth, _draws(len(scores), resamples, seed))
    shares = truth.mean(axis=0)
    chances = {"mean_ap": float(shares[(shares > 0) & (shares < 1)].mean()), "auc": 0.5}
    return {
        name: _metric(
            values[name], interval(drawn[name]), chance=chances.get(name, 0.0), n=len(scores)
        )
        for name in MEASURES
    }


def measured_multi_label_difference(
    ours: Floats, theirs: Floats, truth: NDArray[np.bool_], *, resamples: int, seed: int
) -> dict[str, Metric]:
    """Each measure of `ours` minus that of `theirs` on the same clips, with paired intervals."""
    draws = _draws(len(truth), resamples, seed)
    left, right = _values(ours, truth), _values(theirs, truth)
    one, other = resampled(ours, truth, draws), resampled(theirs, truth, draws)
    return {
        name: _metric(
            left[name] - right[name], interval(one[name] - other[name]), chance=0.0, n=len(truth)
        )
        for name in MEASURES
    }


def resampled(scores: Floats, truth: NDArray[np.bool_], weights: Floats) -> dict[str, Floats]:
    """Each measure for each row of `weights`: (n, C), (n, C), (R, n) -> (R,) by name.

    Means over the classes that have positive and negative clips in a draw. An AUC of 0 or 1 is
    moved inwards by half a pair, so that its d' is finite.
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
        # Clips with equal scores have no order: they enter together.
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


def _values(scores: Floats, truth: NDArray[np.bool_]) -> Mapping[str, float]:
    found = resampled(scores, truth, np.ones((1, len(scores))))
    if np.isnan(found["auc"]).any():
        raise ValueError("no class has both positive and negative clips")
    return {name: float(values[0]) for name, values in found.items()}


def _draws(clips: int, resamples: int, seed: int) -> Floats:
    generator = np.random.default_rng(seed)
    return generator.multinomial(clips, np.full(clips, 1 / clips), size=resamples).astype(
        np.float32
    )
