"""Statistics written out, for tests to compare with."""

import numpy as np
import scipy.stats


def by_formula(y, X, interval=0.95):
    """Least squares by numpy, HC3 by its formula, p and bounds by Student's t."""
    beta = np.linalg.lstsq(X, y, rcond=None)[0]
    inverse = np.linalg.inv(X.T @ X)
    leverage = np.einsum("ni,ij,nj->n", X, inverse, X)
    residual = y - X @ beta
    middle = X.T @ np.diag((residual / (1 - leverage)) ** 2) @ X
    error = np.sqrt(np.diag(inverse @ middle @ inverse))
    t = scipy.stats.t(len(y) - X.shape[1])
    reach = t.ppf((1 + interval) / 2) * error
    r2 = 1 - (residual**2).sum() / ((y - y.mean()) ** 2).sum()
    return np.stack([beta, error, beta - reach, beta + reach, 2 * t.sf(np.abs(beta / error))], 1), r2
