"""Sets of classes that hold the truth as often as asked: split conformal prediction on validation films.

A film's score is one minus the probability of what is true of it. A new film's set holds each class whose score would
be no larger than a quantile of the validation films' (Vovk et al., Algorithmic Learning in a Random World, 2005;
Sadinle et al., J. Am. Stat. Assoc. 114:223, 2019). It holds the truth with the probability asked for, on average over
films like those of the validation. A set may hold several classes (undecided) or none (unlike any).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

KEPT = 1000  # scores that a card keeps
ABSENT = "no "  # before a finding that is not there


def conformal_scores(truth: np.ndarray, p: np.ndarray, multilabel: bool) -> list[list[float]]:
    """Return the sorted scores that a card keeps: one list, or for multi-label one a finding.

    Parameters
    ----------
    truth
        (n,) class indices; multi-label (n, K) of 0, 1 and NaN (unknown, left out).
    p
        (n, K) calibrated probabilities of films that were not learned from.
    """
    if not multilabel:
        rows = truth.astype(int)
        return [_kept(1 - p[np.arange(len(p)), rows])]
    found = []
    for k in range(p.shape[1]):
        known = (truth[:, k] == 0) | (truth[:, k] == 1)
        found.append(_kept(np.abs(truth[known, k] - p[known, k])))
    return found


def _kept(scores: np.ndarray) -> list[float]:
    """Return all scores in order; of many, as many quantiles, each rounded up to a score that was seen."""
    ordered = np.sort(scores)
    if len(ordered) > KEPT:
        ordered = ordered[np.ceil(np.linspace(1, len(ordered), KEPT)).astype(int) - 1]
    return [round(float(score), 7) for score in ordered]


def cut_of(scores: Sequence[float], coverage: float) -> float:
    """Return the largest score that a class in the set may have; infinite where too few films were scored."""
    rank = int(np.ceil((len(scores) + 1) * coverage))
    return float(scores[rank - 1]) if rank <= len(scores) else float("inf")


def listed(held: Any) -> list[str] | None:
    """Return what a set of `prediction_set` holds as one list, None for no set."""
    return [name for names in held.values() for name in names] if isinstance(held, dict) else held


def prediction_set(p: Mapping[str, float], scores: Sequence[Sequence[float]], coverage: float) -> Any:
    """Return the classes that a film's set holds; for multi-label, of each finding it and "no it", whichever hold."""
    if len(scores) == 1 and len(p) > 1:
        cut = cut_of(scores[0], coverage)
        return [name for name, value in p.items() if 1 - value <= cut + 1e-7]
    found = {}
    for (name, value), own in zip(p.items(), scores, strict=True):
        cut = cut_of(own, coverage) + 1e-7
        found[name] = [said for said, score in ((name, 1 - value), (ABSENT + name, value)) if score <= cut]
    return found
