"""What is chosen on films that were not learned from: the threshold, and the temperature of the probabilities."""

import numpy as np
from numpy.typing import ArrayLike

from cxr_fastai.errors import DataError, UsageError

TEMPERATURES = (0.25, 10.0)


def youden_threshold(
    y: ArrayLike, p: ArrayLike, *, sensitivity: float | None = None, specificity: float | None = None
) -> float:
    """Choose the operating threshold on validation data.

    By default it maximises Youden's J = sensitivity + specificity - 1 (Cancer 3:32, 1950). With `sensitivity` it is the
    highest threshold that reaches that sensitivity, with `specificity` the lowest that reaches that specificity. It
    lies halfway between two observed scores (or between the outermost one and 0 or 1), so that it is not tied to one
    film; among equally good ones the middle one is taken.

    Parameters
    ----------
    y : (n,) of 0, 1 or NaN (unknown, left out)
    p : (n,) probabilities in [0, 1]
    sensitivity, specificity
        Targets in [0, 1]; at most one of them.

    Returns
    -------
    float
        In [0, 1]; an image is positive where ``p >= threshold``.

    Raises
    ------
    DataError
        If a class is missing, or no threshold reaches the target.
    UsageError
        If both targets are given.
    """
    y, p = np.asarray(y, dtype=float), np.asarray(p, dtype=float)
    y, p = y[~np.isnan(y)], p[~np.isnan(y)]
    positives, negatives = np.sort(p[y == 1]), np.sort(p[y == 0])
    if not len(positives) or not len(negatives):
        raise DataError(
            f"a threshold needs both classes, not {len(positives)} positive, {len(negatives)} negative images"
        )
    if sensitivity is not None and specificity is not None:
        raise UsageError("a threshold can reach a sensitivity or a specificity, not both; give one target")
    steps = np.concatenate([[0.0], np.unique(p), [1.0]])
    thresholds = (steps[:-1] + steps[1:]) / 2
    found = 1 - np.searchsorted(positives, thresholds, side="left") / len(positives)
    spared = np.searchsorted(negatives, thresholds, side="left") / len(negatives)
    if sensitivity is not None:
        good = np.flatnonzero(found >= sensitivity - 1e-12)[-1:]
    elif specificity is not None:
        good = np.flatnonzero(spared >= specificity - 1e-12)[:1]
    else:
        j = found + spared
        good = np.flatnonzero(j >= j.max() - 1e-12)
    if not len(good):
        raise DataError(f"no threshold reaches specificity {specificity}: some negatives have probability 1; aim lower")
    return float(thresholds[good[(len(good) - 1) // 2]])


def fit_temperature(logits: ArrayLike, labels: ArrayLike, multilabel: bool = False) -> float:
    """Find the temperature T > 0 whose softmax (or sigmoid) of logits / T has the least negative log-likelihood.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. Films that are told apart without a fault would
    ask for T = 0, that is for probabilities of 0 and 1, which so many films cannot prove. So a film counts, as one of n
    of its class, for it with (n + 1) / (n + k) and for each other with 1 / (n + k): the targets of Platt,
    "Probabilistic outputs for support vector machines", 1999. With many films these are 1 and 0. T is held within
    [0.25, 10].

    Parameters
    ----------
    logits : (n, k)
    labels : (n,) class indices, or with `multilabel` (n, k) of 0, 1 or NaN (unknown, left out)

    Returns
    -------
    float

    Raises
    ------
    DataError
        If there is no known label, shapes do not fit, or a logit is not finite.
    """
    from scipy.optimize import minimize_scalar

    given, y = np.asarray(logits, dtype=float), np.asarray(labels, dtype=float)
    if given.ndim != 2 or y.shape != given.shape[: y.ndim] or y.ndim != 1 + multilabel:
        raise DataError(f"a temperature needs logits (n, k) and their labels, not {given.shape} and {y.shape}")
    if not np.isfinite(given).all():
        raise DataError(f"{(~np.isfinite(given)).any(axis=1).sum()} of {len(given)} logits are not finite")
    known = ~np.isnan(y)
    if not known.any():
        raise DataError(f"a temperature needs labels that are known, not {len(y)} unknown ones")
    if not multilabel:
        given, y = given[known], np.eye(given.shape[1])[y[known].astype(int)]
    if multilabel:
        n, k = np.where(y == 1, np.nansum(y, axis=0), np.nansum(1 - y, axis=0)), 2
    else:
        n, k = (y @ y.sum(axis=0))[:, None], given.shape[1]
    target = (n * y + 1) / (n + k)

    def loss(log_t: float) -> float:
        z = given / np.exp(log_t)
        if multilabel:
            return float((np.logaddexp(0, z) - target * z)[known].mean())
        return float((np.logaddexp.reduce(z, axis=1) - (target * z).sum(1)).mean())

    low, high = np.log(TEMPERATURES)
    return float(np.exp(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6}).x))
