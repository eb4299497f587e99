"""How much of an epoch is spent reading films, on a set of large PNGs: cold cache, second epoch, and a new run.

    python bench/cache.py [--films 400] [--side 1024] [--size 224] [--batch 16] [--device cpu]

Writes phantoms to a temporary folder and trains DenseNet121 on all of them, the same way as `train` does. "Reading" is
the time inside OpenFilm (file or cache -> tensor) and, before the first epoch, inside `read_films`; "waiting" is all
that the loop waits for a batch: reading, random crop, collation, and the augmentation of the batch. The third epoch
belongs to a new opener, which finds the cache as the first left it, as a second `train` does.
"""

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cxr_fastai.config import GenerateConfig, TrainConfig
from cxr_fastai.data import OpenFilm, read_films
from cxr_fastai.fitting import build_learner
from cxr_fastai.images import read_radiograph
from cxr_fastai.phantom import generate
from cxr_fastai.table import load_table


class TimedFilm(OpenFilm):
    """An OpenFilm that adds up the seconds spent in it."""

    seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        began = time.perf_counter()
        film = super().__call__(*args, **kwargs)
        self.seconds += time.perf_counter() - began
        return film


def epoch(learn: Any, opener: TimedFilm) -> tuple[float, float, float]:
    """Train one epoch; return seconds of reading, of waiting for batches, and of all."""
    opener.seconds, waiting, began = 0.0, 0.0, time.perf_counter()
    optimiser = torch.optim.Adam(learn.model.parameters(), 1e-4)
    device = learn.dls.device
    batches = iter(learn.dls.train)
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        waiting += time.perf_counter() - asked
        if batch is None:
            return opener.seconds, waiting, time.perf_counter() - began
        with torch.autocast(device.type, torch.bfloat16):
            loss = learn.loss_func(learn.model(batch[0]), batch[1])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        loss.item()  # waits for the device


def run(table: Any, config: TrainConfig, device: torch.device, epochs: int, name: str) -> None:
    """Read all films, then train; print a line an epoch."""
    opener = TimedFilm(config.size)
    began = time.perf_counter()
    bad = read_films(opener, table["path"].tolist(), lambda: None)
    reading = time.perf_counter() - began
    assert not bad, bad
    print(f"{name}: read_films {reading:.2f} s, {len(table) / reading:.0f} films/s; warning: {opener.warning}")
    learn = build_learner(table, config, opener, device)[0]
    learn.model.to(device).train()
    for number in range(1, epochs + 1):
        inside, waiting, total = epoch(learn, opener)
        before = reading if number == 1 else 0.0
        print(
            f"{name}, epoch {number}: reading {before + inside:.2f} s of {before + total:.1f} s, "
            f"{(before + inside) / (before + total):.2%}; waiting for batches {waiting:.2f} s, {waiting / total:.1%}; "
            f"{inside / len(table) * 1e3:.3f} ms a film from the cache"
        )


def main() -> None:
    """Make the films and print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=int, default=400)
    parser.add_argument("--side", type=int, default=1024, help="of the PNG files, pixels")
    parser.add_argument("--size", type=int, default=224, help="what the network takes, pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["CXR_CACHE"] = str(Path(temporary, "cache"))
        folder = Path(temporary, "films")
        generate(GenerateConfig(out=str(folder), n=asked.films, size=asked.side, workers=os.cpu_count() or 1))
        table = load_table(folder)
        table["split"] = "train"
        table.loc[table.groupby("label").tail(1).index, "split"] = "valid"
        files = [Path(path).read_bytes() for path in table["path"][:100]]
        works: dict[str, Callable[[bytes], Any]] = {"SHA-256": hashlib.sha256, "decoding": read_radiograph}
        for name, work in works.items():
            began = time.perf_counter()
            for data in files:
                work(data)
            seconds = (time.perf_counter() - began) / len(files)
            print(
                f"{name}: {seconds * 1e3:.2f} ms a film of {sum(map(len, files)) / len(files) / 1e3:.0f} kB, one thread"
            )
        config = TrainConfig(size=asked.size, batch_size=asked.batch, weights="none")
        run(table, config, torch.device(asked.device), 2, "first run")
        run(table, config, torch.device(asked.device), 1, "second run")
        written = sum(path.stat().st_size for path in Path(temporary, "cache").rglob("*.films"))
        print(f"cache: {written / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
