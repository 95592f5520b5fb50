"""A linear classifier on frozen features: how much of a label the encoder already shows.

n clips, V windows of a test clip, D encoder width, C classes. Two classifiers, as in the paper: a
linear SVM, and the low-rank one, C = U V with 128 components of which a tenth is sampled at each
step. Both learn from one window a clip; a test clip's answer is the mean over its windows.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from vatt.evaluation.features import Array
from vatt.metrics import Booleans, Floats

REGULARISATIONS = (0.001, 0.01, 0.1, 1.0)  # C of the SVM, chosen on a fifth of the train clips
HELD_OUT = 5

COMPONENTS = 128  # paper, appendix: rank of the classifier,
SAMPLED = 0.1  # the share of it that a step sees,
LEARNING_RATE = 5e-4
BATCH_SIZE = 64


def svm_correct(
    train: tuple[Array, NDArray[np.str_]], test: tuple[Array, NDArray[np.str_]]
) -> Booleans:
    """Whether a linear SVM names each test clip's label: (n, D), (n,) and (m, V, D), (m,) -> (m,).

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
    # Of two classes there is one margin, that of the second.
    answers = (margins > 0).astype(int) if margins.ndim == 1 else margins.argmax(axis=1)
    return np.asarray(model.classes_[answers] == test[1])


def held_out_rows(rows: int) -> Booleans:
    """A drawn fifth: every fifth row of a corpus made in turns would be of few classes."""
    return np.random.default_rng(0).permutation(rows) % HELD_OUT == 0


def _svm(features: Floats, labels: NDArray[np.str_], c: float) -> LinearSVC:
    return LinearSVC(C=c, dual=False, tol=1e-3, max_iter=1000).fit(features, labels)


class LowRankClassifier(nn.Module):
    """Features -> 128 components -> classes; a training step sees a tenth of the components."""

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
        components = components * (COMPONENTS / len(kept))  # as large as all of them
        return nn.functional.linear(components, self.up.weight[:, kept], self.up.bias)


def num_sampled() -> int:
    """Components that a step sees."""
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
