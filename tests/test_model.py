import hashlib
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from cxr_fastai import model
from cxr_fastai.errors import ModelFileError, UsageError
from cxr_fastai.model import EvidenceHead, count_features, load_weights, make_body
from cxr_fastai.runs import SHIPPED_WEIGHTS


def test_evidence_sums_to_the_logit() -> None:
    torch.manual_seed(0)
    head = EvidenceHead(16, 3, dropout=0.5).eval()
    features = torch.randn(4, 16, 7, 7)  # negative ones too: the ReLU belongs to the head
    sums = head.evidence(features).sum((2, 3)) + head.linear.bias
    assert torch.allclose(sums, head(features), atol=1e-6)


def test_densenet_features_are_those_of_torchvision() -> None:
    torch.manual_seed(0)
    whole = torchvision.models.densenet121(weights=None).eval()
    body, names = make_body("densenet121")
    body.load_state_dict({names[k]: v for k, v in whole.state_dict().items() if k in names})
    film = torch.rand(1, 3, 64, 64)
    pooled = EvidenceHead.pool(body.eval()(film))
    assert torch.allclose(whole.classifier(pooled), whole(film), atol=1e-5)
    assert count_features("densenet121") == 1024
    assert count_features("resnet18") == 512


@pytest.mark.parametrize(
    "rename",
    [
        lambda k: k,
        lambda k: f"module.{k}",
        lambda k: f"module.densenet121.{k}".replace("norm1", "norm.1").replace("conv2", "conv.2"),  # CheXNet
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_come_from_files_as_others_name_them(tmp_path: Path, rename, suffix: str) -> None:
    torch.manual_seed(1)
    state = {rename(k): v for k, v in torchvision.models.densenet121(weights=None).state_dict().items()}
    file = tmp_path / f"w{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save({"state_dict": state}, file)
    body, _ = make_body("densenet121")
    loaded = load_weights(body, "densenet121", str(file))
    assert (loaded.kind, loaded.pretrained) == ("file", True)
    assert "725 tensors matched" in loaded.detail
    assert torch.equal(body[0].conv0.weight, state[rename("features.conv0.weight")])


def test_a_learners_own_checkpoint_is_weights_too(tmp_path: Path) -> None:
    body, _ = make_body("resnet18")
    learner = torch.nn.Sequential(body, EvidenceHead(512, 2, 0.0))
    torch.save({"model": learner.state_dict(), "opt": {}}, tmp_path / "last.pth")
    fresh, _ = make_body("resnet18")
    load_weights(fresh, "resnet18", str(tmp_path / "last.pth"))
    assert torch.equal(fresh[0].weight, body[0].weight)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file(dict(torchvision.models.resnet18(weights=None).state_dict()), file)
    body, _ = make_body("densenet121")
    with pytest.raises(ModelFileError, match=r"604 of 725 tensors missing \(first: 0\.conv0\.weight\)"):
        load_weights(body, "densenet121", str(file))
    file.write_bytes(b"nonsense")
    with pytest.raises(ModelFileError, match="not a file of weights"):
        load_weights(body, "densenet121", str(file))
    with pytest.raises(UsageError, match=r"no such file; give a \.safetensors or \.pth file"):
        load_weights(body, "densenet121", str(tmp_path / "nothing.pth"))


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    body, _ = make_body("resnet18")
    with pytest.raises(ModelFileError, match="not a file of weights"):
        load_weights(body, "resnet18", str(tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ImageNet's weights be neither in the cache nor downloadable."""

    def refuse(body, arch):
        raise OSError("no network")

    monkeypatch.setattr(model, "_load_imagenet", refuse)


def test_auto_without_network_or_shipped_weights_says_random(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offline(monkeypatch)
    monkeypatch.setattr(model, "SHIPPED_WEIGHTS", tmp_path / "none")
    body, _ = make_body("resnet18")
    loaded = load_weights(body, "resnet18", "auto")
    assert not loaded.pretrained
    assert loaded.detail.startswith(
        "RANDOM weights: ImageNet's are not in the cache and could not be downloaded (no network)"
    )
    with pytest.raises(UsageError, match=r"--weights imagenet: not in the cache .* the download failed"):
        load_weights(body, "resnet18", "imagenet")


def test_auto_without_network_takes_the_shipped_weights_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    loaded = load_weights(make_body("densenet121")[0], "densenet121", "auto")
    assert (loaded.kind, loaded.pretrained) == ("phantom", True)
    assert loaded.detail == (
        "phantom weights (trained on synthetic films, shipped with this package), since ImageNet's are not in the "
        "cache and could not be downloaded (no network)"
    )


def test_the_shipped_weights_are_those_of_their_card_and_fit_torchvision() -> None:
    digest = hashlib.sha256(SHIPPED_WEIGHTS.read_bytes()).hexdigest()
    assert f"| SHA-256 | {digest} |" in SHIPPED_WEIGHTS.with_suffix(".md").read_text(encoding="utf-8")
    state = load_file(SHIPPED_WEIGHTS)
    features = {key: value for key, value in state.items() if key.startswith("features.")}
    fit = torchvision.models.densenet121(weights=None).load_state_dict(features, strict=False)
    assert (fit.missing_keys, fit.unexpected_keys) == (["classifier.weight", "classifier.bias"], [])
    assert {value.dtype for value in features.values() if value.ndim == 4} == {torch.float16}
    assert all(value.isfinite().all() for value in state.values())


def test_calibration_folds_into_the_head_exactly() -> None:
    torch.manual_seed(0)
    head = EvidenceHead(8, 2, 0.0)
    network = torch.nn.Sequential(torch.nn.Identity(), head)
    features, log_weights = torch.rand(5, 8, 2, 2), torch.tensor([0.3, -0.2])
    before = head(features).detach()
    model.without_class_weights(network, log_weights.exp())
    model.cooled(network, 2.5)
    assert torch.allclose(head(features), (before - log_weights) / 2.5, atol=1e-6)


def test_ensemble_is_the_mean_of_the_logits_and_its_evidence_adds_up() -> None:
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), EvidenceHead(4, 2, 0.5)).eval() for _ in range(3)]
    films = torch.rand(5, 3, 8, 8)
    whole = model.ensemble(models).eval()
    logits = whole(films)
    assert torch.allclose(logits, torch.stack([m(films) for m in models]).mean(0), atol=1e-6)
    evidence = whole[1].evidence(whole[0](films)).sum((2, 3)) + whole[1].linear.bias
    assert torch.allclose(evidence, logits, atol=1e-6)
    assert model.ensemble(models[:1]) is models[0]
