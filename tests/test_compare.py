"""Two models compared, predictive values, reliability and subgroups: facts with exact numbers."""

import numpy as np
import pytest
from scipy.stats import norm

from cxr_fastai.errors import DataError
from cxr_fastai.metrics import (
    auroc,
    compare,
    delong,
    evaluate_predictions,
    expected_calibration_error,
    fit_temperature,
    predictive_values,
    reliability,
    subgroups,
)
from cxr_fastai.metrics.subgroups import age_band

# Albumin, total protein, K-G score, and whether surgery helped: 43 patients with ovarian cancer (DeLong et al., 1988),
# as printed with its results in the SAS/STAT User's Guide, "Comparing Receiver Operating Characteristic Curves".
OVARIAN = """
3.0 5.8 10 0 3.2 6.3 5 1 3.9 6.8 3 1 2.8 4.8 6 0 3.2 5.8 3 1 0.9 4.0 5 0 2.5 5.7 8 0 1.6 5.6 5 1 3.8 5.7 5 1 3.7 6.7 6 1
3.2 5.4 4 1 3.8 6.6 6 1 4.1 6.6 5 1 3.6 5.7 5 1 4.3 7.0 4 1 3.6 6.7 4 0 2.3 4.4 6 1 4.2 7.6 4 0 4.0 6.6 6 0 3.5 5.8 6 1
3.8 6.8 7 1 3.0 4.7 8 0 4.5 7.4 5 1 3.7 7.4 5 1 3.1 6.6 6 1 4.1 8.2 6 1 4.3 7.0 5 1 4.3 6.5 4 1 3.2 5.1 5 1 2.6 4.7 6 1
3.3 6.8 6 0 1.7 4.0 7 0 3.7 6.1 5 1 3.3 6.3 7 1 4.2 7.7 6 1 3.5 6.2 5 1 2.9 5.7 9 0 2.1 4.8 7 1 2.8 6.2 8 0 4.0 7.0 7 1
3.3 5.7 6 1 3.7 6.9 5 1 3.6 6.6 5 1
"""


def test_delong_gives_the_published_figures() -> None:
    albumin, protein, score, y = np.array(OVARIAN.split(), dtype=float).reshape(-1, 4).T
    for test, area, difference, low, high, p in (
        (albumin, 0.7366, 0.0108, -0.1761, 0.1976, 0.9102),
        (protein, 0.6478, -0.0780, -0.2830, 0.1271, 0.4561),
    ):
        found = delong(y, test, 10 - score)
        rounded = [round(found[key], 4) for key in ("auroc_a", "auroc_b", "difference", "low", "high", "p")]
        assert rounded == [area, 0.7258, difference, low, high, p]


def test_delong_is_the_bootstrap_where_films_are_independent() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400)
    a, b = y + rng.normal(size=400), y + rng.normal(size=400)
    exact = delong(y, a, b)
    p_a, p_b = (np.stack([1 - norm.cdf(s), norm.cdf(s)], axis=1) for s in (a, b))
    found = compare(y, p_a, p_b, np.arange(400), ["n", "p"], task="binary")
    assert found["delong"] == exact
    assert found["metrics"]["auroc"]["difference"] == pytest.approx(exact["difference"], abs=1e-12)
    assert found["metrics"]["auroc"]["low"] == pytest.approx(exact["low"], abs=0.01)
    assert found["metrics"]["auroc"]["p"] == pytest.approx(exact["p"], abs=0.05)


def test_a_model_does_not_differ_from_itself() -> None:
    rng = np.random.default_rng(1)
    y, p = np.arange(40) % 2, rng.random(40)
    both = np.stack([1 - p, p], axis=1)
    found = compare(y, both, both, np.arange(40), ["n", "p"], task="binary")
    assert found["metrics"]["auroc"] == {
        "a": auroc(y, p), "b": auroc(y, p), "difference": 0, "low": 0, "high": 0, "p": 1,
    }  # fmt: skip
    assert (found["delong"]["z"], found["delong"]["p"]) == (0, 1)


def test_a_better_model_is_told_by_patients_not_films() -> None:
    rng = np.random.default_rng(2)
    y = np.repeat(np.arange(60) % 2, 5)
    score = np.repeat(rng.normal(size=60), 5)
    a, b = norm.cdf(1.5 * y + score), norm.cdf(0.5 * y + np.repeat(rng.normal(size=60), 5))
    arguments = ([y, np.stack([1 - a, a], 1), np.stack([1 - b, b], 1)], {"classes": ["n", "p"], "task": "binary"})
    by_patient = compare(*arguments[0], np.repeat(np.arange(60), 5), **arguments[1])["metrics"]["auroc"]
    by_film = compare(*arguments[0], np.arange(300), **arguments[1])["metrics"]["auroc"]
    assert by_patient["high"] - by_patient["low"] > 1.8 * (by_film["high"] - by_film["low"])


def test_compare_measures_all_tasks_and_needs_both_classes() -> None:
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.ones(3), 60)
    found = compare(np.arange(60) % 3, p, p[::-1], np.arange(60), ["a", "b", "c"], task="multiclass")
    expected = evaluate_predictions(np.arange(60) % 3, p, ["a", "b", "c"], np.arange(60), task="multiclass", n_boot=0)
    assert found["metrics"]["auroc"]["a"] == expected["metrics"]["auroc"]["value"]
    assert found["delong"] is None
    with pytest.raises(DataError, match="not 1 positive, 3 negative"):
        delong([0, 0, 0, 1], [1, 2, 3, 4], [1, 2, 3, 4])


def test_predictive_values_follow_bayes() -> None:
    y = np.array([1] * 100 + [0] * 100)
    called = np.array([1] * 90 + [0] * 10 + [1] * 20 + [0] * 80)  # sensitivity 0.9, specificity 0.8
    same = predictive_values(y, called, np.arange(200), 0.5)
    assert same["ppv"]["value"] == pytest.approx(90 / 110)
    assert same["npv"]["value"] == pytest.approx(80 / 90)
    rare = predictive_values(y, called, np.arange(200), 0.01)
    assert rare["ppv"]["value"] == pytest.approx(0.9 * 0.01 / (0.9 * 0.01 + 0.2 * 0.99))
    assert rare["npv"]["value"] == pytest.approx(0.8 * 0.99 / (0.8 * 0.99 + 0.1 * 0.01))
    assert rare["ppv"]["low"] < rare["ppv"]["value"] < rare["ppv"]["high"]
    assert rare["ppv"]["n"] == 200


def test_reliability_bins_make_the_calibration_error() -> None:
    rng = np.random.default_rng(4)
    p = rng.random(500)
    y = (rng.random(500) < p**2).astype(float)
    y[::50] = np.nan
    bins = reliability(y, p)
    assert sum(b["n"] for b in bins) == 490
    error = sum(b["n"] * abs(b["mean"] - b["observed"]) for b in bins) / 490
    assert error == pytest.approx(expected_calibration_error(y, p), abs=1e-12)
    first = reliability([0] * 30 + [1] * 10, [0.2] * 40)[0]  # Wilson's interval of 10 in 40
    assert (first["observed"], round(first["observed_low"], 4), round(first["observed_high"], 4)) == (
        0.25,
        0.1419,
        0.4019,
    )


def test_subgroups_are_measured_alone() -> None:
    rng = np.random.default_rng(5)
    y, p = np.arange(80) % 2, rng.random(80)
    view, ids = np.array(["PA", "AP"] * 20 + ["PA", ""] * 20), np.arange(80)
    both = np.stack([1 - p, p], axis=1)
    ages = ["5", "40", "x", "101"] * 20
    found = subgroups(
        y, both, ["n", "p"], ids, {"view": view, "age": ages, "sex": ["F"] * 80}, task="binary", threshold=0.5
    )
    assert list(found) == ["view", "age"]  # one sex is no group
    assert [(g["group"], g["n"]) for g in found["view"]] == [("AP", 20), ("PA", 40), ("unknown", 20)]
    assert found["view"][1]["metrics"]["auroc"]["value"] is None  # PA: all of one class
    assert [g["group"] for g in found["age"]] == ["0-17", "40-59", "80+", "unknown"]
    assert [age_band(a) for a in ("17.9", "18", "39", "60.0", "nan", "-1")] == [
        "0-17", "18-39", "18-39", "60-79", "unknown", "unknown",
    ]  # fmt: skip


def test_temperature_lowers_the_calibration_error_and_changes_no_call() -> None:
    rng = np.random.default_rng(6)
    y = rng.integers(0, 2, 4000)
    logits = 3 * np.stack([-(2 * y - 1 + rng.normal(size=4000)), 2 * y - 1 + rng.normal(size=4000)], axis=1)
    sure = fit_temperature(logits[:2000], y[:2000])
    test, truth = logits[2000:], y[2000:]

    def told(z: np.ndarray) -> np.ndarray:
        return np.exp(z - np.logaddexp.reduce(z, axis=1, keepdims=True))

    before, after = told(test), told(test / sure)
    assert sure > 1.3
    assert expected_calibration_error(truth, before[:, 1]) == pytest.approx(0.0390, abs=1e-4)
    assert expected_calibration_error(truth, after[:, 1]) == pytest.approx(0.0226, abs=1e-4)
    assert (before.argmax(1) == after.argmax(1)).all()
