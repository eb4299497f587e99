"""The metrics: they agree with scikit-learn, and their intervals hold what they promise."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from sklearn import metrics as sk

from cxr_fastai.errors import DataError, UsageError
from cxr_fastai.metrics import (
    METRICS,
    auroc,
    average_precision,
    brier,
    calibration_interval,
    confusion,
    evaluate_predictions,
    expected_calibration_error,
    fit_temperature,
    interval,
    patient_bootstrap,
    rates,
    resample_weights,
    youden_threshold,
)


def sample(n=200, seed=0, ties=True):
    rng = np.random.default_rng(seed)
    y = np.r_[0, 1, rng.integers(0, 2, n - 2)]
    p = 1 / (1 + np.exp(-rng.normal(size=n) - y))
    return y, np.round(p, 1) if ties else p, rng.integers(0, n // 2, n).astype(str)


def binary(y, p, ids=None, **options):
    ids = np.arange(len(y)) if ids is None else ids
    return evaluate_predictions(y, np.c_[1 - np.array(p), p], ["normal", "abnormal"], ids, task="binary", **options)


# One class against the rest


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [True, False])
def test_curves_and_brier_agree_with_scikit_learn(seed, ties):
    y, p, _ = sample(seed=seed, ties=ties)
    assert auroc(y, p) == pytest.approx(sk.roc_auc_score(y, p), abs=1e-12)
    assert average_precision(y, p) == pytest.approx(sk.average_precision_score(y, p), abs=1e-12)
    assert brier(y, p) == pytest.approx(sk.brier_score_loss(y, p), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_rates_agree_with_scikit_learn(seed):
    y, p, _ = sample(seed=seed)
    said = p >= 0.5
    found = rates(y, said)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(y, said), abs=1e-12)
    assert found["sensitivity"] == found["recall"] == pytest.approx(sk.recall_score(y, said), abs=1e-12)
    assert found["specificity"] == pytest.approx(sk.recall_score(y, said, pos_label=0), abs=1e-12)
    assert found["precision"] == pytest.approx(sk.precision_score(y, said), abs=1e-12)
    assert found["f1"] == pytest.approx(sk.f1_score(y, said), abs=1e-12)
    np.testing.assert_array_equal(confusion(y, said, 2), sk.confusion_matrix(y, said))


def test_weights_count_as_repeated_images():
    y, p, ids = sample(40)
    weights = np.concatenate(list(resample_weights(ids, 3)))
    for row, i in zip(weights, range(3), strict=True):
        again = np.repeat(np.arange(40), row.astype(int))
        assert auroc(y, p, weights)[i] == pytest.approx(sk.roc_auc_score(y[again], p[again]), abs=1e-12)
        assert average_precision(y, p, weights)[i] == pytest.approx(
            sk.average_precision_score(y[again], p[again]), abs=1e-12
        )
        assert brier(y, p, weights)[i] == pytest.approx(sk.brier_score_loss(y[again], p[again]), abs=1e-12)
        assert rates(y, p >= 0.5, weights)["f1"][i] == pytest.approx(sk.f1_score(y[again], p[again] >= 0.5), abs=1e-12)


def test_tiny_examples_by_hand():
    assert auroc([0, 1], [0.5, 0.5]) == 0.5
    assert auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == 0.75
    assert average_precision([0, 1, 1], [0.5, 0.4, 0.9]) == pytest.approx(1 / 2 + 2 / 6)
    assert rates([1, 1, 0, 0], [True, False, False, False])["f1"] == pytest.approx(2 / 3)


def test_calibration_error_by_hand():
    """A hundred films in four bins of 25, whose gaps are known."""
    p = np.repeat([0.1, 0.3, 0.6, 0.9], 25)
    positives = [5, 5, 15, 20]  # of 25: 0.2, 0.2, 0.6, 0.8
    y = np.concatenate([np.r_[np.ones(k), np.zeros(25 - k)] for k in positives])
    assert expected_calibration_error(y, p) == pytest.approx((0.1 + 0.1 + 0 + 0.1) / 4)
    assert expected_calibration_error([1, 0, 1, 0], [0.5] * 4) == pytest.approx(0)


def test_unknown_labels_are_left_out():
    y, p, _ = sample()
    some = np.where(np.arange(len(y)) % 3 == 0, np.nan, y)
    rest = ~np.isnan(some)
    for metric in (auroc, average_precision, brier, expected_calibration_error):
        assert metric(some, p) == metric(y[rest], p[rest])


def test_what_is_not_defined_is_nan():
    assert np.isnan(auroc([1, 1], [0.2, 0.3]))
    assert np.isnan(average_precision([0, 0], [0.2, 0.3]))
    assert np.isnan(rates([0, 0], [False, False])["sensitivity"])
    assert np.isnan(auroc([np.nan], [0.2]))
    assert np.isnan(expected_calibration_error([np.nan], [0.2]))


def test_lengths_must_agree():
    with pytest.raises(DataError, match=r"labels \(2,\) and scores \(3,\) must be of one length"):
        auroc([0, 1], [0.1, 0.2, 0.3])


# Chosen on validation


def test_youden_lies_between_the_scores_of_the_two_classes():
    assert youden_threshold([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9]) == 0.5


def test_youden_takes_the_best_cut():
    y, p = [0, 0, 0, 1, 0, 1, 1], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert youden_threshold(y, p) == pytest.approx(0.35)  # 3/3 + 3/4, against 2/3 + 4/4 at 0.55


def test_youden_is_the_best_of_all_thresholds():
    y, p, _ = sample(ties=False)
    fpr, tpr, _ = sk.roc_curve(y, p)
    found = rates(y, p >= youden_threshold(y, p))
    assert found["sensitivity"] + found["specificity"] - 1 == pytest.approx((tpr - fpr).max(), abs=1e-12)


def test_threshold_for_a_target():
    y, p, _ = sample(ties=False)
    for target in (0.0, 0.5, 0.9, 1.0):
        cut = youden_threshold(y, p, sensitivity=target)
        assert 0 <= cut <= 1
        assert rates(y, p >= cut)["sensitivity"] >= target
        higher = p[p >= cut].min() + 1e-9 if (p >= cut).any() else 1
        assert rates(y, p >= higher)["sensitivity"] < target or target == 0
        assert rates(y, p >= youden_threshold(y, p, specificity=target))["specificity"] >= target


def test_threshold_faults():
    with pytest.raises(DataError, match="needs both classes, not 0 positive, 2 negative"):
        youden_threshold([0, 0, np.nan], [0.1, 0.2, 0.9])
    with pytest.raises(DataError, match="no threshold reaches specificity 1"):
        youden_threshold([0, 1], [1.0, 1.0], specificity=1)
    with pytest.raises(UsageError, match="not both"):
        youden_threshold([0, 1], [0.2, 0.8], sensitivity=0.9, specificity=0.9)


@pytest.mark.parametrize("true_t", [0.5, 1.0, 3.0])
def test_temperature_is_found_again(true_t):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(20000, 3)) * 2
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    labels = (rng.random((len(z), 1)) > p.cumsum(axis=1)).sum(axis=1)
    assert fit_temperature(z * true_t, labels) == pytest.approx(true_t, rel=0.05)


def test_temperature_multilabel_ignores_unknown_labels():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(20000, 2)) * 2
    y = (rng.random(z.shape) < 1 / (1 + np.exp(-z))).astype(float)
    y[::3, 0] = np.nan
    assert fit_temperature(z * 2, y, multilabel=True) == pytest.approx(2, rel=0.05)


def test_temperature_of_a_separated_set_is_bounded():
    assert fit_temperature([[0.1, -0.1], [-0.1, 0.1]], [0, 1]) == pytest.approx(0.2 / np.log(2), rel=1e-4)
    assert fit_temperature([[0.01, -0.01], [-0.01, 0.01]], [0, 1]) == pytest.approx(0.25, rel=0.01)
    # Nine films of each of three classes: 10 / 12 for their own, 1 / 12 for each other.
    logits = np.eye(3)[np.repeat([0, 1, 2], 9)]
    assert fit_temperature(logits, logits.argmax(1)) == pytest.approx(1 / np.log(10), rel=1e-4)
    # A finding on two of three films: 3 / 4, and 1 / 3 on the third.
    logits = np.array([[np.log(3)], [np.log(3)], [-np.log(2)]])
    assert fit_temperature(logits, [[1], [1], [0]], multilabel=True) == pytest.approx(1, rel=1e-4)
    assert fit_temperature([[5, -5], [-5, 5]], [1, 0]) == pytest.approx(10, rel=0.01)


def test_temperature_faults():
    with pytest.raises(DataError, match=r"not \(2, 2\) and \(3,\)"):
        fit_temperature(np.zeros((2, 2)), [0, 1, 1])
    with pytest.raises(DataError, match="1 of 2 logits are not finite"):
        fit_temperature(np.array([[np.inf, 0], [0, 0]]), [0, 1])
    with pytest.raises(DataError, match="not 1 unknown ones"):
        fit_temperature([[0, 0]], [np.nan])


# The bootstrap


def test_a_patients_images_stay_together():
    ids = np.array(["b", "a", "b", "c", "a"])
    weights = np.concatenate(list(resample_weights(ids, 50)))
    assert weights.shape == (50, 5)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    np.testing.assert_array_equal(weights[:, 1], weights[:, 4])
    assert set(weights[:, [0, 1, 3]].sum(axis=1)) == {3}


def test_resamples_do_not_depend_on_the_block_size(monkeypatch):
    whole = np.concatenate(list(resample_weights(range(30), 20)))
    monkeypatch.setattr("cxr_fastai.metrics.bootstrap.CHUNK", 90)
    np.testing.assert_array_equal(np.concatenate(list(resample_weights(range(30), 20))), whole)


def test_bootstrap_is_the_same_for_the_same_seed():
    y, p, ids = sample()
    assert binary(y, p, ids, n_boot=50, seed=3) == binary(y, p, ids, n_boot=50, seed=3)
    assert binary(y, p, ids, n_boot=50, seed=3) != binary(y, p, ids, n_boot=50, seed=4)


def test_copies_of_films_do_not_narrow_the_interval():
    y, p, _ = sample(60)
    once = binary(y, p)["metrics"]["auroc"]
    copied = binary(np.tile(y, 4), np.tile(p, 4), np.tile(np.arange(60), 4))["metrics"]["auroc"]
    assert {k: copied[k] for k in ("value", "low", "high")} == pytest.approx(
        {k: once[k] for k in ("value", "low", "high")}
    )


def test_interval_contains_the_value_and_stays_within_0_and_1():
    rng = np.random.default_rng(0)
    for value in (0.01, 0.5, 0.999):
        low, high = interval(value, value + rng.normal(size=200) * 0.1, 20)
        assert 0 <= low < value < high <= 1


def test_a_perfect_value_gets_the_exact_bound():
    assert interval(1.0, np.ones(100), 75) == (pytest.approx(0.025 ** (1 / 75)), 1.0)
    assert interval(0.0, np.zeros(100), 75) == (0.0, pytest.approx(1 - 0.025 ** (1 / 75)))


def test_no_interval_without_samples_or_patients():
    assert np.isnan(interval(0.5, np.empty(0), 10)).all()
    assert np.isnan(interval(0.5, np.array([0.4, 0.6]), 1)).all()
    assert np.isnan(interval(np.nan, np.array([0.4, 0.6]), 10)).all()
    assert calibration_interval(0.1, np.array([0.3, 0.4])) == (0.0, 0.1)


def test_a_thousand_resamples_are_fast():
    y, p, ids = sample(10_000, ties=False)
    start = time.perf_counter()
    value, samples = patient_bootstrap(lambda w: auroc(y, p, w), ids)
    assert time.perf_counter() - start < 20
    assert value == auroc(y, p)
    assert samples.shape == (1000,)


# All of it


def test_binary_numbers():
    y, p, ids = sample()
    found = binary(y, p, ids, threshold=0.7)
    said = p >= 0.7
    assert list(found["metrics"]) == list(METRICS)
    value = {name: entry["value"] for name, entry in found["metrics"].items()}
    assert value["auroc"] == pytest.approx(sk.roc_auc_score(y, p), abs=1e-12)
    assert value["sensitivity"] == pytest.approx(sk.recall_score(y, said), abs=1e-12)
    assert value["precision"] == pytest.approx(sk.precision_score(y, said), abs=1e-12)
    assert found["confusion"] == sk.confusion_matrix(y, said).tolist()
    assert found["prevalence"] == y.mean()
    assert (found["n"], found["n_patients"], found["threshold"]) == (200, len(set(ids)), 0.7)
    assert (found["classes"], found["positive"]) == (["normal", "abnormal"], "abnormal")
    n = {name: entry["n"] for name, entry in found["metrics"].items()}
    assert (n["auroc"], n["sensitivity"], n["specificity"], n["precision"]) == (200, y.sum(), 200 - y.sum(), said.sum())
    for entry in found["metrics"].values():
        assert 0 <= entry["low"] <= entry["value"] <= entry["high"] <= 1


def test_binary_positive_class_may_come_first():
    y, p, ids = sample()
    a = binary(y, p, ids, threshold=0.7)
    b = evaluate_predictions(
        1 - y,
        np.c_[p, 1 - p],
        ["abnormal", "normal"],
        ids,
        task="binary",
        positive="abnormal",
        threshold={"abnormal": 0.7},
    )
    assert b["metrics"] == a["metrics"]
    assert b["confusion"] == np.flip(a["confusion"]).tolist()
    assert b["prevalence"] == a["prevalence"]


def test_multiclass_agrees_with_scikit_learn():
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(4), 300)
    y = np.where(rng.random(300) < 0.5, p.argmax(axis=1), rng.integers(0, 4, 300))
    said, names = p.argmax(axis=1), list("abcd")
    found = evaluate_predictions(y, p, names, np.arange(300), task="multiclass", n_boot=20)
    value = {name: entry["value"] for name, entry in found["metrics"].items()}
    one_hot = np.eye(4)[y]
    expected = {
        "auroc": sk.roc_auc_score(y, p, multi_class="ovr", average="macro"),
        "average_precision": sk.average_precision_score(one_hot, p, average="macro"),
        "accuracy": sk.accuracy_score(y, said),
        "recall": sk.recall_score(y, said, average="macro"),
        "sensitivity": sk.recall_score(y, said, average="macro"),
        "precision": sk.precision_score(y, said, average="macro"),
        "f1": sk.f1_score(y, said, average="macro"),
        "brier": ((p - one_hot) ** 2).sum(axis=1).mean() / 2,
    }
    for name, number in expected.items():
        assert value[name] == pytest.approx(number, abs=1e-12), name
    assert found["confusion"] == sk.confusion_matrix(y, said).tolist()
    assert list(found["per_class"]) == names
    assert found["per_class"]["c"]["auroc"]["value"] == pytest.approx(sk.roc_auc_score(y == 2, p[:, 2]), abs=1e-12)
    assert found["threshold"] is found["positive"] is None
    assert sum(found["prevalence"].values()) == pytest.approx(1)


def test_multilabel_agrees_with_scikit_learn_class_by_class():
    rng = np.random.default_rng(2)
    y = rng.integers(0, 2, (100, 3)).astype(float)
    p = np.clip(rng.random((100, 3)) + 0.2 * y, 0, 1)
    y[:30, 1] = np.nan
    cuts = {"Effusion": 0.5, "Mass": 0.6, "Nodule": 0.7}
    found = evaluate_predictions(y, p, list(cuts), np.arange(100), task="multilabel", threshold=cuts, n_boot=20)
    assert found["threshold"] == cuts
    for i, (name, cut) in enumerate(cuts.items()):
        known = ~np.isnan(y[:, i])
        entry = found["per_class"][name]
        assert entry["auroc"]["value"] == pytest.approx(sk.roc_auc_score(y[known, i], p[known, i]), abs=1e-12)
        assert entry["auroc"]["n"] == known.sum()
        assert entry["f1"]["value"] == pytest.approx(sk.f1_score(y[known, i], p[known, i] >= cut), abs=1e-12)
        assert found["confusion"][i] == sk.confusion_matrix(y[known, i], p[known, i] >= cut).tolist()
        assert found["prevalence"][name] == y[known, i].mean()
    mean = np.mean([found["per_class"][name]["auroc"]["value"] for name in cuts])
    assert found["metrics"]["auroc"]["value"] == pytest.approx(mean, abs=1e-12)
    assert found["metrics"]["auroc"]["n"] == 100


def test_undefined_values_are_null_in_json():
    found = binary([0, 0, 0], [0.1, 0.2, 0.3], n_boot=20)
    assert found["metrics"]["auroc"] == {"value": None, "low": None, "high": None, "n": 3}
    assert found["metrics"]["sensitivity"] == {"value": None, "low": None, "high": None, "n": 0}
    assert found["metrics"]["specificity"]["value"] == 1.0
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_macro_averages_leave_out_a_class_that_is_not_there():
    y, p, ids = sample()
    q = np.c_[1 - p, p, np.zeros(len(p))]
    found = evaluate_predictions(y, q, ["a", "b", "c"], ids, task="multiclass", n_boot=20)
    assert found["per_class"]["c"]["auroc"]["value"] is None
    assert found["metrics"]["auroc"]["value"] == pytest.approx(auroc(y, p))
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_resamples_of_one_class_only_are_left_out():
    found = binary([0] * 20 + [1, 1], [0.1] * 20 + [0.05, 0.9], n_boot=200)
    assert 0 < found["metrics"]["auroc"]["low"] < 0.5 < found["metrics"]["auroc"]["high"] < 1


def test_without_resamples_there_is_no_interval():
    y, p, ids = sample()
    assert all(entry["low"] is entry["high"] is None for entry in binary(y, p, ids, n_boot=0)["metrics"].values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"probabilities": [[0.5, 0.5]]},
            r"labels \(2,\), probabilities \(1, 2\), 2 patients and 2 classes do not fit",
        ),
        (
            {"probabilities": [[0.5, 0.5], [0.5, np.nan]]},
            r"1 of 2 images have a probability outside \[0, 1\], first row 1",
        ),
        ({"labels": [0, 2]}, "label 2 is not one of 0 ... 1"),
        ({"positive": "c"}, "positive class c is not one of a, b"),
        ({"threshold": {"a": 0.5}}, "no threshold for b, only for a"),
    ],
)
def test_evaluation_faults(change, message):
    good = {
        "labels": [0, 1],
        "probabilities": [[0.5, 0.5], [0.4, 0.6]],
        "classes": ["a", "b"],
        "patient_ids": ["p", "q"],
    }
    with pytest.raises(DataError, match=message):
        evaluate_predictions(**{**good, "task": "binary", **change})


def test_import_costs_only_numpy():
    code = (
        "import sys, cxr_fastai.metrics as m; print(sorted({'scipy', 'sklearn', 'pandas', 'torch'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
