"""Lean blocks of a DenseNet give what its own give, and so do their gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import DenseNet

from cxr_fastai.dense import LeanBlock
from cxr_fastai.shards import Parts


def body(**settings: Any) -> nn.Module:
    """Return a small DenseNet whose norms have seen something and keep it."""
    torch.manual_seed(0)
    network = DenseNet(8, (3, 2), 16, bn_size=2, num_classes=2, **settings).features
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight), nn.init.normal_(part.bias)
            part.running_mean.normal_(), part.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    return network.to(memory_format=torch.channels_last).eval()


@pytest.fixture
def films() -> torch.Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)


def learned(network: nn.Module, features: torch.Tensor) -> dict[str, torch.Tensor]:
    network.zero_grad()
    features.float().square().mean().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def blocks(parts: Parts) -> list[nn.Module]:
    return [part for part in parts.copies[0].modules() if isinstance(part, LeanBlock)]


def close(one: torch.Tensor, other: torch.Tensor, share: float = 1e-4) -> bool:
    return bool((one - other).norm() <= share * other.norm())


def test_answers_and_gradients_are_those_of_the_plain_network(films: torch.Tensor) -> None:
    network = body()
    whole = network(films)
    expected = learned(network, whole)
    parts = Parts(network, 2, 1, kept_norms=True)
    assert len(blocks(parts)) == 2
    said = parts(films)
    assert close(said, whole, 1e-6)
    ours = learned(network, said)
    assert ours.keys() == expected.keys() == dict(network.named_parameters()).keys()
    assert all(close(ours[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("weight", [0.0, 1e-9, -0.005])
def test_the_gradient_of_a_norms_weight_near_zero(films: torch.Tensor, weight: float) -> None:
    network = body()
    norm = network.denseblock1.denselayer3.norm1  # type: ignore[union-attr]
    with torch.no_grad():
        norm.weight[:3] = weight  # type: ignore[index, union-attr]
        norm.bias[:3] = 0.3  # type: ignore[index, union-attr]
    expected = learned(network, network(films))
    ours = learned(network, Parts(network, 1, 1, kept_norms=True)(films))
    name = "denseblock1.denselayer3.norm1.weight"
    assert expected[name][:3].abs().min() > 1e-5
    assert close(ours[name][:3], expected[name][:3])


def test_in_bfloat16_it_is_as_near_to_the_truth_as_the_plain_network_is(films: torch.Tensor) -> None:
    network = body()
    exact = network(films)
    truth = {**learned(network, exact), "said": exact.detach()}

    def off(forward: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            said = forward(films)
        assert said.dtype == torch.bfloat16
        found = {**learned(network, said), "said": said.detach().float()}
        return torch.stack([(found[name] - true).norm() / true.norm() for name, true in truth.items()])

    plain, lean = off(network), off(Parts(network, 1, 1, kept_norms=True))
    assert plain.median() > 1e-4
    assert lean.median() < 2 * plain.median()
    assert lean.max() < 2 * plain.max()


def test_a_block_that_is_kept_has_no_gradients_and_the_next_has_its_own(films: torch.Tensor) -> None:
    network = body()
    for name in ("conv0", "norm0", "denseblock1", "transition1"):
        network.get_submodule(name).requires_grad_(False)
    expected = learned(network, network(films))
    ours = learned(network, Parts(network, 2, 1, kept_norms=True)(films))
    assert ours.keys() == expected.keys()
    assert {name.split(".")[0] for name in ours} == {"denseblock2", "norm5"}
    assert all(close(ours[name], gradient) for name, gradient in expected.items())


def test_a_block_with_dropout_stays_as_it_is() -> None:
    assert not blocks(Parts(body(drop_rate=0.1), 1, 1, kept_norms=True))


def test_batch_norms_that_learn_statistics_stay_in_their_layers() -> None:
    assert not blocks(Parts(body().train(), 1, 1))
