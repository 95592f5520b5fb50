"""All that is measured on the test split: retrieval, probes and fine-tuned accuracy, in one pass.

The untrained encoder, of the same shape with its first random weights, is measured beside.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vatt.checkpoint import WEIGHTS
from vatt.config import (
    EvaluateParams,
    FinetuneParams,
    MachineParams,
    PretrainParams,
    ProbeParams,
)
from vatt.data.labels import balanced
from vatt.data.samples import VOCABULARY, splits_of
from vatt.evaluation.classification import Predictions, compare
from vatt.evaluation.examples import retrieval_examples
from vatt.evaluation.features import Array, FeatureSet, Progress
from vatt.evaluation.linear_probe import low_rank_correct, svm_correct
from vatt.evaluation.passes import (
    Counter,
    classifier_predictions,
    encoder_features,
    encoder_insides,
)
from vatt.evaluation.retrieval import draw_pool, retrieval_metrics, similarities
from vatt.files import atomic_folder, atomic_write
from vatt.metrics import Booleans, Metric, majority_share, measured, measured_difference

Metrics = dict[str, Any]
ENCODERS = ("pretrained", "untrained")


@dataclass(frozen=True, slots=True)
class Evidence:
    """The arrays behind the metrics, for the report's figures."""

    arrays: dict[str, dict[str, Any]]  # file name -> arrays
    examples: list[dict[str, Any]]  # retrievals from best to worst


@dataclass(frozen=True, slots=True)
class _Probed:
    metrics: Metrics = field(default_factory=dict)
    arrays: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def evaluate(
    params: EvaluateParams,
    *,
    pretrained: Path,
    finetuned: Path,
    finetune: FinetuneParams,
    pretrain: PretrainParams,
    shards: Path,
    cache: Path | None,
    machine: MachineParams,
    seed: int,
    progress: Progress,
) -> tuple[Metrics, Evidence]:
    """Measure everything that has been trained; what has not is absent from the result."""
    clips = splits_of(shards)
    tasks = {
        (task, init): finetuned / f"{task}-{init}"
        for task in finetune.run
        for init in finetune.init
        if (finetuned / f"{task}-{init}" / WEIGHTS).exists()
    }
    splits = ("test", "train") if params.probes else ("test",)
    total = sum(clips.get(split, 0) for split in splits) + len(tasks) * clips.get("test", 0)
    counter = Counter(progress, total)
    features = {
        split: encoder_features(
            split,
            params,
            pretrained=pretrained,
            pretrain=pretrain,
            shards=shards,
            cache=cache,
            machine=machine,
            seed=seed,
            counter=counter,
            clips=clips.get(split, 0),
        )
        for split in splits
    }
    insides = encoder_insides(
        params, pretrained=pretrained, pretrain=pretrain, shards=shards, machine=machine
    )
    predictions: dict[str, dict[str, Predictions]] = {}
    for (task, init), folder in tasks.items():
        answers = classifier_predictions(
            folder, finetune.tasks[task], params, shards=shards, machine=machine, counter=counter
        )
        predictions.setdefault(task, {})[init] = answers
    probed = (
        _probes(params, features["train"], features["test"], seed=seed)
        if params.probes
        else _Probed()
    )
    metrics, tables = _metrics(params, features["test"], predictions, finetune, seed=seed)
    metrics = {"clips": clips, **metrics, "probes": probed.metrics, "skipped": probed.skipped}
    arrays = _arrays(features["test"], tables, predictions) | probed.arrays | {"insides": insides}
    vocabulary = shards / VOCABULARY
    examples = retrieval_examples(tables, vocabulary, shown=params.class_labels)
    return metrics, Evidence(arrays, examples)


def save_results(metrics: Metrics, evidence: Evidence, *, file: Path, folder: Path) -> None:
    """Write the metrics as JSON and the arrays into a folder, each whole or not at all."""
    with atomic_folder(folder) as temporary:
        for name, arrays in evidence.arrays.items():
            with (temporary / f"{name}.npz").open("wb") as handle:
                np.savez_compressed(handle, **arrays)
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


def _metrics(
    params: EvaluateParams,
    features: Mapping[str, FeatureSet],
    predictions: Mapping[str, Mapping[str, Predictions]],
    finetune: FinetuneParams,
    *,
    seed: int,
) -> tuple[Metrics, dict[str, tuple[Array, FeatureSet]]]:
    resamples = params.bootstrap
    tables = {name: similarities(features[name], pool=params.retrieval_pool) for name in ENCODERS}
    retrieval = {
        name: {
            direction: retrieval_metrics(
                table, clips, class_labels=params.class_labels, resamples=resamples, seed=seed
            )
            for direction, (table, clips) in found.items()
        }
        for name, found in tables.items()
    }
    classification: Metrics = {
        task: {
            "modality": finetune.tasks[task].modality,
            **compare(runs, resamples=resamples, seed=seed),
        }
        for task, runs in predictions.items()
        if all(len(run.clip_ids) for run in runs.values())
    }
    return {"retrieval": retrieval, "classification": classification}, tables["pretrained"]


def _probes(
    params: EvaluateParams,
    train: Mapping[str, FeatureSet],
    test: Mapping[str, FeatureSet],
    *,
    seed: int,
) -> _Probed:
    found = _Probed()
    for name, probe in params.probes.items():
        why = _cannot_probe(probe, train["pretrained"], test["pretrained"])
        if why:
            found.skipped[f"probe {name}"] = why
            continue
        found.metrics[name], arrays = _probe(probe, params, train, test, seed=seed)
        found.arrays.update({f"probe-{name}-{kind}": values for kind, values in arrays.items()})
    return found


def _cannot_probe(probe: ProbeParams, train: FeatureSet, test: FeatureSet) -> str:
    """Why there is nothing to learn or to ask; empty when there is."""
    for split, clips in (("train", train), ("test", test)):
        present = getattr(clips, f"has_{probe.modality}")
        labels = clips.labels.get(probe.label, np.full(len(present), ""))
        values = set(labels[present].tolist()) - {""}
        if len(values) < (2 if split == "train" else 1):
            return f"{len(values)} values of label '{probe.label}' in the {split} split"
    return ""


def _probe(
    probe: ProbeParams,
    params: EvaluateParams,
    train: Mapping[str, FeatureSet],
    test: Mapping[str, FeatureSet],
    *,
    seed: int,
) -> tuple[Metrics, dict[str, dict[str, Any]]]:
    """Both classifiers on both encoders, with the paired difference; and what each clip got."""
    first, shown = train["pretrained"], test["pretrained"]
    present = getattr(first, f"has_{probe.modality}")
    labels = np.where(present, first.labels[probe.label], "")
    rows = balanced(first.clip_ids.tolist(), labels.tolist(), probe.train_labels)
    usable = getattr(shown, f"has_{probe.modality}") & (shown.labels[probe.label] != "")
    wanted = shown.labels[probe.label][usable]
    chance = majority_share(wanted.tolist())
    correct: dict[str, dict[str, Booleans]] = {"svm": {}}
    for encoder in ENCODERS:
        learned = (getattr(train[encoder], probe.modality)[rows], labels[rows])
        asked = (getattr(test[encoder], probe.modality)[usable], wanted)
        correct["svm"][encoder] = svm_correct(learned, asked)
        if params.low_rank_steps:
            correct.setdefault("low_rank", {})[encoder] = low_rank_correct(
                learned, asked, steps=params.low_rank_steps, seed=seed
            )
    found: Metrics = {}
    arrays: dict[str, dict[str, Any]] = {}
    for kind, by_encoder in correct.items():
        metrics: dict[str, Metric] = {
            encoder: measured(hits, chance=chance, resamples=params.bootstrap, seed=seed)
            for encoder, hits in by_encoder.items()
        }
        metrics["difference"] = measured_difference(
            by_encoder["pretrained"], by_encoder["untrained"], resamples=params.bootstrap, seed=seed
        )
        found[kind] = metrics
        arrays[kind] = {
            "clip_ids": shown.clip_ids[usable],
            "labels": wanted,
            "correct": by_encoder["pretrained"],
        }
    return found, arrays


def _arrays(
    features: Mapping[str, FeatureSet],
    tables: Mapping[str, tuple[Array, FeatureSet]],
    predictions: Mapping[str, Mapping[str, Predictions]],
) -> dict[str, dict[str, Any]]:
    """Clips in the order of the hash of their ids, so that the first so many are a fair sample."""
    clips = features["pretrained"]
    order = draw_pool(clips.clip_ids, clips.has_video, len(clips.clip_ids))
    kept: dict[str, Array] = {"clip_ids": clips.clip_ids[order]}
    kept |= {f"labels/{name}": values[order] for name, values in clips.labels.items()}
    for encoder, found in features.items():
        kept[f"{encoder}/video"] = found.video[order]
        kept[f"{encoder}/audio"] = found.audio[order]
    arrays: dict[str, dict[str, Any]] = {
        "features": kept,
        "similarities": {
            key: values
            for direction, (table, pool) in tables.items()
            for key, values in (
                (direction, table.astype(np.float32)),
                (f"{direction}/clip_ids", pool.clip_ids),
            )
        },
    }
    for task, runs in predictions.items():
        for init, answers in runs.items():
            arrays[f"predictions-{task}-{init}"] = {
                "clip_ids": answers.clip_ids,
                "labels": answers.labels,
                "logits": answers.logits.astype(np.float32),
                "classes": np.asarray(answers.classes),
                "confusion": answers.confusion(),
            }
    return arrays
