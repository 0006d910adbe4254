"""A linear probe: logistic regression on standardised coordinates."""

from __future__ import annotations

import warnings
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

C = 1.0
"""The inverse strength of the probe's L2 penalty, on standardised coordinates."""
MAX_ITER = 2000


class Fit(NamedTuple):
    """A probe's answers on held-out texts, its weights on standardised coordinates, their units, did it converge."""

    right: Bool[ndarray, "text"]
    weight: Float[ndarray, "d_model"]
    unit: Float[ndarray, "d_model"]
    converged: bool

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


def fitted(
    train: Float[ndarray, "text d_model"],
    labels: Int[ndarray, "text"],
    test: Float[ndarray, "text d_model"],
    truth: Int[ndarray, "text"],
) -> Fit:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler, model = StandardScaler().fit(train), LogisticRegression(C=C, max_iter=MAX_ITER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it goes into the table's notes
        model.fit(scaler.transform(train), labels)
    right = model.predict(scaler.transform(test)) == truth
    return Fit(right, model.coef_[0], scaler.scale_, int(model.n_iter_[0]) < MAX_ITER)


def tell(
    streams: Float[Tensor, "text pair d_model"], test: Bool[ndarray, "pair"], labels: Int[ndarray, "text pair"]
) -> Fit:
    """A probe that tells the labels, trained on the pairs that are not held out."""
    x = streams.double().cpu().numpy()
    train = ~test
    return fitted(*(part[:, chosen].reshape(-1, *part.shape[2:]) for chosen in (train, test) for part in (x, labels)))
