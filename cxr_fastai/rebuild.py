"""A fastai export, read inertly -> the same network, and the same films before it, without unpickling anything.

The network is made by torchvision, fastai's own layers and ours, as the export's records say; then every layer's class
and settings and every weight's name, type and shape are compared with what the export has, and one that differs is an
error. So the logits are those of `load_learner`, to the last bit. `predict_export.py` turns them into rows.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fastai.layers import AdaptiveConcatPool2d, Flatten
from fastai.vision.learner import _update_first_layer
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pad

from cxr_fastai.errors import ModelFileError, UnreadableImage
from cxr_fastai.images import read_radiograph, to_input
from cxr_fastai.inert import InertExport, Layer, Step
from cxr_fastai.inert.network import BODIES
from cxr_fastai.model import Bodies, EvidenceHead, make_body

# What a layer may have otherwise without another answer, since films are only predicted.
INDIFFERENT = frozenset(("training", "inplace", "p", "momentum", "drop_rate", "memory_efficient"))
PADS = {"zeros": "constant", "border": "edge", "reflection": "reflect"}  # fastai's word -> torchvision's
HEAD = "cxr_fastai.model.EvidenceHead"


# The network


def rebuild(export: InertExport) -> nn.Sequential:
    """Return the network of an export, in evaluation mode on the CPU: films as `prepare` gives them -> logits (N, K).

    Raises
    ------
    ModelFileError
        Where any layer or weight is not as this version of torchvision, fastai or this package makes it.
    """
    with torch.device("meta"):
        model = nn.Sequential(_body(export), _head(export))
    try:
        _compare_layers(model, export.layers)
        _compare_weights(model.state_dict(), export)
        _try_on_shapes(model.eval(), export)
    except ModelFileError as error:
        raise ModelFileError(f"{export.path}: {error}") from None
    # Arrays are views of the file, which is read-only; torch wants its own.
    state = {name: torch.from_numpy(array.copy()) for name, array in export.weights.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _body(export: InertExport) -> nn.Module:
    if export.layers["0"].kind != BODIES:
        body = make_body(export.architecture)[0]
        first = next((array for array in export.weights.values() if array.ndim == 4), np.empty((0, 3)))
        _update_first_layer(body, first.shape[1], pretrained=False)  # fastai's, for `n_in`: films of one channel
        return body
    count = sum(name.startswith("0.") and name.count(".") == 1 for name in export.layers)
    return Bodies([make_body(export.architecture)[0] for _ in range(count)])


def _head(export: InertExport) -> nn.Module:
    if export.layers["1"].kind != HEAD:
        return _layer("1", export)
    weight = export.weights.get("1.linear.weight")
    if weight is None or weight.ndim != 2:
        raise ModelFileError(f"{export.path}: its head has no weights")
    return EvidenceHead(weight.shape[1], weight.shape[0], 0.0)


def _layer(name: str, export: InertExport) -> nn.Module:
    """Return the layer of a head that an export has under this name."""
    layer = export.layers[name]
    make = LAYERS.get(layer.kind)
    if make is None:
        raise ModelFileError(f"{export.path}: its head has a {layer.kind}, which vision_learner's heads do not have")
    try:
        return make(layer.settings, name, export)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelFileError(f"{export.path}: its {layer.kind} at {name!r} makes no sense ({error!r:.80})") from None


def _sequential(settings: dict[str, Any], name: str, export: InertExport) -> nn.Module:
    depth = name.count(".") + 1
    below = [n for n in export.layers if n.startswith(f"{name}.") and n.count(".") == depth]
    return nn.Sequential(*(_layer(n, export) for n in below))


def _linear(settings: dict[str, Any], name: str, export: InertExport) -> nn.Module:
    return nn.Linear(settings["in_features"], settings["out_features"], bias=f"{name}.bias" in export.weights)


def _batch_norm(settings: dict[str, Any], name: str, export: InertExport) -> nn.Module:
    return nn.BatchNorm1d(settings["num_features"], eps=settings["eps"], affine=settings["affine"])


LAYERS: dict[str, Callable[[dict[str, Any], str, InertExport], nn.Module]] = {
    "torch.nn.modules.container.Sequential": _sequential,
    "torch.nn.modules.linear.Linear": _linear,
    "torch.nn.modules.batchnorm.BatchNorm1d": _batch_norm,
    "torch.nn.modules.dropout.Dropout": lambda settings, *_: nn.Dropout(),
    "torch.nn.modules.activation.ReLU": lambda settings, *_: nn.ReLU(),
    "torch.nn.modules.pooling.AdaptiveAvgPool2d": lambda settings, *_: nn.AdaptiveAvgPool2d(settings["output_size"]),
    "torch.nn.modules.flatten.Flatten": lambda s, *_: nn.Flatten(s["start_dim"], s["end_dim"]),
    "fastai.layers.AdaptiveConcatPool2d": lambda settings, *_: AdaptiveConcatPool2d(settings["size"]),
    "fastai.layers.Flatten": lambda settings, *_: Flatten(settings["full"]),
}


def _compare_layers(model: nn.Module, layers: dict[str, Layer]) -> None:
    """Refuse a network whose layers are not those that were made."""
    ours = dict(model.named_modules(remove_duplicate=False))
    if strange := set(ours) ^ set(layers):
        raise ModelFileError(f"its network has other layers than the one made again (such as {min(strange)[:60]!r})")
    for name, module in ours.items():
        layer, kind = layers[name], f"{type(module).__module__}.{type(module).__qualname__}"
        if layer.kind != kind:
            raise ModelFileError(f"its layer {name!r} is a {layer.kind}, not a {kind}")
        for key, value in layer.settings.items():
            made = module.__dict__.get(key, value)
            same = value == (tuple(made) if isinstance(made, list) else made)
            if key not in INDIFFERENT and (not same or _shadows(module, key)):
                raise ModelFileError(f"its layer {name!r} has {key[:40]!r} = {value!r:.40}, not {made!r:.40}")
        if changed := next((key for key in layer.others if key in module.__dict__ or _shadows(module, key)), None):
            raise ModelFileError(f"its layer {name!r} has a {changed[:40]!r} of its own, which would run code")


def _shadows(module: nn.Module, key: str) -> bool:
    """Tell whether an attribute would take the place of code: a method, say, of a module's class."""
    return key not in module.__dict__ and callable(getattr(type(module), key, None))


def _compare_weights(made: dict[str, torch.Tensor], export: InertExport) -> None:
    """Refuse weights that are not just those of the network that was made."""
    if strange := set(made) ^ set(export.weights):
        raise ModelFileError(f"its weights are not those of its network ({min(strange)[:60]!r} is one too many or few)")
    for name, tensor in made.items():
        array = export.weights[name]
        if tuple(tensor.shape) != array.shape or torch.empty(0, dtype=tensor.dtype).numpy().dtype != array.dtype:
            raise ModelFileError(
                f"its weight {name!r} is {array.dtype} {array.shape}, not {tensor.dtype} {tuple(tensor.shape)}"
            )


def _try_on_shapes(model: nn.Module, export: InertExport) -> None:
    """Refuse a network, on the meta device, that makes no logits of films."""
    channels = 1 if export.opened == "L" and len((export.normalise or ((),))[0]) < 3 else 3
    try:
        made = tuple(model(torch.empty(1, channels, *export.size, device="meta")).shape)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelFileError(f"its network does not take its films ({str(error).splitlines()[0]:.100})") from None
    if made != (1, len(export.classes)):
        raise ModelFileError(f"its network makes {made[1:]} numbers of a film for {len(export.classes)} classes")


# The films


def prepare(source: Any, export: InertExport) -> np.ndarray:
    """Return a film as the export's own DataLoader would hand it to the network, (C, H, W) float32.

    Parameters
    ----------
    source
        Whatever `read_radiograph` reads, or its (H, W) float32 in [0, 1].

    Raises
    ------
    UnreadableImage
        Where the film cannot be read, or fastai could not have padded it.
    """
    pixels = source if isinstance(source, np.ndarray) else read_radiograph(source)
    if export.opened == "film":
        film = np.broadcast_to(to_input(pixels, export.size[0]), (3, *export.size))
    else:
        image = Image.fromarray(np.round(pixels * 255).astype(np.uint8)).convert(export.opened)
        for step in export.steps:
            if step.name in ("Resize", "RandomResizedCrop"):
                image = _resized(image, step)
        film = np.asarray(image)
        film = film[None] if film.ndim == 2 else film.transpose(2, 0, 1)
    # As fastai's collate leaves it in memory: another order of the sums would change the last bit of a logit.
    batch = torch.from_numpy(np.ascontiguousarray(film, np.float32))[None]
    for step in export.steps:
        batch = on_batch(batch, step, export.opened)
    return batch[0].numpy()


def _resized(image: Image.Image, step: Step) -> Image.Image:
    """Resize a picture as fastai does with those that are not for training (fastai.vision.augment)."""
    size, filter_ = step.settings["size"], Image.Resampling(step.settings["resample"])
    (width, height), whole = image.size, image.size
    if step.name == "RandomResizedCrop":
        more = math.ceil(max(size) * step.settings["val_xtra"] / 8) * 8
        larger = image.resize((size[0] + more, size[1] + more), filter_)
        return _cut(larger, size, (more // 2, more // 2), "zeros")
    if step.settings["method"] == "squish":
        return image.resize(size, filter_)
    across, down = width / size[0], height / size[1]
    ratio = max(across, down) if step.settings["method"] == "pad" else min(across, down)
    whole = (int(ratio * size[0]), int(ratio * size[1]))
    corner = (int(0.5 * (width - whole[0])), int(0.5 * (height - whole[1])))
    return _cut(image, whole, corner, step.settings["pad_mode"]).resize(size, filter_)


def _cut(image: Image.Image, size: tuple[int, int], corner: tuple[int, int], pad_mode: str) -> Image.Image:
    """Cut a window out of a picture; what lies outside is padded."""
    (width, height), (left, top) = image.size, corner
    right, bottom = left + size[0], top + size[1]
    inner = image.crop((max(left, 0), max(top, 0), min(right, width), min(bottom, height)))
    margins = [max(-left, 0), max(-top, 0), max(right - width, 0), max(bottom - height, 0)]
    if not any(margins):
        return inner
    try:
        return pad(inner, margins, padding_mode=PADS[pad_mode])
    except ValueError:
        raise UnreadableImage(f"it cannot be padded to {size[0]}×{size[1]} as this model wants it") from None


def on_batch(batch: torch.Tensor, step: Step, opened: str) -> torch.Tensor:
    """Do to a batch (N, C, H, W) what one of fastai's batch transforms does to films that were opened in this way."""
    if step.name == "IntToFloatTensor":
        return batch.div(step.settings["div"])
    if step.name == "Normalize":
        mean, std = (torch.tensor(step.settings[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
        return (batch - mean) / std
    if step.name == "AffineCoordTfm" and opened != "film":  # model.onnx takes our own films through no grid either
        return _through_grid(batch, step.settings)
    return batch


def _through_grid(batch: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """Interpolate a batch at its own places, as fastai's AffineCoordTfm does when nothing is turned or moved."""
    size, align = settings["size"] or tuple(batch.shape[-2:]), settings["align_corners"]
    places = torch.nn.functional.affine_grid(torch.eye(3)[None, :2], [*batch.shape[:2], *size], align_corners=align)
    if settings["mode"] == "bilinear":  # fastai's own way of making pictures much smaller, sizes as it reads them
        less = min(batch.shape[-2] / places.shape[-2], batch.shape[-1] / places.shape[-1]) / 2
        if less > 1 and less > 2 / float(places.max() - places.min()):
            batch = torch.nn.functional.interpolate(
                batch, scale_factor=1 / less, mode="area", recompute_scale_factor=True
            )
    return torch.nn.functional.grid_sample(
        batch, places, mode=settings["mode"], padding_mode=settings["pad_mode"], align_corners=align
    )
