"""What watches a training run: history, the best epoch, checkpoints, a stop by the user, a loss that is not finite.

fastai callbacks. None of them reads a value off the device within an epoch more often than it must.
"""

import contextlib
import csv
import io
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException

from cxr_fastai.metrics import auroc
from cxr_fastai.runs import atomic_path, write_text

HISTORY_COLUMNS = (
    "epoch", "phase", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "valid_auroc", "lr", "seconds",
)  # fmt: skip


class Autocast(Callback):
    """Run the forward pass in bfloat16 on the CPU; the weights, the loss and the optimiser stay in float32."""

    order = 10

    def before_batch(self) -> None:  # noqa: D102
        self.context = torch.autocast("cpu", torch.bfloat16)
        self.context.__enter__()

    def after_pred(self) -> None:  # noqa: D102
        self.context.__exit__(None, None, None)
        self.learn.pred = self.pred.float()


class FiniteLoss(Callback):
    """End the fit at the first loss that is not a number: nothing after it is worth keeping.

    `problem` then says what happened; fastai would rewrite the message of an error raised here.
    """

    problem: str | None = None

    def before_fit(self) -> None:  # noqa: D102
        if self.problem:
            raise CancelFitException

    def after_loss(self) -> None:  # noqa: D102
        if self.training and not math.isfinite(self.loss.item()):
            self.problem = (
                f"the loss became {self.loss.item()} in epoch {self.history.epochs_done + 1}, batch {self.iter + 1}, "
                f"at a learning rate of {self.opt.hypers[-1]['lr']:.2g}; train with a smaller --lr (see lr-find)"
            )
            raise CancelFitException


class History(Callback):
    """One row an epoch, over both phases of `fine_tune`: written to history.csv and handed to `on_epoch`.

    In cross-validation the rows have a column `fold`, and follow those of the folds before.
    """

    order = 55  # after fastai's Recorder (50)

    def __init__(
        self,
        file: Path,
        phases: list[str],
        multilabel: bool,
        on_epoch: Callable[[dict], None],
        on_batch: Callable[[], None],
        fold: int | None = None,
    ):
        self.file, self.phases, self.multilabel, self.fold = file, phases, multilabel, fold
        self.earlier = _rows(file) if fold is not None and file.exists() else []
        self.on_epoch, self.on_batch = on_epoch, on_batch
        self.rows: list[dict] = []
        self.fits = 0

    @property
    def epochs_done(self) -> int:
        """The number of epochs finished, both phases together."""
        return len(self.rows)

    def before_fit(self) -> None:  # noqa: D102
        self.phase = self.phases[min(self.fits, len(self.phases) - 1)]
        self.fits += 1

    def before_epoch(self) -> None:  # noqa: D102
        self.began = time.perf_counter()
        self.outputs: dict[bool, list[tuple]] = {True: [], False: []}

    def after_batch(self) -> None:  # noqa: D102
        self.outputs[self.training].append((self.pred.detach(), self.yb[0], self.loss.detach()))
        if self.training:
            self.on_batch()

    def after_epoch(self) -> None:  # noqa: D102
        train, valid = (self._joined(training) for training in (True, False))
        losses = torch.stack([loss for _, _, loss in self.outputs[True]])
        row = {
            "epoch": self.epochs_done + 1,
            "phase": self.phase,
            "train_loss": losses.mean().item(),
            "train_accuracy": self._accuracy(*train),
            "valid_loss": self.loss_func(*valid).item(),
            "valid_accuracy": self._accuracy(*valid),
            "valid_auroc": self._auroc(*valid),
            "lr": float(self.opt.hypers[-1]["lr"]),
            "seconds": time.perf_counter() - self.began,
        }
        self.rows.append(row)
        self.outputs = {True: [], False: []}
        self._write()
        self.on_epoch(row)

    def _write(self) -> None:
        text = io.StringIO()
        fold = {} if self.fold is None else {"fold": self.fold}
        writer = csv.DictWriter(text, [*fold, *HISTORY_COLUMNS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.earlier)
        shown = ({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in self.rows)
        writer.writerows({**fold, **row} for row in shown)
        write_text(self.file, text.getvalue())

    def _joined(self, training: bool) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self.outputs[training]
        return torch.cat([logits for logits, _, _ in outputs]), torch.cat([target for _, target, _ in outputs])

    def _accuracy(self, logits: torch.Tensor, target: torch.Tensor) -> float:
        if not self.multilabel:
            return (logits.argmax(1) == target).float().mean().item()
        sure = (target == 0) | (target == 1)  # neither unknown (NaN) nor a soft label
        return ((logits > 0) == (target == 1))[sure].float().mean().item()

    def _auroc(self, logits: torch.Tensor, target: torch.Tensor) -> float:
        probabilities = logits.sigmoid() if self.multilabel else logits.softmax(1)
        truth = target if self.multilabel else torch.nn.functional.one_hot(target, logits.shape[1])
        pairs = zip(truth.T.cpu().numpy(), probabilities.T.cpu().double().numpy(), strict=True)
        return float(np.nanmean([auroc(y, p) for y, p in pairs]))


def _rows(file: Path) -> list[dict]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


class BestEpoch(Callback):
    """Keep the weights of the best epoch of both phases, and stop when it stays the best for `patience` epochs.

    Best is the highest validation AUROC; of equal ones, the lowest validation loss.
    """

    order = 60

    def __init__(self, patience: int):
        self.patience = patience
        self.best: tuple[float, float] | None = None
        self.epoch_of_best = 0

    def after_epoch(self) -> None:  # noqa: D102
        row = self.history.rows[-1]
        score = (row["valid_auroc"], -row["valid_loss"])
        if self.best is None or score > self.best:
            self.best, self.epoch_of_best = score, row["epoch"]
            self.weights = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
        elif self.patience and row["epoch"] - self.epoch_of_best >= self.patience:
            raise CancelFitException


class Checkpoint(Callback):
    """Write checkpoints/last.pth after each epoch: model, optimiser and history; the earlier one stays until then."""

    order = 70

    def __init__(self, file: Path):
        self.file = file

    def after_epoch(self) -> None:  # noqa: D102
        optimizer = self.opt.state_dict()
        state = {
            "model": self.model.state_dict(),
            # plain lists and numbers: torch's weights_only reader takes no class of fastcore's or numpy's
            "opt": {
                "state": list(optimizer["state"]),
                "hypers": [{name: float(value) for name, value in group.items()} for group in optimizer["hypers"]],
            },
            "history": self.history.rows,
        }
        with atomic_path(self.file) as temporary:
            torch.save(state, temporary)


class StopSignal(Callback):
    """End the fit at the next batch once Ctrl-C or SIGTERM has come; a second Ctrl-C ends at once."""

    order = 80

    def __init__(self) -> None:
        self.received: str | None = None

    def before_fit(self) -> None:  # noqa: D102
        self._check()

    def after_batch(self) -> None:  # noqa: D102
        self._check()

    def _check(self) -> None:
        if self.received:
            raise CancelFitException

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Turn the signals into `received` for the length of the body."""
        names = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}

        def receive(number: int, frame: FrameType | None) -> None:
            if self.received:
                raise KeyboardInterrupt
            self.received = names[signal.Signals(number)]

        before = {number: signal.signal(number, receive) for number in names}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
