"""Pretraining on phantoms: films by number, masks that move along, a run that goes on, weights that load."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cxr_fastai.errors import UsageError
from cxr_fastai.model import load_weights, make_body
from cxr_fastai.phantom import FINDINGS

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import pretrain
import pretrain_films
from pretrain_films import HELD_OUT, TRAINING, Batches, collimate, draw_findings, move


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Judge on 50 films only, and put the signals' handlers back afterwards."""
    monkeypatch.setattr(pretrain, "N_HELD_OUT", 50)
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


def test_the_number_of_a_film_is_all_its_chance() -> None:
    films = Batches(0, TRAINING, 64, 4)
    once, again, other = films[3], Batches(0, TRAINING, 64, 4)[3], films[4]
    assert all(torch.equal(once[key], again[key]) for key in once)
    assert not torch.equal(once["pixels"], other["pixels"])
    held_out, training = (pretrain_films.film(0, stream, 12, 64)["pixels"] for stream in (HELD_OUT, TRAINING))
    assert (held_out != training).any()


def test_a_batch_holds_what_it_says() -> None:
    batch = Batches(0, TRAINING, 64, 16)[0]
    assert batch["pixels"].shape == (16, 1, 64, 64)
    assert batch["places"].shape == (16, 8, 2, 2)
    assert 0 <= batch["pixels"].min() < batch["pixels"].max() <= 1
    there = (batch["findings"] > 0) & (batch["known"] > 0)
    assert there.any()
    assert torch.allclose(batch["places"].amax((2, 3))[there], torch.tensor(1.0))
    assert not batch["places"][batch["findings"] == 0].any()


def test_masks_move_with_their_film() -> None:
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    disc = (((x - 20) ** 2 + (y - 30) ** 2) < 10**2).float().expand(32, 1, 64, 64)
    pixels, masks = move(disc, torch.nn.functional.avg_pool2d(disc, 4), torch.Generator().manual_seed(0))
    seen = torch.nn.functional.avg_pool2d(pixels, 4)
    assert masks.sum((1, 2, 3)).gt(0).all()
    assert seen[masks > 0.9].min() > 0.6
    assert (masks - masks[0]).abs().amax((1, 2, 3))[1:].min() > 0.1  # each its own way


def test_a_finding_cut_off_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_films, "move", lambda pixels, masks, chance: (pixels, masks * 0.4))
    batch = Batches(0, TRAINING, 64, 16)[0]
    assert torch.equal(batch["known"], 1 - batch["findings"])


def test_a_run_cut_off_goes_on_as_if_it_had_not_been(tmp_path: Path, small: None, monkeypatch) -> None:
    stage = {"size": 64, "images": 8, "decay": True}
    whole, cut = (pretrain.Run(tmp_path / name, 0, "cpu") for name in ("whole", "cut"))
    for run in (whole, cut):
        run.out.mkdir()
        run.begin(stage)
    whole.train(batch=2, peak=1e-3, workers=0)

    steps: list[int] = []
    step = pretrain.Run.step

    def cut_after_two(run: pretrain.Run, batch: dict, rate: float) -> dict:
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, batch, rate)

    monkeypatch.setattr(pretrain.Run, "step", cut_after_two)
    cut.train(batch=2, peak=1e-3, workers=1)
    resumed = pretrain.Run(tmp_path / "cut", 0, "cpu")
    assert resumed.at["seen"] == 4
    resumed.train(batch=2, peak=1e-3, workers=0)
    assert (resumed.at["seen"], resumed.at["steps"], len(steps)) == (8, 4, 4)
    ours, theirs = resumed.average.state_dict(), whole.average.state_dict()
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in theirs)
    lines = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert [line["seen"] for line in lines] == [4, 8]
    assert set(lines[-1]["auroc"]) == set(FINDINGS)


def test_the_rate_rises_stays_and_falls_to_zero(tmp_path: Path) -> None:
    run = pretrain.Run(tmp_path, 0, "cpu")
    run.begin({"size": 64, "images": 10**6, "decay": False})
    assert run.rate(1.0) == pytest.approx(1 / pretrain.WARM_UP)
    run.at["seen"] = 50_000
    assert run.rate(1.0) == 1.0
    run.begin({"size": 64, "images": 1000, "decay": True})
    assert run.at["stages"][0]["images"] == 50_000
    run.at["seen"] += 750
    assert run.rate(1.0) == 0.25


def test_exported_weights_load(tmp_path: Path) -> None:
    run = pretrain.Run(tmp_path, 3, "cpu")
    run.begin({"size": 64, "images": 7, "decay": True})
    run.at["seen"] = 7
    file = tmp_path / "weights" / "densenet121-phantom.safetensors"
    pretrain.export(run, file)
    state = load_file(file)
    body, names = make_body("densenet121")
    assert "725 tensors matched" in load_weights(body, "densenet121", str(file)).detail
    filled, trained = body.state_dict(), run.average.state_dict()
    for theirs, ours in names.items():
        kept = trained[theirs].half().float() if trained[theirs].ndim == 4 else trained[theirs]
        assert torch.equal(filled[ours], kept)
    fit = torchvision.models.densenet121(weights=None).load_state_dict(
        {key: value for key, value in state.items() if key.startswith("features.")}, strict=False
    )
    assert (fit.missing_keys, fit.unexpected_keys) == (["classifier.weight", "classifier.bias"], [])
    assert state["findings.weight"].shape == (8, 1024)
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["findings"] == "|".join(FINDINGS)
        assert opened.metadata()["stages"] == "7 at 64 pixels, rate to 0"
    assert "| images seen | 7 |" in file.with_suffix(".md").read_text()


def test_a_border_cuts_off_what_lies_under_it() -> None:
    masks = torch.ones(64, 1, 16, 16)
    pixels, left = collimate(torch.full((64, 1, 64, 64), 0.5), masks, torch.Generator().manual_seed(0))
    share = left.mean((1, 2, 3))
    assert 0.1 < (share < 1).float().mean() < 0.6
    kept = torch.nn.functional.interpolate(left, scale_factor=4) > 0
    inside = torch.nn.functional.avg_pool2d(kept.float(), 9, 1, 4, count_include_pad=True) > 0.99
    assert (pixels[inside] == 0.5).all()


def test_half_of_the_films_show_nothing_and_half_of_the_others_a_consolidation() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_findings(rng) for _ in range(2000)]
    some = [names for names in drawn if names]
    assert 0.45 < len(some) / len(drawn) < 0.55
    assert 0.45 < np.mean(["Consolidation" in names for names in some]) < 0.65
    assert all(len(set(names)) == len(names) for names in drawn)


def test_a_run_starts_from_exported_weights_and_says_so(tmp_path: Path) -> None:
    old, new = pretrain.Run(tmp_path / "old", 3, "cpu"), pretrain.Run(tmp_path / "new", 4, "cpu")
    old.begin({"size": 64, "images": 7, "decay": True})
    old.at["seen"] = 7
    file = tmp_path / "w.safetensors"
    old.out.mkdir()
    pretrain.export(old, file)
    new.start_from(file)
    for network in (new.model, new.average):
        assert torch.equal(network.features.conv0.weight, old.average.features.conv0.weight.half().float())
        assert torch.equal(network.findings.linear.weight, old.average.findings.linear.weight)
    new.begin({"size": 64, "images": 7, "decay": True})
    started = pretrain.describe(new)["started_from"]
    assert started.startswith("w.safetensors, sha256 ")
    assert started.endswith(", 7 images seen")
    save_file({"features.conv0.weight": torch.zeros(1)}, file)
    with pytest.raises(UsageError, match=r"does not fit: .* is missing"):
        new.start_from(file)


def test_minutes_end_a_stage_and_take_its_rate_to_zero(tmp_path: Path, small: None, monkeypatch) -> None:
    run = pretrain.Run(tmp_path, 0, "cpu")
    run.at.update(seen=pretrain.WARM_UP, seconds=100.0)
    run.begin({"size": 64, "images": pretrain.ENDLESS, "decay": True, "minutes": 2.0})
    run.at["seconds"] = 190.0
    assert run.rate(1.0) == pytest.approx(0.25)
    run.at["seconds"] = 219.99
    monkeypatch.setattr(pretrain, "judge", lambda *_: {})
    run.train(batch=2, peak=1e-3, workers=0)
    assert run.at["seen"] == pretrain.WARM_UP + 2
    assert run.at["stages"][-1]["images"] == 2
    assert run.checkpoint.is_file()
    assert run.rate(1.0) == 0.0


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no checkpoint; start a stage with --images"):
        pretrain.main(tmp_path, resume=True, threads=1)
    with pytest.raises(UsageError, match="leave --images and --minutes out"):
        pretrain.main(tmp_path, resume=True, images=5, threads=1)
