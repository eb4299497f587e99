"""Which settings: an Optuna search over what a training run can be told, judged by validation AUROC alone.

    table -> test films out -> trials: lr-find, fit, perhaps pruned -> best.toml, sweep.html -> `train` with the winner

All trials have the seed and the split of the run that follows. No trial sees a test film: the test is opened once, by
`train`, for the winner. What was found lies in exports/sweeps/NAME; the trials themselves in its study.db, or in any
storage of Optuna's, which several processes and machines may share. `python cli.py sweep [DATA]` runs it.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, Trial, TrialState

from cxr_fastai.config import SweepConfig, TrainConfig, usable_cores
from cxr_fastai.config_file import to_toml
from cxr_fastai.console import QUIET, Console
from cxr_fastai.data import OpenFilm
from cxr_fastai.errors import CxrError, Interrupted, TrainingError, UsageError
from cxr_fastai.lives import Watch, signature
from cxr_fastai.model import count_features
from cxr_fastai.runs import write_text
from cxr_fastai.split import fingerprint
from cxr_fastai.study import best_trial, finished, in_state, open_study, refuse_another_sweep, shown_storage
from cxr_fastai.training import audit, prepare_table, read_all, train
from cxr_fastai.trials import Desk, give_back, run_trial, start_of

POLL_SECONDS = 1.0


def sweep(config: SweepConfig, console: Console = QUIET) -> dict[str, Any]:
    """Search, write best.toml and the page, and train the winner; return what `--json` prints.

    Raises
    ------
    Interrupted
        After Ctrl-C, with how to go on; what was finished is in the storage.
    CxrError
        Where the data, the options or the storage cannot be used, or no trial ended.
    """
    began = time.time()
    config = named(config)
    run = Path(config.train.out) / str(config.train.name)
    if config.final and run.exists():
        raise UsageError(f"{run} is there already; choose another --name, or --no-final to search only")
    for arch in config.archs:
        for size in config.sizes:
            count_features(arch, size)
    folder = Path(config.train.out) / "sweeps" / str(config.train.name)
    desk, films = prepare(config, folder, began, console)
    study = open_study(config, folder)
    refuse_another_sweep(study, config, films)
    starts = [start_of(desk, study, arch, weights) for arch in config.archs for weights in config.weights]
    for start in starts:
        console.say(f"Start: {start['detail']}")
    news = News(study, desk, console)
    try:
        with console.busy("Searching"):
            (search if config.workers == 1 else search_in_parallel)(desk, study, news.tell)
    except (KeyboardInterrupt, Interrupted) as stop:
        write_results(study, desk, folder, console)
        done = len(finished(study))
        raise Interrupted(
            f"stopped; {done} of {config.trials} trials are saved in {shown_storage(config, folder)}, go on with the "
            f"same command and --name {config.train.name}"
        ) from stop
    return conclude(study, desk, folder, console)


def named(config: SweepConfig) -> SweepConfig:
    """Return the config with a name: its own, or the next free sweep-001, sweep-002 ..."""
    if config.train.name is not None:
        return config
    roots = (Path(config.train.out), Path(config.train.out) / "sweeps")
    names = (f"sweep-{number:03d}" for number in range(1, 1_000_000))
    name = next(n for n in names if not any((root / n).exists() for root in roots))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, name=name))


def prepare(config: SweepConfig, folder: Path, began: float, console: Console) -> tuple[Desk, str]:
    """Read and audit the films once; return the desk, which has no test film, and the fingerprint of all of them."""
    table = prepare_table(config.train, console)
    openers = {size: OpenFilm(size) for size in (config.train.size, *config.sizes)}
    table = read_all(table, config.train, openers[config.train.size], console)
    audit(folder, table, config.train, openers[config.train.size], console)
    seen = table[table["split"] != "test"].reset_index(drop=True)
    seen.attrs = table.attrs
    for size in openers:
        if size != config.train.size:
            read_all(seen, config.train, openers[size], console)
    deadline = None if config.minutes is None else began + 60 * config.minutes
    return Desk(config, seen, openers, deadline), fingerprint(table)


# The search


def search(desk: Desk, study: optuna.Study, tell: Callable[[], None]) -> None:
    """Run trials until enough are finished, or the time is over."""
    watch = Watch()
    while (trial := next_trial(desk, study, watch)) is not None:
        run_trial(desk, study, trial)
        tell()


def next_trial(desk: Desk, study: optuna.Study, watch: Watch) -> Trial | None:
    """Return a trial to run, or None when there is none left for this process; wait for others if it takes that."""
    while True:
        for frozen in in_state(study, TrialState.RUNNING):
            if watch.left(frozen.number, frozen.user_attrs.get("worker"), frozen.user_attrs.get("sign")):
                give_back(study, frozen)
        done = finished(study)
        if len(done) >= desk.config.trials or not has_time(desk, done):
            return None
        if len(done) + len(in_state(study, TrialState.RUNNING)) < desk.config.trials:
            trial = study.ask()
            trial.set_user_attr("worker", signature())
            earlier = [t for t in in_state(study, TrialState.RUNNING) if t.number < trial.number]
            if len(finished(study)) + len(earlier) < desk.config.trials:
                return trial
            give_back(study, trial)  # another process was quicker
        time.sleep(POLL_SECONDS)


def has_time(desk: Desk, done: list[FrozenTrial]) -> bool:
    """Tell whether a trial that takes as long as most would still end in time."""
    if desk.deadline is None:
        return True
    took = [t.duration.total_seconds() for t in done if t.state == TrialState.COMPLETE and t.duration]
    return time.time() + (statistics.median(took) if took else 0) < desk.deadline


# Several processes


def search_in_parallel(desk: Desk, study: optuna.Study, tell: Callable[[], None]) -> None:
    """Run trials in `workers` processes, and tell how they end, until all are done; Ctrl-C reaches each once."""
    workers = start_workers(desk)
    try:
        while any(process.is_alive() for process, _ in workers):
            time.sleep(POLL_SECONDS)
            tell()
    except KeyboardInterrupt:
        for process, _ in workers:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGINT)
        for process, _ in workers:
            process.join()
        raise
    tell()
    faults = [fault_of(process, pipe) for process, pipe in workers if process.exitcode]
    if faults and len(finished(study)) < desk.config.trials:
        raise TrainingError(f"{len(faults)} of {len(workers)} workers ended before the sweep: {faults[0]}")


def start_workers(desk: Desk) -> list[tuple[Any, Any]]:
    """Start the processes; return each with the end of a pipe through which it tells an error."""
    context, before = multiprocessing.get_context("spawn"), os.environ.get("PYTHONWARNINGS")
    workers = []
    # What libraries deprecate in each other is said while they are imported, before a worker could turn it off.
    os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning"
    try:
        for _ in range(desk.config.workers):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(desk, theirs), daemon=True)
            process.start()
            theirs.close()
            workers.append((process, ours))
    finally:
        del os.environ["PYTHONWARNINGS"]
        os.environ.update({} if before is None else {"PYTHONWARNINGS": before})
    return workers


def fault_of(process: Any, pipe: Any) -> str:
    """Return why a worker ended, in a line."""
    with contextlib.suppress(EOFError, OSError):
        if pipe.poll():
            return pipe.recv()
    killed = process.exitcode is not None and process.exitcode < 0
    return f"killed by signal {-process.exitcode}, perhaps for want of memory" if killed else "see above"


def work(desk: Desk, pipe: Any) -> None:
    """Be one of several workers, with its share of the cores; the parent tells what a user must know."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # the terminal's Ctrl-C goes to the parent, which hands it on
    torch.set_num_threads(max(1, usable_cores() // desk.config.workers))
    folder = Path(desk.config.train.out) / "sweeps" / str(desk.config.train.name)
    try:
        search(desk, open_study(desk.config, folder), lambda: None)
    except (KeyboardInterrupt, Interrupted):
        sys.exit(Interrupted.exit_code)
    except CxrError as error:
        pipe.send(str(error))
        sys.exit(error.exit_code)


# What people are told


class News:
    """Says of each trial once how it ended, whoever ran it."""

    def __init__(self, study: optuna.Study, desk: Desk, console: Console):
        self.study, self.desk, self.console = study, desk, console
        self.began = time.time()
        self.told = {trial.number for trial in finished(study)}
        self.before = len(self.told)
        config = desk.config
        earlier = f", {self.before} of them finished before" if self.before else ""
        limit = f", {config.minutes:g} minutes at most" if config.minutes else ""
        console.say(f"Sweep {study.study_name}: {config.trials} trials{earlier}{limit}")

    def tell(self) -> None:
        """Say what is new."""
        best = best_trial(self.study)
        for trial in finished(self.study):
            if trial.number not in self.told:
                self.told.add(trial.number)
                self.console.say(trial_line(trial, trial == best, self.left()))

    def left(self) -> str:
        """Return how long it may take still."""
        done = len(self.told)
        each = (time.time() - self.began) / max(1, done - self.before)
        seconds = each * max(0, self.desk.config.trials - done)
        if self.desk.deadline is not None:
            seconds = min(seconds, max(0.0, self.desk.deadline - time.time()))
        return f"{seconds / 60:.0f} min left" if seconds >= 60 else f"{seconds:.0f} s left"


def trial_line(trial: FrozenTrial, best: bool, left: str) -> str:
    """Return one trial as a line for people."""
    problem = trial.user_attrs.get("problem")
    if trial.state == TrialState.COMPLETE:
        outcome = f"AUROC {trial.value:.3f}{' (best)' if best else ''}"
    elif problem:
        outcome = f"failed: {problem}"
    else:
        outcome = f"pruned at epoch {trial.last_step}, AUROC {trial.value:.3f}"
    settings = trial.user_attrs.get("settings")  # none where memory ran out while its learning rate was sought
    return " · ".join([f"trial {trial.number:>3} {outcome}", *([_in_words(settings)] if settings else []), left])


def _in_words(s: dict[str, Any]) -> str:
    return (
        f"{s['arch']}/{Path(str(s['weights'])).name} lr {s['lr']:g} size {s['size']} batch {s['batch_size']} "
        f"epochs {s['freeze_epochs']}+{s['epochs']} augment {s['augment']:g} dropout {s['dropout']:g} "
        f"decay {s['weight_decay']:g}"
    )


def write_results(study: optuna.Study, desk: Desk, folder: Path, console: Console) -> TrainConfig | None:
    """Write best.toml and sweep.html; return the winner's config, None where no trial is complete."""
    from cxr_fastai.sweep_page import write_page

    best = best_trial(study)
    if best is None:
        return None
    config = dataclasses.replace(desk.config.train, **best.user_attrs["settings"])
    head = f"# Trial {best.number} of sweep {study.study_name}: validation AUROC {best.value:.4f}\n"
    write_text(folder / "best.toml", head + to_toml(config, leave_out=("name", "out")))
    write_page(study, desk.config, folder / "sweep.html")
    console.say(f"Best: trial {best.number}, validation AUROC {best.value:.3f}; settings: {folder / 'best.toml'}")
    console.say(f"Page: {folder / 'sweep.html'}")
    return config


def conclude(study: optuna.Study, desk: Desk, folder: Path, console: Console) -> dict[str, Any]:
    """Write what was found, train the winner unless told not to, and return what `--json` prints."""
    config = write_results(study, desk, folder, console)
    best = best_trial(study)
    if config is None or best is None:
        raise TrainingError(
            f"no trial of sweep {study.study_name} was trained to its end; give more --minutes or --trials"
        )
    run = None
    if desk.config.final:
        console.say("Training the winner, and opening the test films")
        run = train(config, console)[0]
    return {
        "study": study.study_name,
        "trials": len(finished(study)),
        "pruned": len(in_state(study, TrialState.PRUNED)),
        "best": {"number": best.number, "valid_auroc": best.value, "params": best.user_attrs["settings"]},
        "config": str(folder / "best.toml"),
        "page": str(folder / "sweep.html"),
        "run": run and str(run),
    }
