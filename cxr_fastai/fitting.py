"""One network trained on one split: fastai's fast path, the best epoch kept, and what it says of its validation films.

    learn, weights, class_weights = build_learner(table, config, opener, device)
    announce(...); fit(...); logits, targets = validate(learn, class_weights)

`training.py` does it once, or once a fold.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import fine_tune as _gives_learner_its_fine_tune  # noqa: F401
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from torch import nn

from cxr_fastai.callbacks import Autocast, BestEpoch, Checkpoint, FiniteLoss, History, StopSignal
from cxr_fastai.config import TrainConfig
from cxr_fastai.console import Console
from cxr_fastai.data import KnownBCE, OpenFilm, make_dataloaders
from cxr_fastai.errors import Interrupted, TrainingError, UsageError
from cxr_fastai.model import LoadedWeights, cpu_multiplies_bf16, features_of_batch, make_learner, without_class_weights
from cxr_fastai.table import targets_of

# How many times lower the first layers' rate is than the last's. fastai's 100 suits weights learned from photographs;
# those learned from phantoms must move further to see real films.
LR_MULT, PHANTOM_LR_MULT = 100, 2
FROZEN, FINE_TUNE, FROM_SCRATCH = "frozen", "fine-tune", "from scratch"


def choose_device(name: str) -> torch.device:
    """Return the device: CUDA where there is one, else the CPU; refuse a CUDA asked for that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; use --device auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(config: TrainConfig, device: torch.device) -> str:
    """Return fp32, bf16 or fp16: what was asked for, else bf16 where the hardware multiplies it."""
    if config.precision != "auto":
        if config.precision == "fp16" and device.type == "cpu":
            raise UsageError("--precision fp16 needs a CUDA device; use bf16, fp32 or auto")
        return config.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if cpu_multiplies_bf16() else "fp32"


def class_weights_of(table: pd.DataFrame, uncertain: str = "ignore") -> torch.Tensor:
    """Return one weight a class (K,) float32 so that each class counts the same in the loss.

    Single label: n / (K n_c). Multi-label: negatives / positives of each finding, at most 20, for the positives.
    Counted on the training films, of each finding on those where it is known; `uncertain` is the config's.
    """
    train, classes = table[table["split"] == "train"], table.attrs["classes"]
    if table.attrs["task"] == "multilabel":
        y = targets_of(train, classes, uncertain)
        positive, negative = np.nansum(y, axis=0), np.nansum(1 - y, axis=0)
        return torch.tensor(np.minimum(negative / np.maximum(positive, 1), 20), dtype=torch.float32)
    labels = train["label"]
    counts = np.array([(labels == c).sum() for c in classes])
    return torch.tensor(len(labels) / (len(classes) * counts), dtype=torch.float32)


def build_learner(
    table: pd.DataFrame, config: TrainConfig, opener: OpenFilm, device: torch.device
) -> tuple[Learner, LoadedWeights, torch.Tensor]:
    """Make the Learner of a run, seeded, with weights loaded, class weights in the loss and precision set."""
    set_seed(config.seed)
    weights = class_weights_of(table, config.uncertain)
    on_device = weights.to(device)
    multilabel = table.attrs["task"] == "multilabel"
    loss: nn.Module = KnownBCE(on_device) if multilabel else CrossEntropyLossFlat(weight=on_device)
    learn, loaded = make_learner(make_dataloaders(table, config, opener, device), config, loss)
    precision = choose_precision(config, device)
    learn.add_cb(ChannelsLast())
    if precision != "fp32":
        learn.add_cb(MixedPrecision(precision) if device.type == "cuda" else Autocast())
    return learn, loaded, weights


def announce(
    config: TrainConfig,
    table: pd.DataFrame,
    weights: LoadedWeights,
    class_weights: torch.Tensor,
    device: torch.device,
    console: Console,
) -> None:
    """Say what is about to be trained, from which weights and on what."""
    if weights.pretrained or weights.kind == config.weights:
        console.say(f"Start: {weights.detail}")
    else:
        console.warn(
            "training starts from random weights",
            f"{weights.detail}. Expect clearly worse results than from pretrained weights, above all with few films. "
            "Give --weights FILE, or run once with a network connection.",
        )
    shown = ", ".join(f"{c} {w:.2f}" for c, w in zip(table.attrs["classes"], class_weights.tolist(), strict=True))
    console.say(f"Class weights in the loss: {shown}")
    console.say(
        f"{config.arch} at {config.size}×{config.size}, batch {config.batch_size}, Adam at {config.lr:g}, "
        f"{choose_precision(config, device)} on {device.type}, seed {config.seed}"
    )


def fit(
    learn: Learner,
    config: TrainConfig,
    weights: LoadedWeights,
    run: Path,
    console: Console,
    fold: int | None = None,
    watchers: Sequence[Callback] = (),
) -> None:
    """Run both phases of `fine_tune`, write history.csv, and keep the best epoch of both.

    `watchers` are told of every batch and epoch, too; after an epoch, `learn.history.rows[-1]` is its row.

    A frozen phase makes sense for a body that has learned something; random weights are trained whole from the
    first epoch, at one learning rate for all layers, for as many epochs as both phases have.
    """
    frozen = config.freeze_epochs if weights.pretrained else 0
    phases = [FROZEN] * bool(frozen) + [FINE_TUNE if weights.pretrained else FROM_SCRATCH]
    epochs = config.epochs + config.freeze_epochs
    finite, best, stop = FiniteLoss(), BestEpoch(config.patience), StopSignal()
    multilabel = isinstance(learn.loss_func, KnownBCE)
    lr = config.lr or TrainConfig.lr

    def say(row: dict[str, Any]) -> None:
        console.say(epoch_line(row, epochs))

    checkpoint = run / "checkpoints" / ("last.pth" if fold is None else f"fold-{fold}.pth")
    with console.progress("Training batches", epochs * len(learn.dls.train)) as advance:
        history = History(run / "history.csv", phases, multilabel, say, advance, fold)
        callbacks = [finite, history, best, Checkpoint(checkpoint), stop, *watchers]
        with learn.added_cbs(callbacks), stop.listening(), learn.no_bar(), learn.no_logging():
            if frozen:
                learn.fine_tune(config.epochs, lr, freeze_epochs=frozen, lr_mult=rate_spread(weights))
            else:
                learn.unfreeze()
                learn.fit_one_cycle(epochs, lr)
    if finite.problem:
        raise TrainingError(finite.problem)
    if stop.received:
        raise Interrupted(_stopped(stop.received, history.epochs_done, epochs, checkpoint))
    learn.model.load_state_dict(best.weights)
    console.say(
        f"Best epoch: {best.epoch_of_best} of {history.epochs_done} (by validation AUROC); its weights are kept"
    )


def rate_spread(weights: LoadedWeights) -> float:
    """Return how many times lower the first layers' rate is than the last's, once all are trained."""
    return PHANTOM_LR_MULT if weights.kind == "phantom" else LR_MULT


def _stopped(signal_name: str, done: int, epochs: int, checkpoint: Path) -> str:
    if not done:
        return f"stopped by {signal_name} before the first epoch ended; nothing to keep in {checkpoint.parents[1]}"
    return f"stopped by {signal_name}; epoch {done} of {epochs} is saved, go on from it with --weights {checkpoint}"


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """Return one epoch as a line for people."""
    return (
        f"epoch {row['epoch']:>2}/{epochs} {row['phase']:<12}"
        f" train loss {row['train_loss']:.3f} accuracy {row['train_accuracy']:.3f}"
        f" · valid loss {row['valid_loss']:.3f} accuracy {row['valid_accuracy']:.3f} AUROC {row['valid_auroc']:.3f}"
        f" · {row['seconds']:.0f} s"
    )


def validate(learn: Learner, class_weights: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits (n, K) of the validation films in float32 arithmetic, and their targets as the loss takes them.

    The class weights of the loss are taken out of the head first, for good.
    """
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, Autocast | MixedPrecision)])
    without_class_weights(learn.model, class_weights)
    with learn.no_bar(), learn.no_logging():
        logits, targets = learn.get_preds(ds_idx=1, act=nn.Identity())
    return logits.numpy(), targets.numpy()


def features_of_films(
    model: nn.Module,
    paths: Sequence[str],
    opener: OpenFilm,
    device: torch.device,
    config: TrainConfig,
    advance: Callable[[], None],
) -> np.ndarray:
    """Return what the head of a network makes its logits of, (N, F) float32, for films as they are, not augmented."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(choose_precision(config, device))
    model = model.to(device).eval()
    found = []
    for start in range(0, len(paths), config.batch_size):
        films = torch.stack([opener.encodes(path) for path in paths[start : start + config.batch_size]]).to(device)
        found.append(features_of_batch(model[0], films.as_subclass(torch.Tensor), kind))  # type: ignore[index,arg-type]
        for _ in films:
            advance()
    model.cpu()
    return np.concatenate(found)
