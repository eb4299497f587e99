"""table -> fastai DataLoaders: a DataBlock with item and batch transforms over `images.read_radiograph`.

In: a table with `path`, `label`, `split` (see `table.py`). Out: batches of films (N, 3, size, size) float32, the
ImageNet mean and deviation taken off, with their labels. Every film is decoded once, before the first epoch, into
the cache that later runs share (see `cache.py`); a film that cannot be read is found and named there.

All functions that a Learner keeps are named ones of this module, so that its export stores them by reference.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import get_spawning_popen
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.data.all import CategoryBlock, DataBlock, DataLoaders, MultiCategoryBlock, Normalize, TfmdDL, TransformBlock
from fastai.torch_core import TensorCategory, TensorImageBW, TensorMultiCategory
from fastai.vision.augment import RandTransform
from fasttransform import Transform

from cxr_fastai.cache import FilmCache, Place
from cxr_fastai.config import Limits, TrainConfig, usable_cores
from cxr_fastai.errors import DataError, UnreadableImage
from cxr_fastai.images import read_bytes, read_radiograph, resize, to_input
from cxr_fastai.table import targets_of

# Of ImageNet's training set, as torchvision's pretrained weights expect them (torchvision model documentation).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
UINT16_MAX = 65535
NAMED_AT_MOST = 5
# At augmentation 1: shift in parts of the side, degrees, zoom and lighting as fastai counts them.
SHIFT, MAX_TURN, MAX_ZOOM, MAX_LIGHT = 0.04, 10, 0.1, 0.2
LOGIT_EPS = 1e-7
RESIDENT_SHARE = 0.3  # of the free memory of a CUDA device that films may take
STAGED_FILMS = 512
VALID_BATCH = 64  # at least so many films at a time on a CUDA device


class TensorRadiograph(TensorImageBW):
    """One film as a float32 tensor (1, H, W) in [0, 1], bone white."""

    _show_args = {"cmap": "gray"}  # noqa: RUF012 (fastai's own protocol)


def normalised(films: torch.Tensor) -> torch.Tensor:
    """Return films (N, 1, H, W) in [0, 1] as `Normalize` hands them to a network, (N, 3, H, W)."""
    mean, std = (films.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (films - mean) / std


def to_uint16(pixels: np.ndarray) -> np.ndarray:
    """Return pixels in [0, 1] as whole numbers of 16 bit."""
    return np.round(pixels * UINT16_MAX).astype(np.uint16)


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
        film = self._at_hand(path)
        pixels = to_input(read_radiograph(path), self.size) if film is None else film.astype(np.float32) / UINT16_MAX
        return TensorRadiograph(torch.from_numpy(pixels)[None])

    def stack(self, paths: Sequence[str]) -> np.ndarray:
        """Return films, (N, size, size) uint16 of the whole range; those not at hand are decoded side by side."""
        kept = [self._at_hand(path) for path in paths]
        missing = [path for path, film in zip(paths, kept, strict=True) if film is None]
        with ThreadPoolExecutor(usable_cores()) as pool:
            decoded = pool.map(read_radiograph, missing)
        return np.stack([to_uint16(to_input(next(decoded), self.size)) if film is None else film for film in kept])

    def _at_hand(self, path: str) -> np.ndarray | None:
        """Return a film from the cache or memory, uint16, or None where it must be decoded."""
        film = self.films.get(path)
        return self.opened().at(film) if isinstance(film, Place) else film

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
            film = cache.keep(key, to_uint16(pixels))
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


class FilmDL(TfmdDL):
    """fastai's DataLoader, which takes whole batches of films that were read before, instead of one film at a time.

    Only after `serve`; a copy made by `new`, as for prediction, reads film by film. Where the films fit into the memory
    of a CUDA device they lie there, and a batch is one indexing.

    Attributes
    ----------
    order : list of int
        The films of the epoch under way, in the order in which they come.
    continues : tuple of list of int, int and callable, or None
        The order of an epoch that was cut off, how many of its films were learned from, and what sets the state of
        chance right before the next batch; the next pass goes on there.
    """

    source: "FilmSource | None" = None
    continues: tuple[list[int], int, Callable[[], None]] | None = None

    def serve(self, opener: OpenFilm, paths: Sequence[str], targets: torch.Tensor) -> None:
        """Take the films at `paths` from `opener` from now on; `targets` (N,) or (N, K) as the loss takes them."""
        self.source = FilmSource(opener, paths, targets, self.device)

    def get_idxs(self) -> list[int]:  # noqa: D102
        self.order = super().get_idxs() if self.continues is None else self.continues[0]
        return self.order

    def create_batches(self, samps: Iterable[int]) -> Iterator[tuple[torch.Tensor, ...]]:  # noqa: D102
        samps = list(samps)
        if self.continues is not None:
            _, done, set_chance = self.continues
            self.continues, samps = None, samps[done:]
            set_chance()
        if self.source is None:
            yield from super().create_batches(samps)
        else:
            yield from (self.source.batch(chunk) for chunk in self.chunkify(samps))


class FilmSource:
    """Films that were read before, with their targets, a batch at a time."""

    def __init__(self, opener: OpenFilm, paths: Sequence[str], targets: torch.Tensor, device: torch.device):
        self.opener, self.paths, self.targets, self.device = opener, list(paths), targets, device
        self.kind = TensorMultiCategory if targets.ndim == 2 else TensorCategory
        self.resident: torch.Tensor | None = None
        size = len(paths) * 2 * opener.size**2
        if device.type == "cuda" and size <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
            films = torch.empty(len(paths), 1, opener.size, opener.size, dtype=torch.int16, device=device)
            for start in range(0, len(paths), STAGED_FILMS):
                some = self.paths[start : start + STAGED_FILMS]
                films[start : start + len(some)] = torch.from_numpy(opener.stack(some).view(np.int16))[:, None]
            self.resident, self.targets = films, targets.to(device)

    def batch(self, chosen: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Return films (N, 1, size, size) in [0, 1] and targets of the chosen numbers."""
        numbers = torch.as_tensor(chosen, device=self.targets.device)
        if self.resident is None:
            whole = torch.from_numpy(self.opener.stack([self.paths[i] for i in chosen]).view(np.int16))[:, None]
        else:
            whole = self.resident[numbers]
        films = (whole.to(torch.int32) & UINT16_MAX).to(torch.float32) / UINT16_MAX
        return TensorRadiograph(films), self.kind(self.targets[numbers])


class VaryFilms(RandTransform):
    """Flip, turn, zoom, shift and re-expose each film of a batch its own way; training only.

    The paper's flips, rotations, crops and tone changes, with the chances and ranges of fastai's `aug_transforms`. That
    one computes each on the device as a chain of small steps, half of the time of a training step on a large GPU; here
    all chance is drawn at once, moves are one resampling, and tone is one curve. There is no perspective warp, which no
    film has. What comes in at an edge repeats it.
    """

    order, split_idx = 30, 0

    def __init__(self, strength: float):
        super().__init__(p=1.0)
        self.strength = strength

    def encodes(self, films: TensorRadiograph) -> TensorRadiograph:  # noqa: D102
        plain = films.as_subclass(torch.Tensor)  # type: ignore[arg-type]
        moves, tone = draw_moves(len(films), self.strength), draw_tone(len(films), self.strength)
        grid = torch.nn.functional.affine_grid(moves.to(plain.device), list(plain.shape), align_corners=True)
        moved = torch.nn.functional.grid_sample(plain, grid, padding_mode="border", align_corners=True)
        steepness, shift = tone.to(plain.device)[:, :, None, None, None]
        return TensorRadiograph((moved.logit(LOGIT_EPS) * steepness + shift).sigmoid())


def _sometimes(n: int, low: float, high: float, usual: float, share: float = 0.75) -> torch.Tensor:
    """Draw (n,) from [low, high] for a share of the films; the others get the usual value."""
    drawn, chosen = torch.rand(2, n)
    return torch.where(chosen < share, low + (high - low) * drawn, torch.full((n,), usual))


def draw_moves(n: int, strength: float) -> torch.Tensor:
    """Draw matrices (n, 2, 3) from the places of a varied film to those of the film, both from -1 to 1."""
    mirror = 1.0 - 2.0 * (torch.rand(n) < 0.5)
    angle = _sometimes(n, -MAX_TURN * strength, MAX_TURN * strength, 0.0).deg2rad()
    part = 1 / _sometimes(n, 1.0, 1.0 + MAX_ZOOM * strength, 1.0)  # of the side that stays in view
    centre = (1 - part) * (2 * torch.rand(2, n) - 1) + 2 * SHIFT * strength * (2 * torch.rand(2, n) - 1)
    across = torch.stack([mirror * angle.cos() * part, mirror * angle.sin() * part, mirror * centre[0]], 1)
    down = torch.stack([-angle.sin() * part, angle.cos() * part, centre[1]], 1)
    return torch.stack([across, down], 1)


def draw_tone(n: int, strength: float) -> torch.Tensor:
    """Draw steepness and shift (2, n) of a straight line in the logit of the grey values: contrast and brightness."""
    most = min(MAX_LIGHT * strength, 0.9)
    steepness = _sometimes(n, math.log(1 - most), -math.log(1 - most), 0.0).exp()
    return torch.stack([steepness, _sometimes(n, 0.5 * (1 - most), 0.5 * (1 + most), 0.5).logit()])


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


def batch_transforms(strength: float, cuda: bool) -> list[Transform]:
    """Return the transforms of whole batches: variation at `strength`, where it is not 0, and Normalize."""
    vary = [VaryFilms(strength)] if strength else []
    return [*vary, Normalize.from_stats(IMAGENET_MEAN, IMAGENET_STD, cuda=cuda)]


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
        dl_type=FilmDL,
        get_x=film_path,
        get_y=film_targets if multilabel else film_label,
        splitter=by_split,
        batch_tfms=batch_transforms(config.augment, device.type == "cuda"),
    )
    parts = [seen[seen["split"] == name] for name in ("train", "valid")]
    # Films are in memory: worker processes would cost more than they save.
    dls = block.dataloaders(
        seen, bs=min(config.batch_size, len(parts[0])), num_workers=0, device=device, path=config.out,
        val_bs=max(config.batch_size, VALID_BATCH) if device.type == "cuda" else config.batch_size,
    )  # fmt: skip
    for dl, part in zip(dls, parts, strict=True):
        known = np.stack(part["targets"].tolist()) if multilabel else targets_of(part, classes).argmax(1)
        dl.serve(opener, part["path"].tolist(), torch.from_numpy(known))
    return dls
