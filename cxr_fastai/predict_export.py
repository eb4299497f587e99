"""A fastai export (`learner.pkl`, anybody's) + films -> the same rows as from model.onnx, nothing unpickled.

    for row in ExportPredictor("somebodys.pkl").predict(["a.png", "folder"]): ...

`unpickle_unsafely` is what `--unsafe-unpickle` means: fastai's own `load_learner`, which runs whatever the file says.
"""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cxr_fastai.config import Limits
from cxr_fastai.errors import ModelFileError, UnreadableImage, UsageError
from cxr_fastai.inert import InertExport, read_export
from cxr_fastai.inputs import Input
from cxr_fastai.modelfile import read_model
from cxr_fastai.predict import Prediction, Predictor, Read, Said, decide
from cxr_fastai.rebuild import HEAD, on_batch, prepare, rebuild
from cxr_fastai.runs import sha256
from cxr_fastai.table import positive_class

THRESHOLD, PICTURE = 0.5, 64
# What a card says that is true of model.onnx alone.
ONNX_ONLY = ("outliers", "precision")


class RebuiltNetwork:
    """The network of an export, with the interface of `engine.Engine`."""

    precision = "fp32"

    def __init__(self, export: InertExport):
        self.export, self.model = export, rebuild(export)
        self.explains = export.layers["1"].kind == HEAD

    def run(self, films: np.ndarray) -> dict[str, np.ndarray]:
        """Run films; return logits, probabilities (N, K), evidence (N, K, h, w), and with our own head features (N, F).

        Evidence of another head than ours has no places: h and w are 0.

        Parameters
        ----------
        films
            Where our own reader opens them, (N, size, size) float32 in [0, 1] as `to_input` gives them; else (N, C, H,
            W) float32 as `prepare` does.

        Raises
        ------
        ModelFileError
            Where a logit is not finite.
        """
        batch = torch.from_numpy(np.ascontiguousarray(films))
        if films.ndim == 3:
            batch = batch[:, None].expand(-1, 3, -1, -1)
            for step in self.export.steps:
                batch = on_batch(batch, step, self.export.opened)
        with torch.no_grad():
            body, head = self.model
            maps = body(batch)
            logits = head(maps)
            p = logits.sigmoid() if self.export.task == "multilabel" else logits.softmax(1)
            found = {"logits": logits, "probabilities": p, "evidence": torch.empty(*p.shape, 0, 0)}
            if self.explains:
                found |= {"evidence": head.evidence(maps), "features": head.pool(maps)}  # type: ignore[operator]
        if not torch.isfinite(logits).all():
            raise ModelFileError(f"{self.export.path}: its network gives numbers that are not finite; train it again")
        return {name: values.numpy() for name, values in found.items()}


class ExportPredictor(Predictor):
    """A `Predictor` of a fastai export; there is no evidence where the head is not ours.

    Parameters
    ----------
    path
        The export. With our own model.onnx beside it, the positive class and the threshold are that one's; else the
        class is the one that is not a word for normal, and the threshold a half.
    precision
        fp32 or auto, which is the same here.
    threads
        Of the arithmetic; None leaves torch's choice.

    Attributes
    ----------
    export : InertExport
        What was read, with the names in it that no export of fastai's own needs (`unneeded`).
    """

    def __init__(self, path: str | Path, *, precision: str = "fp32", threads: int | None = None):
        if precision == "bf16":
            raise UsageError("--precision is bf16, which only a model.onnx can do; use auto or fp32 for this model")
        if threads is not None:
            torch.set_num_threads(threads)
        self.path = Path(path)
        self.export = read_export(path)
        network = RebuiltNetwork(self.export)
        self.card = card_of(self.export, network)
        self.cards, self.engines = [self.card], [network]
        self.fingerprints = [sha256(path)]

    def _read_one(self, source: Input, limits: Limits, frame: int | None, keep: bool) -> Read | None:
        film = super()._read_one(source, limits, frame, keep or self.export.opened != "film")
        if film is None or film.pixels is None or self.export.opened == "film":
            return film
        try:
            inputs = {self.card["size"]: prepare(film.pixels, self.export)}
        except UnreadableImage as error:
            return Read(dataclasses.replace(film.row, error=str(error)), None, {})
        return film._replace(pixels=film.pixels if keep else None, inputs=inputs)

    def _judged(self, row: Prediction, said: Said, i: int, abstain: bool, coverage: float | None) -> Prediction:
        judged = super()._judged(row, said, i, abstain, coverage)
        return judged if said.evidence.size else dataclasses.replace(judged, evidence=None)


def operating_point(classes: Sequence[str], task: str) -> dict[str, Any]:
    """Return positive class and threshold of a model that tells neither."""
    return {
        "positive": positive_class(classes) if task == "binary" else None,
        "threshold": {"binary": THRESHOLD, "multilabel": dict.fromkeys(classes, THRESHOLD)}.get(task),
    }


def card_of(export: InertExport, network: RebuiltNetwork) -> dict[str, Any]:
    """Return what a model.onnx would say of itself in its card.

    Raises
    ------
    ModelFileError
        Where the model.onnx beside the export is of other classes.
    """
    card = {
        "classes": list(export.classes),
        "task": export.task,
        "arch": export.architecture,
        "size": max(export.size),
        "temperature": 1.0,
        "augment": 0.0 if export.opened != "film" else 1.0,
        **operating_point(export.classes, export.task),
    }
    beside = export.path.with_name("model.onnx")
    if network.explains:
        card["bias"] = network.model[1].linear.bias.tolist()  # type: ignore[index, union-attr, operator]
        if beside.is_file():
            theirs = read_model(beside).card
            if any(card[key] != theirs.get(key) for key in ("classes", "task", "size")):
                raise ModelFileError(f"{export.path}: model.onnx beside it is of another training; move one of them")
            return {**card, **{key: value for key, value in theirs.items() if key not in ONNX_ONLY}}
    return card


def unpickle_unsafely(path: str | Path):
    """Return the Learner of an export with fastai's `load_learner`, which runs any code that the file names.

    Raises
    ------
    ModelFileError
        Where it cannot be loaded, with the reason in one line.
    """
    from fastai.learner import load_learner

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learn = load_learner(path)
    except Exception as error:
        # a pickle can raise anything
        reason = (str(error).strip().splitlines() or ["?"])[0][:200]
        raise ModelFileError(f"{path}: cannot be unpickled ({type(error).__name__}: {reason})") from error
    if not hasattr(learn, "dls") or not hasattr(learn, "model"):
        raise ModelFileError(f"{path}: holds a {type(learn).__name__}, not a Learner")
    return learn


class UnpickledPredictor(Predictor):
    """A `Predictor` that runs the Learner itself, and with it whatever the file says; there is no evidence."""

    precision = "fp32"

    def __init__(self, path: str | Path):
        self.path, self.learn = Path(path), unpickle_unsafely(path)
        classes = [str(name) for name in self.learn.dls.vocab]
        multilabel = "Cross" not in type(self.learn.loss_func).__name__
        task = "multilabel" if multilabel else "binary" if len(classes) == 2 else "multiclass"
        self.card = {"classes": classes, "task": task, "size": PICTURE, **operating_point(classes, task)}
        self.cards, self.fingerprints = [self.card], [sha256(path)]

    def _predict_batch(
        self, read: Sequence[Read], abstain: bool, tta: bool, coverage: float | None
    ) -> Iterator[Prediction]:
        for film in read:
            row = dataclasses.replace(film.row, pixels=film.pixels)
            if row.error is None:
                with self.learn.no_bar(), self.learn.no_logging(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    p = self.learn.get_preds(dl=self.learn.dls.test_dl([row.path], num_workers=0))[0][0].tolist()
                said = dict(zip(self.classes, p, strict=True))
                row = dataclasses.replace(row, probabilities=said, **decide(said, self.card))
            yield row
