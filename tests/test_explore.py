import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cxr_fastai.config import TrainConfig
from cxr_fastai.console import QUIET
from cxr_fastai.data import OpenFilm
from cxr_fastai.errors import TrainingError
from cxr_fastai.explore import chosen_rate, find_rate, one_run, suggest
from cxr_fastai.fitting import build_learner
from cxr_fastai.training import prepare_table, train


@pytest.fixture
def small(films: Path) -> TrainConfig:
    return TrainConfig(data=str(films), size=32, arch="resnet18", weights="none", batch_size=8)


def test_suggestions_have_median_and_spread_and_a_plot(small: TrainConfig, tmp_path: Path) -> None:
    found = find_rate(small, seeds=2, iterations=40, plot=tmp_path / "lr.png")
    assert set(found["suggestions"]) <= {"valley", "steep", "minimum", "slide"}
    assert all(s["low"] <= s["median"] <= s["high"] for s in found["suggestions"].values())
    assert (tmp_path / "lr.png").read_bytes()[:4] == b"\x89PNG"
    assert chosen_rate(found) == found["suggestions"]["valley"]["median"]


def test_the_learner_stays_as_it_was(small: TrainConfig) -> None:
    table = prepare_table(small, QUIET)
    learn = build_learner(table, small, OpenFilm(32), torch.device("cpu"))[0]
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    path = learn.path
    rates, losses = one_run(learn, 30, lambda: None)
    assert len(rates) == len(losses) > 10
    assert np.all(np.diff(rates) > 0)
    assert all(torch.equal(before[k], v) for k, v in learn.model.state_dict().items())
    assert learn.path == path


def test_the_minimum_method_gives_a_tenth_of_the_best_rate() -> None:
    rates = np.logspace(-7, 1, 100)
    losses = 1 + (np.log10(rates) + 2) ** 2 / 10  # lowest at 1e-2
    assert suggest("minimum", rates, losses) == pytest.approx(1e-3, rel=0.2)
    assert suggest("valley", rates[:20], losses[:20]) is None  # too few steps to say anything


def test_no_suggestion_is_an_error(small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cxr_fastai.explore.one_run", lambda *a: (np.logspace(-7, -5, 5), np.ones(5)))
    with pytest.raises(TrainingError, match="lr-find: no learning rate lowered the loss; give more --iterations"):
        find_rate(small, seeds=1, iterations=40, plot=tmp_path / "lr.png")


def test_train_with_lr_auto_uses_the_suggestion(films: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        data=str(films), out=str(tmp_path), name="auto", size=32, epochs=1, arch="resnet18", weights="none", lr=None
    )
    run, _ = train(config)
    rate = json.loads((run / "config.json").read_text())["config"]["lr"]
    assert 1e-7 < rate < 10
    assert (run / "lr_find.png").is_file()
