"""table -> fastai DataLoaders: a DataBlock with item and batch transforms over `images.read_radiograph`.

In: a table with `path`, `label`, `split` (see `table.py`). Out: batches of films (N, 3, size, size) float32, the
ImageNet mean and deviation taken off, with their labels. Every film is decoded once, before the first epoch, into
the cache that later runs share (see `cache.py`); a film that cannot be read is found and named there.

All functions that a Learner keeps are named ones of this module, so that its export stores them by reference.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import get_spawning_popen
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.data.all import CategoryBlock, DataBlock, DataLoaders, MultiCategoryBlock, Normalize, TransformBlock
from fastai.torch_core import TensorImageBW
from fastai.vision.augment import PadMode, RandTransform, aug_transforms
from fasttransform import Transform

from cxr_fastai.cache import FilmCache, Place
from cxr_fastai.config import Limits, TrainConfig
from cxr_fastai.errors import DataError, UnreadableImage
from cxr_fastai.images import read_bytes, read_radiograph, resize, to_input
from cxr_fastai.table import targets_of

# Of ImageNet's training set, as torchvision's pretrained weights expect them (torchvision model documentation).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
UINT16_MAX = 65535
NAMED_AT_MOST = 5


class TensorRadiograph(TensorImageBW):
    """One film as a float32 tensor (1, H, W) in [0, 1], bone white."""

    _show_args = {"cmap": "gray"}  # noqa: RUF012 (fastai's own protocol)


def normalised(films: torch.Tensor) -> torch.Tensor:
    """Return films (N, 1, H, W) in [0, 1] as `Normalize` hands them to a network, (N, 3, H, W)."""
    mean, std = (films.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (films - mean) / std


class OpenFilm(Transform):
    """Path -> TensorRadiograph (1, size, size), from the cache or memory where the film was read before.

    Cached films are 16 bit, so that they differ from the file by less than 1e-5. They are left out of every pickle: an
    exported Learner carries no images. Only a worker process that is being spawned is told where in the cache they lie.

    Attributes
    ----------
    warning : str or None
        Why films could not be cached, one line; set by `read_films`.
    """

    def __init__(self, size: int):
        self.size = size
        self.films: dict[str, Place | np.ndarray] = {}
        self.identities: dict[str, str] = {}
        self.cache: FilmCache | None = None
        self.warning: str | None = None

    def encodes(self, path: str) -> TensorRadiograph:  # noqa: D102
        film = self.films.get(path)
        if isinstance(film, Place):
            film = self.opened().at(film)
        pixels = to_input(read_radiograph(path), self.size) if film is None else film.astype(np.float32) / UINT16_MAX
        return TensorRadiograph(torch.from_numpy(pixels)[None])

    def opened(self) -> FilmCache:
        """Return the cache, opened at the first use; raise UsageError where its settings make no sense."""
        self.cache = self.cache or FilmCache(self.size)
        return self.cache

    def remember(self, path: str) -> None:
        """Have one film in the cache or in memory; raise UnreadableImage where it cannot be read."""
        cache, data = self.opened(), read_bytes(path, Limits())
        key = cache.key(data)
        self.identities[path] = key.hex()
        film: Place | np.ndarray | None = cache.find(key)
        if film is None:
            pixels = to_input(read_radiograph(data), self.size)
            film = cache.keep(key, np.round(pixels * UINT16_MAX).astype(np.uint16))
        self.films.pop(path, None)
        if film is not None:
            self.films[path] = film

    def thumbnails(self, paths: Sequence[str], side: int, advance: Callable[[], None]) -> np.ndarray:
        """Return films that were read before, (n, side, side) float32 in [0, 1]."""
        films = []
        for path in paths:
            films.append(resize(self.encodes(path)[0].numpy(), side))
            advance()
        return np.stack(films)

    def identity(self, path: str) -> str:
        """Return a text that two films read have in common only if their files are equal."""
        return self.identities.get(path, path)

    def __getstate__(self) -> dict:
        spawning = get_spawning_popen() is not None
        places = {path: film for path, film in self.films.items() if spawning and isinstance(film, Place)}
        return {**self.__dict__, "films": places, "identities": {}, "cache": None, "warning": None}


class RandomShiftCrop(RandTransform):
    """Cut a window of the film's own size after moving it by up to `share` of the side; training only.

    An item transform: each film of a batch moves its own way. What comes in at the edge repeats the edge.
    """

    split_idx = 0

    def __init__(self, share: float):
        super().__init__(p=1.0)
        self.share = share

    def before_call(self, b: object, split_idx: int) -> None:  # noqa: D102
        super().before_call(b, split_idx)
        self.shift = np.random.uniform(-self.share, self.share, 2)  # noqa: NPY002 (fastai seeds numpy's global state)

    def encodes(self, film: TensorRadiograph) -> torch.Tensor:  # noqa: D102
        side = film.shape[-1]
        margin = int(np.ceil(self.share * side))
        down, right = (margin + np.round(self.shift * side)).astype(int)
        padded = torch.nn.functional.pad(film[None], (margin,) * 4, mode="replicate")[0]
        return padded[:, down : down + side, right : right + side]


def film_path(item: pd.Series | str | Path) -> str:
    """Return the path of a table row; a bare path stays as it is, for `learn.predict(path)`."""
    return str(item["path"]) if isinstance(item, pd.Series) else str(item)


def film_label(row: pd.Series) -> str:
    """Return the class of a table row."""
    return row["label"]


def film_targets(row: pd.Series) -> np.ndarray:
    """Return what is known of each finding on a table row, (K,) float32: 1, 0, or NaN for unknown."""
    return row["targets"]


class KnownBCE(torch.nn.Module):
    """Binary cross-entropy with logits, the mean over what is known: targets that are NaN count for nothing.

    For fastai it also is what turns logits into probabilities and decisions, as its own `BCEWithLogitsLossFlat`.

    Parameters
    ----------
    pos_weight : (K,) float32
        How much more a finding that is there counts than one that is not.
    """

    pos_weight: torch.Tensor | None

    def __init__(self, pos_weight: torch.Tensor | None = None):
        super().__init__()
        self.register_buffer("pos_weight", pos_weight)
        self.reduction = "mean"

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean loss, or with ``reduction = "none"`` that of each entry (N, K), 0 where it is unknown."""
        logits, targets = (t.as_subclass(torch.Tensor) for t in (logits, targets))  # type: ignore[arg-type]
        known = ~targets.isnan()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, targets.nan_to_num(), pos_weight=self.pos_weight, reduction="none"
        )
        loss = loss * known
        return loss if self.reduction == "none" else loss.sum() / known.sum().clamp(min=1)

    def activation(self, logits: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return logits.sigmoid()

    def decodes(self, probabilities: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return probabilities > 0.5


def by_split(table: pd.DataFrame) -> tuple[list[int], list[int]]:
    """Return the row numbers of the training and of the validation films."""
    split = table["split"].to_numpy()
    return np.flatnonzero(split == "train").tolist(), np.flatnonzero(split == "valid").tolist()


def item_transforms(strength: float) -> list[Transform]:
    """Return the transforms of single films: the random crop."""
    return [RandomShiftCrop(0.04 * strength)] if strength else []


def batch_transforms(strength: float, cuda: bool) -> list[Transform]:
    """Return the transforms of whole batches: flips, turns, zooms and contrast at `strength`, and Normalize.

    The paper's flips, rotations and tone changes. There is no perspective warp, which no film has.
    """
    augment = (
        aug_transforms(
            max_rotate=10 * strength,
            max_zoom=1 + 0.1 * strength,
            max_lighting=min(0.2 * strength, 0.9),
            max_warp=0,
            pad_mode=PadMode.Border,
        )
        if strength
        else []
    )
    return [*augment, Normalize.from_stats(IMAGENET_MEAN, IMAGENET_STD, cuda=cuda)]


def read_films(opener: OpenFilm, paths: Sequence[str], advance: Callable[[], None]) -> dict[str, str]:
    """Read all films into the cache, on as many threads as cores; return path -> reason of the bad ones.

    A film that the cache holds already is not decoded again. `opener.warning` says where films could not be stored.
    """
    cache = opener.opened()
    bad: dict[str, str] = {}

    def read(path: str) -> None:
        try:
            opener.remember(path)
        except UnreadableImage as error:
            bad[path] = str(error)
        advance()

    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(read, paths))
    finally:
        cache.close()
    opener.warning = cache.warning
    return bad


def without_unreadable(table: pd.DataFrame, bad: dict[str, str], skip: bool) -> pd.DataFrame:
    """Return the table without the films that cannot be read; without `skip`, refuse it and name them."""
    if not bad:
        return table
    if not skip:
        named = "; ".join(f"{path}: {bad[path]}" for path in sorted(bad)[:NAMED_AT_MOST])
        more = f"; and {len(bad) - NAMED_AT_MOST} more" if len(bad) > NAMED_AT_MOST else ""
        raise DataError(f"{len(bad)} film(s) cannot be read: {named}{more}. Mend or remove them, or use --skip-bad")
    return table[~table["path"].isin(bad)].reset_index(drop=True)


def make_dataloaders(table: pd.DataFrame, config: TrainConfig, opener: OpenFilm, device: torch.device) -> DataLoaders:
    """Make the training and validation DataLoaders of a split table; test rows are left out.

    Parameters
    ----------
    table
        With `path`, `label`, `split` in train, valid, test; `attrs["classes"]` gives the order of the classes. Of
        several findings a film, what is unknown is NaN in the targets (see `table.targets_of`), and `config.uncertain`
        says what is uncertain to training; validation leaves it out.
    opener
        Reads films; filled by `read_films` beforehand, it reads none twice.
    """
    seen = table[table["split"].isin(["train", "valid"])].reset_index(drop=True)
    classes, multilabel = table.attrs["classes"], table.attrs["task"] == "multilabel"
    if multilabel:
        trained = (seen["split"] == "train").to_numpy()[:, None]
        known = np.where(trained, targets_of(seen, classes, config.uncertain), targets_of(seen, classes))
        seen = seen[["path", "split"]].assign(targets=list(known.astype(np.float32)))
    labels = MultiCategoryBlock(encoded=True, vocab=classes) if multilabel else CategoryBlock(vocab=classes)
    block = DataBlock(
        blocks=(TransformBlock(type_tfms=[opener]), labels),
        get_x=film_path,
        get_y=film_targets if multilabel else film_label,
        splitter=by_split,
        item_tfms=item_transforms(config.augment),
        batch_tfms=batch_transforms(config.augment, device.type == "cuda"),
    )
    films_in_training = int((seen["split"] == "train").sum())
    # Films are in memory: worker processes would cost more than they save.
    return block.dataloaders(
        seen, bs=min(config.batch_size, films_in_training), num_workers=0, device=device, path=config.out
    )
