"""Run folder -> history.png, report.html (one self-contained file) and MODEL_CARD.md.

For a reader who was not there: what data, how split, how trained, how good with which interval, where it fails.
Plots use the colours of Okabe and Ito (2008), which the usual kinds of colour blindness keep apart.
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pandas as pd

from cxr_fastai.images import read_radiograph, resize
from cxr_fastai.predict import Prediction, Predictor, overlay
from cxr_fastai.runs import atomic_path, write_text

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
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
FILMS_SHOWN = 8
TEMPLATES = Path(__file__).with_name("templates")
PAGE = Template((TEMPLATES / "report.html").read_text(encoding="utf-8"))
MODEL_CARD = Template((TEMPLATES / "model_card.md").read_text(encoding="utf-8"))


def shown_metrics(metrics: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return name, value, 95 % interval and n of each metric as text, in the order for people."""
    rows = []
    for key, name in METRIC_NAMES.items():
        if (entry := metrics["metrics"].get(key)) is None:
            continue
        value, low, high = (
            ("undefined" if v is None else f"{v:.3f}") for v in (entry["value"], entry["low"], entry["high"])
        )
        interval = "undefined" if entry["low"] is None else f"{low} to {high}"
        rows.append((name, value, interval, str(entry["n"])))
    return rows


def plot_history(history: pd.DataFrame):
    """Return a figure: loss and accuracy of training and validation against epoch, as in the paper, and AUROC."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2)
    epoch = history["epoch"]
    left.plot(epoch, history["train_loss"], "o-", color=BLUE, label="training")
    left.plot(epoch, history["valid_loss"], "s--", color=ORANGE, label="validation")
    left.set_ylabel("loss (cross-entropy, nats)")
    right.plot(epoch, history["train_accuracy"], "o-", color=BLUE, label="training accuracy")
    right.plot(epoch, history["valid_accuracy"], "s--", color=ORANGE, label="validation accuracy")
    right.plot(epoch, history["valid_auroc"], "^:", color=GREEN, label="validation AUROC")
    right.set_ylabel("share of films, or AUROC")
    right.set_ylim(0, 1.02)
    frozen = int((history["phase"] == "frozen").sum())
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if frozen:
            axes.axvline(frozen + 0.5, color="0.6", lw=1)
            axes.annotate(
                "unfrozen",
                (frozen + 0.5, 1),
                (4, -4),
                ("data", "axes fraction"),
                "offset points",
                va="top",
                color="0.4",
            )
        axes.legend(frameon=False, fontsize=9)
    return figure


def write_history_plot(run: Path) -> None:
    """Draw history.csv of a run as history.png."""
    with atomic_path(run / "history.png") as temporary:
        plot_history(pd.read_csv(run / "history.csv")).savefig(temporary, format="png")


def write_report(run: Path, predictor: Predictor, table: pd.DataFrame, rows: Sequence[Prediction]) -> None:
    """Write report.html: everything in one file, nothing fetched when it opens."""
    metrics, record = (json.loads((run / name).read_text(encoding="utf-8")) for name in ("metrics.json", "config.json"))
    figures = "".join(_film(predictor, row, truth) for row, truth in choose_films(table, rows, predictor))
    page = PAGE.substitute(
        title=html.escape(f"{run.name}: {', '.join(predictor.classes)}"),
        summary=_summary(metrics, record),
        metrics=_table(("measure", "value", "95 % interval", "films"), shown_metrics(metrics)),
        confusion=_confusion(metrics),
        history=_image((run / "history.png").read_bytes(), "loss and accuracy against epoch"),
        epochs=_table(*_history_rows(run)),
        films=figures,
        settings=_table(("setting", "value"), [(k, str(v)) for k, v in record["config"].items()]),
        versions=_table(("software", "version"), [*record["versions"].items(), ("device", record["device"])]),
    )
    write_text(run / "report.html", page)


def _history_rows(run: Path) -> tuple[list[str], list[list[str]]]:
    history = pd.read_csv(run / "history.csv", dtype=str, keep_default_na=False)
    return list(history.columns), history.to_numpy().tolist()


def _summary(metrics: dict[str, Any], record: dict[str, Any]) -> str:
    lines = [
        f"Tested on <b>{metrics['n']} films of {metrics['n_patients']} patients</b> that no choice in training "
        "looked at; no patient stands on two sides of the split.",
        _auroc_line(metrics["metrics"]["auroc"]),
        f"Data: {html.escape(record['config']['data'])}; patients from {html.escape(str(record['patients_from']))}.",
    ]
    if isinstance(metrics["threshold"], float):
        lines.append(
            f"Operating threshold on the probability of {html.escape(metrics['positive'])}: "
            f"{metrics['threshold']:.3f}, chosen on the validation films (Youden); "
            f"temperature {metrics['temperature']:.2f}."
        )
    if metrics["errors"]:
        lines.append(f"<b>{metrics['errors']} test films could not be read</b> and are in no number here.")
    return "".join(f"<p>{line}</p>" for line in lines)


def _auroc_line(auroc: dict[str, Any]) -> str:
    if auroc["value"] is None:
        return "AUROC undefined: the test films are of one class."
    interval = f"{auroc['low']:.3f} to {auroc['high']:.3f}"
    return f"AUROC <b>{auroc['value']:.3f}</b> (95 % interval {interval}, by a bootstrap over patients)."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th scope=col>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _confusion(metrics: dict[str, Any]) -> str:
    classes, counts = metrics["classes"], metrics["confusion"]
    if isinstance(counts[0][0], list):  # multi-label: one 2×2 table a finding
        rows = [(name, *(str(n) for line in table for n in line)) for name, table in zip(classes, counts, strict=True)]
        return _table(("finding", "true negative", "false positive", "false negative", "true positive"), rows)
    rows = [(name, *map(str, line)) for name, line in zip(classes, counts, strict=True)]
    return _table(("truth \\ said", *classes), rows)


def choose_films(table: pd.DataFrame, rows: Sequence[Prediction], predictor: Predictor) -> list[tuple[Prediction, str]]:
    """Return the films to show with their truth: the surest errors first, then the surest right ones."""
    read = [(row, truth) for row, truth in zip(rows, table["label"], strict=True) if row.error is None]
    sure = sorted(read, key=lambda pair: -_sureness(pair[0], predictor))
    wrong = [pair for pair in sure if pair[0].label != pair[1]][: FILMS_SHOWN // 2]
    right = [pair for pair in sure if pair[0].label == pair[1]]
    positive = [pair for pair in right if pair[1] == predictor.card["positive"]] or right
    return [*wrong, *positive[: FILMS_SHOWN - len(wrong)]]


def _sureness(row: Prediction, predictor: Predictor) -> float:
    if isinstance(row.threshold, float) and row.probability is not None:
        return abs(row.probability - row.threshold)
    return float(np.max(list(row.probabilities.values())))


def _film(predictor: Predictor, row: Prediction, truth: str) -> str:
    pixels = resize(read_radiograph(row.path), 320)
    picture = overlay(pixels, predictor.evidence_shown(row))
    verdict = "right" if row.label == truth else "wrong"
    name = html.escape(Path(row.path).name)
    said, true = (html.escape(label or "no finding") for label in (row.label, truth))
    text = f"{name}<br>said {said} ({row.probability:.2f}), truth {true}: {verdict}"
    pair = _image(_png(np.round(pixels * 255).astype(np.uint8)), f"film {name}") + _image(
        _png(picture), f"evidence on {name}"
    )
    return f"<figure class={verdict}><div class=pair>{pair}</div><figcaption>{text}</figcaption></figure>"


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _image(png: bytes, alt: str) -> str:
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def write_model_card(run: Path) -> None:
    """Write MODEL_CARD.md: what the model is for and not for, its data, its figures and its limits."""
    metrics, record = (json.loads((run / name).read_text(encoding="utf-8")) for name in ("metrics.json", "config.json"))
    card = Predictor(run / "model.onnx").card
    text = MODEL_CARD.substitute(
        name=run.name,
        **{key: card[key] for key in ("arch", "size", "task", "weights")},
        classes=", ".join(card["classes"]),
        threshold=json.dumps(card["threshold"]),
        temperature=f"{card['temperature']:.3f}",
        films=card["data"]["films"],
        fingerprint=card["data"]["fingerprint"],
        fastai=record["versions"]["fastai"],
        torch=record["versions"]["torch"],
        seed=record["config"]["seed"],
        data=record["config"]["data"],
        patients_from=record["patients_from"],
        n=metrics["n"],
        n_patients=metrics["n_patients"],
        figures="\n".join(f"| {' | '.join(row)} |" for row in shown_metrics(metrics)),
        synthetic="The films are synthetic: the figures hold for phantoms only." if record["synthetic"] else "",
    )
    write_text(run / "MODEL_CARD.md", text)
