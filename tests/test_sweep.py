"""A sweep: what it tries, that it goes on after anything, that it sees no test film, and what it leaves."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState

from cxr_fastai import sweep as sweeping
from cxr_fastai import trials
from cxr_fastai.config import SweepConfig, TrainConfig
from cxr_fastai.console import QUIET, Console
from cxr_fastai.data import OpenFilm
from cxr_fastai.errors import Interrupted, TrainingError, UsageError
from cxr_fastai.lives import Watch, here, signature
from cxr_fastai.study import best_trial, finished, open_study, refuse_another_sweep, shown_storage
from cxr_fastai.sweep_page import Axis, write_page
from cxr_fastai.trials import Desk, choose, give_back

SMALL = {"arch": "resnet18", "weights": "none", "size": 32, "batch_size": 8, "epochs": 1, "freeze_epochs": 1}


def config_of(tmp_path: Path, **settings: Any) -> SweepConfig:
    train = TrainConfig(**{**SMALL, "data": settings.pop("data", "films"), "out": str(tmp_path), "name": "s"})
    choices = {"archs": ("resnet18",), "weights": ("none",), "sizes": (32, 64), "batch_sizes": (8, 16)}
    return SweepConfig(**{"train": train, **choices, **settings})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replace films, weights, lr-find and training; `outcome` says how each trial ends."""
    table = pd.DataFrame({"path": ["a", "b"], "split": ["train", "valid"], "label": ["x", "y"]})

    def prepare(config, folder, began, console):
        deadline = None if config.minutes is None else began + 60 * config.minutes
        return Desk(config, table, {32: OpenFilm(32), 64: OpenFilm(64)}, deadline), "films"

    def auroc(desk, study, trial) -> float:
        choose(desk, study, trial)
        return fake["outcome"](trial)

    def train(config, console) -> tuple[Path, dict]:
        fake["trained"].append(config)
        return Path("run"), {}

    def load(body, arch, weights):
        return trials_weights(weights)

    fake: dict[str, Any] = {"outcome": lambda trial: 0.5 + trial.number / 100, "trained": []}
    monkeypatch.setattr(sweeping, "prepare", prepare)
    monkeypatch.setattr(sweeping, "count_features", lambda arch, size: 1)
    monkeypatch.setattr(sweeping, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(sweeping, "train", train)
    monkeypatch.setattr(trials, "validation_auroc", auroc)
    monkeypatch.setattr(trials, "load_weights", load)
    monkeypatch.setattr(trials, "make_body", lambda arch: (None, {}))
    found = {"lr": 1e-2, "method": "valley", "reason": "valley, of one seed"}
    monkeypatch.setattr(trials, "lr_find_seeds", lambda *a, **k: {"suggested": found})
    return fake


def trials_weights(weights: str):
    from cxr_fastai.model import LoadedWeights

    return LoadedWeights("phantom" if weights == "auto" else weights, weights, weights != "none")


# --- the search ---------------------------------------------------------------------------------------------------


def test_the_best_trial_is_written_trained_and_told(fake, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def outcome(trial) -> float:
        trial.report(0.3, 1)
        if trial.number == 1:
            raise optuna.TrialPruned
        return [0.8, 0, 0.9, 0.9][trial.number]

    fake["outcome"] = outcome
    found = sweeping.sweep(config_of(tmp_path, trials=4), Console())
    assert {k: found[k] for k in ("study", "trials", "pruned", "run")} == {
        "study": "s", "trials": 4, "pruned": 1, "run": "run",
    }  # fmt: skip
    assert (found["best"]["number"], found["best"]["valid_auroc"]) == (2, 0.9)  # of equal ones the first
    assert found["config"] == str(tmp_path / "sweeps" / "s" / "best.toml")
    settings = tomllib.loads(Path(found["config"]).read_text())
    winner = fake["trained"][0]
    assert TrainConfig(**{**settings, "out": str(tmp_path), "name": "s"}) == winner
    assert {key: getattr(winner, key) for key in found["best"]["params"]} == found["best"]["params"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trial")]
    assert lines[1].startswith("trial   1 pruned at epoch 1, AUROC 0.300 · resnet18/none lr ")
    assert lines[2].startswith("trial   2 AUROC 0.900 (best) · resnet18/none lr ")
    assert lines[3].startswith("trial   3 AUROC 0.900 · ")
    assert all(re.search(r"· \d+ s left$", line) for line in lines)


def test_a_trial_lies_where_it_should(fake, tmp_path: Path) -> None:
    phantoms = tmp_path / "phantoms"
    phantoms.mkdir()
    (phantoms / "dataset.json").touch()  # as `generate` leaves one
    config = config_of(tmp_path, data=str(phantoms), trials=30, weights=("auto",), rate_factor=3.0, final=False)
    sweeping.sweep(config)
    study = open_study(config, tmp_path / "sweeps" / "s")
    settings = [trial.user_attrs["settings"] for trial in finished(study)]
    assert {s["weights"] for s in settings} == {"phantom"}  # what auto means is settled once
    assert {s["size"] for s in settings} == {32, 64}
    assert {s["batch_size"] for s in settings} == {8, 16}
    assert {(s["freeze_epochs"], s["epochs"]) for s in settings} == {(0, 2), (1, 1)}  # of the same two epochs
    assert all(1e-2 / 3.01 <= s["lr"] <= 3.01e-2 for s in settings)
    assert all(0 <= s["augment"] <= 2 and 0 <= s["dropout"] <= 0.5 for s in settings)
    assert all(1e-4 <= s["weight_decay"] <= 0.3 for s in settings)
    assert len({s["lr"] for s in settings}) > 20
    sought = {(s["size"], s["batch_size"], s["freeze_epochs"] > 0) for s in settings}  # once for each
    assert sum(key.startswith("lr-find: ") for key in study.user_attrs) == len(sought) > 4


@pytest.mark.parametrize("weights", ["none", "phantom"])
def test_what_is_trained_whole_has_no_frozen_epochs_to_choose(fake, tmp_path: Path, weights: str) -> None:
    config = config_of(tmp_path, weights=(weights,), trials=3, final=False)  # of few films, of no phantoms
    sweeping.sweep(config)
    study = open_study(config, tmp_path / "sweeps" / "s")
    assert all("freeze_epochs" not in trial.params for trial in finished(study))


def test_the_same_seed_gives_the_same_trials_in_one_go_or_in_two(fake, tmp_path: Path) -> None:
    whole, halves = config_of(tmp_path / "a", trials=12, final=False), config_of(tmp_path / "b", trials=5, final=False)
    sweeping.sweep(whole)
    sweeping.sweep(halves)
    sweeping.sweep(config_of(tmp_path / "b", trials=12, final=False))
    one, two = (open_study(c, Path(c.train.out) / "sweeps" / "s") for c in (whole, halves))
    assert [t.params for t in finished(one)] == [t.params for t in finished(two)]


def test_a_trial_that_cannot_be_trained_counts_and_is_not_the_best(fake, tmp_path: Path) -> None:
    def outcome(trial) -> float:
        if trial.number == 0:
            raise TrainingError("the loss became nan in epoch 1")
        return 0.6

    fake["outcome"] = outcome
    found = sweeping.sweep(config_of(tmp_path, trials=2, final=False))
    assert (found["trials"], found["pruned"], found["best"]["number"], found["run"]) == (2, 1, 1, None)
    assert "Trial 0 failed: the loss became nan in epoch 1" in Path(found["page"]).read_text()


def test_where_no_trial_ends_well_that_is_said(fake, tmp_path: Path) -> None:
    def outcome(trial) -> float:
        raise TrainingError("the loss became nan")

    fake["outcome"] = outcome
    with pytest.raises(TrainingError, match=r"no trial of sweep s .*; give more --minutes or --trials"):
        sweeping.sweep(config_of(tmp_path, trials=2))


def test_no_trial_begins_after_the_deadline(fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(sweeping, "time", SimpleNamespace(time=lambda: now[0], sleep=time.sleep))

    def outcome(trial) -> float:
        now[0] += 30
        return 0.5

    fake["outcome"] = outcome
    assert sweeping.sweep(config_of(tmp_path, trials=100, minutes=1.5, final=False))["trials"] == 3


def test_no_trial_begins_that_would_not_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "time", SimpleNamespace(time=lambda: 100.0))
    state = TrialState.COMPLETE
    done = [SimpleNamespace(state=state, duration=timedelta(seconds=seconds)) for seconds in (10, 20, 60)]
    done.append(SimpleNamespace(state=TrialState.PRUNED, duration=timedelta(seconds=1)))
    done.append(SimpleNamespace(state=state, duration=None))
    assert sweeping.has_time(SimpleNamespace(deadline=None), done)
    assert sweeping.has_time(SimpleNamespace(deadline=120.1), done)  # the median is 20 s
    assert not sweeping.has_time(SimpleNamespace(deadline=120.0), done)
    assert sweeping.has_time(SimpleNamespace(deadline=100.1), done[3:])  # nothing is known yet
    assert not sweeping.has_time(SimpleNamespace(deadline=100.0), done[3:])


def test_ctrl_c_keeps_what_was_done_and_says_how_to_go_on(fake, tmp_path: Path) -> None:
    def outcome(trial) -> float:
        if trial.number == 2:
            raise KeyboardInterrupt
        return 0.5

    fake["outcome"] = outcome
    config = config_of(tmp_path, trials=4)
    with pytest.raises(Interrupted, match=r"stopped; 2 of 4 trials are saved in .*study\.db, go on .* --name s$"):
        sweeping.sweep(config)
    assert (tmp_path / "sweeps" / "s" / "best.toml").is_file()
    stopped = open_study(config, tmp_path / "sweeps" / "s").trials[2]
    fake["outcome"] = lambda trial: 0.7
    found = sweeping.sweep(config)
    study = open_study(config, tmp_path / "sweeps" / "s")
    assert found["trials"] == 4
    assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[3].params == stopped.params  # it was given back


def test_a_folder_of_the_winner_that_is_there_is_refused_at_once(fake, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"/s is there already; choose another --name, or --no-final"):
        sweeping.sweep(config_of(tmp_path))


def test_names_are_the_next_free_ones(tmp_path: Path) -> None:
    import dataclasses

    config = config_of(tmp_path)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, name=None))
    assert sweeping.named(config).train.name == "sweep-001"
    (tmp_path / "sweep-001").mkdir()
    (tmp_path / "sweeps" / "sweep-002").mkdir(parents=True)
    assert sweeping.named(config).train.name == "sweep-003"


# --- several processes --------------------------------------------------------------------------------------------


def desk_of(config: SweepConfig) -> Desk:
    return Desk(config, pd.DataFrame(), {}, None)


def test_a_trial_whose_process_was_killed_is_run_again_but_not_for_ever(tmp_path: Path) -> None:
    config = config_of(tmp_path, trials=2)
    study = open_study(config, tmp_path)
    gone = {**signature(), "pid": 2**22 + 1, "began": "0"}
    left = study.ask()
    left.set_user_attr("worker", gone)
    left.suggest_float("lr_times", 0.5, 2.0)
    for _ in range(trials.TRIES - 1):
        again = sweeping.next_trial(desk_of(config), study, Watch())
        assert again is not None
        assert again.suggest_float("lr_times", 0.5, 2.0) == left.params["lr_times"]
        again.set_user_attr("worker", gone)
    new = sweeping.next_trial(desk_of(config), study, Watch())
    assert new is not None
    assert new.user_attrs["worker"] == signature()
    assert new.suggest_float("lr_times", 0.5, 2.0) != left.params["lr_times"]
    assert [t.state.name for t in study.trials] == ["FAIL"] * trials.TRIES + ["RUNNING"]


def test_a_running_trial_of_another_process_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, trials=1)
    study = open_study(config, tmp_path)
    theirs = study.ask()
    theirs.set_user_attr("worker", {"place": "elsewhere", "pid": 1, "began": "1"})
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            study.tell(theirs, 0.5)

    monkeypatch.setattr(sweeping.time, "sleep", sleep)
    assert sweeping.next_trial(desk_of(config), study, Watch()) is None
    assert len(waited) == 3


def test_a_trial_that_another_process_gave_back_is_not_given_back_twice(tmp_path: Path) -> None:
    study = open_study(config_of(tmp_path), tmp_path)
    trial = study.ask()
    trial.suggest_float("lr_times", 0.5, 2.0)
    give_back(study, trial)
    give_back(study, trial)
    assert [t.state.name for t in study.trials] == ["FAIL", "WAITING"]


def test_of_two_processes_that_give_back_a_trial_at_once_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path)
    study, other = open_study(config, tmp_path), open_study(config, tmp_path)
    trial = study.ask()
    trial.suggest_float("lr_times", 0.5, 2.0)
    end = study._storage.set_trial_state_values

    def late(*given: Any, **more: Any) -> bool:
        give_back(other, trial)
        return end(*given, **more)

    monkeypatch.setattr(study._storage, "set_trial_state_values", late)
    give_back(study, trial)
    assert [t.state.name for t in other.trials] == ["FAIL", "WAITING"]


@pytest.mark.parametrize("ending", [0.9, optuna.TrialPruned(), TrainingError("the loss became nan")])
def test_a_trial_that_another_process_gave_back_as_it_ended_is_that_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: float | Exception
) -> None:
    config = config_of(tmp_path)
    study, other = open_study(config, tmp_path), open_study(config, tmp_path)
    trial = study.ask()

    def trained(*_: Any) -> float:
        give_back(other, trial)
        if isinstance(ending, Exception):
            raise ending
        return ending

    monkeypatch.setattr(trials, "validation_auroc", trained)
    trials.run_trial(desk_of(config), study, trial)
    assert [t.state.name for t in other.trials] == ["FAIL"]


def ask_for(config: SweepConfig, folder: Path, count: int) -> None:
    study = open_study(config, folder)
    for _ in range(count):
        trial = study.ask()
        study.tell(trial, trial.suggest_float("x", 0, 1))


@pytest.mark.parametrize("storage", [None, "journal:{}/shared/trials.log"])
def test_two_processes_share_one_storage(tmp_path: Path, storage: str | None) -> None:
    config = config_of(tmp_path, storage=storage and storage.format(tmp_path))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=ask_for, args=(config, tmp_path, 10)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    study = open_study(config, tmp_path)
    assert sorted(t.number for t in finished(study)) == list(range(20))


# --- the study ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": (32,)}, r"was begun with sizes \[32, 64\], not \[32\]: its trials cannot be compared"),
        ({"rate_factor": 3.0}, r"was begun with rate_factor 4\.0, not 3\.0"),
        ({"train": TrainConfig(**{**SMALL, "epochs": 2, "name": "s"})}, "was begun with epochs 1, not 2"),
    ],
)
def test_a_sweep_goes_on_only_as_it_began(tmp_path: Path, change: dict, message: str) -> None:
    study = open_study(config_of(tmp_path), tmp_path)
    refuse_another_sweep(study, config_of(tmp_path), "films")
    refuse_another_sweep(study, config_of(tmp_path, trials=99, minutes=3.0, workers=2), "films")
    with pytest.raises(UsageError, match=message):
        refuse_another_sweep(study, config_of(tmp_path, **change), "films")
    with pytest.raises(UsageError, match="was begun with films other films, or another split, not these"):
        refuse_another_sweep(study, config_of(tmp_path), "others")


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("nonsense://x", "--storage nonsense://x: cannot be used"),
        ("sqlite:////no/such/folder/study.db", "--storage sqlite:////no/such/folder/study.db: cannot be used"),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str, message: str
) -> None:
    monkeypatch.setattr("cxr_fastai.study.time.sleep", lambda seconds: None)
    with pytest.raises(UsageError, match=message) as refused:
        open_study(config_of(tmp_path, storage=storage), tmp_path)
    assert "\n" not in str(refused.value)


def test_no_password_is_shown(tmp_path: Path) -> None:
    config = config_of(tmp_path, storage="postgresql://me:secret@host/db")
    assert shown_storage(config, tmp_path) == "postgresql://me:***@host/db"


# --- the page -----------------------------------------------------------------------------------------------------


def test_the_page_fetches_nothing_and_holds_every_trial(fake, tmp_path: Path) -> None:
    config = config_of(tmp_path, trials=12, weights=("auto",), final=False)
    fake["outcome"] = lambda trial: 0.5 + 0.1 * trial.params["dropout"]
    page = Path(sweeping.sweep(config)["page"]).read_text()
    assert not re.search(r"https?://|<script|url\(", page)
    assert page.count("<tr class=") == 12
    assert page.count("data:image/png;base64,") == 3
    assert "With so few complete trials this is a hint at most" in page


def test_equal_trials_and_a_single_one_have_a_page_too(fake, tmp_path: Path) -> None:
    fake["outcome"] = lambda trial: 1.0
    for trials_asked in (1, 3):
        page = Path(sweeping.sweep(config_of(tmp_path, trials=trials_asked, final=False))["page"]).read_text()
        assert "Too few trials, or too equal ones, to tell which parameter matters" in page
        assert page.count("data:image/png;base64,") == 2


def test_an_axis_puts_values_where_they_belong() -> None:
    axis = Axis("lr_times", [0.25, 1.0, None, 4.0])
    assert axis.places[:2] == pytest.approx([0, 0.5])
    assert axis.places[2] != axis.places[2]  # a trial without it: the line has a gap
    assert [text for _, text in axis.ticks] == ["0.25", "0.5", "1", "2", "4"]
    assert Axis("size", [64, 32, 64]).places == [0.75, 0.25, 0.75]
    assert Axis("dropout", [0.3, 0.3]).places == [0.5, 0.5]


# --- with films ---------------------------------------------------------------------------------------------------


def test_no_test_film_is_in_a_trials_hands(films: Path, tmp_path: Path) -> None:
    config = SweepConfig(
        train=TrainConfig(**{**SMALL, "data": str(films), "out": str(tmp_path), "name": "s"}), sizes=(32, 64)
    )
    desk, _ = sweeping.prepare(config, tmp_path / "s", 0.0, QUIET)
    assert sorted(desk.table["split"].unique()) == ["train", "valid"]
    assert len(desk.table) == 48
    assert set(desk.openers[64].films) == set(desk.table["path"])
    assert (tmp_path / "s" / "audit.json").is_file()


def test_a_trial_is_a_fit_that_reports_each_epoch(films: Path, tmp_path: Path) -> None:
    train = TrainConfig(**{**SMALL, "data": str(films), "out": str(tmp_path), "name": "s"})
    config = SweepConfig(train=train, trials=1, archs=("resnet18",), weights=("none",), sizes=(32,), batch_sizes=(8,))
    desk, _ = sweeping.prepare(config, tmp_path / "s", 0.0, QUIET)
    study = open_study(config, tmp_path / "s")
    sweeping.search(desk, study, lambda: None)
    trial = best_trial(study)
    assert trial is not None
    assert sorted(trial.intermediate_values) == [1, 2]
    assert trial.value == max(trial.intermediate_values.values())
    assert trial.user_attrs["lr_find"]["method"] == "valley"
    times = trial.user_attrs["settings"]["lr"] / trial.user_attrs["lr_find"]["lr"]
    assert times == pytest.approx(trial.params["lr_times"], rel=0.01)
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["audit.json", "study.db"]


@pytest.mark.long
def test_a_sweep_that_is_killed_goes_on_and_its_winner_is_trained(films: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "cli.py", "sweep", str(films), "--arch", "resnet18", "--weights", "none", "--size", "32",
        "--batch-size", "8", "--epochs", "1", "--trials", "4", "--name", "k", "--out", str(tmp_path), "--json",
    ]  # fmt: skip
    killed = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert killed.stderr is not None
    for line in killed.stderr:
        if line.startswith("trial   1"):
            break
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    done = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True, check=True)
    assert "finished before" in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["trials"] == 4
    assert (tmp_path / "k" / "manifest.json").is_file()
    study = optuna.load_study(study_name="k", storage=f"sqlite:///{tmp_path}/sweeps/k/study.db")
    assert sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in study.trials) == 4
    assert not any(t.state == TrialState.RUNNING for t in study.trials)
    assert here() in study.trials[-1].user_attrs["worker"]["place"]


def test_write_page_needs_no_parameter_that_all_trials_have(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    study = open_study(config, tmp_path)
    settings = {"arch": "resnet18", "weights": "none", "size": 32, "batch_size": 8, "freeze_epochs": 0, "epochs": 2,
                "lr": 0.1, "augment": 0.0, "dropout": 0.0, "weight_decay": 0.01}  # fmt: skip
    for name, value in (("a", 0.5), ("b", 0.7), ("c", 0.6)):
        trial = study.ask()
        trial.set_user_attr("settings", settings)
        trial.suggest_float("dropout", 0, 0.5)
        if name == "b":
            trial.suggest_int("freeze_epochs", 0, 2)
        study.tell(trial, value)
    write_page(study, config, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("<tr class=") == 3
