import copy
import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_films
from fastai.learner import Learner

from cxr_fastai.config import TrainConfig
from cxr_fastai.console import QUIET, Console
from cxr_fastai.data import OpenFilm
from cxr_fastai.errors import TrainingError
from cxr_fastai.explore import chosen_rate, find_rate, one_run, phase_of, suggest, suggested_rate, warn_of_doubts
from cxr_fastai.fitting import build_learner
from cxr_fastai.model import LoadedWeights
from cxr_fastai.training import prepare_table, train


@pytest.fixture
def small(films: Path) -> TrainConfig:
    return TrainConfig(data=str(films), size=32, arch="resnet18", weights="none", batch_size=8)


def test_suggestions_have_median_and_spread_and_a_plot(small: TrainConfig, tmp_path: Path) -> None:
    found = find_rate(small, seeds=2, iterations=40, plot=tmp_path / "lr.png")
    assert set(found["suggestions"]) <= {"valley", "steep", "minimum", "slide"}
    assert all(s["low"] <= s["median"] <= s["high"] for s in found["suggestions"].values())
    assert (tmp_path / "lr.png").read_bytes()[:4] == b"\x89PNG"
    assert chosen_rate(found) == found["suggested"]["lr"] == found["suggestions"]["valley"]["median"]
    assert found["phase"] == "from scratch"
    assert (found["plot"], found["suggested"]["method"]) == (str(tmp_path / "lr.png"), "valley")


def learner(config: TrainConfig) -> Learner:
    table = prepare_table(config, QUIET)
    return build_learner(table, config, OpenFilm(config.size), torch.device("cpu"))[0]


def state_of(learn: Learner) -> list:
    """Return all that a run of lr_find could change."""
    return [
        {name: value.clone() for name, value in learn.model.state_dict().items()},
        [p.requires_grad for p in learn.model.parameters()],
        [p.grad for p in learn.model.parameters()],
        learn.model.training,
        None if learn.opt is None else [copy.deepcopy(learn.opt.state_dict()), learn.opt.frozen_idx],
        (learn.path, learn.model_dir, sorted(map(id, learn.cbs))),
        (random.getstate(), torch.get_rng_state(), list(np.random.get_state())),  # noqa: NPY002
        [loader.rng.getstate() for loader in learn.dls.loaders],
    ]


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor | np.ndarray):
        return bool((torch.as_tensor(a) == torch.as_tensor(b)).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_the_learner_stays_as_it_was(small: TrainConfig) -> None:
    learn = learner(small)
    before = state_of(learn)
    rates, losses = one_run(learn, 30, lambda: None)
    assert len(rates) == len(losses) > 10
    assert np.all(np.diff(rates) > 0)
    assert same(state_of(learn), before)
    # Also when it was trained before, with moments in its optimiser and layers that stand still.
    with learn.no_bar(), learn.no_logging():
        learn.freeze()
        learn.fit(1)
    before, optimiser = state_of(learn), learn.opt
    one_run(learn, 30, lambda: None, lr_mult=100)
    assert same(state_of(learn), before)
    assert learn.opt is optimiser


def test_the_learner_stays_as_it_was_when_it_is_stopped(small: TrainConfig) -> None:
    learn = learner(small)
    before, steps = state_of(learn), iter(range(5))

    def stop() -> None:
        if next(steps) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one_run(learn, 30, stop, frozen=True)
    assert same(state_of(learn), before)


def test_the_rate_is_sought_for_the_phase_that_uses_it(small: TrainConfig, tmp_path: Path) -> None:
    learn = learner(small)
    trained = []

    def look() -> None:
        trained.append((
            sum(p.requires_grad for p in learn.model[0].parameters()),
            [h["lr"] for h in learn.opt.hypers],
        ))  # fmt: skip

    one_run(learn, 30, look, frozen=True)
    assert trained[-1][0] == 0  # not even the batch norms, which fastai trains in frozen layers
    assert len(set(trained[-1][1])) == 1
    one_run(learn, 30, look, lr_mult=100)
    assert trained[-1][0] == 60
    first, middle, last = trained[-1][1]
    assert (last / first, last / middle) == pytest.approx((100, 10))
    phantom = LoadedWeights("phantom", "", True)
    assert phase_of(small, phantom, unfrozen=False) == ("frozen", 1)
    assert phase_of(small, phantom, unfrozen=True) == ("fine-tune", 1)
    (tmp_path / "dataset.json").touch()  # as `generate` leaves one
    assert phase_of(dataclasses.replace(small, data=str(tmp_path)), phantom, unfrozen=True) == ("fine-tune", 2)
    assert phase_of(small, LoadedWeights("imagenet", "", True), unfrozen=True) == ("fine-tune", 100)
    assert phase_of(small, LoadedWeights("none", "", False, whole=True), unfrozen=True) == ("from scratch", 1)
    few_real = LoadedWeights("phantom", "", True, whole=True)
    assert phase_of(small, few_real, unfrozen=False) == phase_of(small, few_real, unfrozen=True) == ("fine-tune", 1)


def test_ten_films_are_enough(tmp_path: Path) -> None:
    write_films(tmp_path / "ten", ["normal", "abnormal"] * 5)
    config = TrainConfig(data=str(tmp_path / "ten"), size=32, arch="resnet18", weights="none")  # one batch an epoch
    found = find_rate(config, seeds=1, iterations=60, plot=tmp_path / "lr.png")
    assert 1e-7 < found["suggested"]["lr"] < 10
    assert found["suggested"]["reason"].endswith("of one seed")


def test_the_suggestion_says_why_and_how_far_it_can_be_trusted() -> None:
    assert suggested_rate({"steep": [1.0], "valley": [1e-3, 2e-3, 1.2e-3]}, 3) == {
        "lr": 1.2e-3, "method": "valley", "reason": "valley, median of 3 seeds; seeds agree within a factor of 2.0",
    }  # fmt: skip
    assert suggested_rate({"slide": [1e-3, 2e-2]}, 3) == {
        "lr": pytest.approx(1.05e-2), "method": "slide",
        "reason": "slide, median of 2 of 3 seeds; seeds differ by a factor of 20",
    }  # fmt: skip
    assert suggested_rate({"valley": [1e-3]}, 1)["reason"] == "valley, of one seed"


def test_seeds_that_do_not_agree_are_warned_of(capsys: pytest.CaptureFixture) -> None:
    suggested = {"lr": 1e-3, "method": "valley", "reason": ""}
    warn_of_doubts(suggested, {"low": 1e-3, "high": 5e-3}, 1, False, Console())
    assert capsys.readouterr().out == ""
    warn_of_doubts(suggested, {"low": 1e-3, "high": 6e-3}, 1, False, Console())
    assert "WARNING: the seeds do not agree on a learning rate. 1.0e-03 to 6.0e-03." in capsys.readouterr().out
    warn_of_doubts(suggested, {"low": 1e-3, "high": 1e-3}, 100, True, Console())
    told = capsys.readouterr().out
    assert "trains all layers, its first layers 100 times slower, at half of its --lr" in told
    assert "this rate there is --lr 2.0e-03" in told
    warn_of_doubts(suggested, {"low": 1e-3, "high": 1e-3}, 1, True, Console())
    assert "trains all layers at half of its --lr" in capsys.readouterr().out


def test_the_minimum_method_gives_a_tenth_of_the_best_rate() -> None:
    rates = np.logspace(-7, 1, 100)
    losses = 1 + (np.log10(rates) + 2) ** 2 / 10  # lowest at 1e-2
    assert suggest("minimum", rates, losses) == pytest.approx(1e-3, rel=0.2)
    assert suggest("valley", rates[:20], losses[:20]) is None  # too few steps to say anything


def test_no_suggestion_is_an_error(small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cxr_fastai.explore.one_run", lambda *a, **k: (np.logspace(-7, -5, 5), np.ones(5)))
    with pytest.raises(TrainingError, match="lr-find: no learning rate lowered the loss; give more --iterations"):
        find_rate(small, seeds=1, iterations=40, plot=tmp_path / "lr.png")


@pytest.mark.long
def test_train_with_lr_auto_uses_the_suggestion(films: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        data=str(films), out=str(tmp_path), name="auto", size=32, epochs=1, arch="resnet18", weights="none", lr=None
    )
    run, _ = train(config)
    rate = json.loads((run / "config.json").read_text())["config"]["lr"]
    assert 1e-7 < rate < 10
    assert (run / "lr_find.png").is_file()
