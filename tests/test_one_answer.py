"""One radiograph, one answer: the file that a film comes in does not change the verdict."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_dicom import INVERSE, dicom

from cxr_fastai.errors import ModelFileError
from cxr_fastai.phantom import render, sample
from cxr_fastai.predict import Predictor

ROOT = Path(__file__).parents[1]


def write_variants(folder: Path, film: np.ndarray) -> list[str]:
    """Write one film (H, W) uint8 in 5 picture formats and as 3 × 2 × 2 kinds of DICOM; return the paths."""
    deep = film.astype(np.uint16) * 16
    Image.fromarray(film).save(folder / "8-bit.png")
    Image.fromarray(film.astype(np.uint16) * 257).save(folder / "16-bit.png")
    Image.fromarray(deep).save(folder / "12-in-16-bit.png")
    Image.fromarray(film).save(folder / "film.tif")
    Image.fromarray(film).save(folder / "film.jpg", quality=95)
    # A window as a device writes it: over the grey levels in use, the extreme half per cent clipped on each side.
    low, high = np.percentile(deep, (0.5, 99.5))
    for syntax in ("explicit", "lossless", "jpeg 2000"):
        for inverse in (False, True):
            pixels = 4095 - deep if inverse else deep
            centre = 4095 - (low + high) / 2 if inverse else (low + high) / 2
            for window in ({}, {"WindowCenter": float(centre), "WindowWidth": float(high - low)}):
                name = f"{syntax} {'mono1' if inverse else 'mono2'} {'window' if window else 'plain'}.dcm"
                (folder / name).write_bytes(dicom(pixels, syntax, **(INVERSE if inverse else {}), **window))
    return sorted(map(str, folder.iterdir()))


def spread(predictor: Predictor, folder: Path, seed: int) -> float:
    """Return the largest difference of a probability between the variants of one phantom."""
    folder.mkdir()
    film = render(sample(np.random.default_rng(seed), findings=("Consolidation",) if seed % 2 else ()), 256).pixels
    rows = list(predictor.predict(write_variants(folder, np.round(film * 255).astype(np.uint8))))
    assert len(rows) == 17
    assert [row.error for row in rows] == [None] * 17
    p = np.array([list(row.probabilities.values()) for row in rows])
    return float((p.max(0) - p.min(0)).max())


def test_a_small_model_gives_one_answer(finished: Path, tmp_path: Path) -> None:
    assert spread(Predictor(finished), tmp_path / "film", 0) < 0.02


def test_the_default_model_gives_one_answer(tmp_path: Path) -> None:
    try:
        predictor = Predictor(ROOT / "exports" / "latest")
    except ModelFileError:
        pytest.skip("no finished run in exports/; python cli.py train makes one")
    assert max(spread(predictor, tmp_path / str(seed), seed) for seed in range(6)) < 0.02
