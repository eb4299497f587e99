"""DICOM radiographs as grey pixels: stored values → modality LUT → VOI LUT or window → polarity → [0, 1].

The order is that of DICOM PS3.3 C.11 and PS3.4 N.2. pydicom parses and decodes; this module first looks whether the
object is a radiograph and whether its compressed pixels are as large as the header says. Objects that are no radiograph
(CT, structured report, PDF ...) are refused by name. Of the header only `HEADER_FIELDS` are kept; nothing is printed.
"""

import struct
import zlib
from typing import Any

import numpy as np

from cxr_fastai.errors import NoSuchFrame, UnreadableImage
from cxr_fastai.images import judge, raster
from cxr_fastai.images.guard import TimedBytes, printable
from cxr_fastai.images.tone import resize

HEADER_FIELDS = (
    "PatientID", "ViewPosition", "PatientAge", "PatientSex", "Modality", "BodyPartExamined", "SOPInstanceUID",
)  # fmt: skip
RADIOGRAPHY = ("CR", "DX", "RG")
PERHAPS_RADIOGRAPHY = ("", "OT", "SC", "RF")  # digitised films are filed under these
CHEST = ("CHEST", "THORAX", "TORAX", "LUNG")
LATERAL = ("LL", "RL", "LAT", "LATERAL", "LLD", "RLD", "LLO", "RLO", "LAO", "RAO", "LPO", "RPO")
# (0002,0010), the transfer syntax, as it stands in a file: deflated, and what it becomes here once inflated.
DEFLATED = b"\2\0\x10\0UI\x16\x001.2.840.10008.1.2.1.99"
EXPLICIT = b"\2\0\x10\0UI\x16\x001.2.840.10008.1.2.1\0\0\0"
RLE = "1.2.840.10008.1.2.5"
# Extended (12 bits) and lossless JPEG: libjpeg-turbo reads them all; GDCM ends the process on damaged ones.
LIBJPEG_TURBO = ("1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
# One decoder for each other compressed transfer syntax, so that a film is the same pixels whatever else is installed.
DECODERS = {
    RLE: "pydicom",  # RLE; pylibjpeg-rle panics, which is no Exception, on damaged data
    "1.2.840.10008.1.2.4.50": "pillow",  # JPEG baseline
    "1.2.840.10008.1.2.4.80": "pyjpegls",  # JPEG-LS
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg",  # JPEG 2000
    "1.2.840.10008.1.2.4.91": "pylibjpeg",
    "1.2.840.10008.1.2.4.201": "pylibjpeg",  # High-throughput JPEG 2000
    "1.2.840.10008.1.2.4.202": "pylibjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg",
}


def looks_like_dicom(data: bytes) -> bool:
    """Tell whether these bytes are DICOM: by DICM at 128, or by a first element of group 2 or 8."""
    if data[128:132] == b"DICM":
        return True
    group, element, kind = data[:2], data[2:4], data[4:6]
    if group == b"\0\x08":  # big endian
        return kind.isalpha()
    if group not in (b"\2\0", b"\x08\0") or element[1:] != b"\0":
        return False
    return kind.isalpha() or int.from_bytes(data[4:8], "little") < 256  # explicit or implicit VR


def read(
    data: bytes, max_pixels: int, max_bytes: int, frame: int | None, deadline: float
) -> tuple[Any, list[str], dict]:
    """Read one radiograph from DICOM bytes.

    A film whose polarity tag contradicts its pixels is turned to what the pixels say and flagged "polarity-tag-wrong":
    the tag is a claim by a device that is often misconfigured, while bones are white. It must be sure for that (see
    `bench/polarity.py`); where it is less so, the tag is followed and the film flagged "inverted?", as is every picture
    file that looks inverted: those carry no tag, and turning them by a guess would change what somebody stored.

    Returns
    -------
    pixels : numpy.ndarray
        float32 (H, W) in [0, 1], bone white, air black.
    flags : list of str
        See `images.FLAGS`.
    header : dict of str to str
        Those of `HEADER_FIELDS` that are present.

    Raises
    ------
    UnreadableImage
        If the object is damaged, is no radiograph, or costs more than the limits allow.
    """
    dataset = _parse(data, max_bytes, deadline)
    header = _header(dataset)
    flags = _about(dataset, header)
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        if header.get("Modality") in RADIOGRAPHY and frame is None:
            raise UnreadableImage(f"it holds {frames} frames, so it is not one radiograph; export one of them")
        flags.append("multi-frame")
    frame = frame or 0
    if not 0 <= frame < frames:
        raise NoSuchFrame(f"it has no frame number {frame}")
    raster.check_size(int(dataset.get("Columns") or 0), int(dataset.get("Rows") or 0), max_pixels)
    stored = _stored_values(dataset, frame, max_pixels)
    if stored.ndim == 3:
        pixels, coloured = _luminance(stored)
        flags += ["colour"] if coloured else []
        return pixels, flags, header
    pixels, window_flags = _displayed(stored, dataset)
    flags += window_flags
    _set_polarity(pixels, dataset, flags)
    _blacken_padding(pixels, stored, dataset)
    return pixels, flags, header


# --- the object ---------------------------------------------------------------------------------------------------


def _parse(data: bytes, max_bytes: int, deadline: float) -> Any:
    """Parse DICOM bytes, with or without the preamble, and without letting a deflated object grow past `max_bytes`."""
    import pydicom
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if DEFLATED in data[132:4096]:
        data = _inflated(data, max_bytes)
    dataset = pydicom.dcmread(TimedBytes(data, deadline), force=True)
    if not getattr(dataset, "file_meta", None) or "TransferSyntaxUID" not in dataset.file_meta:
        if data[128:132] == b"DICM":
            raise UnreadableImage("the DICOM header does not say how the pixels are stored (TransferSyntaxUID)")
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.ensure_file_meta()
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return dataset


def _inflated(data: bytes, max_bytes: int) -> bytes:
    """Rewrite a deflated object as plain explicit little endian, if that is not too long."""
    start = 144 + int.from_bytes(data[140:144], "little")  # the first element, (0002,0000), is the length of its group
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    body = inflater.decompress(data[start:], max_bytes)
    if not inflater.eof:
        raise UnreadableImage("the deflated DICOM object is cut, or inflates to more than is allowed")
    return data[:start].replace(DEFLATED, EXPLICIT, 1) + body


def _header(dataset: Any) -> dict[str, str]:
    """Take the few header fields that are kept, as printable text of at most 64 characters."""
    fields = {}
    for name in HEADER_FIELDS:
        value = dataset.get(name)
        text = "" if value is None else printable(str(value).strip())[:64]
        if text:
            fields[name] = text
    return fields


def _about(dataset: Any, header: dict[str, str]) -> list[str]:
    """Refuse what is no radiograph; flag what may not be a frontal chest film."""
    modality = header.get("Modality", "").upper()
    if "PixelData" not in dataset:
        what = {"SR": "a structured report", "PR": "a presentation state", "DOC": "a document (PDF)"}.get(modality)
        what = "a document (PDF)" if "EncapsulatedDocument" in dataset else what
        what = what or (f"a {modality} object" if modality else "a DICOM object")
        raise UnreadableImage(f"it is {what} without pixels, not a radiograph")
    if modality not in RADIOGRAPHY + PERHAPS_RADIOGRAPHY:
        raise UnreadableImage(f"it is a {modality} image, not a radiograph (CR, DX or RG)")
    body = header.get("BodyPartExamined", "").upper()
    view = header.get("ViewPosition", "").upper()
    found = {
        "modality": modality not in RADIOGRAPHY,
        "body-part": bool(body) and not any(part in body for part in CHEST),
        "lateral": view in LATERAL,
        "burned-in-annotation": str(dataset.get("BurnedInAnnotation", "")).upper() == "YES",
    }
    return [flag for flag, raised in found.items() if raised]


# --- the pixels ---------------------------------------------------------------------------------------------------


def _stored_values(dataset: Any, frame: int, max_pixels: int) -> np.ndarray:
    """Decode one frame: integers (H, W), or (H, W, 3) in RGB."""
    from pydicom.encaps import get_frame
    from pydicom.pixels import apply_color_lut, get_decoder

    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_transfer_syntax or (syntax.is_compressed and syntax not in (*DECODERS, *LIBJPEG_TURBO)):
        name = printable(str(syntax.name)) if syntax.is_transfer_syntax else "unknown"
        raise UnreadableImage(f"its pixels are compressed in a way that is not read here ({name}); decompress it first")
    if syntax.is_encapsulated:
        code = get_frame(dataset.PixelData, frame, number_of_frames=int(dataset.get("NumberOfFrames") or 1))
        _check_codestream(code, dataset, max_pixels)
    if syntax in LIBJPEG_TURBO:
        stored = _jpeg_values(code, dataset)
    else:
        stored, _ = get_decoder(syntax).as_array(dataset, index=frame, decoding_plugin=DECODERS.get(syntax, ""))
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
    if stored.ndim not in (2, 3) or (stored.ndim == 3 and stored.shape[2] != 3):
        raise UnreadableImage(f"its pixels have the shape {stored.shape}, which is no picture")
    return stored


def _jpeg_values(code: bytes, dataset: Any) -> np.ndarray:
    """Decode extended or lossless JPEG to the integers that BitsStored and PixelRepresentation mean."""
    import imagecodecs

    bits = dataset.BitsStored
    stored = imagecodecs.jpeg8_decode(code).astype(np.int32) & (2**bits - 1)
    if dataset.PixelRepresentation == 1:
        stored -= (stored >= 2 ** (bits - 1)) * np.int32(2**bits)
    return stored


def _check_codestream(code: bytes, dataset: Any, max_pixels: int) -> None:
    """Refuse compressed pixels that are cut or do not agree with the header.

    Decoders in C believe both, and some write past the end of their buffers when the two differ.
    """
    if dataset.file_meta.TransferSyntaxUID == RLE:
        return
    if code.startswith(b"\xff\xd8"):
        process, precision, rows, columns, components = raster.jpeg_frame(code)
        if process in raster.DCT and precision == 8:
            raster.check_jpeg(code, max_pixels)
    elif (start := code[:200].find(b"\xff\x4f\xff\x51")) >= 0:  # JPEG 2000: SIZ follows SOC
        right, bottom, left, top = struct.unpack(">4I", code[start + 8 : start + 24])
        columns, rows = right - left, bottom - top
        components, precision = struct.unpack(">HB", code[start + 40 : start + 43])
        precision = (precision & 0x7F) + 1
    else:
        raise UnreadableImage("its compressed pixels are damaged at their beginning; copy it again")
    if (columns, rows, components) != (dataset.Columns, dataset.Rows, dataset.SamplesPerPixel):
        raise UnreadableImage("its compressed pixels have another size than its header says; export it again")
    if not 2 <= precision <= min(16, dataset.BitsAllocated):
        raise UnreadableImage(f"its compressed pixels have {precision} bits, its header allows {dataset.BitsAllocated}")
    if b"\xff\xd9" not in code[-64:]:
        raise UnreadableImage("its compressed pixels end early; copy it again")


def _displayed(stored: np.ndarray, dataset: Any) -> tuple[np.ndarray, list[str]]:
    """Apply the modality LUT and the first VOI LUT or window: float32 (H, W) in [0, 1]."""
    from pydicom.pixels import apply_modality_lut
    from pydicom.pixels.processing import apply_voi

    values = stored
    if dataset.get("ModalityLUTSequence"):
        values = apply_modality_lut(stored, dataset)
    else:
        slope, intercept = _number(dataset, "RescaleSlope", 1.0), _number(dataset, "RescaleIntercept", 0.0)
        if not np.isfinite([slope, intercept]).all() or slope == 0:
            raise UnreadableImage(f"its rescaling makes no sense (slope {slope:g}, intercept {intercept:g})")
        if (slope, intercept) != (1.0, 0.0):
            values = stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    if dataset.get("VOILUTSequence"):
        looked_up = apply_voi(values.astype(np.int64) if values.dtype.kind == "f" else values, dataset)
        return raster.scale(looked_up), []
    centre, width = _number(dataset, "WindowCenter", None), _number(dataset, "WindowWidth", None)
    if centre is None and width is None:
        return raster.scale(values), []
    if centre is not None and width is not None and np.isfinite([centre, width]).all() and width > 0:
        pixels = _windowed(values, centre, width, str(dataset.get("VOILUTFunction") or "LINEAR"))
        if float(pixels.max()) - float(pixels.min()) > 0.02:
            return pixels, []
    return raster.scale(values), ["window-ignored"]


def _windowed(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Apply a window by the formulas of DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3: float32 in [0, 1]."""
    pixels = values.astype(np.float32)
    if function == "SIGMOID":
        pixels -= np.float32(centre)
        pixels *= np.float32(-4 / width)
        np.exp(np.clip(pixels, -80, 80, out=pixels), out=pixels)
        pixels += 1
        return np.reciprocal(pixels, out=pixels)
    if function != "LINEAR_EXACT":  # LINEAR counts in whole grey levels
        centre, width = centre - 0.5, max(width - 1, 1e-3)
    pixels -= np.float32(centre - width / 2)
    pixels /= np.float32(width)
    return np.clip(pixels, 0, 1, out=pixels)


def _number(dataset: Any, name: str, absent: Any) -> Any:
    """Read a decimal header value, the first if there are several."""
    value = dataset.get(name)
    if value is not None and not isinstance(value, str | float | int):
        value = next(iter(value), None)
    return absent if value is None or value == "" else float(value)


def _luminance(rgb: np.ndarray) -> tuple[np.ndarray, bool]:
    """Turn integers (H, W, 3) into float32 (H, W) in [0, 1], and tell whether they had a colour."""
    step = max(1, min(rgb.shape[:2]) // 128)
    coloured = judge.is_coloured(raster.scale(rgb[::step, ::step]))
    top = max(int(rgb.max()), 255)
    pixels = np.zeros(rgb.shape[:2], np.float32)
    for channel, weight in enumerate((0.299, 0.587, 0.114)):  # ITU-R BT.601, as Pillow weighs them
        pixels += rgb[:, :, channel] * np.float32(weight / top)
    return np.clip(pixels, 0, 1, out=pixels), coloured


def _set_polarity(pixels: np.ndarray, dataset: Any, flags: list[str]) -> None:
    """Make bone white, in place: as the tags say, unless the pixels surely say otherwise, and then flag it."""
    tags = dataset.get("PhotometricInterpretation"), dataset.get("PresentationLUTShape")
    tagged = tags[0] == "MONOCHROME1" or tags[1] == "INVERSE"
    small = resize(pixels, judge.SMALL)
    surely_inverted = judge.looks_inverted(1 - small if tagged else small, judge.SURELY_INVERTED)
    wrong = surely_inverted and "body-part" not in flags
    if tagged != wrong:
        np.subtract(1, pixels, out=pixels)
    if wrong:
        flags.append("polarity-tag-wrong")


def _blacken_padding(pixels: np.ndarray, stored: np.ndarray, dataset: Any) -> None:
    """Make the pixels that the header calls padding black, as air is."""
    first = dataset.get("PixelPaddingValue")
    if not isinstance(first, int) or stored.shape != pixels.shape:
        return
    last = dataset.get("PixelPaddingRangeLimit")
    last = last if isinstance(last, int) else first
    low, high = min(first, last), max(first, last)
    pixels[(stored >= low) & (stored <= high)] = 0
