"""Measures of clips with several labels, for many weightings of the clips at once: pure.

A bootstrap draw is a weight a clip: how often it was drawn. n clips, C classes, R draws.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from vatt.metrics import Floats, Metric, interval

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
        _resampled(scores, truth, weights[first : first + DRAWS_AT_ONCE])
        for first in range(0, len(weights), DRAWS_AT_ONCE)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in MEASURES}


def _resampled(scores: Floats, truth: NDArray[np.bool_], weights: Floats) -> dict[str, Floats]:
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
