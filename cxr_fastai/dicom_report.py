"""The Structured Report of one film: a TID 1500 measurement report with probabilities, threshold and verdict.

    Imaging Measurement Report
      observer: the device cxr_fastai; procedure: radiographic imaging
      Imaging Measurements, each group with the algorithm, its version, what the model says of itself, and the film:
        Measurement Group "film"
          Probability by the model = 0.91   (of: Effusion)       one a class
          Operating threshold = 0.35        (of: Effusion)       one for each that there is
          Verdict: none, or no finding
        Measurement Group "finding Effusion"                     one a finding at or above its threshold
          Finding: Effusion
      the picture with the evidence; the warning; one text for each flag

Of a class that has a code in the dictionary of the standard that code is used; the others, and what only a classifier
says, are coded under the private scheme 99CXRFASTAI. A class is an *associated finding* of its probability: only what
passed its threshold stands under Finding, so that nobody takes a probability of 0.02 for a finding.
"""

import hashlib
import re
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cxr_fastai import __version__
from cxr_fastai.images import FLAGS, printable
from cxr_fastai.outliers import FLAG as OUTLIER
from cxr_fastai.predict import Prediction

if TYPE_CHECKING:
    from cxr_fastai.dicom_out import Origin

SCHEME = "99CXRFASTAI"
WARNING = "Research software, not a medical device; not for clinical use"
# The names of NIH ChestX-ray14, and ours, that the dictionary of the standard has a code for. Where NIH's word is
# wider than what it stands for on a chest film (effusion, edema), the code is of what it stands for.
CODES = {
    "normal": ("17621005", "SCT", "Normal"),
    "abnormal": ("263654008", "SCT", "Abnormal"),
    "cardiomegaly": ("287272002", "SCT", "Cardiomegaly"),
    "effusion": ("60046008", "SCT", "Pleural effusion"),
    "infiltration": ("112121", "DCM", "Infiltrate"),
    "mass": ("4147007", "SCT", "Mass"),
    "nodule": ("27925004", "SCT", "Nodule"),
    "pneumothorax": ("36118008", "SCT", "Pneumothorax"),
    "edema": ("19242006", "SCT", "Pulmonary edema"),
    "fibrosis": ("112674009", "SCT", "Fibrosis"),
}
PROBABILITY = ("probability", SCHEME, "Probability by the model")
THRESHOLD = ("threshold", SCHEME, "Operating threshold")
UNLIKE = ("unlike", SCHEME, "Distance from the films of training, 1 at the limit")
VERDICT = ("verdict", SCHEME, "Verdict")
FOUND = ("found", SCHEME, "Found by the model, verified by nobody")
NO_FINDING = ("no-finding", SCHEME, "No finding at or above its threshold")
NO_VERDICT = ("no-verdict", SCHEME, "No verdict: unlike the films of training")
OF_CLASS = ("246090004", "SCT", "Associated finding")
SAID_OF_MODEL = ("arch", "size", "task", "positive", "temperature")


def report(
    row: Prediction, origin: "Origin", card: dict[str, Any], fingerprints: Sequence[str], picture: Any, number: int
) -> Any:
    """Return the report of a row as an Enhanced SR, filed as `origin` says, referring to the film and the picture."""
    import highdicom
    from highdicom import sr
    from highdicom.coding_schemes import CodingSchemeIdentificationItem
    from pydicom.sr.codedict import codes

    from cxr_fastai.dicom_out import SERIES, UTF8, describe

    device = sr.DeviceObserverIdentifyingAttributes(
        uid=_device_uid(), name="cxr_fastai", manufacturer_name="cxr_fastai", model_name="cxr_fastai"
    )
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(
            observer_device_context=sr.ObserverContext(codes.DCM.Device, device)  # type: ignore[arg-type]
        ),
        procedure_reported=codes.DCM.RadiographicImaging,  # type: ignore[arg-type]
        imaging_measurements=list(groups(row, origin, card, fingerprints)),
    )
    content[0].ContentSequence.extend(_remarks(row, picture))
    series, description = SERIES["sr"]
    made = sr.EnhancedSR(
        evidence=[picture, *_film(origin, picture)], content=content[0],
        series_instance_uid=str(highdicom.UID()), series_number=series, sop_instance_uid=str(highdicom.UID()),
        instance_number=number, series_description=description, manufacturer="cxr_fastai",
        manufacturer_model_name="cxr_fastai", software_versions=__version__, specific_character_set=UTF8,
        is_complete=False, is_final=False, is_verified=False,
        coding_schemes=[CodingSchemeIdentificationItem(
            designator=SCHEME, name="cxr_fastai private codes", version=__version__,
            responsible_organization="cxr_fastai",
        )],
    )  # fmt: skip
    describe(made, origin)
    made.CompletionFlagDescription = "Not read by a physician; research only"
    return made


def groups(
    row: Prediction, origin: "Origin", card: dict[str, Any], fingerprints: Sequence[str] = ()
) -> Iterator[Any]:
    """Yield the measurement groups (TID 1501) of a row: the film with all numbers, then each finding."""
    said = row.label or ""
    findings = [name for name in (said.split("|") if card["task"] == "multilabel" else [said]) if name]
    nothing = NO_VERDICT if row.label is None else NO_FINDING
    verdict = None if findings else nothing
    model = list(_parameters(card, fingerprints))
    yield _group("cxr_fastai film", None, verdict, list(_numbers(row, card)), origin, model)
    for name in findings:
        yield _group(f"cxr_fastai finding {_clean(name)}"[:64], class_code(name), FOUND, [], origin, model)


def _group(
    tracked: str, finding: Any, verdict: Any, numbers: list[Any], origin: "Origin", model: list[str]
) -> Any:
    from highdicom import sr

    sources = None
    if origin.image is not None:
        frames = [origin.frame] if origin.frame else None
        sources = [
            sr.SourceImageForMeasurementGroup(origin.image["SOPClassUID"], origin.image["SOPInstanceUID"], frames)
        ]
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(identifier=tracked),
        finding_type=finding and _concept(finding),
        algorithm_id=sr.AlgorithmIdentification(
            name="cxr_fastai", version=__version__, manufacturer="cxr_fastai", parameters=model
        ),
        measurements=numbers or None,
        qualitative_evaluations=[sr.QualitativeEvaluation(_concept(VERDICT), _concept(verdict))] if verdict else None,
        source_images=sources,
    )


def _parameters(card: dict[str, Any], fingerprints: Sequence[str]) -> Iterator[str]:
    for sha256 in fingerprints:
        yield f"model SHA-256 {sha256}"
    if len(fingerprints) > 1:
        yield f"mean of {len(fingerprints)} models, the first one's card:"
    for key in SAID_OF_MODEL:
        if card.get(key) is not None:
            yield _clean(f"{key}: {card[key]}")
    data = card.get("data") or {}
    if "fingerprint" in data:
        yield _clean(f"trained on {data.get('films')} films, fingerprint {data['fingerprint']}")


def _numbers(row: Prediction, card: dict[str, Any]) -> Iterator[Any]:
    for name, p in row.probabilities.items():
        yield _number(PROBABILITY, p, name)
    thresholds = row.threshold if isinstance(row.threshold, dict) else {card["positive"]: row.threshold}
    for name, threshold in thresholds.items():
        if row.label is not None and threshold is not None:
            yield _number(THRESHOLD, threshold, name)
    if row.unlike is not None:
        yield _number(UNLIKE, row.unlike)


def _number(concept: tuple[str, str, str], value: float, name: str | None = None) -> Any:
    """Return one number without unit, and what class it is about."""
    from highdicom import sr
    from pydicom.sr.codedict import codes

    measurement = sr.Measurement(_concept(concept), float(f"{value:.8g}"), codes.UCUM.NoUnits)  # type: ignore[arg-type]
    if name is not None:
        modifier = sr.RelationshipTypeValues.HAS_CONCEPT_MOD
        about = sr.CodeContentItem(_concept(OF_CLASS), _concept(class_code(name)), modifier)
        if "ContentSequence" not in measurement[0]:
            measurement[0].ContentSequence = sr.ContentSequence()
        measurement[0].ContentSequence.append(about)
    return measurement


def _remarks(row: Prediction, picture: Any) -> Iterator[Any]:
    """Yield the picture, the warning and the flags."""
    from highdicom import sr
    from pydicom.sr.codedict import codes

    contains = sr.RelationshipTypeValues.CONTAINS
    best: Any = codes.DCM.BestIllustrationOfFinding
    yield sr.ImageContentItem(best, picture.SOPClassUID, picture.SOPInstanceUID, relationship_type=contains)
    texts = [WARNING, *(f"{flag}: {FLAGS.get(flag, 'doubtful')}" for flag in row.flags)]
    if row.label is None:
        texts.append("No verdict is given" + (": " + FLAGS[OUTLIER] if OUTLIER in row.flags else ""))
    comment: Any = codes.DCM.Comment
    for text in texts:
        yield sr.TextContentItem(comment, _clean(text), contains)


def _film(origin: "Origin", picture: Any) -> Iterator[Any]:
    """Yield the film as evidence: what a report needs to refer to it."""
    from pydicom.dataset import Dataset

    if origin.image is None:
        return
    film = Dataset()
    for keyword, value in origin.image.items():
        setattr(film, keyword, value)
    yield film


def class_code(name: str) -> tuple[str, str, str]:
    """Return the code of a class: of the standard where it has one, else a private one made from the name."""
    found = CODES.get(name.lower())
    if found is None:
        short = re.fullmatch(r"[A-Za-z0-9_-]{1,16}", name)
        value = name if short else hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:16]
        found = value, SCHEME, _clean(name)[:64].strip() or "unnamed class"
    return found


def _concept(code: Any) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept(*code[:3])


def _clean(text: str) -> str:
    r"""Return text that a DICOM value can hold: printable, in UTF-8, and without the \ that divides values."""
    return printable(text).replace("\\", "/")[:1024] or "-"


def _device_uid() -> str:
    """Return the UID of this version of the software, the same one everywhere (DICOM PS3.5 B.2)."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'cxr_fastai {__version__}').int}"
