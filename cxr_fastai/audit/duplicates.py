"""Copies of one film: the same file, or the same exposure after resizing, re-encoding, another tone or a small crop.

In: a `scan.Scan`. Out: pairs of row numbers. Films of one scanner look alike, so that a likeness at a glance (the
nearest neighbours of coarse pictures) makes a candidate only. A candidate is laid over the other film, moved and
stretched until it fits best; only a copy then agrees in the fine structure, which is different in each exposure.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cxr_fastai.config import usable_cores

if TYPE_CHECKING:
    from cxr_fastai.audit.scan import Scan

NEIGHBOURS = 20
ALIKE = 0.4  # least cosine of the coarse pictures of a candidate
COARSE, FINE = 3.0, 1.5  # width in pixels of 64 below which structure is coarse, and above which it is fine
MARGIN = 8  # pixels of 64 at each side that may have been cropped, and so are not compared
SAME = 0.90  # least correlation of the fine structure after fitting; `bench/audit.py` prints both sides of it
PROMISING = 0.6  # least correlation before fitting
STRETCHES = (-0.11, -0.055, 0.0, 0.055, 0.11)
SIZES = tuple((sy, sx) for sy in STRETCHES for sx in STRETCHES)
BLOCK = 1024


@dataclass(frozen=True)
class Duplicate:
    """Two films, by row number, that are one. kind: exact (the same file) or near. similarity: at most 1."""

    first: int
    second: int
    kind: str
    similarity: float


def find_duplicates(scan: "Scan", advance: Callable[[], None] = lambda: None) -> list[Duplicate]:
    """Find pairs of films that are one exposure; of more than two equal files, each with the first.

    Parameters
    ----------
    scan
        Of the films.
    advance
        Called once a film.
    """
    found: list[Duplicate] = []
    first_of: dict[str, int] = {}
    for row, identity in enumerate(scan.sha256):
        if identity and (first := first_of.setdefault(identity, row)) != row:
            found.append(Duplicate(first, row, "exact", 1.0))
    one_each = np.sort(np.fromiter(first_of.values(), np.int64))
    one_each = one_each[np.isfinite(scan.thumbnails[one_each]).all(axis=(1, 2))]
    thumbnails = scan.thumbnails[one_each]
    fine = _fine(thumbnails)
    windows = [_middle(film) for film in fine]
    spectra = np.stack([_spectrum(window) for window in windows]) if len(fine) else np.empty(0)

    def compare(a: int, others: np.ndarray) -> list[Duplicate]:
        near = []
        for b, place in zip(others, _first_fits(fine[a], spectra[others]) if len(others) else [], strict=True):
            if place is not None and (similarity := _fitted(fine[a], windows[b], place)) >= SAME:
                first, second = sorted((int(one_each[a]), int(one_each[b])))
                near.append(Duplicate(first, second, "near", round(similarity, 3)))
        advance()
        return near

    with ThreadPoolExecutor(usable_cores()) as pool:  # scipy lets others run while it works
        for near in pool.map(compare, range(len(fine)), _candidates(thumbnails)):
            found += near
    return sorted(found, key=lambda pair: (pair.first, pair.second))


def _candidates(thumbnails: np.ndarray) -> Iterator[np.ndarray]:
    """Yield for each film the later ones that look like it: either is among the nearest of the other."""
    coarse = _coarse(thumbnails)
    near: list[set[int]] = [set() for _ in coarse]
    for start in range(0, len(coarse), BLOCK):
        likeness = coarse[start : start + BLOCK] @ coarse.T
        likeness[np.arange(len(likeness)), start + np.arange(len(likeness))] = -1
        nearest = np.argsort(-likeness, axis=1)[:, :NEIGHBOURS]
        for row, others in enumerate(nearest):
            for other in others[likeness[row, others] >= ALIKE]:
                near[min(start + row, int(other))].add(max(start + row, int(other)))
    yield from (np.array(sorted(others), dtype=int) for others in near)


def _coarse(thumbnails: np.ndarray) -> np.ndarray:
    """Return a unit vector a film: its middle, flat in tone, blurred so that a small crop moves it little."""
    from scipy.ndimage import gaussian_filter

    flat = _ranked(thumbnails)
    band = gaussian_filter(flat, (0, COARSE, COARSE)) - gaussian_filter(flat, (0, 4 * COARSE, 4 * COARSE))
    vectors = band[:, 4:-4:3, 4:-4:3].reshape(len(flat), -1)
    vectors = vectors - vectors.mean(axis=0)  # what all films share says nothing
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)).astype(np.float32)


def _ranked(thumbnails: np.ndarray) -> np.ndarray:
    """Return films with their pixels replaced by their rank in [0, 1]: no tone curve makes a difference."""
    flat = thumbnails.reshape(len(thumbnails), -1)
    order = np.argsort(np.argsort(flat, axis=1, kind="stable"), axis=1)
    return (order / max(1, flat.shape[1] - 1)).astype(np.float32).reshape(thumbnails.shape)


def _fine(thumbnails: np.ndarray) -> np.ndarray:
    """Return the fine structure of films, of equal strength all over, so that a bright marker does not decide."""
    from scipy.ndimage import gaussian_filter

    flat = _ranked(thumbnails)
    high = flat - gaussian_filter(flat, (0, FINE, FINE))
    strength = np.sqrt(gaussian_filter(high**2, (0, 4 * FINE, 4 * FINE)))
    return high / (strength + 0.01)


def _middle(fine: np.ndarray) -> np.ndarray:
    """Return the part of a film that a crop does not lose, as a unit vector in the place where it was."""
    window = np.zeros_like(fine)
    inner = fine[MARGIN:-MARGIN, MARGIN:-MARGIN]
    inner = inner - inner.mean()
    window[MARGIN:-MARGIN, MARGIN:-MARGIN] = inner / max(float(np.linalg.norm(inner)), 1e-9)
    return window


def _spectrum(film: np.ndarray) -> np.ndarray:
    from scipy.fft import rfft2

    return rfft2(film)


def _first_fits(fine: np.ndarray, spectra: np.ndarray) -> list[np.ndarray | None]:
    """Say where one film fits each of m others best, (dy, dx, sy, sx), among a few sizes and all places; None: nowhere.

    All places at once are the correlation theorem's; `spectra` (m, 64, 33) are those of the others' middles.
    """
    from scipy.fft import irfft2

    side, reach = len(fine), 2 * MARGIN // 3
    inner = np.linalg.norm(fine) * (1 - 2 * MARGIN / side)  # of a middle, as fine structure is equally strong all over
    near = np.r_[0 : reach + 1, -reach:0]
    scores = []
    for sizes in SIZES:
        moved = _spectrum(_moved(fine, np.array([0.0, 0.0, *sizes])))
        scores.append(irfft2(moved * spectra.conj(), s=fine.shape)[:, near][:, :, near] / inner)
    every = np.stack(scores, axis=1)  # (m, sizes, places, places)
    fits: list[np.ndarray | None] = []
    for score in every:
        size, down, right = np.unravel_index(int(score.argmax()), score.shape)
        place = np.array([-near[down], -near[right], *SIZES[size]], dtype=float)
        fits.append(place if score[size, down, right] >= PROMISING else None)
    return fits


def _fitted(fine: np.ndarray, window: np.ndarray, start: np.ndarray) -> float:
    """Return the correlation of a film with the middle of another, where moving and stretching it fits best."""
    from scipy.optimize import minimize

    inner = window[MARGIN:-MARGIN, MARGIN:-MARGIN]

    def misfit(place: np.ndarray) -> float:
        part = _moved(fine, place)[MARGIN:-MARGIN, MARGIN:-MARGIN]
        part = part - part.mean()
        return -float((inner * part).sum()) / max(float(np.linalg.norm(part)), 1e-9)

    simplex = start + np.vstack([np.zeros(4), np.diag([1.0, 1.0, 0.03, 0.03])])
    options = {"xatol": 0.02, "fatol": 1e-3, "maxfev": 200, "initial_simplex": simplex}
    return -float(minimize(misfit, start, method="Nelder-Mead", options=options).fun)


def _moved(film: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Return a film moved by (dy, dx) pixels, after it was stretched by (1 + sy, 1 + sx) about its middle."""
    from scipy.ndimage import affine_transform

    scale = 1 / (1 + place[2:])
    middle = (np.array(film.shape) - 1) / 2
    return affine_transform(film, scale, middle - scale * (middle + place[:2]), order=1, mode="nearest")
