"""The sheet that a phantom is drawn on: patient coordinates, smooth curves, drawn shapes, noise.

Patient coordinates are centimetres in the plane of the detector: x grows towards the image's right (the patient's
left), y grows downward, the origin lies on the midline half-way between the lung apices and the costophrenic angles.
Every map is a float32 array (size, size).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import uniform_filter, uniform_filter1d

Points = NDArray[np.floating[Any]]
Map = Points  # float32 (size, size)
Levels = float | Points

_BINS = 2048  # entries of a curve's table: finer than a pixel of a 1024-pixel film
_REACH = 3.0  # curves are tabulated on [-3, 3] half-widths or half-heights


def smoothstep(values: Map, low: float, high: float) -> Map:
    """Cubic ramp from 0 at `low` to 1 at `high`, flat outside; `low` may exceed `high`."""
    ramp = np.clip((values - np.float32(low)) * np.float32(1.0 / (high - low)), 0.0, 1.0)
    return ramp * ramp * (3.0 - 2.0 * ramp)


def curve(knots: Sequence[float], values: Sequence[float], smooth: float = 0.08) -> Map:
    """Tabulate a smooth curve through knots on [-3, 3], read through `bins`; `smooth` is the width rounded off."""
    table = np.interp(np.linspace(-_REACH, _REACH, _BINS), knots, values)
    width = max(1, int(smooth * _BINS / (2 * _REACH)))
    return uniform_filter1d(uniform_filter1d(table, width, mode="nearest"), width, mode="nearest").astype(np.float32)


def bins(values: Map) -> NDArray[np.intp]:
    """Positions of `values` in a curve's table."""
    scaled = (values + np.float32(_REACH)) * np.float32(_BINS / (2 * _REACH))
    return np.clip(scaled, 0, _BINS - 1).astype(np.intp)


@dataclass(frozen=True)
class Frame:
    """Where the detector lies on the patient.

    Parameters
    ----------
    size
        Pixels along each side of the square film.
    width, height
        Field of view in cm. They differ a little, for films are often squeezed into a square.
    angle
        Rotation of the patient in degrees.
    x0, y0
        Patient point, in cm, at the centre of the film.
    """

    size: int
    width: float
    height: float
    angle: float
    x0: float
    y0: float

    def at(self, size: int) -> "Frame":
        """Return the same field of view sampled at another size."""
        return Frame(size, self.width, self.height, self.angle, self.x0, self.y0)

    @cached_property
    def pixel(self) -> float:
        """Pixel pitch in cm, the mean of both axes."""
        return (self.width + self.height) / (2 * self.size)

    @cached_property
    def grid(self) -> tuple[Map, Map]:
        """Patient x and y in cm at each pixel's centre, two float32 (size, size)."""
        steps = (np.arange(self.size, dtype=np.float32) + 0.5) / self.size - 0.5
        across, down = (steps * self.width)[None, :], (steps * self.height)[:, None]
        cos, sin = np.float32(np.cos(np.radians(self.angle))), np.float32(np.sin(np.radians(self.angle)))
        return (across * cos + down * sin + np.float32(self.x0), down * cos - across * sin + np.float32(self.y0))

    def to_pixels(self, points: Points) -> Points:
        """Convert patient points (..., 2) in cm to pixel coordinates (column, row)."""
        cos, sin = np.cos(np.radians(self.angle)), np.sin(np.radians(self.angle))
        across, down = self.size / self.width, self.size / self.height
        turn = np.array([[cos * across, sin * down], [-sin * across, cos * down]])
        middle = 0.5 * self.size - np.array([self.x0, self.y0]) @ turn
        return points @ turn + middle


class Layer:
    """Shapes drawn with soft edges: PIL at twice the film's size, averaged down. Later shapes cover earlier ones."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.fold = 2 if frame.size <= 512 else 1
        self.image = Image.new("L", (frame.size * self.fold, frame.size * self.fold))
        self.draw = ImageDraw.Draw(self.image)

    def flat(self, points: Points) -> list[list[float]]:
        """Turn n shapes (n, k, 2) in cm into n flat lists of PIL's pixel coordinates."""
        drawn = self.frame.to_pixels(points) * self.fold
        return drawn.reshape(len(drawn), 2 * points.shape[1]).tolist()

    def width(self, centimetres: float) -> int:
        """Width in drawn pixels, at least one."""
        return max(1, round(centimetres / self.frame.pixel * self.fold))

    def polygons(
        self, points: Points, fill: Levels, edge: Levels = 0.0, edge_cm: float = 0.15, capped: bool = True
    ) -> None:
        """Fill polygons (n, k, 2) in cm with levels in 0-1, and rim them with `edge` where that is above zero.

        Bands that are not `capped` are rimmed along their two sides only, not across their ends.
        """
        rim = self.width(edge_cm)
        fills, edges = np.broadcast_to(fill, len(points)), np.broadcast_to(edge, len(points))
        inks, rims = (fills * 255).astype(int).tolist(), (edges * 255).astype(int).tolist()
        for flat, ink, dark in zip(self.flat(points), inks, rims, strict=True):
            self.draw.polygon(flat, fill=ink)
            if dark > 0:
                for side in [flat + flat[:2]] if capped else [flat[: len(flat) // 2], flat[len(flat) // 2 :]]:
                    self.draw.line(side, fill=dark, width=rim)

    def lines(self, points: Points, widths: Levels, levels: Levels) -> None:
        """Draw polylines (n, k, 2) in cm; one thinner than a drawn pixel is drawn fainter instead."""
        drawn = np.broadcast_to(np.asarray(widths) * (self.fold / self.frame.pixel), len(points))
        ink = 255 * np.minimum(np.broadcast_to(levels, len(points)), 1.0) * np.minimum(drawn, 1.0)
        thick = np.maximum(1, np.rint(drawn)).astype(int).tolist()
        for flat, fill, width in zip(self.flat(points), ink.astype(int).tolist(), thick, strict=True):
            self.draw.line(flat, fill=fill, width=width)

    def array(self) -> Map:
        """Return the levels as float32 (size, size) in 0-1."""
        image = self.image.reduce(self.fold) if self.fold > 1 else self.image
        return np.asarray(image, dtype=np.float32) * np.float32(1 / 255)


def resize(values: Map, size: int) -> Map:
    """Resample a map bilinearly to (size, size)."""
    if values.shape == (size, size):
        return values
    return np.asarray(Image.fromarray(values).resize((size, size), Image.Resampling.BILINEAR))


def blur(values: Map, sigma: float) -> Map:
    """Blur by about a Gaussian of `sigma` pixels: two box filters of variance (w² - 1) / 12, or part of one."""
    if sigma < 0.8:
        part = np.float32(1.5 * sigma * sigma)
        return values if part < 0.02 else values + part * (uniform_filter(values, 3, mode="nearest") - values)
    width = max(3, round(float(np.sqrt(6.0 * sigma * sigma + 1.0))) | 1)
    smooth = uniform_filter(uniform_filter(values, width, mode="nearest"), width, mode="nearest")
    part = np.float32(0.75 * sigma * sigma)
    return smooth if part > 1 else values + part * (smooth - values)


def wide_blur(values: Map, sigma: float) -> Map:
    """Blur by a wide Gaussian of `sigma` pixels on a reduced grid, where it costs next to nothing."""
    size = values.shape[0]
    fold = max(1, int(sigma / 3))
    if fold == 1:
        return blur(values, sigma)
    return resize(blur(shrink(values, fold), sigma / fold), size)


def shrink(values: Map, fold: int) -> Map:
    """Average a map over squares of `fold` pixels."""
    return np.asarray(Image.fromarray(values).reduce(fold))


def noise(rng: np.random.Generator, frame: Frame, coarse_cm: float) -> Map:
    """Smooth random field, mean 0 and deviation about 1, whose grain is `coarse_cm` wide and tied to the film."""
    cells = max(3, min(frame.size, round(frame.width / coarse_cm)))
    field = rng.standard_normal((cells, cells), dtype=np.float32)
    return np.asarray(Image.fromarray(field).resize((frame.size, frame.size), Image.Resampling.BICUBIC))


def segment_distance(x: Map, y: Map, start: tuple[float, float], end: tuple[float, float]) -> Map:
    """Squared distance in cm² of each pixel from a segment given by its two ends in cm."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = ((x - np.float32(start[0])) * np.float32(dx) + (y - np.float32(start[1])) * np.float32(dy)) * np.float32(
        1.0 / (dx * dx + dy * dy)
    )
    along = np.clip(along, 0.0, 1.0)
    off_x, off_y = x - np.float32(start[0]) - along * np.float32(dx), y - np.float32(start[1]) - along * np.float32(dy)
    return off_x * off_x + off_y * off_y


def ellipsoid(x: Map, y: Map, centre: tuple[float, float], axes: tuple[float, float, float], tilt: float = 0.0) -> Map:
    """Path length in cm through an ellipsoid.

    Parameters
    ----------
    x, y
        Patient coordinates in cm, (size, size).
    centre
        Its centre in cm.
    axes
        Semi-axes in cm: along, across, and in depth (the beam's direction).
    tilt
        Degrees by which the first axis turns from +x towards +y.

    Returns
    -------
    ndarray of float32 (size, size)
        The chord 2 c sqrt(1 - q) in cm, zero outside.
    """
    cos, sin = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
    dx, dy = x - np.float32(centre[0]), y - np.float32(centre[1])
    along = dx * np.float32(cos / axes[0]) + dy * np.float32(sin / axes[0])
    across = dy * np.float32(cos / axes[1]) - dx * np.float32(sin / axes[1])
    inside = np.maximum(1.0 - along * along - across * across, 0.0)
    return np.sqrt(inside) * np.float32(2 * axes[2])
