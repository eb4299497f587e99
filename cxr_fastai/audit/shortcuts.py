"""What gives the label away without anatomy: each probe is a classifier that sees only what should not matter.

In: a `scan.Scan` (thumbnails, borders, histograms and file properties of the films of a table). Out: one `Probe` for
the border, the edges and corners (where markers stand), the grey levels, the dimensions, the size and the format of the
files, each column of the table that may confound (view, age, sex, source ...), and the whole film at 32x32. That last
one holds anatomy, too, and is a shortcut only where so little of it explains far too much.

    for found in probe(scan(table)): print(found.name, found.auroc, found.p, found.detail)

Each classifier is graded in patient-grouped cross-validation, and its AUROC against those of the same classifier on
labels dealt to other patients. All of it is linear in the labels, so 1,000 permutations are a few matrix products.
Shortcuts of this kind: Zech et al., PLOS Med 2018; DeGrave et al., Nat Mach Intell 2021.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cxr_fastai.audit.sights import COLUMNS, Sight, sights
from cxr_fastai.table import positive_class

if TYPE_CHECKING:
    from cxr_fastai.audit.scan import Scan

PERMUTATIONS, FIRST_LOOK = 1000, 100  # labels dealt anew; after the first look, only where something may be found
SIGNIFICANT = 0.05  # of p after Holm's correction
MAX_FILMS = 3000  # probed, whole patients drawn at random; more films make nothing clearer
MIN_FILMS = 10  # of a class, and without it, for a verdict on it
FOLDS = 5
RIDGE = 0.1  # penalty, as a share of the mean variance of the features
ANY = ("films with findings", "films without")
SUBTLE = 0.8  # what a fact that is hard to picture counts, when the one to name is chosen
SAYS_NOTHING = "says nothing about the label"


@dataclass(frozen=True)
class Probe:
    """What one kind of knowledge without anatomy tells of the label.

    auroc: mean over the folds. Binary: of the positive class; multi-class: the mean over the classes; multi-label: of
    any finding; unless one class or finding stands out more, of which it is then. p: from permutations of the labels
    over patients, after Holm's correction for the number of probes. flagged: whether it is a shortcut, both significant
    and material. detail: where or what, in words. n: films.
    """

    name: str
    auroc: float
    p: float
    flagged: bool
    detail: str
    n: int


@dataclass(frozen=True)
class _Targets:
    """Labels as columns y (n, k) bool: the overall question is the first one, or (`macro`) the mean over all."""

    names: list[tuple[str, str]]  # of those with it, and without it
    y: np.ndarray
    macro: bool


def probe(scan: "Scan", seed: int = 0, advance: Callable[[], None] = lambda: None) -> list[Probe]:
    """Ask what gives the label away without anatomy.

    Parameters
    ----------
    scan
        Of a table with `attrs` as `table.load_table` gives them. Films that could not be read are left out.
    seed
        Of the folds, the permutations, and the choice of films where there are more than `MAX_FILMS`.
    advance
        Called `count_probes(scan)` times.

    Returns
    -------
    list of Probe
        In a fixed order, the thumbnail last; those that see the same in every film are left out. Empty where no class
        has `MIN_FILMS` films with and without it, or where there are fewer than two patients a fold.
    """
    rng = np.random.default_rng(seed)
    rows = _choose(scan, rng)
    table = scan.table.iloc[rows]
    targets, groups = _targets(table), table["patient_id"].to_numpy(dtype=str)
    folds = patient_folds(targets.y, groups, seed) if targets.y.size else None
    if folds is None:
        return []
    shuffles = _shuffles(groups, rng)
    seen = [sight for sight in sights(scan, rows) if np.ptp(sight.features, axis=0).any()]
    asked = []
    for sight in seen:
        asked.append(_ask(sight, targets, folds, shuffles))
        advance()
    corrected = holm(np.array([p for _, p, _ in asked]))
    return [
        _verdict(sight, targets, auroc, float(p), which)
        for sight, (auroc, _, which), p in zip(seen, asked, corrected, strict=True)
    ]


def count_probes(scan: "Scan") -> int:
    """Return how many probes `probe` asks at most, for a progress bar."""
    return 7 + sum(column in scan.table for column in COLUMNS)


def holm(p: np.ndarray) -> np.ndarray:
    """Correct p values (k,) for their number (Holm, Scand J Stat 1979)."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    result = np.empty(len(p))
    result[order] = np.minimum(stepped, 1)
    return result


# Labels --------------------------------------------------------------------------------------------------------------


def _choose(scan: "Scan", rng: np.random.Generator) -> np.ndarray:
    """Return the rows to probe: readable films, whole patients up to MAX_FILMS."""
    readable = np.flatnonzero(np.isfinite(scan.thumbnails).all(axis=(1, 2)))
    if len(readable) <= MAX_FILMS:
        return readable
    patients, of = np.unique(scan.table["patient_id"].to_numpy(dtype=str)[readable], return_inverse=True)
    order = rng.permutation(len(patients))
    within = np.cumsum(np.bincount(of, minlength=len(patients))[order]) <= MAX_FILMS
    return readable[np.isin(of, order[within])]


def _targets(table: pd.DataFrame) -> _Targets:
    """Make columns of the labels; classes with fewer than MIN_FILMS films, or films without them, are left out.

    In a multi-label table, a finding that is not named counts as not there, and the overall question is any at all,
    where there are films without.
    """
    task, labels = table.attrs["task"], table["label"].to_numpy(dtype=str)
    classes = table.attrs["classes"]
    if task == "binary" and len(classes) == 2:
        positive = positive_class(classes)
        negative = next(c for c in classes if c != positive)
        y = (labels == positive)[:, None]
        enough = MIN_FILMS <= y.sum() <= len(y) - MIN_FILMS
        return _Targets([(positive, negative)], y if enough else y[:, :0], macro=False)
    columns = {(c, "the others"): np.array([c in label.split("|") for label in labels], bool) for c in classes}
    if task == "multilabel":
        columns = {ANY: labels != "", **columns}
    kept = {c: y for c, y in columns.items() if MIN_FILMS <= y.sum() <= len(y) - MIN_FILMS}
    y = np.column_stack(list(kept.values())) if kept else np.zeros((len(labels), 0), bool)
    return _Targets(list(kept), y, macro=task == "multiclass" or ANY not in kept)


def patient_folds(y: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray | None:
    """Deal whole patients to `FOLDS` folds, alike in their labels.

    Parameters
    ----------
    y
        (n, k) bool, a column a class; a film with several counts for its rarest.
    groups
        (n,) patient ids.
    seed
        Of the dealing.

    Returns
    -------
    numpy.ndarray or None
        (n,) of int from 0; None where there are fewer than two patients a fold, or only one class.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    if len(np.unique(groups)) < 2 * FOLDS or not (y.any(0) & ~y.all(0)).any():
        return None
    stratum = np.full(len(groups), -1)
    for column in np.argsort(-y.sum(0), kind="stable"):
        if y[:, column].sum() >= FOLDS:
            stratum[y[:, column]] = column
    fold = np.zeros(len(groups), dtype=int)
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a class with fewer films than folds
        for number, (_, test) in enumerate(splitter.split(groups, stratum, groups)):
            fold[test] = number
    return fold


def _shuffles(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Deal labels to other patients: (PERMUTATIONS, n) of int, the row whose label each film gets.

    The patients are put into a random order with their films, and this row of labels is laid over the films as they
    stand by patient. So labels of one patient stay together, and those of patients with one film each are permuted.
    """
    place = np.argsort(groups, kind="stable")
    patients, start, count = np.unique(groups[place], return_index=True, return_counts=True)
    dealt = np.empty((PERMUTATIONS, len(groups)), dtype=np.int64)
    for row in dealt:
        order = rng.permutation(len(patients))
        ends = np.cumsum(count[order])
        offset = np.repeat(start[order] - (ends - count[order]), count[order])
        row[place] = place[np.arange(len(groups)) + offset]
    return dealt


# Classifiers ---------------------------------------------------------------------------------------------------------


def _ask(sight: Sight, targets: _Targets, folds: np.ndarray, shuffles: np.ndarray) -> tuple[float, float, int]:
    """Return AUROC, p, and which target it is about; -1 is the mean over all.

    The target is the one that stands out most from its permutations (of several, the one told best), and p allows
    for that choice (Westfall and Young's maximum).
    """
    grade = _best_column if sight.best else _ridge
    solved = [grade(sight.features, folds == k) for k in range(FOLDS)]

    def aurocs(y: np.ndarray) -> np.ndarray:
        """Mean AUROC over the folds of label columns (n, B)."""
        per_fold = np.stack([_auroc(score(y[folds != k]), y[folds == k]) for k, score in enumerate(solved)])
        return np.nanmean(per_fold, axis=0)

    seen = _with_mean(aurocs(targets.y), targets)
    dealt: list[np.ndarray] = []
    for part in (shuffles[:FIRST_LOOK], shuffles[FIRST_LOOK:]):
        columns = [aurocs(column[part].T) for column in targets.y.T]
        dealt = [*dealt, *(_with_mean(row, targets) for row in np.column_stack(columns))]
        null = np.array(dealt)
        centre, spread = null.mean(0), np.maximum(null.std(0), 1e-6)
        if sight.anatomy:
            seen, null, centre, spread = seen[:1], null[:, :1], centre[:1], spread[:1]
        z, z_null = (seen - centre) / spread, ((null - centre) / spread).max(1)
        p = (1 + (z_null[:, None] >= z).sum(0)) / (1 + len(null))
        if p.min() > 0.2:
            break
    which = int(np.where(p == p.min(), seen, -np.inf).argmax())
    return float(seen[which]), float(p.min()), which - targets.macro


def _with_mean(aurocs: np.ndarray, targets: _Targets) -> np.ndarray:
    """Put the macro average before the classes where it is the overall question."""
    return np.concatenate([[aurocs.mean()], aurocs]) if targets.macro else aurocs


def _ridge(features: np.ndarray, test: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return what makes scores of the test films (m, B) from labels of the training films (n - m, B)."""
    centred = features - features[~test].mean(0)
    train, penalty = centred[~test], RIDGE * np.square(centred[~test]).sum(0).mean() + 1e-9
    solved = np.linalg.solve(train.T @ train + penalty * np.eye(train.shape[1]), train.T)
    # Rounded, so that films that are alike stay so: rounding errors must not order them.
    return lambda y: np.round(centred[test] @ (solved @ (y - y.mean(0))), 6)


def _best_column(features: np.ndarray, test: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return what makes scores of the test films (m, B): the column that tells the training labels best alone."""
    from scipy.stats import rankdata

    ranks = rankdata(features[~test], axis=0)
    ranks = (ranks - ranks.mean(0)) / len(ranks)
    held = features[test]

    def score(y: np.ndarray) -> np.ndarray:
        strength = ranks.T @ y.astype(float)  # the rank sum: linear in the AUROC of each column
        best = np.abs(strength).argmax(0)
        return held[:, best] * np.sign(np.take_along_axis(strength, best[None], 0))

    return score


def _auroc(scores: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the AUROC of each column of scores (m, B) against labels (m, B) bool; NaN where there is one class."""
    from scipy.stats import rankdata

    ones = y.sum(0)
    pairs = np.where((ones == 0) | (ones == len(y)), np.nan, ones * (len(y) - ones))
    return ((rankdata(scores, axis=0) * y).sum(0) - ones * (ones + 1) / 2) / pairs


# Verdicts ------------------------------------------------------------------------------------------------------------


def _verdict(sight: Sight, targets: _Targets, auroc: float, p: float, which: int) -> Probe:
    flagged = bool(p < SIGNIFICANT and auroc >= sight.material)
    detail = _detail(sight, targets, which) if p < SIGNIFICANT else SAYS_NOTHING
    return Probe(sight.name, auroc, p, flagged, detail, len(targets.y))


def _detail(sight: Sight, targets: _Targets, which: int) -> str:
    """Name the single fact that tells the target best, with its values on both sides."""
    facts = {**sight.words, **sight.numbers, **sight.subtle}
    asked = range(targets.y.shape[1]) if which < 0 else [which]
    told = {(name, k): _strength(facts[name], targets.y[:, k]) for name in facts for k in asked}
    told |= {(name, k): SUBTLE * told[name, k] for name in sight.subtle for k in asked}
    # Of words that tell as much, one that stands for the class rather than against it
    name, which = max(told, key=lambda fact: (round(abs(told[fact]), 6), told[fact]))
    y, (these, others), value = targets.y[:, which], targets.names[which], facts[name]
    if name in sight.words:
        return f"{name}: {100 * value[y].mean():.0f} % of {these}, {100 * value[~y].mean():.0f} % of {others}"
    middle = np.nanmedian if np.nanmedian(value[y]) != np.nanmedian(value[~y]) else np.nanmean
    return f"{name}: {middle(value[y]):.3g} in {these}, {middle(value[~y]):.3g} in {others}"


def _strength(fact: np.ndarray, y: np.ndarray) -> float:
    """Return the AUROC of a fact (n,) alone, less one half; 0 where one class has no known value."""
    known = ~pd.isna(fact)
    auroc = _auroc(fact[known].astype(float)[:, None], y[known][:, None])[0]
    return 0.0 if np.isnan(auroc) else float(auroc - 0.5)
