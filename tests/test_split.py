"""The split: whole patients, every class its share, the source's own split kept, and no patient on both sides."""

import numpy as np
import pandas as pd
import pytest

from cxr_fastai.errors import DataError, UsageError
from cxr_fastai.split import check_split, deal_folds, folds_of, given_split, split_table


def made(labels, patients=None, **columns):
    """Make a table of files that nobody opens."""
    n = len(labels)
    patients = [f"p{i}" for i in range(n)] if patients is None else patients
    table = pd.DataFrame({"path": [f"{i}.png" for i in range(n)], "label": labels, "patient_id": patients, "split": ""})
    several = any("|" in label or not label for label in labels)
    table.attrs = {"task": "multilabel" if several else "multiclass"}
    return table.assign(**columns)


def counts(table):
    return table.groupby(["split", "label"]).size().unstack(fill_value=0)


def test_the_papers_750_films_are_split_exactly():
    table = split_table(made(["abnormal", "normal"] * 375))
    assert table["split"].value_counts().to_dict() == {"train": 525, "test": 150, "valid": 75}
    assert counts(table).loc["test"].tolist() == [75, 75]
    assert abs(counts(table).loc["valid"] - 37.5).max() == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_no_patient_is_on_both_sides_and_classes_keep_their_share(seed):
    rng = np.random.default_rng(seed)
    patients = rng.integers(0, 300, 900)
    labels = np.where(np.arange(300) % 5 == 0, "rare", "common")[patients]  # a label belongs to a patient
    table = split_table(made(labels, patients.astype(str)), seed=seed)
    check_split(table)
    assert (table.groupby("patient_id")["split"].nunique() == 1).all()
    whole = table["label"].value_counts()
    for split, part in (("train", 0.7), ("valid", 0.1), ("test", 0.2)):
        assert (counts(table).loc[split] - part * whole).abs().max() <= 2


def test_large_and_small_patients_are_in_every_split():
    sizes = [6] * 50 + [1] * 300
    table = split_table(made(["a", "b"] * 300, np.repeat(np.arange(350), sizes).astype(str)))
    large = table.groupby("patient_id")["split"].agg(["size", "first"]).query("size == 6")["first"].value_counts()
    assert large.to_dict() == {"train": 35, "test": 10, "valid": 5}


def test_split_depends_on_the_seed_and_not_on_the_order():
    table = made(["a", "b", "c"] * 40, [f"p{i // 2}" for i in range(120)])
    once = split_table(table, seed=1).set_index("path")["split"]
    again = split_table(table.sample(frac=1, random_state=0), seed=1).set_index("path")["split"]
    assert once.equals(again.loc[once.index])
    assert not once.equals(split_table(table, seed=2).set_index("path")["split"])
    assert set(table["split"]) == {""}


def test_multilabel_split_keeps_the_share_of_every_finding():
    rng = np.random.default_rng(0)
    draw = rng.random((1000, 4)) < [0.3, 0.1, 0.05, 0.01]
    labels = ["|".join(n for n, yes in zip(("A", "B", "C", "D"), row, strict=True) if yes) for row in draw]
    table = split_table(made(labels))
    found = table["label"].str.get_dummies("|").groupby(table["split"]).sum()
    for split, part in (("train", 0.7), ("valid", 0.1), ("test", 0.2)):
        assert (found.loc[split] - part * found.sum()).abs().max() <= 2
        assert abs((table["split"] == split).sum() - 1000 * part) <= 2
    assert (found > 0).all(axis=None)


def test_three_patients_of_a_class_are_enough():
    table = split_table(made(["common"] * 97 + ["rare"] * 3))
    assert counts(table)["rare"].tolist() == [1, 1, 1]


def test_fraction_zero_makes_no_split():
    assert set(split_table(made(["a", "b"] * 20), valid=0)["split"]) == {"train", "test"}


def test_splits_of_the_source_are_kept_and_valid_comes_out_of_train():
    given = ["test"] * 20 + ["train"] * 80
    table = split_table(made(["a", "b"] * 50, [f"p{i // 4}" for i in range(100)], split=given))
    assert (table["split"][:20] == "test").all()
    assert table["split"].value_counts().to_dict() == {
        "train": 72,
        "test": 20,
        "valid": 8,
    }  # 10, to the nearest patient
    whole = made(["a", "b"] * 3, split=["train", "train", "valid", "valid", "test", "test"])
    assert split_table(whole)["split"].equals(whole["split"])


def test_split_faults():
    with pytest.raises(
        DataError, match=r"split valid has no image of rare \(rare: 2 patients in all\); add patients of it, merge it"
    ):
        split_table(made(["common"] * 97 + ["rare"] * 2, [f"p{i}" for i in range(99)]))
    with pytest.raises(DataError, match="1 of 2 images have no split; fill in all, or none"):
        split_table(made(["a", "b"], split=["train", ""]))
    with pytest.raises(DataError, match="the split has no train, only test"):
        split_table(made(["a", "b"], split="test"))
    with pytest.raises(DataError, match="2 images in train are too few to take valid from"):
        split_table(made(["a", "b"] * 10, split=["train"] * 2 + ["test"] * 18), valid=0.5, test=0.1)
    with pytest.raises(UsageError, match="must not be negative, and leave something to train on"):
        split_table(made(["a", "b"]), test=0.9, valid=0.1)


def test_a_torn_patient_is_refused():
    table = made(["a", "b"] * 5, ["p", "q", "r", "s", "t"] * 2, split=["train"] * 5 + ["test"] * 5)
    message = (
        r"5 patients on both sides of the split: p \(test\+train\), q \(test\+train\), r \(test\+train\) ...; split by"
    )
    for refuse in (check_split, split_table):
        with pytest.raises(DataError, match=message):
            refuse(table)


def listed(tmp_path, rows: pd.DataFrame):
    file = tmp_path / "split.csv"
    rows.to_csv(file, index=False)
    return file


def test_a_split_can_be_given_by_path_file_name_or_patient(tmp_path) -> None:
    table = pd.DataFrame({"path": ["a/1.png", "a/2.png"], "label": ["x", "y"], "patient_id": ["p", "q"], "split": ""})
    for rows in (
        {"path": ["a/2.png", "a/1.png", "a/3.png"], "split": ["test", "train", "valid"]},
        {"path": ["/else/2.png", "/else/1.png"], "split": ["testing", "Train"]},
        {"patient_id": ["q", "p"], "split": ["test", "train"]},
    ):
        found = given_split(table, listed(tmp_path, pd.DataFrame(rows)))
        assert found["split"].tolist() == ["train", "test"]


def test_a_given_split_must_hold_every_film_once(tmp_path) -> None:
    table = pd.DataFrame({"path": ["a/1.png", "b/1.png"], "label": ["x", "y"], "patient_id": ["p", "q"], "split": ""})
    for rows, message in (
        ({"path": ["a/1.png"], "split": ["train"]}, "1 film not in it, such as b/1.png; add or remove"),
        (
            {"path": ["a/1.png", "b/1.png", "a/1.png"], "split": ["train", "test", "test"]},
            "1 film there with two splits",
        ),
        ({"path": ["a/1.png", "b/1.png"], "split": ["train", "later"]}, "split 'later' is none of train, valid, test"),
    ):
        with pytest.raises(DataError, match=message):
            given_split(table, listed(tmp_path, pd.DataFrame(rows)))
    with pytest.raises(UsageError, match=r"needs the columns split and path \(or patient_id\), has \['film'\]"):
        given_split(table, listed(tmp_path, pd.DataFrame({"film": ["a"]})))
    with pytest.raises(UsageError, match="cannot be read"):
        given_split(table, tmp_path / "none.csv")


def test_folds_hold_whole_patients_and_leave_the_test_alone() -> None:
    labels = ["normal", "abnormal"] * 30
    table = pd.DataFrame({"path": [f"{i}.png" for i in range(60)], "label": labels})
    table["patient_id"] = [f"p{i // 3}" for i in range(60)]
    table["split"] = ["test" if i < 12 else "train" for i in range(60)]
    table.attrs = {"task": "binary", "classes": ["abnormal", "normal"]}
    dealt = deal_folds(table, 4, seed=0)
    assert (dealt.loc[:11, "fold"] == 0).all()
    assert dealt.loc[12:, "fold"].value_counts().to_dict() == {1: 12, 2: 12, 3: 12, 4: 12}
    assert dealt.loc[12:].groupby("patient_id")["fold"].nunique().max() == 1
    parts = list(folds_of(dealt))
    assert [part["split"].value_counts().to_dict() for part in parts] == [{"train": 36, "valid": 12, "test": 12}] * 4
    held = pd.concat([part[part["split"] == "valid"] for part in parts])
    assert sorted(held["path"]) == sorted(table["path"][12:])
    assert len(list(folds_of(table))) == 1
