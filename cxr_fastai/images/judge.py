"""What is doubtful about a film, told from its pixels alone: blank, tiny, clipped, noise, turned, inverted.

Each threshold was set on 1,320 real films so that none, or one in a thousand, is flagged. `bench/polarity.py` prints
how many are, and how many inverted or turned films are found; it also fits the three 8×8 templates below.
"""

import numpy as np

from cxr_fastai.errors import UnreadableImage
from cxr_fastai.images.tone import resize

SMALL = 64  # a film is judged at this size
MIN_PIXELS = 64
MIN_LEVELS = 32
MAX_WHITE = 0.30  # share of the picture that may be plain white
MAX_ONE_TONE = 0.45
MIN_STRUCTURE = 0.80  # standard deviation that is left at 64×64; noise and text lose it, bodies do not
MIN_OFF_PLANE = 0.15  # standard deviation that is left when the best plane is subtracted
INVERTED, SURELY_INVERTED, SIDEWAYS, UPSIDE_DOWN = -0.20, -0.45, -0.10, -0.20

# What rank_grid gives, weighted so that it tells a chest from the same chest inverted, on its side, on its head.
TEMPLATES = {
    "bone white": np.array(
        [
            [-53, -31, -17, 16, 18, -13, -30, -54],
            [-23, -14, -24, 5, 6, -22, -14, -25],
            [-10, -16, -38, 2, 0, -35, -16, -11],
            [-13, -20, -37, 17, 17, -36, -20, -13],
            [-20, -18, -22, 40, 44, -21, -20, -20],
            [-24, -11, 1, 59, 64, 0, -13, -25],
            [-25, -7, 23, 81, 82, 22, -5, -26],
            [-17, 26, 66, 99, 97, 61, 27, -15],
        ]
    ),
    "not sideways": np.array(
        [
            [-18, -35, -42, 4, 9, -36, -33, -19],
            [3, -7, -35, -21, -19, -39, -8, 5],
            [8, -5, -12, 39, 39, -13, -6, 10],
            [-37, -32, -42, 4, 6, -46, -29, -34],
            [-59, -46, -72, -11, 1, -66, -48, -62],
            [-25, 19, 14, 69, 79, 11, 18, -27],
            [-9, 8, 27, 99, 96, 22, 8, -8],
            [19, 38, 55, 90, 90, 56, 39, 18],
        ]
    ),
    "not on its head": np.array(
        [
            [11, -64, -68, -45, -58, -94, -73, 17],
            [13, 69, -46, -78, -85, -45, 57, 3],
            [-1, 99, -23, -51, -52, -3, 91, -2],
            [3, 38, -46, -22, -24, -13, 37, 4],
            [-4, -37, 13, 24, 22, 46, -38, -3],
            [2, -91, 3, 52, 51, 23, -99, 1],
            [-3, -57, 45, 85, 78, 46, -69, -13],
            [-17, 73, 94, 58, 45, 68, 64, -11],
        ]
    ),
}


def is_coloured(rgb: np.ndarray) -> bool:
    """Tell whether more than half a per cent of (H, W, 3) is a colour and not grey; 8-bit, or floats in [0, 1]."""
    spread = np.ptp(rgb, axis=2) > (30 if rgb.dtype == np.uint8 else 30 / 255)
    return bool(spread.mean() > 0.005)


def doubts(pixels: np.ndarray) -> list[str]:
    """List the flags that float32 (H, W) in [0, 1] deserves; see `images.FLAGS`.

    Raises
    ------
    UnreadableImage
        If all pixels are alike.
    """
    height, width = pixels.shape
    sample = pixels[:: max(1, height // 128), :: max(1, width // 128)]
    levels, counts = np.unique(sample, return_counts=True)
    dark, white = float(pixels.min()), float(pixels.max())
    if white - dark < 1e-3:
        raise UnreadableImage("all its pixels are alike, so there is no picture in it")
    small = resize(pixels, SMALL)
    rows, columns = np.mgrid[-1 : 1 : SMALL * 1j, -1 : 1 : SMALL * 1j]
    planes = np.stack([np.ones(SMALL**2), rows.ravel(), columns.ravel()], axis=1)
    off_plane = small.ravel() - planes @ np.linalg.lstsq(planes, small.ravel(), rcond=None)[0]
    found = {
        "tiny": min(height, width) < MIN_PIXELS,
        "aspect": max(height, width) > 2 * min(height, width),
        "few-grey-levels": len(levels) < MIN_LEVELS,
        "clipped": np.mean(sample >= white - (white - dark) / 255) > MAX_WHITE,
        "half-empty": counts.max() / sample.size > MAX_ONE_TONE,
        "no-anatomy": small.std() < MIN_STRUCTURE * sample.std() or off_plane.std() < MIN_OFF_PLANE * small.std(),
        "inverted?": looks_inverted(small),
    }
    if not found["inverted?"]:
        grid = rank_grid(small)
        found["sideways?"] = likeness(grid, "not sideways") < SIDEWAYS
        found["upside-down?"] = not found["sideways?"] and likeness(grid, "not on its head") < UPSIDE_DOWN
    return [flag for flag, raised in found.items() if raised]


def looks_inverted(pixels: np.ndarray, threshold: float = INVERTED) -> bool:
    """Tell whether (H, W) is a chest film with black bones and white air.

    Its likeness to a chest must be below `threshold`, and no turned version may be likelier than an inverted one.
    """
    grid = rank_grid(pixels)
    upright, *turned = (likeness(np.rot90(grid, k), "bone white") for k in range(4))
    return upright < threshold and max(turned) < -upright


def likeness(grid: np.ndarray, template: str) -> float:
    """Correlate what `rank_grid` gives with one of `TEMPLATES`: -1 to 1."""
    return float((grid * TEMPLATES[template]).sum() / np.linalg.norm(TEMPLATES[template]))


def rank_grid(pixels: np.ndarray) -> np.ndarray:
    """Average the ranks of the grey levels of (H, W) over a grid: (8, 8), sum 0, length 1 (or all zeros).

    Ranks do not change with tone, and those of an inverted film are exactly the opposite.
    """
    levels = np.round(resize(pixels, SMALL) * 1000).astype(np.int32)
    _, place, counts = np.unique(levels, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - counts / 2)[place].reshape(8, SMALL // 8, 8, SMALL // 8).mean(axis=(1, 3))
    ranks -= ranks.mean()
    return ranks / max(float(np.linalg.norm(ranks)), 1e-12)
