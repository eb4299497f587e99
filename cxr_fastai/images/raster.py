"""Picture files (PNG, JPEG, TIFF, BMP, WebP, GIF, JPEG 2000, AVIF, PGM) as grey pixels, read strictly.

Pillow decodes; this module looks first. The format is what the bytes say; a PNG's chunks are walked and its pixel data
inflated without being kept; a JPEG must decode without a warning. So a file that was cut, damaged or made to
exhaust the memory is refused before Pillow allocates anything.
"""

import contextlib
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from cxr_fastai.errors import NoSuchFrame, UnreadableImage
from cxr_fastai.images import judge
from cxr_fastai.images.guard import TimedBytes, quiet_in_c

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PARTS = 50_000  # PNG chunks or JPEG markers; a film has a few thousand at most
DCT = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)  # markers of the lossy JPEG processes
MAX_SCANS = 64  # of a progressive JPEG; encoders write about ten
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def sniff(data: bytes) -> str | None:
    """Name the Pillow format that the first bytes belong to, or None."""
    for magic, name in (
        (SIGNATURE, "PNG"),
        (b"\xff\xd8\xff", "JPEG"),
        (b"II*\0", "TIFF"),
        (b"MM\0*", "TIFF"),
        (b"II+\0", "TIFF"),
        (b"MM\0+", "TIFF"),
        (b"GIF87a", "GIF"),
        (b"GIF89a", "GIF"),
        (b"BM", "BMP"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
        (b"\xff\x4f\xff\x51", "JPEG2000"),
        (b"P4", "PPM"),
        (b"P5", "PPM"),
        (b"P6", "PPM"),
    ):
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "AVIF"
    return None


KNOWN = {  # what people hand over instead of a film, so that the message can name it; lower case
    b"%pdf": "a PDF",
    b"pk": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"<svg": "an SVG drawing",
    b"<?xml": "an XML file",
    b"version https://git-lfs": "a Git LFS pointer",
    b"%!ps": "a PostScript program",
    b"\x93numpy": "a NumPy array",
    b"\x80\x04": "a Python pickle",
    b"\x7felf": "a program",
}


def read(data: bytes, max_pixels: int, frame: int | None, deadline: float) -> tuple[np.ndarray, list[str]]:
    """Read one picture of a raster file: float32 (H, W) in [0, 1], and flags; see `images.read_film`."""
    kind = sniff(data)
    if kind is None:
        start = data[:64].lstrip().lower()
        what = next((name for magic, name in KNOWN.items() if start.startswith(magic)), None)
        raise UnreadableImage(f"it is {what}, not a picture" if what else "it is no picture format that we know")
    if kind == "PNG":
        data, animated = clean_png(data, max_pixels)
    elif kind == "JPEG":
        check_jpeg(data, max_pixels)
    prints = quiet_in_c if kind == "TIFF" else contextlib.nullcontext()
    with prints, Image.open(TimedBytes(data, deadline), formats=[kind]) as image:
        check_size(*image.size, max_pixels)
        _check_tiles(image, max_pixels)
        flags = ["multi-frame"] if getattr(image, "is_animated", False) or (kind == "PNG" and animated) else []
        if frame:
            try:
                image.seek(frame)
            except (EOFError, ValueError):
                raise NoSuchFrame(f"it has no frame number {frame}") from None
            check_size(*image.size, max_pixels)
        image.load()
        pixels, more = _grey(image)
        pixels = _upright(pixels, _orientation(image))
    return pixels, flags + more


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Refuse what is too large to decode, and what has no extent that could be a film."""
    if width * height > max_pixels:
        raise UnreadableImage(f"{width} × {height} pixels are more than the {max_pixels:,} allowed")
    if min(width, height) < 16:
        raise UnreadableImage(f"{width} × {height} pixels are too few for a radiograph")
    if max(width, height) > 8 * min(width, height):
        raise UnreadableImage(f"{width} × {height} pixels are a strip, not a radiograph")


def _check_tiles(image: Image.Image, max_pixels: int) -> None:
    """Refuse a TIFF whose tiles are larger than the picture may be: each is allocated whole."""
    tags = getattr(image, "tag_v2", None)
    if tags and int(tags.get(322, 0)) * int(tags.get(323, 0)) > max_pixels:
        raise UnreadableImage("its tiles are larger than a radiograph")


# --- PNG and JPEG, looked through before Pillow sees them ---------------------------------------------------------


def clean_png(data: bytes, max_pixels: int) -> tuple[bytes, bool]:
    """Check a PNG to the last byte; return it with only the chunks that make the picture, and whether it is animated.

    Text and colour profiles are left out: both can inflate to any size, and neither changes a grey film.

    Raises
    ------
    UnreadableImage
        If a chunk is cut or fails its CRC, or the pixel data are not exactly what the header promises.
    """
    position, idat, kept, animated = len(SIGNATURE), [], [], False
    for _ in range(MAX_PARTS):
        if position + 12 > len(data):
            raise UnreadableImage("the PNG ends early; copy it again")
        length, name = struct.unpack(">I4s", data[position : position + 8])
        end = position + 12 + length
        if end > len(data):
            raise UnreadableImage("the PNG ends early; copy it again")
        body = memoryview(data)[position + 8 : end - 4]
        if name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"):
            if zlib.crc32(body, zlib.crc32(name)) != int.from_bytes(data[end - 4 : end], "big"):
                raise UnreadableImage(f"the PNG is damaged (checksum of {name.decode()}); copy it again")
            kept.append(data[position:end])
            if name == b"IDAT":
                idat.append(body)
        animated |= name == b"acTL"
        position = end
        if name == b"IEND":
            break
    else:
        raise UnreadableImage(f"the PNG has more than {MAX_PARTS:,} chunks; export it again")
    _check_pixel_data(kept[0], idat, max_pixels)
    return SIGNATURE + b"".join(kept), animated


def _check_pixel_data(ihdr: bytes, idat: list[memoryview], max_pixels: int) -> None:
    """Inflate a PNG's pixel data without keeping them, and compare their length with what the header promises."""
    if ihdr[4:8] != b"IHDR" or len(ihdr) != 25:
        raise UnreadableImage("the PNG does not start with its header; export it again")
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", ihdr[8:21])
    check_size(width, height, max_pixels)
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 0)
    passes = [(0, 0, 1, 1)]
    if interlaced:  # Adam7: first column, first row, column step, row step
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    promised = 0
    for x, y, dx, dy in passes:
        columns, rows = -(-(width - x) // dx), -(-(height - y) // dy)
        promised += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
    inflater, found = zlib.decompressobj(), 0
    for part in idat:
        rest: bytes | memoryview = part
        while rest and found <= promised and not inflater.eof:
            found += len(inflater.decompress(rest, 1 << 20))
            rest = inflater.unconsumed_tail
    if found < promised:
        raise UnreadableImage(f"the PNG holds only {found / max(promised, 1):.0%} of its pixels; copy it again")


def check_jpeg(data: bytes, max_pixels: int) -> None:
    """Refuse a JPEG that does not decode without a single warning.

    libjpeg fills what is missing with grey and goes on, and Pillow hides its warnings. So it is decoded once at an
    eighth of its size by the same library with warnings as errors, which reads the whole entropy-coded stream.
    """
    import simplejpeg

    frame = jpeg_frame(data)
    check_size(frame.width, frame.height, max_pixels)
    if (
        frame.process not in DCT or frame.precision != 8
    ):  # lossless cannot be scaled: simplejpeg would write past its buffer
        raise UnreadableImage("it is a JPEG of a kind that is read in DICOM only (lossless or 12 bits)")
    scans = data.count(b"\xff\xda")
    if scans > MAX_SCANS:
        raise UnreadableImage(f"the JPEG has {scans} scans; export it again")
    try:
        space = simplejpeg.decode_jpeg_header(data)[2]
        space = {"Gray": "GRAY", "CMYK": "CMYK", "YCCK": "CMYK"}.get(space, "RGB")
        simplejpeg.decode_jpeg(data, colorspace=space, min_height=1, min_width=1, min_factor=8)
    except ValueError as error:
        if "subsampling" in str(error):
            raise UnreadableImage(
                "the JPEG has a colour subsampling that cannot be checked; export it as PNG"
            ) from None
        raise UnreadableImage(f"the JPEG is damaged ({error}); copy it again") from None


class JpegFrame(NamedTuple):
    """What the frame header of a JPEG or JPEG-LS says; `process` is its marker."""

    process: int
    precision: int
    height: int
    width: int
    components: int


def jpeg_frame(data: bytes) -> JpegFrame:
    """Walk the markers of a JPEG up to its first scan, more strictly than decoders do, and read the frame header."""
    position, found = 2, None
    for _ in range(MAX_PARTS):
        if position + 10 > len(data) or data[position] != 0xFF:
            break
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == 0xDA and found:
            return found
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            found = JpegFrame(marker, *struct.unpack(">BHHB", data[position + 4 : position + 10]))
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if length < 2 or marker == 0x01 or 0xD0 <= marker <= 0xD9:  # where decoders might see other markers than we do
            break
        position += 2 + length
    raise UnreadableImage("the JPEG is damaged before its pixels begin; copy it again")


# --- from Pillow's modes to one grey scale ------------------------------------------------------------------------


def _grey(image: Image.Image) -> tuple[np.ndarray, list[str]]:
    """Turn any Pillow mode into float32 (H, W) in [0, 1], with the flags that the mode gives."""
    if image.mode == "1":
        return np.asarray(image).astype(np.float32), []
    if image.mode in DEEP_MODES:
        pixels = scale(np.asarray(image))
        white_is_zero = getattr(image, "tag_v2", {}).get(262) == 0
        return (1 - pixels if white_is_zero else pixels), []
    if image.mode not in ("L", "RGB"):
        alpha = image.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in image.info
        if alpha:  # over black: what is transparent has no pixels to show
            rgba = image.convert("RGBA")
            image = Image.new("RGB", image.size)
            image.paste(rgba, mask=rgba.getchannel("A"))
        else:
            image = image.convert("RGB")
    flags = (
        ["colour"]
        if image.mode == "RGB"
        and judge.is_coloured(np.asarray(image.resize((128, 128), Image.Resampling.BOX, reducing_gap=2.0)))
        else []
    )
    return np.asarray(image.convert("L")).astype(np.float32) / np.float32(255), flags


def scale(values: np.ndarray) -> np.ndarray:
    """Scale deep pixels by their real depth, which the file does not tell: the least usual one that holds the maximum.

    Parameters
    ----------
    values : numpy.ndarray
        Integers or floats (H, W).

    Returns
    -------
    numpy.ndarray
        float32 (H, W) in [0, 1]: 12-bit values in a 16-bit file are divided by 4095.
    """
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low) or not np.isfinite(high):
        raise UnreadableImage("some pixels are not numbers (NaN or infinite); export it again")
    low = min(low, 0.0)
    integers = np.issubdtype(values.dtype, np.integer)
    tops = [2.0**bits - 1 for bits in (8, 10, 12, 14, 16, 24, 32)] if integers else [1.0, 255.0, 4095.0, 65535.0]
    top = next((t for t in tops if high - low <= t), high - low)
    pixels = values.astype(np.float32)
    pixels -= np.float32(low)
    pixels /= np.float32(top)
    return np.clip(pixels, 0, 1, out=pixels)


def _orientation(image: Image.Image) -> int:
    """Read the EXIF orientation, 1 (upright) to 8; 1 where it is absent or makes no sense."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # noqa: BLE001 - EXIF may hold anything, and a film is not refused for it
        return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (H, W) as EXIF says it should be viewed."""
    turned = {
        2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1], 5: lambda p: p.T,
        6: lambda p: np.rot90(p, -1), 7: lambda p: p[::-1, ::-1].T, 8: lambda p: np.rot90(p),
    }.get(orientation)  # fmt: skip
    return np.ascontiguousarray(turned(pixels)) if turned else pixels
