"""Run folder -> history.png, report.html (one self-contained file) and MODEL_CARD.md.

For a reader who was not there: what data, how split, how trained, how good with which interval, where it fails. All
numbers are those of the run's own files; nothing is computed here but the curves of predictions.csv.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxr_fastai.predict import Prediction, Predictor
from cxr_fastai.report.films import choose_films, shown_film
from cxr_fastai.report.plots import data_uri, plot_history, plot_precision_recall, plot_reliability, plot_roc, png_uri
from cxr_fastai.runs import atomic_path, read_cells, write_text
from cxr_fastai.table import targets_of

TEMPLATES = Path(__file__).parents[1] / "templates"
METRIC_NAMES = {
    "auroc": "AUROC",
    "accuracy": "accuracy",
    "sensitivity": "sensitivity (recall)",
    "specificity": "specificity",
    "precision": "precision",
    "f1": "F1",
    "average_precision": "average precision",
    "brier": "Brier score",
    "calibration_error": "calibration error",
}
OPTIONAL = ("audit", "evidence", "too_good", "cross_validation")


def shown_metrics(metrics: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return name, value, 95 % interval and n of each metric as text, in the order for people."""
    found = metrics["metrics"]
    return [
        (name, _number(found[key]["value"]), _interval(found[key]), str(found[key]["n"]))
        for key, name in METRIC_NAMES.items()
        if key in found
    ]


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _interval(entry: dict[str, Any]) -> str:
    return "undefined" if entry["low"] is None else f"{entry['low']:.3f} to {entry['high']:.3f}"


def _brief(entry: dict[str, Any] | None) -> str:
    """Return a value with its interval in one cell."""
    if entry is None or entry["value"] is None:
        return "–"
    return (
        f"{entry['value']:.2f} ({entry['low']:.2f}–{entry['high']:.2f})"
        if entry["low"] is not None
        else f"{entry['value']:.2f}"
    )


def write_history_plot(run: Path) -> None:
    """Draw history.csv of a run as history.png."""
    with atomic_path(run / "history.png") as temporary:
        plot_history(pd.read_csv(run / "history.csv")).savefig(temporary, format="png")


def write_report(run: Path, predictor: Predictor, table: pd.DataFrame, rows: Sequence[Prediction]) -> None:
    """Write report.html: everything in one file, nothing fetched when it opens."""
    import jinja2

    facts = read_run(run)
    films = {kind: [shown_film(predictor, row, truth) for row, truth in chosen]
             for kind, chosen in choose_films(table, rows, predictor).items()}  # fmt: skip
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    environment.filters |= {"number": _number, "interval": _interval, "brief": _brief}
    lr_find = run / "lr_find.png"
    text = environment.get_template("report.html").render(
        **facts,
        name=run.name,
        card=predictor.card,
        alarms=alarms(facts),
        shown=shown_metrics(facts["metrics"]),
        plots=draw_plots(run, facts["metrics"], predictor.card),
        films=films,
        history=read_cells(run / "history.csv"),
        lr_find=png_uri(lr_find.read_bytes()) if lr_find.exists() else None,
        metric_names=METRIC_NAMES,
    )
    write_text(run / "report.html", text)


def read_run(run: Path) -> dict[str, Any]:
    """Return metrics, record (config.json), those of `OPTIONAL` that are there, and what was planted in the data."""
    facts: dict[str, Any] = {name: _json(run / f"{name}.json") for name in ("metrics", *OPTIONAL)}
    record = facts["record"] = _json(run / "config.json")
    split = read_cells(run / "split.csv")
    facts["splits"] = split.groupby("split").agg(films=("path", "size"), patients=("patient_id", "nunique"))
    dataset = _json(Path(record["config"]["data"]) / "dataset.json") or {}
    facts["planted"] = [{**p, "n": len(p.get("paths", []))} for p in dataset.get("planted", [])]
    return facts


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def alarms(facts: dict[str, Any]) -> list[str]:
    """Return what a reader must know before any figure, worst first, a sentence each."""
    metrics, record = facts["metrics"], facts["record"]
    findings = (facts["audit"] or {}).get("findings", [])
    found = []
    if record["config"].get("allow_leaks") and any("across-splits" in f["kind"] for f in findings):
        found.append(
            "The split leaks, and training was allowed all the same (--allow-leaks): the figures are too good."
        )
    found += [f"Audit: {f['detail']}." for f in findings if f["severity"] == "error"]
    if facts["too_good"]:
        alarm = facts["too_good"]
        found.append(f"A test AUROC of {alarm['auroc']:.3f} is too good to be believed unasked: {alarm['detail']}.")
    if metrics["errors"]:
        found.append(f"{metrics['errors']} test films could not be read and are in no number here.")
    if record["synthetic"]:
        found.append("The films are synthetic: every figure is about phantoms, none about patients.")
    found += [f"Audit: {f['detail']}." for f in findings if f["severity"] == "warning"]
    return found


def draw_plots(run: Path, metrics: dict[str, Any], card: dict[str, Any]) -> dict[str, str]:
    """Return ROC, precision-recall, reliability and history as data URIs; curves that are not defined are left out."""
    frame = read_cells(run / "predictions.csv")
    frame = frame[frame["error"] == ""]
    classes, task = card["classes"], card["task"]
    names = [card["positive"]] if task == "binary" else classes
    truth = targets_of(frame, classes) if task == "multilabel" else None
    curves = []
    for name in names:
        y = (frame["label"] == name).to_numpy(float) if truth is None else truth[:, classes.index(name)]
        known = ~np.isnan(y)
        if 0 < y[known].sum() < known.sum():
            p = frame[f"p_{name}"].to_numpy(float)
            curves.append((name, y[known], p[known], frame["patient_id"].to_numpy()[known]))
    calls = None
    if task == "binary" and metrics["metrics"]["specificity"]["value"] is not None:
        calls = (1 - metrics["metrics"]["specificity"]["value"], metrics["metrics"]["sensitivity"]["value"])
    drawn = {"history": png_uri((run / "history.png").read_bytes())}
    if curves:
        drawn["roc"] = data_uri(plot_roc(curves, calls if calls and calls[1] is not None else None))
        drawn["precision_recall"] = data_uri(plot_precision_recall(curves))
    if metrics.get("reliability"):
        drawn["reliability"] = data_uri(plot_reliability(metrics["reliability"]))
    return drawn


def write_model_card(run: Path) -> None:
    """Write MODEL_CARD.md: the sections of Mitchell et al. (2019) and what a run can answer of the CLAIM checklist."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "interval": _interval, "brief": _brief, "json": json.dumps}
    facts = read_run(run)
    text = environment.get_template("model_card.md").render(
        **facts, name=run.name, card=Predictor(run / "model.onnx").card, shown=shown_metrics(facts["metrics"]),
        alarms=alarms(facts),
    )  # fmt: skip
    write_text(run / "MODEL_CARD.md", text)
