"""The numbers: how good the probabilities are, each with its 95 % interval over patients and its n.

In: true labels and probabilities as arrays; out: plain floats and dictionaries that go into JSON as they are. Only
numpy is imported here (scipy inside the functions that need it): no pandas, no torch. 1,000 resamples of 10,000 films
are a matter of seconds.
"""

from cxr_fastai.metrics.bootstrap import (
    calibration_interval,
    interval,
    logit_interval,
    patient_bootstrap,
    resample_weights,
)
from cxr_fastai.metrics.compare import compare, delong
from cxr_fastai.metrics.conformal import conformal_scores, prediction_set
from cxr_fastai.metrics.evaluation import METRICS, evaluate_predictions, predictive_values
from cxr_fastai.metrics.operating import fit_temperature, youden_threshold
from cxr_fastai.metrics.scores import (
    auroc,
    average_precision,
    brier,
    confusion,
    expected_calibration_error,
    rates,
    reliability,
)
from cxr_fastai.metrics.subgroups import subgroups

__all__ = [
    "METRICS",
    "auroc",
    "average_precision",
    "brier",
    "calibration_interval",
    "compare",
    "conformal_scores",
    "confusion",
    "delong",
    "evaluate_predictions",
    "expected_calibration_error",
    "fit_temperature",
    "interval",
    "logit_interval",
    "patient_bootstrap",
    "prediction_set",
    "predictive_values",
    "rates",
    "reliability",
    "resample_weights",
    "subgroups",
    "youden_threshold",
]
