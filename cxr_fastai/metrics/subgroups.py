"""The same figures for parts of the films: by view, sex, age band, source. A model may fail where few are looked at."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cxr_fastai.metrics.evaluation import evaluate_predictions

AGES = ((0, 18, "0-17"), (18, 40, "18-39"), (40, 60, "40-59"), (60, 80, "60-79"), (80, 200, "80+"))  # years
UNKNOWN = "unknown"


def age_band(age: str) -> str:
    """Return the band of an age in years as text; what is no age is unknown."""
    try:
        years = float(age)
    except ValueError:
        return UNKNOWN
    return next((name for low, high, name in AGES if low <= years < high), UNKNOWN)


def subgroups(
    labels: ArrayLike,
    probabilities: ArrayLike,
    classes: Sequence[str],
    patient_ids: ArrayLike,
    columns: Mapping[str, Sequence[str]],
    *,
    task: str,
    positive: str | None = None,
    threshold: float | Mapping[str, float] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Measure each group of each column that has two or more; arguments as `evaluate_predictions`.

    Parameters
    ----------
    columns
        Name -> a text a film; "age" is put into bands. An empty text is "unknown".

    Returns
    -------
    dict
        Column -> [{"group", "n", "n_patients", "metrics"}], in order of the name; what a small group does not define
        is None.
    """
    y, p, ids = np.asarray(labels, dtype=float), np.asarray(probabilities, dtype=float), np.asarray(patient_ids)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, texts in columns.items():
        group_of = np.array([age_band(t) if name == "age" else t or UNKNOWN for t in texts], dtype=object)
        groups = sorted(set(group_of))
        if len(groups) < 2:
            continue
        found[name] = []
        for group in groups:
            inside = group_of == group
            part = evaluate_predictions(
                y[inside], p[inside], classes, ids[inside], task=task, positive=positive, threshold=threshold
            )
            found[name].append({"group": group, **{key: part[key] for key in ("n", "n_patients", "metrics")}})
    return found
