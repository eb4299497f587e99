"""Who is trained on and who is tested on: whole patients, dealt so that every split has its share of every label.

In: a table as `table.load_table` gives it. Out: a copy whose ``split`` is train, valid or test in every row, and for
cross-validation a column ``fold``: 1 ... k on the films that are trained on, 0 on those of the test.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxr_fastai.errors import DataError, UsageError
from cxr_fastai.listing import SPLIT_ALIASES, SPLITS
from cxr_fastai.runs import read_cells
from cxr_fastai.sources import counted
from cxr_fastai.table import classes_of, targets_of


def check_split(table: pd.DataFrame) -> None:
    """Refuse a split that puts one patient on both sides.

    Raises
    ------
    DataError
        Naming the first patients and how many there are.
    """
    splits = table[table["split"] != ""].groupby("patient_id")["split"].unique()
    torn = splits[splits.map(len) > 1]
    if len(torn):
        first = ", ".join(f"{p} ({'+'.join(sorted(s))})" for p, s in torn.head(3).items())
        raise DataError(
            f"{counted(len(torn), 'patient')} on both sides of the split: {first}{' ...' if len(torn) > 3 else ''}; "
            "split by patient (leave the split empty and it is made so), or correct the patient ids (--patient-regex)"
        )


def split_table(table: pd.DataFrame, *, seed: int = 0, test: float = 0.2, valid: float = 0.1) -> pd.DataFrame:
    """Fill in ``split``: whole patients, stratified by label, the same for the same seed in any row order.

    Patients are dealt rarest label first, those with most images first, each to the split that lacks its labels most
    in proportion: the iterative stratification of Sechidis et al. (ECML PKDD 2011), with patients for examples and
    Sainte-Laguë's rule (half of what is being dealt counts) for rounding. Splits that the source gives are kept; one
    that it lacks is taken out of its train.

    Parameters
    ----------
    table
        As `load_table` gives it.
    seed
        Of the order among patients that are alike.
    test, valid
        Fractions of the whole; 0 makes none.

    Returns
    -------
    pandas.DataFrame
        A copy with every ``split`` filled.

    Raises
    ------
    DataError
        If the source's split tears a patient apart, or a class is missing from a split.
    UsageError
        If the fractions make no sense.
    """
    if test < 0 or valid < 0 or test + valid >= 1:
        raise UsageError(f"test {test:g} and valid {valid:g} must not be negative, and leave something to train on")
    given = set(table["split"]) - {""}
    if given and (table["split"] == "").any():
        raise DataError(f"{(table['split'] == '').sum()} of {len(table)} images have no split; fill in all, or none")
    if given and "train" not in given:
        raise DataError(f"the split has no train, only {', '.join(sorted(given))}; name it, or leave all splits empty")
    check_split(table)
    table = table.copy()
    wanted = {name: part for name, part in (("valid", valid), ("test", test)) if part > 0 and name not in given}
    pool = table["split"].isin(["", "train"]).to_numpy()
    share = {name: part * len(table) / pool.sum() for name, part in wanted.items()}
    if sum(share.values()) >= 1:
        raise DataError(f"{pool.sum()} images in train are too few to take {' and '.join(wanted)} from; lower them")
    if wanted or not given:
        fractions = {"train": 1 - sum(share.values())} | share
        table.loc[pool, "split"] = _deal(table[pool], fractions, seed)
    _check_split_classes(table, {"train"} | set(wanted) | given, given)
    return table


def given_split(table: pd.DataFrame, listing: str | Path) -> pd.DataFrame:
    """Take the split from a CSV file with ``split`` and ``path`` or ``patient_id``, such as the split.csv of a run.

    A film is found by its path as the file gives it, else by its file name, which must then be unique on both sides.

    Raises
    ------
    UsageError
        Where the file cannot be read as such a list.
    DataError
        Where a film is not in it, or it names splits other than train, valid and test.
    """
    try:
        rows = read_cells(listing)
    except (OSError, ValueError) as error:
        raise UsageError(f"--split-csv {listing}: cannot be read ({error})") from error
    key = next((c for c in ("path", "patient_id") if c in rows), None)
    if key is None or "split" not in rows:
        raise UsageError(f"--split-csv {listing}: needs the columns split and path (or patient_id), has {list(rows)}")
    splits = rows["split"].str.strip().str.lower().replace(SPLIT_ALIASES)
    if len(strange := sorted(set(splits) - set(SPLITS))):
        raise DataError(f"{listing}: split {strange[0]!r} is none of {', '.join(SPLITS)}; correct it")
    ours, theirs = table[key], rows[key]
    if key == "path" and not ours.isin(theirs).all():
        names = ours.map(lambda path: Path(path).name)
        if names.is_unique:
            ours, theirs = names, theirs.map(lambda path: Path(path).name)
    named = (
        pd.Series(splits.to_numpy(), index=theirs).groupby(level=0).agg(lambda s: s.iloc[0] if s.nunique() == 1 else "")
    )
    found = ours.map(named)
    for wrong, why in ((found.isna(), "not in it"), (found == "", "there with two splits")):
        if wrong.any():
            first = table.loc[wrong, "path"].iloc[0]
            raise DataError(
                f"{listing}: {counted(int(wrong.sum()), 'film')} {why}, such as {first}; add or remove them"
            )
    return table.assign(split=found)


def deal_folds(table: pd.DataFrame, folds: int, seed: int) -> pd.DataFrame:
    """Deal the patients outside of the test into `folds` parts of like labels: column ``fold``, split train or test.

    Raises
    ------
    DataError
        If a fold would lack a class.
    """
    pool = (table["split"] != "test").to_numpy()
    table = table.assign(split=np.where(pool, "train", "test"), fold=0)
    table.loc[pool, "fold"] = _deal(table[pool], dict.fromkeys(range(1, folds + 1), 1 / folds), seed).astype(int)
    for fold in folds_of(table):
        _check_split_classes(fold, {"train", "valid"}, set())
    return table


def folds_of(table: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Yield the table once a fold, with that fold as its validation films; without folds, the table as it is."""
    if "fold" not in table:
        yield table
        return
    for fold in range(1, int(table["fold"].max()) + 1):
        yield table.assign(split=table["split"].where(table["fold"] != fold, "valid"))


def fingerprint(table: pd.DataFrame) -> str:
    """Return a SHA-256 over file names, labels, patients and split: equal tables have equal ones, wherever they lie."""
    names = table["path"].map(lambda p: Path(p).name)
    rows = sorted(zip(names, table["label"], table["patient_id"], table["split"], strict=True))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _deal(table: pd.DataFrame, fractions: dict[Any, float], seed: int) -> np.ndarray:
    """Deal patients to splits; returns the split of each row, (n,) of str."""
    findings = table["label"].str.get_dummies("|") if table.attrs.get("task") == "multilabel" else None
    labels = pd.get_dummies(table["label"]) if findings is None else findings.assign(**{"": table["label"] == ""})
    patients, row_of = np.unique(table["patient_id"].to_numpy(dtype=str), return_inverse=True)
    held = np.zeros((len(patients), labels.shape[1] + 1))  # images of each patient with each label; the last counts all
    np.add.at(held, row_of, np.column_stack([labels.sort_index(axis=1).to_numpy(dtype=float), np.ones(len(table))]))
    total = np.maximum(held.sum(axis=0), 1)
    rarest = np.where(held > 0, total, np.inf)[:, :-1].argmin(axis=1)
    shuffled = np.random.default_rng(seed).permutation(len(patients))
    order = shuffled[np.lexsort((rarest[shuffled], -held[shuffled, -1], total[rarest[shuffled]]))]

    names = [name for name, part in fractions.items() if part > 0]
    part = np.array([fractions[name] for name in names])
    dealt = np.zeros((len(names), held.shape[1]))
    left = (held > 0).sum(axis=0)  # patients with each label that are still to be dealt
    choice = np.zeros(len(patients), dtype=int)
    for patient in order:
        own, label = held[patient], rarest[patient]
        need = ((part[:, None] * total - dealt - own / 2) / part[:, None] / total) @ (own / total)
        lacking = dealt[:, label] == 0
        if left[label] <= lacking.sum():  # the last patients of a rare label go where it is missing
            need = np.where(lacking, need, -np.inf)
        choice[patient] = need.argmax()
        dealt[choice[patient]] += own
        left -= own > 0
    return np.array(names, dtype=object)[choice[row_of]]


def _check_split_classes(table: pd.DataFrame, wanted: set[str], given: set[str]) -> None:
    """Refuse a split without a class; but the test that a multi-label source brings may lack findings.

    CheXpert's does. Their metrics are then undefined, and say so.
    """
    task = table.attrs.get("task", "multiclass")
    classes = table.attrs.get("classes") or classes_of(table["label"], task)
    multilabel = task == "multilabel"
    for split in (s for s in SPLITS if s in wanted):
        part = table[table["split"] == split]
        absent = sorted(set(classes) - set(classes_of(part["label"], task)))
        if absent and not (multilabel and split == "test" and split in given and len(absent) < len(classes)):
            patients = table[[absent[0] in label.split("|") for label in table["label"]]]["patient_id"].nunique()
            raise DataError(
                f"split {split} has no image of {', '.join(absent[:5])}{' ...' if len(absent) > 5 else ''} "
                f"({absent[0]}: {counted(patients, 'patient')} in all); add patients of it, merge it, or leave it out"
            )
        always = [c for c, y in zip(classes, targets_of(part, classes).T, strict=True) if not (y == 0).any()]
        if multilabel and split != "test" and always:
            raise DataError(
                f"split {split} has no image that is known to be without {', '.join(always[:5])}"
                f"{' ...' if len(always) > 5 else ''}; add some (0 in its column), or leave it out"
            )
