"""The study of a sweep: Optuna's record of all trials, in a file or a database that several processes may share.

`--storage` is a database URL (`postgresql://...`, `mysql://...`, `sqlite:///...`) or `journal:FILE`, a file to which
lines are added, also on a network disk, where SQLite is not safe; without it, study.db in the sweep's own folder.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from cxr_fastai.config import SweepConfig
from cxr_fastai.errors import UsageError

JOURNAL = "journal:"
LOCK_SECONDS = 60  # that a process waits for another to finish writing to SQLite
OPENINGS = 5
FIRST_UNPRUNED = 4  # trials before any is compared with them
# What may change from one call to the next, or is what a sweep searches.
FREE = {"name", "out", "data", "device", "keep_checkpoints", "prevalence", "target_sensitivity", "target_specificity",
        "arch", "weights", "size", "batch_size", "lr", "augment", "dropout", "weight_decay"}  # fmt: skip
HELD = ("archs", "weights", "sizes", "batch_sizes", "rate_factor")


def open_study(config: SweepConfig, folder: Path) -> optuna.Study:
    """Open the study of a sweep, or make it; Optuna says nothing itself from here on.

    Raises
    ------
    UsageError
        Where the storage cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for opening in range(OPENINGS):
        try:
            return optuna.create_study(
                study_name=str(config.train.name),
                storage=_storage(config, folder),
                direction="maximize",
                pruner=optuna.pruners.MedianPruner(n_startup_trials=FIRST_UNPRUNED, n_warmup_steps=1),
                load_if_exists=True,
            )
        except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError, RuntimeError, OSError) as error:
            # Two processes that begin at once make the same tables; the second try finds them.
            if opening == OPENINGS - 1 or isinstance(error, ImportError | sqlalchemy.exc.ArgumentError):
                reason = str(error).splitlines()[0]
                raise UsageError(f"--storage {shown_storage(config, folder)}: cannot be used ({reason})") from error
            time.sleep(0.2 * (opening + 1))
    raise AssertionError


def _storage(config: SweepConfig, folder: Path) -> optuna.storages.BaseStorage:
    if config.storage is not None and config.storage.startswith(JOURNAL):
        file = Path(config.storage.removeprefix(JOURNAL))
        file.parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(JournalFileBackend(str(file)))
    url = config.storage
    if url is None:
        folder.mkdir(parents=True, exist_ok=True)
        url = sqlalchemy.URL.create("sqlite", database=str(folder / "study.db")).render_as_string()
    patient = {"connect_args": {"timeout": LOCK_SECONDS}} if url.startswith("sqlite") else {}
    return optuna.storages.RDBStorage(url, engine_kwargs=patient)


def shown_storage(config: SweepConfig, folder: Path) -> str:
    """Return where the trials are kept, without a password."""
    if config.storage is None:
        return str(folder / "study.db")
    if config.storage.startswith(JOURNAL):
        return config.storage
    try:
        return sqlalchemy.make_url(config.storage).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return config.storage


def refuse_another_sweep(study: optuna.Study, config: SweepConfig, films: str) -> None:
    """Keep in the study what its trials have in common; refuse to go on with other films or settings.

    Parameters
    ----------
    films
        The fingerprint of the table, with its split.
    """
    held = {name: value for name, value in dataclasses.asdict(config.train).items() if name not in FREE}
    held |= {name: list(getattr(config, name)) if name != "rate_factor" else config.rate_factor for name in HELD}
    ours = json.loads(json.dumps({**held, "films": films}))
    theirs = study.user_attrs.get("held")
    if theirs is None:
        study.set_user_attr("held", ours)
        return
    for name in ours:
        if ours[name] != theirs.get(name):
            was, now = ("other films, or another split", "these") if name == "films" else (theirs.get(name), ours[name])
            raise UsageError(
                f"sweep {study.study_name} was begun with {name} {was}, not {now}: its trials cannot be compared with "
                "others; choose another --name"
            )


def in_state(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    """Return the trials that are in one of `states` now, in their order."""
    return study.get_trials(deepcopy=False, states=states)


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that ended, pruned ones too; not those that were stopped or whose worker was killed."""
    return in_state(study, TrialState.COMPLETE, TrialState.PRUNED)


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """Return the trial of the highest validation AUROC, of equal ones the first; None where none is complete."""
    complete: list[Any] = in_state(study, TrialState.COMPLETE)
    return max(complete, key=lambda trial: (trial.value, -trial.number), default=None)
