"""What the weights learned from phantoms are worth on real films: as they are, and to start from with few real films.

    python bench/transfer.py --real DIR [--seeds 5] [--shots 20 50 100 200 400] [--size 224]

DIR holds manifest.csv (path, label, patient_id, source; where known findings, view, age), the films of each hospital
in a folder of its own. For each hospital four questions:

    zero-shot   the findings head that comes with the weights, no real film learned from, on all films
    fine-tuned  `fitting.fit` on N films, the product's recipe for each start, against random weights (and ImageNet's),
                with as many steps for few films as for many
    trained     the same with the epochs and steps that `python cli.py train` takes by default
    probe       a logistic regression on the frozen features of the body, against those of random weights

N films are all that is learned from, labels of others are not: a fifth of them chooses the epoch. Films of one seed are
nested, whole patients are held out, and every start sees the same films. Finished cells lie in WORK/cells.jsonl, so
that a bench that was cut off goes on; name another WORK after a change of the training, which they know nothing of.
Out: OUT/transfer.md, transfer.png and transfer.json. About two and a half hours on two idle cores.
"""

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from transfer_report import write

from cxr_fastai.config import TrainConfig, usable_cores
from cxr_fastai.console import QUIET
from cxr_fastai.data import OpenFilm, normalised, read_films, without_unreadable
from cxr_fastai.errors import CxrError
from cxr_fastai.fitting import build_learner, choose_device, features_of_films, fit
from cxr_fastai.model import EvidenceHead, load_weights, make_body
from cxr_fastai.runs import SHIPPED_WEIGHTS
from cxr_fastai.split import fingerprint, split_table

NORMAL, ABNORMAL = "normal", "abnormal"
STARTS = ("phantom", "random", "imagenet")
VALID = 0.2  # of the few films, by which the epoch is chosen
EPOCH = 320  # films: fewer come several times, so that the number of films changes neither steps nor schedule
TRAIN_EPOCHS = TrainConfig.epochs + TrainConfig.freeze_epochs
LONGER = 4  # times as many epochs, for random weights with the most films: are they starved?
LONGER_SEEDS = 1
TRAIN_SEEDS = 3  # of `train`'s default epochs and steps; all seeds would take another half hour
LEAST_SHOTS = 10
STATISTICS_FILMS = 128  # by which random weights get the statistics of their batch normalisation
GRID = np.logspace(-5, 1, 7)  # C of the logistic regression


@dataclass(frozen=True)
class Job:
    """What one process does at a time; `shots` are the numbers of real films, of a fit one."""

    kind: str  # zero, fit, train or probe
    hospital: str
    start: str
    seed: int
    shots: tuple[int, ...]
    epochs: int = 0  # of fit and train, the frozen one included

    @property
    def cost(self) -> float:
        """Roughly how many films go through a network, a step counted as three."""
        if not self.epochs:
            return 800.0
        return 3.0 * self.epochs * (EPOCH if self.kind == "fit" else self.shots[0]) + 300


@dataclass(frozen=True)
class Settings:
    """What all jobs share; `weights` are those of phantoms, with the findings head."""

    real: Path
    weights: Path
    size: int
    test: int
    device: str
    threads: int


# ---- films ----


def hospitals(real: Path) -> dict[str, pd.DataFrame]:
    """Read the manifest: one table a hospital, its films labelled normal or abnormal."""
    rows = pd.read_csv(real / "manifest.csv", dtype=str, keep_default_na=False)
    rows = rows.assign(**{name: "" for name in ("view", "age") if name not in rows})
    rows["label"] = rows["label"].str.lower().replace({"pneumonia": ABNORMAL})
    rows = rows[rows["label"].isin([NORMAL, ABNORMAL]) & ~rows["path"].str.contains("native|odd_formats|dicom")]
    rows["hospital"] = rows["path"].str.split("/").str[0]
    rows["path"] = [str(real / path) for path in rows["path"]]
    rows["split"] = ""
    found = {}
    for name, own in rows.groupby("hospital", sort=True):
        found[str(name)] = described(own.reset_index(drop=True))
    return found


def described(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with what `split` and `data` ask of one."""
    table.attrs = {"classes": [ABNORMAL, NORMAL], "task": "binary"}
    return table


def deal(table: pd.DataFrame, seed: int, test: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the films to learn from and those of the test, at most half: whole patients, stratified by label."""
    dealt = split_table(table, seed=seed, test=min(test / len(table), 0.5), valid=0)
    return tuple(  # type: ignore[return-value]
        described(dealt[dealt["split"] == split].reset_index(drop=True)) for split in ("train", "test")
    )


def few(pool: pd.DataFrame, n: int, seed: int) -> pd.DataFrame | None:
    """Return n films, half of each class, with their split into train and valid; None where the pool has too few.

    Patients come in an order of the seed's, so that a smaller choice lies within a larger one.
    """
    patients = pool["patient_id"].unique()
    turn = dict(zip(np.random.default_rng(seed).permutation(patients), range(len(patients)), strict=True))
    ordered = pool.assign(turn=pool["patient_id"].map(turn)).sort_values("turn", kind="stable")
    each = [ordered[ordered["label"] == label].head(n // 2) for label in (ABNORMAL, NORMAL)]
    if n < LEAST_SHOTS or min(map(len, each)) < n // 2:
        return None
    chosen = described(pd.concat(each).drop(columns="turn").assign(split="").reset_index(drop=True))
    return split_table(chosen, seed=seed, test=0, valid=VALID)


def repeated(table: pd.DataFrame, films: int) -> pd.DataFrame:
    """Return the table with its training films repeated in turn to at least `films` rows: one epoch."""
    train = np.flatnonzero(table["split"] == "train")
    rows = np.concatenate([np.resize(train, max(films, len(train))), np.flatnonzero(table["split"] == "valid")])
    return described(table.iloc[rows].reset_index(drop=True))


# ---- networks ----


def findings_head(weights: Path) -> EvidenceHead:
    """Return the findings head that comes with weights of phantoms."""
    state = load_file(weights)
    head = EvidenceHead(state["findings.weight"].shape[1], len(state["findings.weight"]), dropout=0.0)
    head.linear.load_state_dict({"weight": state["findings.weight"].float(), "bias": state["findings.bias"].float()})
    return head


def weights_of(start: str, phantom: Path) -> str:
    """Return what the product's --weights calls a start."""
    return {"phantom": str(phantom), "random": "none", "imagenet": "imagenet"}[start]


def body_of(start: str, seed: int, paths: Sequence[str], opener: OpenFilm, phantom: Path) -> torch.nn.Module:
    """Return the frozen body of a start.

    The running statistics of random weights say nothing of their layers; they are set on films, without labels.
    """
    torch.manual_seed(seed)
    body = make_body("densenet121")[0]
    load_weights(body, "densenet121", weights_of(start, phantom))
    if start == "random":
        for layer in body.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.reset_running_stats()
                layer.momentum = None  # a plain mean over batches
        chosen = np.random.default_rng(seed).permutation(list(paths))[:STATISTICS_FILMS]
        with torch.no_grad():
            for part in np.array_split(chosen, -(-len(chosen) // 32)):
                films = torch.stack([opener.encodes(str(path)) for path in part])
                body(normalised(films.as_subclass(torch.Tensor)))  # type: ignore[arg-type]
    return body.eval()


def features(body: torch.nn.Module, paths: Sequence[str], opener: OpenFilm, settings: Settings) -> np.ndarray:
    """Return the mean over places of the features that fire, (n, F) float32."""
    config = TrainConfig(size=settings.size, batch_size=32)
    device = choose_device(settings.device)
    return features_of_films(torch.nn.Sequential(body), paths, opener, device, config, lambda: None)


def probe(x: np.ndarray, y: np.ndarray, patients: np.ndarray, new: np.ndarray, seed: int) -> np.ndarray:
    """Return the scores (m,) that a logistic regression on features (n, F) gives to new ones (m, F).

    Its C is chosen by cross-validation by patient, for the log loss.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = int(min(5, *(len(np.unique(patients[y == label])) for label in (0, 1))))
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
        {"logisticregression__C": GRID},
        scoring="neg_log_loss",
        cv=StratifiedGroupKFold(folds, shuffle=True, random_state=seed),
    )
    return search.fit(x, y, groups=patients).decision_function(new)


# ---- jobs ----


def plan(tables: dict[str, pd.DataFrame], options: argparse.Namespace, starts: Sequence[str]) -> list[Job]:
    """Return all jobs that the films suffice for, the short ones first."""
    jobs = [Job("zero", name, "phantom", 0, (0,)) for name in tables]
    fits = []
    for seed in range(options.seeds):
        for name, table in tables.items():
            pool = deal(table, seed, options.test)[0]
            shots = tuple(n for n in options.shots if few(pool, n, seed) is not None)
            if not shots:
                continue
            jobs += [Job("probe", name, start, seed, shots) for start in starts]
            fits += [Job("fit", name, start, seed, (n,), options.epochs) for n in shots for start in starts]
            if seed < TRAIN_SEEDS:
                fits += [Job("train", name, start, seed, (n,), TRAIN_EPOCHS) for n in shots for start in starts]
            if seed < LONGER_SEEDS and "random" in starts:
                fits.append(Job("fit", name, "random", seed, (max(shots),), LONGER * options.epochs))
    return jobs + sorted(fits, key=lambda job: job.kind)  # fits before train: what is asked for most comes first


def run_job(job: Job, table: pd.DataFrame, opener: OpenFilm, settings: Settings) -> list[dict[str, Any]]:
    """Do a job; return one record a number of films, with the scores of the test films in their order."""
    began = time.perf_counter()
    records = dict(zip(job.shots, DOES[job.kind](job, table, opener, settings), strict=True))
    seconds = round((time.perf_counter() - began) / len(records), 1)
    return [
        {**record_key(job, n), "seconds": seconds, "scores": np.round(scores, 5).tolist()}
        for n, scores in records.items()
    ]


def record_key(job: Job, n: int) -> dict[str, Any]:
    """Return what a record is known by within one setting."""
    return {**dataclasses.asdict(job), "shots": n}


def zero_shot(job: Job, table: pd.DataFrame, opener: OpenFilm, settings: Settings) -> Iterator[np.ndarray]:
    """Yield the logits of the findings for all films, (n, K)."""
    body = body_of(job.start, 0, [], opener, settings.weights)
    pooled = features(body, table["path"].tolist(), opener, settings)
    with torch.no_grad():
        yield findings_head(settings.weights).linear(torch.from_numpy(pooled)).numpy()


def probe_all(job: Job, table: pd.DataFrame, opener: OpenFilm, settings: Settings) -> Iterator[np.ndarray]:
    """Yield the scores of the test films, for each number of films."""
    pool, test = deal(table, job.seed, settings.test)
    body = body_of(job.start, job.seed, pool["path"].tolist(), opener, settings.weights)
    pooled, new = (features(body, part["path"].tolist(), opener, settings) for part in (pool, test))
    place = {path: row for row, path in enumerate(pool["path"])}
    for n in job.shots:
        chosen = chosen_films(pool, n, job.seed)
        y = (chosen["label"] == ABNORMAL).to_numpy().astype(int)
        rows = [place[path] for path in chosen["path"]]
        yield probe(pooled[rows], y, chosen["patient_id"].to_numpy(), new, job.seed)


def chosen_films(pool: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """Return what `few` does, where `plan` has seen that there are enough."""
    chosen = few(pool, n, seed)
    assert chosen is not None
    return chosen


def fine_tune(job: Job, table: pd.DataFrame, opener: OpenFilm, settings: Settings) -> Iterator[np.ndarray]:
    """Yield the scores of the test films after the product's fit."""
    pool, test = deal(table, job.seed, settings.test)
    chosen = chosen_films(pool, job.shots[0], job.seed)
    if job.kind == "fit":
        chosen = repeated(chosen, EPOCH)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            data=str(settings.real), weights=weights_of(job.start, settings.weights), size=settings.size,
            seed=job.seed, out=folder, device=settings.device, epochs=job.epochs - 1, freeze_epochs=1, patience=0,
        )  # fmt: skip
        learn, loaded, _ = build_learner(chosen, config, opener, choose_device(settings.device))
        fit(learn, config, loaded, Path(folder), QUIET)
        body, head = learn.model.cpu()
        pooled = features(body, test["path"].tolist(), opener, settings)
        with torch.no_grad():
            logits = head.cpu().eval().linear(torch.from_numpy(pooled)).numpy()
    yield logits[:, 0] - logits[:, 1]  # the classes are abnormal, normal


DOES = {"zero": zero_shot, "probe": probe_all, "fit": fine_tune, "train": fine_tune}


# ---- processes ----

AT_HAND: dict[str, Any] = {}  # of a worker process: settings, tables, opener


def begin(settings: Settings) -> None:
    """Set up a worker process: its threads, its end with the parent's, and all films from the cache."""
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=end_with, args=(parent.sentinel,), daemon=True).start()
    torch.set_num_threads(settings.threads)
    torch.set_flush_denormal(True)
    tables, opener = hospitals(settings.real), OpenFilm(settings.size)
    for table in tables.values():
        without_unreadable(table, read_films(opener, table["path"].tolist(), lambda: None), skip=False)
    AT_HAND.update(settings=settings, tables=tables, opener=opener)


def end_with(sentinel: int) -> None:
    """End this process when another one has ended, however that came about; a pool's worker would go on without it."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def work(job: Job) -> list[dict[str, Any]]:
    return run_job(job, AT_HAND["tables"][job.hospital], AT_HAND["opener"], AT_HAND["settings"])


def setting_of(settings: Settings, tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Return what finished cells must have in common with a bench that takes them over."""
    films = "".join(fingerprint(table) for table in tables.values())
    return {
        "size": settings.size,
        "test": settings.test,
        "films": hashlib.sha256(films.encode()).hexdigest()[:16],
        "weights": hashlib.sha256(settings.weights.read_bytes()).hexdigest()[:16],
    }


def finished(file: Path, setting: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the records of a setting by their key; of what a kill cut off, the last line, nothing.

    Cells that do not start from weights of phantoms hold for other ones, too.
    """
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        theirs = record.pop("setting")
        same = [name for name in setting if name != "weights" or record["start"] == "phantom"]
        if all(theirs.get(name) == setting[name] for name in same):
            found[key_text(record)] = record
    return found


def key_text(record: dict[str, Any]) -> str:
    """Return a record's key as a text."""
    return json.dumps([record[field.name] for field in dataclasses.fields(Job)])


def left_of(jobs: list[Job], done: dict[str, dict[str, Any]]) -> list[Job]:
    """Return the jobs of which a record is missing."""
    return [job for job in jobs if not all(key_text(record_key(job, n)) in done for n in job.shots)]


def run_all(jobs: list[Job], file: Path, setting: dict[str, Any], settings: Settings, workers: int) -> None:
    """Do all jobs, append the records of each to a file, and say how far it is."""
    began, total, done = time.perf_counter(), sum(job.cost for job in jobs), 0.0
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, begin, (settings,))
    try:
        with file.open("a", encoding="utf-8") as stream:
            if file.stat().st_size:
                stream.write("\n")  # ends a line that was cut off
            waiting = {pool.submit(work, job): job for job in jobs}
            for number, future in enumerate(as_completed(waiting), 1):
                job, records = waiting[future], future.result()
                stream.writelines(json.dumps({**record, "setting": setting}) + "\n" for record in records)
                stream.flush()
                done += job.cost
                spent = time.perf_counter() - began
                shots = " ".join(map(str, job.shots))
                print(f"{number}/{len(jobs)} {job.hospital} {job.kind} {job.start} films {shots} seed {job.seed}: "
                      f"{sum(record['seconds'] for record in records):.0f} s; {spent / 60:.1f} min so far, "
                      f"about {spent / done * (total - done) / 60:.0f} min left", flush=True)  # fmt: skip
    finally:  # where a job failed, without waiting for all others, whose records nobody keeps any more
        pool.shutdown(cancel_futures=True)


def starts_at_hand(asked: Sequence[str], phantom: Path) -> tuple[list[str], list[str]]:
    """Return the starts whose weights can be had, and for each other one a line that says so."""
    starts, notes = [], []
    for start in asked:
        try:
            load_weights(make_body("densenet121")[0], "densenet121", weights_of(start, phantom))
            starts.append(start)
        except CxrError as error:
            print(f"{start} left out: {error}")
            notes.append(f"{start} weights left out: they could not be had where this was measured")
    return starts, notes


def even(text: str) -> int:
    """Return a number of films, half of which are of each class."""
    if int(text) % 2:
        raise argparse.ArgumentTypeError(f"{text} is odd: give an even number, half of it are of each class")
    return int(text)


def asked_for() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "real-cxr")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--shots", type=even, nargs="+", default=[20, 50, 100, 200, 400], help="numbers of real films")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS)
    parser.add_argument("--weights", type=Path, default=SHIPPED_WEIGHTS, help="weights of phantoms, .safetensors")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=3, help=f"of {EPOCH} films, the frozen one included")
    parser.add_argument("--test", type=int, default=250, help="films held out, at most half of a hospital's")
    parser.add_argument("--boot", type=int, default=2000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, help="processes; by default one a core, on a GPU one")
    parser.add_argument("--work", type=Path, default=Path("data/transfer"), help="folder of the finished cells")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    return parser.parse_args()


def main() -> int:
    options = asked_for()
    if not (options.real / "manifest.csv").is_file():
        print(f"skipped: no manifest.csv of real films in {options.real}; name their folder with --real")
        return 0
    cuda = choose_device(options.device).type == "cuda"
    workers = options.workers or (1 if cuda else usable_cores())
    settings = Settings(
        options.real.resolve(), options.weights.resolve(), options.size, options.test, options.device,
        max(1, usable_cores() // workers),
    )  # fmt: skip
    starts, notes = starts_at_hand(options.starts, settings.weights)
    tables = {name: table for name, table in hospitals(settings.real).items() if table["label"].nunique() == 2}
    jobs, setting = plan(tables, options, starts), setting_of(settings, tables)
    options.work.mkdir(parents=True, exist_ok=True)
    file = options.work / "cells.jsonl"
    left = left_of(jobs, finished(file, setting))
    print(f"{len(jobs)} jobs, {len(jobs) - len(left)} of them finished before; {workers} process(es)", flush=True)
    if left:
        begin(dataclasses.replace(settings, threads=usable_cores()))  # the films are decoded once, before all workers
        run_all(left, file, setting, settings, workers)
    done = finished(file, setting)
    records = [done[key_text(record_key(job, n))] for job in jobs for n in job.shots]
    tests = {(name, seed): deal(table, seed, settings.test)[1] for name, table in tables.items()
             for seed in range(options.seeds)}  # fmt: skip
    told = {"epochs": options.epochs, "films an epoch": EPOCH, "boot": options.boot}
    write(options.out, records, tables, tests, {**setting, **told}, notes)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CxrError as error:
        sys.exit(f"error: {error}")
