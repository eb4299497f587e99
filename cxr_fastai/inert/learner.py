"""The record of a fastai Learner -> its classes, and what its validation DataLoader does to a picture.

`load_learner(...).test_dl(films)` opens each item, runs the item transforms on it, and the batch transforms on the
batch, with those for training left out. Of fastai's own transforms, the ones that matter are followed; where one is
unknown, the pictures that the network was trained for cannot be made, and the export is refused by its name.
"""

from typing import Any, NamedTuple

import numpy as np

from cxr_fastai.errors import ModelFileError
from cxr_fastai.inert.network import array_of
from cxr_fastai.inert.records import Record, Tensor, shown

MAX_CLASSES = 10_000
MAX_SIDE = 4_096
OWN_OPENER = "cxr_fastai.data.OpenFilm"
# Class of the opened item, as the dataset recorded it -> what a film becomes first.
OPENED = {"fastai.vision.core.PILImage": "RGB", "fastai.vision.core.PILImageBW": "L"}
SOFTMAX = frozenset({
    "CrossEntropyLossFlat", "CrossEntropyLoss", "LabelSmoothingCrossEntropyFlat", "LabelSmoothingCrossEntropy",
    "FocalLossFlat", "FocalLoss",
})
SIGMOID = frozenset(("BCEWithLogitsLossFlat", "BCEWithLogitsLoss", "KnownBCE"))
AFFINE = ("AffineCoordTfm", "Flip", "Dihedral", "Rotate", "Zoom", "Warp")


class Step(NamedTuple):
    """One transform of the validation films, by its class in fastai, with the settings that matter."""

    name: str
    settings: dict[str, Any]


class Reading(NamedTuple):
    """What a Learner knows besides its network."""

    classes: tuple[str, ...]
    task: str
    opened: str
    steps: tuple[Step, ...]


def read_learner(root: Any, members: dict[str, memoryview]) -> Reading:
    """Return classes, task and preprocessing of a Learner's record.

    Raises
    ------
    ModelFileError
        Where it is no Learner, or one for something else than classes of pictures.
    """
    if not isinstance(root, Record) or root.kind != "fastai.learner.Learner":
        raise ModelFileError(f"it holds {shown(root)}, not a Learner that fastai exported")
    loaders = _attribute(root.get("dls"), "loaders")
    valid = loaders[-1 if len(loaders) < 2 else 1] if isinstance(loaders, list) and loaders else None
    inputs, targets = _two(_items(_attribute(_attribute(valid, "dataset"), "tls")))
    classes = _classes(_transforms(_attribute(targets, "tfms")))
    opened, first = _opened(inputs)
    if _transforms(_attribute(valid, "before_batch")):
        raise ModelFileError("its batches are changed before they are put together; only plain batches are read")
    after = [*_transforms(_attribute(valid, "after_item")), *_transforms(_attribute(valid, "after_batch"))]
    steps = [step for transform in after for step in _step(transform, members)]
    return Reading(classes, _task(root.get("loss_func"), len(classes)), opened, (*first, *steps))


def _attribute(record: Any, name: str) -> Any:
    value = record.get(name) if isinstance(record, Record) else None
    if value is None:
        raise ModelFileError(f"its Learner has no {name} where fastai's have it; export it with fastai 2.7 or newer")
    return value


def _items(value: Any) -> list[Any]:
    """Return the items of a list, of fastcore's `L`, or of what holds one, as a CategoryMap does."""
    items = value
    for _ in range(2):
        items = items if isinstance(items, list) else _attribute(items, "items")
    if not isinstance(items, list) or len(items) > MAX_CLASSES:
        raise ModelFileError(f"its Learner has {shown(items)} where fastai's have a list")
    return items


def _two(parts: list[Any]) -> tuple[Any, Any]:
    if len(parts) != 2:
        raise ModelFileError(f"its data have {len(parts)} parts, not a picture and what is on it")
    return parts[0], parts[1]


def _transforms(pipeline: Any) -> list[Record]:
    transforms = _items(_attribute(pipeline, "fs"))
    strange = next((t for t in transforms if not isinstance(t, Record) or not t.kind), None)
    if strange is not None:
        raise ModelFileError(f"its films go through {shown(strange)}, which is no transform of fastai's")
    return transforms


def _class_name(record: Record) -> str:
    return record.kind.rpartition(".")[2]


def _classes(transforms: list[Record]) -> tuple[str, ...]:
    categorize = next((t for t in reversed(transforms) if _class_name(t).endswith("Categorize")), None)
    if categorize is None:
        raise ModelFileError(f"it predicts {shown(transforms[-1:])}, not classes")
    names = _items(_attribute(categorize, "vocab"))
    if not 2 <= len(names) <= MAX_CLASSES or not all(isinstance(name, str | int) for name in names):
        raise ModelFileError("its classes are not two or more names")
    texts = tuple(str(name) for name in names)
    if len(set(texts)) != len(texts) or not all(text.isprintable() for text in texts):
        raise ModelFileError("two of its classes have the same name, or one cannot be printed")
    return texts


def _task(loss: Any, classes: int) -> str:
    name = _class_name(loss) if isinstance(loss, Record) else shown(loss).rpartition(".")[2]
    if name in SIGMOID:
        return "multilabel"
    if name not in SOFTMAX:
        raise ModelFileError(f"its loss is {shown(loss)}, which does not tell how its outputs become probabilities")
    return "binary" if classes == 2 else "multiclass"


def _opened(inputs: Any) -> tuple[str, list[Step]]:
    """Return what the network's films are opened as, and in which size; nothing may come after the opening."""
    transforms, types = _transforms(_attribute(inputs, "tfms")), _items(_attribute(inputs, "types"))
    last = transforms[-1] if transforms else None
    if last is not None and last.kind == OWN_OPENER and _side(last.get("size")):
        return "film", [Step("OpenFilm", {"size": (last.get("size"),) * 2})]
    opened = OPENED.get(shown(types[-1])) if types and last is not None else None
    if opened is None or last is None or last.get("_name") != "PILBase.create":
        raise ModelFileError(f"films are opened by {shown(last)} as {shown(types[-1:])}, which only its code can do")
    return opened, []


def _step(transform: Record, members: dict[str, memoryview]) -> list[Step]:
    """Return what a transform does to films that are not for training: one step, or none."""
    name = _class_name(transform)
    ours = transform.kind.startswith("fastai.")
    if ours and name in ("Resize", "RandomResizedCrop"):
        return [Step(name, {"size": _size(transform), **_resizing(transform)})]
    if ours and name in AFFINE:
        size = transform.get("size")
        keys = {key: transform.get(key) for key in ("mode", "pad_mode", "align_corners")}
        return [Step("AffineCoordTfm", {"size": None if size is None else _height_width(size), **keys})]
    if ours and name == "IntToFloatTensor":
        return [Step(name, {"div": _number(transform.get("div"))})]
    if ours and name == "Normalize":
        return [Step(name, {key: _vector(transform.get(key), members, key == "std") for key in ("mean", "std")})]
    if (ours and name == "ToTensor") or transform.get("split_idx") == 0:
        return []
    raise ModelFileError(f"its films go through {transform.kind}, which only its code can do")


def _resizing(transform: Record) -> dict[str, Any]:
    mode = transform.get("mode")
    filter_ = mode.arguments[0] if isinstance(mode, Record) and len(mode.arguments) == 1 else mode
    if filter_ not in range(6):
        raise ModelFileError(f"its films are resized by {shown(mode)}, which is no filter of Pillow's")
    if _class_name(transform) == "RandomResizedCrop":
        return {"resample": filter_, "val_xtra": _number(transform.get("val_xtra"))}
    method, pad = transform.get("method"), transform.get("pad_mode")
    if method not in ("crop", "squish", "pad") or pad not in ("zeros", "border", "reflection"):
        raise ModelFileError(f"its films are resized by {shown(method)} with {shown(pad)}, which is not fastai's")
    return {"resample": filter_, "method": method, "pad_mode": pad}


def _side(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_SIDE


def _size(transform: Record) -> tuple[int, int]:
    """Return width and height, which fastai keeps in this order."""
    size = transform.get("size")
    pair = size.arguments[0] if isinstance(size, Record) and len(size.arguments) == 1 else size
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(map(_side, pair)):
        raise ModelFileError(f"its films are resized to {shown(size)}, which is no size")
    return pair[0], pair[1]


def _height_width(size: Any) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(map(_side, pair)):
        raise ModelFileError(f"its batches are resized to {shown(size)}, which is no size")
    return pair[0], pair[1]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**32:
        raise ModelFileError(f"its films are scaled by {shown(value)}, which makes no sense")
    return float(value)


def _vector(value: Any, members: dict[str, memoryview], deviation: bool) -> tuple[float, ...]:
    """Return the mean or deviation of each channel."""
    if not isinstance(value, Tensor) or value.storage.kind != "FloatStorage":
        raise ModelFileError("its films are normalised by something that is no tensor")
    numbers = array_of(value, members).reshape(-1)
    if numbers.size not in (1, 3) or not np.isfinite(numbers).all() or (deviation and not (numbers > 0).all()):
        raise ModelFileError("its films are normalised by numbers that make no sense")
    return tuple(numbers.tolist())


def size_after(steps: tuple[Step, ...]) -> tuple[int, int]:
    """Return height and width of what reaches the network."""
    size = None
    for step in steps:
        if step.name in ("Resize", "RandomResizedCrop", "OpenFilm"):
            size = step.settings["size"][::-1]
        elif step.name == "AffineCoordTfm":
            size = step.settings["size"] or size
    if size is None:
        raise ModelFileError("its films keep their own sizes (it has no Resize); export it with one")
    return size
