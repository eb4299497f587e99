"""The bodies: a network of torchvision or timm by its name, cut where it ends in a map of features.

    films (N, 3, H, W) -> features (N, F, h, w), channels before places, so that `model.EvidenceHead` can follow

Names are torchvision's first, then timm's (`pip install timm`).
"""

import contextlib
import difflib
import functools
import importlib
import importlib.util
import socket
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torchvision
from fastai.vision.learner import create_body, has_pool_type, model_meta
from torch import nn

from cxr_fastai.errors import UsageError

DOWNLOAD_SECONDS = 20.0
PROBE_SIZE = 64
Made = TypeVar("Made")


class TimmBody(nn.Module):
    """A network of timm without its head: films (N, 3, H, W) -> features (N, F, h, w)."""

    def __init__(self, net: Any):
        super().__init__()
        self.net: Any = net

    def forward(self, films: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return self.net.forward_features(films)


def architecture(name: str) -> Callable[..., nn.Module] | None:
    """Return torchvision's constructor of a classifier, or None where torchvision has none of this name."""
    return torchvision.models.get_model_builder(name) if name in _torchvision_names() else None


def known_to_fastai(name: str) -> bool:
    """Tell whether fastai itself says where this network is cut, and in which groups its layers are trained."""
    return architecture(name) in model_meta


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _timm() -> types.ModuleType | None:
    return importlib.import_module("timm") if importlib.util.find_spec("timm") else None


def make_body(name: str) -> tuple[nn.Module, dict[str, str]]:
    """Return the convolutional body of a network, and its library's name of each tensor -> the name there.

    The weights are random. The names hold every parameter and buffer that stays in the body.

    Raises
    ------
    UsageError
        Where there is no such network, with near names, or where it has no body of this kind.
    """
    constructor = architecture(name)
    if constructor is None:
        body = TimmBody(_create_timm(name))
        return body, {key.removeprefix("net."): key for key in body.state_dict()}
    whole = constructor(weights=None)
    body = create_body(whole, pretrained=False, cut=_cut(name, constructor, whole))
    ours = {id(tensor): key for key, tensor in (*body.named_parameters(), *body.named_buffers())}
    theirs = {key: ours[id(t)] for key, t in (*whole.named_parameters(), *whole.named_buffers()) if id(t) in ours}
    return body, theirs


def _create_timm(name: str, pretrained: bool = False) -> Any:
    timm = _timm()
    # After a point stands the tag of the weights: with it, the name must be one that has them.
    if timm is None or not timm.is_model(name) or ("." in name and not timm.models.is_model_pretrained(name)):
        known = {*_torchvision_names(), *(timm.list_models() if timm else ())}
        known |= {*timm.list_models(f"{name.partition('.')[0]}.*", pretrained=True)} if timm and "." in name else set()
        near = difflib.get_close_matches(name, sorted(known), 3)
        without = "torchvision has no such network, and timm is not installed (pip install timm)"
        raise UsageError(
            f"--arch is {name}: {'neither torchvision nor timm has such a network' if timm else without}"
            + (f"; near it: {', '.join(near)}" if near else "")
        )
    return timm.create_model(name, pretrained=pretrained, num_classes=0, global_pool="")


def _cut(name: str, constructor: Callable, whole: nn.Module) -> int:
    """Return how many children stay: fastai's own number, else those before the last pool, else all but the last.

    What is cut off may be linear layers only: in shufflenet the last pool stands before all that matters.
    """
    known = model_meta.get(constructor, {}).get("cut")
    if known is not None:
        return known
    children = list(whole.children())
    pools = [i for i, child in enumerate(children) if has_pool_type(child)]
    for cut in (*pools[-1:], len(children) - 1):
        lost = [layer for child in children[cut:] for layer in child.modules()]
        if not any(isinstance(layer, nn.Conv2d) for layer in lost):
            return cut
    raise UsageError(_no_map(name, "it has no place to cut"))


def _no_map(name: str, reason: str) -> str:
    return f"--arch is {name}: its body does not end in a map of features (N, F, h, w) ({reason}); choose another"


@functools.cache
def count_features(name: str, size: int = PROBE_SIZE) -> int:
    """Return the number of channels F that a body ends in; raise UsageError where films of `size` give no map."""

    def shape() -> tuple[tuple[int, ...], int]:
        body = make_body(name)[0].eval()
        with torch.no_grad():
            found = tuple(body(torch.empty(2, 3, size, size)).shape)
        return found, body.net.num_features if isinstance(body, TimmBody) else found[1]

    try:
        found, features = without_numbers(shape)
    except UsageError:
        raise
    except Exception as error:  # a body that is not made for this raises anything
        raise UsageError(_no_map(name, f"films of {size} pixels: {first_line(error)}")) from error
    if len(found) != 4 or found[1] != features:
        raise UsageError(_no_map(name, f"it gives {found} for 2 films of {size} pixels"))
    return features


@functools.cache
def names_in_body(name: str) -> dict[str, str]:
    """Return the library's name of each tensor that stays in a body -> its name there."""
    return without_numbers(lambda: make_body(name)[1])


def without_numbers(make: Callable[[], Made]) -> Made:
    """Call `make` without allocating weights where the network allows it; chance goes on as if nothing had been."""
    with contextlib.suppress(NotImplementedError, RuntimeError), torch.device("meta"):
        return make()
    with torch.random.fork_rng(devices=[]):  # regnet looks at numbers while it is made
        return make()


def imagenet_state(name: str) -> tuple[dict[str, torch.Tensor], str]:
    """Return the pretrained weights of a network, from the cache or downloaded, and a line on what they are.

    Raises
    ------
    OSError or RuntimeError
        Where they cannot be had.
    """
    with _patient_network():
        if architecture(name) is not None:
            weights = torchvision.models.get_model_weights(name).DEFAULT
            state = weights.get_state_dict(progress=True, check_hash=True)
            return dict(state), f"ImageNet weights of {name} (torchvision {weights.name})"
        try:
            net = _create_timm(name, pretrained=True)
        except UsageError:
            raise
        except Exception as error:  # the hub's client has errors of its own, and of its own client's
            raise OSError(first_line(error)) from error
    tag = net.pretrained_cfg["tag"]
    return dict(net.state_dict()), f"pretrained weights of {name} (timm{f' {tag}' if tag else ''})"


@contextlib.contextmanager
def _patient_network() -> Iterator[None]:
    """Bound how long a silent network is waited for, and keep standard output for results."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_SECONDS)  # torch.hub sets none: a silent network would hang the run
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        socket.setdefaulttimeout(before)


def groups_of_layers(model: nn.Module) -> list[list[nn.Parameter]]:
    """Return three groups of parameters, as fastai has for the networks that it knows: early, late, head."""
    body, head = (list(part.parameters()) for part in model.children())
    return [body[: len(body) // 2], body[len(body) // 2 :], head]


def first_layers(body: nn.Module, size: int, part: int) -> list[nn.Parameter]:
    """Return the parameters of the layers that run before the maps are smaller than a part of the film's side.

    Of an eighth (8) that is in a DenseNet the stem and the first two blocks with their transitions, in a ResNet the
    stem and the first two stages; of a half (2) it is the stem. One film goes through the body, in evaluation. A place
    less, where layers do not pad, is taken for that.

    Parameters
    ----------
    size
        Side of a film in pixels.
    part
        How many times smaller than that the side of their maps is at most.
    """
    found: dict[int, nn.Parameter] = {}
    smaller: list[nn.Module] = []

    def look(layer: nn.Module, films: Any, maps: Any) -> None:
        if not (isinstance(maps, torch.Tensor) and maps.ndim == 4 and part * (maps.shape[2] + 1) >= size):
            smaller.append(layer)
        elif not smaller:
            found.update((id(one), one) for one in layer._parameters.values() if one is not None)

    hooks = [layer.register_forward_hook(look) for layer in body.modules() if layer._parameters]
    training = body.training
    try:
        with torch.no_grad():
            body.eval()(torch.zeros(1, 3, size, size, device=next(body.parameters()).device))
    finally:
        body.train(training)
        for hook in hooks:
            hook.remove()
    return list(found.values())


def first_line(error: Exception) -> str:
    """Return what an error says, in a line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
