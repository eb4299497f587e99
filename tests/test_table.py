"""The table: every layout is read, patients are known, and no split tears one apart."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_fastai.errors import DataError, UsageError
from cxr_fastai.split import split_table
from cxr_fastai.table import load_table, positive_class, told_of

REAL = Path(__file__).parents[2] / "shared" / "data" / "real-cxr"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real films at {REAL}")


def film(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (1, 1)).save(path)


def tree(root, *names):
    for name in names:
        film(root / name)
    return root


def listing(root, text, *films, name="labels.csv"):
    tree(root, *films)
    path = root / name
    root.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# Layouts


def test_class_folders(tmp_path):
    tree(tmp_path, "sick/b.png", "sick/deep/c.JPG", "normal/a.png", "normal/.hidden.png", "__MACOSX/normal/._a.png")
    (tmp_path / "normal" / "notes.txt").write_text("x")
    table = load_table(tmp_path)
    assert list(table.columns) == ["path", "label", "patient_id", "split"]
    assert table["path"].tolist() == [str(tmp_path / p) for p in ("normal/a.png", "sick/b.png", "sick/deep/c.JPG")]
    assert table["label"].tolist() == ["normal", "sick", "sick"]
    assert table["patient_id"].tolist() == ["a", "b", "c"]
    assert set(table["split"]) == {""}
    assert table.attrs == {
        "task": "binary",
        "classes": ["normal", "sick"],
        "targets": False,
        "patients_from": "one patient an image",
        "source": str(tmp_path),
        "source_kind": "folders",
        "notes": [],
    }


def test_split_folders(tmp_path):
    tree(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png", "TEST/a/5.png", "TEST/b/6.png")
    table = load_table(tmp_path)
    assert dict(zip(table["patient_id"], table["split"], strict=True)) == {
        "1": "train", "2": "train", "3": "valid", "4": "valid", "5": "test", "6": "test",
    }  # fmt: skip
    assert table["label"].tolist() == ["a", "b"] * 3


def test_images_folder_beside_masks(tmp_path):
    tree(tmp_path, "images/normal/1.png", "images/abnormal/2.png", "masks/abnormal/2.png")
    assert load_table(tmp_path)["label"].tolist() == ["abnormal", "normal"]


def test_dataset_folder_uses_its_labels_csv(tmp_path):
    text = (
        "path,label,patient_id,findings,view,age,sex,seed\n"
        "images/normal/1.png,normal,P1,,PA,40,F,1\nimages/abnormal/2.png,abnormal,P2,Effusion|Mass,AP,50.5,M,2\n"
    )
    listing(tmp_path, text, "images/normal/1.png", "images/abnormal/2.png", "images/abnormal/not_listed.png")
    table = load_table(tmp_path)
    assert table["path"].tolist() == [str(tmp_path / "images/abnormal/2.png"), str(tmp_path / "images/normal/1.png")]
    assert table["patient_id"].tolist() == ["P2", "P1"]
    assert table["age"].tolist() == [50.5, 40.0]
    assert table.loc[0, ["findings", "view", "sex", "seed"]].tolist() == ["Effusion|Mass", "AP", "M", "2"]
    assert table.attrs["task"] == "binary"
    assert table.attrs["patients_from"] == "column patient_id"


@pytest.mark.parametrize("record", [{"task": "multilabel"}, {"config": {"task": "multilabel"}}])
def test_dataset_json_makes_it_multilabel(tmp_path, record):
    text = "path,label,findings\n1.png,normal,\n2.png,abnormal,Mass|Effusion\n3.png,abnormal,Mass\n"
    listing(tmp_path, text, "1.png", "2.png", "3.png")
    (tmp_path / "dataset.json").write_text(json.dumps(record))
    table = load_table(tmp_path)
    assert table["label"].tolist() == ["", "Effusion|Mass", "Mass"]
    assert (table.attrs["task"], table.attrs["classes"]) == ("multilabel", ["Effusion", "Mass"])
    assert load_table(tmp_path, task="binary")["label"].tolist() == ["normal", "abnormal", "abnormal"]


def test_csv_with_bars_is_multilabel(tmp_path):
    text = "path,label\n1.png,No Finding\n2.png, Mass | Effusion \n3.png,\n4.png,Mass\n"
    table = load_table(listing(tmp_path, text, "1.png", "2.png", "3.png", "4.png", name="mine.csv"))
    assert table["label"].tolist() == ["", "Effusion|Mass", "", "Mass"]
    assert (table.attrs["task"], table.attrs["classes"]) == ("multilabel", ["Effusion", "Mass"])


def test_csv_of_excel_with_split_and_sub_folder(tmp_path):
    text = "﻿path,label,split\nx/1.png,a,Training\nx/2.png,b,VAL\nx/3.png,c,test\n"
    table = load_table(listing(tmp_path, text, "x/1.png", "x/2.png", "x/3.png"))
    assert table["split"].tolist() == ["train", "valid", "test"]
    assert table.attrs["task"] == "multiclass"


def test_csv_paths_may_be_those_of_the_current_folder(tmp_path, monkeypatch):
    tree(tmp_path, "films/1.png", "films/2.png")
    path = listing(tmp_path / "run", "path,label\nfilms/1.png,a\nfilms/2.png,b\n", name="split.csv")
    monkeypatch.chdir(tmp_path)
    assert load_table(path)["path"].tolist() == ["films/1.png", "films/2.png"]


def test_repeated_rows_count_once(tmp_path):
    text = "path,label\n1.png,a\n./1.png,a\n2.png,b\n"
    assert len(load_table(listing(tmp_path, text, "1.png", "2.png"))) == 2


def test_other_csv_files_in_the_folder_do_not_matter(tmp_path):
    listing(tree(tmp_path, "a/1.png", "b/2.png"), "id,age\n1,40\n", name="manifest.csv")
    assert load_table(tmp_path)["label"].tolist() == ["a", "b"]


def test_a_link_back_up_ends(tmp_path):
    tree(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path / "a", target_is_directory=True)
    assert len(load_table(tmp_path)) == 2


# Patients


@pytest.mark.parametrize(
    ("name", "patient", "source"),
    [
        ("person123_bacteria_456.jpeg", "person123", "Kermany file names"),
        ("NORMAL2-IM-0536-0001.jpeg", "NORMAL2-IM-0536", "Kermany file names"),
        ("IM-0122-0001.jpeg", "IM-0122", "Kermany file names"),
        ("IM-0618-0001-0002.jpeg", "IM-0618", "Kermany file names"),
        ("00000013_005.png", "00000013", "NIH file names"),
        ("patient00001/study1/view1_frontal.jpg", "patient00001", "CheXpert folders"),
        ("p10/p10000032/s50414267/02aa804e.jpg", "p10000032", "MIMIC folders"),
        ("scan_7.png", "scan_7", "one patient an image"),
    ],
)
def test_patients_from_names(tmp_path, name, patient, source):
    table = load_table(tree(tmp_path, f"a/{name}", f"b/{name.replace('1', '9').replace('0', '8').replace('7', '8')}"))
    assert table["patient_id"][0] == patient
    assert table.attrs["patients_from"] == source


def test_equal_names_in_two_folders_are_not_one_patient(tmp_path):
    assert load_table(tree(tmp_path, "a/1.png", "b/1.png"))["patient_id"].tolist() == ["a/1.png", "b/1.png"]


def test_patients_from_a_pattern(tmp_path):
    tree(tmp_path, "a/x1_1.png", "a/x1_2.png", "b/x2_1.png")
    table = load_table(tmp_path, patient_regex=r"^(x\d)_")
    assert table["patient_id"].tolist() == ["x1", "x1", "x2"]
    assert table.attrs["patients_from"] == r"pattern ^(x\d)_"
    assert load_table(tmp_path, patient_regex=r"x\d")["patient_id"].tolist() == ["x1", "x1", "x2"]
    assert load_table(tmp_path, patient_regex=r"^(\w)/")["patient_id"].tolist() == ["a", "a", "b"]


def test_patients_where_the_column_is_empty(tmp_path):
    text = "path,label,patient_id\n1.png,a,007\n2.png,a,\n3.png,b,Unknown\n"
    table = load_table(listing(tmp_path, text, "1.png", "2.png", "3.png"))
    assert table["patient_id"].tolist() == ["007", "2", "3"]
    assert table.attrs["patients_from"] == "one patient an image (2 images), column patient_id (1 images)"


def test_patients_from_dicom_headers(tmp_path):
    import pydicom

    tree(tmp_path, "b/3.png")
    (tmp_path / "a").mkdir()
    for name, patient in (("1.dcm", "K7"), ("2.dcm", "Anonymous")):
        header = pydicom.Dataset()
        header.PatientID = patient
        header.save_as(tmp_path / "a" / name, implicit_vr=True, little_endian=True)
    (tmp_path / "a" / "4.dcm").write_bytes(b"not DICOM")
    table = load_table(tmp_path)
    assert table["patient_id"].tolist() == ["K7", "2", "4", "3"]


# Faults


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no images in it; make one folder for each class"),
        (["1.png"], r"images such as 1.png are in no class folder; make one folder for each class"),
        (["a/1.png"], r"has only one class, a \(1 image\); at least two are needed"),
        (["a/1.png", "b/.x.png"], r"class folder .*/b has no images; put some in, or remove the folder"),
        (["train/a/1.png", "other/b/2.png"], "has train beside other; keep one kind of folder there"),
    ],
)
def test_folder_faults(tmp_path, files, message):
    with pytest.raises(DataError, match=message) as caught:
        load_table(tree(tmp_path, *files))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as CSV"),
        ("path,label\n", "lists no images; give one row an image"),
        ("file;class\n1.png;a\n", r"has no column path or label; it has: file;class; rename them to path,label"),
        ("path,diagnosis\n1.png,a\n", r"has no column label; it has: path, diagnosis; rename"),
        (
            "path,label\n1.png,a\nx.png,b\ny.png,b\nz.png,b\nw.png,b\n,b\n",
            r"lists 5 files of 6 that cannot be found: x.png, y.png, z.png ...; paths are relative to /",
        ),
        ("path,label\n1.png,a\n./1.png,b\n", r"gives 1 image two values of label: .*1.png is a and b; keep one row"),
        ("path,label,patient_id\n1.png,a,p\n1.png,a,q\n", "two values of patient_id: .*1.png is p and q"),
        ("path,label,split\n1.png,a,dev\n2.png,b,\n", "has unknown split dev; use train, valid or test"),
        ("path,label\n1.png,a\n2.png,\n", r"1 image without a label, such as .*2.png; fill in or remove"),
        ("path,label\n1.png,No Finding\n2.png,none|normal\n", "has no findings at all in 2 images"),
        ("path,label\n1.png,a\n2.png,a\n", "has only one class, a"),
    ],
)
def test_csv_faults(tmp_path, text, message):
    path = listing(tmp_path, text, "1.png", "2.png", name="mine.csv")
    with pytest.raises(DataError, match=message) as caught:
        load_table(path)
    assert "\n" not in str(caught.value)


def test_source_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist; give a folder of class folders or a CSV"):
        load_table(tmp_path / "nowhere")


def test_task_faults(tmp_path):
    tree(tmp_path, "a/1.png", "b/2.png", "c/3.png")
    with pytest.raises(DataError, match=r"task binary cannot have 3 classes \(a, b, c\); merge them"):
        load_table(tmp_path, task="binary")
    with pytest.raises(UsageError, match="task 'both' is not one of auto, binary, multiclass, multilabel"):
        load_table(tmp_path, task="both")  # type: ignore[arg-type]
    path = listing(tmp_path, "path,label,findings\na/1.png,x|y,\nb/2.png,y,\n")
    with pytest.raises(DataError, match="task multiclass cannot have several labels an image"):
        load_table(path, task="multiclass")
    path = listing(tmp_path, "path,label,findings\na/1.png,sick,\nb/2.png,normal,\n")
    with pytest.raises(DataError, match=r"1 image labelled but without findings, such as .*1.png \(sick\)"):
        load_table(path, task="multilabel")
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset.json cannot be read"):
        load_table(tmp_path)


def test_pattern_faults(tmp_path):
    tree(tmp_path, "a/x1.png", "b/y.png")
    with pytest.raises(DataError, match=r"does not match b/y.png; it must find a patient in every name"):
        load_table(tmp_path, patient_regex=r"x\d")
    with pytest.raises(UsageError, match=r"patient pattern '\(' is not a regular expression"):
        load_table(tmp_path, patient_regex="(")


# The positive class


@pytest.mark.parametrize(
    ("classes", "positive"),
    [
        (["NORMAL", "PNEUMONIA"], "PNEUMONIA"),
        (["abnormal", "normal"], "abnormal"),
        (["Mass", "No Finding"], "Mass"),
        (["covid", "healthy"], "covid"),
        (["0", "1"], "1"),
        (["False", "True"], "True"),
        (["bacteria", "virus"], "virus"),
    ],
)
def test_positive_class(classes, positive):
    assert positive_class(classes) == positive


def test_positive_class_needs_two():
    with pytest.raises(UsageError, match="a positive class needs two classes, not 3: a, b, c"):
        positive_class(["a", "b", "c"])


# Real films


@needs_real
def test_real_kermany_folder():
    table = load_table(REAL / "kermany")
    known = pd.read_csv(REAL / "manifest.csv", dtype=str).assign(path=lambda t: [str(REAL / p) for p in t["path"]])
    both = table.merge(known[["path", "patient_id"]], on="path")
    assert len(table) == len(both) == 802
    assert (
        both.groupby("patient_id_y")["patient_id_x"].nunique() == 1
    ).all()  # we hold person1 to be one, of both germs
    assert table.attrs["classes"] == ["NORMAL", "PNEUMONIA"]
    parts = split_table(table).groupby(["split", "label"]).size().unstack(fill_value=0)
    assert (parts.loc["test"] - [80.4, 80]).abs().max() <= 2
    assert (parts.loc["valid"] - [40.2, 40]).abs().max() <= 2


@needs_real
def test_real_manifest_is_used_for_its_folder():
    table = load_table(REAL)
    assert len(table) == 1320
    assert table.attrs["task"] == "multiclass"
    assert all(Path(path).is_file() for path in table["path"])


def test_labels_are_mapped_part_by_part_and_films_with_nothing_left_are_dropped(tmp_path: Path) -> None:
    rows = "path,label\na.png,Pneumonia|Effusion\nb.png,No Finding\nc.png,Effusion\nd.png,Pneumonia\n"
    (tmp_path / "list.csv").write_text(rows)
    for name in "abcd":
        Image.new("L", (8, 8)).save(tmp_path / f"{name}.png")
    mapping = {"Pneumonia": "PNEUMONIA", "No Finding": "NORMAL", "*": ""}
    table = load_table(tmp_path / "list.csv", task="binary", mapping=mapping, classes=["NORMAL", "PNEUMONIA"])
    assert [(Path(p).name, label) for p, label in zip(table["path"], table["label"], strict=True)] == [
        ("a.png", "PNEUMONIA"), ("b.png", "NORMAL"), ("d.png", "PNEUMONIA"),
    ]  # fmt: skip
    every = load_table(tmp_path / "list.csv", task="binary", mapping={"No Finding": "normal", "*": "abnormal"})
    assert every["label"].tolist() == ["abnormal", "normal", "abnormal", "abnormal"]
    with pytest.raises(DataError, match=r"--map gives 1 film several classes, such as .*a.png \(Pneumonia\|Effusion\)"):
        load_table(tmp_path / "list.csv", task="binary", mapping={"Pneumonia": "X", "Effusion": "Y"})
    with pytest.raises(DataError, match="--map leaves no film; its labels are Effusion, No Finding"):
        load_table(tmp_path / "list.csv", task="binary", mapping={"*": ""})


def test_mapped_findings_are_there_where_any_is_and_unknown_where_one_is(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,A,B,C\na.png,1,0,0\nb.png,0,0,1\nc.png,0,,1\nd.png,-1,0,0\n")
    for name in "abcd":
        Image.new("L", (8, 8)).save(tmp_path / f"{name}.png")
    table = load_table(
        tmp_path / "list.csv", task="multilabel", mapping={"A": "AB", "B": "AB", "C": ""}, classes=["AB"]
    )
    assert told_of(table) == ["AB"]
    np.testing.assert_array_equal(table["y_AB"], [1, 0, np.nan, -1])
