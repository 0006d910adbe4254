"""A linear probe: logistic regression on standardised coordinates, multinomial where there are several classes."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from clip_lens.methods.probes.labelled import UNLABELLED

C = 1.0
"""The inverse strength of the probe's L2 penalty, on standardised coordinates."""
MAX_ITER = 2000


class Fit(NamedTuple):
    """A probe's answers on held-out texts, with each text's class and its pair; its weights on standardised coordinates
    by class, their units, did it converge; and how often the training texts' most frequent class would be right."""

    right: Bool[ndarray, "text"]
    truth: Int[ndarray, "text"]
    pair: Int[ndarray, "text"]
    weights: dict[int, Float[ndarray, "d_model"]]
    unit: Float[ndarray, "d_model"]
    converged: bool
    chance: float

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    @property
    def balanced(self) -> float:
        """The mean over the classes of the accuracy on each one's texts."""
        return float(np.mean([self.right[self.truth == number].mean() for number in np.unique(self.truth)]))

    @property
    def pairs(self) -> int:
        """Held-out pairs of texts: the two of a pair depend on each other, so that together they count once."""
        return len(np.unique(self.pair))

    @property
    def right_pairs(self) -> float:
        """How many of those are right, a pair with one of its two texts being half a one."""
        return float(np.sum(self.right / np.bincount(self.pair)[self.pair]))


def fitted(
    train: Float[ndarray, "text d_model"],
    labels: Int[ndarray, "text"],
    test: Float[ndarray, "text d_model"],
    truth: Int[ndarray, "text"],
    pair: Int[ndarray, "text"],
) -> Fit:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler, model = StandardScaler().fit(train), LogisticRegression(C=C, max_iter=MAX_ITER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it goes into the table's notes
        model.fit(scaler.transform(train), labels)
    right = model.predict(scaler.transform(test)) == truth
    rows = model.coef_ if len(model.coef_) > 1 else [-model.coef_[0] / 2, model.coef_[0] / 2]
    weights = dict(zip(model.classes_.tolist(), rows, strict=True))
    chance = float((truth == np.bincount(labels).argmax()).mean())
    return Fit(right, truth, pair, weights, scaler.scale_, bool(model.n_iter_.max() < MAX_ITER), chance)


def tell(
    streams: Float[Tensor, "text pair d_model"], test: Bool[ndarray, "pair"], labels: Int[ndarray, "text pair"]
) -> Fit:
    """A probe that tells the labels, trained on the pairs that are not held out; texts without a label are left out."""
    x = streams.double().cpu().numpy()
    train, held = ((labels != UNLABELLED) & chosen for chosen in (~test, test))
    return fitted(x[train], labels[train], x[held], labels[held], np.nonzero(held)[1])
