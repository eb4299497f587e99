"""What each probe for shortcuts sees of the films, and the facts by which its answer can be put into words.

In: a `scan.Scan` and the rows to look at. Out: a `Sight` for each probe, numbers only, the label not among them. None
knows of the phantom: a marker, a letter, a token, a collimated edge, another exposure, tone curve, size or quality of
compression all show in one of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from cxr_fastai.audit.scan import Scan

# Least AUROC that counts, since with many films the smallest difference is significant. Pixels and bytes carry some
# anatomy even at the border (a wide heart, an effusion); `bench/shortcuts.py` prints what clean films reach.
MATERIAL = 0.60
MATERIAL_PIXELS = 0.65
MATERIAL_THUMBNAIL = 0.80
COMPONENTS = 100  # of a thumbnail
MIN_FILMS = 10  # with a word in a column, for it to be told apart
MAX_WORDS = 30  # told apart in a column, the commonest ones
COLUMNS = ("view", "age", "sex", "source", "modality", "body_part")
GROUPS = {"dimensions": ("width", "height"), "file size": ("bytes", "bytes_per_pixel")}  # others: the format


@dataclass(frozen=True)
class Sight:
    """What one probe sees of n films: numbers (n, d), how much AUROC is too much, and what to name the reason by.

    anatomy: whether it holds so much of it that single classes may well be told; only the overall question is then
    asked. best: the probe is the best single column, found on the training folds, instead of a ridge regression.
    numbers, words: columns (n,) that a detail may be about, by name. subtle: numbers that are named only where they
    tell clearly more than the others.
    """

    name: str
    features: np.ndarray
    material: float
    best: bool = False
    anatomy: bool = False
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    words: dict[str, np.ndarray] = field(default_factory=dict)
    subtle: dict[str, np.ndarray] = field(default_factory=dict)


# The probes ----------------------------------------------------------------------------------------------------------


def sights(scan: "Scan", rows: np.ndarray) -> Iterator[Sight]:
    """Yield what each probe sees of the films in `rows` (n,) of int, the thumbnail last."""
    films = scan.thumbnails[rows]
    yield Sight("border", _standard(scan.borders[rows]), MATERIAL_PIXELS, numbers=_border_facts(films))
    yield _edges(films)
    yield _grey_levels(films, scan.histograms[rows])
    told = [column for column in COLUMNS if column in scan.table]
    properties = scan.properties.iloc[rows].drop(columns=told, errors="ignore")
    for name, columns in GROUPS.items():
        yield _of_columns(name, properties[list(columns)], MATERIAL_PIXELS if name == "file size" else MATERIAL)
    yield _of_columns("format", properties.drop(columns=[c for group in GROUPS.values() for c in group]), MATERIAL)
    for column in told:
        yield _of_columns(column, scan.table.iloc[rows][[column]], MATERIAL)
    yield _thumbnail(films)


def _standard(features: np.ndarray) -> np.ndarray:
    """Standardise columns (n, d); NaN becomes the mean, and a column that never differs nothing but zeros."""
    features = features.reshape(len(features), -1).astype(float)
    known = np.isfinite(features)
    mean = np.where(known, features, 0).sum(0) / np.maximum(known.sum(0), 1)
    centred = np.where(known, features - mean, 0)
    spread = centred.std(0)
    return np.where(spread > 1e-9, centred / np.maximum(spread, 1e-9), 0)


def _border_facts(films: np.ndarray) -> dict[str, np.ndarray]:
    """Mean grey level of the outermost pixels of each side of thumbnails (n, s, s)."""
    sides = {"upper": films[:, 0], "lower": films[:, -1], "left": films[:, :, 0], "right": films[:, :, -1]}
    return {f"mean grey level of the {name} border": side.mean(1) for name, side in sides.items()}


def _edges(films: np.ndarray) -> Sight:
    """See mean, spread, brightest and darkest point of patches along the edges, where markers and text stand.

    Those of an eighth of a side lie in the outermost fifth of the film, those of a quarter in its corners.
    """
    side = films.shape[1]
    step = side // 16
    facts = {}
    for size, reach in ((4 * step, 0), (2 * step, step)):
        ends = side - size
        for y, x in ((y, x) for y in range(0, ends + 1, step) for x in range(0, ends + 1, step)):
            at_y, at_x = min(y, ends - y) <= reach, min(x, ends - x) <= reach
            if not (at_y or at_x) or (size == 4 * step and not (at_y and at_x)):
                continue
            patch = films[:, y : y + size, x : x + size].reshape(len(films), -1)
            where = f"{_place(y + size / 2, x + size / 2, side)}"
            facts[f"mean grey level {where}"] = patch.mean(1)
            facts[f"spread of grey levels {where}"] = patch.std(1)
            facts[f"brightest point {where}"] = patch.max(1)
            facts[f"darkest point {where}"] = patch.min(1)
    return Sight("edges", np.column_stack(list(facts.values())), MATERIAL_PIXELS, best=True, numbers=facts)


def _place(y: float, x: float, side: int) -> str:
    """Name a place of the film as it is seen: its third of the height and of the width, and where its middle is."""
    upright = ("upper", "middle", "lower")[int(3 * y / side)]
    across = ("left", "middle", "right")[int(3 * x / side)]
    name = "middle" if upright == across else f"{upright} {across}"
    return f"in the {name} (at {100 * x / side:.0f} % of the width, {100 * y / side:.0f} % of the height)"


def _grey_levels(films: np.ndarray, histograms: np.ndarray) -> Sight:
    """See how many pixels have which grey level, and where none are: black and white points, mean, contrast."""
    pixels = films.reshape(len(films), -1)
    shares = histograms / np.maximum(histograms.sum(1, keepdims=True), 1e-9)
    below = np.cumsum(shares, axis=1)
    points = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
    levels = np.column_stack([(below < p).mean(1) for p in points])
    facts = {
        "mean grey level": pixels.mean(1),
        "contrast (standard deviation)": pixels.std(1),
        "black point (1st percentile)": levels[:, 1],
        "white point (99th percentile)": levels[:, -2],
    }
    features = np.column_stack([np.sqrt(shares), levels, *facts.values()])
    middles = (np.arange(shares.shape[1]) + 0.5) / shares.shape[1]
    bins = {f"share of the film at grey level {m:.2f}": h for m, h in zip(middles, shares.T, strict=True)}
    return Sight("grey levels", _standard(features), MATERIAL_PIXELS, numbers=facts, subtle=bins)


def _thumbnail(films: np.ndarray) -> Sight:
    """See the film at 32x32: the first components of it, and the means of 8x8 blocks to say where."""
    n, side, _ = films.shape
    small = films.reshape(n, side // 2, 2, side // 2, 2).mean((2, 4))
    centred = _standard(small)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    blocks = small.reshape(n, 8, side // 16, 8, side // 16).mean((2, 4))
    facts = {f"mean grey level {_place(y + 0.5, x + 0.5, 8)}": blocks[:, y, x] for y in range(8) for x in range(8)}
    return Sight("thumbnail", (left * values)[:, :COMPONENTS], MATERIAL_THUMBNAIL, anatomy=True, numbers=facts)


def _of_columns(name: str, columns: pd.DataFrame, material: float) -> Sight:
    """See columns of numbers as they are, with their ranks, and columns of words one-hot."""
    numbers, words, features = {}, {}, [np.zeros((len(columns), 1))]
    for column in columns:
        known = pd.to_numeric(columns[column], errors="coerce").astype(float)
        given = columns[column].notna() & (columns[column].astype(str) != "")
        if given.any() and known[given].notna().all():
            numbers[column.replace("_", " ")] = known.to_numpy()
            features += [known.to_numpy()[:, None], known.rank().to_numpy()[:, None], ~given.to_numpy()[:, None]]
            continue
        text = columns[column].where(given, "(not given)").astype(str)
        counts = text.value_counts()
        common = counts[counts >= MIN_FILMS].index[:MAX_WORDS]
        for word in common:
            words[f"{column.replace('_', ' ')} {word}"] = (text == word).to_numpy()
        features += [(text == word).to_numpy()[:, None] for word in common]
    return Sight(name, _standard(np.column_stack(features)), material, numbers=numbers, words=words)
