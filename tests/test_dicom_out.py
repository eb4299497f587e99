"""Facts about the DICOM that `predict --dicom` writes: whom and what it refers to, what it says, what it never says."""

import dataclasses
import hashlib
import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_dicom import dicom
from test_images import CHEST, SHARED, saved
from typer.testing import CliRunner

from cxr_fastai import __version__
from cxr_fastai.cli import app
from cxr_fastai.dicom_out import BURNED_IN, _allowed, picture_of, write_dicom
from cxr_fastai.dicom_report import CODES, SCHEME, WARNING, class_code
from cxr_fastai.errors import UnreadableImage, UsageError
from cxr_fastai.images import Limits, read_film
from cxr_fastai.inputs import find_inputs
from cxr_fastai.predict import Prediction, overlay

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("highdicom")

STUDY, SERIES = "1.2.3.5", "1.2.3.6"
KNOWN = {
    "StudyInstanceUID": STUDY, "SeriesInstanceUID": SERIES, "StudyID": "S7", "AccessionNumber": "A9",
    "StudyDate": "20240229", "StudyTime": "101500", "ReferringPhysicianName": "Roe^Richard",
}  # fmt: skip
BINARY = {"classes": ["abnormal", "normal"], "task": "binary", "positive": "abnormal", "threshold": 0.4,
          "arch": "densenet121", "size": 224, "data": {"films": 60, "fingerprint": "ab12"}}  # fmt: skip
MULTI = {"classes": ["Effusion", "Hernia"], "task": "multilabel", "positive": None,
         "threshold": {"Effusion": 0.3, "Hernia": 0.5}}  # fmt: skip
PIXELS = np.linspace(0, 1, 600 * 700, dtype=np.float32).reshape(600, 700)
MAP = np.array([[1.0, -1.0], [0.0, 0.5]], np.float32)
ILL = Prediction("a/film 1.dcm", "abnormal", 0.75, {"abnormal": 0.75, "normal": 0.25}, 0.4, pixels=PIXELS)
NO_VERDICT = Prediction("film.dcm", flags=("lateral", "unlike-training"), unlike=1.7, pixels=PIXELS)


def both(folder: Path, row: Prediction = ILL, source: bytes | None = None, card: Any = BINARY) -> tuple[Any, Any]:
    """Write the two objects of a row and read them back."""
    shown = MAP if row.probabilities else None
    picture, report = write_dicom(row, shown, source, card, folder, 1)
    return pydicom.dcmread(picture), pydicom.dcmread(report)


def items(node: Any, path: tuple[str, ...] = ()) -> list[tuple[str, Any]]:
    """List the leaves of a report: what each is called, and its value; of a code its value and scheme."""
    found = []
    for item in node.get("ContentSequence", []):
        name = item.ConceptNameCodeSequence[0].CodeMeaning
        if item.ValueType == "CODE":
            code = item.ConceptCodeSequence[0]
            value: Any = (code.CodeValue, code.CodingSchemeDesignator)
        elif item.ValueType == "NUM":
            about = dict(items(item)).get("Associated finding")
            value = (float(item.MeasuredValueSequence[0].NumericValue), about and about[0])
        elif item.ValueType == "IMAGE":
            value = item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID
        else:
            value = item.get("TextValue") or item.get("UID")
        found.append((name, value))
        if item.ValueType == "CONTAINER":
            found += items(item)
    return found


def values(report: Any, name: str) -> list[Any]:
    return [value for found, value in items(report) if found == name]


# --- whose it is --------------------------------------------------------------------------------------------------


def test_both_are_filed_in_the_study_of_the_film(tmp_path: Path) -> None:
    picture, report = both(tmp_path, source=dicom(**KNOWN))
    for made in (picture, report):
        assert (made.PatientName, made.PatientID, made.PatientBirthDate) == ("Doe^Jane", "P001", "19700101")
        assert (made.PatientSex, made.PatientAge) == ("F", "054Y")
        assert {keyword: made[keyword].value for keyword in KNOWN if keyword != "SeriesInstanceUID"} == {
            keyword: value for keyword, value in KNOWN.items() if keyword != "SeriesInstanceUID"
        }
        assert "not for clinical use" in made.SeriesDescription
        assert "InstitutionName" not in made
    uids = {SERIES, picture.SeriesInstanceUID, report.SeriesInstanceUID, picture.SOPInstanceUID, report.SOPInstanceUID}
    assert len(uids) == 5
    assert all(pydicom.uid.UID(uid).is_valid for uid in uids)


def test_the_report_refers_to_the_film_and_to_the_picture(tmp_path: Path) -> None:
    picture, report = both(tmp_path, source=dicom(**KNOWN))
    assert values(report, "Source of Measurement") == ["1.2.3.4", "1.2.3.4"]  # of the film's and the finding's group
    assert values(report, "Best illustration of finding") == [picture.SOPInstanceUID]
    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    assert study.StudyInstanceUID == STUDY
    named = {
        (series.SeriesInstanceUID, item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID)
        for series in study.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    assert named == {
        (SERIES, "1.2.840.10008.5.1.4.1.1.1.1", "1.2.3.4"),
        (picture.SeriesInstanceUID, picture.SOPClassUID, picture.SOPInstanceUID),
    }
    assert picture.SourceImageSequence[0].ReferencedSOPInstanceUID == "1.2.3.4"


def test_a_picture_file_gets_a_study_of_its_own_with_no_patient(tmp_path: Path) -> None:
    picture, report = both(tmp_path, source=saved(CHEST, "PNG"))
    for made in (picture, report):
        assert (str(made.PatientName), made.PatientID, made.StudyDate) == ("", "", "")
    assert picture.StudyInstanceUID == report.StudyInstanceUID
    assert "a picture file, with no patient or study known" in picture.DerivationDescription
    assert "SourceImageSequence" not in picture
    assert values(report, "Source of Measurement") == []


def test_the_frame_that_was_read_is_named(tmp_path: Path) -> None:
    row = dataclasses.replace(ILL, flags=("multi-frame",), frame=2)  # the third one
    picture, report = both(tmp_path, row, dicom(**KNOWN))
    assert picture.SourceImageSequence[0].ReferencedFrameNumber == 3
    (group,) = [i for i in report.ContentSequence if i.ConceptNameCodeSequence[0].CodeMeaning == "Imaging Measurements"]
    (source,) = [i for i in group.ContentSequence[0].ContentSequence if i.ValueType == "IMAGE"]
    assert source.ReferencedSOPSequence[0].ReferencedFrameNumber == 3


# --- what it says -------------------------------------------------------------------------------------------------


def test_probabilities_threshold_and_verdict(tmp_path: Path) -> None:
    _, report = both(tmp_path, source=dicom(**KNOWN))
    assert values(report, "Probability by the model") == [(0.75, "263654008"), (0.25, "17621005")]
    assert values(report, "Operating threshold") == [(0.4, "263654008")]
    assert values(report, "Finding") == [("263654008", "SCT")]
    assert set(values(report, "Algorithm Name")) == {"cxr_fastai"}
    assert set(values(report, "Algorithm Version")) == {__version__}
    assert "trained on 60 films, fingerprint ab12" in values(report, "Algorithm Parameters")
    assert WARNING in values(report, "Comment")
    assert (report.CompletionFlag, report.VerificationFlag, report.PreliminaryFlag) == (
        "PARTIAL", "UNVERIFIED", "PRELIMINARY",
    )  # fmt: skip
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    assert report.CodingSchemeIdentificationSequence[0].CodingSchemeDesignator == SCHEME


def test_the_model_files_are_named_by_their_sha_256(tmp_path: Path) -> None:
    first, second = "ab" * 32, "cd" * 32
    for fingerprints, said in (([first], []), ([first, second], ["mean of 2 models, the first one's card:"])):
        _, report = write_dicom(ILL, MAP, None, BINARY, tmp_path, 1, fingerprints)
        told = values(pydicom.dcmread(report), "Algorithm Parameters")
        assert told[: len(told) // 2] == [  # of the film's group; the finding's has them once more
            *(f"model SHA-256 {sha}" for sha in fingerprints), *said, "arch: densenet121", "size: 224", "task: binary",
            "positive: abnormal", "trained on 60 films, fingerprint ab12",
        ]  # fmt: skip


def test_only_what_passed_its_threshold_is_a_finding(tmp_path: Path) -> None:
    p = {"Effusion": 0.31, "Hernia": 0.49}
    row = Prediction("a.png", "Effusion", 0.49, p, MULTI["threshold"], pixels=PIXELS)
    _, report = both(tmp_path, row, card=MULTI)
    assert values(report, "Finding") == [("60046008", "SCT")]
    assert values(report, "Verdict") == [("found", SCHEME)]
    assert values(report, "Operating threshold") == [(0.3, "60046008"), (0.5, "Hernia")]
    row = Prediction("a.png", "Effusion|Hernia", 0.9, {"Effusion": 0.9, "Hernia": 0.8}, {}, pixels=PIXELS)
    assert values(both(tmp_path, row, card=MULTI)[1], "Finding") == [("60046008", "SCT"), ("Hernia", SCHEME)]
    row = Prediction("a.png", "", 0.2, {"Effusion": 0.1, "Hernia": 0.2}, MULTI["threshold"], pixels=PIXELS)
    _, report = both(tmp_path, row, card=MULTI)
    assert values(report, "Finding") == []
    assert values(report, "Verdict") == [("no-finding", SCHEME)]


def test_without_a_verdict_the_report_says_why_and_the_picture_has_no_evidence(tmp_path: Path) -> None:
    picture, report = both(tmp_path, NO_VERDICT, dicom(**KNOWN))
    assert values(report, "Verdict") == [("no-verdict", SCHEME)]
    assert values(report, "Finding") == values(report, "Probability by the model") == []
    assert values(report, "Operating threshold") == []
    assert values(report, "Distance from the films of training, 1 at the limit") == [(1.7, None)]
    comments = values(report, "Comment")
    assert "lateral: the header says that this is not a frontal view" in comments
    assert any(text.startswith("No verdict is given: it is unlike the films") for text in comments)
    film = picture.pixel_array[-600:]
    assert (film == film[..., :1]).all()  # grey


def test_an_unreadable_film_leaves_nothing(tmp_path: Path) -> None:
    assert write_dicom(Prediction("a.dcm", error="it is cut"), None, b"", BINARY, tmp_path, 1) == []
    assert list(tmp_path.iterdir()) == []


def test_highdicom_reads_the_report_back(tmp_path: Path) -> None:
    from highdicom.sr import srread

    write_dicom(ILL, MAP, dicom(**KNOWN), BINARY, tmp_path, 1)
    report = srread(tmp_path / "000001-film_1-sr.dcm")
    film, finding = report.content.get_image_measurement_groups()
    assert (film.tracking_identifier, film.finding_type) == ("cxr_fastai film", None)
    assert [m.value for m in film.get_measurements()] == [0.75, 0.25, 0.4]
    assert finding.finding_type.meaning == "Abnormal"
    assert [e.value.value for e in finding.get_qualitative_evaluations()] == ["found"]
    assert report.content.get_image_measurement_groups(finding_type=finding.finding_type)[0].tracking_uid


@pytest.mark.parametrize("name", CODES)
def test_codes_are_those_of_the_dictionary_of_the_standard(name: str) -> None:
    from pydicom.sr import _concepts_dict

    value, scheme, meaning = CODES[name]
    said = {m[0] for codes in _concepts_dict.concepts[scheme].values() for v, m in codes.items() if v == value}
    assert meaning in said


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("EFFUSION", ("60046008", "SCT", "Pleural effusion")),
        ("Pleural_Thickening", ("04fb6cfb1e0a10ef", SCHEME, "Pleural_Thickening")),
        ("Hernia", ("Hernia", SCHEME, "Hernia")),
        ("a\\b", ("c62016d0f8ee3333", SCHEME, "a/b")),
    ],
)
def test_other_classes_have_codes_of_their_own(name: str, code: tuple[str, str, str]) -> None:
    assert class_code(name) == code


def test_any_class_name_is_a_valid_code() -> None:
    for name in ("x" * 300, "", "\n\0", "ä" * 80, "\udcff"):
        value, scheme, meaning = class_code(name)
        assert 0 < len(value) <= 16
        assert 0 < len(meaning) <= 64
        assert meaning.isprintable()
        assert scheme == SCHEME


# --- the picture --------------------------------------------------------------------------------------------------


def test_the_picture_is_the_overlay_below_a_warning(tmp_path: Path) -> None:
    picture, _ = both(tmp_path)
    pixels = picture.pixel_array
    assert pixels.shape == (624, 700, 3)
    assert np.array_equal(pixels[24:], overlay(PIXELS, MAP))
    assert pixels[:24].max() == 255
    assert pixels[:24].mean() < 60
    assert (picture.BurnedInAnnotation, picture.PhotometricInterpretation) == ("YES", "RGB")
    assert picture.ImageType[:2] == ["DERIVED", "SECONDARY"]
    assert BURNED_IN == "NOT FOR CLINICAL USE"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((4000, 3000), (2046, 1498)), ((64, 64), (536, 512)), ((3000, 30), (2046, 128)), ((2048, 2048), (2046, 1997))],
)
def test_the_picture_is_neither_huge_nor_tiny(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    assert picture_of(np.zeros(shape, np.float32), None).shape == (*expected, 3)


def test_our_own_reader_reads_the_picture_and_knows_it_for_one(tmp_path: Path) -> None:
    write_dicom(ILL, MAP, dicom(**KNOWN), BINARY, tmp_path, 1)
    film = read_film(tmp_path / "000001-film_1-sc.dcm")
    assert film.pixels.shape == (624, 700)
    assert {"colour", "modality", "burned-in-annotation"} <= set(film.flags)


def test_lossy_films_stay_marked_as_lossy(tmp_path: Path) -> None:
    assert both(tmp_path, source=dicom(LossyImageCompression="01", **KNOWN))[0].LossyImageCompression == "01"
    assert both(tmp_path, source=dicom(**KNOWN))[0].LossyImageCompression == "00"


# --- headers that nobody should have written ----------------------------------------------------------------------


def patched(**raw: bytes) -> bytes:
    """Return a film whose header holds these bytes, which pydicom would not write."""
    data = dicom(**KNOWN)
    at = 144 + int.from_bytes(data[140:144], "little")
    head, elements = data[:at], {}
    while at < len(data):  # explicit little endian
        long = data[at + 4 : at + 6] in (b"OB", b"OW", b"SQ", b"UN", b"UT")
        size = int.from_bytes(data[at + 8 : at + 12] if long else data[at + 6 : at + 8], "little")
        end = at + (12 if long else 8) + size
        elements[struct.unpack("<HH", data[at : at + 4])] = data[at:end]
        at = end
    for keyword, value in raw.items():
        tag = pydicom.tag.Tag(keyword)
        kind, even = pydicom.datadict.dictionary_VR(tag).encode(), value + b" " * (len(value) % 2)
        key = (tag.group, tag.element)
        elements[key] = struct.pack("<HH", *key) + kind + struct.pack("<H", len(even)) + even
    return head + b"".join(elements[key] for key in sorted(elements))


HOSTILE: dict[str, bytes] = {
    "no identifiers": dicom(),
    "study is no UID": patched(StudyInstanceUID=b"../../etc/passwd"),
    "instance is no UID": patched(SOPInstanceUID=b"1.02.x "),
    "endless UID": patched(SeriesInstanceUID=b"1." + b"2" * 99 + b"3"),
    "unknown charset": patched(SpecificCharacterSet=b"KLINGON ", PatientName=b"\xff\xfe\x80^x"),
    "escape to nowhere": patched(SpecificCharacterSet=b"\\ISO 2022 IR 87 ", PatientName=b"\x1b$B\x1b(J\x1b$9^\x1b"),
    "endless name": patched(PatientName=b"A" * 5000 + b"^" * 40 + b"="),
    "endless ID": patched(PatientID=b"9" * 3000, AccessionNumber=b"8" * 300, StudyID=b"7" * 300),
    "controls": patched(PatientID=b"a\x1b[31m\r\nb\\c\x00d ", PatientName=b"\x07^\n "),
    "no dates": patched(StudyDate=b"2024.1.1", StudyTime=b"99:99:99", PatientBirthDate=b"00000000", PatientAge=b"old "),
    "no sex": patched(PatientSex=b"X\\Y ", PatientOrientation=b"UP\\DOWN "),
    "markup": patched(PatientName=b"<script>alert(1)</script>", StudyDescription=b"=cmd|'/c calc'!A0 "),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_of_a_hostile_header_only_valid_values_are_kept(tmp_path: Path, name: str) -> None:
    for made in both(tmp_path, source=HOSTILE[name]):
        for element in made.iterall():
            values = element.value if element.VM > 1 else [element.value]
            if element.VR == "UI":
                assert all(pydicom.uid.UID(uid).is_valid for uid in values), element
            if element.VR in ("LO", "SH", "PN", "CS"):
                longest = {"LO": 64, "SH": 16, "PN": 64 * 3 + 2, "CS": 16}[element.VR]
                assert all(len(str(v)) <= longest and str(v or "").isprintable() for v in values), element
        assert made.SpecificCharacterSet == "ISO_IR 192"


def test_what_can_be_kept_of_a_hostile_header_is_kept(tmp_path: Path) -> None:
    assert both(tmp_path, source=HOSTILE["endless ID"])[0].PatientID == "9" * 64
    picture, report = both(tmp_path, source=HOSTILE["instance is no UID"])
    assert picture.StudyInstanceUID == STUDY
    assert "without the identifiers to refer to it" in picture.DerivationDescription
    assert values(report, "Source of Measurement") == []
    assert both(tmp_path, source=HOSTILE["study is no UID"])[0].PatientID == "P001"


@pytest.mark.parametrize(
    ("charset", "raw", "name"),
    [
        (b"ISO_IR 100", b"M\xfcller^J\xf6rg", "Müller^Jörg"),
        (b"ISO_IR 192", "Ωμέγα^Α".encode(), "Ωμέγα^Α"),
        (b"\\ISO 2022 IR 87 ", b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B", "Yamada^Tarou=山田^太郎"),
    ],
)
def test_names_keep_their_letters(tmp_path: Path, charset: bytes, raw: bytes, name: str) -> None:
    for made in both(tmp_path, source=patched(SpecificCharacterSet=charset, PatientName=raw)):
        assert str(made.PatientName) == name


@pytest.mark.parametrize(
    ("keyword", "text", "kept"),
    [
        ("PatientID", " a\\b\n ", "ab"),
        ("PatientName", "A^B^C^D^E^F=x", "A^B^C^D^E=x"),
        ("PatientName", "^^=", None),
        ("StudyTime", "101500.123456", "101500.123456"),
        ("StudyTime", "2500", None),
        ("StudyDate", "20241301", None),
        ("PatientSex", "F", "F"),
        ("PatientSex", "female", None),
    ],
)
def test_values_as_the_standard_allows_them(keyword: str, text: str, kept: str | None) -> None:
    assert _allowed(keyword, text) == kept


@pytest.mark.parametrize("name", ["explicit", "implicit", "deflated", "big endian", "jpeg 2000"])
def test_any_transfer_syntax_and_missing_preamble(tmp_path: Path, name: str) -> None:
    assert both(tmp_path, source=dicom(syntax=name, **KNOWN))[1].StudyInstanceUID == STUDY
    if name == "explicit":
        assert both(tmp_path, source=dicom(**KNOWN)[132:])[1].StudyInstanceUID == STUDY


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write .*file/000001-film_1-sc\.dcm"):
        write_dicom(ILL, MAP, None, BINARY, tmp_path / "file", 1)


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = "import sys, cxr_fastai.dicom_out, cxr_fastai.dicom_report\nprint({'pydicom', 'highdicom'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- from the command line ----------------------------------------------------------------------------------------


def test_the_bytes_of_a_film_can_be_had_again(tmp_path: Path) -> None:
    data = saved(CHEST, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/b.png", data)
    for film in find_inputs([str(tmp_path / "a.png"), str(tmp_path / "a.zip")]):
        assert film.read_bytes(Limits()) == data


def test_predict_writes_a_pair_for_each_film_that_can_be_read(tmp_path: Path, finished: Path) -> None:
    films = tmp_path / "films"
    films.mkdir()
    (films / "a.dcm").write_bytes(dicom(**KNOWN))
    (films / "b.png").write_bytes(b"no film")
    with zipfile.ZipFile(films.parent / "c.zip", "w") as archive:
        archive.writestr("c.dcm", dicom(SOPClassUID="1.2.840.10008.5.1.4.1.1.1", **KNOWN))
    arguments = ["predict", str(films), str(tmp_path / "c.zip"), "--model", str(finished), "--json", "--no-abstain"]
    done = CliRunner().invoke(app, [*arguments, "--dicom", str(tmp_path / "out")])
    assert done.exit_code == 1, done.output  # b.png
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    names = ["000001-a-sc.dcm", "000001-a-sr.dcm", "000003-c-sc.dcm", "000003-c-sr.dcm"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    for row, name in ((rows[0], names[1]), (rows[2], names[3])):
        report = pydicom.dcmread(tmp_path / "out" / name)
        said = {code: p for p, code in values(report, "Probability by the model")}
        assert said["263654008"] == pytest.approx(row["probabilities"]["abnormal"], rel=1e-7)
        assert report.StudyInstanceUID == STUDY
        sha = hashlib.sha256((finished / "model.onnx").read_bytes()).hexdigest()
        assert f"model SHA-256 {sha}" in values(report, "Algorithm Parameters")


@pytest.mark.skipif(not (SHARED / "data/real-cxr/dicom").is_dir(), reason="the shared films are not here")
def test_real_films(tmp_path: Path) -> None:
    paths = sorted((SHARED / "data/real-cxr/dicom").glob("*.dcm"))
    assert paths
    for path in paths:
        film, source = read_film(path), pydicom.dcmread(path, stop_before_pixels=True, force=True)
        row = dataclasses.replace(ILL, path=str(path), flags=film.flags, pixels=film.pixels)
        picture, report = both(tmp_path, row, path.read_bytes())
        assert picture.StudyInstanceUID == report.StudyInstanceUID == source.StudyInstanceUID
        assert report.PatientID == source.get("PatientID", "")
        assert set(values(report, "Source of Measurement")) == {source.SOPInstanceUID}


@pytest.mark.skipif(not (SHARED / "badinputs/files").is_dir(), reason="the shared hostile files are not here")
def test_hostile_files_that_can_be_read_can_be_written(tmp_path: Path) -> None:
    written = 0
    for path in sorted((SHARED / "badinputs/files").rglob("*.dcm")):
        try:
            film = read_film(path)
        except UnreadableImage:
            continue
        row = dataclasses.replace(ILL, path=str(path), flags=film.flags, pixels=film.pixels)
        written += len(write_dicom(row, MAP, path.read_bytes(), BINARY, tmp_path / "out", written + 1))
    assert written > 20
