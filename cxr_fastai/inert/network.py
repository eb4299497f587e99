"""The record of a torch module -> its layers and weights, under the names of its state dict, and its architecture."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cxr_fastai.errors import ModelFileError
from cxr_fastai.inert.machine import STORAGES
from cxr_fastai.inert.records import Mapping, Record, Tensor
from cxr_fastai.modelfile import MAX_BYTES

MAX_LAYERS, MAX_DEPTH, MAX_ATTRIBUTES = 10_000, 32, 200
BODIES = "cxr_fastai.model.Bodies"
OWN = re.compile(r"_parameters|_buffers|_modules|_non_persistent_buffers_set|_is_full_backward_hook|_.*hooks.*")

# Blocks that tell torchvision's architectures apart: class, how often, constructor. Whether it is just that one is
# seen when its weights and settings are compared.
ARCHITECTURES = {
    ("torchvision.models.densenet._DenseLayer", 58): "densenet121",
    ("torchvision.models.densenet._DenseLayer", 82): "densenet169",
    ("torchvision.models.densenet._DenseLayer", 98): "densenet201",
    ("torchvision.models.densenet._DenseLayer", 78): "densenet161",
    ("torchvision.models.resnet.BasicBlock", 8): "resnet18",
    ("torchvision.models.resnet.BasicBlock", 16): "resnet34",
    ("torchvision.models.resnet.Bottleneck", 16): "resnet50",
    ("torchvision.models.resnet.Bottleneck", 33): "resnet101",
    ("torchvision.models.resnet.Bottleneck", 50): "resnet152",
}
VGG = {8: "vgg11_bn", 10: "vgg13_bn", 13: "vgg16_bn", 16: "vgg19_bn"}  # by the number of convolutions
KNOWN = "densenet121/161/169/201, resnet18/34/50/101/152 and vgg11/13/16/19_bn of torchvision"


@dataclass(frozen=True)
class Layer:
    """One module: its class, its settings that are plain values, and the names of the others."""

    kind: str
    settings: dict[str, Any]
    others: tuple[str, ...]


def layers_of(root: Any) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """Return the layers of a network and its tensors, by name, in torch's order.

    Raises
    ------
    ModelFileError
        Where it is no tree of plain torch modules, or carries hooks, which would run code.
    """
    layers: dict[str, Layer] = {}
    tensors: dict[str, Tensor] = {}
    waiting = [("", root)]
    while waiting:
        name, record = waiting.pop()
        if len(layers) >= MAX_LAYERS or name.count(".") > MAX_DEPTH:
            raise ModelFileError("its network has more layers than any that is known")
        if not isinstance(record, Record) or not record.kind or not isinstance(record.state, Mapping):
            raise ModelFileError(f"its network has something at {name[:60] or 'its root'!r} that is no torch module")
        layers[name] = _layer(name, record)
        hidden = record.get("_non_persistent_buffers_set", [])
        for key, value in (*_named(record, "_parameters"), *_named(record, "_buffers")):
            if value is not None and key not in hidden:
                tensors[f"{name}.{key}" if name else key] = _tensor(f"{name}.{key}", value)
        below = [(f"{name}.{key}" if name else key, child) for key, child in _named(record, "_modules")]
        waiting.extend((key, child) for key, child in reversed(below) if child is not None)
    return layers, tensors


def _layer(name: str, record: Record) -> Layer:
    attributes = record.state.by_name()
    hidden = record.get("_non_persistent_buffers_set", [])
    plain = isinstance(hidden, list) and len(hidden) <= MAX_ATTRIBUTES and len(attributes) <= MAX_ATTRIBUTES
    if not plain or record.arguments or record.pairs or record.items:
        raise ModelFileError(f"its network has a strange {record.kind} at {name[:60]!r}")
    hooks = [k for k, v in attributes.items() if "hooks" in k and not (isinstance(v, Mapping) and not v.pairs)]
    if hooks:
        raise ModelFileError(f"its network has hooks at {name[:60]!r} ({hooks[0][:60]!r}), which would run code")
    own = {key: value for key, value in attributes.items() if not OWN.fullmatch(key)}
    settings = {key: _plain(value) for key, value in own.items() if _is_plain(value)}
    return Layer(record.kind, settings, tuple(key for key in own if key not in settings))


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return len(value) <= 8 and all(isinstance(v, bool | int | float | str | None) for v in value)
    return isinstance(value, bool | int | float | str | None)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _named(record: Record, attribute: str) -> Iterator[tuple[str, Any]]:
    """Yield what a module keeps under one of torch's own attributes."""
    mapping = record.get(attribute)
    if not isinstance(mapping, Mapping) or len(mapping.pairs) > MAX_LAYERS:
        raise ModelFileError(f"its network has a {record.kind} without {attribute}")
    for key, value in mapping.pairs:
        if type(key) is not str or not key or "." in key:
            raise ModelFileError(f"its network has a {record.kind} with a part that has no name")
        yield key, value


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise ModelFileError(f"its network has a weight {name[:60]!r} that is no tensor")
    return value


def arrays_of(tensors: dict[str, Tensor], members: dict[str, memoryview]) -> dict[str, np.ndarray]:
    """Return the numbers of tensors as read-only views of the file, all of them finite.

    Raises
    ------
    ModelFileError
        Where one is not finite, or repeats its numbers without bound.
    """
    arrays: dict[str, np.ndarray] = {}
    total = 0
    for name, tensor in tensors.items():
        array = array_of(tensor, members)
        total += array.nbytes
        if total > MAX_BYTES:
            raise ModelFileError(f"its weights have more than {MAX_BYTES:,} bytes")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ModelFileError(f"its weight {name[:60]!r} is not finite; train again with a smaller learning rate")
        arrays[name] = array
    return arrays


def array_of(tensor: Tensor, members: dict[str, memoryview]) -> np.ndarray:
    """Return the numbers of a tensor as a read-only view of its member."""
    dtype = np.dtype(STORAGES[tensor.storage.kind])
    if math.prod(tensor.shape) > tensor.storage.length:
        raise ModelFileError("it has a tensor with more numbers than its storage; export it again")
    if not tensor.storage.length:
        return np.empty(tensor.shape, dtype)
    flat = np.frombuffer(members[f"data/{tensor.storage.key}"], dtype)[tensor.offset :]
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)


def architecture_of(layers: dict[str, Layer]) -> str:
    """Return torchvision's name of the body of a network, as fastai's `vision_learner` puts it together.

    Raises
    ------
    ModelFileError
        Where it is another kind of network, with what it is.
    """
    root, body = layers[""].kind, layers["0"].kind if "0" in layers else "nothing"
    if not root.endswith(".Sequential") or {n for n in layers if n and "." not in n} != {"0", "1"}:
        raise ModelFileError(f"its network is a {root}, not a body and a head as vision_learner makes them")
    bodies = [f"0.{i}" for i in range(sum(n.startswith("0.") and n.count(".") == 1 for n in layers))]
    found = {_architecture(layers, name) for name in (bodies if body == BODIES else ["0"])}
    if len(found) != 1 or None in found:
        blocks = sorted({x.kind for n, x in layers.items() if n.startswith("0") and ".nn.modules." not in x.kind})
        raise ModelFileError(f"its body is a {', '.join(blocks[:3]) or body}, which is none of {KNOWN}")
    return str(found.pop())


def _architecture(layers: dict[str, Layer], body: str) -> str | None:
    kinds = Counter(layer.kind for name, layer in layers.items() if name == body or name.startswith(f"{body}."))
    named = [ARCHITECTURES[pair] for pair in kinds.items() if pair in ARCHITECTURES]
    if named:
        return named[0]
    plain = all(kind.startswith("torch.nn.modules.") for kind in kinds)
    norms = "torch.nn.modules.batchnorm.BatchNorm2d" in kinds
    return VGG.get(kinds["torch.nn.modules.conv.Conv2d"]) if plain and norms else None
