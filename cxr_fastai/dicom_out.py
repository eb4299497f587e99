"""One film's answer as DICOM: a Secondary Capture to look at and a Structured Report (TID 1500) to read by machine.

    Prediction + evidence + the bytes of the film ──► 000001-stem-sc.dcm, 000001-stem-sr.dcm

Both are filed in the study of the film, in series of their own; a film that is no DICOM object gets a study of its own
with no patient. Whatever the film's header holds is checked against the standard first: of a value that it does not
allow, the rest is kept where it can be cut, and nothing where it cannot. Text is written as UTF-8. Both say that they
are research, not for clinical use; the picture has it burned in.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cxr_fastai import __version__
from cxr_fastai.errors import CxrError
from cxr_fastai.images.dicom import looks_like_dicom
from cxr_fastai.images.guard import quiet
from cxr_fastai.inputs import safe_stem
from cxr_fastai.predict import Prediction, overlay
from cxr_fastai.runs import atomic_path

BURNED_IN = "NOT FOR CLINICAL USE"
SERIES = {"sc": (9101, "cxr_fastai evidence, RESEARCH, not for clinical use"),
          "sr": (9102, "cxr_fastai report, RESEARCH, not for clinical use")}  # fmt: skip
SMALLEST, LARGEST = 512, 2048  # longest side of the picture
UTF8 = "ISO_IR 192"
# What is taken from the film's header: the longest value that the standard allows, or the form that it prescribes.
TEXTS = {"PatientID": 64, "AccessionNumber": 16, "StudyID": 16, "StudyDescription": 64}
NAMES = ("PatientName", "ReferringPhysicianName")
DATE = r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])"
FORMS = {
    "PatientBirthDate": DATE,
    "StudyDate": DATE,
    "StudyTime": r"(?:[01]\d|2[0-3])(?:[0-5]\d(?:[0-5]\d(?:\.\d{1,6})?)?)?",
    "PatientSex": "[MFO]",
    "PatientAge": r"\d{3}[DWMY]",
}
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")


@dataclass(frozen=True)
class Origin:
    """Where a film comes from, as its header says in values that the standard allows.

    patient: keywords of the patient and study, each with its value or None. study: the UID to file under.
    image: the film itself (study, series, class and instance UID), None where its header does not identify it.
    frame: the number of the frame read, from 1 on, of a film with several. orientation: row and column, or nothing.
    lossy: whether the film was compressed with losses. known: all this in words.
    """

    patient: dict[str, str | None]
    study: str
    image: dict[str, str] | None = None
    frame: int | None = None
    orientation: tuple[str, ...] = ()
    lossy: bool = False
    known: str = ""

    @property
    def common(self) -> dict[str, Any]:
        """What highdicom's constructors call the patient and the study."""
        names = ("patient_id", "patient_name", "patient_birth_date", "patient_sex", "accession_number", "study_id",
                 "study_date", "study_time", "referring_physician_name")  # fmt: skip
        keywords = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
                    "StudyDate", "StudyTime", "ReferringPhysicianName")  # fmt: skip
        return {name: self.patient[keyword] for name, keyword in zip(names, keywords, strict=True)}


def write_dicom(
    row: Prediction,
    shown: np.ndarray | None,
    source: bytes | None,
    card: dict[str, Any],
    folder: Path,
    number: int,
    fingerprints: Sequence[str] = (),
) -> list[Path]:
    """Write the Secondary Capture and the Structured Report of one film.

    Parameters
    ----------
    row
        With `pixels`, (H, W) float32 in [0, 1]; see `keep_pixels` of `Predictor.predict`. A row without a verdict
        gets a picture without evidence, and a report that says why.
    shown
        (h, w) evidence for the class; see `Predictor.evidence_shown`. None where there is none.
    source
        The bytes of the film, if they are at hand; only a DICOM object has a patient and a study to be filed under.
    card
        What the model says of itself; see `Predictor.card`.
    folder
        Made if missing.
    number
        Of the film in its run, from 1 on; the names of the files begin with it.
    fingerprints
        SHA-256 of each model file; see `Predictor.fingerprints`.

    Returns
    -------
    list of Path
        The picture and the report; empty for a row with an error.

    Raises
    ------
    CxrError
        Where the objects cannot be made or written: one line.
    """
    if row.error is not None:
        return []
    assert row.pixels is not None
    from cxr_fastai.dicom_report import report

    paths = [folder / f"{number:06d}-{safe_stem(row.path)}-{kind}.dcm" for kind in SERIES]
    with quiet:
        origin = origin_of(source, row)
        try:
            picture = capture(row, shown, origin, number)
            objects = [picture, report(row, origin, card, fingerprints, picture, number)]
        except Exception as error:  # many kinds; their text may quote the header, and so the patient
            kind = type(error).__name__
            raise CxrError(f"{paths[0]}: no DICOM can be made of this film ({kind}); leave it out") from error
        for path, made in zip(paths, objects, strict=True):
            with atomic_path(path) as temporary:
                made.save_as(temporary, enforce_file_format=True)
    return paths


# --- where the film comes from ------------------------------------------------------------------------------------


def origin_of(source: bytes | None, row: Prediction) -> Origin:
    """Return what the header of a film says of its patient and study, or a study of its own for a film without one."""
    import highdicom
    import pydicom

    nobody = dict.fromkeys((*TEXTS, *NAMES, *FORMS))
    if source is None or not looks_like_dicom(source):
        return Origin(nobody, str(highdicom.UID()), known="a picture file, with no patient or study known")
    wanted = (*nobody, *UIDS, "PatientOrientation", "LossyImageCompression", "SpecificCharacterSet")
    try:
        header = pydicom.dcmread(io.BytesIO(source), stop_before_pixels=True, force=True, specific_tags=list(wanted))
    except Exception:  # noqa: BLE001 (the reader took it; a header that pydicom cannot parse here identifies nobody)
        return Origin(nobody, str(highdicom.UID()), known="a DICOM object whose header cannot be read")
    said = {keyword: _text(header, keyword) for keyword in (*nobody, *UIDS)}
    patient = {keyword: _allowed(keyword, said[keyword]) for keyword in nobody}
    uids = {keyword: said[keyword] for keyword in UIDS if _is_uid(said[keyword])}
    whole = len(uids) == len(UIDS)
    orientation = re.fullmatch(r"([APRLHF]{1,3})\\([APRLHF]{1,3})", _text(header, "PatientOrientation", r"\\"))
    return Origin(
        patient,
        uids.get("StudyInstanceUID") or str(highdicom.UID()),
        uids if whole else None,
        (row.frame or 0) + 1 if "multi-frame" in row.flags else None,
        orientation.groups() if orientation else (),
        _text(header, "LossyImageCompression") == "01",
        "the DICOM object referred to" if whole else "a DICOM object without the identifiers to refer to it",
    )


def _text(header: Any, keyword: str, joined: str = "") -> str:
    """Return a header value as text, "" where there is none or it cannot be decoded."""
    try:
        value = header.get(keyword)
        if joined and value is not None and not isinstance(value, str):
            return "\\".join(map(str, value))
        return "" if value is None else str(value).strip(" \0")
    except Exception:  # noqa: BLE001 (hostile values fail in many ways as they are decoded)
        return ""


def _allowed(keyword: str, text: str) -> str | None:
    """Return a header value as the standard allows it, None where nothing is left of it."""
    if keyword in FORMS:
        return text if re.fullmatch(FORMS[keyword], text) else None
    printable = "".join(c for c in text if c.isprintable() and c != "\\").strip()
    if keyword in TEXTS:
        return printable[: TEXTS[keyword]].strip() or None
    groups = ["^".join(group.split("^")[:5])[:64] for group in printable.split("=")[:3]]
    return "=".join(groups).rstrip("=^ ") or None


def _is_uid(text: str) -> bool:
    return len(text) <= 64 and re.fullmatch(r"[0-2](\.(0|[1-9]\d*))+", text) is not None


def describe(made: Any, origin: Origin) -> None:
    """Set what highdicom's constructors do not take of the patient and the study, where it is known."""
    for keyword in ("StudyDescription", "PatientAge"):
        if origin.patient[keyword] is not None:
            setattr(made, keyword, origin.patient[keyword])


# --- the picture --------------------------------------------------------------------------------------------------


def capture(row: Prediction, shown: np.ndarray | None, origin: Origin, number: int) -> Any:
    """Return a Secondary Capture of the film, with its evidence where there is some, below a line of warning."""
    import highdicom
    from pydicom.dataset import Dataset
    from pydicom.sr.codedict import codes

    assert row.pixels is not None
    series, description = SERIES["sc"]
    image = highdicom.sc.SCImage(
        pixel_array=picture_of(row.pixels, shown), photometric_interpretation="RGB", bits_allocated=8,
        coordinate_system="PATIENT", patient_orientation=origin.orientation[:2] or ("L", "F"),  # type: ignore[arg-type]
        study_instance_uid=origin.study, series_instance_uid=str(highdicom.UID()), series_number=series,
        sop_instance_uid=str(highdicom.UID()), instance_number=number, series_description=description,
        manufacturer="cxr_fastai", manufacturer_model_name="cxr_fastai", software_versions=__version__,
        specific_character_set=UTF8, transfer_syntax_uid="1.2.840.10008.1.2.1", **origin.common,
    )  # fmt: skip
    describe(image, origin)
    image.PatientOrientation = list(origin.orientation)  # empty where it is not known; the constructor wants one
    image.Laterality = ""
    image.ConversionType = "WSD"
    image.BurnedInAnnotation = "YES"
    image.LossyImageCompression = "01" if origin.lossy else "00"
    evidence = "the evidence map of a classifier laid over it" if shown is not None else "no evidence map"
    image.DerivationDescription = (
        f"Research software, not for clinical use. A display copy, 8 bits, with {evidence}; made from {origin.known}."
    )
    if origin.image:
        reference = Dataset()
        reference.ReferencedSOPClassUID = origin.image["SOPClassUID"]
        reference.ReferencedSOPInstanceUID = origin.image["SOPInstanceUID"]
        if origin.frame:
            reference.ReferencedFrameNumber = origin.frame
        purpose = codes.DCM.SourceImageForImageProcessingOperation
        reference.PurposeOfReferenceCodeSequence = [highdicom.sr.CodedConcept.from_code(purpose)]
        image.SourceImageSequence = [reference]
    return image


def picture_of(pixels: np.ndarray, shown: np.ndarray | None) -> np.ndarray:
    """Return the film with its evidence below a line of warning, (H, W, 3) uint8, at most 2048 pixels a side."""
    from PIL import Image

    height, width = pixels.shape
    longest = max(height, width)
    scale = min((LARGEST - LARGEST // 40) / longest, max(1.0, SMALLEST / longest))  # a 40th is for the warning
    if scale != 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        film = Image.fromarray(np.ascontiguousarray(pixels, np.float32))
        pixels = np.clip(np.asarray(film.resize(size, Image.Resampling.BILINEAR)), 0, 1)
    laid = overlay(pixels, np.zeros((1, 1), np.float32) if shown is None else shown)
    warning = _warning(max(laid.shape[1], SMALLEST // 4), max(24, max(laid.shape) // 40))
    canvas = np.zeros((len(warning) + len(laid), warning.shape[1], 3), np.uint8)
    canvas[: len(warning)] = warning[..., None]
    canvas[len(warning) :, : laid.shape[1]] = laid
    return canvas


def _warning(width: int, height: int) -> np.ndarray:
    """Return a black band (height, width) uint8 with the warning in white, as large as it fits."""
    from PIL import Image, ImageDraw, ImageFont

    band = Image.new("L", (width, height))
    draw = ImageDraw.Draw(band)
    for size in range(height * 3 // 4, 5, -1):
        font = ImageFont.load_default(size)
        if draw.textlength(BURNED_IN, font) <= width - 4:
            break
    draw.text((width / 2, height / 2), BURNED_IN, 255, font, "mm")
    return np.asarray(band)
