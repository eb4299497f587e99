"""Training told to a tracker as it goes on: TensorBoard, MLflow or Trackio. Off unless --track asks for one.

    with tracked(config, console) as trackers:      UsageError where a library is missing, before a film is read
        trackers.start(run)                         config.json as hyperparameters
        fit(..., watchers=trackers.watchers)        each row of history.csv
        trackers.finish(run, metrics)               test figures; with --track-images a few films, too

A tracker is an adapter of four methods around its library, which is imported when it is asked for. What goes wrong
in it after that (a server that is gone, a full disk) ends the tracker with one warning, never the training.

TensorBoard's files lie in RUN/tensorboard and are closed before the manifest is written, so that their hashes are in
it and they move with the run. MLflow and Trackio keep theirs where they keep all runs, outside of the run folder.
"""

import contextlib
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from fastai.callback.core import Callback

from cxr_fastai.callbacks import EpochCallback
from cxr_fastai.config import TrainConfig
from cxr_fastai.console import QUIET, Console
from cxr_fastai.errors import Interrupted, UsageError
from cxr_fastai.images import resize
from cxr_fastai.predict import Predictor, overlay
from cxr_fastai.runs import read_cells

PROJECT = "cxr_fastai"  # MLflow's experiment, Trackio's project
IMAGES, SIDE = 16, 320  # films at most, and their pixels a side
FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"  # MLflow's words
# Not to report to the makers of the libraries, and not to wait minutes for a server that does not answer. What a user
# has set stays.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


class Tracker(Protocol):
    """What an adapter does; every method may raise anything."""

    def start(self, run: Path, settings: dict[str, Any]) -> None:
        """Begin a run named as the folder `run`, with its settings: texts, numbers, truth values."""

    def log(self, values: dict[str, float], step: int | None) -> None:
        """Note values of an epoch; without a step, of the whole run."""

    def picture(self, name: str, pixels: np.ndarray, caption: str) -> None:
        """Keep a picture (H, W, 3) uint8."""

    def close(self, status: str) -> None:
        """End the run: `FINISHED`, `FAILED` or `KILLED`."""


class TensorBoard:
    """Event files in RUN/tensorboard; `tensorboard --logdir exports` shows all runs."""

    def __init__(self) -> None:
        self.library = importlib.import_module("torch.utils.tensorboard")

    def start(self, run: Path, settings: dict[str, Any]) -> None:  # noqa: D102
        self.writer = self.library.SummaryWriter(str(run / "tensorboard"))
        # `add_hparams` would open a run of its own beside this one.
        for part in importlib.import_module("torch.utils.tensorboard.summary").hparams(settings, {"test/auroc": 0}):
            self.writer.file_writer.add_summary(part)

    def log(self, values: dict[str, float], step: int | None) -> None:  # noqa: D102
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, name: str, pixels: np.ndarray, caption: str) -> None:  # noqa: D102
        self.writer.add_image(name, pixels, dataformats="HWC")
        self.writer.add_text(name, caption)

    def close(self, status: str) -> None:  # noqa: D102
        self.writer.close()


class MLflow:
    """A run of the experiment `cxr_fastai` (or MLFLOW_EXPERIMENT_NAME), where MLFLOW_TRACKING_URI says."""

    def __init__(self) -> None:
        self.mlflow = importlib.import_module("mlflow")
        self.entities = importlib.import_module("mlflow.entities")

    def start(self, run: Path, settings: dict[str, Any]) -> None:  # noqa: D102
        self.client = self.mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self.client.create_experiment(name)
        self.run = self.client.create_run(experiment, run_name=run.name).info.run_id
        params = [self.entities.Param(key, str(value)) for key, value in settings.items()]
        self.client.log_batch(self.run, params=params)

    def log(self, values: dict[str, float], step: int | None) -> None:  # noqa: D102
        now = int(time.time() * 1000)
        metrics = [self.entities.Metric(key, value, now, step or 0) for key, value in values.items()]
        self.client.log_batch(self.run, metrics=metrics)

    def picture(self, name: str, pixels: np.ndarray, caption: str) -> None:  # noqa: D102
        self.client.log_image(self.run, pixels, artifact_file=f"{name}.png")
        self.client.log_text(self.run, caption, f"{name}.txt")

    def close(self, status: str) -> None:  # noqa: D102
        self.client.set_terminated(self.run, status)


class Trackio:
    """A run of the project `cxr_fastai`, on this machine unless Trackio's own settings say otherwise."""

    def __init__(self) -> None:
        self.trackio = importlib.import_module("trackio")

    def start(self, run: Path, settings: dict[str, Any]) -> None:  # noqa: D102
        self.trackio.init(project=PROJECT, name=run.name, config=settings)

    def log(self, values: dict[str, float], step: int | None) -> None:  # noqa: D102
        self.trackio.log(values, step=step)

    def picture(self, name: str, pixels: np.ndarray, caption: str) -> None:  # noqa: D102
        self.trackio.log({name: self.trackio.Image(pixels, caption=caption)})

    def close(self, status: str) -> None:  # noqa: D102
        self.trackio.finish()


ADAPTERS: dict[str, Callable[[], Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "trackio": Trackio}


class Trackers:
    """The trackers of one run, none or several; one that fails is left out from then on, with one warning."""

    def __init__(self, trackers: Mapping[str, Tracker], images: bool = False, console: Console = QUIET):
        self.waiting, self.running = dict(trackers), dict[str, Tracker]()
        self.images, self.console = images, console
        self.watchers: list[Callback] = [Watcher(self)] if trackers else []

    def start(self, run: Path) -> None:
        """Begin to track a run whose config.json is written."""
        if not self.waiting:
            return
        settings = settings_of(json.loads((run / "config.json").read_text(encoding="utf-8")))
        self.running, self.waiting = self.waiting, {}
        self._tell(lambda tracker: tracker.start(run, settings))

    def epoch(self, row: Mapping[str, Any], fold: int | None) -> None:
        """Log a row of history.csv."""
        before = "" if fold is None else f"fold-{fold}/"
        values = {f"{before}{key}": float(value) for key, value in row.items() if key not in ("epoch", "phase")}
        self._tell(lambda tracker: tracker.log(finite(values), int(row["epoch"])))

    def finish(self, run: Path, metrics: Mapping[str, Any]) -> None:
        """Log the test figures with their intervals, pictures if they were asked for, and close."""
        values = {
            f"test/{name}{bound and '_' + bound}": entry[bound or "value"]
            for name, entry in metrics["metrics"].items()
            for bound in ("", "low", "high")
        }
        self._tell(lambda tracker: tracker.log(finite(values), None))
        if self.images:
            self._tell(lambda tracker: show(tracker, run))
        self.close(FINISHED)

    def close(self, status: str) -> None:
        """End what still runs; a second time does nothing."""
        self._tell(lambda tracker: tracker.close(status))
        self.running = {}

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.running.items()):
            try:
                # Some print to standard output, which belongs to --json.
                with contextlib.redirect_stdout(sys.stderr):
                    call(tracker)
            except Exception as error:  # noqa: BLE001 - whatever a library or a server does, the training goes on
                del self.running[name]
                with contextlib.suppress(Exception):
                    tracker.close(FAILED)  # its files must not change after the manifest has their hashes
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                self.console.warn(f"--track {name} has stopped", f"{reason}. The training goes on without it.")


class Watcher(EpochCallback):
    """Tell the trackers of each epoch, before `BestEpoch` (60) may end the fit with it."""

    order = 56

    def __init__(self, trackers: Trackers):
        self.trackers = trackers

    def epoch_done(self) -> None:  # noqa: D102
        self.trackers.epoch(self.history.rows[-1], self.history.fold)


@contextlib.contextmanager
def tracked(config: TrainConfig, console: Console = QUIET) -> Iterator[Trackers]:
    """Give the trackers that `config.track` names; they are closed however the body ends.

    Raises
    ------
    UsageError
        Where a library is not installed, or cannot be imported.
    """
    trackers = Trackers({name: adapter(name) for name in config.track}, config.track_images, console)
    try:
        yield trackers
    except BaseException as error:
        trackers.close(KILLED if isinstance(error, Interrupted | KeyboardInterrupt) else FAILED)
        raise
    trackers.close(FINISHED)


def adapter(name: str) -> Tracker:
    """Return the adapter of a tracker, its library imported."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        return ADAPTERS[name]()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == name:
            raise UsageError(f"--track {name}: {name} is not installed; pip install {name}") from None
        raise UsageError(f"--track {name}: {name} lacks {error.name}; pip install {error.name}") from error
    except Exception as error:
        raise UsageError(f"--track {name}: {name} cannot be imported ({type(error).__name__}: {error})") from error


def settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run was made with as texts, numbers and truth values by name; what is not set is left out."""
    versions = {f"version.{name}": value for name, value in record["versions"].items()}
    told = {**record["config"], **{key: record[key] for key in ("task", "positive", "device", "precision")}, **versions}
    shown = {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in told.items()}
    return {key: value for key, value in shown.items() if value not in (None, "")}


def finite(values: Mapping[str, float | None]) -> dict[str, float]:
    """Return the values that are numbers; services refuse others."""
    return {key: value for key, value in values.items() if value is not None and math.isfinite(value)}


def show(tracker: Tracker, run: Path) -> None:
    """Give a tracker the pictures of a run."""
    for picture in pictures_of(run):
        tracker.picture(*picture)


def pictures_of(run: Path) -> Iterator[tuple[str, np.ndarray, str]]:
    """Yield name, film with its evidence (H, W, 3) uint8, and caption of some test films of every label.

    Neither names the film: file names may hold the names of patients.
    """
    frame = read_cells(run / "predictions.csv")
    frame = frame[frame["error"] == ""].sort_values("label", kind="stable")
    some = frame.iloc[np.linspace(0, len(frame) - 1, min(IMAGES, len(frame))).astype(int)]
    predictor = Predictor(run / "model.onnx")
    rows = predictor.predict(some["path"], keep_pixels=True)
    for number, (row, truth) in enumerate(zip(rows, some["label"], strict=True), 1):
        if row.pixels is None or row.evidence is None or row.probability is None:
            continue  # gone since it was tested
        said, is_true = row.label or "no finding", truth or "no finding"
        caption = f"said {said} (probability {row.probability:.3f}), is {is_true}"
        yield f"film-{number:02d}", overlay(resize(row.pixels, SIDE), predictor.evidence_shown(row)), caption
