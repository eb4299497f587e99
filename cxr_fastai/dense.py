"""DenseNet's blocks with norms that keep their statistics: the same answers with fewer passes over their maps.

A dense layer reads the maps of all layers before it. torchvision's joins them anew for each layer, and autograd cuts
their gradients apart again and adds the pieces up; those passes take as long as the convolutions. Here the maps of a
block lie in one tensor from the beginning, and so do their gradients.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchvision.models.densenet import _DenseBlock, _Transition

from cxr_fastai.folding import Folded, scale_and_shift

aten = torch.ops.aten
LAST = torch.channels_last
SMALL_WEIGHT = 0.01  # of a norm, at which its gradient is no longer taken from that of the convolution behind it


def lean(body: nn.Module) -> None:
    """Put `LeanBlock` and `lean_transition` in the place of a DenseNet's own, in place; folded before."""
    for name, part in list(body.named_modules()):
        if isinstance(part, _Transition):
            body.set_submodule(name, lean_transition(part))
        elif isinstance(part, _DenseBlock) and all(can_be_lean(layer) for layer in part.values()):
            body.set_submodule(name, LeanBlock(list(part.values())))


def lean_transition(transition: Any) -> nn.Module:
    """Return a transition that pools before its 1×1 convolution: the same means for a quarter of the work."""
    return nn.Sequential(transition.norm, transition.relu, transition.pool, transition.conv)


def can_be_lean(layer: Any) -> bool:
    """Tell whether a dense layer is as `LeanBlock` takes it: no dropout, its first convolution folded."""
    return not layer.drop_rate and isinstance(layer.conv1, Folded)


class LeanBlock(nn.Module):
    """The layers of a dense block: maps (N, C, h, w) -> (N, C + growth × layers, h, w), in autocast's type."""

    def __init__(self, layers: Sequence[Any]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:  # noqa: D102
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else maps.dtype
        with torch.autocast("cpu", enabled=False):
            return _Layers.apply(maps, self.layers, kind, *self.layers.parameters())


class _Layers(torch.autograd.Function):
    """For each layer: maps -> norm1 -> ReLU -> conv1 (1×1) -> norm2 -> ReLU -> conv2 (3×3) -> more maps."""

    @staticmethod
    def forward(
        ctx: Any, maps: torch.Tensor, layers: Sequence[Any], kind: torch.dtype, *learned: torch.Tensor
    ) -> torch.Tensor:
        n, known, height, width = maps.shape
        growth = layers[0].conv2.out_channels
        joined = torch.empty(n, known + growth * len(layers), height, width, dtype=kind, memory_format=LAST)
        joined[:, :known] = maps
        ctx.kept, learning = [], any(ctx.needs_input_grad)
        for layer in layers:
            scale, shift = (one.to(kind).view(-1, 1, 1) for one in scale_and_shift(layer.norm1))
            first = torch.addcmul(shift, joined[:, :known], scale).relu_()
            weight1, bias1 = (one.to(kind) for one in layer.conv1.weight_and_bias())
            second = torch.conv2d(first, weight1, bias1).relu_()
            weight2 = layer.conv2.weight.to(kind)
            joined[:, known : known + growth] = torch.conv2d(second, weight2, padding=1)
            known += growth
            if learning:
                ctx.kept.append((layer, scale, first, weight1, second, weight2))
        ctx.save_for_backward(joined)
        return joined

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> tuple[Any, ...]:
        (joined,) = ctx.saved_tensors
        gradient = given[0].clone(memory_format=LAST)
        growth, known = ctx.kept[0][0].conv2.out_channels, joined.shape[1]
        found: list[torch.Tensor] = []
        while ctx.kept:
            layer, scale1, first, weight1, second, weight2 = ctx.kept.pop()
            conv1, norm2 = layer.conv1.convolution, layer.conv1.norm
            known -= growth
            of_maps = gradient[:, known : known + growth].contiguous(memory_format=LAST)
            of_second, of_weight2, _ = behind(of_maps, second, weight2, padding=1, bias=False)
            aten.threshold_backward.grad_input(of_second, second, 0, grad_input=of_second)
            of_first, of_weight1, of_shift2 = behind(of_second, first, weight1, padding=0, bias=True)
            aten.threshold_backward.grad_input(of_first, first, 0, grad_input=of_first)
            gradient[:, :known].addcmul_(of_first, scale1)
            of_scale2 = (conv1.weight * of_weight1).sum((1, 2, 3)) - norm2.running_mean * of_shift2
            found = [
                *of_norm(layer.norm1, joined[:, :known], of_first, (weight1.float() * of_weight1).sum((0, 2, 3))),
                of_weight1 * scale_and_shift(norm2)[0].view(-1, 1, 1, 1),
                of_scale2 * (norm2.running_var + norm2.eps).rsqrt(),
                of_shift2,
                of_weight2,
                *found,
            ]
        return gradient[:, :known], None, None, *found


def behind(
    gradient: torch.Tensor, maps: torch.Tensor, weight: torch.Tensor, padding: int, bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of a convolution's maps, and in float32 of its weight and bias."""
    of_maps, of_weight, of_bias = aten.convolution_backward(
        gradient, maps, weight, [len(weight)] if bias else None, [1, 1], [padding, padding], [1, 1], False, [0, 0], 1,
        [True, True, bias],
    )  # fmt: skip
    return of_maps, of_weight.float(), of_bias.float() if bias else of_bias


def of_norm(norm: Any, maps: torch.Tensor, gradient: torch.Tensor, along: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradients (C,) of weight and bias of a norm before a ReLU.

    Parameters
    ----------
    maps
        What it is given.
    gradient
        Of what it gives, 0 where the ReLU does not fire.
    along
        (C,) the sum over places of gradient times what it gives. That is weight × its gradient + bias × its gradient,
        so that no pass over the maps is needed where the weight is not near 0.
    """
    places = gradient.permute(0, 2, 3, 1).reshape(-1, gradient.shape[1])
    of_bias = (places.new_ones(1, len(places)) @ places)[0].float()
    of_weight = (along - norm.bias * of_bias) / norm.weight
    few = (norm.weight.abs() < SMALL_WEIGHT).nonzero().flatten()
    if len(few):
        centred = maps[:, few].float() - norm.running_mean[few].view(-1, 1, 1)
        sums = (gradient[:, few].float() * centred).sum((0, 2, 3))
        of_weight[few] = sums * (norm.running_var[few] + norm.eps).rsqrt()
    return [of_weight, of_bias]
