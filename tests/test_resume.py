"""A run that was cut off ends, resumed, as the one that never was: to the last bit."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import onnx
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback

from cxr_fastai import training
from cxr_fastai.checkpoint import chance_of, read_checkpoint, set_chance
from cxr_fastai.config import TrainConfig
from cxr_fastai.errors import ModelFileError, UsageError
from cxr_fastai.model import make_body
from cxr_fastai.tracking import Watcher


class PowerCutError(Exception):
    pass


class PowerCut(Callback):
    """Cut a fit off after a batch or in the validation of an epoch, both counted over both phases from 1."""

    order = 99

    def __init__(self, epoch: int, batch: int | None):
        self.at = (epoch, batch)

    def after_batch(self) -> None:
        batch = self.iter + 1 if self.training else None
        if (self.history.epochs_done + 1, batch) == self.at:
            raise PowerCutError("now")


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return weights that count as pretrained, so that there are two phases."""
    torch.manual_seed(3)
    file = tmp_path_factory.mktemp("weights") / "w.pth"
    state = {f"0.{k}": v for k, v in make_body("resnet18")[0].state_dict().items()}
    torch.save(state | {"1.linear.bias": torch.zeros(2)}, file)
    return str(file)


def config(films: Path, out: Path, name: str, body: str, **more: object) -> TrainConfig:
    settings = {"epochs": 2, "freeze_epochs": 1, "size": 32, "arch": "resnet18", "batch_size": 8, **more}
    return TrainConfig(data=str(films), out=str(out), name=name, weights=body, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def unbroken(films: Path, body: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.train(config(films, tmp_path_factory.mktemp("unbroken"), "x", body))[0]


def cut(monkeypatch: pytest.MonkeyPatch, settings: TrainConfig, epoch: int, batch: int | None) -> Path:
    fit = training.fit
    with monkeypatch.context() as patch:
        patch.setattr(training, "fit", lambda *given: fit(*given[:6], [PowerCut(epoch, batch)]))
        with pytest.raises(PowerCutError):
            training.train(settings)
    return Path(settings.out) / str(settings.name)


def weights(run: Path) -> str:
    digest = hashlib.sha256()
    for tensor in onnx.load(run / "model.onnx").graph.initializer:
        digest.update(onnx.numpy_helper.to_array(tensor).tobytes())
    return digest.hexdigest()


def assert_equal(run: Path, other: Path) -> None:
    assert weights(run) == weights(other)
    histories = [pd.read_csv(r / "history.csv").drop(columns="seconds") for r in (run, other)]
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    assert (run / "predictions.csv").read_bytes() == (other / "predictions.csv").read_bytes()


@pytest.mark.parametrize(
    ("epoch", "batch", "minutes"),
    [
        (2, 1, 0),
        (1, 3, 1e-9),
        (3, 4, 1e-9),
        *(pytest.param(*at, marks=pytest.mark.long) for at in ((1, 2, 0), (1, None, 0), (3, 3, 0), (2, 2, 1e-9))),
    ],
)
def test_resumed_it_ends_like_the_unbroken(
    films: Path, body: str, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int,
    batch: int | None, minutes: float,
) -> None:  # fmt: skip
    run = cut(monkeypatch, config(films, tmp_path, "x", body, checkpoint_minutes=minutes), epoch, batch)
    kept = read_checkpoint(run / "checkpoints" / "last.pth")
    assert len(kept["history"]) == epoch - 1
    assert kept["films"] == (8 * (batch or 0) if minutes else 0)
    assert training.resume(run)[0] == run
    assert_equal(run, unbroken)
    assert (tmp_path / "latest").resolve() == run.resolve()


def test_who_watches_is_not_told_again_of_epochs_that_were_done(
    films: Path, body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    watcher = Watcher(SimpleNamespace(epoch=lambda row, fold: told.append(row["epoch"])))  # type: ignore[arg-type]
    run = cut(monkeypatch, config(films, tmp_path, "x", body), 3, 1)  # the second phase has one epoch done
    fit = training.fit
    monkeypatch.setattr(training, "fit", lambda *given: fit(*given[:6], [watcher]))
    training.resume(run)
    assert told == [3]


@pytest.mark.long
def test_folds_go_on_with_the_one_that_was_cut_off(
    films: Path, body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = training.train(config(films, tmp_path, "whole", body, folds=2, epochs=1))[0]
    settings = config(films, tmp_path, "cut", body, folds=2, epochs=1)
    fit = training.fit

    def second_is_cut(*given: object) -> None:
        fit(*given[:6], [PowerCut(2, 2)] if given[5] == 2 else [])  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(training, "fit", second_is_cut)
        with pytest.raises(PowerCutError):
            training.train(settings)
    run = training.resume(tmp_path / "cut")[0]
    assert_equal(run, whole)
    assert (run / "out_of_fold.csv").read_bytes() == (whole / "out_of_fold.csv").read_bytes()


def test_what_cannot_be_gone_on_with_is_refused(
    films: Path, body: str, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"--resume .*: that run is finished"):
        training.resume(unbroken)
    with pytest.raises(UsageError, match=r"--resume .*nowhere: no run there that was cut off"):
        training.resume(tmp_path / "nowhere")
    copy = tmp_path / "films"
    shutil.copytree(films, copy)
    run = cut(monkeypatch, config(copy, tmp_path, "x", body), 2, 1)
    next(copy.rglob("*.png")).unlink()
    with pytest.raises(
        UsageError, match=r"not those of .* \(60 films then, 59"
    ):
        training.resume(run)
    (run / "checkpoints" / "last.pth").write_bytes(b"half a file")
    with pytest.raises(ModelFileError, match=r"last\.pth: not a checkpoint"):
        read_checkpoint(run / "checkpoints" / "last.pth")


def test_memory_that_runs_out_halves_the_batch_and_keeps_the_step(
    films: Path, body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, seen = training.fit, []

    def weigh(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if model.training:
            seen.append(len(inputs[0]))
            if len(inputs[0]) > 2:
                raise torch.OutOfMemoryError("simulated")

    def short_of_memory(*given: object) -> None:
        scales = given[0].model.register_forward_pre_hook(weigh)  # type: ignore[attr-defined]
        fit(*given)  # type: ignore[arg-type]
        scales.remove()

    monkeypatch.setattr(training, "fit", short_of_memory)
    run, _ = training.train(config(films, tmp_path, "x", body, epochs=1))
    assert seen[:2] == [8, 4]
    assert set(seen[2:]) == {2}
    assert pd.read_csv(run / "history.csv")["epoch"].tolist() == [1, 2]


def test_chance_goes_on_where_it_was(films: Path, body: str) -> None:
    loader = torch.utils.data.DataLoader([1])
    loader.rng = __import__("random").Random(1)
    state = chance_of([loader])
    drawn = torch.rand(2), loader.rng.random()
    set_chance(state, [loader])
    assert torch.equal(torch.rand(2), drawn[0])
    assert loader.rng.random() == drawn[1]


def test_resume_takes_no_other_option() -> None:
    done = subprocess.run(
        [sys.executable, "cli.py", "train", "--resume", "x", "--epochs", "5", "--lr", "1"],
        capture_output=True, text=True, env={**os.environ}, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip().endswith("--resume takes all settings from the run; leave out --epochs, --lr")
