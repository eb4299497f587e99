"""Lists of films: a column a finding, and rows that name DICOM films by what their headers say."""

import math
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

from cxr_fastai.errors import DataError
from cxr_fastai.images import read_film
from cxr_fastai.patients import pseudonym, read_header, years
from cxr_fastai.split import split_table
from cxr_fastai.table import load_table, targets_of


def dicom(path: Path, uid: str, **header: str) -> Path:
    """Write a film of 64 × 64 pixels as a DX object."""
    pixels = np.random.default_rng(0).normal(2000, 300, (64, 64)).astype(np.uint16)
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = DigitalXRayImageStorageForPresentation, uid
    dataset.PatientName, dataset.InstitutionName, dataset.StudyDate = "Doe^Jane", "St. Elsewhere", "20200101"
    dataset.Modality, dataset.BodyPartExamined, dataset.PhotometricInterpretation = "DX", "CHEST", "MONOCHROME2"
    for name, value in header.items():
        setattr(dataset, name, value)
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel, dataset.PixelRepresentation = 64, 64, 1, 0
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelData = 15, pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a folder with a tree of five films of four patients, one of them without a suffix."""
    films = [
        ("a/1.dcm", "1.2.1", "K1", "034Y", "F", "PA"),
        ("a/2.dcm", "1.2.2", "K1", "034Y", "F", "AP"),
        ("b/3.dcm", "1.2.3", "K2", "018M", "M", "PA"),
        ("b/1.2.840.4", "1.2.4", "K3", "", "", ""),
        ("b/5.dcm", "1.2.5", "K4", "080Y", "M", "PA"),
    ]
    for name, uid, patient, age, sex, view in films:
        dicom(tmp_path / "tree" / name, uid, PatientID=patient, PatientAge=age, PatientSex=sex, ViewPosition=view)
    return tmp_path


def listing(folder: Path, *lines: str, name: str = "labels.csv") -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path


def names(table):
    return [Path(path).name for path in table["path"]]


# By header and by name


@pytest.mark.parametrize("key", ["SOPInstanceUID", "sop_instance_uid"])
def test_rows_by_uid_in_a_folder(tree, key):
    listing(tree, f"{key},label", "1.2.1,sick", "1.2.2,sick", "1.2.3,well", "1.2.4,well", "1.2.5,well")
    table = load_table(tree)
    assert names(table) == ["1.dcm", "2.dcm", "1.2.840.4", "3.dcm", "5.dcm"]
    assert list(table.columns) == [
        "path", "label", "patient_id", "split", "view", "age", "sex", "modality", "body_part",
    ]  # fmt: skip
    assert table["label"].tolist() == ["sick", "sick", "well", "well", "well"]
    assert table["patient_id"].tolist() == ["K1", "K1", "K3", "K2", "K4"]
    assert table["view"].tolist() == ["PA", "AP", "", "PA", "PA"]
    assert table["age"].tolist()[:2] == [34, 34]
    assert math.isnan(table["age"][2])
    assert table["age"][3] == 1.5
    assert table["sex"].tolist() == ["F", "F", "", "M", "M"]
    assert set(table["modality"]) == {"DX"}
    assert table.attrs["patients_from"] == "DICOM PatientID"
    assert (table.attrs["source_kind"], table.attrs["notes"]) == ("csv", [])
    assert read_film(table["path"][0]).pixels.shape == (64, 64)
    said = " ".join(map(str, table.to_numpy().ravel()))
    assert not [secret for secret in ("Doe", "Elsewhere", "20200101") if secret in said]


def test_rows_by_patient_mean_all_their_films(tree):
    path = listing(tree, "PatientID,label,age", "K1,sick,40", "K2,well,", "K4,well,81", name="mine.csv")
    table = load_table(path)
    assert names(table) == ["1.dcm", "2.dcm", "3.dcm", "5.dcm"]
    assert table["label"].tolist() == ["sick", "sick", "well", "well"]
    assert table["age"].tolist() == [40, 40, 1.5, 81]  # the list goes before the header
    assert table.attrs["patients_from"] == "column patient_id"
    assert table.attrs["notes"] == [f"left out: 1 film below {tree} without a row in mine.csv"]


@pytest.mark.parametrize("name", ["{0}", "{0}.dcm", "tree/{1}/{0}.dcm"])
def test_rows_by_file_name(tree, name):
    rows = [f"{name.format(stem, folder)},{label}" for stem, folder, label in ((1, "a", "sick"), (3, "b", "well"))]
    table = load_table(listing(tree, "File Name,label", *rows))
    assert names(table) == ["1.dcm", "3.dcm"]
    assert table["patient_id"].tolist() == ["K1", "K2"]


def test_a_tree_can_be_split(tree):
    listing(tree, "PatientID,label", "K1,a", "K2,b", "K3,a", "K4,b")
    table = load_table(tree)
    table = split_table(table, test=0.5, valid=0)
    assert set(table["split"]) == {"train", "test"}


def test_rows_that_match_nothing_are_named(tree):
    path = listing(tree, "SOPInstanceUID,label", "1.2.1,a", "9.1,b", "9.2,b", "9.3,b", "9.4,b")
    with pytest.raises(DataError, match=r"4 rows of 5 match no film below .* by SOPInstanceUID: 9.1, 9.2, 9.3 \.\.\.;"):
        load_table(path)
    path = listing(tree, "PatientID,label", "K1,a", "Jane,b")
    with pytest.raises(DataError, match=r"1 row of 2 match no film below .* by PatientID: Jane; correct them, or give"):
        load_table(path)
    with pytest.raises(DataError, match=r"by PatientID: line 3; correct them") as caught:
        load_table(path, hash_ids=True)
    assert "Jane" not in str(caught.value)


def test_a_name_of_two_films_is_refused(tree):
    dicom(tree / "tree" / "c" / "1.dcm", "1.2.9", PatientID="K9")
    path = listing(tree, "file,label", "1.dcm,a", "3.dcm,b")
    with pytest.raises(DataError, match=r"1.dcm is the name of 2 films below .*; give a column path"):
        load_table(path)


def test_a_patient_with_two_labels_is_refused(tree):
    path = listing(tree, "PatientID,label", "K1,a", "K1,b", "K2,b")
    with pytest.raises(DataError, match=r"gives 2 images two values of label: .*1.dcm is a and b; keep one row"):
        load_table(path)


def test_class_folders_of_dicom_have_their_headers_fields(tree):
    table = load_table(tree / "tree")
    assert table["label"].tolist() == ["a", "a", "b", "b", "b"]
    assert table["view"].tolist() == ["PA", "AP", "", "PA", "PA"]
    assert table.attrs["patients_from"] == "DICOM PatientID"


# Patient ids


def test_hashed_ids(tree):
    path = listing(tree, "path,label,patient_id,name_of_patient", "tree/a/1.dcm,a,Jane,Doe", "tree/b/3.dcm,b,,Roe")
    table = load_table(path, hash_ids=True)
    assert table["patient_id"].tolist() == [pseudonym("Jane"), pseudonym("K2")]
    assert "name_of_patient" not in table.columns
    assert table.attrs["patients_from"] == "column patient_id (1 images), DICOM PatientID (1 images), hashed"
    path = listing(tree, "path,label,patient_id", "tree/a/1.dcm,a,Jane", "tree/a/1.dcm,a,June")
    with pytest.raises(DataError, match=f"two values of patient_id: .* is {pseudonym('Jane')} and {pseudonym('June')}"):
        load_table(path, hash_ids=True)
    assert pseudonym("Jane") == "4f23798d92708359"


@pytest.mark.parametrize(
    ("age", "expected"), [("034Y", 34), ("018M", 1.5), ("010W", 0.19), ("005D", 0.01), ("58", 58), (61.5, 61.5)]
)
def test_ages(age, expected):
    assert years(age) == expected


@pytest.mark.parametrize("age", ["", "Y", "-3", "old", None])
def test_ages_that_are_none(age):
    assert math.isnan(years(age))


def test_only_the_named_header_fields_are_read(tree):
    assert set(read_header(tree / "tree/a/1.dcm")) == {
        "PatientID", "ViewPosition", "PatientAge", "PatientSex", "Modality", "BodyPartExamined", "SOPInstanceUID",
    }  # fmt: skip
    (tree / "x.dcm").write_bytes(b"not DICOM")
    assert read_header(tree / "x.dcm") == read_header(tree / "none.dcm") == read_header(tree / "x.png") == {}


# A column a finding


def pngs(folder: Path, n: int) -> Path:
    for i in range(1, n + 1):
        Image.new("L", (1, 1)).save(folder / f"{i}.png")
    return folder


def test_a_column_a_finding(tmp_path):
    listing(
        pngs(tmp_path, 4),
        "path,patient_id,Edema,Mass,No Finding,age,bytes",
        "1.png,p,1,0,0,1,900",
        "2.png,q,0,,0,0,901",
        "3.png,r,,1,0,1,902",
        "4.png,s,-1,1.0,0,1,903",
    )
    table = load_table(tmp_path)
    assert (table.attrs["task"], table.attrs["classes"]) == ("multilabel", ["Edema", "Mass"])
    assert table.attrs["targets"] is True
    assert table["label"].tolist() == ["Edema", "", "Mass", "Mass"]
    np.testing.assert_array_equal(targets_of(table, ["Edema", "Mass"]), [[1, 0], [0, np.nan], [np.nan, 1], [np.nan, 1]])
    assert table["y_Edema"].tolist()[3] == -1
    assert table["age"].tolist() == [1, 0, 1, 1]
    assert table.attrs["notes"] == [
        "not read as findings, by name or cells other than 1, 0, -1 and blank: No Finding, bytes"
    ]
    with pytest.raises(DataError, match=r"task multiclass cannot have several labels an image .* columns of findings"):
        load_table(tmp_path, task="multiclass")


def test_columns_of_findings_by_uid(tree):
    table = load_table(listing(tree, "SOPInstanceUID,Edema,Mass", "1.2.1,1,0", "1.2.3,0,1", "1.2.5,,"))
    assert table["label"].tolist() == ["Edema", "Mass", ""]


def test_lists_that_say_nothing(tmp_path):
    path = listing(pngs(tmp_path, 2), "path,Edema", "1.png,2", "2.png,x")
    with pytest.raises(DataError, match=r"has no column label; it has: path, Edema; rename .* of 1, 0 and blank"):
        load_table(path)
    listing(tmp_path, "path,Edema,Mass", "1.png,1,0", "1.png,1,1", "2.png,0,")
    with pytest.raises(DataError, match=r"gives 1 image two values of label: .*1.png is Edema and Edema\|Mass"):
        load_table(path)
    listing(tmp_path, "path,Edema,Mass", "1.png,1,0", "1.png,1,", "2.png,0,1")
    with pytest.raises(DataError, match=r"gives 1 image two values of y_Mass: .*1.png is 0.0 and nan"):
        load_table(path)
