"""Probes on fake scans: noise with a slow gradient, and one thing that gives the label away."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score

from cxr_fastai.audit import shortcuts
from cxr_fastai.audit.shortcuts import Probe, count_probes, holm, patient_folds, probe

N = 240


def labelled(labels: list[str], task: str = "binary", patients: int = 1) -> pd.DataFrame:
    table = pd.DataFrame({"path": [f"{i}.png" for i in range(len(labels))], "label": labels})
    table["patient_id"] = [f"{i // patients:04d}" for i in range(len(labels))]
    classes = sorted({name for label in labels for name in label.split("|")} - {""})
    table.attrs = {"task": task, "classes": classes}
    return table


def scan_of(table: pd.DataFrame, change: Callable | None = None, seed: int = 0) -> SimpleNamespace:
    """Return a scan of fake films; `change` may alter films (n, 64, 64) and properties in place."""
    rng, n = np.random.default_rng(seed), len(table)
    films = gaussian_filter(rng.random((n, 64, 64)), (0, 3, 3)) + rng.normal(0, 0.02, (n, 1, 1))
    properties = pd.DataFrame({"width": [224] * n, "height": 224, "suffix": ".png"})
    properties["bytes"] = rng.integers(9000, 9999, n)
    properties["bytes_per_pixel"] = properties["bytes"] / 224**2
    if change:
        change(films, properties)
    films = np.clip(films, 0, 1).astype(np.float32)
    borders = np.concatenate([films[:, 0], films[:, -1], films[:, :, 0], films[:, :, -1]], axis=1)
    histograms = np.stack([np.histogram(film, 64, (0, 1))[0] for film in films])
    return SimpleNamespace(table=table, thumbnails=films, borders=borders, histograms=histograms, properties=properties)


BINARY = labelled(["normal", "abnormal"] * (N // 2))
# Nine in ten abnormal films carry a shortcut, and one in ten normal ones.
CARRIES = (BINARY["label"] == "abnormal").to_numpy() ^ (np.arange(N) // 2 % 10 == 0)


def by_name(found: list[Probe]) -> dict[str, Probe]:
    return {p.name: p for p in found}


def marker(films: np.ndarray, properties: pd.DataFrame) -> None:
    films[CARRIES, 3:8, 3:7] = 0.95


def border(films: np.ndarray, properties: pd.DataFrame) -> None:
    films[CARRIES, :, -1] = 0.0


def brightness(films: np.ndarray, properties: pd.DataFrame) -> None:
    films[CARRIES] = films[CARRIES] * 0.88 + 0.11


def suffix(films: np.ndarray, properties: pd.DataFrame) -> None:
    properties.loc[CARRIES, "suffix"] = ".jpg"


def wider(films: np.ndarray, properties: pd.DataFrame) -> None:
    properties.loc[CARRIES, "width"] = 256


def smaller(films: np.ndarray, properties: pd.DataFrame) -> None:
    properties.loc[CARRIES, "bytes"] -= 900


@pytest.mark.parametrize("seed", range(3))
def test_films_without_a_shortcut_are_not_flagged(seed: int) -> None:
    found = probe(scan_of(BINARY, seed=seed))
    assert [p.name for p in found] == ["border", "edges", "grey levels", "file size", "thumbnail"]
    assert not any(p.flagged for p in found)
    assert all(p.n == N and 0.3 < p.auroc < 0.7 for p in found)


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        (marker, "edges", "in the upper left"),
        (border, "border", "mean grey level of the right border: 0 in abnormal, "),
        (brightness, "grey levels", " in abnormal, "),
        (suffix, "format", "suffix .jpg: 90 % of abnormal, 10 % of normal"),
        (wider, "dimensions", "width: 256 in abnormal, 224 in normal"),
        (smaller, "file size", "bytes: "),
    ],
)
def test_each_shortcut_is_found_and_named(change: Callable, name: str, said: str) -> None:
    found = by_name(probe(scan_of(BINARY, change)))[name]
    assert found.flagged
    assert found.auroc > 0.8
    assert found.p < 0.02
    assert said in found.detail


def test_columns_of_the_table_are_confounders() -> None:
    table = BINARY.assign(view=np.where(CARRIES, "AP", "PA"), age=50.0, sex=["F", "M", "M", "F"] * (N // 4))
    found = by_name(probe(scan_of(table)))
    assert found["view"].flagged
    assert found["view"].detail == "view AP: 90 % of abnormal, 10 % of normal"
    assert not found["sex"].flagged
    assert "age" not in found  # alike in all films, so it was not asked
    assert len(found) <= count_probes(scan_of(table)) == 10


def test_unknown_ages_are_no_error_and_may_tell() -> None:
    age = np.where(CARRIES, np.nan, np.random.default_rng(0).integers(20, 80, N))
    assert by_name(probe(scan_of(BINARY.assign(age=age))))["age"].flagged


def test_anatomy_in_the_thumbnail_is_no_shortcut() -> None:
    def heart(films: np.ndarray, properties: pd.DataFrame) -> None:
        films[BINARY["label"] == "abnormal", 30:46, 26:42] += 0.012

    found = by_name(probe(scan_of(BINARY, heart)))["thumbnail"]
    assert 0.55 < found.auroc < 0.80
    assert not found.flagged


def test_knowing_the_patient_is_not_knowing_the_label() -> None:
    """A patient's six films look alike and share a label: by film this would give an AUROC of 1."""
    rng = np.random.default_rng(0)
    labels = np.repeat(rng.permutation(["normal", "abnormal"] * (N // 12)), 6)
    table = labelled(labels.tolist(), patients=6)

    def own_grey(films: np.ndarray, properties: pd.DataFrame) -> None:
        films += np.repeat(rng.normal(0, 0.1, N // 6), 6)[:, None, None]

    assert not any(p.flagged for p in probe(scan_of(table, own_grey)))


def test_multilabel_names_the_finding_that_is_given_away() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(["", "Effusion", "Mass", "Effusion|Mass"], N).tolist()
    table = labelled(labels, task="multilabel")
    mass = np.array(["Mass" in label for label in labels])

    def tell_mass(films: np.ndarray, properties: pd.DataFrame) -> None:
        properties.loc[mass, "suffix"] = ".dcm"

    found = by_name(probe(scan_of(table, tell_mass)))["format"]
    assert found.flagged
    assert found.auroc == 1.0
    assert found.detail == "suffix .dcm: 100 % of Mass, 0 % of the others"


def test_multiclass_names_the_class_that_is_given_away() -> None:
    table = labelled(["normal", "Mass", "Edema"] * (N // 3), task="multiclass")

    def tell_edema(films: np.ndarray, properties: pd.DataFrame) -> None:
        properties.loc[table["label"] == "Edema", "width"] = 300

    found = probe(scan_of(table, tell_edema))
    assert [p.name for p in found if p.flagged] == ["dimensions"]
    assert by_name(found)["dimensions"].detail == "width: 300 in Edema, 224 in the others"


def test_unreadable_films_are_left_out() -> None:
    scan = scan_of(BINARY, suffix)
    scan.thumbnails[:7] = np.nan
    assert {p.n for p in probe(scan)} == {N - 7}


def test_too_few_films_are_not_asked() -> None:
    assert probe(scan_of(labelled(["normal", "abnormal"] * 5))) == []
    assert probe(scan_of(labelled(["normal"] * 100 + ["abnormal"] * 9))) == []
    assert probe(scan_of(labelled(["normal", "abnormal"] * 50, patients=20))) == []


def test_many_films_are_drawn_by_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcuts, "MAX_FILMS", 100)
    table = labelled(["normal", "abnormal"] * 100, patients=4)
    assert {p.n for p in probe(scan_of(table))} == {100}


def test_same_seed_same_answer_and_progress_is_told() -> None:
    calls: list[int] = []
    first = probe(scan_of(BINARY, marker), seed=3, advance=lambda: calls.append(1))
    assert first == probe(scan_of(BINARY, marker), seed=3)
    assert len(calls) == len(first)


def test_holm() -> None:
    assert holm(np.array([0.01, 0.04, 0.03, 0.9])) == pytest.approx([0.04, 0.09, 0.09, 0.9])
    assert holm(np.array([0.6, 0.7])).tolist() == [1.0, 1.0]


def test_permutations_keep_the_labels_of_a_patient_together() -> None:
    groups = np.repeat(np.arange(40), 3).astype(str)
    y = np.repeat(np.arange(40) % 2, 3)
    dealt = y[shortcuts._shuffles(groups, np.random.default_rng(0))]
    assert (dealt.sum(1) == y.sum()).all()
    assert (np.ptp(dealt.reshape(len(dealt), 40, 3), axis=2) == 0).all()
    assert not (dealt == y).all(1).any()


def test_auroc_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    scores, y = rng.integers(0, 5, (50, 3)).astype(float), rng.random((50, 3)) < 0.4
    y[:, 2] = True
    got = shortcuts._auroc(scores, y)
    assert got[:2] == pytest.approx([roc_auc_score(y[:, k], scores[:, k]) for k in range(2)])
    assert np.isnan(got[2])


def test_folds_hold_whole_patients_and_every_class() -> None:
    groups = np.repeat(np.arange(60), 2).astype(str)
    y = np.column_stack([np.arange(120) % 2 == 0, np.arange(120) < 12])
    folds = patient_folds(y, groups, 0)
    assert folds is not None
    assert all(len(set(folds[groups == g])) == 1 for g in set(groups))
    assert all(y[folds == k].any(0).all() for k in range(shortcuts.FOLDS))
