"""The table: one row an image, read from class folders, a CSV file, a DICOM tree or a public dataset as it is.

In: a folder (``DATA/<class>/*.png``, ``DATA/{train,valid,test}/<class>/``, ``DATA/images/<class>/``, any folder with a
``labels.csv`` or ``manifest.csv``, or the root of a public dataset, see `cxr_fastai.sources`) or a CSV file (see
`cxr_fastai.listing`). Out: a DataFrame with the columns ``path`` (opens from the current folder), ``label`` (several
findings are joined by ``|``, none is the empty text), ``patient_id`` and ``split`` (``train``, ``valid``, ``test``, or
empty before `cxr_fastai.split`), then what the source offers besides, such as ``view``, ``age`` (years) and ``sex``.

A multi-label source that knows of each finding whether it is there has a column ``y_<finding>`` for each: 1 yes, 0 no,
-1 uncertain, NaN unknown. ``label`` then holds the sure findings. `targets_of` makes of either form what a loss or a
metric takes. ``attrs`` hold

    task            "binary", "multiclass" or "multilabel"
    classes         sorted class names (multi-label: all findings that some film surely has)
    targets         True where there are columns ``y_<finding>``
    patients_from   where the patient ids come from, in words
    source          the folder or CSV file that was read
    source_kind     "folders", "csv", or the public dataset: "nih", "chexpert", "mimic", "rsna", "kermany",
                    "shenzhen", "montgomery"
    notes           what was left out, one line each, for people

Pixels are not opened here; what is wrong with them is for `cxr_fastai.audit` to find.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cxr_fastai.config import TASKS
from cxr_fastai.errors import DataError, UsageError
from cxr_fastai.images import films_below
from cxr_fastai.listing import SPLIT_ALIASES, SPLITS, folder_listing, read_listing
from cxr_fastai.patients import add_header_columns, read_header, set_patients
from cxr_fastai.sources import TARGET, Source, counted, find_source

NO_FINDING = frozenset({"", "no finding", "no_finding", "no findings", "none", "normal"})
NEGATIVE = NO_FINDING | {"negative", "neg", "healthy", "control", "absent", "benign", "clear", "no", "n", "false", "0"}
UNCERTAIN = -1.0
# What each of `config.UNCERTAIN` trains an uncertain finding as. The first three are those of CheXpert's paper (Irvin
# et al., AAAI 2019); soft is the middle of 0.55 to 0.85, from which Pham et al. (Neurocomputing 2021) draw theirs.
UNCERTAIN_AS = {"ignore": np.nan, "ones": 1.0, "zeros": 0.0, "soft": 0.7}


def load_table(
    data: str | Path,
    *,
    task: str = "auto",
    patient_regex: str | None = None,
    hash_ids: bool = False,
    mapping: Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Read a folder or a CSV file into the table.

    Parameters
    ----------
    data
        A folder or a CSV file, as the module describes them.
    task
        ``auto``: multi-label if any label holds a ``|`` or ``dataset.json`` says so, binary for two classes, else
        multi-class. Asked for as ``multilabel`` with labels of one word, the ``findings`` column becomes the label.
    patient_regex
        Where the patient id stands in the file name (its first group, else the whole match); with a ``/`` in it, it
        is searched in the path below `data`. It goes before the ``patient_id`` column.
    hash_ids
        Store `patients.pseudonym` instead of each patient id. File names stay, and may hold the id.
    mapping
        What labels and findings become, by name; ``*`` stands for all that are not named, and a word for nothing found
        (such as "No Finding") for films without any. What becomes the empty text is left out, a film with nothing left
        is dropped. Labels that are not named stay as they are.
    classes
        Those of a model that is to be tested; by default those in the data, of which there must be two.

    Returns
    -------
    pandas.DataFrame
        The table as the module describes it, sorted by path, with ``split`` as the source gives it or empty.

    Raises
    ------
    DataError
        If the source is missing, empty, contradicts itself or has fewer than two classes.
    UsageError
        If `task` or `patient_regex` makes no sense.
    """
    if task not in TASKS:
        raise UsageError(f"task {task!r} is not one of {', '.join(TASKS)}")
    source = Path(data)
    if not source.exists():
        raise DataError(f"{source} does not exist; give a folder of class folders or a CSV file with path,label")
    found = _read(source, hash_ids)
    task = "multilabel" if task == "auto" and found.kind == "nih" else task
    rows = found.rows.copy()
    if mapping:
        rows = _mapped(rows, mapping, task, source)
    table, resolved = _set_task(rows, task, source if source.is_dir() else source.parent)
    if "header" not in table.columns:
        table["header"] = table["path"].map(read_header)
    table = add_header_columns(table)
    set_patients(table, patient_regex, found.patients_from, hash_ids)
    patients_from, notes = table.attrs["patients_from"], list(found.notes)
    if found.kind == "kermany":
        table = _without_patients_of_test(table, notes)
    table = table.sort_values("path", ignore_index=True).drop(columns=["name", "header"])
    if classes is None:
        classes = classes_of(table["label"], resolved)
        _check_classes(table, classes, resolved, source)
        if unseen := [name for name in told_of(table) if name not in classes]:
            notes.append(f"not learned, since no film surely has it: {', '.join(unseen)}")
    first = ["path", "label", "patient_id", "split"]
    table = table[first + [c for c in table.columns if c not in first]]
    table.attrs = {"task": resolved, "classes": list(classes), "targets": bool(told_of(table))}
    table.attrs |= {"patients_from": patients_from, "source": str(source), "source_kind": found.kind, "notes": notes}
    return table


def positive_class(classes: Sequence[str]) -> str:
    """Return the class of two that counts as positive.

    It is the one whose partner is a word for "nothing found" (normal, no finding, negative, healthy, 0, false ...,
    see `NEGATIVE`); where that does not decide, the last in sorted order.
    """
    if len(classes) != 2:
        raise UsageError(f"a positive class needs two classes, not {len(classes)}: {', '.join(classes)}")
    negative = [c for c in classes if c.strip().lower() in NEGATIVE]
    return next(c for c in classes if c not in negative) if len(negative) == 1 else sorted(classes)[-1]


def classes_of(labels: pd.Series, task: str) -> list[str]:
    """Return the sorted class names in a label column; multi-label: all findings, and not the empty text."""
    if task != "multilabel":
        return sorted(set(labels))
    return sorted({part for label in set(labels) for part in label.split("|")} - {""})


def told_of(table: pd.DataFrame) -> list[str]:
    """Return the findings of which the table says whether they are there, in columns ``y_<finding>``; mostly none."""
    return [column.removeprefix(TARGET) for column in table.columns if column.startswith(TARGET)]


def targets_of(table: pd.DataFrame, classes: Sequence[str], uncertain: str = "ignore") -> np.ndarray:
    """Return what is known of each finding on each film, for a loss or a metric.

    Parameters
    ----------
    table
        Multi-label, with columns ``y_<finding>`` (numbers, or text as in split.csv) or else with ``label`` alone,
        which then is taken to name every finding that is there.
    classes
        The k findings; one without a column among others that have one is unknown on every film.
    uncertain
        What -1 becomes: `UNCERTAIN_AS`. Only training takes anything but "ignore": nothing is measured against a guess.

    Returns
    -------
    numpy.ndarray
        float64 (n, k): 1 there, 0 not there, NaN unknown, and with "soft" 0.7 for uncertain.
    """
    if told_of(table):
        columns = [
            pd.to_numeric(table.get(TARGET + c, pd.Series(np.nan, table.index)), errors="coerce") for c in classes
        ]
        y = np.column_stack([column.to_numpy(dtype=float) for column in columns])
        y[y == UNCERTAIN] = UNCERTAIN_AS[uncertain]
        return y
    named = [set(label.split("|")) for label in table["label"]]
    return np.array([[c in names for c in classes] for names in named], dtype=float).reshape(len(table), len(classes))


# Reading -------------------------------------------------------------------------------------------------------------


def _read(source: Path, hash_ids: bool) -> Source:
    """Read the rows of a source: its own list goes before the files of a public dataset, these before class folders."""
    listing = source if source.is_file() else folder_listing(source)
    if listing:
        rows, notes = read_listing(listing, hash_ids=hash_ids)
        return Source("csv", rows, notes=notes)
    return find_source(source) or Source("folders", _read_folders(source))


def _without_patients_of_test(table: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Leave out of train who is in the test, too: Kermany's folders number persons so that this cannot be ruled out."""
    tested = set(table.loc[table["split"] == "test", "patient_id"])
    twice = (table["split"] == "train") & table["patient_id"].isin(tested)
    if twice.any():
        people = table.loc[twice, "patient_id"].nunique()
        notes.append(
            f"left out: {counted(int(twice.sum()), 'film')} in train of {counted(people, 'person number')} "
            "that the test has, too"
        )
    return table[~twice]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith((".", "__MACOSX")))


def _read_folders(data: Path) -> pd.DataFrame:
    root = data / "images" if (data / "images").is_dir() and _subfolders(data / "images") else data
    folders = _subfolders(root)
    splits = {f: SPLIT_ALIASES.get(f.name.lower(), f.name.lower()) for f in folders}
    splits = {f: s for f, s in splits.items() if s in SPLITS}
    if splits and len(splits) < len(folders):
        others = ", ".join(f.name for f in folders if f not in splits)
        raise DataError(
            f"{root} has {', '.join(f.name for f in splits)} beside {others}; keep one kind of folder there"
        )
    rows = []
    for parent, split in splits.items() if splits else [(root, "")]:
        for folder in _subfolders(parent):
            films = list(films_below(folder))
            if not films:
                raise DataError(f"class folder {folder} has no images; put some in, or remove the folder")
            rows += [(str(f), folder.name, split, f.relative_to(data).as_posix()) for f in films]
    if not rows:
        loose = next(films_below(data), None)
        found = f"images such as {loose.relative_to(data)} are in no class folder" if loose else "no images in it"
        raise DataError(f"{data}: {found}; make one folder for each class, or give a CSV file with path,label")
    return pd.DataFrame(rows, columns=["path", "label", "split", "name"])


# Meaning -------------------------------------------------------------------------------------------------------------


def _mapped(rows: pd.DataFrame, mapping: Mapping[str, str], task: str, source: Path) -> pd.DataFrame:
    """Rename labels and findings as `load_table` says; films with nothing left are dropped."""
    none = next((new for old, new in mapping.items() if old.lower() in NO_FINDING), "" if "*" not in mapping else None)

    def renamed(label: str) -> str | None:
        parts = [mapping.get(part.strip(), mapping.get("*", part.strip())) for part in label.split("|") if part.strip()]
        if not parts and none is not None:
            parts = [none]
        kept = sorted({part for part in parts if part})
        return "|".join(kept) if kept or (task == "multilabel" and not any(parts)) else None

    if told := told_of(rows):
        if task != "multilabel":
            rows = rows.drop(columns=[TARGET + name for name in told])
        else:
            rows = _mapped_targets(rows, told, mapping)
    labels = rows["label"].map(renamed)
    if task != "multilabel" and len(torn := rows[labels.str.contains("|", regex=False, na=False)]):
        raise DataError(
            f"{source}: --map gives {counted(len(torn), 'film')} several classes, such as {torn['path'].iloc[0]} "
            f"({torn['label'].iloc[0]}); map all but one of its labels to nothing (--map LABEL=)"
        )
    kept = labels.notna()
    if not kept.any():
        raise DataError(f"{source}: --map leaves no film; its labels are {', '.join(sorted(set(rows['label']))[:8])}")
    return rows[kept].assign(label=labels[kept])


def _mapped_targets(rows: pd.DataFrame, told: list[str], mapping: Mapping[str, str]) -> pd.DataFrame:
    """Rename columns y_<finding>; of several that get one name, any that is there counts."""
    of: dict[str, list[pd.Series]] = {}
    for name in told:
        if new := mapping.get(name, mapping.get("*", name)):
            of.setdefault(new, []).append(rows[TARGET + name])
    columns = {}
    for new, parts in of.items():
        values = np.column_stack([part.to_numpy(dtype=float) for part in parts])
        whole = np.where(np.isnan(values).any(1), np.nan, np.where((values == UNCERTAIN).any(1), UNCERTAIN, 0.0))
        columns[TARGET + new] = np.where((values == 1).any(1), 1.0, whole)
    return rows.drop(columns=[TARGET + name for name in told]).assign(**columns)


def _set_task(table: pd.DataFrame, task: str, folder: Path) -> tuple[pd.DataFrame, str]:
    several = bool(told_of(table)) or table["label"].str.contains("|", regex=False).any()
    resolved: str = task
    if task == "auto":
        record = folder / "dataset.json"
        declared = _declared_task(record) if record.is_file() else None
        resolved = "multilabel" if several or declared == "multilabel" else ""
    elif several and task != "multilabel":
        raise DataError(
            f"task {task} cannot have several labels an image (a | in the label, or columns of findings); "
            "use task multilabel"
        )
    if resolved != "multilabel":
        empty = table.loc[table["label"] == "", "path"]
        if len(empty):
            raise DataError(
                f"{counted(len(empty), 'image')} without a label, such as {empty.iloc[0]}; fill in or remove"
            )
        n = table["label"].nunique()
        if task == "binary" and n > 2:
            raise DataError(
                f"task binary cannot have {n} classes ({', '.join(sorted(set(table['label']))[:5])}); "
                "merge them, or rename them with --map"
            )
        return table, resolved or ("binary" if n <= 2 else "multiclass")
    if not several and "findings" in table.columns:
        unnamed = table[(table["findings"] == "") & ~table["label"].str.lower().isin(NEGATIVE)]
        if len(unnamed):
            raise DataError(
                f"{counted(len(unnamed), 'image')} labelled but without findings, such as {unnamed['path'].iloc[0]} "
                f"({unnamed['label'].iloc[0]}); fill in findings, or leave these images out"
            )
        table = table.assign(label=table["findings"])
    return table.assign(label=table["label"].map(_normal_findings)), resolved


def _declared_task(record: Path) -> str | None:
    """Return what ``dataset.json`` says of the task, at its top or in its config."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{record} cannot be read ({error}); generate the dataset again, or remove the file") from error
    return found.get("task") or found.get("config", {}).get("task")


def _normal_findings(label: str) -> str:
    """Sort and separate findings by ``|``; words for none give the empty text."""
    return "|".join(sorted({part.strip() for part in label.split("|") if part.strip().lower() not in NO_FINDING}))


def _check_classes(table: pd.DataFrame, classes: list[str], task: str, source: Path) -> None:
    if task == "multilabel":
        if not classes:
            raise DataError(
                f"{source} has no findings at all in {counted(len(table), 'image')}; add images with findings"
            )
    elif len(classes) < 2:
        raise DataError(
            f"{source} has only one class, {classes[0]} ({counted(len(table), 'image')}); at least two are needed"
        )
