"""Which labels are likely wrong: what a classifier that never saw a film's label makes of it, against that label.

In: a table, and what a trained network sees in its films. Out: all films, the most doubtful label first.

    features = features_of(table, Predictor("exports/latest"))
    for issue in label_issues(table, features)[:20]: print(issue.path, issue.label, issue.suggested, issue.quality)

Confident learning (Northcutt et al., JAIR 2021; Thyagarajan et al., arXiv 2211.13895 for several findings a film): the
probabilities are out of fold, patient-grouped, from a logistic regression on the features. The network's own would not
do, since it may have learned the wrong labels by heart.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cxr_fastai.audit.shortcuts import FOLDS, patient_folds
from cxr_fastai.errors import DataError, UnreadableImage
from cxr_fastai.images import read_radiograph, to_input
from cxr_fastai.table import targets_of

if TYPE_CHECKING:
    from cxr_fastai.predict import Predictor

BATCH = 16
SIZE = 160  # what the body of a weights file is fed; half the time of 224, and nearly as sure (bench/label_errors.py)
COMPONENTS = 100  # of the features; what is beyond them is noise to a thousand films
PENALTY = 0.01  # C of the logistic regression: strong, so that a few wrong labels do not bend it

# How the qualities of a film's findings become one. With cleanlab's own choice, a moving average, fewer than half as
# many planted errors came first (`bench/label_errors.py --task multilabel`).
TOGETHER = {"method": "softmin", "temperature": 0.1}


@dataclass(frozen=True)
class LabelIssue:
    """One film's label, how far it can be believed, and what the film looks like.

    suggested: equals `label` where nothing else is likelier. quality: 0 surely wrong, 1 surely right (cleanlab's label
    quality score: the probability of the label given; multi-label: mostly that of the least likely of what the label
    says of each finding).
    """

    path: str
    label: str
    suggested: str
    quality: float


def label_issues(
    table: pd.DataFrame, features: np.ndarray, seed: int = 0, advance: Callable[[], None] = lambda: None
) -> list[LabelIssue]:
    """Rank all films by how doubtful their label is, worst first.

    Parameters
    ----------
    table
        With `attrs` as `table.load_table` gives them.
    features
        (n, f), from `features_of` or `features_of_weights`; a film with a row of NaN is left out.
    seed
        Of the folds.
    advance
        Called `shortcuts.FOLDS` times.

    Raises
    ------
    DataError
        If there are too few films or patients to hold any out.
    """
    seen = np.isfinite(features).all(1)
    part = table[seen]
    part.attrs = table.attrs
    return rank_labels(part, out_of_fold(part, features[seen], seed, advance))


def out_of_fold(
    table: pd.DataFrame, features: np.ndarray, seed: int = 0, advance: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Return the probability (n, k) of each class of each film from models that never saw a film of its patient.

    Multi-class: rows sum to one. Multi-label: one model a finding, from the films of which it is known.

    Raises
    ------
    DataError
        If there are too few films or patients to hold any out.
    """
    y = _known(table)
    folds = patient_folds(np.nan_to_num(y) > 0.5, table["patient_id"].to_numpy(dtype=str), seed)
    if folds is None:
        raise DataError(f"{len(table)} films are too few to look for wrong labels; {2 * FOLDS} patients are needed")
    result = np.zeros_like(y)
    for fold in range(FOLDS):
        test = folds == fold
        if table.attrs["task"] == "multilabel":
            for k, column in enumerate(y.T):
                train = ~test & np.isfinite(column)
                result[test, k] = _fit(features[train], column[train].astype(int), features[test], 2)[:, 1]
        else:
            result[test] = _fit(features[~test], y[~test].argmax(1), features[test], y.shape[1])
        advance()
    return result


def rank_labels(table: pd.DataFrame, probabilities: np.ndarray) -> list[LabelIssue]:
    """Rank films by cleanlab's label quality, worst first.

    Parameters
    ----------
    table
        With `attrs` as `table.load_table` gives them.
    probabilities
        (n, k) in the order of the table's classes, out of fold.
    """
    from cleanlab import multilabel_classification
    from cleanlab.rank import get_label_quality_scores

    y, classes = _known(table), np.array(table.attrs["classes"], dtype=object)
    if table.attrs["task"] == "multilabel":
        called = probabilities >= 0.5
        # A finding of which nothing is known cannot be wrong: it counts as what the film looks like.
        given = [np.flatnonzero(row).tolist() for row in np.where(np.isfinite(y), y > 0.5, called)]
        quality = multilabel_classification.get_label_quality_scores(given, probabilities, aggregator_kwargs=TOGETHER)
        suggested = ["|".join(classes[row]) for row in called]
    else:
        quality = get_label_quality_scores(y.argmax(1), probabilities)
        suggested = classes[probabilities.argmax(1)].tolist()
    rows = zip(table["path"], table["label"], suggested, map(float, quality), strict=True)
    return sorted((LabelIssue(*row) for row in rows), key=lambda issue: issue.quality)


def features_of(table: pd.DataFrame, predictor: "Predictor", advance: Callable[[], None] = lambda: None) -> np.ndarray:
    """Return what a trained model sees in each film: the `features` of its model.onnx, (n, f) float32. No torch.

    Parameters
    ----------
    table
        Its column ``path`` is read.
    predictor
        Of the model.
    advance
        Called once a film.

    Returns
    -------
    numpy.ndarray
        NaN in the rows of films that cannot be read.
    """
    return _in_batches(table, predictor.card["size"], lambda films: predictor.run(films)["features"], advance)


def features_of_weights(
    table: pd.DataFrame, weights: str | Path, advance: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Return what the DenseNet121 body of a weights file sees in each film, (n, 1024) float32, as `features_of` does.

    Parameters
    ----------
    table
        Its column ``path`` is read.
    weights
        As `model.load_weights` takes it: a file, or "phantom" for the weights shipped.
    advance
        Called once a film.

    Raises
    ------
    UsageError, ModelFileError
        If the weights cannot be had, or do not fit.
    """
    import torch

    from cxr_fastai.model import cpu_multiplies_bf16, features_of_batch, load_weights, make_body

    body = make_body("densenet121")[0].eval().to(memory_format=torch.channels_last)
    load_weights(body, "densenet121", str(weights))
    precision = torch.bfloat16 if cpu_multiplies_bf16() else None

    def run(films: np.ndarray) -> np.ndarray:
        return features_of_batch(body, torch.from_numpy(films)[:, None], precision)

    return _in_batches(table, SIZE, run, advance)


def _in_batches(
    table: pd.DataFrame, size: int, run: Callable[[np.ndarray], np.ndarray], advance: Callable[[], None]
) -> np.ndarray:
    """Read the films of a table and run them in batches; (n, f), NaN where one cannot be read."""
    paths = table["path"].tolist()
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(paths), BATCH):
        films = {}
        for row in range(start, min(start + BATCH, len(paths))):
            with contextlib.suppress(UnreadableImage):
                films[row] = to_input(read_radiograph(paths[row]), size)
            advance()
        if films:
            found |= dict(zip(films, run(np.stack(list(films.values()))), strict=True))
    width = len(next(iter(found.values()))) if found else 1
    result = np.full((len(paths), width), np.nan, np.float32)
    for row, values in found.items():
        result[row] = values
    return result


def _known(table: pd.DataFrame) -> np.ndarray:
    """Return the labels as float64 (n, k): 1, 0, or (multi-label) NaN where nothing is known."""
    return targets_of(table, table.attrs["classes"])


def _fit(train: np.ndarray, y: np.ndarray, test: np.ndarray, k: int) -> np.ndarray:
    """Return the probabilities (m, k) of test features from a logistic regression on the training films."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    result = np.zeros((len(test), k))
    present = np.unique(y)
    if len(present) < 2:
        result[:, present] = 1
        return result
    components = min(COMPONENTS, *train.shape)
    model = make_pipeline(
        StandardScaler(),
        PCA(components, random_state=0),
        LogisticRegression(C=PENALTY, max_iter=2000),
    ).fit(train, y)
    result[:, present] = model.predict_proba(test)
    return result
