"""One trial of a sweep: settings from the sampler, a learning rate around lr-find's, a fit, the validation AUROC.

A trial begins with what `train` would begin with, on the same films with the same seed, and is judged by the epoch that
`train` would keep. The films of the test are not in its table.
"""

import contextlib
import dataclasses
import math
import multiprocessing
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import torch
from fastai.callback.core import CancelFitException
from optuna.trial import FrozenTrial, Trial, TrialState

from cxr_fastai.callbacks import EpochCallback
from cxr_fastai.config import SweepConfig, TrainConfig
from cxr_fastai.console import QUIET
from cxr_fastai.data import OpenFilm, read_films
from cxr_fastai.errors import DataError, Interrupted, TrainingError
from cxr_fastai.explore import lr_find_seeds
from cxr_fastai.fitting import build_learner, choose_device, fit, whole_at_once
from cxr_fastai.lives import signs_of_life
from cxr_fastai.model import load_weights, make_body

LR_FIND_STEPS = 60  # of one short run, for each architecture, weights, size, batch size and kind of first phase
FREEZE_MOST = 2
AUGMENT, DROPOUT, WEIGHT_DECAY = (0.0, 2.0), (0.0, 0.5), (1e-4, 0.3)
STARTUP_TRIALS, SEED_STEP = 8, 10_007  # trials at random before TPE; between the seeds of two trials
TRIES = 3  # of a trial whose worker ended


@dataclass(frozen=True)
class Desk:
    """What a process needs for trials: films for training and validation, none of the test, and who reads them."""

    config: SweepConfig
    table: pd.DataFrame
    openers: dict[int, OpenFilm]
    deadline: float | None  # of time.time

    def opener(self, size: int) -> OpenFilm:
        """Return what reads films of a size; films that could not be cached are read again in each process."""
        opener = self.openers[size]
        if not opener.films:
            read_films(opener, self.table["path"].tolist(), lambda: None)
        return opener


class Pruner(EpochCallback):
    """Report each epoch's validation AUROC, and end the fit where the trial is no good, or nobody waits for it."""

    order = 75

    def __init__(self, trial: Trial, epochs: int):
        self.trial, self.epochs = trial, epochs
        self.pruned = self.orphaned = False
        self.scores: list[float] = []

    def before_fit(self) -> None:  # noqa: D102
        if self.pruned or self.orphaned:  # in the first of two phases
            raise CancelFitException

    def epoch_done(self) -> None:  # noqa: D102
        row = self.learn.history.rows[-1]
        self.scores.append(row["valid_auroc"])
        self.trial.report(row["valid_auroc"], row["epoch"])
        parent = multiprocessing.parent_process()
        self.orphaned = parent is not None and not parent.is_alive()
        self.pruned = row["epoch"] < self.epochs and self.trial.should_prune()
        if self.pruned or self.orphaned:
            raise CancelFitException


def give_back(study: optuna.Study, trial: Trial | FrozenTrial) -> None:
    """Mark a trial that did not end as failed, and queue its settings again, but not for ever."""
    if study.get_trials(deepcopy=False)[trial.number].state.is_finished():
        return  # another process has seen it, too
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # another process gives it back right now
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        tries = trial.user_attrs.get("tries", 1)
        if trial.params and tries < TRIES:
            study.enqueue_trial(trial.params, user_attrs={"tries": tries + 1})


def run_trial(desk: Desk, study: optuna.Study, trial: Trial) -> None:
    """Run one trial and tell the study how it ended; one that is stopped from outside is given back."""
    study.sampler = optuna.samplers.TPESampler(
        seed=(desk.config.train.seed + SEED_STEP * trial.number) % 2**32, n_startup_trials=STARTUP_TRIALS
    )
    # Whatever is told of a trial fails once it was taken for left: this machine slept, say, and another has it now.
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
        try:
            with signs_of_life(lambda count: trial.set_user_attr("sign", count)):
                value = validation_auroc(desk, study, trial)
        except optuna.TrialPruned:
            study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
        except (TrainingError, torch.OutOfMemoryError) as error:
            trial.set_user_attr("problem", str(error).splitlines()[0])
            study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
        except BaseException:
            give_back(study, trial)
            raise
        else:
            study.tell(trial, value, skip_if_finished=True)


def validation_auroc(desk: Desk, study: optuna.Study, trial: Trial) -> float:
    """Train with the settings of a trial; return the validation AUROC of its best epoch, which `train` would keep."""
    config = choose(desk, study, trial)
    epochs = config.epochs + config.freeze_epochs
    learn, weights, _ = build_learner(desk.table, config, desk.opener(config.size), choose_device(config.device))
    pruner = Pruner(trial, epochs)
    with tempfile.TemporaryDirectory() as run:
        fit(learn, config, weights, Path(run), QUIET, watchers=[pruner])
    if pruner.orphaned:
        raise Interrupted("the process that began this sweep has ended")
    if pruner.pruned:
        raise optuna.TrialPruned
    if math.isnan(best := max(pruner.scores)):
        raise DataError("no AUROC on the validation films; give more --valid")
    return best


def choose(desk: Desk, study: optuna.Study, trial: Trial) -> TrainConfig:
    """Return the config of a trial, and keep it with the trial; the learning rate is sought for the rest first."""
    config, base = desk.config, desk.config.train
    arch, weights = pick(trial, "arch", config.archs), pick(trial, "weights", config.weights)
    start = start_of(desk, study, arch, weights)
    total, frozen = base.epochs + base.freeze_epochs, base.freeze_epochs
    if not start["whole"]:
        frozen = trial.suggest_int("freeze_epochs", 0, min(FREEZE_MOST, total - 1))
    chosen = {
        "arch": arch,
        "weights": start["weights"],
        "size": pick(trial, "size", config.sizes),
        "batch_size": pick(trial, "batch_size", config.batch_sizes),
        "freeze_epochs": frozen,
        "epochs": total - frozen,
    }
    rate = rate_of(desk, study, dataclasses.replace(base, **chosen))
    times = trial.suggest_float("lr_times", 1 / config.rate_factor, config.rate_factor, log=True)
    chosen["lr"] = _brief(rate["lr"] * times)
    chosen["augment"] = _brief(trial.suggest_float("augment", *AUGMENT))
    chosen["dropout"] = _brief(trial.suggest_float("dropout", *DROPOUT))
    chosen["weight_decay"] = _brief(trial.suggest_float("weight_decay", *WEIGHT_DECAY, log=True))
    trial.set_user_attr("settings", chosen)
    trial.set_user_attr("lr_find", rate)
    return dataclasses.replace(base, **chosen)


def pick(trial: Trial, name: str, choices: tuple[Any, ...]) -> Any:
    """Return a trial's choice; where there is only one, it is no parameter of the search."""
    return choices[0] if len(choices) == 1 else trial.suggest_categorical(name, choices)


def _brief(value: float) -> float:
    """Return a number as a person would write it; a trial uses what is written."""
    return float(f"{value:.3g}")


def start_of(desk: Desk, study: optuna.Study, arch: str, weights: str) -> dict[str, Any]:
    """Return what a trial starts from; what `auto` means is settled once, for every trial and machine."""
    key = f"start: {arch} {weights}"
    if key not in study.user_attrs:
        loaded = load_weights(make_body(arch)[0], arch, weights)
        named = loaded.kind if weights == "auto" else weights
        whole = whole_at_once(loaded, desk.config.train, desk.table)
        start = {"weights": named, "whole": whole, "detail": f"{arch}: {loaded.detail}"}
        study.set_user_attr(key, start)
    return study.user_attrs[key]


def rate_of(desk: Desk, study: optuna.Study, config: TrainConfig) -> dict[str, Any]:
    """Return lr-find's suggestion for what a learning rate depends on most, kept in the study."""
    first = "frozen" if config.freeze_epochs else "whole"
    key = f"lr-find: {config.arch} {config.weights} size {config.size} batch {config.batch_size} {first}"
    if key not in study.user_attrs:
        device, opener = choose_device(config.device), desk.opener(config.size)
        try:
            found = lr_find_seeds(desk.table, config, opener, device, seeds=1, iterations=LR_FIND_STEPS)
            suggested = found["suggested"]
        except TrainingError:
            suggested = {"lr": TrainConfig.lr, "method": None, "reason": "lr-find found none; the default"}
        study.set_user_attr(key, suggested)
    return study.user_attrs[key]
