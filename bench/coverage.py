"""How often the 95 % intervals cover the truth: simulated studies whose population values are known.

    python bench/coverage.py [--studies 2000] [--boot 1000] [--seed 0]

A study is 60 or 200 patients of one to four films each (about 150 or 500 films); the label belongs to the patient, and
films of one patient share half of the variance of their score, so that an interval over films would be too narrow. The
score is binormal; probabilities are its true posterior, made too sure by a factor, so that calibration has an error to
find. The truth comes from one very large sample. Prints coverage, misses on either side, and mean width; the last two
columns are the same study with films resampled as if each were a patient.
"""

import argparse
import time

import numpy as np
from scipy.stats import norm

from cxr_fastai.metrics import METRICS, evaluate_predictions

SHARED = 0.5  # variance that films of one patient share
SURE = 1.5  # factor on the logit: overconfident
SCENES = [(0.80, 60), (0.90, 60), (0.97, 60), (0.99, 60), (0.90, 200)]  # AUROC, patients


def study(rng: np.random.Generator, auroc: float, patients: int, films: int = 4) -> tuple[np.ndarray, ...]:
    """Sample labels (n,), probabilities (n, 2) and patients (n,)."""
    distance = np.sqrt(2) * norm.ppf(auroc)
    ids = np.repeat(np.arange(patients), rng.integers(1, films + 1, patients))
    y = rng.integers(0, 2, patients)[ids]
    own, shared = rng.normal(size=len(ids)), rng.normal(size=patients)[ids]
    score = distance * y + np.sqrt(SHARED) * shared + np.sqrt(1 - SHARED) * own
    p = 1 / (1 + np.exp(-SURE * distance * (score - distance / 2)))
    return y, np.stack([1 - p, p], axis=1), ids


def measure(sample: tuple[np.ndarray, ...], boot: int, seed: int) -> np.ndarray:
    """Return value, low and high of each metric, (metrics, 3)."""
    y, p, ids = sample
    found = evaluate_predictions(y, p, ["normal", "abnormal"], ids, task="binary", n_boot=boot, seed=seed)["metrics"]
    return np.array([[found[m][k] for k in ("value", "low", "high")] for m in METRICS], dtype=float)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--boot", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    for auroc, patients in SCENES:
        start, rng = time.perf_counter(), np.random.default_rng(asked.seed)
        truth = measure(study(rng, auroc, 1_000_000, films=1), 0, 0)[:, :1]
        studies = [study(rng, auroc, patients) for _ in range(asked.studies)]
        found = np.stack([measure(s, asked.boot, i) for i, s in enumerate(studies)])
        films = np.stack([measure((y, p, np.arange(len(y))), asked.boot, i) for i, (y, p, _) in enumerate(studies)])
        print(f"\nAUROC {auroc:.2f}, {patients} patients, {np.mean([len(s[0]) for s in studies]):.0f} films, "
              f"{asked.studies} studies, {time.perf_counter() - start:.0f} s")  # fmt: skip
        print(f"{'metric':20}{'truth':>7}{'mean':>7}{'covered':>9}{'below':>7}{'above':>7}{'width':>7}"
              f"{'films: covered':>16}{'width':>7}")  # fmt: skip
        for i, name in enumerate(METRICS):
            low, high = found[:, i, 1], found[:, i, 2]
            below, above = (high < truth[i]).mean(), (low > truth[i]).mean()
            naive = ((films[:, i, 1] <= truth[i]) & (truth[i] <= films[:, i, 2])).mean()
            width, of_films = (high - low).mean(), (films[:, i, 2] - films[:, i, 1]).mean()
            print(f"{name:20}{truth[i, 0]:7.3f}{found[:, i, 0].mean():7.3f}{1 - below - above:9.1%}{below:7.1%}"
                  f"{above:7.1%}{width:7.3f}{naive:16.1%}{of_films:7.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
