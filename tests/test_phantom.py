"""The phantom: sampling, rendering, findings, and the dataset folder with its planted defects."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import cxr_fastai.phantom.dataset as dataset
from cxr_fastai.config import GenerateConfig
from cxr_fastai.errors import DataError, UsageError
from cxr_fastai.phantom import COLUMNS, FINDINGS, generate, render, sample


def tree(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def config(out: Path, **changes) -> GenerateConfig:
    options: dict[str, Any] = {"out": str(out), "n": 16, "size": 64, "workers": 1} | changes
    return GenerateConfig(**options)


def make(out: Path, **changes) -> pd.DataFrame:
    return generate(config(out, **changes))


def about(out: Path) -> dict:
    return json.loads((out / "dataset.json").read_text())


@pytest.mark.parametrize("size", [64, 224, 320, 1024])
def test_render_gives_a_square_float_film_in_range(size):
    film = render(sample(np.random.default_rng(1), findings=["Effusion"]), size)
    assert film.pixels.shape == (size, size)
    assert film.pixels.dtype == np.float32
    assert 0.0 <= film.pixels.min() < film.pixels.max() <= 1.0
    assert film.masks["Effusion"].shape == (size, size)
    assert film.masks["Effusion"].dtype == np.bool_
    assert film.view in ("PA", "AP")
    assert film.sex in ("M", "F")
    assert isinstance(film.age, int)


def test_render_is_deterministic():
    parameters = sample(np.random.default_rng(2), findings=["Nodule", "Edema"])
    assert np.array_equal(render(parameters, 96).pixels, render(parameters, 96).pixels)


def test_findings_do_not_change_patient_or_exposure():
    with_it = sample(np.random.default_rng(3), findings=["Mass"])
    without = sample(np.random.default_rng(3))
    assert (with_it.patient, with_it.acquisition) == (without.patient, without.acquisition)


@pytest.mark.parametrize("name", FINDINGS)
def test_a_gross_finding_changes_its_mask_more_than_the_rest(name):
    inside, outside, shares = [], [], []
    for seed in range(4):
        parameters = sample(np.random.default_rng(seed), findings=[name], difficulty=0.0)
        film, plain = render(parameters), render(replace(parameters, findings=()))
        change, mask = np.abs(film.pixels - plain.pixels), film.masks[name]
        inside.append(change[mask].mean())
        outside.append(change[~mask].mean())
        shares.append(mask.mean())
    assert np.mean(inside) > 1.5 * np.mean(outside)
    assert 0.0005 < np.mean(shares) < 0.4


@pytest.mark.parametrize("name", FINDINGS)
def test_masks_are_never_empty_and_keep_clear_of_the_corners(name):
    for seed in range(6):
        mask = render(sample(np.random.default_rng(seed), findings=[name], difficulty=1.0), 64).masks[name]
        assert mask.any()
        assert not mask[:4, :4].any()
        assert not mask[:4, -4:].any()


def test_equal_exposure_hides_the_finding_from_the_mean():
    for seed in range(4):
        parameters = sample(np.random.default_rng(seed), findings=["Effusion"], difficulty=0.2)
        film, plain = render(parameters, 128), render(replace(parameters, findings=()), 128)
        assert abs(film.pixels.mean() - plain.pixels.mean()) < 0.02


def test_same_seed_same_bytes_for_any_number_of_workers(tmp_path):
    make(tmp_path / "one", n=50)
    make(tmp_path / "two", n=50, workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_another_seed_gives_other_films(tmp_path):
    make(tmp_path / "a", n=4)
    make(tmp_path / "b", n=4, seed=1)
    assert not set(tree(tmp_path / "a").values()) & set(tree(tmp_path / "b").values())


def test_binary_folder_is_what_the_design_says(tmp_path):
    steps: list[tuple[int, int]] = []
    table = generate(config(tmp_path / "set", n=30), progress=lambda done, total: steps.append((done, total)))
    assert steps == [(index + 1, 30) for index in range(30)]
    assert list(table.columns) == COLUMNS
    assert Counter(table["label"]) == {"normal": 15, "abnormal": 15}
    written = pd.read_csv(tmp_path / "set" / "labels.csv", dtype={"patient_id": str})
    pd.testing.assert_frame_equal(written, table, check_dtype=False)
    assert 15 < table["patient_id"].nunique() < 30
    for path, label, patient in table[["path", "label", "patient_id"]].itertuples(index=False):
        assert path.startswith(f"images/{label}/{patient}_")
        with Image.open(tmp_path / "set" / path) as image:
            assert (image.size, image.mode) == ((64, 64), "L")
    digest = hashlib.sha256((tmp_path / "set" / "labels.csv").read_bytes()).hexdigest()
    assert about(tmp_path / "set")["labels_sha256"] == digest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set"]


@pytest.mark.parametrize(("form", "side"), [(0.6, 0), (0.6, -1), (0.9, 0), (0.9, 1)])
def test_patchy_consolidation_lies_in_the_lungs_that_it_says(form, side):
    for seed in range(3):
        parameters = sample(np.random.default_rng(seed), findings=["Consolidation"], difficulty=0.3)
        finding = replace(parameters.findings[0], form=form, side=side)
        film = render(replace(parameters, findings=(finding,)), 128)
        plain = render(replace(parameters, findings=()), 128)
        mask, change = film.masks["Consolidation"], film.pixels - plain.pixels
        assert 0.001 < mask.mean() < 0.3
        assert change[mask].mean() > change[~mask].mean() + 0.02
        if side:
            assert mask[:, :64].mean() * side < mask[:, 64:].mean() * side


def test_masks_exist_for_abnormal_films_only(tmp_path):
    table = make(tmp_path / "set", n=24)
    expected = {
        f"{Path(path).stem}__{name}.png"
        for path, findings in table[["path", "findings"]].itertuples(index=False)
        for name in findings.split("|")
        if name != "No Finding"
    }
    assert {p.name for p in (tmp_path / "set" / "masks").iterdir()} == expected
    for name in expected:
        with Image.open(tmp_path / "set" / "masks" / name) as image:
            values = np.asarray(image)
        assert set(np.unique(values)) == {0, 255}
        assert values.shape == (64, 64)


def test_multiclass_has_a_folder_for_each_finding(tmp_path):
    table = make(tmp_path / "set", n=18, task="multiclass")
    assert Counter(table["label"]) == dict.fromkeys(("normal", *FINDINGS), 2)
    assert {p.name for p in (tmp_path / "set" / "images").iterdir()} == {"normal", *FINDINGS}


def test_multilabel_joins_findings_in_one_folder(tmp_path):
    table = make(tmp_path / "set", n=20, task="multilabel")
    assert (table["label"] == table["findings"]).all()
    assert (table["label"] == "No Finding").sum() == 8
    assert table["label"].str.contains("|", regex=False).any()
    assert {p.name for p in (tmp_path / "set" / "images").iterdir()} == {"films"}


def test_films_of_a_patient_share_age_and_sex(tmp_path):
    table = make(tmp_path / "set", n=40, images_per_patient=2.0)
    assert (table.groupby("patient_id")[["age", "sex"]].nunique() == 1).all(axis=None)
    assert table["patient_id"].value_counts().max() in (2, 3)
    assert table["path"].is_unique


def test_jpeg_films(tmp_path):
    table = make(tmp_path / "set", n=4, format="jpeg")
    assert table["path"].str.endswith(".jpg").all()
    with Image.open(tmp_path / "set" / table["path"][0]) as image:
        assert image.format == "JPEG"


def test_planted_leak_is_recorded_and_present(tmp_path):
    table = make(tmp_path / "set", n=20, plant=("leak:0.2",))
    planted = about(tmp_path / "set")["planted"]
    assert [(p["kind"], p["amount"], len(p["paths"])) for p in planted] == [("leak", 0.2, 4)]
    assert len(table) == 24
    rows = table.set_index("path")
    for original, copy in planted[0]["paths"]:
        assert rows.loc[original, "patient_id"] != rows.loc[copy, "patient_id"]
        assert rows.loc[original, "label"] == rows.loc[copy, "label"]
        one, two = (np.asarray(Image.open(tmp_path / "set" / p), dtype=float) for p in (original, copy))
        assert not np.array_equal(one, two)
        assert np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.85


def test_planted_mislabels_are_recorded_and_findings_stay_true(tmp_path):
    table = make(tmp_path / "set", n=20, plant=("mislabel:0.25",))
    wrong = table[(table["label"] == "normal") != (table["findings"] == "No Finding")]
    assert sorted(wrong["path"]) == sorted(about(tmp_path / "set")["planted"][0]["paths"])
    assert len(wrong) == 5


@pytest.mark.parametrize("what", ["marker", "border", "brightness", "format"])
def test_planted_shortcut_follows_the_label(tmp_path, what):
    table = make(tmp_path / "set", n=20, plant=(f"shortcut:1:{what}",))
    plain = make(tmp_path / "plain", n=20)
    planted = about(tmp_path / "set")["planted"][0]
    assert planted["what"] == what
    assert set(planted["paths"]) == set(table.loc[table["label"] == "abnormal", "path"])
    for path, clean in zip(table["path"], plain["path"], strict=True):
        same = (tmp_path / "set" / path).read_bytes() == (tmp_path / "plain" / clean).read_bytes()
        assert same == (path not in planted["paths"])


def test_marker_is_the_default_shortcut_and_strength_leaves_exceptions(tmp_path):
    table = make(tmp_path / "set", n=200, size=64, plant=("shortcut:0.8",))
    carried = table["path"].isin(about(tmp_path / "set")["planted"][0]["paths"])
    assert 0.65 < carried[table["label"] == "abnormal"].mean() < 0.95
    assert 0.05 < carried[table["label"] == "normal"].mean() < 0.35


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 1}, r"--n is 1, but must be from 2"),
        ({"size": 32}, r"--size is 32, but must be from 64 to 1024"),
        ({"seed": -1}, r"--seed is -1"),
        ({"task": "regression"}, r"--task is regression, but must be one of binary"),
        ({"difficulty": "absurd"}, r"--difficulty is absurd"),
        ({"format": "gif"}, r"--format is gif"),
        ({"workers": 0}, r"--workers is 0"),
        ({"images_per_patient": 9.0}, r"--images-per-patient is 9.0"),
        ({"out": " "}, r"--out is ' '"),
        ({"plant": ("leek:0.1",)}, r"--plant 'leek:0.1': unknown kind 'leek'"),
        ({"plant": ("leak:x",)}, r"--plant 'leak:x': 'x' is not a number"),
        ({"plant": ("leak:2",)}, r"--plant 'leak:2': 2 is out of range"),
        ({"plant": ("leak:nan",)}, r"--plant 'leak:nan': nan is out of range"),
        ({"plant": ("leak:0.1:marker",)}, r"only shortcut takes a third part"),
        ({"plant": ("shortcut:0.9:smell",)}, r"unknown shortcut 'smell'"),
        ({"plant": ("leak:0.1", "leak:0.2")}, r"--plant names leak twice"),
    ],
)
def test_config_says_which_flag_is_wrong(changes, message):
    with pytest.raises(UsageError, match=message):
        GenerateConfig(**changes)


def test_sample_and_render_refuse_what_makes_no_sense():
    rng = np.random.default_rng(0)
    with pytest.raises(UsageError, match="unknown finding 'Flu'"):
        sample(rng, findings=["Flu"])
    with pytest.raises(UsageError, match="named twice"):
        sample(rng, findings=["Mass", "Mass"])
    with pytest.raises(UsageError, match=r"difficulty 1\.5 is out of range"):
        sample(rng, findings=["Mass"], difficulty=1.5)
    with pytest.raises(UsageError, match="size 2000 is out of range"):
        render(sample(rng), 2000)


def test_foreign_files_are_not_touched(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(DataError, match="holds files that are not a generated dataset"):
        make(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.jpg"]


def test_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "set").write_text("mine")
    with pytest.raises(DataError, match="is a file, not a folder"):
        make(tmp_path / "set")


def test_a_new_dataset_replaces_an_old_one(tmp_path):
    make(tmp_path / "set", n=6)
    make(tmp_path / "set", n=4, seed=5)
    make(tmp_path / "fresh", n=4, seed=5)
    assert tree(tmp_path / "set") == tree(tmp_path / "fresh")


@pytest.mark.parametrize(("error", "workers"), [(KeyboardInterrupt, 1), (OSError, 1), (KeyboardInterrupt, 2)])
def test_an_interrupted_run_leaves_the_earlier_dataset_and_nothing_else(tmp_path, error, workers):
    make(tmp_path / "set", n=6)
    before = tree(tmp_path)

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise error

    with pytest.raises(error):
        generate(config(tmp_path / "set", n=60, seed=9, workers=workers), progress=stop)
    assert tree(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_failed_rename_puts_the_earlier_dataset_back(tmp_path, monkeypatch):
    make(tmp_path / "set", n=4)
    before = tree(tmp_path)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="disk full"):
        make(tmp_path / "set", n=4, seed=3)
    assert tree(tmp_path) == before


def test_jobs_are_plain_data():
    jobs = dataset._plan(GenerateConfig(n=10), Path("somewhere"))
    assert len({job.seed for job in jobs}) == 10
    assert all(job.path.count("/") == 2 for job in jobs)


@pytest.mark.long
def test_label_does_not_leak_through_mean_histogram_border_or_thumbnail(tmp_path):
    sklearn_linear = pytest.importorskip("sklearn.linear_model")
    selection = pytest.importorskip("sklearn.model_selection")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    pipeline = pytest.importorskip("sklearn.pipeline")
    metrics = pytest.importorskip("sklearn.metrics")
    table = make(tmp_path / "set", n=750, size=224, workers=None)
    films = [np.asarray(Image.open(tmp_path / "set" / p), dtype=np.float32) / 255 for p in table["path"]]
    views = {
        "mean": ([[f.mean()] for f in films], 0.60),
        "percentiles": ([np.percentile(f, (1, 5, 25, 50, 75, 95, 99)) for f in films], 0.60),
        "border": ([[f[:10].mean(), f[-10:].mean(), f[:, :10].mean(), f[:, -10:].mean()] for f in films], 0.60),
        "thumbnail": ([f.reshape(32, 7, 32, 7).mean((1, 3)).ravel() for f in films], 0.80),
    }
    truth = (table["label"] == "abnormal").to_numpy()
    for name, (rows, limit) in views.items():
        model = pipeline.make_pipeline(preprocessing.StandardScaler(), sklearn_linear.LogisticRegression(max_iter=3000))
        folds = selection.StratifiedGroupKFold(5, shuffle=True, random_state=0)
        score = selection.cross_val_predict(
            model, np.array(rows), truth, groups=table["patient_id"], cv=folds, method="decision_function"
        )
        auroc = metrics.roc_auc_score(truth, score)
        assert (1 - limit if limit == 0.60 else 0.0) <= auroc <= limit, name
