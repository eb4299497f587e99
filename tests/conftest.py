"""Small fakes: films whose class is plain to see, and runs trained on them once a session."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "2")
SHARED = Path(__file__).parents[2] / "shared"


def fake_film(rng: np.random.Generator, label: str, size: int = 64) -> np.ndarray:
    """Return (size, size) uint8: two dark lungs on grey, with a bright disc in a place that tells the class."""
    y, x = np.mgrid[0:size, 0:size] / size
    film = 0.6 - 0.3 * (((x - 0.3) / 0.15) ** 2 + ((y - 0.5) / 0.35) ** 2 < 1)
    film -= 0.3 * (((x - 0.7) / 0.15) ** 2 + ((y - 0.5) / 0.35) ** 2 < 1)
    spots = {"abnormal": (0.3, 0.4), "Mass": (0.7, 0.35), "Effusion": (0.3, 0.7)}
    for name in label.split("|"):
        if name in spots:
            film += 0.5 * ((x - spots[name][0]) ** 2 + (y - spots[name][1]) ** 2 < 0.1**2)
    return (np.clip(film + rng.normal(0, 0.05, (size, size)), 0, 1) * 255).astype(np.uint8)


def write_films(folder: Path, labels: list[str], *, seed: int = 0, patients: int = 1) -> None:
    """Write one PNG a label into folder/<label>, NIH names, `patients` films a patient."""
    rng = np.random.default_rng(seed)
    for i, label in enumerate(labels):
        path = folder / label / f"{i // patients:08d}_{i % patients:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(fake_film(rng, label)).save(path)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the films that tests decode, here and in processes they start, out of the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 60 films, 30 normal and 30 abnormal, one a patient."""
    folder = tmp_path_factory.mktemp("films")
    write_films(folder, ["normal", "abnormal"] * 30)
    return folder


@pytest.fixture(scope="session")
def finished(films: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run folder of a DenseNet121 trained for two epochs on `films` at 32 pixels."""
    from cxr_fastai.config import TrainConfig
    from cxr_fastai.training import train

    out = tmp_path_factory.mktemp("exports")
    config = TrainConfig(data=str(films), out=str(out), name="small", size=32, epochs=2, weights="none", batch_size=8)
    return train(config)[0]
