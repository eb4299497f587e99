"""How sure a number is: resamples of patients, not of films, and the interval that they give."""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike

from cxr_fastai.metrics.scores import Floats

LEVEL = 0.95  # of every interval
CHUNK = 2_000_000  # weights in memory at a time (16 MB)


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
    from scipy.special import stdtrit

    samples = samples[~np.isnan(samples)]
    if np.isnan(value) or len(samples) < 2 or patients < 2:
        return np.nan, np.nan
    reach = stdtrit(patients - 1, (1 + LEVEL) / 2) * np.sqrt(patients / (patients - 1)) * samples.std(ddof=1)
    return logit_interval(value, reach, patients)


def logit_interval(value: float, reach: float, patients: int) -> tuple[float, float]:
    """95 % interval of a value in [0, 1] from half of its interval on the plain scale, carried to the logit scale.

    See `interval`, also for a value of exactly 0 or 1, whose `reach` says nothing; NaN has none.
    """
    from scipy.special import expit, logit

    if np.isnan(reach):
        return np.nan, np.nan
    if min(value, 1 - value) < 1e-9:
        bound = ((1 - LEVEL) / 2) ** (1 / patients)
        return (bound, 1.0) if value > 0.5 else (0.0, 1 - bound)
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
