"""A training run, from a labelled table to a finished run folder: fastai's fast path with nothing left out.

    table -> split -> films read -> vision_learner -> fine_tune -> calibrated head -> learner.pkl, model.onnx
    -> test rows through model.onnx -> metrics.json, report.html, MODEL_CARD.md -> manifest.json

`python cli.py train [DATA]` runs it.
"""

import dataclasses
import hashlib
import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import fine_tune as _gives_learner_its_fine_tune  # noqa: F401
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from torch import nn

from cxr_fastai import __version__
from cxr_fastai.callbacks import Autocast, BestEpoch, Checkpoint, FiniteLoss, History, StopSignal
from cxr_fastai.config import TrainConfig
from cxr_fastai.console import QUIET, Console
from cxr_fastai.data import KnownBCE, OpenFilm, make_dataloaders, read_films, without_unreadable
from cxr_fastai.errors import Interrupted, TrainingError, UsageError
from cxr_fastai.evaluate import evaluate_table, predictions_csv
from cxr_fastai.export import check_parity, export_learner, export_onnx
from cxr_fastai.metrics import fit_temperature, youden_threshold
from cxr_fastai.model import LoadedWeights, fold_calibration, make_learner
from cxr_fastai.predict import Predictor
from cxr_fastai.runs import finish, new_run, safe_cell, write_text
from cxr_fastai.split import check_split, split_table
from cxr_fastai.table import load_table, positive_class, targets_of

FROZEN, FINE_TUNE, FROM_SCRATCH = "frozen", "fine-tune", "from scratch"
PARITY_FILMS = 64
AUTO_SEEDS = 3
RECORDED_PACKAGES = (
    "fastai",
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "onnx",
    "onnxruntime",
    "scikit-learn",
)


def train(config: TrainConfig, console: Console = QUIET) -> tuple[Path, dict[str, Any]]:
    """Train, test and export one classifier; return its run folder and the content of metrics.json.

    Raises
    ------
    CxrError
        Where the data, the options or the training cannot go on; what was finished before stays.
    """
    run = new_run(config.out, config.name)
    try:
        return run, _train_into(run, config, console)
    except BaseException:
        if not (run / "history.csv").exists():  # not one epoch: nothing in there is of use
            shutil.rmtree(run)
        raise


def _train_into(run: Path, config: TrainConfig, console: Console) -> dict[str, Any]:
    table = prepare_table(config, console)
    device = choose_device(config.device)
    opener = OpenFilm(config.size)
    table = read_all(table, config, opener, console)
    if config.lr is None:
        config = with_found_rate(config, table, opener, device, run, console)
    write_record(run, config, table, device)
    learn, weights, class_weights = build_learner(table, config, opener, device)
    announce(config, table, weights, class_weights, device, console)
    fit(learn, config, weights, run, console)
    card = calibrate(learn, table, config, weights, class_weights)
    export_learner(learn, run / "learner.pkl")
    export_onnx(learn, config.size, card, run / "model.onnx")
    parity = check_parity(learn, run / "model.onnx", valid_films(table, opener)[:PARITY_FILMS])
    console.say(f"Exported learner.pkl and model.onnx; probabilities differ by at most {parity:.1e}")
    metrics = test_and_report(run, table, console)
    if not config.keep_checkpoints:
        shutil.rmtree(run / "checkpoints")
    finish(run)
    return metrics


def prepare_table(config: TrainConfig, console: Console) -> pd.DataFrame:
    """Load the data and split it by patient; `attrs` gains `positive`, the class that a threshold is about."""
    table = load_table(config.data, task=config.task, patient_regex=config.patient_regex, hash_ids=config.hash_ids)
    attrs = dict(table.attrs)
    table = split_table(table, seed=config.seed, test=config.test, valid=config.valid)
    check_split(table)
    table.attrs.update(attrs, positive=_positive(config, attrs))
    counts = table["split"].value_counts()
    sizes = ", ".join(f"{counts.get(name, 0)} {name}" for name in ("train", "valid", "test"))
    console.say(
        f"{config.data}: {len(table)} films of {table['patient_id'].nunique()} patients, {attrs['task']} "
        f"({', '.join(attrs['classes'])}); by patient {sizes}"
    )
    for note in attrs["notes"]:
        console.say(note)
    return table


def _positive(config: TrainConfig, attrs: dict[str, Any]) -> str | None:
    if attrs["task"] != "binary":
        return None
    positive = config.positive or positive_class(attrs["classes"])
    if positive not in attrs["classes"]:
        raise UsageError(f"--positive is {positive}, but must be one of {', '.join(attrs['classes'])}")
    return positive


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
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if able.get("amx_bf16") or able.get("avx512_bf16") else "fp32"


def read_all(table: pd.DataFrame, config: TrainConfig, opener: OpenFilm, console: Console) -> pd.DataFrame:
    """Read every film of the table before the first epoch; return the table of those that can be read."""
    with console.progress("Reading films", len(table)) as advance:
        bad = read_films(opener, table["path"].tolist(), advance)
    if opener.warning:
        console.say(opener.warning)
    for path, reason in sorted(bad.items()):
        console.say(f"{'left out' if config.skip_bad else 'cannot be read'}: {path}: {reason}")
    return without_unreadable(table, bad, config.skip_bad)


def with_found_rate(
    config: TrainConfig, table: pd.DataFrame, opener: OpenFilm, device: torch.device, run: Path, console: Console
) -> TrainConfig:
    """Return the config with the learning rate that lr-find suggests; its plot goes into the run folder."""
    from cxr_fastai.explore import chosen_rate, lr_find_seeds

    found = lr_find_seeds(
        table, config, opener, device, seeds=AUTO_SEEDS, iterations=100, plot=run / "lr_find.png", console=console
    )
    return dataclasses.replace(config, lr=chosen_rate(found))


def write_record(run: Path, config: TrainConfig, table: pd.DataFrame, device: torch.device) -> None:
    """Write config.json and split.csv: what is needed to run it again."""
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    record = {
        "config": dataclasses.asdict(config),
        "task": table.attrs["task"],
        "classes": table.attrs["classes"],
        "positive": table.attrs["positive"],
        "synthetic": (Path(config.data) / "dataset.json").is_file(),
        **{key: table.attrs.get(key) for key in ("patients_from", "source_kind", "notes")},
        "device": f"{device.type} ({hardware})",
        "precision": choose_precision(config, device),
        "versions": versions(),
    }
    write_text(run / "config.json", json.dumps(record, indent=1))
    write_text(run / "split.csv", table.map(safe_cell).to_csv(index=False, lineterminator="\n"))


def versions() -> dict[str, str]:
    """Return the version of Python and of each package that a result may depend on."""
    packages = {name: version(name) for name in RECORDED_PACKAGES}
    return {"cxr_fastai": __version__, "python": platform.python_version(), **packages}


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


def fit(learn: Learner, config: TrainConfig, weights: LoadedWeights, run: Path, console: Console) -> None:
    """Run both phases of `fine_tune`, keep the best epoch of both, and draw the history.

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

    with console.progress("Training batches", epochs * len(learn.dls.train)) as advance:
        history = History(run / "history.csv", phases, multilabel, say, advance)
        callbacks = [finite, history, best, Checkpoint(run / "checkpoints" / "last.pth"), stop]
        with learn.added_cbs(callbacks), stop.listening(), learn.no_bar(), learn.no_logging():
            if frozen:
                learn.fine_tune(config.epochs, lr, freeze_epochs=frozen)
            else:
                learn.unfreeze()
                learn.fit_one_cycle(epochs, lr)
    if finite.problem:
        raise TrainingError(finite.problem)
    if stop.received:
        raise Interrupted(_stopped(stop.received, history.epochs_done, epochs, run))
    learn.model.load_state_dict(best.weights)
    console.say(
        f"Best epoch: {best.epoch_of_best} of {history.epochs_done} (by validation AUROC); its weights are kept"
    )


def _stopped(signal_name: str, done: int, epochs: int, run: Path) -> str:
    if not done:
        return f"stopped by {signal_name} before the first epoch ended; nothing to keep in {run}"
    kept = run / "checkpoints" / "last.pth"
    return f"stopped by {signal_name}; epoch {done} of {epochs} is saved, go on from it with --weights {kept}"


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """Return one epoch as a line for people."""
    return (
        f"epoch {row['epoch']:>2}/{epochs} {row['phase']:<12}"
        f" train loss {row['train_loss']:.3f} accuracy {row['train_accuracy']:.3f}"
        f" · valid loss {row['valid_loss']:.3f} accuracy {row['valid_accuracy']:.3f} AUROC {row['valid_auroc']:.3f}"
        f" · {row['seconds']:.0f} s"
    )


def calibrate(
    learn: Learner, table: pd.DataFrame, config: TrainConfig, weights: LoadedWeights, class_weights: torch.Tensor
) -> dict[str, Any]:
    """Choose temperature and threshold on the validation films, fold the first into the head, return the card."""
    task, classes, positive = (table.attrs[k] for k in ("task", "classes", "positive"))
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, Autocast | MixedPrecision)])
    with learn.no_bar(), learn.no_logging():
        logits, targets = learn.get_preds(ds_idx=1, act=nn.Identity())
    # Weighted cross-entropy moves each logit by the log of its class weight; calibrated ones are without it.
    log_weights = class_weights.log()
    multilabel = task == "multilabel"
    temperature = fit_temperature((logits - log_weights).numpy(), targets.numpy(), multilabel)
    fold_calibration(learn, temperature, log_weights)
    calibrated = (logits - log_weights) / temperature
    p = (calibrated.sigmoid() if multilabel else calibrated.softmax(1)).double().numpy()
    threshold: float | dict[str, float] | None = None
    if multilabel:
        threshold = {c: youden_threshold(targets[:, k].numpy(), p[:, k]) for k, c in enumerate(classes)}
    elif task == "binary":
        k = classes.index(positive)
        threshold = youden_threshold((targets == k).numpy(), p[:, k])
    return {
        "classes": list(classes),
        "task": task,
        "positive": positive,
        "threshold": threshold,
        "temperature": temperature,
        "bias": learn.model[1].linear.bias.detach().cpu().tolist(),
        "arch": config.arch,
        "size": config.size,
        "weights": weights.detail,
        "data": {"source": config.data, "films": len(table), "fingerprint": fingerprint(table)},
        "versions": versions(),
        "notice": "Research software, not a medical device.",
    }


def fingerprint(table: pd.DataFrame) -> str:
    """Return a SHA-256 over file names, labels, patients and split: equal tables have equal ones, wherever they lie."""
    names = table["path"].map(lambda p: Path(p).name)
    rows = sorted(zip(names, table["label"], table["patient_id"], table["split"], strict=True))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def valid_films(table: pd.DataFrame, opener: OpenFilm) -> np.ndarray:
    """Return the validation films as the network takes them, (N, size, size) float32 in [0, 1]."""
    paths = table.loc[table["split"] == "valid", "path"]
    return np.stack([opener.encodes(path)[0].numpy() for path in paths])


def test_and_report(run: Path, table: pd.DataFrame, console: Console) -> dict[str, Any]:
    """Send the test films through model.onnx and write predictions.csv, metrics.json, the report and the card."""
    from cxr_fastai.report import write_history_plot, write_model_card, write_report

    predictor = Predictor(run / "model.onnx")
    test = table[table["split"] == "test"].reset_index(drop=True)
    rows, metrics = evaluate_table(predictor, test, split="test", run=run.name, console=console)
    write_text(run / "predictions.csv", predictions_csv(test, rows, predictor.classes))
    write_text(run / "metrics.json", json.dumps(metrics, indent=1))
    write_history_plot(run)
    write_report(run, predictor, test, rows)
    write_model_card(run)
    return metrics
