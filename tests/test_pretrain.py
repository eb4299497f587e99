"""Pretraining on phantoms: films by number, masks that move along, a run that goes on, weights that load."""

import hashlib
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
import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cxr_fastai.errors import UsageError
from cxr_fastai.model import load_weights, make_body
from cxr_fastai.phantom import FINDINGS

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import mean_of_weights
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


def stage_of(**asked: object) -> dict:
    """Return a stage as `Run.begin` takes it."""
    usual = {"size": 64, "images": 8, "minutes": 0.0, "decay": True, "batch": 32, "rate": 1e-3, "shards": 1}
    return {**usual, **asked}


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
    small = torch.nn.functional.avg_pool2d(disc, 4)
    pixels, masks, grown = move(disc, small, torch.Generator().manual_seed(0))
    seen = torch.nn.functional.avg_pool2d(pixels, 4)
    assert masks.sum((1, 2, 3)).gt(0).all()
    assert seen[masks > 0.9].min() > 0.6
    assert (masks - masks[0]).abs().amax((1, 2, 3))[1:].min() > 0.1  # each its own way
    inside = masks[:, :, [0, -1]].sum((1, 2, 3)) + masks[:, :, :, [0, -1]].sum((1, 2, 3)) == 0
    assert inside.sum() > 10
    assert torch.allclose((masks.sum((1, 2, 3)) / small[0].sum())[inside], grown[inside], rtol=0.1)


def test_a_finding_cut_off_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    grown = torch.full((16,), 1.3)
    monkeypatch.setattr(pretrain_films, "move", lambda pixels, masks, chance: (pixels, masks * 0.6, grown))
    batch = Batches(0, TRAINING, 64, 16)[0]
    assert torch.equal(batch["known"], 1 - batch["findings"])


def test_a_run_cut_off_goes_on_as_if_it_had_not_been(tmp_path: Path, small: None, monkeypatch) -> None:
    stage = stage_of(images=8, batch=2)
    whole, cut = (pretrain.Run(tmp_path / name, 0, "cpu") for name in ("whole", "cut"))
    for run in (whole, cut):
        run.out.mkdir()
        run.begin(stage)
    assert whole.train(workers=0)

    steps: list[int] = []
    step = pretrain.Run.step

    def cut_after_two(run: pretrain.Run, batch: dict, rate: float) -> dict:
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, batch, rate)

    monkeypatch.setattr(pretrain.Run, "step", cut_after_two)
    assert not cut.train(workers=1)
    resumed = pretrain.Run(tmp_path / "cut", 0, "cpu")
    assert resumed.at["seen"] == 4
    assert resumed.train(workers=0)
    assert (resumed.at["seen"], resumed.at["steps"], len(steps)) == (8, 4, 4)
    ours, theirs = resumed.average.state_dict(), whole.average.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    lines = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert [line["seen"] for line in lines] == [4, 8]
    assert set(lines[-1]["auroc"]) == set(FINDINGS)


def test_weights_are_exported_only_of_a_stage_that_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, ended, written = [], [False, True], []
    monkeypatch.setattr(pretrain.Run, "train", lambda run, workers: asked.append(run.stage) or ended.pop(0))
    monkeypatch.setattr(pretrain, "export", lambda run, path: written.append(path))
    file = tmp_path / "w.safetensors"
    with pytest.raises(typer.Exit) as stopped:
        pretrain.main(tmp_path, images=64, batch=8, rate=0.5, shards=1, threads=1, export_to=file)
    assert (stopped.value.exit_code, written) == (130, [])
    run = pretrain.Run(tmp_path, 0, "cpu")
    run.begin(stage_of(batch=8, rate=0.5))
    run.save()
    pretrain.main(tmp_path, resume=True, threads=1, export_to=file)
    assert written == [file]
    assert [(stage["batch"], stage["rate"], stage["shards"]) for stage in asked] == [(8, 0.5, 1)] * 2


def test_pointing_asks_only_of_findings_that_have_a_place() -> None:
    class Points(torch.nn.Module):
        """Points at the first place, whatever the finding."""

        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
            evidence = torch.zeros(len(pixels), 8, 2, 2)
            evidence[:, :, 0, 0] = 1
            return torch.randn(len(pixels), 8), evidence, torch.randn(len(pixels), 2)

    films, n = torch.zeros(8, 1, 64, 64), len(FINDINGS)
    places = torch.zeros(8, n, 2, 2)
    for k, name in enumerate(FINDINGS):  # film k shows finding k: there if it has a place, elsewhere if not
        places[k, k, *((1, 1) if name in ("Cardiomegaly", "Edema") else (0, 0))] = 1
    batch = {"pixels": films, "findings": torch.eye(8, n), "places": places, "view": torch.arange(8) % 2.0}
    batch["findings"][0] = 0  # someone is healthy
    found = pretrain.judge(Points(), [batch], "cpu")
    assert (found["pointing"], found["pointed_at"], found["pointing_by_chance"]) == (1.0, 6, 0.25)


def test_a_mean_of_weights_lies_in_the_middle_and_tells_of_both(tmp_path: Path, monkeypatch) -> None:
    files = [tmp_path / name for name in ("before.safetensors", "after.safetensors")]
    for seed, file in enumerate(files):
        run = pretrain.Run(tmp_path / str(seed), seed, "cpu")
        run.begin(stage_of(images=7))
        pretrain.export(run, file)
    judged = []
    monkeypatch.setattr(mean_of_weights, "judge_weights", lambda *asked: judged.append(asked) or {"pointing": 0.5})
    mean_of_weights.main(*files, out=tmp_path / "mean.safetensors")
    before, after, mean = (load_file(file) for file in (*files, tmp_path / "mean.safetensors"))
    assert before.keys() == after.keys() == mean.keys()
    name = "findings.weight"
    assert torch.allclose(mean[name], (before[name] + after[name]) / 2)
    assert judged[0][1:] == (1, 224)
    told = (tmp_path / "mean.md").read_text(encoding="utf-8")
    for line in ("| before seed | 0 |", "| after seed | 1 |", "| mean of | before.safetensors, after.safetensors |"):
        assert line in told
    save_file({"features.conv0.weight": torch.zeros(1)}, files[0])
    with pytest.raises(UsageError, match="are not of one network"):
        mean_of_weights.main(*files, out=tmp_path / "mean.safetensors")


def test_the_rate_rises_stays_and_falls_to_zero(tmp_path: Path) -> None:
    run = pretrain.Run(tmp_path, 0, "cpu")
    run.begin(stage_of(images=10**6, decay=False, rate=1.0))
    assert run.rate() == pytest.approx(1 / pretrain.WARM_UP)
    run.at["seen"] = 50_000
    assert run.rate() == 1.0
    run.begin(stage_of(images=1000, rate=1.0))
    assert run.at["stages"][0]["images"] == 50_000
    run.at["seen"] += 750
    assert run.rate() == 0.25


def test_exported_weights_load(tmp_path: Path) -> None:
    run = pretrain.Run(tmp_path, 3, "cpu")
    run.begin(stage_of(images=7))
    (tmp_path / "log.jsonl").write_text('{"seen": 7}\n', encoding="utf-8")
    run.at["seen"] = 7
    file = tmp_path / "weights" / "densenet121-phantom.safetensors"
    pretrain.export(run, file)
    state = load_file(file)
    body, names = make_body("densenet121")
    loaded = load_weights(body, "densenet121", str(file))
    assert "725 tensors matched" in loaded.detail
    assert loaded.kind == "phantom"  # trained on from like those that ship
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
    told = file.with_suffix(".md").read_text()
    assert "| images seen | 7 |" in told
    assert hashlib.sha256(file.read_bytes()).hexdigest() in told
    assert file.with_suffix(".jsonl").read_text() == '{"seen": 7}\n'


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
    old.begin(stage_of(images=7))
    old.at["seen"] = 7
    file = tmp_path / "w.safetensors"
    old.out.mkdir()
    pretrain.export(old, file)
    new.start_from(file)
    for network in (new.model, new.average):
        assert torch.equal(network.features.conv0.weight, old.average.features.conv0.weight.half().float())
        assert torch.equal(network.findings.linear.weight, old.average.findings.linear.weight)
    new.begin(stage_of(images=7))
    started = pretrain.describe(new)["started_from"]
    assert started.startswith("w.safetensors, sha256 ")
    assert started.endswith(", 7 images seen")
    with pytest.raises(UsageError, match="has seen the films of seed 3; choose another --seed"):
        pretrain.Run(tmp_path / "newer", 3, "cpu").start_from(file)
    save_file({"features.conv0.weight": torch.zeros(1)}, file)
    with pytest.raises(UsageError, match=r"w.safetensors do not fit: .* is missing"):
        new.start_from(file)


def test_minutes_end_a_stage_and_take_its_rate_to_zero(tmp_path: Path, small: None, monkeypatch) -> None:
    run = pretrain.Run(tmp_path, 0, "cpu")
    run.at.update(seen=pretrain.WARM_UP, seconds=100.0)
    run.begin(stage_of(images=pretrain.ENDLESS, minutes=2.0, batch=2, rate=1.0))
    run.at["seconds"] = 190.0
    assert run.rate() == pytest.approx(0.25)
    run.at["seconds"] = 219.99
    monkeypatch.setattr(pretrain, "judge", lambda *_: {})
    assert run.train(workers=0)
    assert run.at["seen"] == pretrain.WARM_UP + 2
    assert run.at["stages"][-1]["images"] == 2
    assert run.checkpoint.is_file()
    assert run.rate() == 0.0


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no checkpoint; start a stage with --images"):
        pretrain.main(tmp_path, resume=True, threads=1)
    with pytest.raises(UsageError, match="leave --images and --minutes out"):
        pretrain.main(tmp_path, resume=True, images=5, threads=1)
