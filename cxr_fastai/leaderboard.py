"""The finished runs of a folder side by side: which is best, and whether its lead means anything.

In: run folders (their predictions.csv, metrics.json, config.json, history.csv, split.csv; no model is opened). Out, for
`python cli.py runs`: groups of runs that were measured on the same test films, best first, each with its difference
to the best, paired film by film, with the interval of a bootstrap over patients. Runs of different test films are
never compared: their figures differ for the films' sake, too.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxr_fastai.config import require
from cxr_fastai.errors import CxrError, DataError, UsageError
from cxr_fastai.evaluate import ABOUT, answers
from cxr_fastai.images import printable
from cxr_fastai.metrics import compare
from cxr_fastai.report import METRIC_NAMES
from cxr_fastai.runs import LATEST, MANIFEST, atomic_path, find_run, read_cells, sha256
from cxr_fastai.sources import TARGET
from cxr_fastai.split import fingerprint
from cxr_fastai.verify import differences

READ = ("config.json", "metrics.json", "predictions.csv", "history.csv", "split.csv")
TRACES = (MANIFEST, "config.json", "history.csv", "audit.json")  # a folder with none of them is no run of ours
LOWER_IS_BETTER = ("brier", "calibration_error")
PLOTS = (".png", ".svg", ".pdf")


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run, as its files tell of it.

    record, metrics: config.json and metrics.json. history: history.csv. data: films and fingerprint of split.csv.
    paths: the test films that could be read, in order; truth, p, patients: of each of them, as `metrics` takes them.
    test: fingerprint of those films with all that is held true of them; runs that share it can be compared.
    """

    folder: Path
    record: dict[str, Any]
    metrics: dict[str, Any]
    history: pd.DataFrame
    data: dict[str, Any]
    paths: list[str]
    truth: np.ndarray
    p: np.ndarray
    patients: np.ndarray
    test: str

    @property
    def name(self) -> str:
        """The name of its folder, without control characters."""
        return printable(self.folder.name)

    def value(self, metric: str) -> float | None:
        """Return a test figure; None where it is not defined."""
        return self.metrics["metrics"][metric]["value"]


def open_run(folder: str | Path) -> Run:
    """Read the files of a finished run.

    Raises
    ------
    ModelFileError
        Where there is no run, or it did not finish.
    DataError
        Where a file is missing, damaged, or no longer what the manifest says.
    """
    found = find_run(folder)
    try:
        hashes = dict(json.loads((found / MANIFEST).read_text(encoding="utf-8"))["sha256"])
        for name in READ:
            if not (found / name).is_file():
                raise DataError(f"{name} is missing")
            if sha256(found / name) != hashes.get(name):
                raise DataError(f"{name} is not what the manifest says (python cli.py verify {folder})")
        return _read(found)
    except DataError as error:
        raise DataError(f"{folder}: damaged: {error}") from error
    except Exception as error:  # damaged files make their readers raise anything
        raise DataError(f"{folder}: damaged ({type(error).__name__}: {str(error)[:200]})") from error


def _read(folder: Path) -> Run:
    record, metrics = (json.loads((folder / name).read_text(encoding="utf-8")) for name in READ[:2])
    frame, split = read_cells(folder / "predictions.csv"), read_cells(folder / "split.csv")
    told = frame[frame["error"] == ""].assign(path=lambda rows: rows["path"].map(os.path.abspath))
    told = told.sort_values("path", ignore_index=True)
    truth, p, patients = answers(told, metrics["classes"], record["task"])
    # A patient's name may be a hash in one run and plain in the other; who shares films with whom stays the same.
    columns = [c for c in told if c in {"path", "label", *ABOUT} - {"fold"} or str(c).startswith(TARGET)]
    about = [told[columns].to_csv(), pd.factorize(told["patient_id"])[0].tolist()]
    task = [record["task"], metrics["classes"], metrics["positive"]]
    run = Run(
        folder=folder,
        record=record,
        metrics=metrics,
        history=pd.read_csv(folder / "history.csv"),
        data={"films": len(split), "fingerprint": fingerprint(split)},
        paths=told["path"].tolist(),
        truth=truth,
        p=p,
        patients=patients,
        test=hashlib.sha256(json.dumps([*about, *task]).encode()).hexdigest(),
    )
    facts_of(run)
    for name in METRIC_NAMES:
        run.value(name)  # what is missing is told here, not in the middle of a table
    return run


def open_runs(folder: str | Path) -> tuple[list[Run], list[dict[str, Any]]]:
    """Read all runs below a folder, by name; of those that are unfinished or damaged, say why.

    Returns
    -------
    runs : list of Run
    unfinished : list of dict
        {"run", "reason", "damaged"}

    Raises
    ------
    UsageError
        Where it is no folder, or is a run itself.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"{folder} is not a folder; name the one that the runs lie in, such as exports")
    if (root / MANIFEST).is_file():
        raise UsageError(f"{folder} is a run itself; name the folder that it lies in")
    runs, unfinished = [], []
    for path in sorted(root.iterdir()):
        if path.name == LATEST or not path.is_dir() or not any(os.path.lexists(path / name) for name in TRACES):
            continue
        try:
            if os.path.lexists(path / MANIFEST):
                runs.append(open_run(path))
                continue
            reason, damaged = f"not finished, {_epochs_done(path)}: still training, or stopped", False
        except CxrError as error:
            reason, damaged = str(error).removeprefix(f"{path}: "), True
        unfinished.append({"run": printable(path.name), "reason": printable(reason), "damaged": damaged})
    return runs, unfinished


def _epochs_done(folder: Path) -> str:
    try:
        done = len((folder / "history.csv").read_bytes().splitlines()) - 1
    except OSError:
        done = 0
    return "no epoch done" if done < 1 else f"{done} epoch{'s' * (done > 1)} done"


def compare_runs(a: Run, b: Run) -> dict[str, Any] | None:
    """Compare two runs of the same test films as `metrics.compare` does; None where the films are too few for it."""
    try:
        return compare(
            a.truth, a.p, b.p, a.patients, a.metrics["classes"], task=a.record["task"], positive=a.metrics["positive"],
            threshold_a=a.metrics["threshold"], threshold_b=b.metrics["threshold"],
        )  # fmt: skip
    except DataError:
        return None


def facts_of(run: Run) -> dict[str, str]:
    """Return in a few words each what a run was made from and how."""
    config, epochs = run.record["config"], int(run.history["epoch"].max())
    folds = int(config.get("folds", 0))
    return {
        "data": Path(config["data"]).name or str(config["data"]),
        "architecture": config["arch"],
        "weights": Path(config["weights"]).name,
        "size": f"{config['size']} px",
        "epochs": f"{epochs} × {folds} folds" if folds else str(epochs),
    }


def rank(runs: Sequence[Run], unfinished: Sequence[dict[str, Any]], sort: str = "auroc") -> dict[str, Any]:
    """Group runs by their test films, put the best first, and compare each with it.

    Parameters
    ----------
    sort
        The metric by which: a key of `METRIC_NAMES`. Runs that do not define it come last.

    Returns
    -------
    dict
        {"sort", "groups": [{"test": {"n", "n_patients", "fingerprint", "classes", "positive"}, "runs": [{"run",
        "metrics", "difference": {"value", "low", "high", "p"} or None, "facts", "finished", "seconds", "config"}]}],
        "unfinished"}. A difference is that of the metric of `sort`, the run less the best. Largest group first.
    """
    require(sort in METRIC_NAMES, "--sort", sort, f"one of {', '.join(METRIC_NAMES)}")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.test, []).append(run)
    ordered = sorted(groups.values(), key=lambda group: (-len(group), group[0].name))
    return {"sort": sort, "groups": [_group(group, sort) for group in ordered], "unfinished": list(unfinished)}


def _group(runs: list[Run], sort: str) -> dict[str, Any]:
    def place(run: Run) -> tuple[bool, float, str]:
        value = run.value(sort)
        return value is None, (value or 0.0) * (1 if sort in LOWER_IS_BETTER else -1), run.name

    best, *others = sorted(runs, key=place)
    test = {"n": len(best.paths), "n_patients": len(set(best.patients)), "fingerprint": best.test}
    entries = [_entry(best, None), *(_entry(run, _difference(run, best, sort)) for run in others)]
    return {"test": test | {key: best.metrics[key] for key in ("classes", "positive")}, "runs": entries}


def _difference(run: Run, best: Run, metric: str) -> dict[str, float] | None:
    found = compare_runs(run, best)
    if found is None or found["metrics"][metric]["difference"] is None:
        return None
    entry = found["metrics"][metric]
    return {"value": entry["difference"], **{key: entry[key] for key in ("low", "high", "p")}}


def _entry(run: Run, difference: dict[str, float] | None) -> dict[str, Any]:
    seconds = float(run.history["seconds"].sum()) if "seconds" in run.history else None
    finished = datetime.fromtimestamp((run.folder / MANIFEST).stat().st_mtime).astimezone()
    return {
        "run": run.name,
        "metrics": run.metrics["metrics"],
        "difference": difference,
        "facts": facts_of(run),
        "finished": finished.isoformat(timespec="seconds"),
        "seconds": seconds,
        "config": run.record["config"],
    }


def diff_runs(a: Run, b: Run) -> dict[str, Any]:
    """Return what two runs do not have in common, and how their figures differ where they can be compared.

    Returns
    -------
    dict
        {"runs": [a, b], "differs": {path: [of a, of b]}, "comparison": as `compare` gives it (a - b), or None, "note"}:
        `note` says why there is no comparison.
    """
    differs = {path: [old, new] for path, old, new in differences(_told(a), _told(b))}
    comparison, note = None, ""
    if a.test == b.test:
        comparison = compare_runs(a, b)
        note = "" if comparison else "too few test films of a class"
    elif a.paths != b.paths and a.data == b.data:
        note = "their films have the same names, labels and patients, but lie elsewhere; train both on one folder"
    elif a.paths == b.paths:
        note = "the test films are the same, but not their labels, patients or other columns, or the positive class"
    else:
        shared = len(set(a.paths) & set(b.paths))
        note = f"the test films are others ({len(a.paths)} and {len(b.paths)}, {shared} of them in both)"
    return {"runs": [a.name, b.name], "differs": differs, "comparison": comparison, "note": note}


def _told(run: Run) -> dict[str, Any]:
    """Return all of a run that may make a difference; what is always another's (its name) is not."""
    config = {key: value for key, value in run.record["config"].items() if key != "name"}
    test = {"films": len(run.paths), "fingerprint": run.test}
    epochs = facts_of(run)["epochs"]
    return {**run.record, "config": config, "epochs_trained": epochs, "data": run.data, "test": test}


def plot_runs(runs: Sequence[Run], file: str | Path) -> None:
    """Draw validation AUROC and loss against epoch, a line a run, into a .png, .svg or .pdf."""
    from cxr_fastai.report.plots import plot_histories

    check_plot(file)
    if not runs:
        raise UsageError("--plot: there is no finished run to draw")
    note = "" if len({run.data["fingerprint"] for run in runs}) < 2 else "The runs have different splits or films"
    with atomic_path(file) as temporary:
        plot_histories({run.name: run.history for run in runs}, note).savefig(temporary)


def check_plot(file: str | Path) -> None:
    """Refuse the name of a picture that cannot be drawn."""
    require(Path(file).suffix.lower() in PLOTS, "--plot", file, f"a file that ends in {', '.join(PLOTS)}")
