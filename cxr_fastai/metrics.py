"""The numbers: how good the probabilities are, each with its 95 % interval over patients and its n.

In: true labels and probabilities as arrays; out: plain floats and dictionaries that go into JSON as they are. Only
numpy is imported here (scipy inside the two functions that need it): no pandas, no torch.

Everything that is resampled takes ``weights`` (b, n), one row a resample and one column an image, and answers (b,)
values at once; a weight is how often the image's patient was drawn. That is what makes 1,000 resamples of 10,000 films
a matter of seconds. An image is called positive where ``p >= threshold``. A value that is not defined (0/0) is NaN
inside this module and None in what `evaluate_predictions` returns.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cxr_fastai.errors import DataError, UsageError

METRICS = (
    "auroc", "average_precision", "accuracy", "sensitivity", "specificity", "precision", "recall", "f1", "brier",
    "calibration_error",
)  # fmt: skip
LEVEL = 0.95  # of every interval
BINS = 15  # of the calibration error, as in Guo et al. 2017
FILMS_PER_BIN = 25  # at least, so that a small test set gets fewer bins instead of noise
TEMPERATURES = (0.25, 10.0)
CHUNK = 2_000_000  # weights in memory at a time (16 MB)

Floats = NDArray[np.float64]


# One class against the rest ------------------------------------------------------------------------------------------


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
    return _answer(y, p, weights, lambda y, p, w: _curves(y, p, w)[0])


def average_precision(y: ArrayLike, p: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Area under the precision-recall steps, sum of (R_i - R_{i-1}) P_i, as in scikit-learn; arguments as `auroc`."""
    return _answer(y, p, weights, lambda y, p, w: _curves(y, p, w)[1])


def brier(y: ArrayLike, p: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Mean of (p - y)^2, in [0, 1] for one class against the rest (Brier 1950); arguments as `auroc`, p in [0, 1]."""
    return _answer(y, p, weights, _brier)


def expected_calibration_error(y: ArrayLike, p: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Mean distance between the probability and the frequency of positives, over bins of equal mass, in [0, 1].

    At most 15 bins and at least 25 films a bin; equal probabilities share a bin; the bins stay the same in every
    resample. It is never below 0, so a perfectly calibrated model has an error above 0, too, the more the fewer films.
    Arguments as `auroc`, p in [0, 1].
    """
    return _answer(y, p, weights, _calibration_error)


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
    values = _answer(y, called, weights, lambda y, c, w: np.stack(_rates(y, c.astype(bool), w), axis=1))
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


def _ratio(part: Any, whole: Any) -> Floats:
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole > 0)


def _curves(y: Floats, p: Floats, weights: Floats) -> tuple[Floats, Floats]:
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
    return _ratio(area, positives * negatives), _ratio((gained * precision).sum(axis=1), positives)


def _brier(y: Floats, p: Floats, weights: Floats) -> Floats:
    return _ratio(weights @ (p - y) ** 2, weights.sum(axis=1))


def _rates(y: Floats, called: NDArray[np.bool_], weights: Floats) -> tuple[Floats, ...]:
    cells = np.stack([y * called, (1 - y) * called, y * ~called, (1 - y) * ~called], axis=1)
    tp, fp, fn, tn = (weights @ cells).T
    return (
        _ratio(tp + tn, tp + fp + fn + tn), _ratio(tp, tp + fn), _ratio(tn, tn + fp), _ratio(tp, tp + fp),
        _ratio(2 * tp, 2 * tp + fp + fn),
    )  # fmt: skip


def _calibration_error(y: Floats, p: Floats, weights: Floats) -> Floats:
    bins = int(np.clip(len(p) // FILMS_PER_BIN, 1, BINS))
    edges = np.unique(np.quantile(p, np.arange(1, bins) / bins)) if len(p) else np.empty(0)
    member = np.searchsorted(edges, p, side="left")[:, None] == np.arange(len(edges) + 1)
    gap = np.abs(weights @ (member * (y - p)[:, None])).sum(axis=1)
    return _ratio(gap, weights.sum(axis=1))


# Chosen on validation ------------------------------------------------------------------------------------------------


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

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. T is held within [0.25, 10]: a validation set
    that is separated without a fault would ask for T = 0, that is for probabilities of 0 and 1.

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
        given, y = given[known], y[known]

    def loss(log_t: float) -> float:
        z = given / np.exp(log_t)
        if multilabel:
            return float((np.logaddexp(0, z) - np.nan_to_num(y) * z)[known].mean())
        own = np.take_along_axis(z, y[:, None].astype(int), axis=1)[:, 0]
        return float((np.logaddexp.reduce(z, axis=1) - own).mean())

    low, high = np.log(TEMPERATURES)
    return float(np.exp(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6}).x))


# The bootstrap over patients -----------------------------------------------------------------------------------------


def resample_weights(patient_ids: ArrayLike, n_boot: int = 1000, seed: int = 0) -> Iterator[Floats]:
    """Yield blocks (b, n) of weights, `n_boot` rows in all: how often each image's patient was drawn.

    Each resample draws as many patients as there are, with replacement; a patient's images stay together.
    """
    patients, row_of = np.unique(np.asarray(patient_ids).astype(str), return_inverse=True)
    rng, m = np.random.default_rng(seed), len(patients)
    block = max(1, CHUNK // max(1, len(row_of)))
    for start in range(0, n_boot, block):
        b = min(block, n_boot - start)
        drawn = rng.integers(m, size=(b, m)) + m * np.arange(b)[:, None]
        yield np.bincount(drawn.ravel(), minlength=b * m).reshape(b, m)[:, row_of].astype(float)


def patient_bootstrap(
    statistic: Callable[[Floats], Floats], patient_ids: ArrayLike, n_boot: int = 1000, seed: int = 0
) -> tuple[Floats, Floats]:
    """Value of a statistic, and what it would be in resamples of patients (not of images).

    Parameters
    ----------
    statistic
        Takes weights (b, n), returns (b, ...); NaN where a resample does not define it (only one class was drawn).
    patient_ids : (n,)
    n_boot, seed
        Resamples (0 for none), and the seed of their draw.

    Returns
    -------
    value : (...) float64
    samples : (n_boot, ...) float64, with NaN as the statistic gives it
    """
    value = statistic(np.ones((1, len(np.asarray(patient_ids)))))[0]
    blocks = [statistic(weights) for weights in resample_weights(patient_ids, n_boot, seed)]
    return value, np.concatenate(blocks) if blocks else np.empty((0, *value.shape))


def interval(value: float, samples: Floats, patients: int) -> tuple[float, float]:
    """95 % interval of a value in [0, 1] from its bootstrap samples.

    The bootstrap's standard error, carried to the logit scale (delta method), times Student's t for `patients`. Plain
    percentiles cover the truth too rarely near 1 (81 % at an AUROC of 0.99 with 60 patients; this covers 96 %, see
    ``bench/coverage.py``). A value of exactly 0 or 1 has no spread to see; it gets the exact (Clopper-Pearson) bound
    for as many patients without a fault, ``0.025 ** (1 / patients)``.

    Parameters
    ----------
    value
        NaN (not defined) has no interval.
    samples : (b,)
        Resamples that do not define the value (NaN) are left out.
    patients
        Patients whom the value rests on; of both classes where it compares them: those of the rarer one. Fewer than
        two have no interval.

    Returns
    -------
    low, high : float
        Within [0, 1] and around the value; NaN for none.
    """
    from scipy.special import expit, logit, stdtrit

    samples = samples[~np.isnan(samples)]
    if np.isnan(value) or len(samples) < 2 or patients < 2:
        return np.nan, np.nan
    tail = (1 - LEVEL) / 2
    if min(value, 1 - value) < 1e-9:
        bound = tail ** (1 / patients)
        return (bound, 1.0) if value > 0.5 else (0.0, 1 - bound)
    reach = stdtrit(patients - 1, 1 - tail) * np.sqrt(patients / (patients - 1)) * samples.std(ddof=1)
    low, high = expit(logit(value) + np.array([-1, 1]) * reach / (value * (1 - value)))
    return float(low), float(high)


def calibration_interval(value: float, samples: Floats) -> tuple[float, float]:
    """95 % interval of a calibration error: reflected percentiles, ``2 value - percentile``, around the value.

    Noise can only raise a calibration error, and a resample is noisier than the data; reflection takes that rise off.
    It covers the truth in about nine of ten studies where there is a real error, and is too high where there is none.
    """
    samples = samples[~np.isnan(samples)]
    if np.isnan(value) or len(samples) < 2:
        return np.nan, np.nan
    low, high = 2 * value - np.quantile(samples, [(1 + LEVEL) / 2, (1 - LEVEL) / 2])
    return float(np.clip(low, 0, value)), float(np.clip(high, value, 1))


# All of it -----------------------------------------------------------------------------------------------------------


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
    truth = _truth(labels, p, ids, len(classes), task)
    names = [positive or classes[-1]] if task == "binary" else list(classes)
    if not set(names) <= set(classes):
        raise DataError(f"positive class {names[0]} is not one of {', '.join(classes)}; name one of them")
    at = [list(classes).index(name) for name in names]
    cuts = None if task == "multiclass" else _cuts(threshold, names)
    called = p.argmax(axis=1)[:, None] == at if cuts is None else p[:, at] >= np.array(list(cuts.values()))
    y, q = truth[:, at], p[:, at]

    def statistic(weights: Floats) -> Floats:
        each = np.stack([_measure(y[:, i], q[:, i], called[:, i], weights) for i in range(len(at))], axis=1)
        return each if task == "binary" else np.concatenate([_overall(each, truth, p, weights, task), each], axis=1)

    value, samples = patient_bootstrap(statistic, ids, n_boot, seed)
    bases = [{name: _basis(name, y[:, i], called[:, i], ids) for name in METRICS} for i in range(len(at))]
    if task != "binary":  # an average is of all images with a label, and no surer than its rarest class
        n = int((~np.isnan(y)).any(axis=1).sum())
        bases.insert(0, {name: (n, min(basis[name][1] for basis in bases)) for name in METRICS})
    entries = [
        {name: _entry(name, value[i, j], samples[:, i, j], *basis[name]) for j, name in enumerate(METRICS)}
        for i, basis in enumerate(bases)
    ]
    share = {name: _plain(_ratio((y[:, i] == 1).sum(), (y[:, i] >= 0).sum())) for i, name in enumerate(names)}
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
    accuracy, sensitivity, specificity, precision, f1 = _rates(y, called, weights)
    gap = _calibration_error(y, p, weights)
    found = (accuracy, sensitivity, specificity, precision, sensitivity, f1, _brier(y, p, weights), gap)
    return np.stack([*_curves(y, p, weights), *found], axis=1)


def _overall(each: Floats, truth: Floats, p: Floats, weights: Floats, task: str) -> Floats:
    """Macro averages over classes (b, 1, metrics); multi-class has accuracy, Brier and calibration of its own."""
    defined = ~np.isnan(each)
    macro = _ratio(np.where(defined, each, 0).sum(axis=1), defined.sum(axis=1))
    if task == "multiclass":
        known = ~np.isnan(truth).any(axis=1)
        truth, p, weights = truth[known], p[known], weights[:, known]
        right, whole = truth[np.arange(len(p)), p.argmax(axis=1)], weights.sum(axis=1)
        macro[:, METRICS.index("accuracy")] = _ratio(weights @ right, whole)
        macro[:, METRICS.index("brier")] = _ratio(weights @ ((p - truth) ** 2).sum(axis=1) / 2, whole)
        macro[:, METRICS.index("calibration_error")] = _calibration_error(right, p.max(axis=1), weights)
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
    return {"value": _plain(value), "low": _plain(bounds[0]), "high": _plain(bounds[1]), "n": n}


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _confusions(truth: Floats, called: NDArray[np.bool_], at: list[int], task: str) -> list[Any]:
    known = ~np.isnan(truth)
    if task == "multilabel":
        return [confusion(truth[known[:, i], i], called[known[:, i], i], 2).tolist() for i in at]
    said = np.where(called[:, 0], at[0], 1 - at[0]) if task == "binary" else called.argmax(axis=1)
    whole = known.all(axis=1)
    return confusion(truth[whole].argmax(axis=1), said[whole], truth.shape[1]).tolist()
