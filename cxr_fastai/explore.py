"""Which learning rate: fastai's `lr_find` over several seeds, with the spread of its suggestions and a plot.

One run of `lr_find` on a few hundred films is noisy; the median over seeds is used, and the spread is shown.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.callback.schedule import LRFinder, minimum, slide, steep, valley
from fastai.learner import Learner

from cxr_fastai.config import TrainConfig
from cxr_fastai.console import QUIET, Console
from cxr_fastai.data import OpenFilm
from cxr_fastai.errors import TrainingError
from cxr_fastai.fitting import build_learner, choose_device
from cxr_fastai.runs import atomic_path
from cxr_fastai.training import prepare_table, read_all

SUGGESTIONS = {"valley": valley, "steep": steep, "minimum": minimum, "slide": slide}
COLOURS = {"valley": "#D55E00", "steep": "#009E73", "minimum": "#CC79A7", "slide": "#E69F00"}
MARKERS = {"valley": "o", "steep": "s", "minimum": "^", "slide": "D"}


def find_rate(
    config: TrainConfig, *, seeds: int, iterations: int, plot: Path, console: Console = QUIET
) -> dict[str, Any]:
    """Prepare the data of `config` and run `lr_find_seeds` on it: the verb `lr-find`."""
    table = prepare_table(config, console)
    device, opener = choose_device(config.device), OpenFilm(config.size)
    table = read_all(table, config, opener, console)
    return lr_find_seeds(table, config, opener, device, seeds=seeds, iterations=iterations, plot=plot, console=console)


def lr_find_seeds(
    table: pd.DataFrame,
    config: TrainConfig,
    opener: OpenFilm,
    device: torch.device,
    *,
    seeds: int,
    iterations: int,
    plot: Path,
    console: Console = QUIET,
) -> dict[str, Any]:
    """Run fastai's `lr_find` once a seed, from the same start, say what it suggests and draw it.

    Returns
    -------
    dict
        {"suggestions": {name: {"median", "low", "high"}}, "plot": path}; low and high are the extremes over seeds.
        A method that found nothing in any run is left out.

    Raises
    ------
    TrainingError
        Where no method could suggest a rate.
    """
    runs = []
    with console.progress("lr-find batches", seeds * iterations) as advance:
        for seed in range(config.seed, config.seed + seeds):
            learn = build_learner(table, dataclasses.replace(config, seed=seed), opener, device)[0]
            runs.append(one_run(learn, iterations, advance))
    summary = {}
    for name in SUGGESTIONS:
        if rates := [rate for run in runs if (rate := suggest(name, *run)) is not None]:
            summary[name] = {"median": float(np.median(rates)), "low": min(rates), "high": max(rates)}
            console.say(
                f"{name:<8} {np.median(rates):.1e}   {min(rates):.1e} to {max(rates):.1e} over {len(rates)} seed(s)"
            )
    if not summary:
        raise TrainingError("lr-find: no learning rate lowered the loss; give more --iterations or more films")
    with atomic_path(plot) as temporary:
        draw(runs, summary).savefig(temporary, format="png")
    console.say(f"Plot: {plot}")
    return {"suggestions": summary, "plot": str(plot)}


def chosen_rate(found: dict[str, Any]) -> float:
    """Return the rate that `train --lr auto` uses: the valley's median, fastai's own default, else the first found."""
    suggestions = found["suggestions"]
    return suggestions.get("valley", next(iter(suggestions.values())))["median"]


def one_run(learn: Learner, iterations: int, advance) -> tuple[np.ndarray, np.ndarray]:
    """Train with growing rates and return rates and smoothed losses, one a step; the learner stays as it was."""
    from fastai.callback.core import Callback

    class Advance(Callback):
        def after_batch(self) -> None:
            advance()

    epochs = iterations // max(1, len(learn.dls.train)) + 1
    path, model_dir = learn.path, learn.model_dir
    with tempfile.TemporaryDirectory() as folder:
        learn.path, learn.model_dir = Path(folder), "."
        try:
            with learn.no_bar(), learn.no_logging():
                learn.fit(epochs, cbs=[LRFinder(num_it=iterations), Advance()])
        finally:
            learn.path, learn.model_dir = path, model_dir
    losses = np.array([float(loss) for loss in learn.recorder.losses])
    rates = np.array(learn.recorder.lrs[: len(losses)])
    finite = int(np.argmin(np.isfinite(losses))) if not np.isfinite(losses).all() else len(losses)
    return rates[:finite], losses[:finite]


def suggest(name: str, rates: np.ndarray, losses: np.ndarray) -> float | None:
    """Return the rate that one of fastai's methods suggests, or None where it finds none.

    As fastai's own `lr_find` does, the first tenth (warm-up of the smoothed loss) and the last five steps are cut.
    """
    cut = slice(len(rates) // 10, -5)
    rates, losses = rates[cut], losses[cut]
    if len(rates) < 20:
        return None
    try:
        rate = float(SUGGESTIONS[name](torch.tensor(rates), torch.tensor(losses), len(rates))[0])
    except (IndexError, ValueError, ZeroDivisionError):
        return None
    return rate if np.isfinite(rate) and rate > 0 else None


def draw(runs: list[tuple[np.ndarray, np.ndarray]], summary: dict[str, dict[str, float]]):
    """Return the figure: loss against learning rate, a line a seed, each suggestion with its spread."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained", dpi=110)
    axes = figure.subplots()
    for i, (rates, losses) in enumerate(runs):
        axes.plot(rates[:-5], losses[:-5], color="0.45", lw=1.2, alpha=0.8, label="one seed each" if i == 0 else None)
    grid = np.concatenate([losses[:-5] for _, losses in runs])
    bottom, top = np.nanmin(grid), np.nanpercentile(grid, 95)
    for i, (name, s) in enumerate(summary.items()):
        colour, height = COLOURS[name], bottom - (i + 1) * 0.06 * (top - bottom)
        axes.axvline(s["median"], color=colour, lw=1, alpha=0.5)
        axes.plot([s["low"], s["high"]], [height, height], color=colour, lw=2)
        axes.plot(
            s["median"],
            height,
            MARKERS[name],
            color=colour,
            label=f"{name} {s['median']:.1e} ({s['low']:.1e} to {s['high']:.1e})",
        )
    axes.set(xscale="log", xlabel="learning rate (logarithmic)", ylabel="smoothed training loss (nats)")
    axes.set_ylim(bottom - 0.35 * (top - bottom), top + 0.15 * (top - bottom))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return figure
