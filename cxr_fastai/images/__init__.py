"""Every picture file or DICOM object, as one kind of array: float32 (H, W) in [0, 1], bone white, air black.

    source (path, bytes or open file) ──► bytes ──► raster.py or dicom.py ──► Film(pixels, flags, header)
    Film.pixels ──► to_input(pixels, 224) ──► what a network sees

Training, evaluation, prediction and serving all read through `read_film` or `read_radiograph`, so that the same film is
the same pixels everywhere. A file that is not one sound film raises `UnreadableImage` with one line that says why and
what to do; a film that can be read but is doubtful carries flags. Nothing else ever comes out.
"""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np

from cxr_fastai.config import Limits
from cxr_fastai.errors import UnreadableImage
from cxr_fastai.files import open_regular
from cxr_fastai.images import dicom, judge, raster
from cxr_fastai.images.guard import printable, quiet
from cxr_fastai.images.tone import equalise, resize, to_input

RASTER_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".jp2", ".j2k", ".avif")
IMAGE_SUFFIXES = frozenset((*RASTER_SUFFIXES, ".pgm", ".dcm", ".dicom"))


@dataclass(frozen=True)
class Film:
    """One radiograph as read.

    Attributes
    ----------
    pixels : numpy.ndarray
        float32 (H, W) in [0, 1], bone white, air black.
    flags : tuple of str
        What is doubtful about it, as short words; `FLAGS` explains each.
    header : mapping of str to str
        From DICOM, where present: PatientID, ViewPosition, PatientAge, PatientSex, Modality, BodyPartExamined and
        SOPInstanceUID, and nothing else. Empty for other formats.
    """

    pixels: np.ndarray
    flags: tuple[str, ...] = ()
    header: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


FLAGS: Mapping[str, str] = MappingProxyType(
    {
        "multi-frame": "the file holds several pictures, of which one was read",
        "colour": "the picture has colours; a radiograph has none",
        "tiny": "less than 64 pixels wide or high",
        "aspect": "one side is more than twice as long as the other",
        "few-grey-levels": "fewer than 32 grey levels",
        "clipped": "more than 30 % of the picture is plain white",
        "half-empty": "nearly half of the picture or more is one flat tone",
        "no-anatomy": "noise, a pattern, text or a gradient, not a picture of a body",
        "sideways?": "it looks like a chest that lies on its side; the pixels were left as they are",
        "upside-down?": "it looks like a chest on its head; the pixels were left as they are",
        "inverted?": "bone looks black and air white; the pixels were left as they are",
        "polarity-tag-wrong": "the header's polarity contradicts the pixels; the pixels were believed",
        "modality": "the header does not say that this is a radiograph (CR, DX or RG)",
        "body-part": "the header names a part of the body that is not the chest",
        "lateral": "the header says that this is not a frontal view",
        "burned-in-annotation": "the header says that text is burned into the pixels",
        "unlike-training": "it is unlike the films that the model learned from, or no chest film at all",
        "window-ignored": "the header's display window makes no sense and was left out",
    }
)


def read_radiograph(source: str | Path | bytes | BinaryIO, limits: Limits | None = None) -> np.ndarray:
    """Read the pixels of one film: float32 (H, W) in [0, 1], bone white, air black.

    Raises
    ------
    UnreadableImage
        If `source` is not one sound film; see `read_film`.
    """
    return read_film(source, limits).pixels


def read_film(source: str | Path | bytes | BinaryIO, limits: Limits | None = None, frame: int | None = None) -> Film:
    """Read one film from a path, from bytes or from an open binary file.

    Parameters
    ----------
    source : str, Path, bytes or binary file
        PNG, JPEG, TIFF, BMP, WebP, GIF, JPEG 2000, AVIF, PGM or DICOM; recognised by its bytes, not by its name.
    limits : Limits, optional
        What the file may cost in pixels, bytes and seconds.
    frame : int, optional
        Which picture of a file that holds several. Without it the first is read and flagged "multi-frame", but a CR or
        DX object of several frames is refused: by the standard each of these is one exposure.

    Returns
    -------
    Film
        Pixels scaled by their real bit depth and turned upright by EXIF, with flags and the few header fields.

    Raises
    ------
    UnreadableImage
        If the file is missing, damaged, too large, not a picture, or not a radiograph. One printable line. The class
        is NoSuchFrame where `frame` is beyond the last one.
    """
    limits = limits or Limits()
    data = read_bytes(source, limits)
    try:
        with quiet:
            return _read(data, limits, frame, time.thread_time() + limits.max_seconds)
    except UnreadableImage as error:
        raise type(error)(printable(str(error))) from None
    except MemoryError:
        raise UnreadableImage("reading it needs more memory than there is") from None
    except Exception as error:  # noqa: BLE001 - decoders that are fed damaged bytes raise anything
        raise UnreadableImage(_reason(error)) from None


def _reason(error: Exception) -> str:
    """Say what a decoder's exception means, without its own text, which may quote the header and so the patient."""
    cause = error.__cause__ or error.__context__
    if isinstance(cause, UnreadableImage):  # the deadline, raised while a codec was reading
        return printable(str(cause))
    if type(error).__name__ == "DecompressionBombError":
        return "it has more pixels than any radiograph"
    return f"the file is damaged or cut short ({type(error).__name__}); copy or export it again"


def _read(data: bytes, limits: Limits, frame: int | None, deadline: float) -> Film:
    """Read one film from all its bytes, and judge it by its pixels."""
    header: dict[str, str] = {}
    if dicom.looks_like_dicom(data):
        pixels, flags, header = dicom.read(data, limits.max_pixels, limits.max_bytes, frame, deadline)
    else:
        pixels, flags = raster.read(data, limits.max_pixels, frame, deadline)
    if not np.isfinite(pixels.sum(dtype=np.float64)):
        raise UnreadableImage("some pixels are not numbers (NaN or infinite); export it again")
    if time.thread_time() > deadline:
        raise UnreadableImage(f"reading it takes longer than {limits.max_seconds:g} seconds")
    return Film(pixels, tuple(flags + judge.doubts(pixels)), MappingProxyType(header))


def looks_like_film(path: str | Path) -> bool:
    """Tell whether a walk through a folder should take this file for a film: by its ending, or by DICM inside it."""
    path = Path(path)
    if path.name.startswith("."):
        return False
    if path.suffix and not path.suffix[1:].isdigit():  # DICOM files are often named by their UID: 1.2.840.113...
        return path.suffix.lower() in IMAGE_SUFFIXES
    try:
        with open_regular(path) as file:
            return file.read(132)[128:] == b"DICM"
    except (OSError, ValueError, UnreadableImage):
        return False


def films_below(folder: str | Path) -> Iterator[Path]:
    """Yield all films below a folder in order, but none that is hidden (macOS leaves ._x.png and __MACOSX behind)."""
    seen: set[str] = set()
    closed: list[Path] = []  # folders that cannot be listed: who reads them is told so
    for root, folders, files in os.walk(folder, followlinks=True, onerror=lambda e: closed.append(Path(e.filename))):
        real = os.path.realpath(root)
        if real in seen:  # a link back up would go round for ever
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        yield from (path for name in sorted(files) if looks_like_film(path := Path(root, name)))
    yield from closed


def read_bytes(source: str | Path | bytes | BinaryIO, limits: Limits) -> bytes:
    """Read all bytes of `source`, unless there are more than the limit allows."""
    try:
        if isinstance(source, bytes | bytearray | memoryview):
            data = bytes(source)
        elif isinstance(source, str | os.PathLike):
            with open_regular(source) as file:
                data = file.read(limits.max_bytes + 1)
        else:
            data = source.read(limits.max_bytes + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "its name cannot be used"
        raise UnreadableImage(f"it cannot be opened: {reason}") from None
    if len(data) > limits.max_bytes:
        raise UnreadableImage(f"the file is larger than {limits.max_bytes:,} bytes; no radiograph needs that")
    if not data:
        raise UnreadableImage("the file is empty")
    return data


__all__ = [
    "FLAGS",
    "IMAGE_SUFFIXES",
    "Film",
    "Limits",
    "equalise",
    "films_below",
    "looks_like_film",
    "printable",
    "read_bytes",
    "read_film",
    "read_radiograph",
    "resize",
    "to_input",
]
