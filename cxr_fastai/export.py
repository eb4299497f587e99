"""Learner -> learner.pkl and model.onnx, and the check that both say the same.

model.onnx, one file, opset as torch's exporter chooses:
    in   pixels (N, 1, size, size) float32 in [0, 1], as `images.to_input` gives them
    out  logits (N, K) · probabilities (N, K) · evidence (N, K, h, w) · features (N, F) · distance (N, 1), float32
The evidence of a class summed over places, plus the card's bias, is its logit. The distance is how far a film lies from
those of training (see `outliers`). The card stands as JSON in the metadata under `card`: classes, task, threshold,
temperature, size, limit of the distance, which precisions agree, versions, fingerprint of the data.
"""

import contextlib
import dataclasses
import json
import logging
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cxr_fastai.config import usable_cores
from cxr_fastai.engine import BF16, Engine, OpenVino, multiplies_bf16
from cxr_fastai.errors import TrainingError
from cxr_fastai.outliers import Outliers
from cxr_fastai.runs import atomic_path

PARITY = 1e-4  # largest difference of a probability between the two files
PRECISION_DP, PRECISION_AUROC = 0.01, 0.002  # what a faster precision may change
TOGETHER = 16  # films that are run at a time
OUTPUTS = ("logits", "probabilities", "evidence", "features", "distance")


def export_learner(learn, path: Path) -> None:
    """Write the fastai Learner, without films, so that `load_learner` and `predict` work on it.

    With pickle instead of fastai's cloudpickle: functions are stored by name only, no code by value.
    """
    import torch

    learn.model.cpu().to(memory_format=torch.contiguous_format)
    with atomic_path(path) as temporary:
        learn.export(temporary.absolute(), pickle_module=pickle)


def make_onnx(learn, size: int, task: str, outliers: Outliers):
    """Return the network of a Learner as an onnx.ModelProto, without a card; refuse weights that are not finite."""
    import torch

    bad = [name for name, value in learn.model.state_dict().items() if not torch.isfinite(value.float()).all()]
    if bad:
        raise TrainingError(f"{len(bad)} weights are not finite (first: {bad[0]}); train with a smaller --lr")
    with _quiet_exporter(), torch.no_grad():  # with gradients the exporter takes a third longer
        program = torch.onnx.export(
            _graph(learn, task, outliers).eval(),
            (torch.rand(2, 1, size, size),),
            dynamo=True,
            verbose=False,
            input_names=["pixels"],
            output_names=list(OUTPUTS),
            dynamic_shapes=({0: torch.export.Dim("films")},),
        )
    assert program is not None  # only torch's older exporter returns None
    return program.model_proto


def _graph(learn, task: str, outliers: Outliers):
    """Return the module that is exported: prepared films in, everything that `OUTPUTS` names out."""
    import torch

    from cxr_fastai.data import IMAGENET_MEAN, IMAGENET_STD
    from cxr_fastai.folding import fused

    # Fused, since the exporter takes a while for every layer.
    body, head = fused(learn.model[0].cpu()), learn.model[1].cpu().eval()

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body, head
            self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
            for name, value in dataclasses.asdict(outliers).items():
                self.register_buffer(f"outliers_{name}", torch.as_tensor(value).float())

        def forward(self, pixels):
            maps = self.body((pixels - self.mean) / self.std)
            features = self.head.pool(maps)
            logits = self.head.linear(features)
            probabilities = logits.sigmoid() if task == "multilabel" else logits.softmax(1)
            return logits, probabilities, self.head.evidence(maps), features, self.distance(features)

        def distance(self, features):
            """Repeat `Outliers.distance`, (N, 1)."""
            centred = features.sqrt() - self.outliers_mean
            along = centred @ self.outliers_axes
            outside = (centred.square().sum(1) - along.square().sum(1)).clamp(min=0)
            return ((along.square() / self.outliers_spread).mean(1) + outside / self.outliers_rest)[:, None] / 2

    return Graph()


def write_onnx(model, card: dict[str, Any], path: Path) -> None:
    """Write an onnx.ModelProto with `card` in its metadata."""
    import onnx

    model.metadata_props.add(key="card", value=json.dumps(card))
    onnx.checker.check_model(model)
    with atomic_path(path) as temporary:
        onnx.save(model, temporary)


def said_by(engine: Engine, films: np.ndarray) -> dict[str, np.ndarray]:
    """Return the `OUTPUTS` of films (N, size, size) float32 in [0, 1], some at a time."""
    found = [engine.run(batch) for batch in np.array_split(films, max(1, len(films) // TOGETHER))]
    return {name: np.concatenate([one[name] for one in found]) for name in OUTPUTS}


def compare_precisions(model: bytes, films: np.ndarray, full: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Tell whether bfloat16 gives the same answers as full precision on held-out films: what the card says of it.

    Parameters
    ----------
    model
        Bytes of an ONNX file.
    films
        (N, size, size) float32 in [0, 1].
    full
        Their probabilities (N, K) in full precision.
    truth
        (N, K) of 1, 0 and NaN (unknown).

    Returns
    -------
    dict
        ``{"bf16": {"passed", "films", "largest_difference", "auroc_change"}}``, or ``passed`` and a ``reason``.
    """
    from cxr_fastai.metrics import auroc

    if not multiplies_bf16():
        return {BF16: {"passed": False, "reason": "not tried: the processor multiplies bfloat16 no faster"}}
    try:
        engine = OpenVino(model, usable_cores())
    except ImportError:
        return {BF16: {"passed": False, "reason": "not tried: OpenVINO is not installed"}}
    half = said_by(engine, films)["probabilities"]
    changes = [
        abs(float(auroc(truth[known, k], half[known, k]) - auroc(truth[known, k], full[known, k])))
        for k, known in enumerate(~np.isnan(truth.T))
        if 0 < np.nansum(truth[:, k]) < known.sum()
    ]
    largest, change = float(np.abs(full - half).max()), max(changes, default=0.0)
    passed = largest <= PRECISION_DP and change <= PRECISION_AUROC
    return {BF16: {"passed": passed, "films": len(films), "largest_difference": largest, "auroc_change": change}}


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep torch's exporter from talking: its progress and its notes on its own internals are not for users."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def check_parity(learn, films: np.ndarray, theirs: np.ndarray, task: str) -> float:
    """Return the largest difference of a probability between the Learner and model.onnx over `films`.

    Parameters
    ----------
    films
        (N, size, size) float32 in [0, 1], as `images.to_input` gives them.
    theirs
        What model.onnx says of them: probabilities (N, K).

    Raises
    ------
    TrainingError
        Where the difference is above 1e-4.
    """
    import torch

    from cxr_fastai.data import normalised

    model = learn.model.cpu().eval()
    with torch.no_grad():
        batches = torch.from_numpy(films[:, None]).split(TOGETHER)
        logits = torch.cat([model(normalised(batch)) for batch in batches])
    ours = logits.sigmoid() if task == "multilabel" else logits.softmax(1)
    worst = float(np.abs(ours.numpy() - theirs).max())
    if not worst <= PARITY:
        raise TrainingError(
            f"model.onnx and learner.pkl differ by {worst:.2g} in a probability, more than {PARITY}; not exported"
        )
    return worst
