"""Is a finished run what it says it is? Everything that can be computed again is, and every difference is named.

In: a run folder. Out: ``{"run", "checked": {...}, "problems": [{"file", "detail"}]}``. What is looked at:

    manifest.json      the SHA-256 of every file; files that are missing, changed or not in the list
    model.onnx         can be run, and its card agrees with config.json
    split.csv          has the fingerprint of the card, and no patient on both sides
    predictions.csv    the test films of split.csv, with calls that follow from the probabilities and the threshold
    metrics.json       every number, to the last digit, from predictions.csv (cross_validation.json: out_of_fold.csv)
    evidence.json      every number from evidence.csv
    films              the first of the test films that are still on disk are predicted again

So an edited number is found even if somebody corrected the hash in the manifest, too. What cannot be found then:

    a byte of learner.pkl (never opened here), of the report, the plots, the history or the rest of config.json
    a weight of model.onnx that moves no probability by `TOLERANCE`; a p_ cell that no number rests on, within `ONE`
    a row of predictions.csv changed together with all that follows from it, unless its film is predicted again
    a run that was made up as a whole

Against these it only helps to compare the hash of manifest.json, which is in the result, with one kept elsewhere.
"""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from cxr_fastai import __version__
from cxr_fastai.console import QUIET, Console
from cxr_fastai.errors import CxrError, DataError, Interrupted
from cxr_fastai.evaluate import measure
from cxr_fastai.grading import summarise
from cxr_fastai.images import printable
from cxr_fastai.predict import Predictor, decide
from cxr_fastai.runs import MANIFEST, find_run, read_cells, sha256
from cxr_fastai.split import check_split, fingerprint

TOLERANCE = 1e-4  # of a probability that is predicted again, possibly on another machine
ONE = 1e-5  # how far probabilities that exclude each other may miss a sum of 1; float32 misses it by less than 1e-6
ROUNDING = 1e-9  # relative; what differs by less may be another processor's order of adding
NEEDED = ("config.json", "split.csv", "learner.pkl", "model.onnx", "predictions.csv", "metrics.json")
CARD = ("classes", "task", "positive", "threshold", "temperature", "size", "data")
SHOWN = 10  # problems of a file that people are shown


def verify_run(run: str | Path, films: int = 8, console: Console = QUIET) -> dict[str, Any]:
    """Check a finished run against itself.

    Parameters
    ----------
    run
        Run folder, such as exports/latest.
    films
        How many test films to predict again; 0 for none.

    Returns
    -------
    dict
        ``run``; ``checked``: counts of the ``files`` that agree with the manifest, of the ``numbers`` recomputed, of
        the ``films`` predicted again and the ``films_gone``, the ``manifest_sha256``, and ``notes``: what could not
        be checked for want of something else, in words; ``problems``: ``{"file", "detail"}`` each, in the order of the
        checks. An empty list means that all agrees.

    Raises
    ------
    ModelFileError
        Where there is no finished run.
    """
    folder = find_run(run)
    found = _Verification(folder, films)
    checks: list[tuple[str, Callable[[], None]]] = [
        (MANIFEST, found.files),
        ("model.onnx", found.model),
        ("config.json", found.config),
        ("split.csv", found.split),
        ("predictions.csv", found.predictions),
        ("metrics.json", lambda: found.numbers("metrics.json", "predictions.csv", "test")),
        ("cross_validation.json", lambda: found.numbers("cross_validation.json", "out_of_fold.csv", "out of fold")),
        ("evidence.json", found.evidence),
        ("model.onnx", found.films_again),
    ]
    with console.progress(f"Verifying {folder.name}", len(checks)) as advance:
        for file, check in checks:
            try:
                check()
            except Interrupted:
                raise
            except Exception as error:  # noqa: BLE001 - damaged or hostile files make their readers raise anything
                reason = str(error) if isinstance(error, CxrError) else f"{type(error).__name__}: {error}"
                found.blame(file, f"cannot be checked, it or what it is checked by is damaged ({reason[:300]})")
            advance()
    return {"run": str(run), "checked": found.checked, "problems": found.problems}


class _Verification:
    """The checks of one run folder, and what they found so far. Each leaves what later ones need, or None."""

    def __init__(self, folder: Path, films: int):
        self.folder, self.n_films = folder, films
        self.problems: list[dict[str, str]] = []
        self.checked: dict[str, Any] = {"files": 0, "numbers": 0, "films": 0, "films_gone": 0, "notes": []}
        self.predictor: Predictor | None = None
        self.prevalence: tuple[float, ...] = ()

    def blame(self, file: str, detail: str) -> None:
        self.problems.append({"file": printable(file), "detail": printable(detail)})

    def note(self, what: str, why: str) -> None:
        self.checked["notes"].append(f"{what}: {why}")

    def has(self, *names: str) -> bool:
        """Tell whether files are there to be opened; if they are not, `files` has said so."""
        paths = [inside(self.folder, name) for name in names]
        return all(path is not None and path.is_file() for path in paths)

    def json(self, name: str) -> dict[str, Any]:
        content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise DataError(f"{name} holds no JSON object")
        return content

    def files(self) -> None:
        """Compare the files with the manifest, and name those that are missing or in neither list."""
        self.checked["manifest_sha256"] = sha256(self.folder / MANIFEST)
        try:
            hashes = dict(self.json(MANIFEST)["sha256"])
        except (CxrError, ValueError, KeyError, TypeError, RecursionError) as error:
            self.blame(MANIFEST, f"holds no list of hashes ({type(error).__name__}); nothing can be compared with it")
            hashes = {}
        for name, digest in hashes.items():
            if (path := inside(self.folder, name)) is None:
                self.blame(MANIFEST, f"names {name!r}, which is not in the run folder; it was not opened")
            elif not path.is_file():
                self.blame(name, "missing: the manifest names it")
            elif sha256(path) != digest:
                self.blame(name, "changed: its SHA-256 is not that of the manifest")
            else:
                self.checked["files"] += 1
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if name not in (*hashes, MANIFEST) and (path.is_symlink() or not path.is_dir()):
                self.blame(name, "extra: the manifest does not name it")
        for name in NEEDED:
            if name not in hashes and not self.has(name):
                self.blame(name, "missing, and the manifest does not name it: every run has one")

    def model(self) -> None:
        """Open the model and look whether its card is whole."""
        if not self.has("model.onnx"):
            return
        predictor = Predictor(self.folder / "model.onnx")
        if missing := [key for key in CARD if key not in predictor.card]:
            raise DataError(f"its card lacks {', '.join(missing)}")
        self.predictor = predictor

    def config(self) -> None:
        """Compare the card inside the model with config.json."""
        if not self.has("config.json"):
            return
        record = self.json("config.json")
        self.prevalence = tuple(record["config"].get("prevalence", ()))
        if (made_by := record["versions"]["cxr_fastai"]) != __version__:
            self.note("config.json", f"cxr_fastai {made_by} made the run; {__version__} may measure more or otherwise")
        if self.predictor is None:
            self.note("config.json", "no model whose card it could agree with")
            return
        told = {key: record[key] for key in ("task", "classes", "positive", "versions")}
        told |= {key: record["config"][key] for key in ("size", "arch", "folds")}
        for key, value in told.items():
            if value != self.predictor.card.get(key):
                self.blame("config.json", f"{key} is {value}, but {self.predictor.card.get(key)} in model.onnx")

    def split(self) -> None:
        """Compare split.csv with the fingerprint on the card, and look for patients on both sides."""
        if not self.has("split.csv"):
            return
        table = read_cells(self.folder / "split.csv")
        if self.predictor is None:
            self.note("split.csv", "no model whose fingerprint of the data it could have")
        elif fingerprint(table) != self.predictor.card["data"]["fingerprint"]:
            self.blame("split.csv", "its films, labels, patients or splits are not those that the model was made from")
        try:
            check_split(table)
        except DataError as error:
            self.blame("split.csv", str(error))

    def predictions(self) -> None:
        """Compare predictions.csv with the test films, and its calls with its probabilities."""
        if not self.has("predictions.csv"):
            return
        frame = read_cells(self.folder / "predictions.csv")
        if self.has("split.csv"):
            table = read_cells(self.folder / "split.csv")
            truth = ["path", "patient_id", "label"]
            test = table.loc[table["split"] == "test", truth].reset_index(drop=True)
            if len(test) != len(frame):
                self.blame("predictions.csv", f"{len(frame)} rows, but {len(test)} test films in split.csv")
            else:
                for i in (test != frame[truth]).any(axis=1).to_numpy().nonzero()[0]:
                    said, is_true = (list(rows.loc[i, truth]) for rows in (frame, test))
                    self.blame("predictions.csv", f"row {i + 1} is of {said}, but {is_true} in split.csv")
        if self.predictor is None:
            self.note("predictions.csv", "no model whose threshold its calls could follow")
            return
        for i, row in frame[frame["error"] == ""].iterrows():
            for detail in wrong_calls(row, self.predictor.card):
                self.blame("predictions.csv", f"row {i + 1} ({row['path']}): {detail}")

    def numbers(self, name: str, source: str, split: str) -> None:
        """Compute metrics of a split again; the name of the run is free, as a folder may be renamed."""
        if self.predictor is not None and self.has(name, source):
            stored = self.json(name)
            stored.pop("run", None)
            prevalence = self.prevalence if split == "test" else ()
            again = measure(read_cells(self.folder / source), self.predictor.card, prevalence)
            self.compare(name, source, {"split": split, **again}, stored)
        elif self.has(name) or self.has(source):
            self.note(name, f"it is computed from {source} and the card in model.onnx, and both must be there")

    def evidence(self) -> None:
        """Compute the means of the graded evidence again."""
        name, source = "evidence.json", "evidence.csv"
        if self.has(name, source):
            self.compare(name, source, summarise(read_cells(self.folder / source)), self.json(name))
        elif self.has(name) or self.has(source):
            self.note(name, f"it is computed from {source}, and both must be there")

    def compare(self, name: str, source: str, again: dict[str, Any], stored: dict[str, Any]) -> None:
        again = json.loads(json.dumps(again))  # lists for tuples, text for all keys
        self.checked["numbers"] += sum(1 for _ in numbers_in(again))
        for path, old, new in differences(stored, again):
            self.blame(name, f"{path} is {brief(old)}, but {brief(new)} from {source}{last_digits(old, new)}")

    def films_again(self) -> None:
        """Predict the first test films that are still there."""
        if not self.n_films or self.predictor is None or not self.has("predictions.csv"):
            return
        frame = read_cells(self.folder / "predictions.csv")
        frame = frame[frame["error"] == ""]
        there = frame["path"].map(lambda path: Path(path).is_file())
        self.checked["films_gone"] = int((~there).sum())
        first = frame[there].head(self.n_films)
        for (_, row), now in zip(first.iterrows(), self.predictor.predict(first["path"]), strict=True):
            self.checked["films"] += 1
            if now.error is not None:
                self.blame("predictions.csv", f"{row['path']} can no longer be read: {now.error}")
                continue
            gaps = {name: abs(p - float(row[f"p_{name}"])) for name, p in now.probabilities.items()}
            worst = max(gaps, key=gaps.__getitem__)
            if not gaps[worst] <= TOLERANCE:
                detail = f"p_{worst} of {row['path']} is {row[f'p_{worst}']}, but {now.probabilities[worst]} now"
                self.blame("predictions.csv", f"{detail}: the cell, the film or the model was changed")


# What the checks ask -------------------------------------------------------------------------------------------------


def inside(folder: Path, name: object) -> Path | None:
    """Return the path of a file that a manifest names, or None where it is not a plain name within the folder."""
    if not isinstance(name, str) or "\\" in name or "\0" in name:
        return None
    plain = PurePosixPath(name)
    if plain.as_posix() != name or plain.is_absolute() or ".." in plain.parts or not plain.parts:
        return None
    path = folder / plain
    try:
        path.exists()  # raises where the name is too long
        return path if path.resolve().is_relative_to(folder.resolve()) else None  # a link may lead out of it
    except (OSError, RuntimeError):  # or a circle of links
        return None


def wrong_calls(row: pd.Series, card: dict[str, Any]) -> Iterator[str]:
    """Say what in a row of predictions.csv does not follow from its probabilities and the card."""
    p = {name: float(row[f"p_{name}"]) for name in card["classes"]}
    if not all(0 <= value <= 1 for value in p.values()):
        yield f"a probability is not from 0 to 1: {p}"
    elif card["task"] != "multilabel" and abs(sum(p.values()) - 1) > ONE:
        yield f"the probabilities add up to {sum(p.values()):.6f} instead of 1: {p}"
    call = decide(p, card)
    if call["label"] != row["predicted"]:
        yield f"predicted is {row['predicted']!r}, but {call['label']!r} from the probabilities"
    if call["probability"] != float(row["probability"]):
        yield f"probability is {row['probability']}, but {call['probability']} from the p_ columns"


def numbers_in(content: Any) -> Iterator[float]:
    """Yield all numbers within JSON content."""
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from numbers_in(value)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield content


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the path, such as metrics.auroc.value, and both values of all that differs in two JSON contents."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*new, *old]):
            deeper = f"{path}.{key}" if path else key
            if key in old and key in new:
                yield from differences(old[key], new[key], deeper)
            else:
                yield deeper, old.get(key, "absent"), new.get(key, "absent")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (ours, theirs) in enumerate(zip(old, new, strict=True)):
            yield from differences(ours, theirs, f"{path}[{i}]")
    elif json.dumps(old) != json.dumps(new):  # as text: NaN equals itself, and 1 is not True
        yield path, old, new


def brief(value: Any) -> str:
    """Return a JSON value for a line of text."""
    return f"a group of {len(value)}" if isinstance(value, dict | list) else str(value)


def last_digits(old: Any, new: Any) -> str:
    """Say of two numbers that are all but equal how that may come about without a wrong."""
    numbers = all(isinstance(value, int | float) for value in (old, new))
    if numbers and abs(old - new) <= ROUNDING * max(abs(old), abs(new)):
        return " (the last digits: edited, or computed on another kind of processor)"
    return ""


# For people ----------------------------------------------------------------------------------------------------------


def show_verification(result: dict[str, Any], console: Console) -> None:
    """Print what was checked, the problems file by file, and what this cannot show."""
    checked, problems = result["checked"], result["problems"]
    gone = f", {checked['films_gone']} gone from the disk" if checked["films_gone"] else ""
    console.say(
        f"{result['run']}: {checked['files']} files are as the manifest says, {checked['numbers']} numbers were "
        f"computed again, {checked['films']} test films were predicted again{gone}"
    )
    for line in checked["notes"]:
        console.say(f"note: {line}")
    for file in dict.fromkeys(problem["file"] for problem in problems):
        details = [problem["detail"] for problem in problems if problem["file"] == file]
        for detail in islice(details, SHOWN):
            console.say(f"PROBLEM {file}: {detail}")
        if len(details) > SHOWN:
            console.say(f"PROBLEM {file}: and {len(details) - SHOWN} more of it; --json lists all")
    if problems:
        console.say(f"{len(problems)} problems: do not rely on this run before they are explained.")
    else:
        console.say("No problem found.")
    console.say(
        f"A run that was changed together with its manifest may pass: compare the manifest's own SHA-256 "
        f"({checked['manifest_sha256']}) with one that was kept elsewhere."
    )
