"""The figures of a report, as matplotlib figures and as PNG data URIs.

The colours are those of Okabe and Ito (2008), which the usual kinds of colour blindness keep apart; lines differ in
their dashes or markers, too.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from cxr_fastai.metrics import resample_weights

BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY, "#000000")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LONG_NAME = 30  # characters; of longer ones, one a line of the legend
RESAMPLES = 300  # of the band around a ROC curve
GRID = np.linspace(0, 1, 101)


def figure(width: float = 4.6, height: float = 4.2):
    """Return an empty figure with one pair of axes, without the lines that say nothing."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained", dpi=130)
    axes = made.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return made, axes


def data_uri(made) -> str:
    """Return a figure as a PNG in a data URI."""
    stream = io.BytesIO()
    made.savefig(stream, format="png")
    return png_uri(stream.getvalue())


def png_uri(png: bytes) -> str:
    """Return a PNG as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def plot_history(history: pd.DataFrame):
    """Return loss and accuracy of training and validation against epoch, as in the paper, and validation AUROC."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(9, 3.6), layout="constrained", dpi=110)
    left, right = made.subplots(1, 2)
    folds = list(history.groupby("fold")) if "fold" in history else [(None, history)]
    for number, (_, part) in enumerate(folds):
        faint = {"alpha": 0.6, "markersize": 4} if len(folds) > 1 else {}
        named = number == 0
        left.plot(part["epoch"], part["train_loss"], "o-", color=BLUE, label="training" if named else None, **faint)
        left.plot(
            part["epoch"], part["valid_loss"], "s--", color=ORANGE, label="validation" if named else None, **faint
        )
        for column, style, colour, label in (
            ("train_accuracy", "o-", BLUE, "training accuracy"),
            ("valid_accuracy", "s--", ORANGE, "validation accuracy"),
            ("valid_auroc", "^:", GREEN, "validation AUROC"),
        ):
            right.plot(part["epoch"], part[column], style, color=colour, label=label if named else None, **faint)
    left.set_ylabel("loss (cross-entropy, nats)")
    right.set_ylabel("share of films, or AUROC")
    right.set_ylim(0, 1.04)
    frozen = int((folds[0][1]["phase"] == "frozen").sum())
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if frozen:
            axes.axvline(frozen + 0.5, color="0.6", lw=1)
            above = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center"}
            axes.annotate("unfrozen", (frozen + 0.5, 1), (0, 2), color="0.4", **above)
        axes.legend(frameon=False, fontsize=9)
    return made


def plot_histories(histories: dict[str, pd.DataFrame], note: str = ""):
    """Return validation AUROC and loss of several runs against epoch, a line a run; of folds, their mean.

    Parameters
    ----------
    histories
        history.csv of each run, by its name.
    note
        What a reader must know before comparing the lines; stands above them.
    """
    from matplotlib.figure import Figure

    columns = 3 if max(map(len, histories)) <= LONG_NAME else 1
    rows = -(-len(histories) // columns)
    made = Figure(figsize=(9, 3.8 + 0.2 * rows), layout="constrained", dpi=110)
    panels = made.subplots(1, 2)
    for i, (name, history) in enumerate(histories.items()):
        mean = history.groupby("epoch")[["valid_auroc", "valid_loss"]].mean()
        # With more runs than colours, the dashes and markers of the second round differ.
        style = {"color": CYCLE[i % 7], "ls": DASHES[(i // 7 + i) % 4], "marker": MARKERS[(i + i // 7) % 7], "ms": 5}
        for axes, column in zip(panels, mean, strict=True):
            axes.plot(mean.index, mean[column], **style, alpha=0.9, label=name if axes is panels[0] else None)
    panels[0].set_ylabel("validation AUROC")
    panels[1].set_ylabel("validation loss (cross-entropy, nats)")
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.margins(x=0.04, y=0.06)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if note:
        made.suptitle(note, fontsize=10, color="0.3")
    made.legend(loc="outside lower center", ncols=min(columns, len(histories)), frameon=False, fontsize=9)
    return made


def roc_points(y: np.ndarray, p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the sensitivity at each false positive rate of `GRID`, (b, 101), for weights (b, n)."""
    order = np.argsort(-p, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(p[order])), len(p) - 1)
    y, weights = y[order], weights[:, order]
    rates = [np.cumsum(weights * side, axis=1)[:, ends] for side in (y, 1 - y)]
    with np.errstate(invalid="ignore"):
        true, false = (np.pad(rate / rate[:, -1:], ((0, 0), (1, 0))) for rate in rates)
    return np.stack([np.interp(GRID, f, t) for f, t in zip(false, true, strict=True)])


def plot_roc(
    curves: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]], calls: tuple[float, float] | None = None
):
    """Return ROC curves; of a single one with its 95 % band over patients.

    Parameters
    ----------
    curves
        (name, y (n,) of 0 and 1, p (n,), patients (n,)) each.
    calls
        False positive rate and sensitivity at the threshold, marked.
    """
    made, axes = figure()
    for i, (name, y, p, ids) in enumerate(curves):
        curve = roc_points(y, p, np.ones((1, len(y))))[0]
        if len(curves) == 1:
            blocks = [roc_points(y, p, w) for w in resample_weights(ids, RESAMPLES)]
            low, high = np.nanpercentile(np.concatenate(blocks), [2.5, 97.5], axis=0)
            axes.fill_between(GRID, low, high, color=CYCLE[0], alpha=0.18, lw=0, label="95 % band, over patients")
        axes.plot(np.r_[0, GRID], np.r_[0, curve], DASHES[i % 4], color=CYCLE[i % 7], label=name)
    axes.plot([0, 1], [0, 1], color="0.6", lw=1, ls=":", label="chance")
    if calls:
        axes.plot(*calls, "D", color=ORANGE, label="threshold chosen on validation", zorder=5)
    axes.set(
        xlabel="false positive rate (1 - specificity)", ylabel="sensitivity", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02)
    )
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return made


def plot_precision_recall(curves: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]]):
    """Return precision-recall curves with the share of positives, which is what chance reaches; as `plot_roc`."""
    from sklearn.metrics import precision_recall_curve

    made, axes = figure()
    for i, (name, y, p, _) in enumerate(curves):
        precision, recall, _ = precision_recall_curve(y, p)
        axes.step(recall, precision, DASHES[i % 4], where="post", color=CYCLE[i % 7], label=name)
        axes.axhline(y.mean(), color=CYCLE[i % 7], lw=1, ls=":", label="chance" if len(curves) == 1 else None)
    axes.set(xlabel="recall (sensitivity)", ylabel="precision", xlim=(-0.02, 1.02), ylim=(0, 1.03))
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    return made


def plot_reliability(bins_of: dict[str, list[dict[str, Any]]]):
    """Return frequency against probability, with Wilson's intervals; on the diagonal a probability can be believed."""
    made, axes = figure()
    axes.plot([0, 1], [0, 1], color="0.6", lw=1, ls=":", label="perfect")
    for i, (name, bins) in enumerate(bins_of.items()):
        mean, observed = (np.array([b[key] for b in bins]) for key in ("mean", "observed"))
        low, high = (np.array([b[key] for b in bins]) for key in ("observed_low", "observed_high"))
        bars = np.clip([observed - low, high - observed], 0, None)
        shown = {"yerr": bars} if len(bins_of) == 1 else {}
        axes.errorbar(
            mean, observed, fmt="o", color=CYCLE[i % 7], ls=DASHES[i % 4], ms=4, capsize=3, label=name, **shown
        )
        if len(bins_of) == 1:
            for b in bins:
                axes.annotate(f"{b['n']}", (b["mean"], b["observed"]), (5, -11), textcoords="offset points", fontsize=7)
    axes.set(
        xlabel="probability that the model gives",
        ylabel="share of films with it",
        xlim=(-0.03, 1.06),
        ylim=(-0.06, 1.03),
    )
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return made
