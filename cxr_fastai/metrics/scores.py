"""Scores of one class against the rest, as numbers and in many resamples at once.

Everything takes ``weights`` (b, n), one row a resample and one column an image, and answers (b,) values at once; a
weight is how often the image's patient was drawn. An image is called positive where ``p >= threshold``. A value that is
not defined (0/0) is NaN. Functions ending in ``_of`` (and `curves`) want arrays without unknown labels.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cxr_fastai.errors import DataError

BINS = 15  # of the calibration error, as in Guo et al. 2017
FILMS_PER_BIN = 25  # at least, so that a small test set gets fewer bins instead of noise

Floats = NDArray[np.float64]


def auroc(y: ArrayLike, p: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Area under the ROC curve: P(positive above negative) + P(tie) / 2.

    Parameters
    ----------
    y : (n,) of 0, 1 or NaN (unknown, left out)
    p : (n,) scores; any range
    weights : (b, n), optional
        How often each image counts, one row a resample.

    Returns
    -------
    float, or (b,) float64 with `weights`
        NaN where one class is missing.
    """
    return _answer(y, p, weights, lambda y, p, w: curves(y, p, w)[0])


def average_precision(y: ArrayLike, p: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Area under the precision-recall steps, sum of (R_i - R_{i-1}) P_i, as in scikit-learn; arguments as `auroc`."""
    return _answer(y, p, weights, lambda y, p, w: curves(y, p, w)[1])


def brier(y: ArrayLike, p: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Mean of (p - y)^2, in [0, 1] for one class against the rest (Brier 1950); arguments as `auroc`, p in [0, 1]."""
    return _answer(y, p, weights, brier_of)


def expected_calibration_error(y: ArrayLike, p: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Mean distance between the probability and the frequency of positives, over bins of equal mass, in [0, 1].

    At most 15 bins and at least 25 films a bin; equal probabilities share a bin; the bins stay the same in every
    resample. It is never below 0, so a perfectly calibrated model has an error above 0, too, the more the fewer films.
    Arguments as `auroc`, p in [0, 1].
    """
    return _answer(y, p, weights, calibration_error_of)


def confusion(truth: ArrayLike, predicted: ArrayLike, k: int) -> NDArray[np.int64]:
    """Count (truth, prediction) pairs of class indices 0 ... k-1; returns (k, k), rows truth, columns predicted."""
    cells = np.asarray(truth, dtype=int) * k + np.asarray(predicted, dtype=int)
    return np.bincount(cells, minlength=k * k).reshape(k, k)


def rates(y: ArrayLike, called: ArrayLike, weights: ArrayLike | None = None) -> dict[str, Any]:
    """Return accuracy, sensitivity (= recall), specificity, precision and F1 of yes/no calls.

    Parameters
    ----------
    y : (n,) of 0, 1 or NaN (unknown, left out)
    called : (n,) bool, such as ``p >= threshold``
    weights : (b, n), optional

    Returns
    -------
    dict of float, or of (b,) float64 with `weights`
        NaN for 0/0.
    """
    values = _answer(y, called, weights, lambda y, c, w: np.stack(rates_of(y, c.astype(bool), w), axis=1))
    names = ("accuracy", "sensitivity", "specificity", "precision", "f1")
    found = dict(zip(names, values.T if weights is not None else map(float, values), strict=True))
    return found | {"recall": found["sensitivity"]}


def _answer(y: ArrayLike, p: ArrayLike, weights: ArrayLike | None, function: Callable) -> Any:
    """Leave out unknown labels, give a single resample to who brings none, and take it off again."""
    y, p = np.asarray(y, dtype=float), np.asarray(p, dtype=float)
    if y.shape != p.shape or y.ndim != 1:
        raise DataError(f"labels {y.shape} and scores {p.shape} must be of one length; give (n,) and (n,)")
    known = ~np.isnan(y)
    if weights is None:
        value = function(y[known], p[known], np.ones((1, known.sum())))[0]
        return float(value) if value.ndim == 0 else value
    return function(y[known], p[known], np.asarray(weights, dtype=float)[:, known])


def ratio(part: Any, whole: Any) -> Floats:
    """Divide; 0/0 is NaN."""
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole > 0)


def curves(y: Floats, p: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """AUROC and average precision, (b,) each, from one sort; ties make one step."""
    if not len(y):
        return np.full(len(weights), np.nan), np.full(len(weights), np.nan)
    order = np.argsort(-p, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(p[order])), len(p) - 1)
    ordered = weights[:, order]
    called = np.cumsum(ordered, axis=1)[:, ends]
    true = np.cumsum(ordered * y[order], axis=1)[:, ends]
    false = called - true
    gained, lost = (np.diff(side, axis=1, prepend=0) for side in (true, false))
    positives, negatives = true[:, -1], false[:, -1]
    area = (lost * (true - gained / 2)).sum(axis=1)
    precision = np.divide(true, called, out=np.zeros_like(true), where=called > 0)
    return ratio(area, positives * negatives), ratio((gained * precision).sum(axis=1), positives)


def brier_of(y: Floats, p: Floats, weights: Floats) -> Floats:
    """Return `brier` in each resample, (b,)."""
    return ratio(weights @ (p - y) ** 2, weights.sum(axis=1))


def rates_of(y: Floats, called: NDArray[np.bool_], weights: Floats) -> tuple[Floats, ...]:
    """Return accuracy, sensitivity, specificity, precision and F1 in each resample, (b,) each."""
    cells = np.stack([y * called, (1 - y) * called, y * ~called, (1 - y) * ~called], axis=1)
    tp, fp, fn, tn = (weights @ cells).T
    return (
        ratio(tp + tn, tp + fp + fn + tn), ratio(tp, tp + fn), ratio(tn, tn + fp), ratio(tp, tp + fp),
        ratio(2 * tp, 2 * tp + fp + fn),
    )  # fmt: skip


def calibration_error_of(y: Floats, p: Floats, weights: Floats) -> Floats:
    """Return `expected_calibration_error` in each resample, (b,)."""
    bin_of = bins_of(p)
    member = bin_of[:, None] == np.arange(bin_of.max(initial=0) + 1)
    gap = np.abs(weights @ (member * (y - p)[:, None])).sum(axis=1)
    return ratio(gap, weights.sum(axis=1))


def bins_of(p: Floats) -> NDArray[np.int64]:
    """Return the bin of each probability (n,): bins of equal mass, equal probabilities in one."""
    bins = int(np.clip(len(p) // FILMS_PER_BIN, 1, BINS))
    edges = np.unique(np.quantile(p, np.arange(1, bins) / bins)) if len(p) else np.empty(0)
    return np.searchsorted(edges, p, side="left")


def reliability(y: ArrayLike, p: ArrayLike) -> list[dict[str, Any]]:
    """Compare probability and frequency in the bins of the calibration error, for a reliability diagram.

    Parameters
    ----------
    y : (n,) of 0, 1 or NaN (unknown, left out)
    p : (n,) in [0, 1]

    Returns
    -------
    list of dict
        {"low", "high", "n", "mean", "observed", "observed_low", "observed_high"} a bin: the range and mean of the
        probabilities, and the frequency of positives with Wilson's 95 % interval (J Am Stat Assoc 1927), which takes
        films for independent.
    """
    from scipy.stats import binomtest

    known = ~np.isnan(np.asarray(y, dtype=float))
    truth, told = np.asarray(y, dtype=float)[known], np.asarray(p, dtype=float)[known]
    of, found = bins_of(told), []
    for number in np.unique(of):
        inside = of == number
        n, positives = int(inside.sum()), int(truth[inside].sum())
        part = told[inside]
        wilson = binomtest(positives, n).proportion_ci(method="wilson")
        found.append({
            "low": float(part.min()), "high": float(part.max()), "n": n, "mean": float(part.mean()),
            "observed": positives / n, "observed_low": float(wilson.low), "observed_high": float(wilson.high),
        })  # fmt: skip
    return found
