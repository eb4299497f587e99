"""What watches a run, on a tiny network: which epoch is kept, when training stops, what both phases leave."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torchvision
from fastai.callback.core import CancelFitException
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from safetensors.torch import save_file
from torch import nn

from cxr_fastai.callbacks import BestEpoch, FiniteLoss, KeepFirst, KeepNorms
from cxr_fastai.config import TrainConfig
from cxr_fastai.console import Console
from cxr_fastai.fitting import announce, kept, whole_at_once
from cxr_fastai.model import LoadedWeights, make_body
from cxr_fastai.training import train


def after_epochs(callback: BestEpoch, scores: list[tuple[float, float]]) -> int:
    """Feed (AUROC, loss) of epochs to the callback, each with its own weight; return after how many it stopped."""
    model = nn.Linear(1, 1)
    history = SimpleNamespace(rows=[], epochs_done=0)
    callback.learn = SimpleNamespace(model=model, history=history, position=SimpleNamespace(skipping=False))
    callback.before_fit()
    for epoch, (auroc, loss) in enumerate(scores, 1):
        try:
            callback.before_epoch()
        except CancelFitException:
            return epoch - 1
        model.weight.data.fill_(epoch)
        history.rows.append({"epoch": epoch, "valid_auroc": auroc, "valid_loss": loss})
        history.epochs_done = epoch
        callback.after_epoch()
    return len(scores)


def test_the_best_epoch_is_kept_whatever_comes_after() -> None:
    best = BestEpoch(patience=0)
    assert after_epochs(best, [(0.6, 1.0), (0.9, 0.5), (0.7, 0.1)]) == 3
    assert best.epoch_of_best == 2
    assert best.weights["weight"].item() == 2


def test_of_equal_epochs_the_lower_loss_is_kept() -> None:
    best = BestEpoch(patience=0)
    after_epochs(best, [(0.9, 0.5), (0.9, 0.4), (0.9, 0.6)])
    assert best.epoch_of_best == 2


def test_training_stops_after_patience_epochs_without_a_better_one() -> None:
    assert after_epochs(BestEpoch(patience=2), [(0.6, 1), (0.9, 1), (0.8, 1), (0.8, 1), (0.99, 1)]) == 4


def test_norms_learn_their_weights_and_keep_their_statistics() -> None:
    torch.manual_seed(0)
    films = [(torch.rand(1, 4, 4) + number % 2, torch.tensor(number % 2)) for number in range(8)]
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    dls = DataLoaders(*(DataLoader(films, bs=4, device=torch.device("cpu")) for _ in range(2)))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.1, cbs=KeepNorms())
    norm = model[1]
    assert norm.running_mean.tolist() == [0, 0, 0]
    assert norm.running_var.tolist() == [1, 1, 1]
    assert (norm.weight != 1).all()


def test_first_layers_stay_and_are_trained_again_afterwards() -> None:
    torch.manual_seed(0)
    films = [(torch.rand(3, 32, 32), torch.tensor(number % 2)) for number in range(8)]
    body = nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, 4, 1))
    model = nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)))
    dls = DataLoaders(*(DataLoader(films, bs=4, device=torch.device("cpu")) for _ in range(2)))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat())
    first, later = body[0].weight.detach().clone(), body[2].weight.detach().clone()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.1, cbs=KeepFirst(32, 8))
    assert torch.equal(body[0].weight, first)
    assert not torch.equal(body[2].weight, later)
    assert all(p.requires_grad for p in model.parameters())


def test_first_layers_stay_by_themselves_only_where_they_learned_from_such_films(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").touch()

    def kept_to(kind: str, data: Path, first_layers: str = "auto") -> list[int]:
        weights = LoadedWeights(kind, "", kind != "none", whole=kind == "none")
        found = kept(weights, TrainConfig(data=str(data), first_layers=first_layers))
        return [cb.part for cb in found if isinstance(cb, KeepFirst)]

    assert kept_to("phantom", tmp_path) == [8]
    assert kept_to("phantom", tmp_path / "real") == [2]
    assert kept_to("imagenet", tmp_path) == []
    assert kept_to("imagenet", tmp_path / "real", "keep") == [8]
    assert kept_to("phantom", tmp_path, "train") == []
    assert kept_to("none", tmp_path, "keep") == []
    assert kept(LoadedWeights("phantom", "", True, whole=True), TrainConfig(data=str(tmp_path / "real"))) == []


@pytest.mark.parametrize(("films", "said"), [
    (80, "20 steps are few: with --epochs 11, few films are learned better\n"),
    (10, "4 steps are few: with --epochs 59, few films are learned better\n"),
    (240, ""),
])  # fmt: skip
def test_few_steps_are_told_with_the_epochs_that_make_enough(
    films: int, said: str, capsys: pytest.CaptureFixture
) -> None:
    table = pd.DataFrame({"split": ["train"] * films + ["valid"] * 900})
    table.attrs["classes"] = ["normal", "abnormal"]
    config = TrainConfig(data="real", epochs=3, freeze_epochs=1, batch_size=16)
    weights = LoadedWeights("phantom", "phantom weights", True, whole=True)
    announce(config, table, weights, torch.ones(2), torch.device("cpu"), Console())
    told = capsys.readouterr().out
    assert "Fewer than 512 real films to learn from: all layers learn from the first epoch\n" in told
    assert told.endswith(f"seed {config.seed}\n{said}")


def test_nothing_goes_on_once_the_loss_is_not_finite() -> None:
    finite = FiniteLoss()
    finite.before_fit()  # no problem yet
    finite.problem = "the loss became nan"
    with pytest.raises(CancelFitException):
        finite.before_fit()  # as in the second phase of fine_tune


def test_phantom_weights_are_trained_whole_on_few_real_films_only(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").touch()  # as `generate` leaves one

    def whole(kind: str, films: int, data: Path = tmp_path / "real", first_layers: str = "auto") -> bool:
        table = pd.DataFrame({"split": ["train"] * films + ["valid"] * 200 + ["test"] * 200})
        config = TrainConfig(data=str(data), first_layers=first_layers)
        return whole_at_once(LoadedWeights(kind, "", kind != "none"), config, table)

    assert whole("phantom", 511)
    assert not whole("phantom", 512)
    assert not whole("phantom", 511, tmp_path)
    assert not whole("phantom", 511, first_layers="train")  # asked for is asked for
    assert not whole("imagenet", 511)
    assert whole("none", 512)
    assert whole("none", 512, tmp_path, "keep")


def test_all_of_phantom_weights_learn_from_the_first_epoch_of_few_real_films(films: Path, tmp_path: Path) -> None:
    net = torchvision.models.resnet18()
    state = {name: value.contiguous() for name, value in net.state_dict().items() if not name.startswith("fc.")}
    save_file(state, tmp_path / "w.safetensors", {"generator": "cxr_fastai.phantom 1.1"})
    config = TrainConfig(
        data=str(films), out=str(tmp_path), name="x", size=32, epochs=2, freeze_epochs=1, arch="resnet18",
        weights=str(tmp_path / "w.safetensors"), batch_size=8, keep_checkpoints=True,
    )  # fmt: skip
    run, _ = train(config)
    history = pd.read_csv(run / "history.csv")
    assert history["phase"].tolist() == ["fine-tune"] * 3
    kept = torch.load(run / "checkpoints" / "last.pth", weights_only=True)["model"]
    first, norm = kept["0.0.weight"], kept["0.1.running_mean"]
    assert not torch.equal(first, state["conv1.weight"])
    assert not torch.equal(norm, state["bn1.running_mean"])  # of each batch


def test_pretrained_weights_have_a_frozen_phase_first(films: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    body, _ = make_body("resnet18")
    torch.save(
        {f"0.{k}": v for k, v in body.state_dict().items()} | {"1.linear.bias": torch.zeros(2)}, tmp_path / "w.pth"
    )
    config = TrainConfig(
        data=str(films), out=str(tmp_path), name="x", size=32, epochs=2, freeze_epochs=1, arch="resnet18",
        weights=str(tmp_path / "w.pth"), batch_size=8, keep_checkpoints=True,
    )  # fmt: skip
    run, _ = train(config)
    history = pd.read_csv(run / "history.csv")
    assert history["phase"].tolist() == ["frozen", "fine-tune", "fine-tune"]
    assert history["epoch"].tolist() == [1, 2, 3]
    kept = torch.load(run / "checkpoints" / "last.pth", weights_only=True)
    assert len(kept["history"]) == 3
