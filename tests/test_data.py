import pickle
from pathlib import Path

import pandas as pd
import pytest
import torch

from cxr_fastai.config import TrainConfig
from cxr_fastai.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    OpenFilm,
    TensorRadiograph,
    VaryFilms,
    batch_transforms,
    draw_moves,
    draw_tone,
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


def test_films_are_varied_each_its_own_way_and_within_bounds() -> None:
    torch.manual_seed(0)
    moves, (steepness, shift) = draw_moves(400, 1.0), draw_tone(400, 1.0)
    assert tuple(moves.shape) == (400, 2, 3)
    part = torch.linalg.det(moves[:, :, :2]).abs().sqrt()
    assert 1 / 1.1 - 1e-6 <= part.min() < part.max() <= 1 + 1e-6
    mirrored = torch.linalg.det(moves[:, :, :2]) < 0
    assert 150 < mirrored.sum() < 250
    angles = torch.rad2deg(torch.atan2(-moves[:, 1, 0], moves[:, 1, 1]))
    assert angles.abs().max() <= 10
    assert 0.15 < (angles == 0).float().mean() < 0.35  # three in four are turned
    assert moves[:, :, 2].abs().max() <= 1 - 1 / 1.1 + 2 * 0.04
    assert len(moves.unique(dim=0)) == 400
    assert 0.8 <= steepness.min() < steepness.max() <= 1.25
    assert 0.4 <= shift.sigmoid().min() < shift.sigmoid().max() <= 0.6


def test_without_strength_films_only_are_mirrored() -> None:
    films = TensorRadiograph(torch.rand(20, 1, 9, 9).clamp(0.01, 0.99))
    varied = VaryFilms(0.0).encodes(films)
    assert isinstance(varied, TensorRadiograph)
    for film, other in zip(films, varied, strict=True):
        assert min((other - film).abs().max(), (other - film.flip(-1)).abs().max()) < 1e-5
    assert [type(transform).__name__ for transform in batch_transforms(1.0, cuda=False)] == ["VaryFilms", "Normalize"]
    assert [type(transform).__name__ for transform in batch_transforms(0, cuda=False)] == ["Normalize"]


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


@pytest.mark.parametrize("read_before", [True, False])
def test_whole_batches_are_the_films_one_by_one(films: Path, read_before: bool) -> None:
    table = load_table(films)
    attrs = dict(table.attrs)
    table = split_table(table, seed=0)
    table.attrs.update(attrs)
    opener = OpenFilm(32)
    if read_before:
        assert not read_films(opener, table["path"].tolist(), lambda: None)
    dls = make_dataloaders(table, TrainConfig(batch_size=8, size=32, augment=0), opener, torch.device("cpu"))
    whole = torch.cat([batch[0] for batch in dls.valid]), torch.cat([batch[1] for batch in dls.valid])
    single = dls.valid.new()  # without `serve`
    assert single.source is None
    one_by_one = torch.cat([batch[0] for batch in single]), torch.cat([batch[1] for batch in single])
    assert (whole[0] - one_by_one[0]).abs().max() < 1e-4
    assert torch.equal(whole[1], one_by_one[1])
    assert type(whole[1]) is type(one_by_one[1])


def test_an_epoch_goes_on_with_the_films_that_were_left(films: Path) -> None:
    table = load_table(films)
    attrs = dict(table.attrs)
    table = split_table(table, seed=0)
    table.attrs.update(attrs)
    dls = make_dataloaders(table, TrainConfig(batch_size=8, size=32), OpenFilm(32), torch.device("cpu"))
    order, chance = list(range(len(dls.train_ds)))[::-1], []
    dls.train.continues = (order, 16, lambda: chance.append(True))
    batches = list(dls.train)
    assert len(batches) == len(order) // 8 - 2
    assert chance == [True]
    assert dls.train.order == order
    assert len(list(dls.train)) == len(order) // 8  # the next epoch is whole
