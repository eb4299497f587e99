"""Does the label leak? Logistic regression on what should tell nothing, patient-grouped 5-fold cross-validation.

python bench/leakage.py --n 750 --seed 0
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cxr_fastai.config import GenerateConfig
from cxr_fastai.phantom import generate

LIMITS = {"mean": (0.40, 0.60), "percentiles": (0.40, 0.60), "border": (0.40, 0.60), "thumbnail": (0.0, 0.80)}
BORDER = 10  # pixels


def features(film: Image.Image) -> dict[str, np.ndarray]:
    """Return mean, percentiles, border (10 pixels wide, block means) and 32x32 thumbnail of a film."""
    grey = np.asarray(film.convert("L"), dtype=np.float32) / 255
    size = grey.shape[0]
    sides = [grey[:BORDER], grey[-BORDER:], grey[:, :BORDER].T, grey[:, -BORDER:].T]
    blocks = [side[:, : size // BORDER * BORDER].reshape(BORDER, -1, BORDER).mean(axis=(0, 2)) for side in sides]
    small = film.convert("L").resize((32, 32), Image.Resampling.BOX)
    return {
        "mean": np.array([grey.mean()]),
        "percentiles": np.percentile(grey, (1, 5, 25, 50, 75, 95, 99)),
        "border": np.concatenate(blocks),
        "thumbnail": np.asarray(small, dtype=np.float32).ravel() / 255,
    }


def aurocs(folder: Path, table: pd.DataFrame) -> dict[str, float]:
    """Cross-validated AUROC of normal against abnormal, by each kind of feature."""
    rows = [features(Image.open(folder / path)) for path in table["path"]]
    truth, groups = (table["label"] != "normal").to_numpy(), table["patient_id"].to_numpy()
    result = {}
    for name in LIMITS:
        data = np.stack([row[name] for row in rows])
        model = make_pipeline(
            StandardScaler(), LogisticRegression(max_iter=2000, C=0.01 if data.shape[1] > 50 else 1.0)
        )
        folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
        score = cross_val_predict(model, data, truth, groups=groups, cv=folds, method="decision_function")
        result[name] = float(roc_auc_score(truth, score))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=750)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--difficulty", default="medium")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = GenerateConfig(out=f"{folder}/set", n=options.n, seed=options.seed, difficulty=options.difficulty)
        result = aurocs(Path(config.out), generate(config))
    failed = False
    for name, value in result.items():
        low, high = LIMITS[name]
        good = low <= value <= high
        failed |= not good
        print(f"{name:12s} AUROC {value:.3f}  (allowed {low:.2f} to {high:.2f}) {'ok' if good else 'LEAKS'}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
