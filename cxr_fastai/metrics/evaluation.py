"""All figures of a set of predictions, each with its interval over patients and its n: what metrics.json holds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cxr_fastai.errors import DataError
from cxr_fastai.metrics.bootstrap import calibration_interval, interval, patient_bootstrap
from cxr_fastai.metrics.scores import Floats, brier_of, calibration_error_of, confusion, curves, rates_of, ratio

METRICS = (
    "auroc", "average_precision", "accuracy", "sensitivity", "specificity", "precision", "recall", "f1", "brier",
    "calibration_error",
)  # fmt: skip


def evaluate_predictions(
    labels: ArrayLike,
    probabilities: ArrayLike,
    classes: Sequence[str],
    patient_ids: ArrayLike,
    *,
    task: str,
    positive: str | None = None,
    threshold: float | Mapping[str, float] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure predictions; the dictionary is the contract of ``metrics.json``.

    Binary: everything is about the positive class, called at the threshold. Multi-class: calls are by argmax; accuracy
    is that of the call, the Brier score half the sum over classes (so in [0, 1], and for two classes as in binary), the
    calibration error that of the called class; all else are macro averages, one class against the rest. Multi-label:
    macro averages, each class at its own threshold. Macro averages leave out classes that do not define the value.

    Parameters
    ----------
    labels : (n,) class indices, or for multi-label (n, k) of 0 and 1; NaN where unknown (left out)
    probabilities : (n, k) in [0, 1]
    classes : k names, in the order of the columns
    patient_ids : (n,)
    task : "binary", "multiclass" or "multilabel"
    positive : the positive class of two; by default the second
    threshold : one for all, or one for each class by name; 0.5 by default; multi-class has none
    n_boot, seed : of the bootstrap over patients; without resamples low and high are None

    Returns
    -------
    dict
        ``n, n_patients, classes, positive, threshold, prevalence, confusion, metrics``, unless binary ``per_class``.
        A metric is ``{"value", "low", "high", "n"}``; n counts the images it is about: positives for sensitivity
        and recall, negatives for specificity, calls for precision. What is not defined is None. Confusion: rows
        truth, columns predicted, in the order of `classes`; multi-label: one ``[[tn, fp], [fn, tp]]`` a class.

    Raises
    ------
    DataError
        If shapes or names do not fit, or a label or probability is out of range.
    """
    p, ids = np.asarray(probabilities, dtype=float), np.asarray(patient_ids).astype(str)
    truth, at, cuts, called = _asked(labels, p, classes, ids, task, positive, threshold)
    names, y = [classes[i] for i in at], truth[:, at]
    statistic = statistic_of(labels, p, classes, ids, task=task, positive=positive, threshold=threshold)
    value, samples = patient_bootstrap(statistic, ids, n_boot, seed)
    bases = [{name: _basis(name, y[:, i], called[:, i], ids) for name in METRICS} for i in range(len(at))]
    if task != "binary":  # an average is of all images with a label, and no surer than its rarest class
        n = int((~np.isnan(y)).any(axis=1).sum())
        bases.insert(0, {name: (n, min(basis[name][1] for basis in bases)) for name in METRICS})
    entries = [
        {name: _entry(name, value[i, j], samples[:, i, j], *basis[name]) for j, name in enumerate(METRICS)}
        for i, basis in enumerate(bases)
    ]
    share = {name: plain(ratio((y[:, i] == 1).sum(), (y[:, i] >= 0).sum())) for i, name in enumerate(names)}
    return {
        "n": len(p),
        "n_patients": len(np.unique(ids)),
        "classes": list(classes),
        "positive": names[0] if task == "binary" else None,
        "threshold": cuts[names[0]] if cuts and task == "binary" else cuts,
        "prevalence": share[names[0]] if task == "binary" else share,
        "metrics": entries[0],
        "confusion": _confusions(truth, called, at, task),
    } | ({} if task == "binary" else {"per_class": dict(zip(names, entries[1:], strict=True))})


def statistic_of(
    labels: ArrayLike,
    probabilities: ArrayLike,
    classes: Sequence[str],
    ids: NDArray[Any],
    *,
    task: str,
    positive: str | None,
    threshold: float | Mapping[str, float] | None,
) -> Callable[[Floats], Floats]:
    """Return weights (b, n) -> all metrics (b, 1 or 1 + k, metrics): overall, then (unless binary) of each class."""
    p = np.asarray(probabilities, dtype=float)
    truth, at, _, called = _asked(labels, p, classes, ids, task, positive, threshold)
    y, q = truth[:, at], p[:, at]

    def statistic(weights: Floats) -> Floats:
        each = np.stack([_measure(y[:, i], q[:, i], called[:, i], weights) for i in range(len(at))], axis=1)
        return each if task == "binary" else np.concatenate([_overall(each, truth, p, weights, task), each], axis=1)

    return statistic


def _asked(
    labels: ArrayLike,
    p: Floats,
    classes: Sequence[str],
    ids: NDArray[Any],
    task: str,
    positive: str | None,
    threshold: float | Mapping[str, float] | None,
) -> tuple[Floats, list[int], dict[str, float] | None, NDArray[np.bool_]]:
    """Return truth (n, k), the columns asked about, their thresholds by name, and the calls (n, columns)."""
    truth = _truth(labels, p, ids, len(classes), task)
    names = [positive or classes[-1]] if task == "binary" else list(classes)
    if not set(names) <= set(classes):
        raise DataError(f"positive class {names[0]} is not one of {', '.join(classes)}; name one of them")
    at = [list(classes).index(name) for name in names]
    cuts = None if task == "multiclass" else _cuts(threshold, names)
    called = p.argmax(axis=1)[:, None] == at if cuts is None else p[:, at] >= np.array(list(cuts.values()))
    return truth, at, cuts, called


def _truth(labels: ArrayLike, p: Floats, ids: NDArray[Any], k: int, task: str) -> Floats:
    """Return labels (n, k) of 0, 1 and NaN, once everything fits."""
    y = np.asarray(labels, dtype=float)
    shape = (len(ids), k)
    if p.shape != shape or y.shape != (shape if task == "multilabel" else shape[:1]) or not len(ids):
        raise DataError(f"labels {y.shape}, probabilities {p.shape}, {len(ids)} patients and {k} classes do not fit")
    bad = ~((p >= 0) & (p <= 1)).all(axis=1)
    if bad.any():
        raise DataError(f"{bad.sum()} of {len(p)} images have a probability outside [0, 1], first row {bad.argmax()}")
    allowed = np.arange(2 if task == "multilabel" else k)
    strange = y[~np.isnan(y) & ~np.isin(y, allowed)]
    if len(strange):
        raise DataError(f"label {strange[0]:g} is not one of 0 ... {allowed[-1]}; unknown ones are NaN")
    return y if task == "multilabel" else np.where(np.isnan(y)[:, None], np.nan, y[:, None] == np.arange(k))


def _cuts(threshold: float | Mapping[str, float] | None, names: list[str]) -> dict[str, float]:
    if not isinstance(threshold, Mapping):
        return dict.fromkeys(names, 0.5 if threshold is None else float(threshold))
    missing = [name for name in names if name not in threshold]
    if missing:
        raise DataError(f"no threshold for {', '.join(missing)}, only for {', '.join(threshold) or 'none'}; give all")
    return {name: float(threshold[name]) for name in names}


def _measure(y: Floats, p: Floats, called: NDArray[np.bool_], weights: Floats) -> Floats:
    """Return all metrics of one class against the rest, (b, len(METRICS))."""
    known = ~np.isnan(y)
    y, p, called, weights = y[known], p[known], called[known], weights[:, known]
    accuracy, sensitivity, specificity, precision, f1 = rates_of(y, called, weights)
    gap = calibration_error_of(y, p, weights)
    found = (accuracy, sensitivity, specificity, precision, sensitivity, f1, brier_of(y, p, weights), gap)
    return np.stack([*curves(y, p, weights), *found], axis=1)


def _overall(each: Floats, truth: Floats, p: Floats, weights: Floats, task: str) -> Floats:
    """Macro averages over classes (b, 1, metrics); multi-class has accuracy, Brier and calibration of its own."""
    defined = ~np.isnan(each)
    macro = ratio(np.where(defined, each, 0).sum(axis=1), defined.sum(axis=1))
    if task == "multiclass":
        known = ~np.isnan(truth).any(axis=1)
        truth, p, weights = truth[known], p[known], weights[:, known]
        right, whole = truth[np.arange(len(p)), p.argmax(axis=1)], weights.sum(axis=1)
        macro[:, METRICS.index("accuracy")] = ratio(weights @ right, whole)
        macro[:, METRICS.index("brier")] = ratio(weights @ ((p - truth) ** 2).sum(axis=1) / 2, whole)
        macro[:, METRICS.index("calibration_error")] = calibration_error_of(right, p.max(axis=1), weights)
    return macro[:, None]


def _basis(name: str, y: Floats, called: NDArray[np.bool_], ids: NDArray[Any]) -> tuple[int, int]:
    """Count the images that a metric is about, and the patients it rests on: of two sides, those of the smaller."""
    known, positive, negative = ~np.isnan(y), y == 1, y == 0
    sides = {
        "sensitivity": [positive], "recall": [positive], "specificity": [negative], "precision": [known & called],
        "auroc": [positive, negative], "average_precision": [positive, negative], "f1": [positive, negative],
    }.get(name, [known])  # fmt: skip
    return int(sum(side.sum() for side in sides)), min(len(np.unique(ids[side])) for side in sides)


def _entry(name: str, value: float, samples: Floats, n: int, patients: int) -> dict[str, Any]:
    bounds = calibration_interval(value, samples) if name == "calibration_error" else interval(value, samples, patients)
    return {"value": plain(value), "low": plain(bounds[0]), "high": plain(bounds[1]), "n": n}


def plain(value: Any) -> float | None:
    """Return a number for JSON; what is not defined is None."""
    return float(value) if np.isfinite(value) else None


def _confusions(truth: Floats, called: NDArray[np.bool_], at: list[int], task: str) -> list[Any]:
    known = ~np.isnan(truth)
    if task == "multilabel":
        return [confusion(truth[known[:, i], i], called[known[:, i], i], 2).tolist() for i in at]
    said = np.where(called[:, 0], at[0], 1 - at[0]) if task == "binary" else called.argmax(axis=1)
    whole = known.all(axis=1)
    return confusion(truth[whole].argmax(axis=1), said[whole], truth.shape[1]).tolist()


def predictive_values(
    y: ArrayLike, called: ArrayLike, ids: ArrayLike, prevalence: float, n_boot: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Return positive and negative predictive value where a share `prevalence` of the films is positive (Bayes).

    PPV = s q / (s q + (1 - t)(1 - q)), NPV = t (1 - q) / (t (1 - q) + (1 - s) q), for sensitivity s, specificity t and
    prevalence q. Sensitivity and specificity are taken to be the same there.

    Parameters
    ----------
    y : (n,) of 0, 1 or NaN (unknown, left out)
    called : (n,) bool
    ids : (n,) patients
    prevalence : in (0, 1)

    Returns
    -------
    dict
        {"prevalence", "ppv": {"value", "low", "high", "n"}, "npv": {...}}
    """
    known = ~np.isnan(np.asarray(y, dtype=float))
    truth, said = np.asarray(y, dtype=float)[known], np.asarray(called, dtype=bool)[known]
    patients_of, q = np.asarray(ids).astype(str)[known], prevalence

    def statistic(weights: Floats) -> Floats:
        _, s, t, _, _ = rates_of(truth, said, weights)
        return np.stack(
            [ratio(s * q, s * q + (1 - t) * (1 - q)), ratio(t * (1 - q), t * (1 - q) + (1 - s) * q)], axis=1
        )

    value, samples = patient_bootstrap(statistic, patients_of, n_boot, seed)
    patients = min(len(np.unique(patients_of[truth == side])) for side in (0, 1))
    entries = [_entry(name, value[i], samples[:, i], len(truth), patients) for i, name in enumerate(("ppv", "npv"))]
    return {"prevalence": float(q), "ppv": entries[0], "npv": entries[1]}
