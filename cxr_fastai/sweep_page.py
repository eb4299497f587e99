"""A sweep for people: one HTML page with its trials and what they teach, which opens offline."""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from cxr_fastai.config import SweepConfig
from cxr_fastai.report.plots import BLUE, ORANGE, data_uri, figure
from cxr_fastai.runs import write_text
from cxr_fastai.study import best_trial, finished, in_state

TEMPLATES = Path(__file__).parent / "templates"
SETTINGS = {
    "arch": "network", "weights": "weights", "size": "size", "batch_size": "batch", "freeze_epochs": "frozen epochs",
    "epochs": "epochs", "lr": "learning rate", "augment": "augmentation", "dropout": "dropout",
    "weight_decay": "weight decay",
}  # fmt: skip
PARAMETERS = {**SETTINGS, "lr_times": "learning rate\n÷ lr-find's"}
LOGARITHMIC = ("lr", "lr_times", "weight_decay")
SURE_FROM = 20  # complete trials from which on importances are more than a hint


def write_page(study: optuna.Study, config: SweepConfig, path: Path) -> None:
    """Write the page of a sweep with at least one complete trial; nothing is fetched when it opens."""
    import jinja2

    best = best_trial(study)
    trials = sorted(finished(study), key=lambda t: (t.state != TrialState.COMPLETE, -_score(t), t.number))
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    importances = importances_of(study)
    text = environment.get_template("sweep.html").render(
        name=study.study_name,
        data=config.train.data,
        best=best,
        pruned=len(in_state(study, TrialState.PRUNED)),
        rows=[row_of(trial) for trial in trials],
        heads=list(SETTINGS.values()),
        settings=SETTINGS,
        history=data_uri(plot_history(trials)),
        importances=data_uri(plot_importances(importances)) if importances else None,
        hint=sum(t.state == TrialState.COMPLETE for t in trials) < SURE_FROM,
        parallel=data_uri(plot_parallel(trials)),
        rates={k.removeprefix("lr-find: "): v for k, v in study.user_attrs.items() if k.startswith("lr-find: ")},
        starts=[v["detail"] for k, v in study.user_attrs.items() if k.startswith("start: ")],
    )
    write_text(path, text)


def _score(trial: FrozenTrial) -> float:
    """Return a trial's AUROC, that of its last epoch where it was pruned; -1 where it failed."""
    failed = "problem" in trial.user_attrs or trial.value is None or math.isnan(trial.value)
    return -1.0 if failed else float(trial.value or 0)


def row_of(trial: FrozenTrial) -> dict[str, Any]:
    """Return a line of the table."""
    found = trial.user_attrs.get("settings", {})
    problem = trial.user_attrs.get("problem")
    outcome = "complete" if trial.state == TrialState.COMPLETE else f"pruned at epoch {trial.last_step}"
    return {
        "number": trial.number,
        "outcome": "failed" if problem else outcome,
        "problem": problem,
        "auroc": f"{trial.value:.3f}" if _score(trial) >= 0 else "–",
        "settings": [_shown(name, found.get(name)) for name in SETTINGS],
        "minutes": f"{trial.duration.total_seconds() / 60:.1f}" if trial.duration else "–",
        "complete": trial.state == TrialState.COMPLETE,
    }


def _shown(name: str, value: Any) -> str:
    if name == "weights" and value is not None:
        return Path(str(value)).name
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def importances_of(study: optuna.Study) -> dict[str, float]:
    """Return how much of the differences each parameter explains (PED-ANOVA); nothing where that cannot be told."""
    complete = in_state(study, TrialState.COMPLETE)
    if len(complete) < 2 or len({trial.value for trial in complete}) < 2:
        return {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that few trials make a hint at most, the page says itself
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (ValueError, RuntimeError):  # too few trials for its densities
        return {}
    return {name: share for name, share in found.items() if math.isfinite(share)}


def plot_importances(importances: dict[str, float]):
    """Return bars, the longest on top."""
    names = list(importances)[::-1]
    made, axes = figure(5.2, 0.9 + 0.42 * len(names))
    axes.barh([PARAMETERS[name].replace("\n", " ") for name in names], [importances[n] for n in names], color=BLUE)
    for i, name in enumerate(names):
        axes.annotate(f"{importances[name]:.2f}", (importances[name], i), (4, 0), textcoords="offset points",
                      va="center", fontsize=9)  # fmt: skip
    axes.set(xlabel="importance (all together: 1)", xlim=(0, max(0.1, *importances.values()) * 1.15))
    axes.grid(axis="y", visible=False)
    return made


def plot_history(trials: list[FrozenTrial]):
    """Return the AUROC of each trial in their order, and of the best one so far."""
    made, axes = figure(5.2, 3.6)
    ordered = sorted((t for t in trials if _score(t) >= 0), key=lambda t: t.number)
    kinds = ((TrialState.COMPLETE, "o", BLUE, BLUE, "complete"), (TrialState.PRUNED, "X", "none", "0.45", "pruned"))
    for state, marker, face, edge, label in kinds:
        some = [t for t in ordered if t.state == state]
        axes.plot([t.number for t in some], [t.value for t in some], marker, color=edge, mfc=face, ms=7, label=label)
    complete = [t for t in ordered if t.state == TrialState.COMPLETE]
    top = np.maximum.accumulate([t.value or 0 for t in complete])
    last = [ordered[-1].number] if ordered else []
    axes.step(
        [*(t.number for t in complete), *last], [*top, *top[-1:]], color=ORANGE, where="post", label="best so far"
    )
    axes.set(xlabel="trial", ylabel="validation AUROC")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.06, y=0.12)
    made.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return made


def plot_parallel(trials: list[FrozenTrial]):
    """Return parallel coordinates: a line a trial through its parameters to its AUROC, the better the darker."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    shown = [t for t in trials if _score(t) >= 0]
    names = [name for name in PARAMETERS if any(name in t.params for t in shown)]
    columns = [Axis(name, [t.params.get(name) for t in shown]) for name in names]
    columns.append(Axis("validation AUROC", [t.value for t in shown]))
    made = Figure(figsize=(max(6.0, 1.35 * len(columns)), 4.4), layout="constrained", dpi=130)
    axes = made.subplots()
    scores = [_score(t) for t in shown if t.state == TrialState.COMPLETE]
    scale = ScalarMappable(Normalize(min(scores), max(scores)), colormaps["cividis_r"])
    colours = scale.to_rgba(np.array([_score(t) for t in shown]))
    for i in range(len(shown) - 1, -1, -1):  # the best last, on top
        places = np.array([column.places[i] for column in columns])
        if shown[i].state == TrialState.COMPLETE:
            axes.plot(places, color=colours[i], lw=3.2 if i == 0 else 1.7, zorder=3)
        else:
            axes.plot(places, color="0.7", lw=1, ls="--", zorder=2)
    for x, column in enumerate(columns):
        axes.axvline(x, color="0.25", lw=1, zorder=1)
        for place, text in column.ticks:
            axes.annotate(text, (x, place), (4, 0), textcoords="offset points", fontsize=9, va="center", zorder=5,
                          bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.85})  # fmt: skip
    axes.set_xticks(range(len(columns)), [column.label for column in columns], fontsize=9)
    axes.set(yticks=[], xlim=(-0.15, len(columns) - 0.45), ylim=(-0.06, 1.06))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return made


class Axis:
    """One upright axis: where each trial's value lies on it, from 0 to 1, and what stands beside it."""

    def __init__(self, name: str, values: list[Any]):
        self.label = PARAMETERS.get(name, name)
        numbers = [v for v in values if isinstance(v, float)]
        if numbers:
            self._continuous(name in LOGARITHMIC, values, numbers)
            return
        order = sorted({v for v in values if v is not None})
        at = {value: (i + 0.5) / len(order) for i, value in enumerate(order)}
        self.places = [at.get(value, math.nan) for value in values]
        self.ticks = [(place, Path(str(value)).name) for value, place in at.items()]

    def _continuous(self, logarithmic: bool, values: list[Any], numbers: list[float]) -> None:
        scale = math.log10 if logarithmic else float
        low, high = scale(min(numbers)), scale(max(numbers))
        width = (high - low) or 1.0
        self.places = [math.nan if v is None else (scale(v) - low) / width if high > low else 0.5 for v in values]
        steps = (0, 0.25, 0.5, 0.75, 1) if high > low else (0.5,)
        marks = [low + (step if high > low else 0) * width for step in steps]
        self.ticks = [(step, f"{10**m if logarithmic else m:.2g}") for step, m in zip(steps, marks, strict=True)]
