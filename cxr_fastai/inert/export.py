"""learner.pkl -> InertExport: all that is needed to predict with it, and what unpickling it would have run."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cxr_fastai.errors import ModelFileError
from cxr_fastai.inert.archive import members_of
from cxr_fastai.inert.instructions import walk
from cxr_fastai.inert.learner import Step, read_learner, size_after
from cxr_fastai.inert.machine import Machine
from cxr_fastai.inert.names import refuse_attacks, unneeded_calls, unneeded_names
from cxr_fastai.inert.network import Layer, architecture_of, arrays_of, layers_of
from cxr_fastai.modelfile import read_file


@dataclass(frozen=True)
class InertExport:
    """A fastai export as data.

    Attributes
    ----------
    weights : dict of str to numpy.ndarray
        Parameters and buffers, named as in the network's state dict; read-only, finite.
    layers : dict of str to Layer
        Class and settings of each module, named as torch names them.
    classes : tuple of str
        The vocabulary, in the order of the logits.
    task : str
        binary, multiclass (softmax) or multilabel (sigmoid), by the loss.
    architecture : str
        torchvision's name of the body.
    opened : str
        What a film is opened as: "film" by our own reader, "RGB" or "L" by Pillow.
    steps : tuple of Step
        What is then done to a film that is not for training, in order.
    size : (int, int)
        Height and width of what reaches the network, in pixels.
    globals, calls : tuple of str
        Every name that unpickling it would have imported, and called.
    unneeded : tuple of str
        Those of both that no export of fastai's own needs: code of whoever made it, or an attack.
    """

    path: Path
    weights: dict[str, np.ndarray] = field(repr=False)
    layers: dict[str, Layer] = field(repr=False)
    classes: tuple[str, ...]
    task: str
    architecture: str
    opened: str
    steps: tuple[Step, ...]
    size: tuple[int, int]
    globals: tuple[str, ...] = field(repr=False)
    calls: tuple[str, ...] = field(repr=False)
    unneeded: tuple[str, ...]

    @property
    def resize_method(self) -> str:
        """How a film is brought to its size: crop, squish, pad, or RandomResizedCrop's way."""
        settings = next((s.settings for s in self.steps if s.name == "Resize"), None)
        first = self.steps[0].name if self.steps else "none"
        return settings["method"] if settings else {"OpenFilm": "squish"}.get(first, first)

    @property
    def normalise(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and deviation that are taken off, a number a channel; None where there are none."""
        found = next((s.settings for s in self.steps if s.name == "Normalize"), None)
        return (found["mean"], found["std"]) if found else None


def read_export(path: str | Path) -> InertExport:
    """Read a fastai export (`learner.pkl`) without running anything in it.

    Raises
    ------
    ModelFileError
        Where it is not an honest, undamaged export of a picture classifier of a known architecture. One line.
    """
    data = read_file(path)
    try:
        return export_of(Path(path), members_of(data))
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None


def storages_of(members: dict[str, memoryview]) -> dict[str, int]:
    """Return the bytes of each member that holds numbers, by its key."""
    return {name[5:]: len(content) for name, content in members.items() if name.startswith("data/")}


def export_of(path: Path, members: dict[str, memoryview]) -> InertExport:
    """Return the export that the members of an archive hold."""
    machine = Machine(bytes(members["data.pkl"]), storages_of(members))
    root = walk(machine)
    refuse_attacks(machine.calls)
    reading = read_learner(root, members)
    layers, tensors = layers_of(root.get("model"))
    names, calls = tuple(map(str, machine.globals.values())), tuple(machine.calls)
    return InertExport(
        path=path,
        weights=arrays_of(tensors, members),
        layers=layers,
        classes=reading.classes,
        task=reading.task,
        architecture=architecture_of(layers),
        opened=reading.opened,
        steps=reading.steps,
        size=size_after(reading.steps),
        globals=names,
        calls=calls,
        unneeded=(*unneeded_names(names), *unneeded_calls(calls)),
    )
