"""The table: one row an image, read from class folders or from a CSV file, and split by patient.

In: a folder (``DATA/<class>/*.png``, ``DATA/{train,valid,test}/<class>/``, ``DATA/images/<class>/``, or any folder with
a ``labels.csv`` or ``manifest.csv``) or a CSV file with ``path,label[,patient_id][,split][,findings,view,age,sex]``.
Out: a DataFrame with the columns ``path`` (opens from the current folder), ``label`` (several findings are joined by
``|``, none is the empty text), ``patient_id`` and ``split`` (``train``, ``valid``, ``test``, or empty before
`split_table`), then what the source offers besides. Its ``attrs`` hold

    task            "binary", "multiclass" or "multilabel"
    classes         sorted class names (multi-label: all findings seen)
    patients_from   where the patient ids come from, in words
    source          the folder or CSV file that was read

Pixels are not opened here; what is wrong with them is for `cxr_fastai.audit` to find.
"""

import contextlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cxr_fastai.config import TASKS
from cxr_fastai.errors import DataError, UsageError
from cxr_fastai.images import films_below

SPLITS = ("train", "valid", "test")
SPLIT_ALIASES = {"training": "train", "val": "valid", "validation": "valid", "testing": "test"}
NO_FINDING = frozenset({"", "no finding", "no_finding", "no findings", "none", "normal"})
NEGATIVE = NO_FINDING | {"negative", "neg", "healthy", "control", "absent", "benign", "clear", "no", "n", "false", "0"}
NAMELESS = frozenset({"", "anonymous", "anonymized", "anonymised", "anon", "unknown", "none", "nan", "na", "n/a"})
FOLDER_CSVS = ("labels.csv", "manifest.csv")

# Name of the source, and where the patient stands in a path ("/" between folders), as the dataset's authors wrote it.
PATIENT_PATTERNS = (
    ("Kermany file names", re.compile(r"(?:^|/)(person\d+)_[^/]*$")),
    ("Kermany file names", re.compile(r"(?:^|/)((?:NORMAL\d*-)?IM-\d+)-\d+[^/]*$")),
    ("NIH file names", re.compile(r"(?:^|/)(\d{8})_\d{3}\.[^/]*$")),
    ("CheXpert folders", re.compile(r"(?:^|/)(patient\d+)/study\d+/[^/]*$")),
    ("MIMIC folders", re.compile(r"(?:^|/)(p\d{8})/s\d{8}/[^/]*$")),
)


def load_table(data: str | Path, *, task: str = "auto", patient_regex: str | None = None) -> pd.DataFrame:
    """Read a folder or a CSV file into the table.

    Parameters
    ----------
    data
        A folder of class folders, a folder with ``labels.csv`` or ``manifest.csv``, or a CSV file.
    task
        ``auto``: multi-label if any label holds a ``|`` or ``dataset.json`` says so, binary for two classes, else
        multi-class. Asked for as ``multilabel`` with labels of one word, the ``findings`` column becomes the label.
    patient_regex
        Where the patient id stands in the file name (its first group, else the whole match); with a ``/`` in it, it
        is searched in the path below `data`. It goes before the ``patient_id`` column.

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
    listing = source if source.is_file() else _folder_csv(source)
    table = _read_csv(listing) if listing else _read_folders(source)
    table, resolved = _set_task(table, task, source if source.is_dir() else source.parent)
    _set_patients(table, patient_regex)
    table = table.sort_values("path", ignore_index=True).drop(columns="name")
    first = ["path", "label", "patient_id", "split"]
    table = table[first + [c for c in table.columns if c not in first]]
    classes = _classes(table["label"], resolved)
    _check_classes(table, classes, resolved, source)
    table.attrs.update(task=resolved, classes=classes, source=str(source))
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
            f"{_count(len(torn), 'patient')} on both sides of the split: {first}{' ...' if len(torn) > 3 else ''}; "
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
    _check_split_classes(table, {"train"} | set(wanted) | given)
    return table


# Reading -------------------------------------------------------------------------------------------------------------


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _subfolders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith((".", "__MACOSX")))


def _folder_csv(folder: Path) -> Path | None:
    """Return the folder's own list of images, if it has one with the columns that are needed."""
    for path in (folder / name for name in FOLDER_CSVS):
        if path.is_file() and {"path", "label"} <= set(pd.read_csv(path, nrows=0, encoding="utf-8-sig").columns):
            return path
    return None


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


def _read_csv(path: Path) -> pd.DataFrame:
    """Read a list of images; every cell is text, paths are those of its folder (or else of the current one)."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read as CSV ({str(error).strip()}); save it as comma-separated UTF-8"
        ) from error
    missing = [c for c in ("path", "label") if c not in table.columns]
    if missing:
        found = ", ".join(map(str, table.columns))
        raise DataError(f"{path} has no column {' or '.join(missing)}; it has: {found}; rename them to path,label")
    if table.empty:
        raise DataError(f"{path} lists no images; give one row an image")
    table = table.apply(lambda column: column.str.strip())
    table["name"] = table["path"]
    table["path"] = _resolve(table["name"], path)
    table["split"] = _splits(table["split"], path) if "split" in table.columns else ""
    if "age" in table.columns:
        years = pd.to_numeric(table["age"].replace("", None), errors="coerce")
        table["age"] = years if years.notna().equals(table["age"] != "") else table["age"]
    return _without_repeats(table, path)


def _resolve(names: pd.Series, listing: Path) -> list[str]:
    for base in (listing.parent, Path()):
        paths = [str(base / name) for name in names]
        missing = [name for name, path in zip(names, paths, strict=True) if not name or not Path(path).is_file()]
        if not missing:
            return paths
    first = [n for n in names if not n or not (listing.parent / n).is_file()]
    raise DataError(
        f"{listing} lists {_count(len(first), 'file')} of {len(names)} that cannot be found: "
        f"{', '.join(n or '(empty)' for n in first[:3])}{' ...' if len(first) > 3 else ''}; "
        f"paths are relative to {listing.parent.resolve()}"
    )


def _splits(values: pd.Series, listing: Path) -> pd.Series:
    values = values.str.lower().replace(SPLIT_ALIASES)
    unknown = sorted(set(values) - {*SPLITS, ""})
    if unknown:
        raise DataError(
            f"{listing} has unknown split {', '.join(unknown[:3])}; use train, valid or test, or leave it empty"
        )
    return values


def _without_repeats(table: pd.DataFrame, listing: Path) -> pd.DataFrame:
    """Keep one of equal rows; refuse rows that say different things about one image."""
    key = table["path"].map(os.path.normpath)
    for column in ("label", "patient_id", "split"):
        if column in table.columns:
            said = table.groupby(key)[column].unique()
            torn = said[said.map(len) > 1]
            if len(torn):
                raise DataError(
                    f"{listing} gives {_count(len(torn), 'image')} two values of {column}: "
                    f"{torn.index[0]} is {' and '.join(v or '(empty)' for v in torn.iloc[0])}; keep one row an image"
                )
    return table[~key.duplicated()]


# Meaning -------------------------------------------------------------------------------------------------------------


def _set_task(table: pd.DataFrame, task: str, folder: Path) -> tuple[pd.DataFrame, str]:
    several = table["label"].str.contains("|", regex=False).any()
    resolved: str = task
    if task == "auto":
        record = folder / "dataset.json"
        declared = _declared_task(record) if record.is_file() else None
        resolved = "multilabel" if several or declared == "multilabel" else ""
    elif several and task != "multilabel":
        raise DataError(f"task {task} cannot have several labels an image (a | in the label); use task multilabel")
    if resolved != "multilabel":
        empty = table.loc[table["label"] == "", "path"]
        if len(empty):
            raise DataError(
                f"{_count(len(empty), 'image')} without a label, such as {empty.iloc[0]}; fill in or remove"
            )
        n = table["label"].nunique()
        if task == "binary" and n > 2:
            raise DataError(
                f"task binary cannot have {n} classes ({', '.join(sorted(set(table['label']))[:5])}); merge them"
            )
        return table, resolved or ("binary" if n <= 2 else "multiclass")
    if not several and "findings" in table.columns:
        unnamed = table[(table["findings"] == "") & ~table["label"].str.lower().isin(NEGATIVE)]
        if len(unnamed):
            raise DataError(
                f"{_count(len(unnamed), 'image')} labelled but without findings, such as {unnamed['path'].iloc[0]} "
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


def _classes(labels: pd.Series, task: str) -> list[str]:
    return (
        sorted({part for label in set(labels) for part in label.split("|")} - {""})
        if task == "multilabel"
        else sorted(set(labels))
    )


def _check_classes(table: pd.DataFrame, classes: list[str], task: str, source: Path) -> None:
    if task == "multilabel":
        if not classes:
            raise DataError(
                f"{source} has no findings at all in {_count(len(table), 'image')}; add images with findings"
            )
    elif len(classes) < 2:
        raise DataError(
            f"{source} has only one class, {classes[0]} ({_count(len(table), 'image')}); at least two are needed"
        )


def _set_patients(table: pd.DataFrame, patient_regex: str | None) -> None:
    """Write ``patient_id`` for every image, and ``attrs["patients_from"]``."""
    if patient_regex is not None:
        find = _patient_finder(patient_regex)
        table["patient_id"] = [find(name) for name in table["name"]]
        table.attrs["patients_from"] = f"pattern {patient_regex}"
        return
    given = table["patient_id"] if "patient_id" in table.columns else [""] * len(table)
    stems = Counter(Path(name).stem for name in table["name"])
    ids, sources = [], []
    for path, name, known in zip(table["path"], table["name"], given, strict=True):
        match = next(((s, m[1]) for s, p in PATIENT_PATTERNS if (m := p.search(Path(name).as_posix()))), None)
        if known.lower() not in NAMELESS:
            patient, origin = known, "column patient_id"
        elif (stated := _dicom_patient(path)).lower() not in NAMELESS:
            patient, origin = stated, "DICOM PatientID"
        elif match:
            origin, patient = match
        else:
            stem = Path(name).stem
            patient, origin = (stem if stems[stem] == 1 else name), "one patient an image"
        ids.append(patient)
        sources.append(origin)
    table["patient_id"] = ids
    counts = Counter(sources).most_common()
    table.attrs["patients_from"] = (
        counts[0][0] if len(counts) == 1 else ", ".join(f"{origin} ({n} images)" for origin, n in counts)
    )


def _dicom_patient(path: str) -> str:
    """Return the PatientID in a DICOM header; the empty text where there is none, or no header that can be read."""
    if Path(path).suffix.lower() not in (".dcm", ".dicom"):
        return ""
    import pydicom

    with contextlib.suppress(Exception), warnings.catch_warnings():  # what is wrong with a file is the reader's to say
        warnings.simplefilter("ignore")
        header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=["PatientID"])
        return str(header.get("PatientID", "")).strip()
    return ""


def _patient_finder(pattern: str) -> Callable[[str], str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"patient pattern {pattern!r} is not a regular expression: {error}") from error

    def find(name: str) -> str:
        match = compiled.search(name if "/" in pattern else Path(name).name)
        patient = (match.group(1) if compiled.groups else match.group()) if match else None
        if not patient:
            raise DataError(f"patient pattern {pattern!r} does not match {name}; it must find a patient in every name")
        return patient

    return find


# Splitting -----------------------------------------------------------------------------------------------------------


def _deal(table: pd.DataFrame, fractions: dict[str, float], seed: int) -> np.ndarray:
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


def _check_split_classes(table: pd.DataFrame, wanted: set[str]) -> None:
    task = table.attrs.get("task", "multiclass")
    classes = table.attrs.get("classes") or _classes(table["label"], task)
    for split in (s for s in SPLITS if s in wanted):
        absent = sorted(set(classes) - set(_classes(table.loc[table["split"] == split, "label"], task)))
        if absent:
            patients = table[[absent[0] in label.split("|") for label in table["label"]]]["patient_id"].nunique()
            raise DataError(
                f"split {split} has no image of {', '.join(absent[:5])}{' ...' if len(absent) > 5 else ''} "
                f"({absent[0]}: {_count(patients, 'patient')} in all); add patients of it, merge it, or leave it out"
            )
