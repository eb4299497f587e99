"""What a finished run folder holds, and what happens to one that cannot finish."""

import csv
import json
import os
import pickletools
import re
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from conftest import write_films
from fastai.learner import load_learner
from sklearn.metrics import roc_auc_score

from cxr_fastai.callbacks import HISTORY_COLUMNS
from cxr_fastai.config import TrainConfig
from cxr_fastai.errors import TrainingError, UsageError
from cxr_fastai.fitting import class_weights_of
from cxr_fastai.images import read_radiograph, to_input
from cxr_fastai.predict import Predictor
from cxr_fastai.runs import sha256
from cxr_fastai.table import load_table
from cxr_fastai.training import train

FILES = {
    "config.json", "split.csv", "history.csv", "history.png", "learner.pkl", "model.onnx", "predictions.csv",
    "metrics.json", "report.html", "MODEL_CARD.md", "manifest.json", "audit.json", "too_good.json",
}  # fmt: skip


def test_the_run_folder_is_complete_and_its_hashes_hold(finished: Path) -> None:
    assert {p.name for p in finished.iterdir()} == FILES
    hashes = json.loads((finished / "manifest.json").read_text())["sha256"]
    assert hashes == {name: sha256(finished / name) for name in FILES - {"manifest.json"}}
    assert (finished.parent / "latest").resolve() == finished


def test_history_has_a_row_an_epoch(finished: Path) -> None:
    with (finished / "history.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == HISTORY_COLUMNS
    # random weights: no frozen phase, as many epochs as both phases have
    assert [(row["epoch"], row["phase"]) for row in rows] == [
        ("1", "from scratch"),
        ("2", "from scratch"),
        ("3", "from scratch"),
    ]


def test_split_keeps_the_shares(finished: Path) -> None:
    with (finished / "split.csv").open() as stream:
        splits = [row["split"] for row in csv.DictReader(stream)]
    assert [splits.count(s) for s in ("train", "valid", "test")] == [42, 6, 12]


def test_learner_and_onnx_say_the_same_of_the_files(finished: Path, films: Path) -> None:
    paths = sorted(str(p) for p in films.rglob("*.png"))
    learn = load_learner(finished / "learner.pkl")
    with learn.no_bar(), learn.no_logging():
        theirs = learn.get_preds(dl=learn.dls.test_dl(paths))[0].numpy()
        single = learn.predict(Path(paths[0]))
    assert list(learn.dls.vocab) == ["abnormal", "normal"]
    ours = np.array([[row.probabilities[c] for c in learn.dls.vocab] for row in Predictor(finished).predict(paths)])
    assert np.abs(ours - theirs).max() < 1e-4
    assert single[0] == learn.dls.vocab[int(ours[0].argmax())]


def test_evidence_sums_to_the_logits(finished: Path, films: Path) -> None:
    predictor = Predictor(finished)
    batch = np.stack([to_input(read_radiograph(p), 32) for p in sorted(films.rglob("*.png"))[:8]])
    out = predictor.run(batch)
    sums = out["evidence"].sum((2, 3)) + np.array(predictor.card["bias"], np.float32)
    assert np.abs(sums - out["logits"]).max() < 1e-4
    assert out["features"].shape == (8, 1024)


def test_learner_pkl_holds_weights_and_no_film(finished: Path) -> None:
    with zipfile.ZipFile(finished / "learner.pkl") as archive:
        data = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        opcodes = list(pickletools.genops(archive.read(data)))
        sizes = [archive.getinfo(n).file_size for n in archive.namelist() if "/data/" in n]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn = load_learner(finished / "learner.pkl")
    weights = sum(t.numel() * t.element_size() for t in learn.model.state_dict().values())
    # Mean and deviation, class weights, the last batch's turns: less than one film of 32 × 32 eight-bit pixels.
    assert 0 < sum(sizes) - weights < 32 * 32
    assert learn.dls.train_ds.tls[0].tfms[-1].films == {}
    # functions by name only: nothing of cloudpickle, which stores code by value
    names = {arg for op, arg, _ in opcodes if op.name == "GLOBAL"}
    assert not {n for n in names if "cloudpickle" in n or "types CodeType" in n}
    assert "cxr_fastai.data OpenFilm" in names


def test_onnx_is_one_file_with_its_card(finished: Path) -> None:
    model = onnx.load(finished / "model.onnx", load_external_data=False)
    assert not [t for t in model.graph.initializer if t.external_data]
    card = json.loads({p.key: p.value for p in model.metadata_props}["card"])
    assert card["classes"] == ["abnormal", "normal"]
    assert card["positive"] == "abnormal"
    assert 0 < card["threshold"] < 1
    assert card["data"]["films"] == 60


def test_metrics_are_those_of_predictions_csv(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    with (finished / "predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    truth = [row["label"] == "abnormal" for row in rows]
    said = [row["predicted"] == "abnormal" for row in rows]
    p = [float(row["p_abnormal"]) for row in rows]
    assert metrics["n"] == len(rows) == 12
    assert metrics["metrics"]["auroc"]["value"] == pytest.approx(roc_auc_score(truth, p), abs=1e-12)
    assert metrics["metrics"]["accuracy"]["value"] == pytest.approx(np.mean(np.equal(truth, said)), abs=1e-12)
    assert said == [x >= metrics["threshold"] for x in p]
    assert sum(map(sum, metrics["confusion"])) == 12


def test_class_weights_make_each_class_count_the_same(tmp_path: Path) -> None:
    write_films(tmp_path, ["normal"] * 30 + ["abnormal"] * 10)
    table = load_table(tmp_path)
    table["split"] = "train"
    assert class_weights_of(table).tolist() == pytest.approx([2.0, 2 / 3])  # abnormal, normal: 40 / (2 · n)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_other_tasks_train_and_predict(tmp_path: Path, task: str) -> None:
    labels = ["normal", "Mass", "Effusion"] * 14
    write_films(tmp_path / "films", labels)
    data = tmp_path / "films"
    if task == "multilabel":
        paths = sorted((tmp_path / "films").rglob("*.png"))
        names = [
            "" if p.parent.name == "normal" else "Mass|Effusion" if i % 7 == 0 else p.parent.name
            for i, p in enumerate(paths)
        ]
        data = tmp_path / "labels.csv"
        data.write_text("path,label\n" + "".join(f"{p},{n}\n" for p, n in zip(paths, names, strict=True)))
    config = TrainConfig(
        data=str(data), out=str(tmp_path), size=32, epochs=1, arch="resnet18", weights="none", batch_size=8
    )
    run, metrics = train(config)
    classes = ["Effusion", "Mass"] if task == "multilabel" else ["Effusion", "Mass", "normal"]
    assert metrics["classes"] == classes
    assert metrics["metrics"]["auroc"]["n"] > 0
    row = next(Predictor(run).predict([str(next((tmp_path / "films").rglob("*.png")))]))
    assert list(row.probabilities) == classes
    assert (sum(row.probabilities.values()) == pytest.approx(1)) == (task == "multiclass")
    assert set(row.label.split("|")) <= {*classes, ""}


def test_same_seed_gives_the_same_weights(films: Path, tmp_path: Path) -> None:
    hashes = []
    for name in ("a", "b"):
        config = TrainConfig(
            data=str(films), out=str(tmp_path), name=name, size=32, epochs=1, arch="resnet18", weights="none"
        )
        run, _ = train(config)
        hashes.append((run / "predictions.csv").read_text())
    assert hashes[0] == hashes[1]


def test_a_loss_that_is_not_a_number_stops_the_run_and_leaves_no_model(films: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        data=str(films), out=str(tmp_path), name="x", size=32, arch="resnet18", weights="none", lr=1e30
    )
    with pytest.raises(
        TrainingError, match=r"the loss became (nan|inf) in epoch \d, batch \d+, at a learning rate of .*smaller --lr"
    ):
        train(config)
    assert not (tmp_path / "x" / "model.onnx").exists()
    assert not (tmp_path / "latest").exists()


def test_a_device_that_is_not_there_is_refused(films: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(UsageError, match="--device cuda: torch sees no CUDA device"):
        train(TrainConfig(data=str(films), out=str(tmp_path), device="cuda"))
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_keeps_the_last_epoch_and_says_how_to_go_on(films: Path, tmp_path: Path) -> None:
    command = [sys.executable, "cli.py", "train", str(films), "--out", str(tmp_path), "--name", "x", "--size", "32",
               "--epochs", "500", "--patience", "0", "--arch", "resnet18", "--weights", "none"]  # fmt: skip
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ}
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "x" / "history.csv").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.count("\n") == 1
    assert re.search(r"stopped by Ctrl-C after \d+ of 501 epochs; go on with train --resume \S+/x$", errors)
    kept = torch.load(tmp_path / "x" / "checkpoints" / "last.pth", weights_only=True)
    assert kept["history"][-1]["epoch"] >= 1
    assert not (tmp_path / "x" / "manifest.json").exists()


def test_folds_make_one_network_of_all_and_measure_every_film_outside_of_the_test(films: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        data=str(films), out=str(tmp_path), arch="resnet18", weights="none", size=32, epochs=1, freeze_epochs=0,
        folds=2, batch_size=8, target_sensitivity=0.9, prevalence=(0.1,),
    )  # fmt: skip
    run, metrics = train(config)
    split = pd.read_csv(run / "split.csv")
    out_of_fold = pd.read_csv(run / "out_of_fold.csv")
    assert sorted(out_of_fold["path"]) == sorted(split.loc[split["split"] != "test", "path"])
    assert set(out_of_fold["fold"]) == {1, 2}
    found = json.loads((run / "cross_validation.json").read_text())
    assert found["n"] == len(out_of_fold)
    expected = roc_auc_score(out_of_fold["label"] == "abnormal", out_of_fold["p_abnormal"])
    assert found["metrics"]["auroc"]["value"] == pytest.approx(expected, abs=1e-12)
    assert found["metrics"]["sensitivity"]["value"] >= 0.9  # the threshold was chosen on these films
    assert pd.read_csv(run / "history.csv")["fold"].tolist() == [1, 2]
    assert metrics["operating_point"] == {"rule": "sensitivity", "target": 0.9}
    # The learner is that ensemble, and says what the two networks' mean says.
    predictor = Predictor(run)
    assert predictor.run(np.zeros((1, 32, 32), np.float32))["features"].shape == (1, 1024)
