"""A training run, from a labelled table to a finished run folder: fastai's fast path with nothing left out.

    table -> split -> films read -> audit -> vision_learner -> fine_tune -> calibrated head -> learner.pkl, model.onnx
    -> test rows through model.onnx -> metrics.json, evidence.json, report.html, MODEL_CARD.md -> manifest.json

With `--folds K` there are K networks, each validated on its own part of the films outside of the test; what is
exported is the mean of their logits, as one network. `python cli.py train [DATA]` runs it.
"""

import dataclasses
import json
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner

from cxr_fastai import __version__, ranks
from cxr_fastai.audit import audit_films, refuse_leaks, too_good
from cxr_fastai.config import TrainConfig, rank, usable_cores, world
from cxr_fastai.console import QUIET, Console
from cxr_fastai.data import OpenFilm, read_films, without_unreadable
from cxr_fastai.engine import OnnxRuntime
from cxr_fastai.errors import UsageError
from cxr_fastai.evaluate import measure, predict_table, predictions_csv
from cxr_fastai.export import check_parity, compare_precisions, export_learner, make_onnx, said_by, write_onnx
from cxr_fastai.fitting import (
    announce,
    build_learner,
    choose_device,
    choose_precision,
    features_of_films,
    fit,
    validate,
)
from cxr_fastai.grading import write_evidence
from cxr_fastai.metrics import conformal_scores, fit_temperature, youden_threshold
from cxr_fastai.model import LoadedWeights, body_and_head, cooled, count_features, ensemble
from cxr_fastai.outliers import QUANTILE, fit_outliers, limit_of
from cxr_fastai.predict import Prediction, Predictor, decide
from cxr_fastai.runs import MANIFEST, finish, new_run, read_cells, safe_cell, sweep_temporary, write_text
from cxr_fastai.split import check_split, deal_folds, fingerprint, folds_of, given_split, split_table
from cxr_fastai.table import load_table, positive_class, targets_of
from cxr_fastai.tracking import Trackers, tracked

PARITY_FILMS, HELD_OUT_FILMS, OUTLIER_FILMS = 32, 512, 2000
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
    count_features(config.arch, config.size)  # refuses a name that is none, before any film is read
    with ranks.joined(choose_device(config.device).type == "cuda"):
        run = Path(ranks.said_by_first(None if rank() else str(new_run(config.out, config.name))))
        try:
            return run, _tracked_into(run, config, console)
        except BaseException:
            if not rank() and not (run / "checkpoints").exists():  # nothing was learned
                shutil.rmtree(run)
            raise


def resume(folder: str | Path, console: Console = QUIET) -> tuple[Path, dict[str, Any]]:
    """Go on with a run that was cut off, as it was asked for; on a CPU it ends as if nothing had happened.

    Raises
    ------
    UsageError
        Where there is no such run, it is finished, or its films or their split are not what they were.
    """
    run = Path(folder)
    if (run / MANIFEST).is_file():
        raise UsageError(f"--resume {folder}: that run is finished; train a new one, or start from it with --weights")
    if not (run / "config.json").is_file():
        raise UsageError(f"--resume {folder}: no run there that was cut off (it has no config.json)")
    config = TrainConfig.from_json(json.dumps(json.loads((run / "config.json").read_text(encoding="utf-8"))["config"]))
    with ranks.joined(choose_device(config.device).type == "cuda"):
        sweep_temporary(run)
        console.say(f"Going on with {run}")
        return run, _tracked_into(run, config, console)


def _tracked_into(run: Path, config: TrainConfig, console: Console) -> dict[str, Any]:
    """Train in a run folder; of several processes, only the first one's trackers are told."""
    own = dataclasses.replace(config, track=(), track_images=False) if rank() else config
    with tracked(own, console) as trackers:
        return _train_into(run, config, console, trackers)


def refuse_other_films(run: Path, table: pd.DataFrame) -> None:
    """Refuse to go on with a run where the films or their split changed since it was cut off."""
    before, columns = read_cells(run / "split.csv"), ["path", "label", "split"]
    if not before[columns].equals(table[columns].astype(str)):
        raise UsageError(
            f"--resume {run}: the films or their split are not those of {run / 'split.csv'} "
            f"({len(before)} films then, {len(table)} now); train a new run"
        )


def _train_into(folder: Path, config: TrainConfig, console: Console, trackers: Trackers) -> dict[str, Any]:
    """Train in a run folder and return what metrics.json holds; where several processes train, only the first does."""
    if config.lr is None and world() > 1:
        raise UsageError("--lr auto: several processes cannot find it together; run lr-find first and give --lr")
    table = prepare_table(config, console)
    device = choose_device(config.device)
    opener = OpenFilm(config.size)
    with ranks.first_alone():
        table = read_all(table, config, opener, console)
    with ranks.own_folder(folder) as run:
        if not rank():
            audit(run, table, config, opener, console)
        if (run / "split.csv").is_file():
            refuse_other_films(run, table)
        if config.lr is None:
            config = with_found_rate(config, table, opener, device, run, console)
        write_record(run, config, table, device)
        trackers.start(run)
        learn, card = train_folds(run, table, config, opener, device, console, trackers.watchers)
        if rank():
            return {}
    export_both(run, learn, card, table, config, opener, device, console)
    metrics = test_and_report(run, table, config, console)
    trackers.finish(run, metrics)
    if not config.keep_checkpoints:
        shutil.rmtree(run / "checkpoints")
    finish(run)
    return metrics


def prepare_table(config: TrainConfig, console: Console) -> pd.DataFrame:
    """Load the data and split it by patient; `attrs` gains `positive`, the class that a threshold is about."""
    table = load_table(config.data, task=config.task, patient_regex=config.patient_regex, hash_ids=config.hash_ids)
    attrs = dict(table.attrs)
    attrs["positive"] = _positive(config, attrs)
    if config.split_csv is not None:
        table = given_split(table, config.split_csv)
    table = split_table(table, seed=config.seed, test=config.test, valid=0 if config.folds else config.valid)
    if config.folds:
        table = deal_folds(table, config.folds, config.seed)
    check_split(table)
    table.attrs = attrs
    counts = table["split"].value_counts()
    sizes = ", ".join(f"{counts.get(name, 0)} {name}" for name in ("train", "valid", "test"))
    console.say(
        f"{config.data}: {len(table)} films of {table['patient_id'].nunique()} patients, {attrs['task']} "
        f"({', '.join(attrs['classes'])}); by patient {sizes}{f' in {config.folds} folds' if config.folds else ''}"
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


def read_all(table: pd.DataFrame, config: TrainConfig, opener: OpenFilm, console: Console) -> pd.DataFrame:
    """Read every film of the table before the first epoch; return the table of those that can be read."""
    with console.progress("Reading films", len(table)) as advance:
        bad = read_films(opener, table["path"].tolist(), advance)
    if opener.warning:
        console.say(opener.warning)
    for path, reason in sorted(bad.items()):
        console.say(f"{'left out' if config.skip_bad else 'cannot be read'}: {path}: {reason}")
    return without_unreadable(table, bad, config.skip_bad)


def audit(run: Path, table: pd.DataFrame, config: TrainConfig, opener: OpenFilm, console: Console) -> None:
    """Look for what would make the figures wrong, write audit.json, and refuse a split that leaks.

    Raises
    ------
    DataError
        Where copies of a film, or one patient, stand on both sides; not with `--allow-leaks`.
    """
    found = audit_films(table, opener, level=config.audit, seed=config.seed, console=console)
    write_text(run / "audit.json", found.to_json())
    for finding in found.findings:
        if finding.severity != "note":
            console.say(f"audit: {finding.detail}")
    if not config.allow_leaks:
        refuse_leaks(found)


def with_found_rate(
    config: TrainConfig, table: pd.DataFrame, opener: OpenFilm, device: torch.device, run: Path, console: Console
) -> TrainConfig:
    """Return the config with the learning rate that lr-find suggests; its plot goes into the run folder."""
    from cxr_fastai.explore import chosen_rate, lr_find_seeds

    first = next(folds_of(table))
    found = lr_find_seeds(
        first, config, opener, device, seeds=AUTO_SEEDS, iterations=100, plot=run / "lr_find.png", console=console
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
        "synthetic": config.synthetic,
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


def train_folds(
    run: Path,
    table: pd.DataFrame,
    config: TrainConfig,
    opener: OpenFilm,
    device: torch.device,
    console: Console,
    watchers: Sequence[Callback] = (),
) -> tuple[Learner, dict[str, Any]]:
    """Train a network a fold (without folds, one), and return one Learner of them all, calibrated, with its card.

    Temperature and threshold are chosen on what each network says of the films that it did not learn from. With folds
    that is every film outside of the test: out_of_fold.csv and cross_validation.json.
    """
    models, logits, targets, held_out = [], [], [], []
    for number, part in enumerate(folds_of(table), 1):
        part.attrs = table.attrs
        fold = number if config.folds else None
        if fold:
            console.say(f"Fold {fold} of {config.folds}")
        learn, weights, class_weights = build_learner(part, config, opener, device)
        announce(config, part, weights, class_weights, device, console)
        fit(learn, config, weights, run, console, fold, watchers)
        said, truth = validate(learn, class_weights)
        models.append(learn.model.cpu())
        logits.append(said)
        targets.append(truth)
        held_out.append(part[part["split"] == "valid"])
    if config.folds:
        # The optimiser and the parameter groups of the last fold do not fit the whole.
        learn.model, learn.opt, learn.splitter = ensemble(models), None, body_and_head
    films, all_logits = pd.concat(held_out), np.concatenate(logits)
    card, p = calibrate(learn, table, all_logits, np.concatenate(targets), config, weights)
    if config.folds:
        rows = [told(path, values, card) for path, values in zip(films["path"], p, strict=True)]
        write_text(run / "out_of_fold.csv", predictions_csv(films, rows, card["classes"]))
        found = {"run": run.name, "split": "out of fold", **measure(read_cells(run / "out_of_fold.csv"), card)}
        write_text(run / "cross_validation.json", json.dumps(found, indent=1))
    return learn, card


def told(path: str, probabilities: np.ndarray, card: dict[str, Any]) -> Prediction:
    """Return the row of one film from its probabilities (K,)."""
    p = dict(zip(card["classes"], map(float, probabilities), strict=True))
    return Prediction(path, probabilities=p, **decide(p, card))


def calibrate(
    learn: Learner,
    table: pd.DataFrame,
    logits: np.ndarray,
    targets: np.ndarray,
    config: TrainConfig,
    weights: LoadedWeights,
) -> tuple[dict[str, Any], np.ndarray]:
    """Choose temperature and threshold on held-out films, fold the first into the head; return card and probabilities.

    Parameters
    ----------
    logits, targets
        (n, K) of films that were not learned from, and what is true of them, as the loss takes it.
    """
    task, classes, positive = (table.attrs[k] for k in ("task", "classes", "positive"))
    multilabel = task == "multilabel"
    temperature = fit_temperature(logits, targets, multilabel)
    cooled(learn.model, temperature)
    calibrated = torch.from_numpy(logits) / temperature
    p = (calibrated.sigmoid() if multilabel else calibrated.softmax(1)).double().numpy()
    aim = {"sensitivity": config.target_sensitivity, "specificity": config.target_specificity}
    threshold: float | dict[str, float] | None = None
    if multilabel:
        threshold = {c: youden_threshold(targets[:, k], p[:, k], **aim) for k, c in enumerate(classes)}
    elif task == "binary":
        k = classes.index(positive)
        threshold = youden_threshold(targets == k, p[:, k], **aim)
    rule = next((name for name, target in aim.items() if target is not None), "youden")
    return {
        "classes": list(classes),
        "task": task,
        "positive": positive,
        "threshold": threshold,
        "operating_point": {"rule": rule, "target": aim.get(rule)},
        "temperature": temperature,
        "bias": learn.model[1].linear.bias.detach().cpu().tolist(),
        "conformal": conformal_scores(targets, p, multilabel),
        "augment": config.augment,
        "arch": config.arch,
        "folds": config.folds,
        "size": config.size,
        "weights": weights.detail,
        "data": {"source": config.data, "films": len(table), "fingerprint": fingerprint(table)},
        "versions": versions(),
        "notice": "Research software, not a medical device.",
    }, p


def export_both(
    run: Path,
    learn: Learner,
    card: dict[str, Any],
    table: pd.DataFrame,
    config: TrainConfig,
    opener: OpenFilm,
    device: torch.device,
    console: Console,
) -> None:
    """Write learner.pkl and model.onnx, after finding what tells outliers and which precisions agree."""
    # With folds no film is new to all networks: those that one in five did not learn from stand for new ones.
    pool = table[table["split"] != "test"]
    new = pool["fold"] == 1 if config.folds else pool["split"] == "valid"
    learned, held_out = pool[~new], pool[new]
    learned = learned.sample(min(len(learned), OUTLIER_FILMS), random_state=config.seed)
    held_out = held_out.sample(min(len(held_out), HELD_OUT_FILMS), random_state=config.seed)
    with console.progress("Learning what outliers are", len(learned)) as advance:
        outliers = fit_outliers(
            features_of_films(learn.model, learned["path"].tolist(), opener, device, config, advance)
        )
    with console.busy("Writing learner.pkl and model.onnx, and comparing them"):
        export_learner(learn, run / "learner.pkl")
        model = make_onnx(learn, config.size, card["task"], outliers)
        written = model.SerializeToString()
        films = np.stack([opener.encodes(path)[0].numpy() for path in held_out["path"]])
        said = said_by(OnnxRuntime(written, usable_cores()), films)
        parity = check_parity(learn, films[:PARITY_FILMS], said["probabilities"][:PARITY_FILMS], card["task"])
        limit = limit_of(said["distance"][:, 0])
        card["outliers"] = {"limit": limit, "quantile": QUANTILE, "films": len(learned)}
        truth = targets_of(held_out, card["classes"])
        card["precision"] = compare_precisions(written, films, said["probabilities"], truth)
        write_onnx(model, card, run / "model.onnx")
    half = card["precision"]["bf16"]
    console.say(
        f"Exported learner.pkl and model.onnx; probabilities differ by at most {parity:.1e}; bf16 in predict: "
        + half.get("reason", f"{'yes' if half['passed'] else 'no'}, "
                   f"differs by at most {half.get('largest_difference', 0):.1e}")
    )  # fmt: skip


def test_and_report(run: Path, table: pd.DataFrame, config: TrainConfig, console: Console) -> dict[str, Any]:
    """Send the test films through model.onnx; write predictions, figures, graded evidence, the report and the card."""
    from cxr_fastai.report import write_history_plot, write_model_card, write_report

    predictor = Predictor(run / "model.onnx")
    test = table[table["split"] == "test"].reset_index(drop=True)
    rows = predict_table(predictor, test, console)
    write_text(run / "predictions.csv", predictions_csv(test, rows, predictor.classes))
    found = measure(read_cells(run / "predictions.csv"), predictor.card, config.prevalence)
    metrics = {"run": run.name, "split": "test", **found}
    write_text(run / "metrics.json", json.dumps(metrics, indent=1))
    if alarm := too_good(test, metrics["metrics"]["auroc"]["value"], config.seed, console):
        write_text(run / "too_good.json", json.dumps(alarm, indent=1))
    write_evidence(run, predictor, test, console)
    write_history_plot(run)
    write_report(run, predictor, test, rows)
    write_model_card(run)
    return metrics
