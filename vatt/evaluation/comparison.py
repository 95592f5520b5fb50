"""Two evaluations on their common clips: both values and the paired difference.

n common clips. Only measures of both runs are compared. Retrieval is ranked again among the
common clips, because a rank depends on the clips that are searched.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vatt.errors import DataError
from vatt.evaluation.classification import TOP, Predictions
from vatt.evaluation.retrieval import RECALLS
from vatt.files import read_arrays
from vatt.metrics import (
    Statistic,
    by_clip,
    measured,
    measured_difference,
    measured_multi_label,
    measured_multi_label_difference,
    over_folds,
    ranks,
)

ClipArrays = dict[str, NDArray[Any]]
Values = dict[str, NDArray[Any]]  # measure -> a value for each clip (n,)
Pair = tuple[NDArray[Any], NDArray[Any]]  # the values of the same clips in both runs
SIMILARITIES, PREDICTIONS, PROBE = "similarities", "predictions-", "probe-"
CLIPS, OWN = "/clip_ids", "/own"  # of a direction of retrieval


def compare_evaluations(
    first: Path, second: Path, *, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """A row for each measure: `name`, and `first`, `second`, `difference` (first - second).

    Raises DataError if a folder has no evaluation, or if the two have nothing in common.
    """
    ours, theirs = _load(first), _load(second)
    rows = []
    for name in ours:
        if name not in theirs:
            continue
        if name.startswith(PREDICTIONS) and _answers(ours[name]).has_several():
            rows += _multi_label(name, ours[name], theirs[name], resamples=resamples, seed=seed)
            continue
        for measure, values in _paired(name, ours[name], theirs[name]).items():
            statistic: Statistic = np.nanmedian if measure.endswith("median_rank") else np.nanmean
            if name.startswith(PROBE) and values[0].ndim == 2:
                statistic = over_folds(values[0].shape[1])
            one, other = (
                measured(v, chance=None, resamples=resamples, seed=seed, statistic=statistic)
                for v in values
            )
            difference = measured_difference(
                *values, resamples=resamples, seed=seed, statistic=statistic
            )
            shown = measure.removeprefix(PREDICTIONS)  # as in summary.json
            rows.append({"name": shown, "first": one, "second": other, "difference": difference})
    if not rows:
        raise DataError(
            f"{first} and {second} have no measure in common on the same clips",
            hint="compare evaluations of the same test split",
        )
    return rows


def _load(folder: Path) -> dict[str, ClipArrays]:
    found: dict[str, ClipArrays] = {}
    for path in sorted(folder.glob("*.npz")):
        found[path.stem] = read_arrays(path, hint="run `vattctl evaluate --force`")
    if not found:
        raise DataError(f"there is no evaluation in {folder}", hint="run `vattctl evaluate`")
    return found


def _paired(name: str, ours: ClipArrays, theirs: ClipArrays) -> dict[str, Pair]:
    """Values of both runs for the same clips in the same order, by measure."""
    if name == SIMILARITIES:
        found: dict[str, Pair] = {}
        for key in (key for key in ours if key.endswith(CLIPS) and key in theirs):
            found |= _retrieval_values(key.removesuffix(CLIPS), ours, theirs)
        return found
    for prefix, values_of in ((PREDICTIONS, _prediction_values), (PROBE, _probe_values)):
        if name.startswith(prefix):
            mine, their = _shared(ours, theirs)
            if not len(mine):
                return {}
            left, right = values_of(ours, mine), values_of(theirs, their)
            if any(left[m].shape != right[m].shape for m in left if m in right):
                return {}  # other folds
            return {
                f"{name}.{measure}": (left[measure], right[measure])
                for measure in left
                if measure in right
            }
    return {}


def _shared(
    ours: ClipArrays, theirs: ClipArrays
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Rows of the clips that both runs have with the same label."""
    _, mine, their = np.intersect1d(ours["clip_ids"], theirs["clip_ids"], return_indices=True)
    same = ours["labels"][mine] == theirs["labels"][their]
    return mine[same], their[same]


def _answers(run: ClipArrays, rows: NDArray[np.integer] | slice = slice(None)) -> Predictions:
    return Predictions(
        run["clip_ids"][rows],
        run["labels"][rows],
        run["logits"][rows],
        tuple(run["classes"].tolist()),
    )


def _prediction_values(run: ClipArrays, rows: NDArray[np.integer]) -> Values:
    answers = _answers(run, rows)
    return {f"top_{k}": answers.correct(k) for k in TOP if k < len(answers.classes)}


def _multi_label(
    name: str, ours: ClipArrays, theirs: ClipArrays, *, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """A row each for mAP, AUC and d', over the classes that both runs know."""
    mine, their = _shared(ours, theirs)
    left, right = _answers(ours, mine), _answers(theirs, their)
    _, columns, others = np.intersect1d(left.classes, right.classes, return_indices=True)
    truth = left.truth()[:, columns] if len(mine) else np.zeros((0, 0), dtype=bool)
    if not (truth.any(axis=0) & ~truth.all(axis=0)).any():
        return []
    one, other = left.logits[:, columns], right.logits[:, others]
    how = {"resamples": resamples, "seed": seed}
    first, second = (measured_multi_label(scores, truth, **how) for scores in (one, other))
    gaps = measured_multi_label_difference(one, other, truth, **how)
    return [
        {
            "name": f"{name.removeprefix(PREDICTIONS)}.{measure}",
            "first": first[measure],
            "second": second[measure],
            "difference": gaps[measure],
        }
        for measure in gaps
    ]


def _probe_values(run: ClipArrays, rows: NDArray[np.integer]) -> Values:
    return {"accuracy": run["correct"][rows]}


def _retrieval_values(direction: str, ours: ClipArrays, theirs: ClipArrays) -> dict[str, Pair]:
    key = direction + CLIPS
    _, mine, their = np.intersect1d(ours[key], theirs[key], return_indices=True)
    if not len(mine):
        return {}
    left, right = (
        _own_ranks(run[direction], run.get(direction + OWN), rows)
        for run, rows in ((ours, mine), (theirs, their))
    )
    if left.shape != right.shape or not np.array_equal(np.isnan(left), np.isnan(right)):
        return {}  # not the same captions
    pairs: dict[str, Pair] = {
        f"{direction}.recall_at_{k}": (_within(left, k), _within(right, k)) for k in RECALLS
    }
    pairs[f"{direction}.median_rank"] = (left, right)
    return pairs


def _own_ranks(
    table: NDArray[Any], own: NDArray[np.integer] | None, rows: NDArray[np.integer]
) -> NDArray[np.floating]:
    """Ranks among the clips `rows` only: (n, k), with NaN where a clip has fewer queries."""
    own = np.arange(len(table)) if own is None else own
    place = np.full(table.shape[1], -1)
    place[rows] = np.arange(len(rows))
    queries = np.flatnonzero(place[own] >= 0)
    owners = place[own[queries]]
    return by_clip(ranks(table[np.ix_(queries, rows)], owners), owners, len(rows))


def _within(rank: NDArray[np.floating], k: int) -> NDArray[np.floating]:
    return np.where(np.isnan(rank), np.nan, rank <= k)
