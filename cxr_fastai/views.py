"""The same film seen a little differently, as training saw it: flipped, turned, nearer, of another contrast.

`predict --tta` averages over these views. In training they are drawn at random (`data.batch_transforms`); here they
are fixed, half as strong as the strongest of training, so that the same film gets the same answer. No torch.
"""

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

TURN, NEARER, CONTRAST = 5.0, 1.05, 1.1  # degrees, times, times; at strength 1


def views_of(films: np.ndarray, strength: float) -> Iterator[np.ndarray]:
    """Yield views of prepared films (N, size, size) float32 in [0, 1]; the first one is the films themselves.

    Parameters
    ----------
    strength
        Of the augmentation in training, 1 the paper's; 0 has no view but the films.
    """
    yield films
    if not strength:
        return
    turn, nearer, contrast = TURN * strength, 1 + (NEARER - 1) * strength, 1 + (CONTRAST - 1) * strength
    mirrored = np.ascontiguousarray(films[:, :, ::-1])
    yield mirrored
    yield _each(films, lambda film: _moved(film, turn, 1.0))
    yield _each(mirrored, lambda film: _moved(film, turn, 1.0))
    yield _each(films, lambda film: _moved(film, -turn, nearer))
    yield _each(mirrored, lambda film: _moved(film, -turn, nearer))
    yield ((films - 0.5) * contrast + 0.5).clip(0, 1)
    yield ((mirrored - 0.5) / contrast + 0.5).clip(0, 1)


def _each(films: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.stack([change(film) for film in films])


def _moved(film: np.ndarray, degrees: float, nearer: float) -> np.ndarray:
    """Turn a film (size, size) about its centre and come nearer; what comes in at the edge repeats the edge."""
    size = len(film)
    margin = int(np.ceil(size / 4))
    turned = Image.fromarray(np.pad(film, margin, mode="edge")).rotate(degrees, Image.Resampling.BILINEAR)
    edge = (len(film) + 2 * margin - size / nearer) / 2
    box = (edge, edge, edge + size / nearer, edge + size / nearer)
    return np.asarray(turned.resize((size, size), Image.Resampling.BILINEAR, box=box)).clip(0, 1)
