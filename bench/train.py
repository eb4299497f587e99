"""How fast training is, against fastai as its documentation writes it: same films, same start, same epochs.

    python bench/train.py [DATA] [--seeds 3] [--epochs 3] [--precision fp32] [--device auto]
    python bench/train.py --profile          # on a CUDA device: share of its time that is spent in kernels

Both sides start from the same body weights (`--weights`, phantom by default) and are tested on the same films, which
neither sees in training. The plain side is `DataBlock` with `Resize`, `aug_transforms`, `Normalize`, default worker
processes, `vision_learner` and `fine_tune`; ours is what `train` runs, reading of the films into an empty cache
counted in. Each fit is a process of its own; the two take turns, and each seed the other goes first. Films a second are
films of training times epochs (the frozen one, too) over the seconds from the first film read to the last epoch
validated; what both do before, importing and building the network, is left out and shown beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transfer_report import Sample, gain

from cxr_fastai.metrics import auroc

SIDES = ("plain", "ours")
BOOT = 2000  # resamples of patients


def prepare(data: str) -> pd.DataFrame:
    """Return the split table of the data, the same for every seed of a fit."""
    from cxr_fastai.config import TrainConfig
    from cxr_fastai.console import QUIET
    from cxr_fastai.training import prepare_table

    return prepare_table(TrainConfig(data=data, seed=0), QUIET)


def plain(table: pd.DataFrame, asked: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Train as fastai's documentation does; return seconds and the scores of the test films."""
    import torch
    from fastai.vision.all import (
        CategoryBlock,
        ColReader,
        DataBlock,
        ImageBlock,
        Normalize,
        Resize,
        accuracy,
        aug_transforms,
        imagenet_stats,
        set_seed,
        vision_learner,
    )
    from torchvision.models import densenet121

    from cxr_fastai.model import load_weights

    set_seed(asked.seed)
    seen = table[table["split"] != "test"].reset_index(drop=True)
    seen["is_valid"] = seen["split"] == "valid"
    began = time.perf_counter()
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock),
        get_x=ColReader("path"),
        get_y=ColReader("label"),
        splitter=lambda frame: (
            np.flatnonzero(~frame["is_valid"]).tolist(),
            np.flatnonzero(frame["is_valid"]).tolist(),
        ),
        item_tfms=Resize(asked.size),
        batch_tfms=[*aug_transforms(), Normalize.from_stats(*imagenet_stats)],
    )
    dls = block.dataloaders(seen, bs=asked.batch, device=torch.device(asked.device))
    learn = vision_learner(dls, densenet121, pretrained=False, normalize=False, metrics=accuracy)
    load_weights(learn.model[0], "densenet121", asked.weights)
    built = time.perf_counter()
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(asked.epochs, 1e-3)
    done = time.perf_counter()
    test = table[table["split"] == "test"]
    with learn.no_bar(), learn.no_logging():
        p = learn.get_preds(dl=dls.test_dl(test.reset_index(drop=True)))[0].numpy()
    found = {"seconds": done - built, "building": built - began, "scores": of_positive(p, dls.vocab, table)}
    return found | (profiled(learn) if asked.profile else {})


def ours(table: pd.DataFrame, asked: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Train as `train` does; return seconds and the scores of the test films."""
    import dataclasses

    import torch
    from torch import nn

    from cxr_fastai.config import TrainConfig
    from cxr_fastai.console import QUIET
    from cxr_fastai.data import OpenFilm, read_films
    from cxr_fastai.fitting import build_learner, fit

    config = dataclasses.replace(
        TrainConfig(data=asked.data), seed=asked.seed, size=asked.size, batch_size=asked.batch, epochs=asked.epochs,
        precision=asked.precision, weights=asked.weights, out=str(out),
    )  # fmt: skip
    opener = OpenFilm(asked.size)
    seen = table[table["split"] != "test"]
    began = time.perf_counter()
    bad = read_films(opener, seen["path"].tolist(), lambda: None)
    assert not bad, bad
    read = time.perf_counter()
    learn, loaded, _ = build_learner(table, config, opener, torch.device(asked.device))
    built = time.perf_counter()
    run = out / "run"
    run.mkdir()
    fit(learn, config, loaded, run, QUIET)
    done = time.perf_counter()
    test = table[table["split"] == "test"]
    with learn.no_bar(), learn.no_logging():
        dl = learn.dls.test_dl(test["path"].tolist())
        p = learn.get_preds(dl=dl, act=nn.Softmax(1))[0].numpy()
    found = {
        "seconds": read - began + done - built, "building": built - read,
        "scores": of_positive(p, learn.dls.vocab, table),
        "epochs": pd.read_csv(run / "history.csv")["seconds"].tolist(),
    }  # fmt: skip
    return found | (profiled(learn) if asked.profile else {})


def of_positive(probabilities: np.ndarray, classes: Sequence[str], table: pd.DataFrame) -> list[float]:
    """Return the probabilities (n,) of the positive class, from (n, K)."""
    return probabilities[:, list(classes).index(table.attrs["positive"])].tolist()


def profiled(learn: Any, batches: int = 60) -> dict[str, float]:
    """Train one epoch more, all layers, and return what share of its time the CUDA device spent in kernels."""
    import torch
    from fastai.callback.core import Callback, CancelFitException
    from torch.profiler import ProfilerActivity, profile

    from cxr_fastai.callbacks import GraphedStep

    class Watch(Callback):
        order = 90

        def after_batch(self) -> None:
            if not self.training:
                return
            if self.iter == 5:
                torch.cuda.synchronize()
                self.learn.watched = profile(activities=[ProfilerActivity.CUDA])
                self.learn.watched.__enter__()
                self.learn.began = time.perf_counter()
            if self.iter == 5 + batches or self.iter == self.n_iter - 1:
                torch.cuda.synchronize()
                self.learn.took = (time.perf_counter() - self.learn.began) / (self.iter - 5)
                self.learn.watched.__exit__(None, None, None)
                self.learn.counted = self.iter - 5
                raise CancelFitException

    cbs: list[Callback] = [Watch()]
    if hasattr(learn.dls.train, "serve"):
        cbs.append(GraphedStep())
    recorder = [learn.recorder] if hasattr(learn, "recorder") and len(cbs) > 1 else []
    with learn.no_bar(), learn.no_logging(), learn.removed_cbs(recorder):
        learn.unfreeze()
        learn.fit_one_cycle(1, 1e-4, cbs=cbs)
    kernels = sum(event.self_device_time_total for event in learn.watched.key_averages()) / 1e6 / learn.counted
    return {"step_ms": learn.took * 1e3, "kernels_ms": kernels * 1e3, "share_in_kernels": kernels / learn.took}


def one_fit(side: str, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Run one side in a process of its own, with an empty cache."""
    with tempfile.TemporaryDirectory() as temporary:
        command = [
            sys.executable, __file__, asked.data, "--side", side, "--seed", str(seed), "--epochs", str(asked.epochs),
            "--size", str(asked.size), "--batch", str(asked.batch), "--precision", asked.precision, "--device",
            asked.device, "--weights", asked.weights, "--out", temporary, *(["--profile"] if asked.profile else []),
        ]  # fmt: skip
        environment = {**os.environ, "CXR_CACHE": f"{temporary}/cache"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(asked: argparse.Namespace) -> None:
    """Let the sides take turns and print what each reached, the ratio, and how far the AUROC differ.

    The interval is over patients and seeds, the same resamples for both sides.
    """
    table = prepare(asked.data)
    test = table[table["split"] == "test"]
    y, patients = (test["label"] == table.attrs["positive"]).to_numpy().astype(float), test["patient_id"].to_numpy()
    samples: dict[str, list[Sample]] = {side: [] for side in SIDES}
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for seed in range(asked.seeds):
        for side in SIDES if seed % 2 == 0 else SIDES[::-1]:
            one = one_fit(side, seed, asked)
            samples[side].append((y, np.array(one.pop("scores")), patients))
            one["auroc"] = float(auroc(y, samples[side][-1][1]))
            found[side].append(one)
            print(f"seed {seed} {side:<5} " + " ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in one.items()
            ), flush=True)  # fmt: skip
    rates = {side: float(np.median([one["rate"] for one in ones])) for side, ones in found.items()}
    aurocs = {side: float(np.mean([one["auroc"] for one in ones])) for side, ones in found.items()}
    for side in SIDES:
        spread = [one["rate"] for one in found[side]]
        print(
            f"{side:<5} {rates[side]:.1f} films/s (median of {len(spread)}; {min(spread):.1f} to {max(spread):.1f}), "
            f"test AUROC {aurocs[side]:.4f} (mean)"
        )
    more = gain(samples["ours"], samples["plain"], BOOT)
    print(f"ours / plain: {rates['ours'] / rates['plain']:.2f} times the films a second, "
          f"AUROC {more['value']:+.4f} ({more['low']:+.4f} to {more['high']:+.4f})")  # fmt: skip


def main() -> None:
    """Run the comparison, or one side of it for itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="data/synthetic")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="with all layers; a frozen one comes before")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", default="auto", help="of ours; fp32 for a processor without bfloat16")
    parser.add_argument("--device", default=None)
    parser.add_argument("--weights", default="phantom")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.device is None:
        import torch

        asked.device = "cuda" if torch.cuda.is_available() else "cpu"
    if asked.side is None:
        compare(asked)
        return
    table = prepare(asked.data)
    one = {"plain": plain, "ours": ours}[asked.side](table, asked, Path(asked.out))
    films = int((table["split"] == "train").sum()) * (asked.epochs + 1)
    print(json.dumps({"rate": films / one["seconds"], **one}))


if __name__ == "__main__":
    main()
