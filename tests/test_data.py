import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cxr_fastai.config import TrainConfig
from cxr_fastai.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    OpenFilm,
    RandomShiftCrop,
    TensorRadiograph,
    make_dataloaders,
    read_films,
    without_unreadable,
)
from cxr_fastai.errors import DataError
from cxr_fastai.split import split_table
from cxr_fastai.table import load_table


def test_a_remembered_film_is_the_file_to_1e5_and_is_never_pickled(films: Path) -> None:
    path = str(next(films.rglob("*.png")))
    opener = OpenFilm(32)
    fresh = opener.encodes(path)
    opener.remember(path)
    assert tuple(fresh.shape) == (1, 32, 32)
    assert fresh.dtype == torch.float32
    assert (opener.encodes(path) - fresh).abs().max().item() < 1e-5
    assert pickle.loads(pickle.dumps(opener)).films == {}


def test_shift_crop_moves_the_film_and_repeats_its_edge() -> None:
    film = TensorRadiograph(torch.arange(100.0).reshape(1, 10, 10))
    crop = RandomShiftCrop(0.2)
    crop.shift = np.array([0.2, -0.2])  # two down, two left
    moved = crop.encodes(film)
    assert torch.equal(moved[0, :8, 2:], film[0, 2:, :8])
    assert torch.equal(moved[0, 8:, 2:], film[0, 9:, :8].expand(2, 8))


def test_unreadable_films_are_named_before_training(films: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not a film")
    done = []
    good = str(next(films.rglob("*.png")))
    found = read_films(OpenFilm(32), [str(bad), good], lambda: done.append(1))
    assert list(found) == [str(bad)]
    assert len(done) == 2
    table = pd.DataFrame({"path": [str(bad), good]})
    with pytest.raises(DataError, match=r"1 film\(s\) cannot be read: .*bad\.png"):
        without_unreadable(table, found, skip=False)
    assert without_unreadable(table, found, skip=True)["path"].tolist() == [good]


def test_batches_are_normalised_and_leave_the_test_films_out(films: Path) -> None:
    table = load_table(films)
    attrs = dict(table.attrs)
    table = split_table(table, seed=0)
    table.attrs.update(attrs)
    dls = make_dataloaders(table, TrainConfig(batch_size=8, size=32, augment=0), OpenFilm(32), torch.device("cpu"))
    counts = table["split"].value_counts()
    assert (len(dls.train_ds), len(dls.valid_ds)) == (counts["train"], counts["valid"])
    x, _ = dls.valid.one_batch()
    assert tuple(x.shape[1:]) == (3, 32, 32)
    # one film, three channels, each with ImageNet's own mean and deviation taken off
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    grey = torch.as_tensor(x) * std + mean
    assert (grey - grey[:, :1]).abs().max() < 1e-6
    assert 0 <= grey.min() <= grey.max() <= 1
    assert list(dls.vocab) == ["abnormal", "normal"]
