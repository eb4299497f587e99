"""Which learning rate: fastai's `lr_find` over several seeds, with the spread of its suggestions and a plot.

One run of `lr_find` on a few hundred films is noisy; the median over seeds is used, the spread is shown, and seeds that
do not agree are warned of. The rate is sought for the phase in which it will be used: with pretrained weights that is
`fine_tune`'s first, which trains the new last layer; `unfrozen` seeks that of its second.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import LRFinder, SchedExp, minimum, slide, steep, valley
from fastai.learner import Learner

from cxr_fastai.checkpoint import chance_of, set_chance
from cxr_fastai.config import TrainConfig
from cxr_fastai.console import QUIET, Console
from cxr_fastai.data import OpenFilm
from cxr_fastai.errors import TrainingError
from cxr_fastai.fitting import FINE_TUNE, FROM_SCRATCH, FROZEN, build_learner, choose_device, kept, rate_spread
from cxr_fastai.model import LoadedWeights
from cxr_fastai.runs import atomic_path
from cxr_fastai.training import prepare_table, read_all

SUGGESTIONS = {"valley": valley, "steep": steep, "minimum": minimum, "slide": slide}
COLOURS = {"valley": "#D55E00", "steep": "#009E73", "minimum": "#CC79A7", "slide": "#E69F00"}
MARKERS = {"valley": "o", "steep": "s", "minimum": "^", "slide": "D"}
LOWEST, HIGHEST = 1e-7, 10.0  # rates that are tried, as fastai's lr_find does
DISAGREE = 5.0  # the factor between seeds from which on a suggestion is not to be trusted
Run = tuple[np.ndarray, np.ndarray]


def find_rate(
    config: TrainConfig, *, seeds: int, iterations: int, plot: Path, unfrozen: bool = False, console: Console = QUIET
) -> dict[str, Any]:
    """Prepare the data of `config` and run `lr_find_seeds` on it: the verb `lr-find`."""
    table = prepare_table(config, console)
    device, opener = choose_device(config.device), OpenFilm(config.size)
    table = read_all(table, config, opener, console)
    return lr_find_seeds(
        table, config, opener, device,
        seeds=seeds, iterations=iterations, plot=plot, unfrozen=unfrozen, console=console,
    )  # fmt: skip


def lr_find_seeds(
    table: pd.DataFrame,
    config: TrainConfig,
    opener: OpenFilm,
    device: torch.device,
    *,
    seeds: int,
    iterations: int,
    plot: Path | None = None,
    unfrozen: bool = False,
    console: Console = QUIET,
) -> dict[str, Any]:
    """Run fastai's `lr_find` once a seed, from the same start, say what it suggests and draw it.

    Returns
    -------
    dict
        {"suggestions": {name: {"median", "low", "high"}}, "plot": path, "suggested": {"lr", "method", "reason"},
        "phase": of the training}; low and high are the extremes over seeds. A method that found nothing in any run is
        left out.

    Raises
    ------
    TrainingError
        Where no method could suggest a rate.
    """
    runs: list[Run] = []
    with console.progress("lr-find batches", seeds * iterations) as advance:
        for seed in range(config.seed, config.seed + seeds):
            learn, weights, _ = build_learner(table, dataclasses.replace(config, seed=seed), opener, device)
            phase, lr_mult = phase_of(config, weights, unfrozen)
            run = one_run(
                learn, iterations, advance, frozen=phase == FROZEN, lr_mult=lr_mult, cbs=kept(weights, config)
            )
            runs.append(run)
    rates = {name: [r for run in runs if (r := suggest(name, *run)) is not None] for name in SUGGESTIONS}
    rates = {name: found for name, found in rates.items() if found}
    if not rates:
        raise TrainingError("lr-find: no learning rate lowered the loss; give more --iterations or more films")
    summary = {n: {"median": float(np.median(r)), "low": min(r), "high": max(r)} for n, r in rates.items()}
    for name, s in summary.items():
        over = f"over {len(rates[name])} of {seeds} seed(s)"
        console.say(f"{name:<8} {s['median']:.1e}   {s['low']:.1e} to {s['high']:.1e} {over}")
    suggested = suggested_rate(rates, seeds)
    console.say(f"suggested: {suggested['lr']:.1e} ({suggested['reason']})")
    halved = phase == FINE_TUNE and config.freeze_epochs > 0 and not weights.whole
    warn_of_doubts(suggested, summary[suggested["method"]], lr_mult, halved, console)
    if plot is not None:
        with atomic_path(plot) as temporary:
            draw(runs, summary, phase).savefig(temporary, format="png")
        console.say(f"Plot: {plot}")
    return {"suggestions": summary, "plot": plot and str(plot), "suggested": suggested, "phase": phase}


def phase_of(config: TrainConfig, weights: LoadedWeights, unfrozen: bool) -> tuple[str, float]:
    """Return the phase of training that a rate is sought for, and how many times lower the first layers' rate is."""
    if weights.whole or not config.freeze_epochs:
        return FINE_TUNE if weights.pretrained else FROM_SCRATCH, 1.0  # as `fit`: one rate for all layers
    return (FINE_TUNE, rate_spread(weights, config)) if unfrozen else (FROZEN, 1.0)


def suggested_rate(rates: dict[str, list[float]], seeds: int) -> dict[str, Any]:
    """Return the rate to use: the valley's median, fastai's own default, else the first method's, with the reason.

    Parameters
    ----------
    rates
        What each method suggests, one rate a seed in which it found one.
    """
    method = "valley" if "valley" in rates else next(iter(rates))
    found = rates[method]
    if seeds == 1:
        return {"lr": found[0], "method": method, "reason": f"{method}, of one seed"}
    factor = max(found) / min(found)
    told = f"seeds agree within a factor of {factor:.1f}"
    if factor > DISAGREE:
        told = f"seeds differ by a factor of {factor:.0f}"
    of = f"{len(found)} seeds" if len(found) == seeds else f"{len(found)} of {seeds} seeds"
    return {"lr": float(np.median(found)), "method": method, "reason": f"{method}, median of {of}; {told}"}


def warn_of_doubts(
    suggested: dict[str, Any], spread: dict[str, float], lr_mult: float, halved: bool, console: Console
) -> None:
    """Say when seeds do not agree, and what a rate for a phase that trains at half of `train --lr` means for it."""
    if spread["high"] > DISAGREE * spread["low"]:
        console.warn(
            "the seeds do not agree on a learning rate",
            f"{spread['low']:.1e} to {spread['high']:.1e}. Give more --seeds or --iterations; if in doubt, take less.",
        )
    if halved:
        slower = f", its first layers {lr_mult:g} times slower," if lr_mult > 1 else ""
        console.say(
            f"train runs the phase that trains all layers{slower} at half of its --lr: this rate there is "
            f"--lr {2 * suggested['lr']:.1e}"
        )


def chosen_rate(found: dict[str, Any]) -> float:
    """Return the rate that `train --lr auto` uses, from what `lr_find_seeds` returned."""
    return found["suggested"]["lr"]


class Advance(Callback):
    """Tell a bar of each batch."""

    def __init__(self, advance: Callable[[], None]):
        self.advance = advance

    def after_batch(self) -> None:  # noqa: D102
        self.advance()


class GroupedLRFinder(LRFinder):
    """fastai's LRFinder, with a rate `lr_mult` times lower for the first group of layers than for the last."""

    def __init__(self, iterations: int, lr_mult: float):
        super().__init__(start_lr=LOWEST, end_lr=HIGHEST, num_it=iterations)
        self.top, self.lr_mult = SchedExp(LOWEST, HIGHEST), lr_mult
        if lr_mult > 1:
            self.scheds = {"lr": self.rates}

    def rates(self, share: float) -> slice:
        """Return the rates at a share of the run; the optimiser spreads them over its groups, as in fine_tune."""
        top = self.top(share)
        return slice(top / self.lr_mult, top)

    def clean_up(self) -> None:
        """Remove the copy of the weights, which a run that is stopped leaves behind."""
        if hasattr(self, "tmp_d"):
            self.tmp_d.cleanup()


def one_run(
    learn: Learner,
    iterations: int,
    advance: Callable[[], None],
    *,
    frozen: bool = False,
    lr_mult: float = 1.0,
    cbs: Sequence[Callback] = (),
) -> Run:
    """Train with growing rates and return rates and smoothed losses, one a step; the learner stays as it was.

    With `frozen` all but the last group of layers stand still; else the first ones learn `lr_mult` times slower.
    `cbs` are what `fit` trains with.
    """
    epochs = iterations // max(1, len(learn.dls.train)) + 1
    finder = GroupedLRFinder(iterations, lr_mult)
    with untouched(learn), learn.no_bar(), learn.no_logging(), contextlib.ExitStack() as at_the_end:
        at_the_end.callback(finder.clean_up)
        learn.create_opt()
        learn.freeze() if frozen else learn.unfreeze()
        learn.fit(epochs, cbs=[finder, Advance(advance), *cbs])
        losses = np.array([float(loss) for loss in learn.recorder.losses])
        rates = np.array(learn.recorder.lrs[: len(losses)])
    finite = int(np.argmin(np.isfinite(losses))) if not np.isfinite(losses).all() else len(losses)
    return rates[:finite], losses[:finite]


@contextlib.contextmanager
def untouched(learn: Learner) -> Iterator[None]:
    """Let the body try things with a learner; then all is as it was: weights, optimiser, frozen layers, chance.

    Also where the body ends with an error or Ctrl-C. The learner is given no optimiser: the body makes its own.
    """
    weights = {name: value.detach().clone() for name, value in learn.model.state_dict().items()}
    trained = [(p, p.requires_grad, p.grad) for p in learn.model.parameters()]
    attributes = {name: getattr(learn, name) for name in ("opt", "path", "model_dir")}
    callbacks, training = list(learn.cbs), learn.model.training
    chance = chance_of(learn.dls.loaders)
    with tempfile.TemporaryDirectory() as folder:
        learn.opt, learn.path, learn.model_dir = None, Path(folder), "."
        for parameter, _, _ in trained:
            parameter.grad = None
        try:
            yield
        finally:
            learn.remove_cbs([callback for callback in learn.cbs if callback not in callbacks])
            learn.add_cbs([callback for callback in callbacks if callback not in learn.cbs])
            for name, value in attributes.items():
                setattr(learn, name, value)
            learn.model.load_state_dict(weights)
            learn.model.train(training)
            for parameter, moved, gradient in trained:
                parameter.requires_grad_(moved).grad = gradient
            set_chance(chance, learn.dls.loaders)


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


def draw(runs: list[Run], summary: dict[str, dict[str, float]], phase: str):
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
    axes.set(xscale="log", xlabel=f"learning rate (logarithmic), {phase}", ylabel="smoothed training loss (nats)")
    axes.set_ylim(bottom - 0.35 * (top - bottom), top + 0.15 * (top - bottom))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return figure
