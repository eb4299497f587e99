"""What a tracker is told of a run, and that none of them can stop one. The libraries are fakes, but for TensorBoard."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from cxr_fastai.cli import train_config
from cxr_fastai.config import TrainConfig
from cxr_fastai.console import Console
from cxr_fastai.errors import Interrupted, UsageError
from cxr_fastai.runs import finish, read_cells, sha256
from cxr_fastai.tracking import ENVIRONMENT, IMAGES, Trackers, adapter, finite, pictures_of, settings_of, tracked
from cxr_fastai.training import train

ROW = {"epoch": 2, "phase": "fine-tune", "train_loss": 0.5, "valid_auroc": float("nan"), "lr": 0.001}


class Told:
    """A tracker that notes what it is told, and may fail."""

    def __init__(self, fails: str = ""):
        self.calls: list[tuple] = []
        self.fails = fails

    def __getattr__(self, name: str):
        def told(*args: object) -> None:
            self.calls.append((name, *args))
            if name == self.fails:
                raise ConnectionError("no route\nto host")

        return told


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "as the user set it")


def tiny(films: Path, out: Path, **settings: object) -> TrainConfig:
    return TrainConfig(data=str(films), out=str(out), name="x", arch="resnet18", weights="none", size=32, epochs=1,
                       freeze_epochs=1, batch_size=8, **settings)  # fmt: skip


# What is told --------------------------------------------------------------------------------------------------------


def test_settings_are_texts_numbers_and_truth_values() -> None:
    record = {
        "config": {"lr": 0.001, "name": None, "prevalence": [0.1, 0.2], "track": [], "hash_ids": False},
        "task": "binary", "positive": None, "device": "cpu", "precision": "fp32", "versions": {"torch": "2.11"},
        "notes": ["not told"],
    }  # fmt: skip
    assert settings_of(record) == {
        "lr": 0.001, "prevalence": "0.1, 0.2", "hash_ids": False, "task": "binary", "device": "cpu",
        "precision": "fp32", "version.torch": "2.11",
    }  # fmt: skip


def test_only_numbers_are_told() -> None:
    assert finite({"a": 1.0, "b": None, "c": float("nan"), "d": float("inf")}) == {"a": 1.0}


def test_a_run_is_told_from_start_to_end(finished: Path) -> None:
    told = Told()
    trackers = Trackers({"fake": told})
    trackers.epoch(ROW, None)  # before the start there is nobody to tell
    assert told.calls == []
    trackers.start(finished)
    trackers.epoch(ROW, None)
    trackers.epoch(ROW, 3)
    metrics = {"auroc": {"value": 0.9, "low": 0.8, "high": 0.95, "n": 4},
               "f1": {"value": None, "low": None, "high": None, "n": 0}}  # fmt: skip
    trackers.finish(finished, {"metrics": metrics})
    trackers.close("FAILED")
    (start, run, settings), *rest = told.calls
    assert (start, run, settings["arch"], settings["size"]) == ("start", finished, "densenet121", 32)
    assert rest == [
        ("log", {"train_loss": 0.5, "lr": 0.001}, 2),
        ("log", {"fold-3/train_loss": 0.5, "fold-3/lr": 0.001}, 2),
        ("log", {"test/auroc": 0.9, "test/auroc_low": 0.8, "test/auroc_high": 0.95}, None),
        ("close", "FINISHED"),
    ]


def test_pictures_are_told_only_when_asked_for_and_name_no_film(finished: Path) -> None:
    told = Told()
    trackers = Trackers({"fake": told}, images=True)
    trackers.start(finished)
    trackers.finish(finished, {"metrics": {}})
    pictures = [call[1:] for call in told.calls if call[0] == "picture"]
    frame = read_cells(finished / "predictions.csv")
    assert len(pictures) == min(IMAGES, len(frame)) == 12
    assert [name for name, _, _ in pictures[:2]] == ["film-01", "film-02"]
    assert all(pixels.shape == (320, 320, 3) and pixels.dtype == np.uint8 for _, pixels, _ in pictures)
    assert {caption.rpartition(" is ")[2] for _, _, caption in pictures} == {"normal", "abnormal"}
    assert not any(Path(path).stem in str(picture[::2]) for path in frame["path"] for picture in pictures)


# What goes wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["start", "log", "picture", "close"])
def test_a_tracker_that_fails_is_left_out_with_one_warning(finished: Path, fails: str, capsys) -> None:
    broken, sound = Told(fails), Told()
    trackers = Trackers({"broken": broken, "sound": sound}, images=True, console=Console())
    trackers.start(finished)
    for _ in range(3):
        trackers.epoch(ROW, None)
    trackers.finish(finished, {"metrics": {}})
    assert capsys.readouterr().out == (
        "WARNING: --track broken has stopped. no route to host. The training goes on without it.\n"
    )
    assert [call[0] for call in sound.calls] == ["start", *["log"] * 4, *["picture"] * 12, "close"]
    assert broken.calls[-1] == ("close", "FAILED")


@pytest.mark.parametrize(
    ("error", "status"), [(Interrupted("x"), "KILLED"), (KeyboardInterrupt(), "KILLED"), (ValueError("x"), "FAILED")]
)
def test_trackers_are_closed_when_training_fails(finished, monkeypatch, error: BaseException, status: str) -> None:
    told = Told()
    monkeypatch.setattr("cxr_fastai.tracking.ADAPTERS", {"mlflow": lambda: told})

    def fail() -> None:
        with tracked(TrainConfig(track=("mlflow",))) as trackers:
            trackers.start(finished)
            raise error

    with pytest.raises(type(error)):
        fail()
    assert told.calls[-1] == ("close", status)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "trackio"])
def test_a_library_that_is_missing_is_said_before_a_film_is_read(tmp_path: Path, monkeypatch, name: str) -> None:
    for module in (name, "torch.utils.tensorboard"):
        monkeypatch.delitem(sys.modules, module, raising=False)

    class Missing:
        def find_spec(self, module: str, path: object = None, target: object = None) -> None:
            if module.partition(".")[0] == name:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(UsageError, match=rf"^--track {name}: {name} is not installed; pip install {name}$"):
        train(TrainConfig(data="no/such/films", out=str(tmp_path), track=(name,)))
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_cannot_be_imported_is_one_line(monkeypatch) -> None:
    def broken() -> None:
        raise TypeError("Descriptors cannot be created")

    monkeypatch.setattr("cxr_fastai.tracking.ADAPTERS", {"mlflow": broken})
    with pytest.raises(UsageError, match=r"--track mlflow: mlflow cannot be imported \(TypeError: Descriptors"):
        adapter("mlflow")


def test_trackers_are_named_once_from_the_list() -> None:
    assert train_config({"data": None, "track": ["mlflow, trackio", "tensorboard"]}).track == (
        "mlflow", "trackio", "tensorboard",
    )  # fmt: skip
    with pytest.raises(UsageError, match="--track is wandb, but must be one of tensorboard, mlflow, trackio"):
        TrainConfig(track=("wandb",))
    with pytest.raises(UsageError, match="--track is mlflow, mlflow, but must be each tracker once"):
        TrainConfig(track=("mlflow", "mlflow"))
    with pytest.raises(UsageError, match="--track-images is given alone, but must be beside a --track"):
        TrainConfig(track_images=True)
    assert TrainConfig.from_json(TrainConfig(track=("mlflow",)).to_json()).track == ("mlflow",)


# The adapters --------------------------------------------------------------------------------------------------------


def test_mlflow_gets_params_metrics_and_pictures(finished: Path, monkeypatch) -> None:
    client = Told()
    client.get_experiment_by_name = lambda name: None
    client.create_experiment = lambda name: f"id of {name}"
    client.create_run = lambda experiment, run_name: SimpleNamespace(
        info=SimpleNamespace(run_id=f"{run_name} in {experiment}")
    )
    entities = ModuleType("mlflow.entities")
    entities.Param = lambda key, value: (key, value)
    entities.Metric = lambda key, value, timestamp, step: (key, value, step)
    mlflow = ModuleType("mlflow")
    mlflow.MlflowClient = lambda: client
    client.log_batch = lambda run, **given: client.calls.append(("log_batch", run, given))
    client.log_image = lambda run, pixels, artifact_file: client.calls.append(("log_image", run, artifact_file))
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    with tracked(TrainConfig(track=("mlflow",), track_images=True)) as trackers:
        trackers.start(finished)
        trackers.epoch(ROW, None)
        trackers.finish(finished, {"metrics": {"auroc": {"value": 0.9, "low": None, "high": None}}})
    name = "small in id of cxr_fastai"
    params, epoch, test, image, text, *_, end = client.calls
    assert ("arch", "densenet121") in params[2]["params"]
    assert epoch == ("log_batch", name, {"metrics": [("train_loss", 0.5, 2), ("lr", 0.001, 2)]})
    assert test == ("log_batch", name, {"metrics": [("test/auroc", 0.9, 0)]})
    assert image == ("log_image", name, "film-01.png")
    assert (text[0], text[1], text[3]) == ("log_text", name, "film-01.txt")
    assert end == ("set_terminated", name, "FINISHED")


def test_trackio_gets_config_rows_and_pictures_and_prints_nothing_on_standard_output(
    finished: Path, monkeypatch, capsys
) -> None:
    calls: list = []
    trackio = ModuleType("trackio")
    trackio.init = lambda **given: (sys.stdout.write("* Trackio project initialized"), calls.append(("init", given)))
    trackio.log = lambda values, step=None: calls.append(("log", values, step))
    trackio.finish = lambda: calls.append(("finish",))
    trackio.Image = lambda pixels, caption: (pixels.shape, caption[:5])
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    with tracked(TrainConfig(track=("trackio",), track_images=True)) as trackers:
        trackers.start(finished)
        trackers.epoch(ROW, None)
        trackers.finish(finished, {"metrics": {}})
    assert (calls[0][1]["project"], calls[0][1]["name"], calls[0][1]["config"]["size"]) == ("cxr_fastai", "small", 32)
    assert calls[1] == ("log", {"train_loss": 0.5, "lr": 0.001}, 2)
    assert calls[3] == ("log", {"film-01": ((320, 320, 3), "said ")}, None)
    assert calls[-1] == ("finish",)
    assert capsys.readouterr().out == ""


def test_tensorboard_keeps_every_epoch_in_the_run_and_the_manifest_has_its_hash(films: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, metrics = train(tiny(films, tmp_path, track=("tensorboard",), track_images=True))
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    history = read_cells(run / "history.csv")
    told = events.Scalars("valid_loss")
    assert [event.step for event in told] == [1, 2]
    assert [event.value for event in told] == pytest.approx(history["valid_loss"].astype(float).tolist(), rel=1e-4)
    assert events.Scalars("test/auroc")[0].value == pytest.approx(metrics["metrics"]["auroc"]["value"])
    assert len([tag for tag in events.Tags()["images"] if tag.startswith("film-")]) == 12
    assert "_hparams_/session_start_info" in events.summary_metadata
    (file,) = (run / "tensorboard").iterdir()
    hashes = json.loads((run / "manifest.json").read_text())["sha256"]
    assert hashes[f"tensorboard/{file.name}"] == sha256(file)
    assert json.loads((run / "config.json").read_text())["config"]["track"] == ["tensorboard"]


def test_a_tracker_whose_files_still_changed_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events").write_text("a")
    finish(tmp_path)
    assert list(json.loads((tmp_path / "manifest.json").read_text())["sha256"]) == ["tensorboard/events"]


def test_each_epoch_is_told_also_the_one_that_ends_the_training(films: Path, tmp_path: Path, monkeypatch) -> None:
    told = Told("log")
    monkeypatch.setattr("cxr_fastai.tracking.ADAPTERS", {"mlflow": lambda: told})
    run, _ = train(tiny(films, tmp_path, track=("mlflow",)))  # which fails at the first epoch, and training ends well
    assert [call[0] for call in told.calls] == ["start", "log", "close"]
    assert (run / "manifest.json").is_file()
    sound = Told()
    monkeypatch.setattr("cxr_fastai.tracking.ADAPTERS", {"mlflow": lambda: sound})
    monkeypatch.setattr("cxr_fastai.callbacks.History._auroc", lambda *_: 0.5)
    monkeypatch.setattr("cxr_fastai.callbacks.BestEpoch.after_epoch", ends_at_the_second)
    run, _ = train(tiny(films, tmp_path / "again", track=("mlflow",), folds=2))
    steps = [(call[2], next(iter(call[1]))) for call in sound.calls if call[0] == "log"]
    assert steps == [(1, "fold-1/train_loss"), (2, "fold-1/train_loss"), (1, "fold-2/train_loss"),
                     (2, "fold-2/train_loss"), (None, "test/auroc")]  # fmt: skip


def ends_at_the_second(best) -> None:
    from fastai.callback.core import CancelFitException

    best.epoch_of_best, best.weights = 1, best.model.state_dict()
    if best.history.rows[-1]["epoch"] == 2:
        raise CancelFitException


def test_pictures_of_films_that_are_gone_are_left_out(finished: Path, monkeypatch) -> None:
    from cxr_fastai.predict import Prediction, Predictor

    monkeypatch.setattr(Predictor, "predict", lambda self, paths, **_: [Prediction(path, error="x") for path in paths])
    assert list(pictures_of(finished)) == []
