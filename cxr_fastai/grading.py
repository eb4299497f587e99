"""Does the evidence lie where the finding is? Evidence maps graded against masks, and against random networks.

In: a Predictor and labelled films of a folder with masks (``DATA/masks/<film>__<finding>.png``, as `generate` writes
them). Out: a row for each finding of each film (evidence.csv), and their means with intervals over patients
(evidence.json). Other data have no masks and are not graded.

Which map is graded: that of the class named as the finding; where there is none, as with normal and abnormal, that of
the positive class, against each finding and against all findings of the film together (`ANY`). It is the map that users
are shown (`Predictor.evidence_shown`), made as large as the mask in the same way. The reader squeezes the whole film
into a square without cropping or padding, so a place in the film is the same share of height and width in the map.

    hit     pointing game (Zhang et al., IJCV 2018): the map's maximum is in the mask, or at most half a place of the
            map away from it (`TOLERANCE`; 16 of 224 pixels for maps of 7 x 7, Zhang's has 15). Without any, maps as
            coarse as these could not hit a nodule even if they were perfect
    reach   share of the film where a maximum would be a hit: how often a map that knows nothing hits
    share   of the positive evidence, how much lies in the mask
    area    share of the film that the mask covers: the share of a map that knows nothing. Large for findings that are
            everywhere, such as Edema: read hit beside reach, and share beside area

Sanity check (Adebayo et al., NeurIPS 2018): the same is asked of the same network with the weights of each layer in
random order. An explanation that does not change shows the film and not what was learned. One random network may look
like the true one by chance (correlations of -0.3 to 0.2 were seen), so there are `DRAWS`, which take the films in turn.
"""

import copy
import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from cxr_fastai.config import usable_cores
from cxr_fastai.console import QUIET, Console
from cxr_fastai.engine import OnnxRuntime
from cxr_fastai.errors import DataError
from cxr_fastai.images import to_input
from cxr_fastai.metrics import interval, patient_bootstrap
from cxr_fastai.predict import Prediction, Predictor, class_map
from cxr_fastai.runs import read_cells, safe_cell, write_text

ANY = "any finding"
COLUMNS = (
    "path", "patient_id", "finding", "class", "hit", "reach", "share", "area", "random_hit", "random_share",
    "rank_correlation",
)  # fmt: skip
NUMBERS = COLUMNS[4:]
TOLERANCE = 0.5  # places of the map
DRAWS = 8  # random networks; each takes half a second to make
TOGETHER = 128  # films that are read and held at a time
LEVELS = 3  # folders above a film in which `masks` is looked for: DATA/images/abnormal/x.png


# Masks ---------------------------------------------------------------------------------------------------------------


def list_masks(folder: Path) -> dict[str, dict[str, Path]]:
    """Return the mask files of a folder by film (file name without its ending) and finding; none where it is absent."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.glob("*__*.png")):
        film, _, finding = path.stem.rpartition("__")
        found.setdefault(film, {})[finding] = path
    return found


def masks_of(
    path: str | Path, listed: Callable[[Path], dict[str, dict[str, Path]]] = list_masks
) -> dict[str, np.ndarray]:
    """Return the masks of one film, finding -> (H, W) bool, from the nearest folder ``masks`` above it.

    Raises
    ------
    DataError
        Where a mask cannot be read, or the masks of the film differ in size.
    """
    for folder in list(Path(path).parents)[:LEVELS]:
        if files := listed(folder / "masks").get(Path(path).stem):
            masks = {finding: _read_mask(file) for finding, file in files.items()}
            if len(shapes := {mask.shape for mask in masks.values()}) > 1:
                raise DataError(
                    f"masks of {path} differ in size: {', '.join(map(str, sorted(shapes)))}; make them alike"
                )
            return masks
    return {}


def _read_mask(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return np.asarray(image.convert("L")) > 127
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"mask {path} cannot be read ({type(error).__name__}); generate the films again") from error


# One map -------------------------------------------------------------------------------------------------------------


def upsampled(evidence: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a map (h, w) at the size of a film (H, W), bicubic as `predict.overlay` draws it; float32."""
    small = Image.fromarray(evidence.astype(np.float32))
    return np.asarray(small.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def within_reach(mask: np.ndarray, places: tuple[int, ...]) -> np.ndarray:
    """Return where a maximum of a map of `places` (h, w) counts as a hit, (H, W) bool: in a mask (H, W) or near it."""
    from scipy.ndimage import distance_transform_edt

    pixel = [map_side / film_side for map_side, film_side in zip(places, mask.shape, strict=True)]
    return distance_transform_edt(~mask, sampling=pixel) <= TOLERANCE


def grade_map(evidence: np.ndarray, mask: np.ndarray, near: np.ndarray) -> tuple[float, float]:
    """Return hit (1 or 0) and share (0 to 1) of a map (h, w).

    NaN where they are not defined: a map that is the same everywhere (or not finite) points nowhere, and one that is
    positive nowhere has no positive evidence.

    Parameters
    ----------
    mask, near
        (H, W) bool: where the finding is, and where a maximum is a hit (`within_reach`).
    """
    if not np.isfinite(evidence).all():
        return np.nan, np.nan
    # Scaled before float32: weights in random order may make it very large.
    shown = upsampled(evidence / (np.abs(evidence).max() or 1), mask.shape).astype(float)
    positive = np.clip(shown, 0, None)
    hit = float(near.flat[shown.argmax()]) if np.ptp(evidence) > 0 else np.nan
    return hit, float(positive[mask].sum() / positive.sum()) if positive.any() else np.nan


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's correlation of two maps (h, w), -1 to 1; NaN where one is the same everywhere."""
    from scipy.stats import spearmanr

    if not (np.isfinite(a).all() and np.isfinite(b).all() and np.ptp(a) > 0 and np.ptp(b) > 0):
        return np.nan
    return float(spearmanr(a.ravel(), b.ravel()).statistic)


def randomised(predictor: Predictor, seed: int = 0) -> Predictor:
    """Return a Predictor of the same network whose weights, within each tensor, are in random order."""
    import onnx

    model, rng = onnx.load(predictor.path), np.random.default_rng(seed)
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if np.issubdtype(values.dtype, np.floating):
            shuffled = rng.permutation(values.ravel()).reshape(values.shape)
            tensor.CopyFrom(onnx.numpy_helper.from_array(shuffled, tensor.name))
    other = copy.copy(predictor)
    other.engines = [OnnxRuntime(model.SerializeToString(), usable_cores())]
    return other


def evidence_of(predictors: Callable[[int], Predictor], rows: Sequence[Prediction], first: int) -> list[np.ndarray]:
    """Return the evidence (K, h, w) for films that were read before, each from one of `DRAWS` networks in turn.

    Parameters
    ----------
    predictors
        From a number below `DRAWS` to a network. first: the number of the first film's, beyond `DRAWS` from 0 again.
    """
    found: dict[int, np.ndarray] = {}
    for draw in range(min(DRAWS, len(rows))):
        network, films = predictors((first + draw) % DRAWS), rows[draw::DRAWS]
        size = network.card["size"]
        inputs = np.stack([to_input(row.pixels, size) for row in films if row.pixels is not None])
        found.update(zip(range(draw, len(rows), DRAWS), network.run(inputs)["evidence"], strict=True))
    return [found[number] for number in range(len(rows))]


# All of it -----------------------------------------------------------------------------------------------------------


def graded_masks(masks: dict[str, np.ndarray], card: dict[str, Any]) -> list[tuple[str, str, np.ndarray]]:
    """Return finding, the class whose evidence is graded against it, and its mask; findings without a class are out."""
    pairs = [
        (finding, finding if finding in card["classes"] else card["positive"], mask)
        for finding, mask in masks.items()
        if mask.any()
    ]
    of_positive = [mask for _, name, mask in pairs if name == card["positive"] and name]
    union = [(ANY, card["positive"], np.logical_or.reduce(of_positive))] if of_positive else []
    return [pair for pair in pairs if pair[1]] + union


def grade(predictor: Predictor, table: pd.DataFrame, advance: Callable[[], None] = lambda: None) -> pd.DataFrame:
    """Grade the evidence of every film of a table that has masks and can be read.

    Parameters
    ----------
    table
        With `path` and `patient_id`.
    advance
        Called once a film, graded or not.

    Returns
    -------
    pandas.DataFrame
        evidence.csv: `COLUMNS`, a row for each finding of each film, and for binary tasks one for `ANY`. Without rows
        where no film has a mask.

    Raises
    ------
    DataError
        As `masks_of`.
    """
    rows: list[tuple] = []
    graded = 0
    listed, chance = cache(list_masks), cache(partial(randomised, predictor))
    for start in range(0, len(table), TOGETHER):
        some = table.iloc[start : start + TOGETHER]
        masks = {path: graded_masks(masks_of(path, listed), predictor.card) for path in some["path"]}
        patients = dict(zip(some["path"], some["patient_id"], strict=True))
        wanted = [path for path, findings in masks.items() if findings]
        films = []
        for row in predictor.predict(wanted, keep_pixels=True) if wanted else ():
            if row.error is None:
                films.append(row)
            advance()
        for row, noise in zip(films, evidence_of(chance, films, graded), strict=True):
            for finding, name, mask in masks[row.path]:
                scores = grade_finding(row.evidence, noise, mask, predictor.classes.index(name), predictor.card["task"])
                rows.append((row.path, patients[row.path], finding, name, *scores))
        graded += len(films)
        for _ in range(len(some) - len(wanted)):
            advance()
    return pd.DataFrame(rows, columns=list(COLUMNS))


def grade_finding(
    true: np.ndarray | None, noise: np.ndarray, mask: np.ndarray, k: int, task: str
) -> tuple[float | np.floating, ...]:
    """Return `NUMBERS` of one finding: of the evidence (K, h, w) of class k, and of that of a random network."""
    assert true is not None
    near = within_reach(mask, true.shape[1:])
    ours, theirs = class_map(true, k, task), class_map(noise, k, task)
    (hit, share), random = grade_map(ours, mask, near), grade_map(theirs, mask, near)
    return hit, near.mean(), share, mask.mean(), *random, rank_correlation(ours, theirs)


def summarise(frame: pd.DataFrame) -> dict[str, Any]:
    """Return evidence.json from evidence.csv: means over films, with 95 % intervals over patients.

    Parameters
    ----------
    frame
        As `grade` returns it, or evidence.csv as `runs.read_cells` reads it (text): both give the same numbers.

    Returns
    -------
    dict
        ``findings`` by name, and ``overall``: the rows of `ANY` where there are any, else all. Each with ``n`` (rows),
        ``n_patients``, ``pointing`` and ``share`` as ``{"value", "low", "high", "n"}``, and the means ``reach``,
        ``area``, ``random_pointing`` and ``random_share``. ``sanity``: ``rank_correlation``, the mean of overall's
        rows, and their ``n``. Empty without rows; None where nothing is defined.
    """
    if frame.empty:
        return {}
    numbers = {name: frame[name].replace("", "nan").astype(float) for name in NUMBERS}
    frame = frame.assign(**numbers)
    whole = frame[frame["finding"] == ANY] if (frame["finding"] == ANY).any() else frame
    n, value = int(whole["rank_correlation"].notna().sum()), whole["rank_correlation"].mean()
    return {
        "findings": {str(name): _summary(rows) for name, rows in frame.groupby("finding")},
        "overall": _summary(whole),
        "sanity": {"rank_correlation": float(value) if n else None, "n": n},
    }


def _summary(rows: pd.DataFrame) -> dict[str, Any]:
    chance = {"reach": "reach", "area": "area", "random_pointing": "random_hit", "random_share": "random_share"}
    return {
        "n": len(rows),
        "n_patients": int(rows["patient_id"].nunique()),
        "pointing": _entry(rows["hit"], rows["patient_id"]),
        "share": _entry(rows["share"], rows["patient_id"]),
        **{name: float(rows[column].mean()) if rows[column].notna().any() else None for name, column in chance.items()},
    }


def _entry(values: pd.Series, patients: pd.Series) -> dict[str, Any]:
    """Return the mean of values in [0, 1] with its interval over patients; those that are not defined are left out."""
    known = values.notna()
    y, ids = values[known].to_numpy(), patients[known].to_numpy(dtype=str)
    if not len(y):
        return {"value": None, "low": None, "high": None, "n": 0}
    value, samples = patient_bootstrap(lambda weights: (weights * y).sum(1) / weights.sum(1), ids)
    low, high = (None if np.isnan(bound) else bound for bound in interval(float(value), samples, len(set(ids))))
    return {"value": float(value), "low": low, "high": high, "n": len(y)}


def write_evidence(run: Path, predictor: Predictor, table: pd.DataFrame, console: Console = QUIET) -> dict | None:
    """Grade the evidence of a table; write evidence.csv and evidence.json into a run folder and return the latter.

    None, and no file, where the data have no masks, or masks that cannot be read, of which the console is told: a
    training run of hours does not end at them.
    """
    try:
        with console.progress("Grading evidence", len(table)) as advance:
            frame = grade(predictor, table, advance)
    except DataError as error:
        console.warn("Evidence not graded", str(error))
        return None
    if frame.empty:
        return None
    write_text(run / "evidence.csv", frame.map(safe_cell).to_csv(index=False, lineterminator="\n"))
    found = summarise(read_cells(run / "evidence.csv"))
    write_text(run / "evidence.json", json.dumps(found, indent=1))
    return found
