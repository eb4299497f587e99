"""Public datasets in miniature, with the column names of the real files: recognised, read, and trained on."""

import csv
import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import fake_film
from PIL import Image

from cxr_fastai.config import TrainConfig
from cxr_fastai.data import KnownBCE
from cxr_fastai.errors import DataError
from cxr_fastai.evaluate import evaluate_run
from cxr_fastai.fitting import class_weights_of
from cxr_fastai.patients import pseudonym
from cxr_fastai.predict import Predictor
from cxr_fastai.sources import CHEXPERT_FINDINGS, find_source
from cxr_fastai.split import split_table
from cxr_fastai.table import load_table, targets_of
from cxr_fastai.training import train

NIH_HEAD = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)
CHEXPERT_HEAD = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding," + ",".join(CHEXPERT_FINDINGS)
MIMIC_FINDINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture",
                  "Lung Lesion", "Lung Opacity", "No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia",
                  "Pneumothorax", "Support Devices")  # fmt: skip


def film(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (1, 1)).save(path)
    return path


def text(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def dicom(path: Path, **header: str) -> Path:
    import pydicom

    dataset = pydicom.Dataset()
    for name, value in header.items():
        setattr(dataset, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, implicit_vr=True, little_endian=True)
    return path


def by_name(table: pd.DataFrame) -> pd.DataFrame:
    return table.set_index(table["path"].map(lambda path: Path(path).name))


# NIH ChestX-ray14


def nih(root: Path, head: str = NIH_HEAD, name: str = "Data_Entry_2017.csv") -> Path:
    text(
        root / name,
        head,
        "00000001_000.png,Cardiomegaly,0,1,58,M,PA,2682,2749,0.14300000000000002,0.14300000000000002,",
        "00000001_001.png,Cardiomegaly|Emphysema,1,1,058Y,M,PA,2894,2729,0.143,0.143,",
        "00000002_000.png,No Finding,0,2,81,F,AP,2500,2048,0.171,0.171,",
        "00000003_000.png,Hernia,0,3,018M,F,PA,2582,2991,0.143,0.143,",
    )
    for i, film_name in ((1, "00000001_000"), (1, "00000001_001"), (12, "00000002_000"), (12, "00000003_000")):
        film(root / f"images_{i:03d}" / "images" / f"{film_name}.png")
    return root


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (NIH_HEAD, "Data_Entry_2017.csv"),
        (NIH_HEAD.rstrip(","), "Data_Entry_2017_v2020.csv"),
        (NIH_HEAD.replace("Gender", "Sex"), "Data_Entry_2017_v2020.csv"),
    ],
)
def test_nih(tmp_path, head, name):
    table = by_name(load_table(nih(tmp_path, head, name)))
    assert table["label"].to_dict() == {
        "00000001_000.png": "Cardiomegaly",
        "00000001_001.png": "Cardiomegaly|Emphysema",
        "00000002_000.png": "",
        "00000003_000.png": "Hernia",
    }
    assert table["patient_id"].tolist() == ["00000001", "00000001", "00000002", "00000003"]
    assert table["age"].tolist() == [58, 58, 81, 1.5]
    assert table["sex"].tolist() == ["M", "M", "F", "F"]
    assert table["view"].tolist() == ["PA", "PA", "AP", "PA"]
    assert set(table["split"]) == {""}
    assert table["path"].iloc[2] == str(tmp_path / "images_012/images/00000002_000.png")
    table = load_table(tmp_path)
    assert table.attrs == {
        "task": "multilabel",
        "classes": ["Cardiomegaly", "Emphysema", "Hernia"],
        "targets": False,
        "patients_from": f"column Patient ID of {name}",
        "source": str(tmp_path),
        "source_kind": "nih",
        "notes": [],
    }


def test_nih_official_split_and_part_of_the_download(tmp_path):
    nih(tmp_path)
    text(tmp_path / "train_val_list.txt", "00000001_000.png", "00000001_001.png", "00000003_000.png")
    text(tmp_path / "test_list.txt", "00000002_000.png")
    (tmp_path / "images_012/images/00000003_000.png").unlink()
    table = load_table(tmp_path)
    assert table["split"].tolist() == ["train", "train", "test"]
    assert table.attrs["notes"] == ["left out: 1 listed film that is not there"]
    text(tmp_path / "test_list.txt", "")
    with pytest.raises(
        DataError, match=r"1 film in neither train_val_list.txt nor test_list.txt, such as 00000002_000"
    ):
        load_table(tmp_path)


def test_the_root_may_be_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(nih(tmp_path))
    assert load_table(".")["path"][0] == "images_001/images/00000001_000.png"
    assert find_source(Path()).rows["name"][0] == "images_001/images/00000001_000.png"  # type: ignore[union-attr]


def test_nih_of_single_findings_is_multilabel_all_the_same(tmp_path):
    nih(tmp_path)
    (tmp_path / "images_001/images/00000001_001.png").unlink()
    assert load_table(tmp_path).attrs["task"] == "multilabel"


# CheXpert


def chexpert_row(patient: int, view: str = "Frontal", part: str = "train", **cells: str) -> str:
    found = [cells.get(name.replace(" ", "_"), "") for name in ("No Finding", *CHEXPERT_FINDINGS)]
    path = f"CheXpert-v1.0-small/{part}/patient{patient:05d}/study1/view1_{view.lower()}.jpg"
    return ",".join([path, "Female" if patient % 2 else "Male", "68", view, "AP" if view == "Frontal" else "", *found])


def chexpert(root: Path, train: list[str], valid: list[str] | None = None) -> Path:
    for name, rows in (("train.csv", train), ("valid.csv", valid)):
        if rows is not None:
            text(root / name, CHEXPERT_HEAD, *rows)
            for row in rows:
                film(root / Path(*Path(row.split(",")[0]).parts[1:]))
    return root


def test_chexpert(tmp_path):
    rows = [
        chexpert_row(1, No_Finding="1.0", Support_Devices="1.0"),
        chexpert_row(2, Edema="1.0", Pneumonia="-1.0", Pneumothorax="0.0"),
        chexpert_row(3, "Lateral", Edema="1.0"),
    ]
    table = load_table(chexpert(tmp_path / "renamed", rows, [chexpert_row(64541, part="valid", Edema="1.0")]))
    assert table["label"].tolist() == ["Support Devices", "Edema", "Edema"]
    assert table["patient_id"].tolist() == ["patient00001", "patient00002", "patient64541"]
    assert table["split"].tolist() == ["train", "train", "test"]
    assert table["view"].tolist() == ["AP"] * 3
    assert table["sex"].tolist() == ["F", "M", "F"]
    assert table["age"].tolist() == [68.0] * 3
    assert table["y_Pneumonia"].tolist() == [0, -1, 0]
    assert table["y_Edema"].tolist() == [0, 1, 1]
    assert table["y_Pneumothorax"].tolist() == [0, 0, 0]
    assert (table.attrs["task"], table.attrs["classes"]) == ("multilabel", ["Edema", "Support Devices"])
    assert (table.attrs["source_kind"], table.attrs["patients_from"]) == ("chexpert", "CheXpert folders")
    assert table.attrs["targets"] is True
    assert table.attrs["notes"][0] == "left out: 1 lateral film"
    assert table.attrs["notes"][1].startswith("not learned, since no film surely has it: Enlarged Cardiomediastinum,")


def test_chexpert_of_train_alone_has_no_split(tmp_path):
    assert set(load_table(chexpert(tmp_path, [chexpert_row(1, Edema="1.0"), chexpert_row(2)]))["split"]) == {""}


@pytest.mark.parametrize(("uncertain", "expected"), [("ignore", np.nan), ("ones", 1.0), ("zeros", 0.0), ("soft", 0.7)])
def test_uncertain_findings_as_training_takes_them(tmp_path, uncertain, expected):
    rows = [chexpert_row(1, Edema="1.0"), chexpert_row(2, Edema="-1.0"), chexpert_row(3)]
    table = load_table(chexpert(tmp_path, rows))
    np.testing.assert_array_equal(targets_of(table, ["Edema", "Unheard"], uncertain)[:, 0], [1, expected, 0])
    assert np.isnan(targets_of(table, ["Edema", "Unheard"], uncertain)[:, 1]).all()
    table["split"] = "train"
    positive = 1 + np.nan_to_num(expected)
    negative = 1 + np.nan_to_num(1 - expected)
    assert class_weights_of(table, uncertain).tolist() == pytest.approx([negative / positive])


def test_targets_of_labels_alone_are_all_known():
    table = pd.DataFrame({"label": ["A|B", "", "B"]})
    assert targets_of(table, ["A", "B", "C"]).tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0]]


def test_chexpert_faults(tmp_path):
    with pytest.raises(DataError, match=r"train.csv has '2.0' for Edema; it must be 1.0, 0.0, -1.0 or blank"):
        load_table(chexpert(tmp_path / "a", [chexpert_row(1, Edema="2.0")]))
    text(tmp_path / "b" / "train.csv", "Path,Frontal/Lateral,AP/PA", "x.jpg,Frontal,AP")
    with pytest.raises(DataError, match=r"train.csv has no column Sex, Age, No Finding; use it as it is distributed"):
        load_table(tmp_path / "b")
    text(tmp_path / "c" / "train.csv", "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding", "x.jpg,Male,1,Frontal,AP,")
    with pytest.raises(DataError, match=r"train.csv has no column Enlarged Cardiomediastinum, Cardiomegaly, Lung"):
        load_table(tmp_path / "c")
    text(tmp_path / "d" / "train.csv", CHEXPERT_HEAD, chexpert_row(1, Edema="1.0"))
    message = r"none of the 1 film of train.csv is there, such as train/patient00001/study1/view1_frontal.jpg; unpack"
    with pytest.raises(DataError, match=message):
        load_table(tmp_path / "d")
    with pytest.raises(DataError, match="task binary cannot have several labels an image"):
        load_table(chexpert(tmp_path / "e", [chexpert_row(1, Edema="1.0"), chexpert_row(2)]), task="binary")


def test_an_official_test_may_lack_findings_but_training_may_not(tmp_path):
    rows = [chexpert_row(i, Edema="1.0" if i % 2 else "", Fracture="1.0" if i < 4 else "") for i in range(1, 21)]
    table = load_table(chexpert(tmp_path, rows, [chexpert_row(99, part="valid", Edema="1.0")]))
    split = split_table(table)
    assert split["split"].value_counts()["test"] == 1  # without a fracture
    assert set(split.loc[split["y_Fracture"] == 1, "split"]) == {"train", "valid"}
    table["y_Edema"] = 1.0
    with pytest.raises(DataError, match="split train has no image that is known to be without Edema; add some"):
        split_table(table)


# MIMIC-CXR-JPG


def mimic(root: Path, ending: str = ".csv.gz") -> Path:
    studies = [
        ("10000032", "50414267", {"No Finding": "1.0"}),
        ("11000011", "51029426", {"Edema": "-1.0", "Fracture": "1.0"}),
    ]
    rows = [",".join([who, study, *(found.get(n, "") for n in MIMIC_FINDINGS)]) for who, study, found in studies]
    text(root / f"mimic-cxr-2.0.0-chexpert{ending}", ",".join(("subject_id", "study_id", *MIMIC_FINDINGS)), *rows)
    text(
        root / f"mimic-cxr-2.0.0-metadata{ending}",
        "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime,"
        "ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,PatientOrientationCodeSequence_CodeMeaning",
        'aa-1,10000032,50414267,"CHEST (PA AND LAT)",PA,3056,2544,21800506,213014.531,,postero-anterior,Erect',
        'aa-2,10000032,50414267,"CHEST (PA AND LAT)",LATERAL,3056,2544,21800506,213014.531,,lateral,Erect',
        "bb-1,11000011,51029426,CHEST (PORTABLE AP),AP,2544,3056,21800506,213014.531,,antero-posterior,",
        "bb-2,11000011,59999999,CHEST (PORTABLE AP),AP,2544,3056,21800506,213014.531,,antero-posterior,",
    )
    text(
        root / f"mimic-cxr-2.0.0-split{ending}",
        "dicom_id,study_id,subject_id,split",
        "aa-1,50414267,10000032,train",
        "bb-1,51029426,11000011,validate",
    )
    for name in ("p10/p10000032/s50414267/aa-1", "p10/p10000032/s50414267/aa-2", "p11/p11000011/s51029426/bb-1"):
        film(root / "files" / f"{name}.jpg")
    return root


@pytest.mark.parametrize("ending", [".csv", ".csv.gz"])
def test_mimic(tmp_path, ending):
    table = load_table(mimic(tmp_path, ending))
    assert [Path(p).name for p in table["path"]] == ["aa-1.jpg", "bb-1.jpg"]
    assert table["patient_id"].tolist() == ["p10000032", "p11000011"]
    assert table["label"].tolist() == ["", "Fracture"]
    assert table["y_Edema"].tolist() == [0, -1]
    assert table["view"].tolist() == ["PA", "AP"]
    assert table["split"].tolist() == ["train", "valid"]
    assert table.attrs["source_kind"] == "mimic"
    assert table.attrs["notes"][:2] == ["left out: 1 film other than PA or AP", "left out: 1 film without labels"]


def test_mimic_needs_its_metadata_but_not_its_split(tmp_path):
    mimic(tmp_path)
    (tmp_path / "mimic-cxr-2.0.0-split.csv.gz").unlink()
    assert set(load_table(tmp_path)["split"]) == {""}
    (tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz").unlink()
    with pytest.raises(DataError, match=r"has mimic-cxr-2.0.0-chexpert.csv.gz but no mimic-cxr-2.\*-metadata"):
        load_table(tmp_path)


def test_a_download_that_was_cut_is_named(tmp_path):
    mimic(tmp_path)
    path = tmp_path / "mimic-cxr-2.0.0-chexpert.csv.gz"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"chexpert.csv.gz cannot be read as CSV .*; download it again"):
        load_table(tmp_path)


# RSNA, Kermany, tuberculosis


def test_rsna(tmp_path):
    a, b, c = "0004cfab-14fd-4e49-80ba-63a80b6bddd6", "00436515-870c-4b36-a041-de91049b9ab4", "00569f44-917d-4c86"
    text(
        tmp_path / "stage_2_train_labels.csv",
        "patientId,x,y,width,height,Target",
        f"{a},,,,,0",
        f"{b},264.0,152.0,213.0,379.0,1",
        f"{b},562.0,152.0,256.0,453.0,1",
        f"{c},,,,,0",
    )
    text(
        tmp_path / "stage_2_detailed_class_info.csv",
        "patientId,class",
        f"{a},No Lung Opacity / Not Normal",
        f"{b},Lung Opacity",
        f"{b},Lung Opacity",
        f"{c},Normal",
    )
    for name, age in ((a, "051Y"), (b, "048Y")):
        dicom(tmp_path / "stage_2_train_images" / f"{name}.dcm", PatientID=name, PatientAge=age, PatientSex="F",
              ViewPosition="PA", PatientName="Secret")  # fmt: skip
    table = load_table(tmp_path)
    assert table["label"].tolist() == ["no pneumonia", "pneumonia"]
    assert table["patient_id"].tolist() == [a, b]
    assert table["age"].tolist() == [51, 48]
    assert (table["sex"] == "F").all()
    assert (table["view"] == "PA").all()
    assert table["detail"].tolist() == ["No Lung Opacity / Not Normal", "Lung Opacity"]
    assert not table.map(lambda cell: "Secret" in str(cell)).any(axis=None)
    assert (table.attrs["task"], table.attrs["source_kind"]) == ("binary", "rsna")
    assert table.attrs["notes"] == ["left out: 1 listed film that is not there"]


@pytest.mark.parametrize("top", ["", "chest_xray"])
def test_kermany_keeps_its_test_and_takes_its_patients_out_of_train(tmp_path, top):
    for name in (
        "train/NORMAL/IM-0115-0001.jpeg", "train/NORMAL/NORMAL2-IM-0383-0001.jpeg",
        "train/PNEUMONIA/person1_bacteria_1.jpeg", "train/PNEUMONIA/person1_bacteria_2.jpeg",
        "train/PNEUMONIA/person1000_virus_1681.jpeg", "val/NORMAL/NORMAL2-IM-1427-0001.jpeg",
        "val/PNEUMONIA/person1946_bacteria_4874.jpeg", "test/NORMAL/IM-0001-0001.jpeg",
        "test/PNEUMONIA/person1_virus_6.jpeg", "__MACOSX/chest_xray/train/._x.jpeg",
    ):  # fmt: skip
        film(tmp_path / top / name)
    table = load_table(tmp_path)
    assert table["split"].value_counts().to_dict() == {"train": 5, "test": 2}
    assert set(table.loc[table["split"] == "test", "patient_id"]) == {"IM-0001", "person1"}
    assert table.attrs["classes"] == ["NORMAL", "PNEUMONIA"]
    assert (table.attrs["source_kind"], table.attrs["patients_from"]) == ("kermany", "Kermany file names")
    assert table.attrs["notes"] == ["left out: 2 films in train of 1 person number that the test has, too"]


def test_folders_that_only_look_like_kermany_are_plain_folders(tmp_path):
    for name in ("train/NORMAL/1", "train/PNEUMONIA/2", "test/NORMAL/3", "test/PNEUMONIA/4", "val/NORMAL/5"):
        film(tmp_path / f"{name}.png")
    table = load_table(tmp_path)
    assert table.attrs["source_kind"] == "folders"
    assert (table["split"] == "valid").sum() == 1


def test_shenzhen_and_montgomery(tmp_path):
    china, montgomery = tmp_path / "ChinaSet_AllFiles", tmp_path / "MontgomerySet"
    for name in ("CHNCXR_0001_0", "CHNCXR_0327_1"):
        film(china / "CXR_png" / f"{name}.png")
    text(china / "ClinicalReadings" / "CHNCXR_0001_0.txt", "male 45yrs", "normal")
    text(china / "ClinicalReadings" / "CHNCXR_0327_1.txt", "female, 6 months", "right PTB")
    film(montgomery / "CXR_png" / "MCUCXR_0104_1.png")
    film(montgomery / "ManualMask" / "leftMask" / "MCUCXR_0104_1.png")
    text(montgomery / "ClinicalReadings" / "MCUCXR_0104_1.txt", "Patient's Sex: F", "Patient's Age: 026Y", "TB")
    table = load_table(china)
    assert table["label"].tolist() == ["normal", "tuberculosis"]
    assert table["patient_id"].tolist() == ["CHNCXR_0001", "CHNCXR_0327"]
    assert table["age"].tolist() == [45, 0.5]
    assert table["sex"].tolist() == ["M", "F"]
    assert table.attrs["source_kind"] == "shenzhen"
    assert table.attrs["patients_from"] == "file names (one patient a film)"
    both = load_table(tmp_path)
    assert both.attrs["source_kind"] == "shenzhen+montgomery"
    assert both["age"].tolist() == [45, 0.5, 26]
    found = find_source(montgomery)
    assert found is not None
    assert found.rows["name"].tolist() == ["CXR_png/MCUCXR_0104_1.png"]


def test_other_folders_are_no_public_dataset(tmp_path):
    film(tmp_path / "a" / "1.png")
    text(tmp_path / "train.csv", "id,label", "1,2")
    (tmp_path / "b").mkdir()
    assert find_source(tmp_path) is None
    (tmp_path / "train.csv").write_text("")
    assert find_source(tmp_path) is None


# Loss and training


def test_the_loss_leaves_out_what_is_unknown_and_is_otherwise_fastais():
    from fastai.losses import BCEWithLogitsLossFlat

    torch.manual_seed(0)
    logits, weight = torch.randn(6, 3, requires_grad=True), torch.tensor([1.0, 2.0, 5.0])
    targets = torch.randint(0, 2, (6, 3)).float()
    ours, theirs = KnownBCE(weight), BCEWithLogitsLossFlat(pos_weight=weight)
    assert ours(logits, targets).item() == pytest.approx(theirs(logits, targets).item(), abs=1e-6)
    targets[0, 0] = targets[3] = torch.nan
    ours(logits, targets).backward()
    assert logits.grad is not None
    assert (logits.grad[torch.isnan(targets)] == 0).all()
    assert (logits.grad[~torch.isnan(targets)] != 0).all()
    assert ours(logits, torch.full((6, 3), torch.nan)).item() == 0
    again = pickle.loads(pickle.dumps(ours))
    assert again(logits, targets).item() == ours(logits, targets).item()
    assert torch.equal(again.decodes(again.activation(torch.tensor([-1.0, 1.0]))), torch.tensor([False, True]))
    again.reduction = "none"
    assert tuple(again(logits, targets).shape) == (6, 3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train on a CheXpert of 40 patients, some findings uncertain; return data, run folder and metrics."""
    root, rng = tmp_path_factory.mktemp("chexpert"), np.random.default_rng(0)
    findings = [("", ""), ("1.0", ""), ("", "1.0"), ("1.0", "-1.0"), ("-1.0", "1.0")] * 8
    rows = [chexpert_row(i, Edema=a, Pleural_Effusion=b) for i, (a, b) in enumerate(findings)]
    valid = [
        chexpert_row(900 + i, part="valid", Edema=f"{i % 2}.0", Pleural_Effusion=f"{i // 2 % 2}.0") for i in range(8)
    ]
    chexpert(root, rows, valid)
    for path in root.rglob("*.jpg"):
        Image.fromarray(fake_film(rng, "Mass")).save(path)
    config = TrainConfig(
        data=str(root), out=str(root / "exports"), size=32, epochs=1, freeze_epochs=0, arch="resnet18", weights="none",
        batch_size=8, uncertain="soft", hash_ids=True, augment=0,
    )  # fmt: skip
    return root, *train(config)


def test_chexpert_trains_is_tested_and_predicts(trained):
    root, run, metrics = trained
    assert metrics["classes"] == ["Edema", "Pleural Effusion"]
    assert metrics["n"] == 8
    assert metrics["per_class"]["Edema"]["sensitivity"]["n"] == 4
    row = next(Predictor(run).predict([str(root / "valid/patient00900/study1/view1_frontal.jpg")]))
    assert row.error is None
    assert list(row.probabilities) == metrics["classes"]
    record = json.loads((run / "config.json").read_text())
    assert record["source_kind"] == "chexpert"
    assert record["config"]["uncertain"] == "soft"


def test_history_is_finite_where_labels_are_soft_or_unknown(trained):
    with (trained[1] / "history.csv").open() as stream:
        row = next(csv.DictReader(stream))
    assert all(np.isfinite(float(row[c])) for c in ("train_loss", "train_accuracy", "valid_loss", "valid_auroc"))


def test_the_learner_predicts_alone(trained):
    from fastai.learner import load_learner

    root, run, _ = trained
    learn = load_learner(run / "learner.pkl")
    with learn.no_bar(), learn.no_logging():
        found, _, probabilities = learn.predict(root / "valid/patient00900/study1/view1_frontal.jpg")
    assert probabilities.shape == (2,)
    assert set(found) <= {"Edema", "Pleural Effusion"}


def test_evaluating_leaves_out_what_the_data_do_not_tell(trained, tmp_path):
    root, run, metrics = trained
    again = evaluate_run(str(run), None, str(tmp_path / "a"))
    assert again["metrics"] == metrics["metrics"]
    films = sorted((root / "train").rglob("*.jpg"))[:6]
    wide = text(
        tmp_path / "wide.csv",
        "path,Edema,Mass",
        *(f"{path},{cell}" for path, cell in zip(films, ("1,1", "0,0", "1,0", "0,", ",1", "-1,0"), strict=True)),
    )
    found = evaluate_run(str(run), str(wide), str(tmp_path / "b"))
    assert found["per_class"]["Edema"]["accuracy"]["n"] == 4
    assert found["per_class"]["Pleural Effusion"]["accuracy"] == {"value": None, "low": None, "high": None, "n": 0}
    with (tmp_path / "b" / "predictions.csv").open() as stream:
        assert next(csv.DictReader(stream))["y_Edema"] == "1.0"
    text(wide, "path,Mass", f"{films[0]},1", f"{films[1]},0")
    with pytest.raises(DataError, match=r"no finding of the data \(Mass\) is one of the model's \(Edema, Pleural Eff"):
        evaluate_run(str(run), str(wide), None)


def test_no_patient_id_is_stored_with_hash_ids(trained):
    split = pd.read_csv(trained[1] / "split.csv", dtype=str, keep_default_na=False)
    assert pseudonym("patient00000") in set(split["patient_id"])
    assert split["patient_id"].str.fullmatch("[0-9a-f]{16}").all()
    assert json.loads((trained[1] / "config.json").read_text())["patients_from"] == "CheXpert folders, hashed"


def test_the_split_file_of_a_run_is_a_table_again(trained):
    table = load_table(trained[1] / "split.csv")
    assert table.attrs["classes"] == ["Edema", "Pleural Effusion"]
    assert (table["y_Edema"] == -1).sum() == 8
