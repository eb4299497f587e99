"""One network trained on one split: fastai's fast path, the best epoch kept, and what it says of its validation films.

    learn, weights, class_weights = build_learner(table, config, opener, device)
    announce(...); fit(...); logits, targets = validate(learn, class_weights)

`training.py` does it once, or once a fold.
"""

import contextlib
import dataclasses
import gc
import math
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
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from torch import nn

from cxr_fastai.callbacks import (
    Autocast,
    BestEpoch,
    FiniteLoss,
    GraphedStep,
    History,
    KeepFirst,
    KeepNorms,
    StopSignal,
)
from cxr_fastai.checkpoint import Checkpoint, Position, read_checkpoint
from cxr_fastai.config import TrainConfig, world
from cxr_fastai.console import Console
from cxr_fastai.data import KnownBCE, OpenFilm, make_dataloaders
from cxr_fastai.errors import Interrupted, TrainingError, UsageError
from cxr_fastai.model import LoadedWeights, cpu_multiplies_bf16, features_of_batch, make_learner, without_class_weights
from cxr_fastai.shards import InParts, Parts, own_cores
from cxr_fastai.table import targets_of

# How many times lower the first layers' rate is than the last's. fastai's 100 suits weights learned from photographs;
# those learned from phantoms must move as far as the last layer to see real films, and less for more phantoms.
LR_MULT, PHANTOM_LR_MULT, AT_HOME_LR_MULT = 100, 1, 2
FEW = 512  # real films to learn from, below which phantom weights are trained as random ones are
ENOUGH_STEPS = 60  # with which 20 to 100 real films are learned better than with fewer; bench/transfer.py has as many
STEM, FIRST_BLOCKS = 2, 8  # to which part of a film's side the maps of the first layers have shrunk (`first_layers`)
LOOK_EVERY = 32  # batches on a CUDA device between looks at the loss
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
    loaded = dataclasses.replace(loaded, whole=whole_at_once(loaded, config, table))
    precision = choose_precision(config, device)
    learn.add_cb(ChannelsLast())
    if precision != "fp32":
        learn.add_cb(MixedPrecision(precision) if device.type == "cuda" else Autocast())
    if world() > 1:
        from cxr_fastai.together import train_together  # needs accelerate, which few have

        train_together(learn, config.seed)
    return learn, loaded, weights


def whole_at_once(weights: LoadedWeights, config: TrainConfig, table: pd.DataFrame) -> bool:
    """Tell whether all layers are to be trained from the first epoch, with the statistics of each batch.

    So are random weights, and phantom weights on few real films: the statistics that norms have from phantoms do not
    fit real films, and few films take too few steps for the weights to make up for it (docs/phantom-log.md).
    """
    if not weights.pretrained:
        return True
    few = (table["split"] == "train").sum() < FEW
    return bool(few and weights.kind == "phantom" and not config.synthetic and config.first_layers == "auto")


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
    if weights.pretrained and weights.whole:
        console.say(f"Fewer than {FEW} real films to learn from: all layers learn from the first epoch")
    shown = ", ".join(f"{c} {w:.2f}" for c, w in zip(table.attrs["classes"], class_weights.tolist(), strict=True))
    console.say(f"Class weights in the loss: {shown}")
    console.say(
        f"{config.arch} at {config.size}×{config.size}, batch {config.batch_size}, Adam at {config.lr:g}, "
        f"{choose_precision(config, device)} on {device.type}, seed {config.seed}"
    )
    in_epoch = max(1, (table["split"] == "train").sum() // config.batch_size)
    steps = in_epoch * (config.epochs + config.freeze_epochs)
    if steps < ENOUGH_STEPS:
        enough = math.ceil(ENOUGH_STEPS / in_epoch) - config.freeze_epochs
        console.say(f"{steps} steps are few: with --epochs {enough}, few films are learned better")


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

    In the second, the first layers of a body may stay as they are; see `kept`.

    What is to be trained whole from the first epoch (`whole_at_once`) has one phase, with one learning rate for all
    layers, of as many epochs as both phases have.

    A checkpoint in the run folder is gone on from. Where memory runs out, the fit goes on from the last one with half
    the films at a time, gradients added up to the batch that was asked for.

    `watchers` are told of every batch and epoch, too; after an epoch, `learn.history.rows[-1]` is its row.
    """
    checkpoint = run / "checkpoints" / ("last.pth" if fold is None else f"fold-{fold}.pth")
    while True:
        try:
            best, done = _fit(learn, config, weights, checkpoint, console, fold, watchers)
            break
        except RuntimeError as error:
            at_once = learn.dls.bs
            if not _out_of_memory(error) or at_once < 2 or world() > 1:
                raise
            console.warn(
                "out of memory",
                f"{at_once} films at a time are too many for the {learn.dls.device.type}; going on from the last "
                f"checkpoint with {at_once // 2}, gradients added up to {config.batch_size}",
            )
        halve_batch(learn, config)
    learn.model.load_state_dict(best.weights)
    console.say(f"Best epoch: {best.epoch_of_best} of {done} (by validation AUROC); its weights are kept")


def _out_of_memory(error: RuntimeError) -> bool:
    # torch's allocator for the CPU raises a plain RuntimeError
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error) or "enough memory" in str(error)


def halve_batch(learn: Learner, config: TrainConfig) -> None:
    """Take half as many films at a time from now on, and step when as many as the config's batch were seen."""
    for cb in learn.cbs:  # the step that failed may have left the lower precision switched on
        if isinstance(cb, Autocast | MixedPrecision) and torch.is_autocast_enabled(learn.dls.device.type):
            (cb.context if isinstance(cb, Autocast) else cb.autocast).__exit__(None, None, None)
    learn.zero_grad(set_to_none=True)
    learn.opt = None
    gc.collect()
    torch.cuda.empty_cache()
    half = learn.dls.bs // 2
    for dl in learn.dls.loaders:
        dl.bs = half
    learn.remove_cbs(GradientAccumulation)
    learn.add_cb(GradientAccumulation(min(config.batch_size, len(learn.dls.train_ds))))


def _fit(
    learn: Learner,
    config: TrainConfig,
    weights: LoadedWeights,
    checkpoint: Path,
    console: Console,
    fold: int | None,
    watchers: Sequence[Callback],
) -> tuple[BestEpoch, int]:
    frozen = 0 if weights.whole else config.freeze_epochs
    phases = [FROZEN] * bool(frozen) + [FINE_TUNE if weights.pretrained else FROM_SCRATCH]
    epochs = config.epochs + config.freeze_epochs
    cuda = learn.dls.device.type == "cuda"
    finite, best, stop = FiniteLoss(LOOK_EVERY if cuda else 1), BestEpoch(config.patience), StopSignal()
    position = Position(read_checkpoint(checkpoint) if checkpoint.exists() else None)
    lr = config.lr or TrainConfig.lr

    def say(row: dict[str, Any]) -> None:
        console.say(epoch_line(row, epochs))

    with console.progress("Training batches", epochs * len(learn.dls.train)) as advance:
        multilabel = isinstance(learn.loss_func, KnownBCE)
        history = History(checkpoint.parents[1] / "history.csv", phases, multilabel, say, advance, fold)
        saving = Checkpoint(checkpoint, config.checkpoint_minutes)
        callbacks = [finite, history, best, position, saving, stop, *kept(weights, config), *watchers]
        if world() == 1:
            callbacks.append(GraphedStep() if cuda else InParts())
        # fastai's own Recorder waits for the device at every step; History has what it records.
        with (
            learn.removed_cbs([learn.recorder]),
            learn.added_cbs(callbacks),
            stop.listening(),
            learn.no_bar(),
            learn.no_logging(),
            contextlib.closing(saving),
        ):
            if frozen:
                learn.fine_tune(config.epochs, lr, freeze_epochs=frozen, lr_mult=rate_spread(weights, config))
            else:
                learn.unfreeze()
                learn.fit_one_cycle(epochs, lr)
    if finite.problem:
        raise TrainingError(finite.problem)
    if stop.received:
        raise Interrupted(
            f"stopped by {stop.received} after {history.epochs_done} of {epochs} epochs; go on with "
            f"train --resume {checkpoint.parents[1]}"
        )
    return best, history.epochs_done


def kept(weights: LoadedWeights, config: TrainConfig) -> list[Callback]:
    """Return what keeps, in training, the parts of a body that need not change: none of one that is trained whole."""
    if weights.whole:
        return []
    part = first_kept(weights, config)
    return [KeepNorms(), KeepFirst(config.size, part)] if part else [KeepNorms()]


def first_kept(weights: LoadedWeights, config: TrainConfig) -> int | None:
    """Return to which part of a film's side the maps shrink in the first layers that stay as they are; None for none.

    What phantoms taught the stem holds for real films.
    """
    if config.first_layers == "auto":
        if at_home(weights, config):
            return FIRST_BLOCKS
        return STEM if weights.kind == "phantom" else None
    return FIRST_BLOCKS if config.first_layers == "keep" else None


def at_home(weights: LoadedWeights, config: TrainConfig) -> bool:
    """Tell whether the weights were learned from such films as those at hand: phantoms, both."""
    return weights.kind == "phantom" and config.synthetic


def rate_spread(weights: LoadedWeights, config: TrainConfig) -> float:
    """Return how many times lower the first layers' rate is than the last's, once all are trained."""
    if at_home(weights, config):
        return AT_HOME_LR_MULT
    return PHANTOM_LR_MULT if weights.kind == "phantom" else LR_MULT


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
    body: Any = model[0]  # type: ignore[index]
    if device.type == "cpu":
        body = Parts(body, own_cores(), 1, kept_norms=True)
    found = []
    for start in range(0, len(paths), config.batch_size):
        films = torch.stack([opener.encodes(path) for path in paths[start : start + config.batch_size]]).to(device)
        found.append(features_of_batch(body, films.as_subclass(torch.Tensor), kind))  # type: ignore[arg-type]
        for _ in films:
            advance()
    model.cpu()
    return np.concatenate(found)
