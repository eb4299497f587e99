"""Every film of a table read once, and what the checks of the audit need of it: small pictures and facts of the file.

In: a table. Out: a `Scan`, row for row. Films that cannot be read are named in `errors`; their rows are NaN.
"""

import hashlib
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxr_fastai.config import Limits
from cxr_fastai.errors import UnreadableImage
from cxr_fastai.images import read_bytes, read_film, resize

SIDE = 64  # of a thumbnail, and grey levels of a histogram
DICOM_FACTS = ("PhotometricInterpretation", "Modality", "Manufacturer", "BodyPartExamined", "BitsStored")


@dataclass(frozen=True)
class Scan:
    """What was seen of the n films of a table.

    Attributes
    ----------
    table : pandas.DataFrame
    errors : dict
        Path -> reason, of films that cannot be read.
    flags : list of list of str
        What the reader doubts of each film (`images.FLAGS`).
    sha256 : list of str
        Of each file; empty where it cannot be read.
    thumbnails : numpy.ndarray
        (n, 64, 64) float32 in [0, 1]: the whole film squeezed into a square, its tone as it was read.
    borders : numpy.ndarray
        (n, 256) float32: outermost row and column of the film on each side (top, bottom, left, right), 64 pixels each.
    histograms : numpy.ndarray
        (n, 64) share of the pixels at each grey level.
    properties : pandas.DataFrame
        Of the file: width, height, bytes, bytes_per_pixel, suffix, format, mode and what else its header tells; empty
        of columns where films came from the cache.
    """

    table: pd.DataFrame
    errors: dict[str, str]
    flags: list[list[str]]
    sha256: list[str]
    thumbnails: np.ndarray
    borders: np.ndarray
    histograms: np.ndarray
    properties: pd.DataFrame

    @classmethod
    def of_thumbnails(cls, table: pd.DataFrame, thumbnails: np.ndarray, identities: list[str]) -> "Scan":
        """Make a scan of films that were read before: enough for duplicates, not for probes.

        Parameters
        ----------
        thumbnails
            (n, 64, 64) float32 in [0, 1].
        identities
            Equal for two films whose files are equal.
        """
        n = len(table)
        nothing = np.empty((n, 0), np.float32)
        return cls(table, {}, [[]] * n, identities, thumbnails, nothing, nothing, pd.DataFrame(index=range(n)))


def scan(table: pd.DataFrame, advance: Callable[[], None] = lambda: None, limits: Limits | None = None) -> Scan:
    """Read every film of a table, on as many threads as cores.

    Parameters
    ----------
    table
        Its column ``path`` is read.
    advance
        Called once a film.
    limits
        What one file may cost.
    """
    limits = limits or Limits()

    def look(path: str) -> dict[str, Any]:
        try:
            return _look(path, limits)
        except UnreadableImage as error:
            return {"error": str(error)}
        finally:
            advance()

    with ThreadPoolExecutor() as pool:
        seen = list(pool.map(look, table["path"]))
    nothing = {
        "thumbnail": np.full((SIDE, SIDE), np.nan, np.float32),
        "border": np.full(4 * SIDE, np.nan, np.float32),
        "histogram": np.full(SIDE, np.nan, np.float32),
    }
    arrays = {name: np.stack([s.get(name, empty) for s in seen]) for name, empty in nothing.items()}
    return Scan(
        table=table,
        errors={path: s["error"] for path, s in zip(table["path"], seen, strict=True) if "error" in s},
        flags=[s.get("flags", []) for s in seen],
        sha256=[s.get("sha256", "") for s in seen],
        thumbnails=arrays["thumbnail"],
        borders=arrays["border"],
        histograms=arrays["histogram"],
        properties=pd.DataFrame([s.get("properties", {}) for s in seen]),
    )


def _look(path: str, limits: Limits) -> dict[str, Any]:
    data = read_bytes(path, limits)
    film = read_film(data, limits)
    pixels = film.pixels
    height, width = pixels.shape
    counts = np.bincount(np.minimum(pixels.ravel() * SIDE, SIDE - 1).astype(np.int64), minlength=SIDE)
    edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    size = {"width": width, "height": height, "bytes": len(data), "bytes_per_pixel": len(data) / pixels.size}
    return {
        "flags": list(film.flags),
        "sha256": hashlib.sha256(data).hexdigest(),
        "thumbnail": resize(pixels, SIDE),
        "border": np.concatenate([_resampled(edge) for edge in edges]).astype(np.float32),
        "histogram": (counts / pixels.size).astype(np.float32),
        "properties": {**size, "suffix": Path(path).suffix.lower(), **_header(data)},
    }


def _resampled(line: np.ndarray) -> np.ndarray:
    """Return a line of pixels as the means of 64 equal parts."""
    sums = np.concatenate([[0.0], np.cumsum(line, dtype=float)])
    return np.diff(np.interp(np.linspace(0, len(line), SIDE + 1), np.arange(len(line) + 1), sums)) * SIDE / len(line)


def _header(data: bytes) -> dict[str, Any]:
    """Return what the header tells of how the file was made; the pixels were read before, so it is no hostile file."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            facts: dict[str, Any] = {"format": image.format, "mode": image.mode, "exif": bool(image.getexif())}
            tables = getattr(image, "quantization", None)
            if tables:
                facts["quantisation"] = int(sum(tables[0]))  # the coarser a JPEG, the larger
            return facts
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return _dicom_header(data)


def _dicom_header(data: bytes) -> dict[str, Any]:
    import pydicom

    try:
        header = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True, force=True)
        syntax = getattr(getattr(header, "file_meta", None), "TransferSyntaxUID", None)
        facts = {name.lower(): str(header.get(name)) for name in DICOM_FACTS if header.get(name) is not None}
    except Exception:  # noqa: BLE001 (pydicom raises what it likes; the facts are then unknown)
        return {"format": "other"}
    return {"format": "DICOM", "transfersyntax": str(syntax), **facts}
