"""A linear classifier on frozen features: how much of a label the encoder already shows.

n clips, D encoder width, C classes. Two classifiers, as in the paper: a linear SVM, and the
low-rank one, W = U V with 128 components of which a tenth is sampled at each step.
"""

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
    """Whether a linear SVM names each test clip's label: ((n, D), (n,)) twice -> (m,)."""
    scaler = StandardScaler().fit(train[0].astype(np.float64))
    features, labels = scaler.transform(train[0].astype(np.float64)), train[1]
    held_out = held_out_rows(len(labels))
    scores = [
        _svm(features[~held_out], labels[~held_out], c).score(features[held_out], labels[held_out])
        if len(set(labels[~held_out])) > 1
        else 0.0
        for c in REGULARISATIONS
    ]
    chosen = REGULARISATIONS[int(np.argmax(scores))]
    answers = _svm(features, labels, chosen).predict(scaler.transform(test[0].astype(np.float64)))
    return np.asarray(answers == test[1])


def held_out_rows(rows: int) -> Booleans:
    """A drawn fifth: every fifth row of a corpus made in turns would be of few classes."""
    return np.random.default_rng(0).permutation(rows) % HELD_OUT == 0


def _svm(features: Floats, labels: NDArray[np.str_], c: float) -> LinearSVC:
    return LinearSVC(C=c, dual=False, tol=1e-3, max_iter=1000).fit(features, labels)


class LowRankClassifier(nn.Module):
    """Features -> 128 components -> classes; in training only a tenth of the components answer."""

    def __init__(self, dim: int, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator
        self.down = nn.Linear(dim, COMPONENTS)
        self.up = nn.Linear(COMPONENTS, classes)
        for weight in (self.down.weight, self.up.weight):
            nn.init.xavier_uniform_(weight, generator=generator)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, features: Tensor) -> Tensor:  # (B, D) -> (B, C)
        components = self.down(features)
        if self.training:
            kept = torch.rand(components.shape, generator=self.generator) < SAMPLED
            components = components * kept / SAMPLED
        return self.up(components)


def low_rank_correct(
    train: tuple[Array, NDArray[np.str_]],
    test: tuple[Array, NDArray[np.str_]],
    *,
    steps: int,
    seed: int,
) -> Booleans:
    """The same with the low-rank classifier, trained for `steps` with Adam."""
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
    with torch.inference_mode():
        shown = torch.as_tensor(scaler.transform(test[0]), dtype=torch.float32)
        answers = model(shown).argmax(dim=1).numpy()
    return np.asarray(classes[answers] == test[1])
