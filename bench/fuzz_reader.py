"""Feed mutated films of every format to the reader: nothing but a film or `UnreadableImage` may come out.

    python bench/fuzz_reader.py [--runs 60000] [--seed 0] [--workers 2] [--keep DIR]

The seeds are made in memory, one small film in each encoding. A mutant has bytes changed, numbers replaced by awkward
ones, parts cut out, doubled or taken from another seed; half of the PNG mutants get correct checksums, so that they
pass the first check. Mutants are numbered: the same number is the same mutant. Prints counts a format, the worst time
and the peak memory; exit code 1 on any other exception, a death of the process, 5 s or 600 MB.
"""

import argparse
import io
import multiprocessing
import os
import struct
import sys
import time
import zlib
from collections import Counter
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cxr_fastai.errors import UnreadableImage
from cxr_fastai.images import read_film

MAX_SECONDS, MAX_MB, HANG = 5.0, 600.0, 30.0
AWKWARD = [struct.pack(f, n) for f in ("<H", ">H", "<I", ">I") for n in (0, 1, 255, 256, 32767, 65535)]
AWKWARD += [struct.pack(f, n) for f in ("<I", ">I") for n in (2**31 - 1, 2**31, 2**32 - 1, 40000, 2**24)]


def film() -> np.ndarray:
    """Make a small picture with structure: uint8 (60, 52)."""
    y, x = np.mgrid[-1:1:60j, -1:1:52j]
    lungs = np.exp(-((np.abs(x) - 0.45) ** 2) * 20 - y**2 * 2)
    return np.clip(
        200 - 150 * lungs + 8 * np.sin(20 * y) + np.random.default_rng(0).normal(0, 3, x.shape), 0, 255
    ).astype("u1")


def raster_seeds() -> dict[str, bytes]:
    """Write the film in every raster encoding."""
    grey, deep = Image.fromarray(film()), Image.fromarray(film().astype(np.uint16) * 16)
    rgb = Image.merge("RGB", [grey] * 3)
    turned = grey.rotate(90)
    seeds = {}
    for name, image, kind, options in (
        ("png", grey, "PNG", {}),
        ("png16", deep, "PNG", {}),
        ("png-palette", rgb.quantize(64), "PNG", {}),
        ("png-rgba", rgb.convert("RGBA"), "PNG", {}),
        ("png-1bit", grey.convert("1"), "PNG", {}),
        ("jpeg", grey, "JPEG", {}),
        ("jpeg-rgb", rgb, "JPEG", {}),
        ("jpeg-progressive", rgb, "JPEG", {"progressive": True}),
        ("jpeg-cmyk", rgb.convert("CMYK"), "JPEG", {}),
        ("tiff", grey, "TIFF", {}),
        ("tiff16", deep, "TIFF", {}),
        ("tiff-lzw", deep, "TIFF", {"compression": "tiff_lzw"}),
        ("tiff-jpeg", rgb, "TIFF", {"compression": "jpeg"}),
        ("tiff-deflate", rgb, "TIFF", {"compression": "tiff_adobe_deflate"}),
        ("tiff-packbits", grey, "TIFF", {"compression": "packbits"}),
        ("tiff-g4", grey.convert("1"), "TIFF", {"compression": "group4"}),
        ("tiff-float", grey.convert("F"), "TIFF", {}),
        ("bmp", rgb, "BMP", {}),
        ("bmp-grey", grey, "BMP", {}),
        ("webp", rgb, "WEBP", {}),
        ("webp-lossless", rgb, "WEBP", {"lossless": True}),
        ("webp-animated", rgb, "WEBP", {"save_all": True, "append_images": [turned.convert("RGB")]}),
        ("gif", grey, "GIF", {}),
        ("gif-animated", grey, "GIF", {"save_all": True, "append_images": [turned]}),
        ("jp2", grey, "JPEG2000", {}),
        ("jp2-16", deep, "JPEG2000", {}),
        ("avif", rgb, "AVIF", {}),
        ("pgm", grey, "PPM", {}),
    ):
        file = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(file, kind, **options, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
        seeds[name] = file.getvalue()
    return seeds


def dicom_seeds() -> dict[str, bytes]:
    """Write the film in every DICOM encoding that can be written here."""
    from pydicom import dcmwrite
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import UID

    seeds = {}
    for name, syntax in (
        ("explicit", "1.2.840.10008.1.2.1"), ("implicit", "1.2.840.10008.1.2"), ("big", "1.2.840.10008.1.2.2"),
        ("deflated", "1.2.840.10008.1.2.1.99"), ("rle", "1.2.840.10008.1.2.5"), ("jpegls", "1.2.840.10008.1.2.4.80"),
        ("j2k", "1.2.840.10008.1.2.4.90"), ("jpeg", "1.2.840.10008.1.2.4.50"), ("lossless", "1.2.840.10008.1.2.4.70"),
        ("extended", "1.2.840.10008.1.2.4.51"),
    ):  # fmt: skip
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.1")
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.1.1")
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3.4")
        data.PatientID, data.Modality, data.BodyPartExamined, data.ViewPosition = "P1", "DX", "CHEST", "PA"
        data.Rows, data.Columns = film().shape
        data.SamplesPerPixel, data.PixelRepresentation, data.PhotometricInterpretation = 1, 0, "MONOCHROME2"
        eight = name == "jpeg"
        data.BitsAllocated, data.BitsStored, data.HighBit = (8, 8, 7) if eight else (16, 12, 11)
        data.WindowCenter, data.WindowWidth, data.RescaleSlope, data.RescaleIntercept = "2048", "4096", "1", "0"
        pixels = film() if eight else film().astype(">u2" if name == "big" else "<u2") * 16
        data.PixelData = pixels.astype(pixels.dtype).tobytes()
        data["PixelData"].VR = "OW"
        if name in ("jpeg", "lossless", "extended"):
            data.PixelData = encapsulate([jpeg(name, pixels)])
            data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
            data.file_meta.TransferSyntaxUID = UID(syntax)
        elif name in ("rle", "jpegls", "j2k"):
            data.compress(UID(syntax), generate_instance_uid=False)
        else:
            data.file_meta.TransferSyntaxUID = UID(syntax)
        file = io.BytesIO()
        dcmwrite(file, data, enforce_file_format=True)
        seeds[f"dicom-{name}"] = file.getvalue()
    seeds["dicom-bare"] = seeds["dicom-explicit"][132:]
    return seeds


def jpeg(name: str, pixels: np.ndarray) -> bytes:
    """Encode the film as baseline (8 bits), extended (12) or lossless JPEG (12)."""
    import imagecodecs

    if name == "jpeg":
        return bytes(imagecodecs.jpeg8_encode(pixels, level=90))
    return bytes(imagecodecs.jpeg8_encode(pixels, level=95, bitspersample=12, lossless=name == "lossless"))


def mutant(number: int, seeds: dict[str, bytes]) -> tuple[str, bytes]:
    """Make mutant `number`: the name of its seed, and its bytes."""
    rng = np.random.default_rng(number)
    names = list(seeds)
    name = names[number % len(names)]
    data = bytearray(seeds[name])
    for _ in range(rng.integers(1, 9)):
        # Headers come first, and are where the trouble is: half of the changes fall into the first 1,000 bytes.
        place = int(rng.integers(0, max(1, len(data) if rng.random() < 0.5 else min(len(data), 1000))))
        match rng.integers(0, 8):
            case 0 | 1:
                data[place : place + 1] = bytes([rng.integers(0, 256)])
            case 2:
                data[place : place + 1] = bytes([(data[place] if data else 0) ^ (1 << rng.integers(0, 8))])
            case 3 | 4:
                value = AWKWARD[rng.integers(0, len(AWKWARD))]
                data[place : place + len(value)] = value
            case 5:
                del data[place : place + int(rng.integers(1, 64))]
            case 6:
                data[place:place] = data[place : place + int(rng.integers(1, 64))] * int(rng.integers(1, 5))
            case 7:
                other = seeds[names[rng.integers(0, len(names))]]
                start = int(rng.integers(0, len(other)))
                data[place : place + 32] = other[start : start + 32]
    if rng.random() < 0.05:
        del data[int(rng.integers(0, len(data) + 1)) :]
    return name, with_checksums(bytes(data)) if name.startswith("png") and number % 2 else bytes(data)


def with_checksums(data: bytes) -> bytes:
    """Correct the checksum of every PNG chunk that still has an end."""
    out, position = data[:8], 8
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if end > len(data):
            break
        body = data[position + 4 : end - 4]
        out += data[position : position + 4] + body + zlib.crc32(body).to_bytes(4, "big")
        position = end
    return out + data[position:]


def work(start: int, stop: int, step: int, seeds: dict[str, bytes], at: "Synchronized[int]", results: Any) -> None:
    """Read mutants start, start + step ... in a process of its own; tell what came out and the worst time."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    counts: Counter[tuple[str, str]] = Counter()
    worst, faults = (0.0, 0), []
    for number in range(start, stop, step):
        at.value = number
        name, data = mutant(number, seeds)
        begin = time.monotonic()
        try:
            pixels = read_film(data).pixels
            good = pixels.dtype == np.float32 and pixels.ndim == 2 and pixels.min() >= 0 and pixels.max() <= 1
            counts[name, "read"] += 1
            faults += [] if good else [(number, name, f"pixels {pixels.dtype} {pixels.shape}")]
        except UnreadableImage as error:
            counts[name, "refused"] += 1
            faults += [] if str(error).isprintable() else [(number, name, "unprintable reason")]
        except BaseException as error:  # noqa: BLE001 - that nothing else comes out is what is tested
            faults.append((number, name, f"{type(error).__name__}: {error}"))
        worst = max(worst, (time.monotonic() - begin, number))
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    results.put((counts, worst, faults, peak))


def run(start: int, stop: int, step: int, seeds: dict[str, bytes]) -> Any:
    """Run one worker; return it with the number it is at, and where its results will be."""
    context = multiprocessing.get_context("spawn")
    at, results = context.Value("q", start), context.Queue()
    process = context.Process(target=work, args=(start, stop, step, seeds, at, results), daemon=True)
    process.start()
    return process, at, results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="only seeds whose name begins so")
    parser.add_argument("--keep", type=Path, help="write mutants that fail into this folder")
    options = parser.parse_args()
    seeds = {k: v for k, v in (raster_seeds() | dicom_seeds()).items() if k.startswith(options.only)}
    for name, data in seeds.items():
        read_film(data)  # a seed that cannot be read would test nothing
        print(f"{name}: {len(data)} bytes", end="  ")
    print()
    stop, step = options.seed + options.runs, options.workers
    running = [run(options.seed + k, stop, step, seeds) for k in range(step)]
    counts: Counter[tuple[str, str]] = Counter()
    worst, peak = (0.0, 0), 0.0
    faults: list[tuple[int, str, str]] = []
    seen: dict[int | None, tuple[int, float]] = {}
    while running:
        process, at, results = running.pop(0)
        process.join(1)
        if not results.empty():
            more, slowest, found, memory = results.get()
            counts, worst, faults, peak = counts + more, max(worst, slowest), faults + found, max(peak, memory)
            continue
        stuck = seen.get(process.pid, (-1, 0.0))[0] == at.value and time.monotonic() - seen[process.pid][1] > HANG
        if process.is_alive() and not stuck:
            if seen.get(process.pid, (-1, 0.0))[0] != at.value:
                seen[process.pid] = (at.value, time.monotonic())
            running.append((process, at, results))
            continue
        time.sleep(0.5)
        if not results.empty():  # it ended between the two looks
            running.append((process, at, results))
            continue
        process.kill()
        faults.append((at.value, mutant(at.value, seeds)[0], "hang" if stuck else f"process died ({process.exitcode})"))
        running.append(run(at.value + step, stop, step, seeds))
    for name in seeds:
        print(f"  {name:18s} read {counts[name, 'read']:6d}  refused {counts[name, 'refused']:6d}")
    total, (seconds, number) = sum(counts.values()), worst
    print(f"{total} mutants, worst {seconds:.2f} s (number {number}), peak {peak:.0f} MB, faults {len(faults)}")
    for number, name, what in faults[:50]:
        print(f"  {number} {name}: {what}")
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            (options.keep / f"{number}-{name}").write_bytes(mutant(number, seeds)[1])
    return 1 if faults or worst[0] > MAX_SECONDS or peak > MAX_MB else 0


if __name__ == "__main__":
    sys.exit(main())
