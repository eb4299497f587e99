"""A batch in parts gives what the parts give, and the same in every run."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cxr_fastai.shards import InParts, Parts


def body() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3))


@pytest.fixture
def films() -> torch.Tensor:
    return torch.randn(16, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def gradients(network: nn.Module, features: torch.Tensor) -> list[torch.Tensor]:
    network.zero_grad()
    features.square().mean().backward()
    return [p.grad.clone() for p in network.parameters()]  # type: ignore[union-attr]


def test_without_batch_statistics_parts_are_the_whole(films: torch.Tensor) -> None:
    network = body().eval()
    whole = network(films)
    expected = gradients(network, whole)
    parts = Parts(network, 2, 1)(films)
    assert torch.allclose(parts, whole, atol=1e-6)
    for ours, theirs in zip(gradients(network, parts), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_with_kept_statistics_parts_are_the_whole_and_norms_learn(films: torch.Tensor) -> None:
    network = body().train()
    norm = network[1].eval()
    nn.init.uniform_(norm.weight), nn.init.uniform_(norm.bias), norm.running_mean.fill_(0.3), norm.running_var.fill_(2)
    whole = network(films)
    expected = gradients(network, whole)
    parts = Parts(network, 2, 1, kept_norms=True)
    assert isinstance(parts.copies[0][1], nn.Identity)
    said = parts(films)
    assert torch.allclose(said, whole, atol=1e-6)
    assert all(gradient.abs().max() > 1e-4 for gradient in expected)
    for ours, theirs in zip(gradients(network, said), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert norm.running_mean.tolist() == pytest.approx([0.3] * 4)


def test_batch_norms_see_their_part_and_their_statistics_are_averaged(films: torch.Tensor) -> None:
    network, halves = body().train(), [body().train(), body().train()]
    said = Parts(network, 2, 1)(films)
    expected = torch.cat([half(part) for half, part in zip(halves, films.chunk(2), strict=True)])
    assert torch.allclose(said, expected, atol=1e-6)
    means = torch.stack([half[1].running_mean for half in halves]).mean(0)  # type: ignore[arg-type]
    assert torch.allclose(network[1].running_mean, means, atol=1e-6)  # type: ignore[arg-type]


def test_two_runs_are_equal_to_the_last_bit(films: torch.Tensor) -> None:
    found = []
    for _ in range(2):
        network = body().train()
        found.append(gradients(network, Parts(network, 4, 1)(films)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_what_is_not_learned_has_no_gradients_and_parts_may_differ_in_size(films: torch.Tensor) -> None:
    network = body().eval().requires_grad_(False)
    said = Parts(network, 3, 1)(films[:11])
    assert not said.requires_grad
    assert torch.allclose(said, copy.deepcopy(network)(films[:11]), atol=1e-6)


def test_with_kept_norms_a_small_batch_is_taken_folded_too_and_the_network_is_itself_again_afterwards() -> None:
    model, taken = nn.Sequential(body().eval()), InParts()
    learn = SimpleNamespace(model=model, dls=SimpleNamespace(train=SimpleNamespace(bs=4)))
    taken.learn = learn
    taken.before_fit()
    assert "forward" not in model[0].__dict__  # batch norms of four films are too noisy in parts, nothing is folded
    learn.keep_norms = True
    taken.before_fit()
    films = torch.randn(3, 3, 9, 9)
    said = model(films)
    assert "forward" in model[0].__dict__
    taken.after_fit()
    assert "forward" not in model[0].__dict__
    assert torch.allclose(said, model(films), atol=1e-6)


def test_after_a_fit_that_broke_off_the_next_begins_with_the_network_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Watched(Parts):
        def __init__(self, network: nn.Module, *given: Any) -> None:
            made.append("forward" in network.__dict__)
            super().__init__(network, *given)

    monkeypatch.setattr("cxr_fastai.shards.Parts", Watched)
    monkeypatch.setattr("cxr_fastai.shards.own_cores", lambda: 2)
    network, taken = body().train(), InParts()
    taken.learn = SimpleNamespace(model=nn.Sequential(network), dls=SimpleNamespace(train=SimpleNamespace(bs=16)))
    taken.before_fit()
    taken.before_fit()  # no after_fit between them
    assert made == [False, False]
    taken.learn.model(torch.randn(16, 3, 9, 9))
    assert network[1].running_mean.abs().min() > 0  # type: ignore[operator, union-attr]
