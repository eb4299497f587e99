"""A batch norm whose statistics do not change, as part of the convolution before it: a pass over all maps less.

In DenseNet121 that is every second norm, in a ResNet every one.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def norms_after_convolutions(body: nn.Module) -> list[tuple[str, str]]:
    """Return the names of convolutions that nothing reads but a batch norm, each with that norm's name.

    None where torch.fx cannot follow the forward pass.
    """
    try:
        nodes = [node for node in torch.fx.symbolic_trace(body).graph.nodes if node.op == "call_module"]
    except Exception:  # noqa: BLE001 (a network may do anything with what stands for its films)
        return []
    modules, uses = dict(body.named_modules()), Counter(node.target for node in nodes)

    def once(node: torch.fx.Node, kind: type) -> bool:
        return type(modules.get(str(node.target))) is kind and uses[node.target] == 1

    return [
        (str(before.target), str(node.target))
        for node in nodes
        if once(node, nn.BatchNorm2d)
        and isinstance(before := node.args[0], torch.fx.Node)
        and once(before, nn.Conv2d)
        and len(before.users) == 1
        and modules[str(node.target)].affine
        and modules[str(node.target)].track_running_stats
    ]


def scale_and_shift(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a norm with kept statistics multiplies each channel by, and then adds, both (C,)."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


class Folded(nn.Module):
    """A convolution and the batch norm after it, whose statistics do not change, as one convolution."""

    def __init__(self, convolution: Any, norm: Any):
        super().__init__()
        self.convolution, self.norm = convolution, norm

    def forward(self, maps: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return self.convolution._conv_forward(maps, *self.weight_and_bias())

    def weight_and_bias(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight and bias of the one convolution."""
        scale, shift = scale_and_shift(self.norm)
        if self.convolution.bias is not None:
            shift = shift + self.convolution.bias * scale
        return self.convolution.weight * scale.view(-1, 1, 1, 1), shift


def fold(
    body: nn.Module, pairs: Sequence[tuple[str, str]], join: Callable[[Any, Any], nn.Module] = Folded
) -> nn.Module:
    """Put each convolution and the norm after it into one, in place; `Folded` keeps the parameters the same objects."""
    for convolution, norm in pairs:
        body.set_submodule(convolution, join(body.get_submodule(convolution), body.get_submodule(norm)))
        body.set_submodule(norm, nn.Identity())
    return body


def fused(body: nn.Module) -> nn.Module:
    """Return a copy of a network, for evaluation, with fewer layers and the same answers."""
    return fold(copy.deepcopy(body).eval(), norms_after_convolutions(body), fuse_conv_bn_eval)
