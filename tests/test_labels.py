"""Rankings of labels on fake features, and features of a small run."""

import numpy as np
import pandas as pd
import pytest

from cxr_fastai.audit.labels import (
    BATCH,
    LabelIssue,
    features_of,
    features_of_weights,
    label_issues,
    out_of_fold,
    rank_labels,
)
from cxr_fastai.errors import DataError, UsageError
from cxr_fastai.predict import Predictor

CLASSES = {"binary": ["abnormal", "normal"], "multiclass": ["Edema", "Mass", "normal"], "multilabel": ["Edema", "Mass"]}


def study(task: str, n: int = 400, wrong: int = 20, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray, list[str], list]:
    """Return table, features (n, 64), true labels and the paths whose label is wrong."""
    rng = np.random.default_rng(seed)
    classes = CLASSES[task]
    y = np.eye(len(classes), dtype=bool)[rng.integers(len(classes), size=n)]
    if task == "multilabel":
        y = rng.random((n, len(classes))) < 0.4
    features = rng.normal(size=(n, 64)) + 4 * y @ rng.normal(size=(len(classes), 64)) / 8**0.5
    given, chosen = y.copy(), rng.permutation(n)[:wrong]
    given[chosen] = ~given[chosen] if task == "multilabel" else np.roll(given[chosen], 1, axis=1)
    truth, label = (["|".join(np.array(classes)[row]) for row in rows] for rows in (y, given))
    table = pd.DataFrame({"path": [f"{i}.png" for i in range(n)], "label": label})
    table["patient_id"] = [f"{i // 2}" for i in range(n)]
    table.attrs = {"task": task, "classes": classes}
    return table, features, truth, [f"{i}.png" for i in chosen]


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_wrong_labels_come_first_with_the_right_one_suggested(task: str) -> None:
    table, features, truth, wrong = study(task)
    issues = label_issues(table, features)
    assert len(issues) == len(table)
    assert [i.quality for i in issues] == sorted(i.quality for i in issues)
    assert len({i.path for i in issues[:40]} & set(wrong)) >= 18
    right = dict(zip(table["path"], truth, strict=True))
    assert np.mean([i.suggested == right[i.path] for i in issues if i.path in wrong]) >= 0.8


def test_probabilities_are_of_films_whose_patient_was_not_learned() -> None:
    """Features that are nothing but the patient's number: whoever has seen the patient knows the label."""
    rng = np.random.default_rng(0)
    y = np.repeat(rng.integers(0, 2, 60), 4)
    table = pd.DataFrame({"path": map(str, range(240)), "label": np.array(["abnormal", "normal"])[y]})
    table["patient_id"] = np.repeat(np.arange(60), 4).astype(str)
    table.attrs = {"task": "binary", "classes": ["abnormal", "normal"]}
    p = out_of_fold(table, np.repeat(np.eye(60), 4, axis=0))
    assert p.sum(1) == pytest.approx(np.ones(240))
    assert np.mean(p.argmax(1) == y) < 0.6


def test_what_is_unknown_cannot_be_wrong() -> None:
    table, features, _, _ = study("multilabel", wrong=0)
    y = np.array([[name in label.split("|") for name in ("Edema", "Mass")] for label in table["label"]], float)
    y[:50, 1] = -1  # uncertain
    y[50:90, 1] = np.nan
    table[["y_Edema", "y_Mass"]] = y
    p = out_of_fold(table, features)
    assert np.isfinite(p).all()
    p[0], p[200] = (0.9, 0.999), (0.9, 0.999)
    table.loc[[0, 200], ["y_Edema", "y_Mass"]] = [[1, -1], [1, 0]]
    quality = {i.path: i.quality for i in rank_labels(table, p)}
    assert quality["0.png"] > 0.85
    assert quality["200.png"] < 0.3


def test_ranking_is_by_the_probability_of_the_label_given() -> None:
    table = pd.DataFrame({"path": ["a", "b", "c"], "label": ["normal", "abnormal", "normal"]})
    table.attrs = {"task": "binary", "classes": ["abnormal", "normal"]}
    assert rank_labels(table, np.array([[0.9, 0.1], [0.75, 0.25], [0.5, 0.5]])) == [
        LabelIssue("a", "normal", "abnormal", pytest.approx(0.1)),
        LabelIssue("c", "normal", "abnormal", pytest.approx(0.5)),
        LabelIssue("b", "abnormal", "abnormal", pytest.approx(0.75)),
    ]


def test_films_without_features_are_left_out_and_progress_is_told() -> None:
    table, features, _, _ = study("binary", n=100)
    features[3] = np.nan
    calls: list[int] = []
    issues = label_issues(table, features, advance=lambda: calls.append(1))
    assert len(issues) == 99
    assert "3.png" not in {i.path for i in issues}
    assert len(calls) == 5


def test_a_class_of_one_patient_is_no_obstacle() -> None:
    table, features, _, _ = study("multiclass", wrong=0)
    table.loc[:1, "label"] = "Hernia"
    table.attrs["classes"] = ["Edema", "Hernia", "Mass", "normal"]
    assert len(label_issues(table, features)) == len(table)


def test_too_few_patients_are_refused() -> None:
    table, features, _, _ = study("binary", n=12, wrong=0)
    with pytest.raises(DataError, match="12 films are too few to look for wrong labels; 10 patients are needed"):
        label_issues(table, features)


def test_features_are_those_of_the_model(finished, films) -> None:
    paths = sorted(map(str, films.rglob("*.png")))[: BATCH + 2]
    table = pd.DataFrame({"path": [*paths, str(films / "missing.png")]})
    predictor = Predictor(finished)
    calls: list[int] = []
    features = features_of(table, predictor, lambda: calls.append(1))
    assert features.shape == (BATCH + 3, 1024)
    assert features.dtype == np.float32
    assert np.isnan(features[-1]).all()
    assert (features[:-1] >= 0).all()
    assert len(calls) == BATCH + 3


def test_features_of_a_weights_file_are_those_of_its_model(finished, films, monkeypatch) -> None:
    monkeypatch.setattr("cxr_fastai.model.cpu_multiplies_bf16", lambda: False)  # as exact as the model
    from fastai.learner import load_learner
    from safetensors.torch import save_file

    learner = load_learner(finished / "learner.pkl")
    weights = finished.parent / "body.safetensors"
    save_file(learner.model[0].state_dict(), weights)
    monkeypatch.setattr("cxr_fastai.audit.labels.SIZE", 32)
    table = pd.DataFrame({"path": sorted(map(str, films.rglob("*.png")))[:3]})
    ours = features_of_weights(table, weights)
    np.testing.assert_allclose(ours, features_of(table, Predictor(finished)), atol=1e-4)
    with pytest.raises(UsageError, match="no such file"):
        features_of_weights(table, "missing.safetensors")
