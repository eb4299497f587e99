"""How often `audit` finds a planted shortcut, and how often it cries wolf on films without one.

    python bench/shortcuts.py --seeds 10 --clean 20 [--real DATA]

Writes sets of phantoms to a temporary folder, with each kind of shortcut and without, scans and probes them. Prints,
for each kind, the share of sets in which the probe that should find it does, and in which any does, and the mean AUROC
of each probe (in brackets: the share in which it is flagged). Fails below 95 % found, or above 5 % of clean sets.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator

import pandas as pd

from cxr_fastai.audit.scan import scan
from cxr_fastai.audit.shortcuts import Probe, probe
from cxr_fastai.config import GenerateConfig
from cxr_fastai.phantom import generate
from cxr_fastai.table import load_table

FINDS = {"marker": "edges", "border": "border", "brightness": "grey levels", "format": "format"}
FOUND, FALSE_ALARMS = 0.95, 0.05


def probes_of(plant: tuple[str, ...], options: argparse.Namespace, seed: int) -> list[Probe]:
    """Write one set, and probe it."""
    with tempfile.TemporaryDirectory() as folder:
        config = GenerateConfig(
            out=f"{folder}/set",
            n=options.n,
            task=options.task,
            seed=seed,
            difficulty=options.difficulty,
            plant=plant,
            workers=options.workers,
        )
        generate(config)
        return probe(scan(load_table(config.out)))


def ask(options: argparse.Namespace) -> Iterator[tuple[str, int, list[Probe]]]:
    """Yield kind, seed and probes of each set, with a line of progress on a terminal."""
    sets = [("clean", seed) for seed in range(options.clean)]
    sets += [(kind, seed) for kind in FINDS for seed in range(options.seeds)]
    start = time.perf_counter()
    for done, (kind, seed) in enumerate(sets, 1):
        plant = () if kind == "clean" else (f"shortcut:{options.strength}:{kind}",)
        yield kind, seed, probes_of(plant, options, seed)
        left = (time.perf_counter() - start) / done * (len(sets) - done)
        if sys.stderr.isatty():
            print(f"\r{done} of {len(sets)} sets, {left:.0f} s left ", end="", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="sets of each kind")
    parser.add_argument("--clean", type=int, default=20, help="sets without a shortcut")
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--strength", type=float, default=0.9)
    parser.add_argument("--task", default="binary")
    parser.add_argument("--difficulty", default="medium")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--real", help="probe this folder or CSV file instead, and print what is found")
    options = parser.parse_args()
    if options.real:
        for p in probe(scan(load_table(options.real))):
            print(f"{p.name:12s} AUROC {p.auroc:.3f} p {p.p:.4f} {'FLAGGED' if p.flagged else '':8s} {p.detail}")
        return 0
    rows = [(kind, seed, p.name, p.auroc, p.flagged) for kind, seed, found in ask(options) for p in found]
    table = pd.DataFrame(rows, columns=["kind", "seed", "probe", "auroc", "flagged"])
    failed = False
    for kind, part in table.groupby("kind", sort=False):
        any_flag = part.groupby("seed")["flagged"].any()
        right = part[part["probe"] == FINDS.get(str(kind))].groupby("seed")["flagged"].any()
        good = any_flag.mean() <= FALSE_ALARMS if kind == "clean" else right.mean() >= FOUND
        failed |= not good
        found = "" if kind == "clean" else f"{FINDS[str(kind)]} in {right.sum()} of {len(right)}, "
        print(f"\n{kind}: flagged by {found}any in {any_flag.sum()} of {len(any_flag)}  {'ok' if good else 'FAILS'}")
        means = part.groupby("probe", sort=False)[["auroc", "flagged"]].mean()
        print("  " + ", ".join(f"{name} {row.auroc:.2f} ({row.flagged:.0%})" for name, row in means.iterrows()))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
