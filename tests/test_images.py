"""Facts about reading picture files: the same film in any encoding is the same pixels; what is no film is refused."""

import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from cxr_fastai.errors import UnreadableImage
from cxr_fastai.images import (
    FLAGS,
    Limits,
    equalise,
    judge,
    looks_like_film,
    read_film,
    read_radiograph,
    resize,
    to_input,
)
from cxr_fastai.images.guard import printable

SHARED = Path(__file__).parents[2] / "shared"


def chest(size: int = 256) -> np.ndarray:
    """Make a crude frontal chest: uint8 (size, size), bone white."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    body = 120 * (np.abs(x) < 0.88 - 0.25 * (y < -0.7))
    lungs = np.exp(-(((np.abs(x) - 0.42) / 0.24) ** 4) - ((y + 0.1) / 0.6) ** 4)
    spine = 70 * np.exp(-((x / 0.13) ** 2))
    belly = 60 / (1 + np.exp(-(y - 0.55) * 12))
    ribs = 10 * np.sin(22 * (y + 0.3 * x**2)) * lungs
    noise = np.random.default_rng(1).normal(0, 2, (size, size))
    return np.clip(25 + body - 85 * lungs + spine + belly * (body > 0) + ribs + noise, 0, 255).astype(np.uint8)


CHEST = chest()


def saved(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def difference(data: bytes, expected: np.ndarray = CHEST) -> float:
    """Mean absolute difference on the 8-bit scale."""
    return float(np.abs(read_radiograph(data) * 255 - expected).mean())


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, rows: bytes, *extra: bytes, depth: int = 8, colour: int = 0) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


GREY = Image.fromarray(CHEST)
RGB = GREY.convert("RGB")
ENCODINGS = {
    "png": (saved(GREY, "PNG"), 0),
    "rgb png": (saved(RGB, "PNG"), 0),
    "rgba png": (saved(GREY.convert("RGBA"), "PNG"), 0),
    "la png": (saved(GREY.convert("LA"), "PNG"), 0),
    "palette png": (saved(GREY.convert("P"), "PNG"), 0),
    "16 bits, full range": (saved(CHEST.astype(np.uint16) * 257, "PNG"), 0.01),
    "12 bits in 16": (saved(CHEST.astype(np.uint16) * 16, "PNG"), 0.6),
    "10 bits in 16": (saved(CHEST.astype(np.uint16) * 4, "PNG"), 0.5),
    "big-endian tiff": (saved(Image.frombytes("I;16B", (256, 256), (CHEST * np.uint16(257)).byteswap()), "TIFF"), 0.01),
    "32-bit tiff": (saved(CHEST.astype(np.int32) * 257, "TIFF"), 0.01),
    "float tiff, 0 to 1": (saved(CHEST.astype(np.float32) / 255, "TIFF"), 0.01),
    "float tiff, 0 to 255": (saved(CHEST.astype(np.float32), "TIFF"), 0.01),
    "tiff": (saved(GREY, "TIFF"), 0),
    "lzw tiff": (saved(GREY, "TIFF", compression="tiff_lzw"), 0),
    "jpeg tiff": (saved(RGB, "TIFF", compression="jpeg", quality=95), 1.5),
    "jpeg": (saved(GREY, "JPEG", quality=95), 1.5),
    "rgb jpeg": (saved(RGB, "JPEG", quality=95), 1.5),
    "progressive jpeg": (saved(GREY, "JPEG", quality=95, progressive=True), 1.5),
    "cmyk jpeg": (saved(RGB.convert("CMYK"), "JPEG", quality=95), 1.5),
    "jpeg 2000": (saved(GREY, "JPEG2000"), 0),
    "webp": (saved(RGB, "WEBP", lossless=True), 0),
    "avif": (saved(RGB, "AVIF", quality=95), 2),
    "bmp": (saved(GREY, "BMP"), 0),
    "gif": (saved(GREY, "GIF"), 0.01),
    "pgm": (saved(GREY, "PPM"), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODINGS)
def test_any_encoding_gives_the_same_pixels_and_no_flag(name: str) -> None:
    data, tolerance = ENCODINGS[name]
    film = read_film(data)
    assert film.pixels.dtype == np.float32
    assert film.pixels.shape == (256, 256)
    assert film.flags == ()
    assert dict(film.header) == {}
    assert difference(data) <= tolerance


@pytest.mark.parametrize("name", ENCODINGS)
def test_any_encoding_gives_the_same_input(name: str) -> None:
    reference = to_input(read_radiograph(ENCODINGS["png"][0]), 224)
    assert np.abs(to_input(read_radiograph(ENCODINGS[name][0]), 224) - reference).mean() < 0.01


def test_white_is_zero_tiff_is_turned_at_8_and_at_16_bits() -> None:
    for pixels in (255 - CHEST, 65535 - CHEST.astype(np.uint16) * 257):
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        data = bytearray(saved(pixels, "TIFF", tiffinfo=tags))
        place = data.find(struct.pack("<HHI", 262, 3, 1))
        data[place + 8 : place + 12] = struct.pack("<I", 0)
        assert difference(bytes(data)) < 0.01


def test_what_is_transparent_is_black() -> None:
    rgba = np.dstack([CHEST] * 3 + [np.full_like(CHEST, 255)])
    rgba[:, :8] = (255, 0, 255, 0)
    pixels = read_radiograph(saved(rgba, "PNG"))
    assert pixels[:, :8].max() == 0
    assert np.abs(pixels[:, 8:] * 255 - CHEST[:, 8:]).max() < 0.01


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(kind: str) -> None:
    stored = {2: CHEST[:, ::-1], 3: CHEST[::-1, ::-1], 4: CHEST[::-1], 5: CHEST.T, 6: np.rot90(CHEST)}
    stored |= {7: CHEST[::-1, ::-1].T, 8: np.rot90(CHEST, -1), 99: CHEST}
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"lossless": True} if kind == "WEBP" else {"quality": 98} if kind == "JPEG" else {}
        data = saved(Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB"), kind, exif=exif, **options)
        assert difference(data) < 1, orientation


def test_path_bytes_and_open_file_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a\nb.png"
    path.write_bytes(ENCODINGS["png"][0])
    with path.open("rb") as file:
        films = [read_film(path), read_film(str(path)), read_film(path.read_bytes()), read_film(file)]
    assert len({film.pixels.tobytes() for film in films}) == 1


# --- flags --------------------------------------------------------------------------------------------------------

NOISE = np.random.default_rng(0).integers(0, 256, (256, 256), dtype=np.uint8)
HALF = np.where(np.arange(256) < 128, CHEST, 0).astype(np.uint8)
BOX = np.dstack([CHEST] * 3)
BOX[:60, :60] = (255, 0, 0)
FLAGGED = {
    "inverted?": [255 - CHEST],
    "sideways?": [np.rot90(CHEST).copy(), np.rot90(CHEST, -1).copy()],
    "colour": [BOX],
    "tiny": [chest(48)],
    "aspect": [np.asarray(GREY.resize((512, 128)))],
    "few-grey-levels": [(CHEST // 12).astype(np.uint8), np.asarray(GREY.convert("1"))],
    "clipped": [np.clip(CHEST.astype(int) * 3, 0, 255).astype(np.uint8)],
    "half-empty": [HALF],
    "no-anatomy": [NOISE, np.tile(np.arange(256, dtype=np.uint8), (256, 1))],
}


@pytest.mark.parametrize("flag", FLAGGED)
def test_doubtful_films_are_flagged(flag: str) -> None:
    for pixels in FLAGGED[flag]:
        assert flag in read_film(saved(pixels, "PNG")).flags


def test_an_inverted_picture_is_left_as_it_is() -> None:
    assert difference(saved(255 - CHEST, "PNG"), 255 - CHEST) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_of_several_pictures_the_first_is_read_and_flagged(kind: str) -> None:
    other = Image.fromarray(CHEST[::-1].copy()).convert("RGB")
    data = saved(RGB, kind, save_all=True, append_images=[other], **({"lossless": True} if kind == "WEBP" else {}))
    film = read_film(data)
    assert film.flags == ("multi-frame",)
    assert np.abs(film.pixels * 255 - CHEST).mean() < 1


def test_another_picture_can_be_asked_for() -> None:
    data = saved(GREY, "TIFF", save_all=True, append_images=[Image.fromarray(CHEST[::-1].copy())])
    assert np.abs(read_film(data, frame=1).pixels * 255 - CHEST[::-1]).max() < 0.01
    with pytest.raises(UnreadableImage, match="no frame number 2"):
        read_film(data, frame=2)


def test_every_flag_is_explained() -> None:
    assert all(flag in FLAGS for flag in FLAGGED)
    assert all(text.isprintable() and flag == flag.lower() for flag, text in FLAGS.items())


# --- refusals -----------------------------------------------------------------------------------------------------

PNG, JPEG = ENCODINGS["png"][0], ENCODINGS["jpeg"][0]
ROWS = b"".join(b"\0" + row.tobytes() for row in CHEST)
FLOATS = CHEST.astype(np.float32) / 255
FLOATS[3, 4] = np.nan
REFUSED = {
    "empty": (b"", "the file is empty"),
    "text": (b"this is not an image" * 9, "no picture format that we know"),
    "pdf": (b"%PDF-1.7 ...", "a PDF, not a picture"),
    "web page": (b"<!DOCTYPE html><html>404", "a web page, not a picture"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "a PostScript program"),
    "flat": (saved(np.full((64, 64), 7, np.uint8), "PNG"), "all its pixels are alike"),
    "8 pixels": (saved(CHEST[:8, :8], "PNG"), "8 × 8 pixels are too few"),
    "strip": (saved(np.resize(CHEST, (20, 2000)), "PNG"), "2000 × 20 pixels are a strip"),
    "half a png": (PNG[: len(PNG) // 2], "the PNG ends early"),
    "half the rows": (png(256, 256, ROWS[: len(ROWS) // 2]), "holds only 50% of its pixels"),
    "flipped byte": (PNG[:3000] + bytes([PNG[3000] ^ 1]) + PNG[3001:], r"checksum of IDAT"),
    "no header": (PNG[:8] + PNG[33:], "does not start with its header"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "Premature end of JPEG file"),
    "jpeg with a zeroed tail": (JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2), "the JPEG is damaged"),
    "jpeg with other bytes": (JPEG[:5000] + bytes(x ^ 90 for x in JPEG[5000:5064]) + JPEG[5064:], "JPEG is damaged"),
    "half a tiff": (ENCODINGS["lzw tiff"][0][:9000], "damaged or cut short"),
    "half a bmp": (ENCODINGS["bmp"][0][:9000], "damaged or cut short"),
    "half a webp": (ENCODINGS["webp"][0][:9000], "damaged or cut short"),
    "half a gif": (ENCODINGS["gif"][0][:9000], "damaged or cut short"),
    "half a jp2": (ENCODINGS["jpeg 2000"][0][:9000], "damaged or cut short"),
    "nan": (saved(FLOATS, "TIFF"), "not numbers"),
    "declared bomb": (png(30000, 30000, bytes(100)), "30000 × 30000 pixels are more than the 25,000,000 allowed"),
    "jpeg bomb": (JPEG.replace(b"\x08\1\0\1\0", b"\x08\xff\xdc\xff\xdc"), "65500 × 65500 pixels are more than"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_sound_film_is_refused_in_one_line(name: str) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(UnreadableImage, match=reason) as refusal:
        read_film(data)
    assert str(refusal.value).isprintable()


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    # 26 million pixels of 64 bits: 208 MB when decoded. In a process of its own, so that its memory can be measured.
    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(bytes(5100 * 8 + 1) * 100) for _ in range(51)) + rows.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 5100, 5100, 16, 6, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    code = (
        "import sys, resource\nfrom cxr_fastai.images import read_film\nfrom cxr_fastai.errors import UnreadableImage\n"
        "try: read_film(sys.stdin.buffer)\nexcept UnreadableImage as error: print(error)\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    reason, kilobytes = done.stdout.decode().splitlines()
    assert "more than the 25,000,000 allowed" in reason
    assert int(kilobytes) < 150_000


def test_texts_that_inflate_are_left_out() -> None:
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 << 20), 9))
    assert difference(png(256, 256, ROWS, bomb)) < 1e-4


def test_limits_are_those_asked_for() -> None:
    with pytest.raises(UnreadableImage, match="more than the 1,000 allowed"):
        read_film(PNG, Limits(max_pixels=1000))
    with pytest.raises(UnreadableImage, match="larger than 100 bytes"):
        read_film(PNG, Limits(max_bytes=100))
    with pytest.raises(UnreadableImage, match="takes too long"):
        read_film(PNG, Limits(max_seconds=-1))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: p.mkdir(), "a folder, not a file"),
        (lambda p: os.mkfifo(p), "a device, not a file"),
        (lambda p: p.symlink_to("/dev/zero"), "a device, not a file"),
        (lambda p: p.symlink_to(p.name), "symbolic links"),
        (lambda p: None, "No such file"),
    ],
)
def test_what_is_no_file_is_refused_and_never_waited_for(make, reason: str, tmp_path: Path) -> None:
    make(tmp_path / "x.png")
    with pytest.raises(UnreadableImage, match=reason):
        read_film(tmp_path / "x.png")


def test_a_name_that_cannot_be_is_refused() -> None:
    with pytest.raises(UnreadableImage, match="name cannot be used"):
        read_film("a\0b.png")


def test_printable_escapes_what_a_terminal_would_obey() -> None:
    assert printable("a\x1b[31m\n\u202e\udcff胸") == r"a\x1b[31m\n\u202e\udcff胸"


def test_looks_like_film(tmp_path: Path) -> None:
    (tmp_path / "IM0001").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "1.2.840.113").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "README").write_bytes(b"x" * 200)
    names = ["IM0001", "1.2.840.113", "README", "a.PNG", "a.dcm", "a.txt", ".a.png", "gone"]
    assert [name for name in names if looks_like_film(tmp_path / name)] == ["IM0001", "1.2.840.113", "a.PNG", "a.dcm"]


def test_threads_may_read_at_once_and_warnings_are_as_before() -> None:
    import logging
    import warnings

    before = list(warnings.filters), logging.getLogger("PIL").level
    tiff = ENCODINGS["lzw tiff"][0]
    got: list[float] = []
    threads = [threading.Thread(target=lambda: got.extend(difference(tiff) for _ in range(10))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 80
    assert max(got) < 1e-4
    assert (list(warnings.filters), logging.getLogger("PIL").level) == before


def test_nothing_is_printed(capfd: pytest.CaptureFixture) -> None:
    for data, _ in REFUSED.values():
        with pytest.raises(UnreadableImage):
            read_film(data)
    assert capfd.readouterr() == ("", "")


# --- tone and size ------------------------------------------------------------------------------------------------

FILM = CHEST.astype(np.float32) / 255


def test_to_input_has_the_size_and_range_asked_for() -> None:
    result = to_input(FILM[:, :200], 224)
    assert result.shape == (224, 224)
    assert result.dtype == np.float32
    assert result.min() == 0
    assert result.max() == 1
    assert result.mean() == pytest.approx(0.5, abs=0.005)


def test_a_film_of_the_right_size_is_not_resized() -> None:
    assert resize(FILM, 256) is FILM
    assert np.array_equal(to_input(FILM, 256), equalise(FILM))


def test_resizing_averages_and_does_not_overshoot() -> None:
    step = np.zeros((512, 512), np.float32)
    step[:, 256:] = 1
    small = resize(step, 64)
    assert small.min() == 0
    assert small.max() == 1
    assert small.mean() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        (lambda f: f / 16, 1e-4),
        (lambda f: f / 2 + 0.2, 1e-4),
        (lambda f: f**0.6, 0.006),
        (lambda f: f**1.6, 0.01),
        (lambda f: np.clip(f, *np.percentile(f, (1, 99))), 0.001),
        (lambda f: np.round(f * 255) / 255, 1e-4),
    ],
)
def test_equalise_undoes_changes_of_tone(change, tolerance: float) -> None:
    assert np.abs(equalise(change(FILM).astype(np.float32)) - equalise(FILM)).mean() < tolerance


def test_equalise_is_monotone_and_survives_a_constant() -> None:
    ramp = np.linspace(0, 1, 10_000, dtype=np.float32)
    assert (np.diff(equalise(ramp)) >= 0).all()
    assert (equalise(np.full((8, 8), 0.3, np.float32)) == 0).all()


# --- real films ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.exists(), reason="../shared holds the real films")
def test_real_films_are_not_called_inverted_and_inverted_ones_are() -> None:
    paths = (
        sorted((SHARED / "data/real-cxr").rglob("*.jp*g"))[::20]
        + sorted((SHARED / "data/real-cxr").rglob("*.png"))[::20]
    )
    films = [read_radiograph(path) for path in paths]
    assert len(films) > 50
    assert not [path for path, film in zip(paths, films, strict=True) if judge.looks_inverted(film)]
    assert np.mean([judge.looks_inverted(1 - film) for film in films]) > 0.97


@pytest.mark.long
@pytest.mark.skipif(not SHARED.exists(), reason="../shared holds the corpus")
def test_the_hand_made_corpus_is_read_as_its_list_asks(tmp_path: Path) -> None:
    make = SHARED / "badinputs/make_handmade.py"
    subprocess.run([sys.executable, "-W", "ignore", make, tmp_path / "made"], check=True, capture_output=True)
    bench = [sys.executable, "bench/badinputs.py", "--handmade", str(tmp_path / "made")]
    done = subprocess.run(bench, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == 0, done.stdout + done.stderr
