"""All that is measured on the test split: retrieval, probes and fine-tuned accuracy, in one pass.

The untrained encoder, of the same shape with its first random weights, is measured beside.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vatt.config import EvaluateParams, FinetuneParams, MachineParams
from vatt.data.labels import labels_of
from vatt.data.loading import Loading
from vatt.data.samples import splits_of
from vatt.evaluation.chosen import Chosen, Task
from vatt.evaluation.classification import Predictions, compare
from vatt.evaluation.examples import retrieval_examples
from vatt.evaluation.features import Array, FeatureSet, Progress
from vatt.evaluation.passes import (
    Counter,
    Setting,
    classifier_predictions,
    encoder_features,
    encoder_insides,
    vocabulary_of,
)
from vatt.evaluation.probes import ENCODERS, Probed, passes_for, run_probes
from vatt.evaluation.retrieval import Search, draw_pool, retrieval_metrics, setup, similarities
from vatt.evaluation.share import ALONE, Share
from vatt.evaluation.thumbnails import thumbnails
from vatt.files import atomic_folder, atomic_write

Metrics = dict[str, Any]
Searches = Mapping[str, Mapping[str, Search]]  # encoder -> direction


@dataclass(frozen=True, slots=True)
class Evidence:
    """The arrays behind the metrics, for the report's figures."""

    arrays: dict[str, dict[str, Any]]  # file name -> arrays
    examples: list[dict[str, Any]]  # retrievals from best to worst
    thumbnails: dict[str, bytes]  # of the clips in them


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be measured, on which clips."""

    params: EvaluateParams
    chosen: Chosen
    finetune: FinetuneParams
    shards: Path
    machine: MachineParams
    seed: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the checkpoints say of the clips: all that is computed with a model."""

    passes: dict[tuple[str, int], dict[str, FeatureSet]]  # split, windows -> encoder
    insides: dict[str, Array]
    answers: dict[Task, Predictions]


def encode(
    asked: Asked, *, cache: Path | None, progress: Progress, share: Share = ALONE
) -> Encoded | None:
    """Show the clips to the chosen checkpoints, once.

    Of several processes, the first gets what all of them computed; the others return None.
    """
    params, chosen, clips = asked.params, asked.chosen, splits_of(asked.shards)
    encoder = chosen.encoder
    wanted = passes_for(params, clips) if encoder else []
    total = sum(clips[split] for split, _ in wanted) + len(chosen.classifiers) * clips["test"]
    setting = Setting(
        params, asked.shards, cache, asked.machine, asked.seed, Counter(progress, total), share
    )
    passes, insides = {}, {}
    if encoder:
        passes = {
            (split, windows): encoder_features(
                setting, encoder, split, windows=windows, clips=clips[split]
            )
            for split, windows in wanted
        }
        insides = encoder_insides(setting, encoder)
    answers = {
        (task, init): classifier_predictions(
            setting, folder, asked.finetune.tasks[task], clips=clips["test"]
        )
        for (task, init), folder in chosen.classifiers.items()
    }
    if share.rank > 0:
        return None
    return Encoded(passes, insides, {task: one for task, one in answers.items() if one is not None})


def measure(encoded: Encoded, asked: Asked) -> tuple[Metrics, Evidence]:
    """All numbers; what there is no checkpoint for is absent."""
    params, chosen, finetune = asked.params, asked.chosen, asked.finetune
    shards, seed = asked.shards, asked.seed
    predictions: dict[str, dict[str, Predictions]] = {}
    for (task, init), answers in encoded.answers.items():
        known = labels_of(shards, finetune.tasks[task].label)
        predictions.setdefault(task, {})[init] = chosen.named(answers, known)
    searches: Searches = {}
    probed = Probed()
    if chosen.encoder:
        features = encoded.passes["test", params.clips]
        probed = run_probes(params, encoded.passes, seed=seed)
        searches = {
            name: similarities(
                features[name], pool=params.retrieval_pool, caption_queries=params.caption_queries
            )
            for name in ENCODERS
        }
    metrics = {
        "clips": splits_of(shards),
        "retrieval": _retrieval(params, searches, seed=seed),
        "protocol": {
            "windows": params.clips,
            "fps": params.fps,
            "caption_queries": params.caption_queries,
            "low_rank_steps": params.low_rank_steps,
            "resamples": params.bootstrap,
        },
        "searches": {name: setup(one) for name, one in searches.get("pretrained", {}).items()},
        "classification": _classification(params, predictions, finetune, seed=seed),
        "probes": probed.metrics,
        "skipped": probed.skipped | chosen.skipped,
    }
    arrays = {
        f"predictions-{task}-{init}": _kept(answers)
        for task, runs in predictions.items()
        for init, answers in runs.items()
    }
    if not chosen.encoder:
        return metrics, Evidence(arrays, [], {})
    arrays |= probed.arrays | {
        "insides": encoded.insides,
        "features": _features(features),
        "similarities": _similarities(searches["pretrained"]),
    }
    words = vocabulary_of(chosen.encoder)
    examples = retrieval_examples(searches["pretrained"], words, shown=params.class_labels)
    shown = [clip["clip_id"] for one in examples for clip in (one, *one["hits"])]
    pictures = thumbnails(shards, shown, Loading.of(asked.machine)) if shown else {}
    return metrics, Evidence(arrays, examples, pictures)


def save_results(metrics: Metrics, evidence: Evidence, *, file: Path, folder: Path) -> None:
    """Write the metrics as JSON and the arrays into a folder, each whole or not at all."""
    with atomic_folder(folder) as temporary:
        for name, arrays in evidence.arrays.items():
            with (temporary / f"{name}.npz").open("wb") as handle:
                np.savez_compressed(handle, **arrays)
        for clip, picture in evidence.thumbnails.items():
            (temporary / f"{clip}.webp").write_bytes(picture)
        (temporary / "examples.json").write_text(_to_json(evidence.examples), encoding="utf-8")
    with atomic_write(file) as path:
        path.write_text(_to_json(metrics), encoding="utf-8")


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics -> `retrieval.pretrained.text_to_video.recall_at_10` and its value."""
    flat: dict[str, float] = {}
    for name, content in metrics.items():
        if isinstance(content, Mapping) and "value" in content:
            flat[prefix + name] = float(content["value"])
        elif isinstance(content, Mapping):
            flat |= flatten(content, f"{prefix}{name}.")
    return flat


def _to_json(content: Any) -> str:
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _retrieval(params: EvaluateParams, searches: Searches, *, seed: int) -> Metrics:
    return {
        encoder: {
            direction: retrieval_metrics(
                search, class_labels=params.class_labels, resamples=params.bootstrap, seed=seed
            )
            for direction, search in found.items()
        }
        for encoder, found in searches.items()
    }


def _classification(
    params: EvaluateParams,
    predictions: Mapping[str, Mapping[str, Predictions]],
    finetune: FinetuneParams,
    *,
    seed: int,
) -> Metrics:
    return {
        task: {
            "modality": finetune.tasks[task].modality,
            "views": [finetune.tasks[task].test_clips, finetune.tasks[task].test_crops],
            **compare(runs, resamples=params.bootstrap, seed=seed),
        }
        for task, runs in predictions.items()
        if all(len(run.clip_ids) for run in runs.values())
    }


def _features(features: Mapping[str, FeatureSet]) -> dict[str, Array]:
    """Clips in the order of the hash of their ids, so that the first so many are a fair sample."""
    clips = features["pretrained"]
    order = draw_pool(clips.clip_ids, clips.has_video, len(clips.clip_ids))
    kept: dict[str, Array] = {"clip_ids": clips.clip_ids[order]}
    kept |= {f"labels/{name}": values[order] for name, values in clips.labels.items()}
    for encoder, found in features.items():
        kept[f"{encoder}/video"] = found.video[order].mean(axis=1)
        kept[f"{encoder}/audio"] = found.audio[order].mean(axis=1)
    for space, other in (("va", "audio"), ("vt", "text")):
        there = clips.has_audio if other == "audio" else np.any(clips.has_text, axis=1)
        rows = order[np.asarray(there)[order]]
        kept[f"{space}/clip_ids"] = clips.clip_ids[rows]
        kept[f"{space}/video"] = getattr(clips, f"video_{space}")[rows].mean(axis=1)
        own = getattr(clips, f"{other}_{space}")[rows]
        if other == "text":
            own = np.where(clips.has_text[rows][..., None], own, np.nan)
        kept[f"{space}/{other}"] = np.nanmean(own, axis=1) if len(rows) else rows
    return kept


def _similarities(searches: Mapping[str, Search]) -> dict[str, Array]:
    return {
        key: values
        for direction, search in searches.items()
        for key, values in (
            (direction, search.table.astype(np.float32)),
            (f"{direction}/own", search.own),
            (f"{direction}/clip_ids", search.clips.clip_ids),
        )
    }


def _kept(answers: Predictions) -> dict[str, Any]:
    return {
        "clip_ids": answers.clip_ids,
        "labels": answers.labels,
        "logits": answers.logits.astype(np.float32),
        "classes": np.asarray(answers.classes),
        "confusion": answers.confusion(),
    }
