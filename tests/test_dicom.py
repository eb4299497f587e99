"""Facts about reading DICOM: the same film in any encoding, window or polarity; what is no radiograph is refused."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_images import CHEST, SHARED, saved

from cxr_fastai.errors import UnreadableImage
from cxr_fastai.images import Limits, read_film, read_radiograph, to_input
from cxr_fastai.images.dicom import HEADER_FIELDS

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from pydicom.uid import UID  # noqa: E402

SYNTAX = {
    "implicit": "1.2.840.10008.1.2",
    "explicit": "1.2.840.10008.1.2.1",
    "deflated": "1.2.840.10008.1.2.1.99",
    "big endian": "1.2.840.10008.1.2.2",
    "baseline": "1.2.840.10008.1.2.4.50",
    "extended": "1.2.840.10008.1.2.4.51",
    "lossless": "1.2.840.10008.1.2.4.70",
    "jpeg-ls": "1.2.840.10008.1.2.4.80",
    "jpeg 2000": "1.2.840.10008.1.2.4.90",
    "rle": "1.2.840.10008.1.2.5",
}
DEEP = CHEST.astype(np.uint16) * 16  # 12 bits
WINDOW = {"WindowCenter": 2048, "WindowWidth": 4096}
INVERSE = {"PhotometricInterpretation": "MONOCHROME1"}


def dicom(pixels: np.ndarray | None = DEEP, syntax: str = "explicit", bits: int = 12, **tags) -> bytes:
    """Write one DX object; `tags` are set last, and None takes a tag out."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = UID(SYNTAX["explicit"])
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    data.PatientName, data.PatientID, data.PatientBirthDate = "Doe^Jane", "P001", "19700101"
    data.PatientSex, data.PatientAge, data.InstitutionName = "F", "054Y", "St Elsewhere"
    data.Modality, data.BodyPartExamined, data.ViewPosition = "DX", "CHEST", "PA"
    if pixels is not None:
        data.Rows, data.Columns = pixels.shape[:2]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.PixelRepresentation = int(pixels.dtype.kind == "i")
        data.BitsAllocated, data.BitsStored, data.HighBit = pixels.dtype.itemsize * 8, bits, bits - 1
        data.PixelData = (pixels.byteswap() if syntax == "big endian" else pixels).tobytes()
        data["PixelData"].VR = "OW"
    for name, value in tags.items():
        if value is None:
            del data[name]
        else:
            setattr(data, name, value)
    if syntax in ("baseline", "extended", "lossless"):
        import imagecodecs

        options = {"bitspersample": bits, "lossless": syntax == "lossless"}
        data.PixelData = encapsulate([imagecodecs.jpeg8_encode(pixels, level=98, **options)])
        data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
    if syntax in ("jpeg-ls", "jpeg 2000", "rle"):
        data.compress(UID(SYNTAX[syntax]), generate_instance_uid=False)
    data.file_meta.TransferSyntaxUID = UID(SYNTAX[syntax])
    file = io.BytesIO()
    pydicom.dcmwrite(file, data, enforce_file_format=True)
    return file.getvalue()


def difference(data: bytes) -> float:
    """Mean absolute difference from the film, on the 8-bit scale."""
    return float(np.abs(read_radiograph(data) * 255 - CHEST).mean())


# --- one film, however it is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [name for name in SYNTAX if name != "baseline"])
def test_any_transfer_syntax_gives_the_same_pixels(syntax: str) -> None:
    film = read_film(dicom(syntax=syntax))
    assert film.flags == ()
    assert film.pixels.dtype == np.float32
    assert np.abs(film.pixels - DEEP / np.float32(4095)).mean() < (0.002 if syntax == "extended" else 1e-6)


@pytest.mark.parametrize("syntax", ["explicit", "baseline", "lossless", "jpeg-ls", "jpeg 2000", "rle"])
def test_eight_bits(syntax: str) -> None:
    assert difference(dicom(CHEST, syntax, bits=8)) < (1 if syntax == "baseline" else 1e-4)


@pytest.mark.parametrize("syntax", ["explicit", "lossless", "jpeg 2000"])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("window", [{}, WINDOW, {"WindowCenter": 1900, "WindowWidth": 3600}])
def test_syntax_polarity_and_window_hardly_change_the_input(syntax: str, inverse: bool, window: dict) -> None:
    pixels, tags = (4095 - DEEP, INVERSE) if inverse else (DEEP, {})
    if inverse and window:
        window = {**window, "WindowCenter": 4095 - window["WindowCenter"]}
    reference = to_input(read_radiograph(saved(CHEST, "PNG")), 224)
    film = read_film(dicom(pixels, syntax, **tags, **window))
    assert film.flags == ()
    clipped = window.get("WindowWidth", 4096) < 4096  # white for good: 4 % of the film
    assert np.abs(to_input(film.pixels, 224) - reference).mean() < (0.02 if clipped else 0.004)


def test_without_preamble_or_meta_header() -> None:
    data = dicom()
    assert difference(data[132:]) < 0.6
    meta = 144 + int.from_bytes(data[140:144], "little")
    assert difference(data[meta:]) < 0.6


# --- the pipeline of grey levels ----------------------------------------------------------------------------------

SAME = {
    "window": (DEEP, WINDOW),
    "two windows": (DEEP, {"WindowCenter": [2048, 100], "WindowWidth": [4096, 50]}),
    "exact window": (DEEP, {"WindowCenter": 2047.5, "WindowWidth": 4095, "VOILUTFunction": "LINEAR_EXACT"}),
    "rescale and window": (
        DEEP,
        {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 3096, "WindowWidth": 8192},
    ),
    "falling rescale": (4095 - DEEP, {"RescaleSlope": -1, "RescaleIntercept": 4095}),
    "MONOCHROME1": (4095 - DEEP, INVERSE | WINDOW),
    "inverse presentation": (4095 - DEEP, {"PresentationLUTShape": "INVERSE"} | WINDOW),
    "both inverse tags mean one inversion": (4095 - DEEP, {"PresentationLUTShape": "INVERSE"} | INVERSE | WINDOW),
    "signed": ((DEEP.astype(np.int16) - 2048), {"WindowCenter": 0, "WindowWidth": 4096}),
    "bits above those stored": (DEEP | 0x8000, WINDOW),
}


@pytest.mark.parametrize("name", SAME)
def test_grey_levels_are_those_that_the_header_means(name: str) -> None:
    pixels, tags = SAME[name]
    film = read_film(dicom(pixels, **tags))
    assert film.flags == ()
    assert np.abs(film.pixels - DEEP / np.float32(4095)).mean() < 2e-3


def test_signed_lossless_jpeg() -> None:
    signed = dicom((DEEP.astype(np.int16) - 2048).view(np.uint16) & 0xFFF, "lossless", PixelRepresentation=1)
    assert np.abs(read_radiograph(signed) - DEEP / np.float32(4095)).mean() < 0.02


def test_the_window_formulas_are_those_of_the_standard() -> None:
    ramp = np.tile(np.arange(4096, dtype=np.uint16), (256, 4))[:, ::16].copy()
    x = ramp[0].astype(float)
    formulas = {
        "LINEAR": np.clip((x - 999.5) / 1999 + 0.5, 0, 1),
        "LINEAR_EXACT": np.clip((x - 1000) / 2000 + 0.5, 0, 1),
        "SIGMOID": 1 / (1 + np.exp(-4 * (x - 1000) / 2000)),
    }
    for function, expected in formulas.items():
        pixels = read_radiograph(dicom(ramp, VOILUTFunction=function, WindowCenter=1000, WindowWidth=2000))
        assert np.abs(pixels[0] - expected).max() < 1e-5, function


@pytest.mark.parametrize("table", ["VOILUTSequence", "ModalityLUTSequence"])
def test_a_lookup_table_is_applied(table: str) -> None:
    item = Dataset()
    item.LUTDescriptor = [4096, 0, 16]
    item["LUTDescriptor"].VR = "US"
    item.LUTData = ((np.arange(4096, dtype=np.float64) / 4095) ** 2 * 65535).astype("<u2").tobytes()
    item["LUTData"].VR = "OW"
    tags = {table: Sequence([item])} | ({"ModalityLUTType": "US"} if table == "ModalityLUTSequence" else {})
    pixels = read_radiograph(dicom(**tags))
    assert np.abs(pixels - (DEEP / 4095.0) ** 2).max() < 0.01


@pytest.mark.parametrize("window", [("2048", "0"), ("2048", "-5"), ("nan", "4096"), ("9000", "10"), (None, "4096")])
def test_a_window_that_makes_no_sense_is_left_out_and_flagged(window: tuple) -> None:
    data = dicom(WindowCenter="1111", WindowWidth="1111")
    for number, value in zip((b"\x50\x10DS\4\0", b"\x51\x10DS\4\0"), window, strict=True):
        start = data.index(number) + 6
        data = data[:start] + (value or "").encode().ljust(4)[:4] + data[start + 4 :]
    film = read_film(data)
    assert film.flags == ("window-ignored",)
    assert np.abs(film.pixels - DEEP / np.float32(4095)).max() < 1e-5


def test_padding_is_black() -> None:
    padded = DEEP.copy()
    padded[:, :40] = 4000
    pixels = read_radiograph(dicom(padded, PixelPaddingValue=4000))
    assert (pixels[:, :40] == 0).all()
    assert np.abs(pixels[:, 40:] * 255 - CHEST[:, 40:]).mean() < 0.8


# --- polarity -----------------------------------------------------------------------------------------------------


def test_a_wrong_polarity_tag_is_overruled_by_the_pixels_and_flagged() -> None:
    right, wrong = read_film(dicom(**WINDOW)), read_film(dicom(**WINDOW, **INVERSE))
    assert right.flags == ()
    assert wrong.flags == ("polarity-tag-wrong",)
    assert np.array_equal(right.pixels, wrong.pixels)
    assert read_film(dicom(4095 - DEEP)).flags == ("polarity-tag-wrong",)


def test_a_film_of_another_part_keeps_its_tagged_polarity() -> None:
    film = read_film(dicom(4095 - DEEP, BodyPartExamined="HAND", **WINDOW))
    assert film.flags == ("body-part", "inverted?")
    assert np.abs(film.pixels - (1 - DEEP / np.float32(4095))).mean() < 1e-3


@pytest.mark.skipif(not SHARED.exists(), reason="../shared holds the real films")
def test_both_copies_of_a_real_film_give_the_same_pixels() -> None:
    folder: Path = SHARED / "data/real-cxr/dicom"
    right, wrong = (read_film(folder / f"siim_jpegbaseline_{k}.dcm") for k in ("mono2", "tagged_mono1"))
    assert right.flags == ()
    assert wrong.flags == ("polarity-tag-wrong",)
    assert np.array_equal(right.pixels, wrong.pixels)


# --- what the header says -----------------------------------------------------------------------------------------


def test_only_the_named_header_fields_are_kept() -> None:
    header = read_film(dicom(PatientID="P\x1b[31m1")).header
    assert dict(header) == {
        "PatientID": r"P\x1b[31m1",
        "ViewPosition": "PA",
        "PatientAge": "054Y",
        "PatientSex": "F",
        "Modality": "DX",
        "BodyPartExamined": "CHEST",
        "SOPInstanceUID": "1.2.3.4",
    }
    assert tuple(header) == HEADER_FIELDS


@pytest.mark.parametrize(
    ("flag", "tags"),
    [
        ("modality", {"Modality": "OT"}),
        ("modality", {"Modality": None}),
        ("body-part", {"BodyPartExamined": "HAND"}),
        ("lateral", {"ViewPosition": "LL"}),
        ("burned-in-annotation", {"BurnedInAnnotation": "YES"}),
    ],
)
def test_a_header_that_may_not_mean_a_frontal_chest_film_is_flagged(flag: str, tags: dict) -> None:
    assert read_film(dicom(**tags)).flags == (flag,)


def test_colour_is_reduced_and_flagged() -> None:
    rgb = np.dstack([CHEST, CHEST, CHEST // 2])
    tags = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    film = read_film(dicom(rgb, bits=8, **tags))
    assert film.flags == ("colour",)
    assert np.abs(film.pixels * 255 - rgb @ np.array([0.299, 0.587, 0.114])).max() < 0.01
    assert read_film(dicom(np.dstack([CHEST] * 3), bits=8, **tags)).flags == ()


def test_frames() -> None:
    two = np.concatenate([DEEP, DEEP[::-1]])
    tags = {"NumberOfFrames": 2, "Rows": 256}
    film = read_film(dicom(two, Modality="RF", **tags))
    assert film.flags == ("modality", "multi-frame")
    assert np.array_equal(film.pixels, read_radiograph(dicom()))
    assert np.array_equal(read_film(dicom(two, **tags), frame=1).pixels[::-1], film.pixels)
    with pytest.raises(UnreadableImage, match="2 frames, so it is not one radiograph"):
        read_film(dicom(two, **tags))
    with pytest.raises(UnreadableImage, match="no frame number 2"):
        read_film(dicom(two, **tags), frame=2)


REFUSED = {
    "CT": ({"Modality": "CT"}, "a CT image, not a radiograph"),
    "structured report": ({"pixels": None, "Modality": "SR"}, "a structured report without pixels"),
    "pdf": ({"pixels": None, "Modality": "OT", "EncapsulatedDocument": b"%PDF"}, r"a document \(PDF\) without pixels"),
    "no pixels": ({"pixels": None}, "a DX object without pixels"),
    "no rows": ({"Rows": 0}, "256 × 0 pixels are too few"),
    "too many rows": ({"Rows": 2000}, "damaged or cut short"),
    "a bomb": ({"Rows": 60000, "Columns": 60000}, "more than the 25,000,000 allowed"),
    "slope 0": ({"RescaleSlope": 0, "RescaleIntercept": 0}, "rescaling makes no sense"),
    "padding only": ({"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 4095}, "all its pixels are alike"),
    "other size": ({"syntax": "lossless", "Rows": 128}, "another size than its header says"),
    "other depth": ({"syntax": "lossless", "BitsAllocated": 8}, "12 bits, its header allows 8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_radiograph_is_refused_by_name(name: str) -> None:
    tags, reason = REFUSED[name]
    with pytest.raises(UnreadableImage, match=reason):
        read_film(dicom(**tags))


@pytest.mark.parametrize("value", [b"nan ", b"inf ", b"-inf"])
def test_rescaling_that_is_no_number_is_refused(value: bytes) -> None:
    data = dicom(RescaleSlope="1.00", RescaleIntercept="0.00")
    with pytest.raises(UnreadableImage, match="rescaling makes no sense"):
        read_film(data.replace(b"DS\4\x001.00", b"DS\4\0" + value))


@pytest.mark.parametrize("syntax", ["explicit", "baseline", "lossless", "jpeg 2000", "jpeg-ls", "deflated"])
def test_half_a_file_is_refused(syntax: str) -> None:
    data = dicom(CHEST, syntax, bits=8)
    with pytest.raises(UnreadableImage):
        read_film(data[: len(data) // 2])


def test_an_unknown_transfer_syntax_is_named() -> None:
    data = dicom().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0", 1)
    with pytest.raises(UnreadableImage, match=r"compressed in a way that is not read here \(unknown\)"):
        read_film(data)


def test_a_deflated_bomb_is_refused() -> None:
    bomb = dicom(np.zeros((4000, 4000), np.uint16), "deflated")
    assert len(bomb) < 100_000
    with pytest.raises(UnreadableImage, match="inflates to more than is allowed"):
        read_film(bomb, Limits(max_bytes=10_000_000))


def test_an_error_never_quotes_the_header() -> None:
    data = dicom().replace(b"DX", b"ZZ").replace(b"IS", b"\xff\xff")
    for end in range(132, len(data) - len(DEEP.tobytes()), 7):
        with pytest.raises(UnreadableImage) as refusal:
            read_film(data[:end])
        assert "Doe" not in str(refusal.value)


def test_a_picture_file_does_not_pay_for_pydicom() -> None:
    code = "import sys\nfrom cxr_fastai.images import read_film\nread_film(sys.stdin.buffer)\n"
    code += "print('pydicom' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], input=saved(CHEST, "PNG"), capture_output=True, check=True)
    assert done.stdout.split() == [b"False"]
