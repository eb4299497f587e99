"""How the films of a dataset are drawn, written by one or more processes, and put in their place whole."""

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxr_fastai.errors import DataError
from cxr_fastai.phantom.film import render, sample
from cxr_fastai.phantom.patient import Patient

NAME = "cxr_fastai.phantom"
_JPEG_QUALITY = 92
_CHUNK = 8  # images handed to a worker at once


@dataclass(frozen=True)
class Job:
    """One file to write: everything is decided, nothing is left to chance or to the order of work."""

    folder: str
    path: str
    label: str
    patient_id: str
    findings: tuple[str, ...]
    patient: Patient
    seed: int
    size: int
    difficulty: str
    shortcut: str = ""
    copy_seed: int | None = None

    @property
    def stem(self) -> str:
        """File name without its suffix, and the beginning of its masks' names."""
        return Path(self.path).stem


def _retouch(pixels: NDArray[np.uint8], job: Job) -> NDArray[np.uint8]:
    """Apply what was planted to a uint8 film (size, size): a copy's small changes, or a shortcut."""
    image = pixels.astype(np.float32)
    size = job.size
    if job.shortcut == "marker":
        side, top = size // 14, size // 20
        image[top : top + side, top : top + side] = 250
        image[top + side // 4 : top + side - side // 4, top + side // 4 : top + side - side // 4] = 20
    elif job.shortcut == "border":
        width = max(2, size // 40)
        image[:width], image[-width:], image[:, :width], image[:, -width:] = 235, 235, 235, 235
    elif job.shortcut == "brightness":
        image = image * 0.88 + 28
    if job.copy_seed is not None:
        rng = np.random.default_rng(job.copy_seed)
        cut = [int(c) for c in rng.integers(0, max(2, size // 56), 4)]
        film = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
        film = film.crop((cut[0], cut[1], size - cut[2], size - cut[3])).resize((size, size), Image.Resampling.BICUBIC)
        image = np.asarray(film, dtype=np.float32) * rng.uniform(0.97, 1.03) + rng.uniform(-3, 3)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _write(job: Job) -> tuple[str, int, str]:
    """Render one film and write it with its masks; return its view, age and sex."""
    rng = np.random.default_rng(job.seed)
    film = render(sample(rng, findings=job.findings, difficulty=job.difficulty, patient=job.patient), job.size)
    pixels = np.rint(film.pixels * 255).astype(np.uint8)
    if job.shortcut or job.copy_seed is not None:
        pixels = _retouch(pixels, job)
    target = Path(job.folder) / job.path
    if target.suffix == ".png":
        Image.fromarray(pixels).save(target, compress_level=3)
    else:
        Image.fromarray(pixels).save(target, quality=_JPEG_QUALITY)
    for name, mask in film.masks.items():
        drawn = Image.fromarray(mask.view(np.uint8) * np.uint8(255))
        drawn.save(Path(job.folder) / "masks" / f"{job.stem}__{name}.png", compress_level=1)
    return film.view, film.age, film.sex


def _leave_interrupts() -> None:
    """Leave Ctrl-C to the parent, which stops the workers in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run(jobs: list[Job], workers: int) -> Generator[tuple[str, int, str], None, None]:
    """Write all films, in order of the jobs, in this process or in several."""
    workers = min(workers, -(-len(jobs) // 24))
    if workers == 1:
        yield from map(_write, jobs)
        return
    # Spawned, not forked: the caller may have threads running, and forking those can hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_leave_interrupts)
    try:
        yield from pool.map(_write, jobs, chunksize=_CHUNK)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _is_ours(folder: Path) -> bool:
    try:
        return json.loads((folder / "dataset.json").read_text(encoding="utf-8")).get("generator") == NAME
    except (OSError, ValueError, AttributeError):
        return False


def check_target(out: Path) -> None:
    """Raise DataError if a folder holds something that is not ours to replace."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out} is a file, not a folder: name another --out")
    if any(out.iterdir()) and not _is_ours(out):
        raise DataError(f"{out} holds files that are not a generated dataset: name another --out, or empty it")


def put_in_place(built: Path, out: Path) -> None:
    """Rename a finished folder to its place; an older dataset there goes only once the new one stands."""
    if not out.exists():
        built.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent)) / out.name
    out.rename(old)
    try:
        built.rename(out)
    except OSError:
        old.rename(out)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)


def open_folder(out: Path) -> Path:
    """Make a private folder beside `out`, with the permissions that a new folder would have."""
    built = Path(tempfile.mkdtemp(prefix=f".{out.name}.new-", dir=out.parent))
    mask = os.umask(0)
    os.umask(mask)
    built.chmod(0o777 & ~mask)
    return built
