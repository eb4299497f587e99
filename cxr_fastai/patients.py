"""Who is on a film: patient ids from a column, a DICOM header or a file name, and what else a header tells.

In: a table whose rows know their ``path`` and ``name`` (the path below the source). Out: its ``patient_id`` column, and
``view``, ``age`` (years), ``sex``, ``modality`` and ``body_part`` from DICOM headers where the source has no own. No
other header value is kept, and none is printed. `pseudonym` is what ``--hash-ids`` stores instead of an id.
"""

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from cxr_fastai.errors import DataError, UsageError
from cxr_fastai.images import RASTER_SUFFIXES, printable
from cxr_fastai.images.dicom import HEADER_FIELDS
from cxr_fastai.images.guard import quiet

NAMELESS = frozenset({"", "anonymous", "anonymized", "anonymised", "anon", "unknown", "none", "nan", "na", "n/a"})
YEARS = {"": 1.0, "Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}  # units of DICOM's age string (AS)
HEADER_COLUMNS = {
    "view": "ViewPosition", "age": "PatientAge", "sex": "PatientSex", "modality": "Modality",
    "body_part": "BodyPartExamined",
}  # fmt: skip

# Name of the source, and where the patient stands in a path ("/" between folders), as the dataset's authors wrote it.
PATIENT_PATTERNS = (
    ("Kermany file names", re.compile(r"(?:^|/)(person\d+)_[^/]*$")),
    ("Kermany file names", re.compile(r"(?:^|/)((?:NORMAL\d*-)?IM-\d+)-\d+[^/]*$")),
    ("NIH file names", re.compile(r"(?:^|/)(\d{8})_\d{3}\.[^/]*$")),
    ("CheXpert folders", re.compile(r"(?:^|/)(patient\d+)/study\d+/[^/]*$")),
    ("MIMIC folders", re.compile(r"(?:^|/)(p\d{8})/s\d{8}/[^/]*$")),
)


def read_header(path: str | Path) -> dict[str, str]:
    """Read the few fields of a DICOM header that are kept (see `images.dicom.HEADER_FIELDS`), without the pixels.

    Returns
    -------
    dict of str to str
        Those that are present, as printable text of at most 64 characters. Empty for other files and for damaged ones:
        what is wrong with a file is the reader's to say.
    """
    if str(path).lower().endswith((*RASTER_SUFFIXES, ".pgm")):
        return {}
    import pydicom

    with contextlib.suppress(Exception), quiet:
        header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=list(HEADER_FIELDS))
        values = {name: printable(str(header.get(name) or "").strip())[:64] for name in HEADER_FIELDS}
        return {name: value for name, value in values.items() if value}
    return {}


def years(age: object) -> float:
    """Return an age in years: a number, or DICOM's and NIH's ``034Y``, ``018M``, ``010W``, ``005D``; NaN if neither."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([YMWD]?)", str(age).strip().upper())
    return round(float(match[1]) * YEARS[match[2]], 2) if match else np.nan


def pseudonym(patient: str) -> str:
    """Return 16 hexadecimal digits that stand for a patient id: the beginning of its SHA-256.

    This is pseudonymisation, not anonymisation: the same id always gives the same digits, so whoever can list all
    possible ids can find out which one it was; and file names, which often hold the id, stay as they are.
    """
    return hashlib.sha256(patient.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def add_header_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Fill view, age (years), sex, modality and body_part from the ``header`` column where the source says nothing."""
    for column, field in HEADER_COLUMNS.items():
        values = pd.Series([header.get(field, "") for header in table["header"]], table.index, dtype=object)
        values = values.map(years).astype(float) if column == "age" else values
        if column not in table.columns:
            if (values.notna() & (values != "")).any():
                table[column] = values
        else:
            empty = table[column].isna() | (table[column] == "")
            table[column] = table[column].where(~empty, values)
    return table


def set_patients(table: pd.DataFrame, patient_regex: str | None, origin: str | None, hash_ids: bool) -> None:
    """Write ``patient_id`` for every image, and where it comes from into ``attrs["patients_from"]``.

    Parameters
    ----------
    table
        With ``name`` and ``header``, perhaps with ``patient_id``.
    patient_regex
        Goes before all else; searched in the file name, or with a ``/`` in it in the path below the source.
    origin
        What the source calls its ids, in words; None is found out here.
    hash_ids
        Store `pseudonym` instead of the id.
    """
    if patient_regex is not None:
        find = _patient_finder(patient_regex)
        ids, source = [find(name) for name in table["name"]], f"pattern {patient_regex}"
    else:
        ids, source = _known_patients(table)
        source = origin or source
    table["patient_id"] = [pseudonym(patient) for patient in ids] if hash_ids else ids
    table.attrs["patients_from"] = f"{source}, hashed" if hash_ids else source


def _known_patients(table: pd.DataFrame) -> tuple[list[str], str]:
    given = table["patient_id"] if "patient_id" in table.columns else [""] * len(table)
    stems = Counter(_stem(name) for name in table["name"])
    ids, sources = [], []
    for header, name, known in zip(table["header"], table["name"], given, strict=True):
        if known.lower() not in NAMELESS:
            patient, origin = known, "column patient_id"
        elif (stated := header.get("PatientID", "")).lower() not in NAMELESS:
            patient, origin = stated, "DICOM PatientID"
        elif match := next(((s, m[1]) for s, p in PATIENT_PATTERNS if (m := p.search(Path(name).as_posix()))), None):
            origin, patient = match
        else:
            stem = _stem(name)
            patient, origin = (stem if stems[stem] == 1 else name), "one patient an image"
        ids.append(patient)
        sources.append(origin)
    counts = Counter(sources).most_common()
    return ids, counts[0][0] if len(counts) == 1 else ", ".join(f"{origin} ({n} images)" for origin, n in counts)


def _stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0]  # noqa: PTH119, PTH122 (a tenth of pathlib's time, 100,000 times)


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
