"""Predictor + labelled table -> predictions.csv and metrics.json: the numbers of the file that is handed over.

The films go through model.onnx exactly as `predict` sends them, so that the figures are those of the shipped
model and not of a network in memory.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxr_fastai.console import QUIET, Console
from cxr_fastai.errors import DataError
from cxr_fastai.metrics import evaluate_predictions
from cxr_fastai.predict import Prediction, Predictor
from cxr_fastai.runs import find_run, safe_cell, write_text
from cxr_fastai.sources import TARGET
from cxr_fastai.table import load_table, targets_of, told_of


def evaluate_table(
    predictor: Predictor, table: pd.DataFrame, *, split: str, run: str, console: Console = QUIET
) -> tuple[list[Prediction], dict[str, Any]]:
    """Predict every film of a labelled table and return the rows and the content of metrics.json.

    Films that cannot be read are rows with `error`; they are left out of the numbers and counted in `errors`. Of a
    table with columns `y_<finding>` (see `table.py`) each finding is measured on the films where it is surely known;
    the model's findings that the table does not know are not measured.

    Raises
    ------
    DataError
        Where a label of the table is none of the model's classes, or no film could be read.
    """
    card = predictor.card
    truth = _truth(table, predictor.classes, card["task"], console)
    with console.progress("Testing", len(table)) as advance:
        rows = []
        for row in predictor.predict(table["path"]):
            rows.append(row)
            advance()
    good = np.array([row.error is None for row in rows])
    if not good.any():
        raise DataError(f"none of the {len(rows)} films could be read; the first: {rows[0].error}")
    truth = truth[good]
    found = evaluate_predictions(
        truth if card["task"] == "multilabel" else truth.argmax(1),
        np.array([[row.probabilities[c] for c in predictor.classes] for row in rows if row.error is None]),
        predictor.classes,
        table["patient_id"].to_numpy()[good],
        task=card["task"],
        positive=card["positive"],
        threshold=card["threshold"],
    )
    head = {"run": run, "split": split, **found, "errors": int((~good).sum()), "threshold": card["threshold"]}
    return rows, {**head, "positive": card["positive"], "temperature": card["temperature"]}


def _truth(table: pd.DataFrame, classes: list[str], task: str, console: Console) -> np.ndarray:
    """Return what the table says of the model's classes, (n, k) of 1, 0 and NaN (unknown)."""
    listed = ", ".join(sorted(classes))
    if task == "multilabel" and (known := set(told_of(table))):
        if not known & set(classes):
            raise DataError(f"no finding of the data ({', '.join(sorted(known))}) is one of the model's ({listed})")
        for names, why in ((set(classes) - known, "the data do not tell"), (known - set(classes), "not the model's")):
            if names:
                console.say(f"not measured ({why}): {', '.join(sorted(names))}")
        return targets_of(table, classes)
    labels = [label.split("|") if task == "multilabel" else [label] for label in table["label"]]
    nothing = {""} if task == "multilabel" else set()
    if strange := sorted({name for names in labels for name in names} - set(classes) - nothing):
        raise DataError(f"label {strange[0]!r} is none of the model's classes ({listed}); rename it")
    return np.array([[name in names for name in classes] for names in labels], dtype=float)


def predictions_csv(table: pd.DataFrame, rows: list[Prediction], classes: list[str]) -> str:
    """Return predictions.csv: the table's truth beside what the model said, one row a film."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    kept = [c for c in table.columns if c in ("findings", "view", "age", "sex") or c.startswith(TARGET)]
    writer.writerow(
        [
            "path",
            "patient_id",
            "label",
            "predicted",
            "probability",
            *(f"p_{c}" for c in classes),
            *kept,
            "flags",
            "error",
        ]
    )
    for (_, truth), row in zip(table.iterrows(), rows, strict=True):
        numbers = [row.probability, *(row.probabilities.get(c) for c in classes)]
        cells = [row.path, truth["patient_id"], truth["label"], row.label, *numbers, *(truth[c] for c in kept)]
        writer.writerow([safe_cell(c) for c in (*cells, " ".join(row.flags), row.error)])
    return text.getvalue()


def evaluate_run(run: str, data: str | None, out: str | None, console: Console = QUIET) -> dict[str, Any]:
    """Test a finished run again on its own test films, or on all films of another labelled folder or CSV.

    Parameters
    ----------
    run
        Run folder, such as exports/latest. data: None is the run's own test split.
    out
        Folder for predictions.csv and metrics.json; None writes nothing.
    """
    folder = find_run(run)
    predictor = Predictor(folder)
    if data is None:
        table = pd.read_csv(folder / "split.csv", dtype=str, keep_default_na=False)
        table, split = table[table["split"] == "test"].reset_index(drop=True), "test"
    else:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
        table = load_table(data, task=predictor.card["task"], hash_ids=record.get("hash_ids", False))
        for note in table.attrs["notes"]:
            console.say(note)
        split = str(data)
    rows, metrics = evaluate_table(predictor, table, split=split, run=str(run), console=console)
    if out is not None:
        write_text(Path(out) / "predictions.csv", predictions_csv(table, rows, predictor.classes))
        write_text(Path(out) / "metrics.json", json.dumps(metrics, indent=1))
    return metrics
