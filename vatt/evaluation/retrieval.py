"""Zero-shot retrieval: from words to video, from sound to video, and back.

n clips of the pool, q queries, K captions of a clip, V windows, E common-space width. A query has
one correct answer: the other modality of its own clip. During training, the val split is used.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vatt.checkpoint import build, load_weights, without_memory
from vatt.config import MachineParams, ModelParams, PretrainParams
from vatt.data.clips.samples import splits_of
from vatt.data.loading.batches import Loading, Sampling, eval_batches, open_index
from vatt.data.loading.reader import ShardIndex
from vatt.errors import SettingsError
from vatt.evaluation.features import Array, FeatureSet, extract
from vatt.metrics import Floats, Metric, by_clip, measured, ranks
from vatt.model.transformer import set_merging
from vatt.model.vatt import VATT
from vatt.senses import ANCHOR, SENSES

RECALLS = (1, 5, 10)
SIMILARITIES = "_similarities_averaged"  # suffix of a direction that averages cosines


@dataclass(frozen=True, slots=True)
class Search:
    """Scores of all queries of one direction, and the correct column of each."""

    table: Floats  # (q, n)
    own: NDArray[np.integer]  # (q,) columns
    caption: (
        NDArray[np.integer] | None
    )  # (q,) its number in the clip; None: a query is not a caption
    clips: FeatureSet  # of the pool (n)
    captions_per_clip: float | None  # if one side is text


def draw_pool(clip_ids: NDArray[np.str_], usable: Array, size: int) -> NDArray[np.integer]:
    """Rows of the clips to search: usable ones, in the fixed order of the hash of their ids."""
    rows = np.flatnonzero(usable)
    order = sorted(rows, key=lambda row: hashlib.sha256(str(clip_ids[row]).encode()).digest())
    return np.asarray(order[:size], dtype=np.int64)


def cosine(queries: Array, targets: Array) -> Floats:
    """Cosine of every query with every target: (n, E), (m, E) -> (n, m)."""
    return _unit(queries) @ _unit(targets).T


def average_embeddings(left: Array, right: Array) -> Floats:
    """Cosines of the means of several vectors: (n, K, E), (m, V, E) -> (n, m); NaN means absent."""
    return cosine(_mean(left), _mean(right))


def average_similarities(left: Array, right: Array) -> Floats:
    """Means of the cosines of all pairs of vectors: (n, K, E), (m, V, E) -> (n, m)."""
    # The mean of the products of all pairs is the product of the means.
    return _mean(_unit(left)) @ _mean(_unit(right)).T


def similarities(
    features: FeatureSet, *, pool: int, caption_queries: str, every_pair: bool = False
) -> dict[str, Search]:
    """Every direction for which there are clips, with both ways of averaging if they differ.

    Directions are those between video and each other sense, which were trained; with `every_pair`
    those between all others too, in va where both are, else in vt.
    """
    found: dict[str, Search] = {}
    for one, other in _pairs(features, every_pair=every_pair):
        usable = _has(features, one) & _has(features, other)
        if not usable.any():
            continue
        clips = features.take(draw_pool(features.clip_ids, usable, pool))
        if f"has_{one}" in clips.arrays and clips.arrays[f"has_{one}"].ndim > 1:
            found |= _with_words(clips, other, each=caption_queries == "each")
            continue
        own = np.arange(len(clips.clip_ids))
        left, right = clips.arrays[f"{one}_va"], clips.arrays[f"{other}_va"]
        for name, average in _ways(left, right):
            table = average(left, right)
            found[f"{one}_to_{other}{name}"] = Search(table, own, None, clips, None)
            found[f"{other}_to_{one}{name}"] = Search(table.T, own, None, clips, None)
    return found


def _pairs(features: FeatureSet, *, every_pair: bool) -> list[tuple[str, str]]:
    """Pairs of senses: words come first in theirs, and the anchor comes last."""
    there = [name for name in SENSES if f"has_{name}" in features.arrays]
    words = [name for name in there if SENSES[name].space == "vt"]
    signals = [name for name in there if SENSES[name].space == "va"]
    others = [name for name in signals if name != ANCHOR.name]
    trained = [(name, ANCHOR.name) for name in (*words, *others)]
    if not every_pair:
        return trained
    return [*trained, *product(words, others), *combinations(others, 2)]


def _has(features: FeatureSet, name: str) -> NDArray[np.bool_]:
    """Which clips have a sense, or a text of it."""
    there = features.arrays[f"has_{name}"]
    return np.asarray(there if there.ndim == 1 else there.any(axis=1))


def _with_words(clips: FeatureSet, other: str, *, each: bool) -> dict[str, Search]:
    """Text and a signal: the captions of a clip are one query together, or one query each.

    If each is a query, a signal finds the clip of its nearest caption, as is usual for data sets
    with several captions per clip.
    """
    spoken, shown = clips.has_text, clips.arrays[f"{other}_vt"]
    per_clip = float(spoken.sum(axis=1).mean())
    own, caption = np.arange(len(spoken)), None
    words = np.where(spoken[..., None], clips.text_vt, np.nan)
    if each:
        own, caption = np.nonzero(spoken)
        words = clips.text_vt[spoken][:, None]
    found = {}
    for name, average in _ways(words, shown):
        table = average(words, shown)
        back = table.T
        if each:
            back = np.maximum.reduceat(table, np.flatnonzero(np.diff(own, prepend=-1)), axis=0).T
        every = np.arange(len(spoken))
        found[f"text_to_{other}{name}"] = Search(table, own, caption, clips, per_clip)
        found[f"{other}_to_text{name}"] = Search(back, every, None, clips, per_clip)
    return found


def _ways(left: Array, right: Array):  # type: ignore[no-untyped-def]
    """Both ways of averaging, or one if there is nothing to average."""
    several = max(left.shape[1], right.shape[1]) > 1
    return (("", average_embeddings), *((SIMILARITIES, average_similarities),) * several)


def retrieval_metrics(
    search: Search,
    *,
    class_labels: Sequence[str],
    resamples: int,
    seed: int,
) -> dict[str, Metric]:
    """Recall, median rank and class@1 of one direction, with their chance levels."""
    size = search.table.shape[1]
    agree = _agreement(search.clips, class_labels)

    def metric(values: Array, *, chance: float, median: bool = False) -> Metric:
        one_each = len(values) == size
        rows = values if one_each else by_clip(values, search.own, size)
        plain, with_gaps = (np.median, np.nanmedian) if median else (np.mean, np.nanmean)
        return measured(
            rows, chance=chance, resamples=resamples, seed=seed,
            statistic=plain if one_each else with_gaps,
        )  # fmt: skip

    own = ranks(search.table, search.own)
    metrics = {f"recall_at_{k}": metric(own <= k, chance=min(k / size, 1.0)) for k in RECALLS}
    metrics["median_rank"] = metric(own, chance=(size + 1) / 2, median=True)
    if agree is not None:
        best = search.table == search.table.max(axis=1, keepdims=True)
        # Hits with the same score share the first place.
        hits = (agree[search.own] & best).sum(axis=1) / best.sum(axis=1)
        metrics["class_at_1"] = metric(hits, chance=agree.mean())
    return metrics


def setup(search: Search) -> dict[str, int | float | None]:
    """The sizes of a search, for the report."""
    return {
        "pool": search.table.shape[1],
        "queries": search.table.shape[0],
        "captions_per_clip": search.captions_per_clip,
    }


def _agreement(clips: FeatureSet, class_labels: Sequence[str]) -> NDArray[np.bool_] | None:
    """Whether two clips have the same classes: (n, n); None if the corpus lacks these labels."""
    if not class_labels or any(name not in clips.labels for name in class_labels):
        return None
    columns = [clips.labels[name] for name in class_labels]
    if any((values == "").any() for values in columns):
        return None
    return np.logical_and.reduce([values[:, None] == values[None] for values in columns])


def _mean(several: Array) -> Floats:
    """(n, K, E) -> (n, E), ignoring NaN; each row has at least one value."""
    return np.nanmean(several.astype(np.float64), axis=1)


def _unit(vectors: Array) -> Floats:
    wide = vectors.astype(np.float64)
    # The epsilon of the released code: a zero vector stays zero instead of becoming NaN.
    return wide / np.sqrt(np.maximum((wide**2).sum(axis=-1, keepdims=True), 1e-12))


SPLIT = "val"
SCORE = "val.recall_at_10"  # the mean over the directions; the best checkpoint has the highest

Validation = Callable[[Mapping[str, Tensor]], dict[str, float]]


def validation(
    model: ModelParams, params: PretrainParams, *, shards: Path, machine: MachineParams
) -> Validation | None:
    """A function that measures weights on fixed clips; None if `evaluate_every` is null."""
    if params.evaluate_every is None:
        return None
    if not splits_of(shards).get(SPLIT):
        raise SettingsError(
            "pretrain.evaluate_every is set, but the val split is empty",
            hint="set data.val_share=0.01, or pretrain.evaluate_every=null, and run it again",
        )
    rows = ShardIndex.load(shards, split=SPLIT).rows
    ids = np.asarray([row.key for row in rows])
    size = machine.micro_batch_size
    at_once = size if isinstance(size, int) else max(1, params.batch_size // machine.processes)
    keys = ids[draw_pool(ids, np.ones(len(ids), dtype=bool), params.evaluate_clips)].tolist()

    def measure(weights: Mapping[str, Tensor]) -> dict[str, float]:
        loading = replace(Loading.of(machine), cache_gb=0.0)
        batches = eval_batches(
            open_index(shards, loading, split=SPLIT, keys=keys),
            Sampling.for_pretraining(model, params),
            batch_size=min(at_once, len(keys)),
            loading=loading,
        )
        encoder = _encoder(model, weights)
        set_merging(encoder, params.merge_rate)
        found = extract(
            {SPLIT: encoder},
            batches,
            progress=lambda *_: None,
            total=len(keys),
            precision=params.precision,
        )
        searches = similarities(found[SPLIT], pool=len(keys), caption_queries="averaged")
        return retrieval_scores({name: search.table for name, search in searches.items()})

    return measure


def retrieval_scores(tables: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Recalls and median rank of each direction, and the mean R@10 over all directions."""
    scores: dict[str, float] = {}
    for name, table in tables.items():
        if not name.endswith(SIMILARITIES):
            own = ranks(table, np.arange(len(table)))
            scores |= {f"val.{name}.recall_at_{k}": float((own <= k).mean()) for k in RECALLS}
            scores[f"val.{name}.median_rank"] = float(np.median(own))
    recalls = [value for name, value in scores.items() if name.endswith("recall_at_10")]
    return scores | {SCORE: float(np.mean(recalls)) if recalls else 0.0}


def _encoder(model: ModelParams, weights: Mapping[str, Tensor]) -> VATT:
    with without_memory():
        encoder = build(model)
    load_weights(encoder, dict(weights))
    return encoder.eval().to("cuda" if torch.cuda.is_available() else "cpu")
