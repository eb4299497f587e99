"""A CSV file as rows: ``path,label``, one column a finding, or rows that name DICOM films by what their headers say.

In: a CSV file whose rows name their image by ``path`` (relative to the file's folder, or else to the current one), or
where there is no such column by ``SOPInstanceUID``, file name (``file``, ``filename``, ``image``) or ``PatientID``, for
films anywhere below the file's folder; and that say what is on it by ``label``, or by a column of 1, 0, -1 (uncertain)
and blank (unknown) for each finding. Out: rows with ``path``, ``name`` (as the file gives it), ``label``, ``split``,
``header`` where headers were read, ``y_<finding>`` where there is a column for each, and all other columns as they are.
"""

import os
import re
from collections import defaultdict
from pathlib import Path

import pandas as pd

from cxr_fastai.errors import DataError
from cxr_fastai.images import films_below
from cxr_fastai.patients import pseudonym, read_header, years
from cxr_fastai.sources import TARGET, counted, findings_of

SPLITS = ("train", "valid", "test")
SPLIT_ALIASES = {"training": "train", "val": "valid", "validation": "valid", "testing": "test"}
FOLDER_CSVS = ("labels.csv", "manifest.csv")
UID, FILE, PATIENT = "SOPInstanceUID", "file name", "PatientID"
KEYS = {
    **dict.fromkeys(("sopinstanceuid", "sopuid"), UID),
    **dict.fromkeys(("file", "filename", "image", "imagename"), FILE),
    **dict.fromkeys(("patientid", "patient"), PATIENT),
}
# Columns that are about the film or the person, so never a finding, whatever their cells hold.
ABOUT = frozenset({"path", "name", "label", "patient_id", "split", "findings", "view", "age", "sex", "seed", "modality",
                   "body_part", "header"})  # fmt: skip
CELLS = {"1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "-1": -1.0, "-1.0": -1.0, "": float("nan")}


def folder_listing(folder: Path) -> Path | None:
    """Return the folder's own list of images, ``labels.csv`` or ``manifest.csv``, if it names and labels films."""
    for path in (folder / name for name in FOLDER_CSVS):
        if path.is_file():
            table = _text(path, rows=0)
            table = table if "label" in table.columns else _text(path)
            if _key(table) and ("label" in table.columns or _finding_columns(table)):
                return path
    return None


def read_listing(path: Path, *, hash_ids: bool = False) -> tuple[pd.DataFrame, list[str]]:
    """Read a list of images.

    Parameters
    ----------
    path
        The CSV file.
    hash_ids
        Name no patient id in an error, and keep no column but those that are understood.

    Returns
    -------
    rows : pandas.DataFrame
        As the module describes them; a cell of another column is text.
    notes : list of str
        What was left out or not understood.

    Raises
    ------
    DataError
        If it is no CSV, names no film or none that is there, or contradicts itself.
    """
    table = _text(path)
    key, findings = _key(table), [] if "label" in table.columns else _finding_columns(table)
    if key is None or ("label" not in table.columns and not findings):
        missing = [c for c, there in (("path", key), ("label", "label" in table.columns)) if not there]
        found = ", ".join(map(str, table.columns))
        raise DataError(
            f"{path} has no column {' or '.join(missing)}; it has: {found}; rename them to path,label"
            + ("" if key is None else ", or give a column of 1, 0 and blank for each finding")
        )
    if table.empty:
        raise DataError(f"{path} lists no images; give one row an image")
    notes = []
    if findings and (others := [c for c in table.columns if c not in {*findings, *ABOUT, *_key_columns(table)}]):
        notes.append(f"not read as findings, by name or cells other than 1, 0, -1 and blank: {', '.join(others)}")
    table = _with_targets(table, findings)
    if key[0] == "path":
        table["name"] = table["path"]
        table["path"] = _resolve(table["name"], path)
    else:
        table, more = _match(table, *key, path, hash_ids)
        notes += more
    table["split"] = _splits(table["split"], path) if "split" in table.columns else ""
    if "age" in table.columns:
        age = table["age"].map(years)
        table["age"] = age if age.notna().equals(table["age"] != "") else table["age"]
    if hash_ids:
        table = table[[c for c in table.columns if c in ABOUT or c.startswith(TARGET)]]
    return _without_repeats(table, path, hash_ids), notes


def _text(path: Path, rows: int | None = None) -> pd.DataFrame:
    """Read every cell as text; a column of patient ids under another name is called ``patient_id``."""
    try:
        table = pd.read_csv(
            path, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True, nrows=rows
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read as CSV ({str(error).strip()}); save it as comma-separated UTF-8"
        ) from error
    patient = next((c for c, key in _key_columns(table).items() if key == PATIENT), None)
    if patient and "patient_id" not in table.columns:
        table = table.rename(columns={patient: "patient_id"})
    return table.apply(lambda column: column.str.strip())


def _key_columns(table: pd.DataFrame) -> dict[str, str]:
    plain = {c: re.sub(r"[\s_-]", "", str(c).lower()) for c in table.columns}
    return {c: KEYS[name] for c, name in plain.items() if name in KEYS}


def _key(table: pd.DataFrame) -> tuple[str, str] | None:
    """Return what names the film, and its column: path, else the closest to the film that there is."""
    if "path" in table.columns:
        return "path", "path"
    columns = {key: column for column, key in reversed(_key_columns(table).items())}
    return next(((key, columns[key]) for key in (UID, FILE, PATIENT) if key in columns), None)


def _finding_columns(table: pd.DataFrame) -> list[str]:
    about = {*ABOUT, *_key_columns(table)}
    return [
        c
        for c in table.columns
        if c not in about and c.lower() != "no finding" and set(table[c]) <= set(CELLS) and set(table[c]) != {""}
    ]


def _with_targets(table: pd.DataFrame, findings: list[str]) -> pd.DataFrame:
    """Turn finding columns into numbers named ``y_<finding>`` and make the label of them; so come back our own, too."""
    table = table.rename(columns={c: TARGET + c.removeprefix(TARGET) for c in findings})
    targets = [c for c in table.columns if c.startswith(TARGET) and set(table[c]) <= set(CELLS)]
    for column in targets:
        table[column] = table[column].map(CELLS)
    return table.assign(label=findings_of(table[targets])) if findings else table


def _match(table: pd.DataFrame, key: str, column: str, listing: Path, hash_ids: bool) -> tuple[pd.DataFrame, list[str]]:
    """Find the films that rows mean, below the list's folder: by header, or by file name; a row may mean several."""
    root = listing.parent
    films = list(films_below(root))
    headers = {film: read_header(film) for film in films}
    index: dict[str, list[Path]] = defaultdict(list)
    for film in films:
        names = (film.relative_to(root).as_posix(), film.name, film.stem) if key == FILE else (headers[film].get(key),)
        for name in {name for name in names if name}:
            index[name].append(film)
    wanted = table[column]
    lost = [i for i, name in enumerate(wanted) if name not in index]
    if lost:
        shown = [f"line {i + 2}" if hash_ids and key == PATIENT else wanted.iloc[i] or "(empty)" for i in lost[:3]]
        raise DataError(
            f"{listing}: {counted(len(lost), 'row')} of {len(table)} match no film below {root} by {key}: "
            f"{', '.join(shown)}{' ...' if len(lost) > 3 else ''}; correct them, or give a column path"
        )
    if key == FILE and (several := [name for name in wanted if len(index[name]) > 1]):
        raise DataError(
            f"{listing}: {several[0]} is the name of {len(index[several[0]])} films below {root}; give a column path"
        )
    found = [(i, film) for i, name in enumerate(wanted) for film in index[name]]
    rows = table.iloc[[i for i, _ in found]].reset_index(drop=True)
    rows["path"] = [str(film) for _, film in found]
    rows["name"] = [film.relative_to(root).as_posix() for _, film in found]
    rows["header"] = [headers[film] for _, film in found]
    unlisted = len(films) - len({film for _, film in found})
    notes = [f"left out: {counted(unlisted, 'film')} below {root} without a row in {listing.name}"] if unlisted else []
    return (rows if key == PATIENT else rows.drop(columns=column)), notes


def _resolve(names: pd.Series, listing: Path) -> list[str]:
    for base in (listing.parent, Path()):
        paths = [str(base / name) for name in names]
        missing = [name for name, path in zip(names, paths, strict=True) if not name or not Path(path).is_file()]
        if not missing:
            return paths
    first = [n for n in names if not n or not (listing.parent / n).is_file()]
    raise DataError(
        f"{listing} lists {counted(len(first), 'file')} of {len(names)} that cannot be found: "
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


def _without_repeats(table: pd.DataFrame, listing: Path, hash_ids: bool) -> pd.DataFrame:
    """Keep one of equal rows; refuse rows that say different things about one image."""
    key = table["path"].map(os.path.normpath)
    repeated = key.duplicated(keep=False)
    for column in ("label", "patient_id", "split", *(c for c in table.columns if c.startswith(TARGET))):
        if column in table.columns:
            said = table[repeated].groupby(key[repeated])[column].unique()
            torn = said[said.map(len) > 1]
            if len(torn):
                values = [pseudonym(v) if hash_ids and column == "patient_id" else v for v in torn.iloc[0]]
                raise DataError(
                    f"{listing} gives {counted(len(torn), 'image')} two values of {column}: {torn.index[0]} is "
                    f"{' and '.join(str(v) or '(empty)' for v in values)}; keep one row an image"
                )
    return table[~key.duplicated()]
