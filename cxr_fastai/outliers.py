"""Is a film like those that the network learned from? A distance in the space of its features, with a limit.

The features (N, F) are the means over places of what fires, before the last layer. Their square roots are compared
with those of the training films: the distance is what lies along the main directions of spread, each in its own
standard deviations, plus what lies outside of them (probabilistic principal components: Tipping and Bishop, J. R.
Stat. Soc. B 61:611, 1999; for networks Lee et al., NeurIPS 2018). Roots, since features are skewed like counts: with
them every photograph of a test was told, without them nine in ten. The limit is a quantile of held-out films.

`export` puts the distance into model.onnx as an output; `bench/outliers.py` measures what is found.
"""

from dataclasses import dataclass

import numpy as np

DIRECTIONS = 128
QUANTILE = 0.975  # of held-out films that lie within the limit
FLAG = "unlike-training"


@dataclass(frozen=True)
class Outliers:
    """What tells outliers.

    Attributes
    ----------
    mean : numpy.ndarray
        (F,) of the square roots of the features.
    axes : numpy.ndarray
        (F, D) main directions, orthonormal.
    spread : numpy.ndarray
        (D,) variance along each.
    rest : float
        Variance that is left, summed over all other directions.
    """

    mean: np.ndarray
    axes: np.ndarray
    spread: np.ndarray
    rest: float

    def distance(self, features: np.ndarray) -> np.ndarray:
        """Return the distance of each film, (N,) float64, about 1 for the films it was fitted on."""
        centred = np.sqrt(np.maximum(features, 0).astype(float)) - self.mean
        along = centred @ self.axes
        outside = np.maximum((centred**2).sum(1) - (along**2).sum(1), 0)
        return ((along**2 / self.spread).mean(1) + outside / self.rest) / 2


def fit_outliers(features: np.ndarray) -> Outliers:
    """Fit to the features (N, F) of training films, N of at least 4."""
    roots = np.sqrt(np.maximum(features, 0).astype(float))
    mean = roots.mean(0)
    _, values, axes = np.linalg.svd(roots - mean, full_matrices=False)
    variance = values**2 / (len(roots) - 1)
    # Half of the films at most, so that the rest is more than rounding.
    count = max(1, min(DIRECTIONS, len(roots) // 2, int((variance > 1e-9 * variance[0]).sum()) - 1))
    floor = 1e-6 * float(variance.sum()) + 1e-12
    return Outliers(mean, axes[:count].T, variance[:count] + floor, float(variance[count:].sum()) + floor)


def limit_of(distances: np.ndarray) -> float:
    """Return the distance above which a film is an outlier, from those (n,) of films not fitted on.

    The `QUANTILE` with the correction for a finite number of films, so that a new one like them is beyond it with a
    probability of at most ``1 - QUANTILE`` where there are 39 or more; fewer have their largest, and a tenth on top.
    """
    rank = int(np.ceil((len(distances) + 1) * QUANTILE))
    ordered = np.sort(distances)
    return float(ordered[rank - 1]) if rank <= len(ordered) else 1.1 * float(ordered[-1])
