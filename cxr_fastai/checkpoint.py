"""Going on with a fit that was cut off: all that it needs, written beside it, and put back exactly where it was.

On a CPU a run that was resumed ends as one that never was cut off, to the last bit (tests/test_resume.py).
"""

import random
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback, CancelEpochException, CancelFitException
from fastai.data.load import DataLoader

from cxr_fastai.callbacks import EpochCallback
from cxr_fastai.config import world
from cxr_fastai.errors import ModelFileError
from cxr_fastai.ranks import bare
from cxr_fastai.runs import atomic_path


class Position(Callback):
    """Which phase and epoch a fit is in; from a checkpoint it goes on exactly where that one was written.

    Phases and epochs that were done are passed over (`skipping`). In the first one that was not, the states of chance
    are put back right before the next draw, so that on a CPU the run ends as if it had not been cut off.
    """

    order = 65  # every other callback has begun its fit or epoch by then

    def __init__(self, saved: dict[str, Any] | None = None):
        self.saved = saved
        self.phase, self.skipping = 0, False

    def before_fit(self) -> None:  # noqa: D102
        self.phase += 1
        if self.saved is not None and self.phase < self.saved["phase"]:
            raise CancelFitException
        if self.saved is not None and self.phase == self.saved["phase"]:
            bare(self.model).load_state_dict(self.saved["model"])
            self.opt.load_state_dict(self.saved["opt"])
            self.history.rows = list(self.saved["history"])
            self.best_epoch.restore(self.saved["best"])

    def before_epoch(self) -> None:  # noqa: D102
        saved = self.saved
        self.skipping = saved is not None and self.phase == saved["phase"] and self.epoch < saved["epoch"]
        if self.skipping:
            raise CancelEpochException
        if saved is None:
            return
        chance = partial(set_chance, saved["chance"], self.dls.loaders)
        if saved["order"] is None:
            chance()
            self.saved = None
        else:
            self.dls.train.continues = (saved["order"], saved["films"], chance)
            self.history.outputs[True] = [tuple(t.to(self.dls.device) for t in one) for one in saved["outputs"]]

    def before_train(self) -> None:  # noqa: D102
        if self.saved is not None:  # within an epoch
            self.learn.pct_train = self.saved["pct_train"]
            self.saved = None


class Checkpoint(EpochCallback):
    """Write all that a fit needs to go on, after each epoch, every so many minutes, and when it is stopped.

    The earlier file stays until the new one is whole. It holds tensors, numbers, text, lists and dicts alone, so that
    torch's `weights_only` reader takes it.
    """

    order = 70

    def __init__(self, file: Path, minutes: float = 0):
        self.file, self.seconds, self.written = file, minutes * 60, time.monotonic()
        self.writer, self.writing = ThreadPoolExecutor(1), Future[None]()
        self.writing.set_result(None)

    def before_epoch(self) -> None:  # noqa: D102
        if not self.position.skipping and not self.file.exists():
            self.write(self.epoch)

    def after_fit(self) -> None:  # noqa: D102
        self.finish()

    def close(self) -> None:
        """Wait for the file, whatever ended the fit."""
        self.writer.shutdown()

    def finish(self) -> None:
        """Wait until the file is written; raise what kept it from that."""
        self.writing.result()

    def after_batch(self) -> None:  # noqa: D102
        waiting = getattr(self.learn, "gradient_accumulation", None)
        if not self.training or (waiting is not None and waiting.count) or world() > 1:
            return
        due = self.seconds and time.monotonic() - self.written >= self.seconds
        if due or self.stop_signal.received:
            self.write(self.epoch, within=True)

    def epoch_done(self) -> None:  # noqa: D102
        self.write(self.epoch + 1)

    def write(self, epochs: int, *, within: bool = False) -> None:
        """Write the file, beside what goes on; `epochs` of this phase are done, `within` some batches of the next."""
        train = self.dls.train
        self.finish()
        state = {
            "phase": self.position.phase,
            "epoch": epochs,
            "order": list(train.order) if within else None,
            "films": len(self.history.outputs[True]) * train.bs if within else 0,
            "outputs": self.history.outputs[True] if within else [],
            "pct_train": self.learn.pct_train if within else 0.0,
            "model": bare(self.model).state_dict(),
            "opt": self.opt.state_dict(),
            "history": self.history.rows,
            "best": self.best_epoch.state(),
            "chance": chance_of(self.dls.loaders),
        }
        self.writing = self.writer.submit(_write, self.file, frozen(state))
        self.written = time.monotonic()


def _write(file: Path, state: dict[str, Any]) -> None:
    with atomic_path(file) as temporary:
        torch.save(state, temporary)


def frozen(value: Any) -> Any:
    """Return a copy that later steps do not change, of plain kinds alone: tensors on the CPU, numbers for numpy's."""
    if isinstance(value, torch.Tensor):
        return value.detach().as_subclass(torch.Tensor).to("cpu", copy=True)  # type: ignore[arg-type]
    if isinstance(value, dict):
        return {key: frozen(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(frozen(one) for one in value)
    return value.item() if isinstance(value, np.generic) else value


def chance_of(loaders: Iterable[DataLoader]) -> dict[str, Any]:
    """Return the states of all generators that a fit on `loaders` draws from, as plain values."""
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 (fastai draws from it)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": numpy_state,
        "python": _plain(random.getstate()),
        "orders": [_plain(_whole(loader).rng.getstate()) for loader in loaders],
    }


def set_chance(state: dict[str, Any], loaders: Iterable[DataLoader]) -> None:
    """Put back what `chance_of` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    numpy_state = {**state["numpy"], "state": {**state["numpy"]["state"]}}
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)  # noqa: NPY002
    random.setstate(_drawn(state["python"]))
    for loader, order in zip(loaders, state["orders"], strict=True):
        _whole(loader).rng.setstate(_drawn(order))


def _whole(loader: DataLoader) -> DataLoader:
    """Return the loader of which several processes take parts."""
    return getattr(loader, "dl", loader)


def _plain(state: tuple) -> list:
    return [state[0], list(state[1]), state[2]]


def _drawn(state: list) -> tuple:
    return (state[0], tuple(state[1]), state[2])


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Return what `Checkpoint` wrote; ModelFileError where the file is not whole or not one of ours."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        if missing := {"phase", "epoch", "model", "opt", "history", "best", "chance"} - set(state):
            raise ValueError(f"without {', '.join(sorted(missing))}")
    except Exception as error:  # a damaged file can raise anything in torch's reader
        raise ModelFileError(f"{file}: not a checkpoint ({error}); train again") from error
    return state
