"""How far learner.pkl and model.onnx of a run differ on films, and how far evidence misses the logits.

    python bench/parity.py exports/latest data/synthetic/images/abnormal

Reads learner.pkl with fastai's own `load_learner`, as somebody who trains on would: only for files of your own.
"""

import warnings
from pathlib import Path

import numpy as np
import typer

from cxr_fastai.images import read_radiograph, to_input
from cxr_fastai.inputs import find_inputs
from cxr_fastai.predict import Predictor


def main(run: Path, images: list[str], limit: float = 1e-4) -> None:
    warnings.filterwarnings("ignore")
    from fastai.learner import load_learner

    paths = [film.path for film in find_inputs(images)]
    predictor = Predictor(run)
    ours = np.array([[row.probabilities[c] for c in predictor.classes] for row in predictor.predict(paths)])
    learn = load_learner(run / "learner.pkl")
    with learn.no_bar(), learn.no_logging():
        theirs = learn.get_preds(dl=learn.dls.test_dl(paths))[0].numpy()
    probability = float(np.abs(ours - theirs).max())

    evidence = 0.0
    for start in range(0, len(paths), 16):
        films = [to_input(read_radiograph(p), predictor.card["size"]) for p in paths[start : start + 16]]
        out = predictor.run(np.stack(films))
        sums = out["evidence"].sum((2, 3)) + np.array(predictor.card["bias"], np.float32)
        evidence = max(evidence, float(np.abs(sums - out["logits"]).max()))
    print(
        f"{len(paths)} films: probabilities differ by at most {probability:.2e}, evidence and logit by {evidence:.2e}"
    )
    raise typer.Exit(0 if max(probability, evidence) <= limit else 1)


if __name__ == "__main__":
    typer.run(main)
