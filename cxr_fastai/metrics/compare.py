"""Two models on the same films: whether one is better, or it is chance."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cxr_fastai.errors import DataError
from cxr_fastai.metrics.bootstrap import LEVEL, patient_bootstrap
from cxr_fastai.metrics.evaluation import METRICS, plain, statistic_of
from cxr_fastai.metrics.scores import Floats


def delong(y: ArrayLike, p_a: ArrayLike, p_b: ArrayLike) -> dict[str, float]:
    """Compare two AUROC on the same films (DeLong et al., Biometrics 1988; by midranks, Sun and Xu 2014).

    It takes films for independent; with several films a patient `compare` is the one to believe.

    Parameters
    ----------
    y : (n,) of 0, 1 or NaN (unknown, left out)
    p_a, p_b : (n,) scores

    Returns
    -------
    dict
        {"auroc_a", "auroc_b", "difference" (a - b), "low", "high" (95 %), "z", "p" (two-sided)}

    Raises
    ------
    DataError
        Where there are fewer than two positives or two negatives.
    """
    from scipy.stats import norm, rankdata

    y, scores = np.asarray(y, dtype=float), np.stack([p_a, p_b]).astype(float)
    y, scores = y[~np.isnan(y)], scores[:, ~np.isnan(y)]
    above, below = scores[:, y == 1], scores[:, y == 0]
    m, n = above.shape[1], below.shape[1]
    if min(m, n) < 2:
        raise DataError(f"two AUROC are compared on two films of each class or more, not {m} positive, {n} negative")
    ranks = rankdata(np.concatenate([above, below], axis=1), axis=1)
    of_positives = (ranks[:, :m] - rankdata(above, axis=1)) / n
    of_negatives = 1 - (ranks[:, m:] - rankdata(below, axis=1)) / m
    area = of_positives.mean(axis=1)
    covariance = np.cov(of_positives) / m + np.cov(of_negatives) / n
    difference = float(area[0] - area[1])
    error = float(np.sqrt(max(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1], 0)))
    z = difference / error if error else 0.0
    reach = float(norm.ppf((1 + LEVEL) / 2)) * error
    return {
        "auroc_a": float(area[0]), "auroc_b": float(area[1]), "difference": difference, "low": difference - reach,
        "high": difference + reach, "z": z, "p": float(2 * norm.sf(abs(z))),
    }  # fmt: skip


def compare(
    labels: ArrayLike,
    p_a: ArrayLike,
    p_b: ArrayLike,
    patient_ids: ArrayLike,
    classes: Sequence[str],
    *,
    task: str,
    positive: str | None = None,
    threshold_a: float | Mapping[str, float] | None = None,
    threshold_b: float | Mapping[str, float] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare every metric of two models on the same films, by resampling patients for both at once.

    Parameters
    ----------
    labels, patient_ids, classes, task, positive
        As in `evaluate_predictions`.
    p_a, p_b : (n, k) probabilities
    threshold_a, threshold_b : each model's own

    Returns
    -------
    dict
        {"n", "n_patients", "metrics": {name: {"a", "b", "difference", "low", "high", "p"}}, "delong"}: differences
        a - b with the interval of the bootstrap's standard error and Student's t, and the two-sided p of the same;
        `delong` for binary tasks, else None.
    """
    from scipy.stats import t

    ids = np.asarray(patient_ids).astype(str)
    both = [
        statistic_of(labels, p, classes, ids, task=task, positive=positive, threshold=threshold)
        for p, threshold in ((p_a, threshold_a), (p_b, threshold_b))
    ]

    def statistic(weights: Floats) -> Floats:
        return np.stack([one(weights)[:, 0] for one in both], axis=1)

    value, samples = patient_bootstrap(statistic, ids, n_boot, seed)
    patients = len(np.unique(ids))
    found = {}
    for i, name in enumerate(METRICS):
        difference, spread = value[0, i] - value[1, i], samples[:, 0, i] - samples[:, 1, i]
        spread = spread[~np.isnan(spread)]
        error = spread.std(ddof=1) * np.sqrt(patients / (patients - 1)) if len(spread) > 1 and patients > 1 else np.nan
        reach = t.ppf((1 + LEVEL) / 2, patients - 1) * error
        p = 2 * t.sf(abs(difference) / error, patients - 1) if error > 0 else (1.0 if difference == 0 else np.nan)
        numbers = {"a": value[0, i], "b": value[1, i], "difference": difference}
        found[name] = {key: plain(v) for key, v in
                       {**numbers, "low": difference - reach, "high": difference + reach, "p": p}.items()}  # fmt: skip
    exact = None
    if task == "binary":
        at = list(classes).index(positive or classes[-1])
        y = np.asarray(labels, dtype=float)
        exact = delong(np.where(np.isnan(y), np.nan, y == at), np.asarray(p_a)[:, at], np.asarray(p_b)[:, at])
    return {"n": len(ids), "n_patients": patients, "metrics": found, "delong": exact}
