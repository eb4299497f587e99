"""Norms that are folded into convolutions change no answer."""

import pytest
import torch
from torch import nn
from torchvision.models import densenet121, resnet18

from cxr_fastai.folding import Folded, fold, fused, norms_after_convolutions


class Twice(nn.Module):
    """Two readers of one convolution: its norm must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, films: torch.Tensor) -> torch.Tensor:
        maps = self.convolution(films)
        return self.norm(maps) + maps


class Undecided(Twice):
    """What no tracer can follow."""

    def forward(self, films: torch.Tensor) -> torch.Tensor:
        return super().forward(films) if films.sum() > 0 else films


@pytest.mark.parametrize(("network", "pairs"), [(densenet121, 59), (resnet18, 20)])
def test_every_norm_that_alone_reads_a_convolution_is_found(network, pairs: int) -> None:
    assert len(norms_after_convolutions(network().eval())) == pairs


@pytest.mark.parametrize("network", [Twice, Undecided])
def test_others_are_left_alone(network: type[nn.Module]) -> None:
    assert norms_after_convolutions(network()) == []


@pytest.mark.parametrize("bias", [True, False])
def test_folding_changes_neither_answers_nor_parameters(bias: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1, groups=1, bias=bias), nn.BatchNorm2d(4)).eval()
    norm = network[1]
    for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(values, 0.5, 2.0)
    films, parameters = torch.rand(2, 3, 9, 9), set(network.parameters())
    expected = network(films)
    assert torch.allclose(fused(network)(films), expected, atol=1e-5)
    assert isinstance(network[1], nn.BatchNorm2d)  # that was a copy
    fold(network, norms_after_convolutions(network))
    assert isinstance(network[0], Folded)
    assert torch.allclose(network(films), expected, atol=1e-5)
    assert set(network.parameters()) == parameters
