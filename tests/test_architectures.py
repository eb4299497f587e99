"""Networks by name: where they are cut, what is refused, and that nothing else changes."""

from pathlib import Path

import pytest
import torch
from fastai.learner import load_learner

from cxr_fastai import architectures, model
from cxr_fastai.architectures import (
    count_features,
    first_layers,
    groups_of_layers,
    known_to_fastai,
    make_body,
    names_in_body,
)
from cxr_fastai.config import TrainConfig
from cxr_fastai.errors import UsageError
from cxr_fastai.model import EvidenceHead, load_weights

FIRST_BLOCKS = ("denseblock1", "transition1", "denseblock2", "transition2")
without_timm = pytest.mark.skipif(architectures._timm() is None, reason="timm is not installed")


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("convnext_tiny", 768),  # the last pool stands before the classifier
        ("mobilenet_v2", 1280),  # no layer is a pool
        ("shufflenet_v2_x0_5", 1024),  # a pool stands first, where fastai would cut
        ("squeezenet1_1", 512),  # fastai's own cut
    ],
)
def test_other_networks_of_torchvision_are_cut_after_their_last_map(name: str, features: int) -> None:
    assert count_features(name) == features


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("densenet121", [f"0.{one}" for one in ("conv0", "norm0", *FIRST_BLOCKS)]),
        ("resnet18", ["0", "1", "4", "5"]),  # convolution, norm, two stages
        ("convnext_tiny", ["0.0", "0.1", "0.2", "0.3", "0.4.0"]),  # which moves channels to the end in between
        ("squeezenet1_1", ["0.0", "0.3", "0.4", "0.6", "0.7"]),  # without padding, 7 places of 64
    ],
)
def test_first_layers_end_where_maps_get_smaller_than_an_eighth(name: str, first: list[str]) -> None:
    body, _ = make_body(name)
    body.train()
    before = {key: value.clone() for key, value in body.state_dict().items()}
    wanted = [p for key in first for p in body.get_submodule(key).parameters()]
    assert {id(p) for p in first_layers(body, 64, 8)} == {id(p) for p in wanted}
    assert body.training
    assert all(torch.equal(value, before[key]) for key, value in body.state_dict().items())


def test_first_layers_to_half_of_the_side_are_the_stem() -> None:
    body, _ = make_body("densenet121")
    wanted = [*body.get_submodule("0.conv0").parameters(), *body.get_submodule("0.norm0").parameters()]
    assert {id(p) for p in first_layers(body, 64, 2)} == {id(p) for p in wanted}


def test_a_network_that_cannot_be_made_without_numbers_leaves_chance_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    count_features.cache_clear()
    assert count_features("regnet_y_400mf") == 440  # looks at numbers while it is made
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("densenet12", r"--arch is densenet12: .* near it: densenet121, "),
        (
            "vit_b_16",
            r"--arch is vit_b_16: its body does not end in a map of features \(N, F, h, w\) .*; choose another",
        ),
        ("maxvit_t", "--arch is maxvit_t: its body does not end in a map"),
    ],
)
def test_what_has_no_map_of_features_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        count_features(name)


def test_without_timm_its_names_are_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "_timm", lambda: None)
    with pytest.raises(
        UsageError, match=r"torchvision has no such network, and timm is not installed \(pip install timm\)"
    ):
        make_body("resnet10t")


@without_timm
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet10x", "neither torchvision nor timm has such a network; near it: resnet10"),
        ("resnet18.a1_in2k", r"neither torchvision nor timm has such a network; near it: resnet18\.a1_in1k"),
        ("vit_tiny_patch16_224", "its body does not end in a map of features"),
    ],
)
def test_names_of_timm_that_will_not_do(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"--arch is {name}: {message}"):
        count_features(name)


@without_timm
def test_a_network_of_timm_gives_its_own_features() -> None:
    import timm

    torch.manual_seed(0)
    whole = timm.create_model("resnet10t", pretrained=False).eval()
    body, names = make_body("resnet10t")
    body.load_state_dict({names[k]: v for k, v in whole.state_dict().items() if k in names})
    film = torch.rand(2, 3, 64, 64)
    assert torch.equal(body.eval()(film), whole.forward_features(film))
    assert torch.allclose(whole.fc(EvidenceHead.pool(body(film))), whole(film), atol=1e-5)
    assert count_features("resnet10t") == 512
    assert not known_to_fastai("resnet10t")
    groups = groups_of_layers(torch.nn.Sequential(body, EvidenceHead(512, 2, 0.0)))
    assert [len(group) for group in groups] == [21, 21, 2]


@without_timm
def test_pretrained_weights_of_timm_fill_the_body_and_failures_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    made = timm.create_model("resnet10t", pretrained=False, num_classes=0, global_pool="")
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **k: made)
    body = architectures.TimmBody(made)
    loaded = load_weights(body, "resnet10t", "imagenet")
    assert (loaded.kind, loaded.pretrained) == ("imagenet", True)
    assert loaded.detail.startswith("pretrained weights of resnet10t (timm")

    def offline(name, pretrained, **settings):
        if pretrained:
            raise ConnectionError("no network\nat all")
        return made

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UsageError, match=r"the download failed \(no network\)"):
        load_weights(body, "resnet10t", "imagenet")
    loaded = load_weights(body, "resnet10t", "auto")
    assert not loaded.pretrained
    assert "none are shipped for resnet10t" in loaded.detail


def test_names_in_the_body_cover_all_its_tensors() -> None:
    body, names = make_body("mobilenet_v2")
    assert set(names.values()) == set(body.state_dict())
    assert names_in_body("mobilenet_v2") == names


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", pytest.param("resnet10t", marks=without_timm)])
def test_a_run_with_another_network_exports_both_files(films: Path, tmp_path: Path, arch: str) -> None:
    from cxr_fastai.predict import Predictor
    from cxr_fastai.training import train

    settings = {"size": 32, "epochs": 1, "freeze_epochs": 0, "weights": "none", "batch_size": 16}
    run, _ = train(TrainConfig(data=str(films), out=str(tmp_path), name="x", arch=arch, **settings))
    film = next(films.rglob("*.png"))
    row = next(iter(Predictor(run / "model.onnx").predict([str(film)], abstain=False)))
    learner = load_learner(run / "learner.pkl")
    with learner.no_bar():
        p = learner.predict(str(film))[2]
    assert row.probabilities["abnormal"] == pytest.approx(p[0].item(), abs=1e-4)
    assert row.evidence is not None
    assert isinstance(learner.model[1], model.EvidenceHead)
