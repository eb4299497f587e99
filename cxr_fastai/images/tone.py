"""From a film to what a network sees: one size, one tone scale, so that the file's format cannot change the verdict."""

import numpy as np
from PIL import Image

LOW, HIGH = 2.0, 98.0  # percentiles that become 0 and 1
MEAN = 0.5  # what the mean becomes
MAX_LOG_POWER = 2.0  # the tone curve is x ** power, with power in [1/4, 4]


def to_input(pixels: np.ndarray, size: int) -> np.ndarray:
    """Make a film the array that a network sees: resized to a square, then put on one tone scale.

    The whole film is squeezed into the square. Nothing is cropped, since findings sit in the costophrenic angles, and
    nothing is padded, since black borders would tell the scanner. The tone is set after the resizing: both orders are
    equally stable under changes of tone, but this one measures the anatomy and not noise, and takes 1 ms instead of 20.

    Parameters
    ----------
    pixels : numpy.ndarray
        float32 (H, W) in [0, 1].
    size : int
        Width and height wanted.

    Returns
    -------
    numpy.ndarray
        float32 (size, size) in [0, 1].
    """
    return equalise(resize(pixels, size))


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """Squeeze float32 (H, W) into (size, size); the same array if it has that size already.

    A triangle filter as wide as the reduction averages all pixels and never overshoots, as Lanczos and bicubic do.
    """
    if pixels.shape == (size, size):
        return pixels
    image = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.float32))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0))


def equalise(pixels: np.ndarray) -> np.ndarray:
    """Put a film on one intensity scale, whatever its bit depth, window, exposure or tone curve.

    The 2nd and 98th percentiles become 0 and 1, then the power that brings the mean to a half is taken. It is monotone,
    and changes of scale and of gamma before it make no difference; `bench/polarity.py` prints how much others do. By
    that the percentiles were chosen: at 0.5 and 99.5 a side marker moved the tone four times as much, and at 5 and 95
    a tenth of the film would be lost.

    Parameters
    ----------
    pixels : numpy.ndarray
        float32 of any shape, finite.

    Returns
    -------
    numpy.ndarray
        float32 of that shape in [0, 1]; zeros if nearly all pixels are alike.
    """
    low, high = np.percentile(pixels, (LOW, HIGH))
    if high - low <= 1e-6:
        return np.zeros_like(pixels, dtype=np.float32)
    scaled = np.clip((pixels - np.float32(low)) / np.float32(high - low), 0, 1)
    return scaled ** np.float32(_power(scaled))


def _power(scaled: np.ndarray) -> float:
    """Find the power that brings the mean of values in [0, 1] to MEAN: bisection on a histogram of 256 bins."""
    counts, edges = np.histogram(scaled, bins=256, range=(0, 1))
    share, centre = counts / counts.sum(), (edges[:-1] + edges[1:]) / 2
    low, high = -MAX_LOG_POWER, MAX_LOG_POWER
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if share @ centre ** (2.0**middle) > MEAN else (low, middle)
    return 2.0 ** ((low + high) / 2)
