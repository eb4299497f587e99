"""Predictor + labelled table -> predictions.csv and metrics.json: the numbers of the file that is handed over.

The films go through model.onnx exactly as `predict` sends them, so that the figures are those of the shipped
model and not of a network in memory. All of metrics.json comes from `measure`, and that from predictions.csv alone,
so that anyone who has the file can get the same figures to the last digit.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxr_fastai.console import QUIET, Console
from cxr_fastai.errors import DataError, UsageError
from cxr_fastai.metrics import evaluate_predictions, predictive_values, reliability, subgroups
from cxr_fastai.predict import Prediction, Predictor
from cxr_fastai.runs import find_run, read_cells, safe_cell, write_text
from cxr_fastai.sources import TARGET
from cxr_fastai.table import load_table, targets_of, told_of

GROUPS = ("view", "age", "sex", "source")
ABOUT = ("findings", "view", "age", "sex", "source", "fold")  # columns of a table that predictions.csv keeps


def predict_table(predictor: Predictor, table: pd.DataFrame, console: Console = QUIET) -> list[Prediction]:
    """Predict every film of a labelled table, a row each; films that cannot be read are rows with `error`.

    Raises
    ------
    DataError
        Where a label of the table is none of the model's classes, or no film could be read.
    """
    check_labels(table, predictor.classes, predictor.card["task"], console)
    rows = []
    with console.progress("Testing", len(table)) as advance:
        for row in predictor.predict(table["path"]):
            rows.append(row)
            advance()
    if all(row.error is not None for row in rows):
        raise DataError(f"none of the {len(rows)} films could be read; the first: {rows[0].error}")
    return rows


def check_labels(table: pd.DataFrame, classes: list[str], task: str, console: Console = QUIET) -> None:
    """Refuse labels that are none of the model's classes, and say which findings cannot be measured."""
    told, listed = set(told_of(table)), ", ".join(sorted(classes))
    if task == "multilabel" and told:
        if not told & set(classes):
            raise DataError(
                f"no finding of the data ({', '.join(sorted(told))}) is one of the model's ({listed}); use --map"
            )
        for names, why in ((set(classes) - told, "the data do not tell"), (told - set(classes), "not the model's")):
            if names:
                console.say(f"not measured ({why}): {', '.join(sorted(names))}")
        return
    named = {name for label in table["label"] for name in (label.split("|") if task == "multilabel" else [label])}
    if strange := sorted(named - set(classes) - ({""} if task == "multilabel" else set())):
        raise DataError(
            f"label {strange[0]!r} is none of the model's classes ({listed}); rename it with --map "
            f"{strange[0]!r}=CLASS, or leave its films out with --map {strange[0]!r}="
        )


def measure(frame: pd.DataFrame, card: Mapping[str, Any], prevalence: Sequence[float] = ()) -> dict[str, Any]:
    """Compute all that stands in metrics.json, but for the names of the run and the split, from predictions.csv.

    Films with an error are left out of the numbers and counted in `errors`. Of a table with columns `y_<finding>`
    each finding is measured on the films where it is surely known; findings that it lacks are not measured.

    Parameters
    ----------
    frame
        predictions.csv as `runs.read_cells` reads it: text.
    card
        The model's: classes, task, positive, threshold, temperature.
    prevalence
        At which predictive values are told, besides that of the films.
    """
    classes, task, positive = card["classes"], card["task"], card["positive"]
    read = frame[frame["error"] == ""]
    truth, p, ids = answers(read, classes, task)
    asked: dict[str, Any] = {"task": task, "positive": positive, "threshold": card["threshold"]}
    found = evaluate_predictions(truth, p, classes, ids, **asked)
    columns = {name: read[name].tolist() for name in GROUPS if name in read}
    return {
        **found,
        "errors": len(frame) - len(read),
        "threshold": card["threshold"],
        "operating_point": card.get("operating_point", {"rule": "youden", "target": None}),
        "positive": positive,
        "temperature": card["temperature"],
        **_by_class(truth, p, ids, card, prevalence),
        "subgroups": subgroups(truth, p, classes, ids, columns, **asked),
    }


def answers(read: pd.DataFrame, classes: Sequence[str], task: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels as `metrics` takes them, probabilities (n, k) and patients (n,) of rows of predictions.csv."""
    multilabel = task == "multilabel"
    at = {name: k for k, name in enumerate(classes)}
    truth = targets_of(read, classes) if multilabel else np.array([at[label] for label in read["label"]])
    return truth, read[[f"p_{name}" for name in classes]].to_numpy(dtype=float), read["patient_id"].to_numpy()


def _by_class(
    truth: np.ndarray, p: np.ndarray, ids: np.ndarray, card: Mapping[str, Any], prevalence: Sequence[float]
) -> dict[str, Any]:
    """Return reliability and predictive values: of the positive class, or (unless binary) of each class by name."""
    classes, task = card["classes"], card["task"]
    bins, values = {}, {}
    for k, name in enumerate(classes):
        if task == "binary" and name != card["positive"]:
            continue
        y = truth[:, k] if task == "multilabel" else (truth == k).astype(float)
        cut = card["threshold"][name] if task == "multilabel" else card["threshold"]
        called = p.argmax(axis=1) == k if task == "multiclass" else p[:, k] >= cut
        own = float(np.nanmean(y)) if not np.isnan(y).all() else float("nan")
        bins[name] = reliability(y, p[:, k])
        values[name] = [predictive_values(y, called, ids, q) for q in (own, *prevalence) if 0 < q < 1]
    return {"reliability": bins, "predictive_values": values[card["positive"]] if task == "binary" else values}


def predictions_csv(table: pd.DataFrame, rows: Sequence[Prediction], classes: list[str]) -> str:
    """Return predictions.csv: the table's truth beside what the model said, one row a film."""
    kept = [c for c in table.columns if c in ABOUT or c.startswith(TARGET)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    first = ["path", "patient_id", "label", "predicted", "probability"]
    writer.writerow([*first, *(f"p_{c}" for c in classes), *kept, "flags", "error"])
    for (_, truth), row in zip(table.iterrows(), rows, strict=True):
        numbers = [row.probability, *(row.probabilities.get(c) for c in classes)]
        cells = [row.path, truth["patient_id"], truth["label"], row.label, *numbers, *(truth[c] for c in kept)]
        writer.writerow([safe_cell(c) for c in (*cells, " ".join(row.flags), row.error)])
    return text.getvalue()


def evaluate_run(
    run: str,
    data: str | None,
    out: str | None,
    console: Console = QUIET,
    *,
    mapping: Sequence[str] = (),
    prevalence: Sequence[float] = (),
) -> dict[str, Any]:
    """Test a finished run again on its own test films, or on all films of another labelled folder or CSV.

    Parameters
    ----------
    run
        Run folder, such as exports/latest. data: None is the run's own test split.
    out
        Folder for predictions.csv and metrics.json; None writes nothing.
    mapping
        What the labels of `data` are called by the model, "THEIRS=OURS" each; see `table.load_table`.
    prevalence
        At which predictive values are told, besides that of the films.
    """
    folder = find_run(run)
    predictor = Predictor(folder)
    if data is None:
        if mapping:
            raise UsageError("--map is about the labels of other films; name a folder or CSV file after the run")
        table = read_cells(folder / "split.csv")
        table, split = table[table["split"] == "test"].reset_index(drop=True), "test"
    else:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
        table = load_table(
            data,
            task=predictor.card["task"],
            hash_ids=record.get("hash_ids", False),
            mapping=read_mapping(mapping),
            classes=predictor.classes,
        )
        for note in table.attrs["notes"]:
            console.say(note)
        split = str(data)
    text = predictions_csv(table, predict_table(predictor, table, console), predictor.classes)
    found = measure(read_cells(io.StringIO(text)), predictor.card, prevalence)
    metrics = {"run": str(run), "split": split, **found}
    if out is not None:
        write_text(Path(out) / "predictions.csv", text)
        write_text(Path(out) / "metrics.json", json.dumps(metrics, indent=1))
    return metrics


def read_mapping(pairs: Sequence[str]) -> dict[str, str]:
    """Return what --map says, theirs -> ours; raise UsageError where it is not THEIRS=OURS."""
    for pair in pairs:
        if "=" not in pair:
            raise UsageError(f"--map {pair!r}: write THEIRS=OURS, such as 'Pneumonia=PNEUMONIA' or '*=abnormal'")
    return {theirs.strip(): ours.strip() for theirs, _, ours in (pair.partition("=") for pair in pairs)}
