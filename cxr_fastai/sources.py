"""Public datasets as they are distributed: recognised by their own files, and made into rows without any conversion.

    kind         recognised by                                        task          the split it brings
    nih          Data_Entry_2017*.csv                                 multi-label   train_val_list.txt, test_list.txt
    chexpert     train.csv with Path and Frontal/Lateral              multi-label   train.csv: train, valid.csv: test
    mimic        mimic-cxr-2.*-chexpert.csv(.gz)                      multi-label   mimic-cxr-2.*-split.csv(.gz)
    rsna         stage_2_train_labels.csv                             binary        none
    kermany      train/ and test/ with PNEUMONIA/person1_virus_6.jpeg binary        its test; val (16 films) is train
    shenzhen, montgomery     CHNCXR_0001_0.png, MCUCXR_0001_0.png     binary        none

In: the root folder. Out: a `Source`: one row an image that is there, with ``path``, ``name`` (the path below the root),
``label``, ``split``, most with ``patient_id``, and ``view``, ``age``, ``sex`` where the files say so. CheXpert and
MIMIC add a column ``y_<finding>`` for each finding: 1 there, 0 not there or not mentioned, -1 uncertain. That a finding
which the report does not mention is not there is the convention of the CheXpert paper (Irvin et al., AAAI 2019).
Frontal films only. What is left out stands in ``notes``.
"""

import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from cxr_fastai.errors import DataError
from cxr_fastai.images import films_below
from cxr_fastai.patients import years

TARGET = "y_"  # prefix of the columns that say of each finding whether it is there
CHEXPERT_FINDINGS = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
SEXES = {"male": "M", "m": "M", "female": "F", "f": "F"}
KERMANY_FILM = re.compile(r"person\d+_(bacteria|virus)_\d+")
TUBERCULOSIS_FILM = re.compile(r"(CHNCXR|MCUCXR)_\d{4}_([01])")
TUBERCULOSIS_PLACES = ("", "CXR_png/", "*/CXR_png/", "images/")


@dataclass(frozen=True)
class Source:
    """What was found in a root folder: which dataset, its rows, whence the patient ids, and what was left out."""

    kind: str
    rows: pd.DataFrame
    patients_from: str | None = None
    notes: list[str] = field(default_factory=list)


def find_source(root: Path) -> Source | None:
    """Return the public dataset whose root folder this is, or None.

    Raises
    ------
    DataError
        If it is one, but a file that it needs is missing or cannot be read, or none of its films is there.
    """
    return next((source for look in READERS if (source := look(root)) is not None), None)


def counted(n: int, noun: str) -> str:
    """Return ``1 film``, ``2 films``."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def findings_of(targets: pd.DataFrame) -> pd.Series:
    """Return the label of each row of ``y_`` columns: its sure findings (1), sorted and joined by ``|``."""
    names = sorted(c.removeprefix(TARGET) for c in targets.columns)
    sure = (targets[[TARGET + name for name in names]] == 1).to_numpy()
    return pd.Series(
        ["|".join(n for n, yes in zip(names, row, strict=True) if yes) for row in sure], targets.index, dtype=object
    )


# The datasets --------------------------------------------------------------------------------------------------------


def _nih(root: Path) -> Source | None:
    listing = _first(root, "Data_Entry_2017*.csv")
    if listing is None:
        return None
    table = _csv(listing, "Image Index", "Finding Labels", "Patient ID", "Patient Age", "View Position")
    where = {film.name: film for film in reversed(list(films_below(root)))}
    sex = next((c for c in ("Patient Gender", "Patient Sex") if c in table.columns), None)
    rows = pd.DataFrame(
        {
            "path": [str(where.get(name, root / "images" / name)) for name in table["Image Index"]],
            "label": table["Finding Labels"],
            "patient_id": table["Patient ID"].str.zfill(8),  # as in the file names
            "split": _nih_split(root, table["Image Index"]),
            "view": table["View Position"],
            "age": table["Patient Age"].map(years),
            "sex": _sex(table[sex]) if sex else "",
        }
    )
    return _source("nih", root, rows, f"column Patient ID of {listing.name}", listing)


def _nih_split(root: Path, names: pd.Series) -> pd.Series:
    split = pd.Series("", names.index)
    for listing, part in (("train_val_list.txt", "train"), ("test_list.txt", "test")):
        if (root / listing).is_file():
            split[names.isin((root / listing).read_text(encoding="utf-8").split())] = part
    unlisted = split == ""
    if unlisted.any() and not unlisted.all():
        raise DataError(
            f"{root} has {counted(int(unlisted.sum()), 'film')} in neither train_val_list.txt nor test_list.txt, such "
            f"as {names[unlisted].iloc[0]}; put both lists there, or remove both to have a split made"
        )
    return split


def _chexpert(root: Path) -> Source | None:
    needed = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA")
    if not (root / "train.csv").is_file() or not {"Path", "Frontal/Lateral"} <= set(_columns(root / "train.csv")):
        return None
    parts = {name: root / name for name in ("train.csv", "valid.csv") if (root / name).is_file()}
    # valid.csv is the small set that three radiologists labelled, and the only one whose labels are certain: the test.
    splits = {"train.csv": "train" if len(parts) > 1 else "", "valid.csv": "test"}
    table = pd.concat(
        [_csv(path, *needed, "No Finding").assign(split=splits[name]) for name, path in parts.items()],
        ignore_index=True,
    )
    frontal = table["Frontal/Lateral"].str.lower() == "frontal"
    table = table[frontal]
    targets = _targets(table, root / "train.csv")
    rows = pd.DataFrame(
        {
            "path": [_below(root, path) for path in table["Path"]],
            "label": findings_of(targets),
            "patient_id": table["Path"].str.extract(r"(patient\d+)", expand=False).fillna(table["Path"]),
            "split": table["split"],
            "view": table["AP/PA"],
            "age": table["Age"].map(years),
            "sex": _sex(table["Sex"]),
        }
    )
    source = _source("chexpert", root, rows.join(targets), "CheXpert folders", root / "train.csv")
    return _noting(source, int((~frontal).sum()), "lateral film")


def _below(root: Path, path: str) -> str:
    """Return where a path of CheXpert's CSV lies: it begins with the root's original name, CheXpert-v1.0-small/."""
    parts = Path(path).parts
    return str(root.joinpath(*parts[1:] if parts and parts[0].lower().startswith("chexpert") else parts))


def _mimic(root: Path) -> Source | None:
    listing = _first(root, "mimic-cxr-2.*-chexpert.csv*")
    if listing is None:
        return None
    films, split = (_first(root, f"mimic-cxr-2.*-{part}.csv*") for part in ("metadata", "split"))
    if films is None:
        raise DataError(
            f"{root} has {listing.name} but no mimic-cxr-2.*-metadata.csv.gz, which lists the films and their views; "
            "download it from the same place"
        )
    studies = _csv(listing, "subject_id", "study_id")
    table = _csv(films, "dicom_id", "subject_id", "study_id", "ViewPosition")
    frontal = table["ViewPosition"].isin(["PA", "AP"])
    table = table[frontal].merge(studies, on=["subject_id", "study_id"], how="left", indicator="labelled")
    labelled = table["labelled"] == "both"
    table = table[labelled].reset_index(drop=True)
    parts = {"train": "train", "validate": "valid", "test": "test"}
    table["split"] = ""
    if split is not None:
        official = _csv(split, "dicom_id", "split").set_index("dicom_id")["split"]
        table["split"] = table["dicom_id"].map(official).map(parts).fillna("")
    targets = _targets(table, listing)
    folder = root / "files"
    rows = pd.DataFrame(
        {
            "path": [
                str(folder / f"p{person[:2]}" / f"p{person}" / f"s{study}" / f"{film}.jpg")
                for person, study, film in zip(table["subject_id"], table["study_id"], table["dicom_id"], strict=True)
            ],
            "label": findings_of(targets),
            "patient_id": "p" + table["subject_id"],
            "split": table["split"],
            "view": table["ViewPosition"],
        }
    )
    source = _source("mimic", root, rows.join(targets), f"column subject_id of {films.name}", films)
    _noting(source, int((~frontal).sum()), "film other than PA or AP", "films other than PA or AP")
    return _noting(source, int((~labelled).sum()), "film without labels", "films without labels")


def _rsna(root: Path) -> Source | None:
    listing = root / "stage_2_train_labels.csv"
    if not listing.is_file():
        return None
    table = _csv(listing, "patientId", "Target")
    target = table.groupby("patientId")["Target"].max()  # one row a box
    rows = pd.DataFrame(
        {
            "path": [str(root / "stage_2_train_images" / f"{film}.dcm") for film in target.index],
            # Not "normal": more than half of them have some other disease ("No Lung Opacity / Not Normal").
            "label": target.map({"0": "no pneumonia", "1": "pneumonia"}).fillna("").to_numpy(),
            "patient_id": target.index,
            "split": "",
        }
    )
    details = root / "stage_2_detailed_class_info.csv"
    if details.is_file():
        known = _csv(details, "patientId", "class").drop_duplicates("patientId").set_index("patientId")["class"]
        rows["detail"] = rows["patient_id"].map(known).fillna("")
    return _source("rsna", root, rows, "column patientId (one a film; the NIH patient behind it is not told)", listing)


def _kermany(root: Path) -> Source | None:
    for top in (root, root / "chest_xray"):
        sick = (top / "train" / "PNEUMONIA", top / "test" / "PNEUMONIA")
        if all(folder.is_dir() for folder in sick):
            break
    else:
        return None
    first = next(films_below(sick[1]), None)
    if first is None or not KERMANY_FILM.match(first.name):
        return None
    # The 16 films of val are too few to choose anything by; validation is taken out of train, by patient.
    splits = {"train": "train", "val": "train", "test": "test"}
    rows = [
        (str(film), label, split)
        for folder, split in splits.items()
        for label in ("NORMAL", "PNEUMONIA")
        for film in films_below(top / folder / label)
    ]
    return _source("kermany", root, pd.DataFrame(rows, columns=["path", "label", "split"]), None, top)


def _tuberculosis(root: Path) -> Source | None:
    places = (f"{place}{kind}_????_[01].png" for kind in ("CHNCXR", "MCUCXR") for place in TUBERCULOSIS_PLACES)
    if not any(next(root.glob(place), None) for place in places):
        return None
    rows = []
    for film in films_below(root):
        match = TUBERCULOSIS_FILM.fullmatch(film.stem)
        if (
            match and "mask" not in film.relative_to(root).as_posix().lower()
        ):  # Montgomery's masks have the films' names
            reading = film.parents[1] / "ClinicalReadings" / f"{film.stem}.txt"
            said = reading.read_text(encoding="utf-8", errors="replace").lower() if reading.is_file() else ""
            age, sex = re.search(r"(\d+)\s*-?([ymd])", said), re.search(r"\b(female|male|[fm])\b", said)
            rows.append(
                {
                    "path": str(film),
                    "label": "tuberculosis" if match[2] == "1" else "normal",
                    "patient_id": film.stem[:-2],
                    "split": "",
                    "age": years("".join(age.groups())) if age else float("nan"),
                    "sex": SEXES[sex[1]] if sex else "",
                }
            )
    if not rows:
        return None
    names = {"CHNCXR": "shenzhen", "MCUCXR": "montgomery"}
    kinds = sorted({names[str(row["patient_id"])[:6]] for row in rows}, reverse=True)
    return _source("+".join(kinds), root, pd.DataFrame(rows), "file names (one patient a film)", root)


READERS: tuple[Callable[[Path], Source | None], ...] = (_nih, _chexpert, _mimic, _rsna, _kermany, _tuberculosis)


# What they share -----------------------------------------------------------------------------------------------------


def _first(root: Path, pattern: str) -> Path | None:
    return min((p for p in root.glob(pattern) if p.is_file() and p.suffix in (".csv", ".gz")), default=None)


def _columns(path: Path) -> list[str]:
    try:
        return list(pd.read_csv(path, nrows=0, encoding="utf-8-sig", index_col=False).columns)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError):
        return []


def _csv(path: Path, *needed: str) -> pd.DataFrame:
    """Read a dataset's own CSV, every cell as text; NIH's header has one comma more or less than its rows."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pd.errors.ParserWarning)
            table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read as CSV ({str(error).strip()}); download it again") from error
    missing = [c for c in needed if c not in table.columns]
    if missing:
        raise DataError(f"{path} has no column {', '.join(missing)}; use it as it is distributed")
    return table.apply(lambda column: column.str.strip())


def _sex(values: pd.Series) -> pd.Series:
    return values.str.lower().map(SEXES).fillna("")


def _targets(table: pd.DataFrame, listing: Path) -> pd.DataFrame:
    """Return the ``y_`` columns of CheXpert's labeller: 1, 0 (negative or not mentioned) and -1 (uncertain)."""
    names = [name for name in CHEXPERT_FINDINGS if name in table.columns]
    if not names:
        raise DataError(f"{listing} has no column {', '.join(CHEXPERT_FINDINGS[:3])} ...; use it as it is distributed")
    values = table[names].replace("", "0").apply(pd.to_numeric, errors="coerce")
    strange = ~values.isin([1, 0, -1])
    if strange.any(axis=None):
        column = strange.any().idxmax()
        cell = table.loc[strange[column], column].iloc[0]
        raise DataError(f"{listing} has {cell!r} for {column}; it must be 1.0, 0.0, -1.0 or blank")
    return values.astype(float).add_prefix(TARGET)


def _source(kind: str, root: Path, rows: pd.DataFrame, patients_from: str | None, listing: Path) -> Source:
    """Keep the rows whose film is there, note how many are not, and refuse it if none is."""
    there = rows["path"].map(os.path.isfile).to_numpy(dtype=bool)  # a tenth of pathlib's time, 100,000 times
    if not there.any():
        example = f", such as {Path(rows['path'].iloc[0]).relative_to(root)}" if len(rows) else ""
        raise DataError(
            f"{root}: none of the {counted(len(rows), 'film')} of {listing.name} is there{example}; "
            "unpack the images below it"
        )
    rows = rows[there].reset_index(drop=True)
    rows["name"] = [os.path.relpath(path, root).replace(os.sep, "/") for path in rows["path"]]
    missing = int((~there).sum())
    return _noting(Source(kind, rows, patients_from), missing, "listed film that is not there")


def _noting(source: Source, n: int, what: str, several: str | None = None) -> Source:
    if n:
        source.notes.append(f"left out: {n:,} {what if n == 1 else several or f'{what}s'}")
    return source
