"""Linear probes on frozen features: how well a label can be read from them.

n clips, F folds, V windows of a test clip, D encoder width, C classes. Two classifiers, as in the
paper: a linear SVM, and the low-rank one, C = U V with 128 components, a tenth of which is sampled
at each step. Both are trained on one window of each clip.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from vatt.config import EvaluateParams, ProbeParams
from vatt.data.loading.batches import balanced
from vatt.evaluation.features import Array, FeatureSet
from vatt.metrics import Booleans, Floats, majority_share, measured, measured_difference, over_folds
from vatt.progress import Counter, Progress, unseen

REGULARISATIONS = (0.001, 0.01, 0.1, 1.0)  # C of the SVM, chosen on a fifth of the train clips
HELD_OUT = 5

COMPONENTS = 128  # paper, appendix: rank of the classifier
SAMPLED = 0.1  # share of the components that a step uses
LEARNING_RATE = 5e-4
BATCH_SIZE = 64


def svm_correct(
    train: tuple[Array, NDArray[np.str_]], test: tuple[Array, NDArray[np.str_]]
) -> Booleans:
    """Whether a linear SVM predicts each label: (n, D), (n,) and (m, V, D), (m,) -> (m,).

    The margins of a clip's windows are averaged.
    """
    scaler = StandardScaler().fit(train[0].astype(np.float64))
    features, labels = scaler.transform(train[0].astype(np.float64)), train[1]
    held_out = held_out_rows(len(labels))
    scores = [
        _svm(features[~held_out], labels[~held_out], c).score(features[held_out], labels[held_out])
        if len(set(labels[~held_out])) > 1
        else 0.0
        for c in REGULARISATIONS
    ]
    model = _svm(features, labels, REGULARISATIONS[int(np.argmax(scores))])
    margins = np.mean(
        [
            model.decision_function(scaler.transform(window.astype(np.float64)))
            for window in np.moveaxis(test[0], 1, 0)
        ],
        axis=0,
    )
    # With two classes there is only one margin, that of the second.
    answers = (margins > 0).astype(int) if margins.ndim == 1 else margins.argmax(axis=1)
    return np.asarray(model.classes_[answers] == test[1])


def held_out_rows(rows: int) -> Booleans:
    """A random fifth: in a corpus of alternating classes, every fifth row would miss some."""
    return np.random.default_rng(0).permutation(rows) % HELD_OUT == 0


def _svm(features: Floats, labels: NDArray[np.str_], c: float) -> LinearSVC:
    return LinearSVC(C=c, dual=False, tol=1e-3, max_iter=1000).fit(features, labels)


class LowRankClassifier(nn.Module):
    """Features -> 128 components -> classes; a training step uses a tenth of the components."""

    def __init__(self, dim: int, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator
        self.down = nn.Linear(dim, COMPONENTS, bias=False)  # U
        self.up = nn.Linear(COMPONENTS, classes)  # V
        for weight in (self.down.weight, self.up.weight):
            nn.init.xavier_uniform_(weight, generator=generator)
        nn.init.zeros_(self.up.bias)

    def forward(self, features: Tensor) -> Tensor:  # (B, D) -> (B, C)
        if not self.training:
            return self.up(self.down(features))
        kept = torch.randperm(COMPONENTS, generator=self.generator)[: num_sampled()]
        components = nn.functional.linear(features, self.down.weight[kept])
        components = components * (COMPONENTS / len(kept))  # the expected sum of all components
        return nn.functional.linear(components, self.up.weight[:, kept], self.up.bias)


def num_sampled() -> int:
    """The number of components that a step uses."""
    return round(SAMPLED * COMPONENTS)


def low_rank_correct(
    train: tuple[Array, NDArray[np.str_]],
    test: tuple[Array, NDArray[np.str_]],
    *,
    steps: int,
    seed: int,
) -> Booleans:
    """The same with the low-rank classifier; the probabilities of a clip's windows are averaged."""
    scaler = StandardScaler().fit(train[0])
    classes, targets = np.unique(train[1], return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    model = LowRankClassifier(train[0].shape[1], len(classes), generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    features = torch.as_tensor(scaler.transform(train[0]), dtype=torch.float32)
    wanted = torch.as_tensor(targets)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(features), (BATCH_SIZE,), generator=generator)
        loss = nn.functional.cross_entropy(model(features[rows]), wanted[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    answers = _probabilities(model, scaler, test[0]).mean(dim=1).argmax(dim=1).numpy()
    return np.asarray(classes[answers] == test[1])


@torch.inference_mode()
def _probabilities(model: LowRankClassifier, scaler: Any, windows: Array) -> Tensor:
    """(m, V, D) -> (m, V, C)."""
    flat = scaler.transform(windows.reshape(-1, windows.shape[-1]))
    logits = model(torch.as_tensor(flat, dtype=torch.float32))
    return logits.softmax(dim=-1).unflatten(0, windows.shape[:2])


ENCODERS = ("pretrained", "untrained")
Passes = Mapping[tuple[str, int], Mapping[str, FeatureSet]]  # split, windows -> encoder


@dataclass(slots=True)
class ProbeResults:
    """Metrics and arrays by probe, and the reasons for those that were skipped."""

    metrics: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Clips:
    """The clips that a probe can use: those with its modality and label."""

    clip_ids: NDArray[np.str_]  # (n,)
    labels: NDArray[np.str_]  # (n,)
    folds: dict[str, tuple[Booleans, Booleans]]  # name -> train clips, test clips: (n,) each
    centre: dict[str, Array]  # encoder -> (n, D), one window
    windows: dict[str, Array]  # encoder -> (n, V, D)


def passes_for(params: EvaluateParams, splits: Mapping[str, int]) -> list[tuple[str, int]]:
    """The splits to encode, and with how many windows; the test split comes first."""
    needed = [("test", params.clips)]
    if params.probes:
        needed.append(("train", 1))
    if any(probe.folds for probe in params.probes.values()):
        needed += [(split, number) for split in splits for number in (1, params.clips)]
    return [one for one in dict.fromkeys(needed) if splits.get(one[0])]


def run_probes(
    params: EvaluateParams, passes: Passes, *, seed: int, progress: Progress = unseen
) -> ProbeResults:
    """Run every probe that has train and test clips; the others are skipped with a reason.

    The progress counts classifiers: on many clips each takes minutes.
    """
    found = ProbeResults()
    each = len(kinds(params)) * len(ENCODERS)
    counter = Counter(progress, each * len(params.probes))
    for name, probe in params.probes.items():
        clips = _clips(probe, params, passes)
        why = _why_not(probe, clips)
        if why:
            found.skipped[f"probe {name}"] = why
            counter.add(each)
            continue
        found.metrics[name], arrays = _probe(probe, params, clips, seed=seed, counter=counter)
        found.arrays.update({f"probe-{name}-{kind}": values for kind, values in arrays.items()})
    return found


def kinds(params: EvaluateParams) -> tuple[str, ...]:
    """The classifiers of each probe, which it trains on the features of both encoders."""
    return ("svm", "low_rank") if params.low_rank_steps else ("svm",)


@dataclass(frozen=True, slots=True)
class _Part:
    """The clips of a split that have the label, in both kinds of pass."""

    split: str
    first: FeatureSet
    rows: NDArray[np.integer]
    centre: Mapping[str, FeatureSet]
    windows: Mapping[str, FeatureSet]

    def label(self, name: str) -> NDArray[np.str_]:
        return self.first.labels.get(name, np.full(len(self.first.clip_ids), ""))[self.rows]


def _clips(probe: ProbeParams, params: EvaluateParams, passes: Passes) -> Clips:
    """Train and test clips; with folds, the clips of all splits."""
    splits = dict.fromkeys(split for split, _ in passes)
    parts = []
    for split in splits if probe.folds else [one for one in ("train", "test") if one in splits]:
        # Without folds, a clip is either for training or for testing, and has one pass.
        centre = passes.get((split, 1)) or passes[split, params.clips]
        windows = passes.get((split, params.clips)) or passes[split, 1]
        first = centre["pretrained"]
        present = getattr(first, f"has_{probe.modality}")
        named = first.labels.get(probe.label, np.full(len(present), "")) != ""
        parts.append(_Part(split, first, np.flatnonzero(present & named), centre, windows))
    where = np.concatenate([np.full(len(part.rows), part.split) for part in parts])
    fold_labels = {
        name: np.concatenate([part.label(name) for part in parts]) for name in probe.folds
    }

    def of(found: Mapping[str, FeatureSet], encoder: str, part: _Part) -> Array:
        return np.asarray(getattr(found[encoder], probe.modality)[part.rows])

    return Clips(
        clip_ids=np.concatenate([part.first.clip_ids[part.rows] for part in parts]),
        labels=np.concatenate([part.label(probe.label) for part in parts]),
        folds=official_folds(fold_labels)
        if fold_labels
        else {"": (where == "train", where == "test")},
        centre={
            encoder: np.concatenate([of(part.centre, encoder, part)[:, 0] for part in parts])
            for encoder in ENCODERS
        },
        windows={
            encoder: np.concatenate(
                _same_width([of(part.windows, encoder, part) for part in parts])
            )
            for encoder in ENCODERS
        },
    )


def _same_width(parts: Sequence[Array]) -> list[Array]:
    """Train clips have one window: it is repeated to the width of the test clips."""
    most = max(part.shape[1] for part in parts)
    return [part if part.shape[1] == most else np.repeat(part, most, axis=1) for part in parts]


def official_folds(
    fold_labels: Mapping[str, NDArray[np.str_]],
) -> dict[str, tuple[Booleans, Booleans]]:
    """Labels -> the train and test clips of each official split.

    Several labels, or one with the values train and test: each label is a split. One label with
    other values: each value is the test part once, and the rest is for training.
    """
    values, *more = fold_labels.values()
    if not more and not set(values.tolist()) & {"train", "test"}:
        return {
            value: ((values != value) & (values != ""), values == value)
            for value in sorted(set(values.tolist()) - {""})
        }
    return {name: (values == "train", values == "test") for name, values in fold_labels.items()}


def _why_not(probe: ProbeParams, clips: Clips) -> str:
    """Why the probe cannot be trained or tested; empty if it can."""
    if not clips.folds:
        return f"no clip has a label named {', '.join(probe.folds)}"
    for name, sides in clips.folds.items():
        for rows, needed, side in zip(sides, (2, 1), ("train", "test"), strict=True):
            values = len(set(clips.labels[rows].tolist()))
            if values < needed:
                place = f"the {side} split" + (f" of {name}" if name else "")
                return f"label '{probe.label}' has {values} values in {place}; {needed} are needed"
    return ""


def _probe(
    probe: ProbeParams, params: EvaluateParams, clips: Clips, *, seed: int, counter: Counter
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Both classifiers on both encoders with the paired difference, and the result per clip."""
    tested = np.logical_or.reduce([test for _, test in clips.folds.values()])
    found: dict[str, Any] = {}
    arrays: dict[str, dict[str, Any]] = {}
    for kind in kinds(params):
        correct = {}
        for encoder in ENCODERS:
            answers = [
                _answers(kind, probe, params, clips, encoder, fold, seed=seed)
                for fold in clips.folds.values()
            ]
            correct[encoder] = np.stack(answers, axis=1)[tested]
            counter.add(1)
        found[kind] = _measured(correct, params, clips, seed=seed)
        ours = correct["pretrained"]
        arrays[kind] = {
            "clip_ids": clips.clip_ids[tested],
            "labels": clips.labels[tested],
            "correct": ours if len(clips.folds) > 1 else ours[:, 0].astype(bool),
        }
    return found, arrays


def _answers(
    kind: str,
    probe: ProbeParams,
    params: EvaluateParams,
    clips: Clips,
    encoder: str,
    fold: tuple[Booleans, Booleans],
    *,
    seed: int,
) -> Floats:
    """1 if the clip is predicted correctly, 0 if not, NaN if it is not a test clip: (n,)."""
    train, test = fold
    labels = np.where(train, clips.labels, "")
    rows = balanced(clips.clip_ids.tolist(), labels.tolist(), probe.train_labels)
    training = (clips.centre[encoder][rows], labels[rows])
    testing = (clips.windows[encoder][test], clips.labels[test])
    correct = (
        svm_correct(training, testing)
        if kind == "svm"
        else low_rank_correct(training, testing, steps=params.low_rank_steps, seed=seed)
    )
    answers = np.full(len(clips.labels), np.nan)
    answers[test] = correct
    return answers


def _measured(
    correct: Mapping[str, Floats], params: EvaluateParams, clips: Clips, *, seed: int
) -> dict[str, Any]:
    """The mean over the folds with its interval, and the standard deviation between them."""
    names = list(clips.folds)
    how: dict[str, Any] = {"resamples": params.bootstrap, "seed": seed}
    how["statistic"] = over_folds(len(names))
    chance = float(
        np.mean([majority_share(clips.labels[test].tolist()) for _, test in clips.folds.values()])
    )
    found: dict[str, Any] = {
        encoder: measured(hits, chance=chance, **how) for encoder, hits in correct.items()
    }
    if len(names) > 1:
        for encoder, hits in correct.items():
            each = np.nanmean(hits, axis=0)
            found[encoder]["deviation"] = round(float(each.std(ddof=1)), 6)
            found[encoder]["folds"] = len(names)
            found[f"{encoder}_by_fold"] = {
                name: {"value": round(float(value), 6)}
                for name, value in zip(names, each, strict=True)
            }
    found["difference"] = measured_difference(correct["pretrained"], correct["untrained"], **how)
    return found
