"""What watches a training run: history, the best epoch, a stop by the user, a loss that is not finite.

fastai callbacks. None of them reads a value off the device within an epoch more often than it must.
"""

import contextlib
import csv
import io
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from fastai.callback.core import (
    Callback,
    CancelBackwardException,
    CancelFitException,
    CancelStepException,
    TrainEvalCallback,
)
from fastai.layers import norm_types

from cxr_fastai.architectures import first_layers
from cxr_fastai.metrics import auroc
from cxr_fastai.ranks import any_of, bare, joined_outputs
from cxr_fastai.runs import write_text

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


class KeepNorms(Callback):
    """Train with the statistics that batch norms have, instead of those of each batch; their weights learn as ever.

    For a body that has learned before. Then a film's answer does not depend on its company in a batch, as in
    prediction: a batch in parts, or dealt to several processes, is the same as a whole one. And it is faster.
    """

    run_after = TrainEvalCallback

    def before_train(self) -> None:  # noqa: D102
        for module in self.model.modules():
            if isinstance(module, norm_types):
                module.eval()


class KeepFirst(Callback):
    """Train with the first layers as they are, for a body that has learned from such films before.

    Their maps are the largest: the stem and two blocks would take nearly half of a step's time. See
    `architectures.first_layers`.
    """

    order = -20  # before what looks for the parameters that learn

    def __init__(self, size: int, part: int):
        self.size, self.part = size, part

    def before_fit(self) -> None:  # noqa: D102
        self.kept = [p for p in first_layers(self.model[0], self.size, self.part) if p.requires_grad]
        for parameter in self.kept:
            parameter.requires_grad_(False)

    def after_fit(self) -> None:  # noqa: D102
        for parameter in self.kept:
            parameter.requires_grad_(True)


class EpochCallback(Callback):
    """A callback that is told by `epoch_done` of each epoch that was trained; not of those that a resumed fit skips."""

    def after_epoch(self) -> None:  # noqa: D102
        if not self.position.skipping:
            self.epoch_done()

    def epoch_done(self) -> None:
        """Do what is to be done after an epoch; `learn.history.rows[-1]` is its row, for orders above its own (55)."""
        raise NotImplementedError


class FiniteLoss(Callback):
    """End the fit at a loss that is not a number: nothing after it is worth keeping.

    `problem` then says what happened; fastai would rewrite the message of an error raised here. The losses are looked
    at every so many batches and before an epoch ends, since each look waits for the device.
    """

    problem: str | None = None

    def __init__(self, every: int = 1):
        self.every = every

    def before_fit(self) -> None:  # noqa: D102
        if self.problem:
            raise CancelFitException

    def before_train(self) -> None:  # noqa: D102
        self.losses: list[tuple[int, float, torch.Tensor]] = []

    def after_loss(self) -> None:  # noqa: D102
        if self.training:
            self.losses.append((self.iter + 1, self.opt.hypers[-1]["lr"], self.loss.detach()))
            if len(self.losses) >= self.every:
                self._look()

    def after_train(self) -> None:  # noqa: D102
        self._look()

    def _look(self) -> None:
        looked_at, self.losses = self.losses, []
        if not looked_at or not any_of(~torch.stack([loss for *_, loss in looked_at]).isfinite().all()):
            return
        batch, rate, loss = next((one for one in looked_at if not one[2].isfinite()), looked_at[-1])
        self.problem = (
            f"the loss became {loss.item()} in epoch {self.history.epochs_done + 1}, batch {batch}, "
            f"at a learning rate of {rate:.2g}; train with a smaller --lr (see lr-find)"
        )
        raise CancelFitException


class History(EpochCallback):
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
        earlier = _rows(file) if fold is not None and file.exists() else []
        self.earlier = [row for row in earlier if int(row["fold"]) < (fold or 0)]
        self.on_epoch, self.on_batch = on_epoch, on_batch
        self.rows: list[dict] = []

    @property
    def epochs_done(self) -> int:
        """The number of epochs finished, both phases together."""
        return len(self.rows)

    def before_epoch(self) -> None:  # noqa: D102
        self.began = time.perf_counter()
        self.outputs: dict[bool, list[tuple]] = {True: [], False: []}

    def after_batch(self) -> None:  # noqa: D102
        self.outputs[self.training].append((self.pred.detach(), self.yb[0], self.loss.detach()))
        if self.training:
            self.on_batch()

    def epoch_done(self) -> None:  # noqa: D102
        train, valid = (self._joined(training) for training in (True, False))
        losses = joined_outputs(torch.stack([loss for _, _, loss in self.outputs[True]]), self.dls.train)
        row = {
            "epoch": self.epochs_done + 1,
            "phase": self.phases[self.position.phase - 1],
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
        logits, targets, _ = zip(*self.outputs[training], strict=True)
        loader = self.dls[0 if training else 1]
        return joined_outputs(torch.cat(logits), loader), joined_outputs(torch.cat(targets), loader)

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


class BestEpoch(EpochCallback):
    """Keep the weights of the best epoch of both phases, and stop a phase that brought no better for `patience` epochs.

    Best is the highest validation AUROC; of equal ones, the lowest validation loss.
    """

    order = 60

    def __init__(self, patience: int):
        self.patience = patience
        self.best: tuple[float, float] | None = None
        self.epoch_of_best = self.began_after = 0
        self.weights: dict[str, torch.Tensor] = {}

    def before_fit(self) -> None:  # noqa: D102
        self.began_after = self.history.epochs_done

    def before_epoch(self) -> None:  # noqa: D102
        without_better = self.history.epochs_done - max(self.epoch_of_best, self.began_after)
        if self.patience and without_better >= self.patience:
            raise CancelFitException

    def epoch_done(self) -> None:  # noqa: D102
        row = self.history.rows[-1]
        score = (row["valid_auroc"], -row["valid_loss"])
        if self.best is None or score > self.best:
            self.best, self.epoch_of_best = score, row["epoch"]
            self.weights = {k: v.detach().cpu().clone() for k, v in bare(self.model).state_dict().items()}

    def state(self) -> dict[str, Any]:
        """Return what `restore` takes."""
        return {key: getattr(self, key) for key in ("best", "epoch_of_best", "began_after", "weights")}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        for key, value in state.items():
            setattr(self, key, value)


class GraphedStep(Callback):
    """Record forward pass, loss and backward pass once a phase as one CUDA graph, and replay it with each batch.

    A DenseNet121 step on 16 films is some two thousand small kernels, which the processor launches several times more
    slowly than a large GPU runs them. The optimiser and all other callbacks work as ever.
    """

    def before_fit(self) -> None:  # noqa: D102
        self.graph: torch.cuda.CUDAGraph | None = None
        self.learn._do_one_batch = self.one_batch

    def after_fit(self) -> None:  # noqa: D102
        del self.learn._do_one_batch  # the class's own stands again
        self.graph = None
        self.learn.model.zero_grad(set_to_none=True)

    def one_batch(self) -> None:
        """Do what fastai's `Learner._do_one_batch` does."""
        learn = self.learn
        if not self.training or hasattr(learn, "gradient_accumulation"):
            type(learn)._do_one_batch(learn)
            return
        graph = self.graph = self.graph or self.record()
        for static, given in zip((self.films, self.targets), (*self.xb, *self.yb), strict=True):
            static.copy_(given)
        graph.replay()
        learn.pred = self.logits.detach().clone()
        learn("after_pred")
        learn.loss_grad = learn.loss = self.value.detach().clone()
        learn("after_loss")
        learn._with_events(lambda: None, "backward", CancelBackwardException)
        learn._with_events(learn._step, "step", CancelStepException)  # the next replay writes the gradients anew

    def record(self) -> torch.cuda.CUDAGraph:
        """Record a step on the shapes of the batch at hand."""
        buffers = [value.clone() for value in self.model.buffers()]
        self.films, self.targets = (one[0].as_subclass(torch.Tensor).clone() for one in (self.xb, self.yb))
        kind, on = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")

        def step() -> tuple[torch.Tensor, torch.Tensor]:
            with torch.autocast("cuda", kind, enabled=on, cache_enabled=False):
                logits = self.model(self.films)
            logits = logits.float()
            value = self.loss_func(logits, self.targets)
            value.backward()
            return logits, value

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries choose their kernels
                step()
        torch.cuda.current_stream().wait_stream(side)
        self.model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits, self.value = step()
        for value, before in zip(self.model.buffers(), buffers, strict=True):  # those steps counted
            value.copy_(before)
        return graph


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
