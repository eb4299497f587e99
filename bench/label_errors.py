"""How many planted label errors stand at the head of the ranking that `audit` makes of a trained model's features.

    python bench/label_errors.py --model exports/latest
    python bench/label_errors.py --weights phantom --seeds 3 --task multiclass

Writes phantoms of which a share has a wrong label, ranks them, and prints the share of the wrong ones within the first
10 % of the ranking and the AUROC of the ranking. Fails below 80 %.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from cxr_fastai.audit.labels import features_of, features_of_weights, label_issues
from cxr_fastai.config import GenerateConfig
from cxr_fastai.console import Console
from cxr_fastai.phantom import generate
from cxr_fastai.predict import Predictor
from cxr_fastai.table import load_table

HEAD, FOUND = 0.10, 0.80


def measure(options: argparse.Namespace, seed: int) -> dict[str, float]:
    """Write one set with wrong labels, rank it, and grade the ranking."""
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        config = GenerateConfig(
            out=f"{folder}/set",
            n=options.n,
            task=options.task,
            seed=seed,
            difficulty=options.difficulty,
            plant=(f"mislabel:{options.share}",),
            workers=options.workers,
        )
        with console.busy(f"writing {options.n} films"):
            generate(config)
        table = load_table(config.out)
        planted = json.loads((Path(config.out) / "dataset.json").read_text())["planted"][0]["paths"]
        with console.progress("films", len(table)) as advance:
            if options.weights:
                features = features_of_weights(table, options.weights, advance)
            else:
                features = features_of(table, Predictor(options.model), advance)
        began = time.perf_counter()
        issues = label_issues(table, features, seed=0)
        seconds = time.perf_counter() - began
        wrong = np.array([Path(i.path).relative_to(config.out).as_posix() in planted for i in issues])
    head = wrong[: round(HEAD * len(wrong))].sum() / wrong.sum()
    return {"found": head, "auroc": roc_auc_score(wrong, [-i.quality for i in issues]), "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="run folder or model.onnx, not trained on these films")
    parser.add_argument("--weights", help="weights of a DenseNet121 body, instead of --model")
    parser.add_argument("--n", type=int, default=750)
    parser.add_argument("--share", type=float, default=0.05, help="of wrong labels")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=900, help="apart from those that models are trained on")
    parser.add_argument("--task", default="binary")
    parser.add_argument("--difficulty", default="medium")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if bool(options.model) == bool(options.weights):
        parser.error("give --model or --weights")
    results = [measure(options, options.first_seed + k) for k in range(options.seeds)]
    for k, r in enumerate(results):
        print(f"seed {options.first_seed + k}: {r['found']:.1%} of the wrong labels in the first {HEAD:.0%}, "
              f"AUROC of the ranking {r['auroc']:.3f}, ranked in {r['seconds']:.1f} s")  # fmt: skip
    mean = float(np.mean([r["found"] for r in results]))
    print(f"mean {mean:.1%} (wanted {FOUND:.0%}) {'ok' if mean >= FOUND else 'FAILS'}")
    return int(mean < FOUND)


if __name__ == "__main__":
    sys.exit(main())
