"""model.onnx + films -> a stream of Prediction, one a film. No torch, no fastai.

    for row in Predictor("exports/latest").predict(["a.png", "folder"]): ...

Every input gets a row: a film that cannot be read is a row with `error`, the others are done.
"""

import csv
import dataclasses
import io
import itertools
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cxr_fastai.errors import ModelFileError, NoSuchFrame, UnreadableImage
from cxr_fastai.images import Limits, to_input
from cxr_fastai.inputs import Input
from cxr_fastai.runs import find_model, safe_cell

BATCH = 16
ARRAYS = ("evidence", "pixels")
ORANGE, BLUE = np.array([[0.90, 0.62, 0.0], [0.0, 0.45, 0.70]], np.float32)


@dataclass(frozen=True)
class Prediction:
    """One row of output.

    probability: binary: of the positive class, the one that `threshold` is about; else that of `label`'s class
    (multi-label: the highest of all). label: multi-label joins the findings by "|", and is "" where there is none.
    threshold: binary: a number; multi-label: one a finding; multi-class: None, the highest probability wins.
    frame: the number of the frame, from 1 on, where every frame of a file was asked for; the first one has None.
    evidence: (K, h, w) contributions to the logits; pixels: (H, W) of the film. Neither is part of the JSON.
    """

    path: str
    label: str | None = None
    probability: float | None = None
    probabilities: dict[str, float] = field(default_factory=dict)
    threshold: float | dict[str, float] | None = None
    flags: tuple[str, ...] = ()
    error: str | None = None
    seconds: float = 0.0
    frame: int | None = None
    evidence: np.ndarray | None = field(default=None, repr=False, compare=False)
    pixels: np.ndarray | None = field(default=None, repr=False, compare=False)

    def without_arrays(self) -> "Prediction":
        """Return the row without its film and map, so that many rows can be kept."""
        return dataclasses.replace(self, evidence=None, pixels=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain JSON types, in the order of the contract."""
        row = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ARRAYS}
        return {**row, "flags": list(self.flags)}

    def to_json(self) -> str:
        """Return the row as one line of JSON."""
        return json.dumps(self.to_dict())


class Predictor:
    """A trained classifier, from a model.onnx file or a run folder.

    Attributes
    ----------
    card : dict
        What the model says of itself: classes, task, positive, size, threshold, temperature, bias, versions.
    """

    def __init__(self, model: str | Path = "exports/latest"):
        self.path = find_model(model)
        import onnxruntime

        onnxruntime.set_default_logger_severity(4)
        try:
            self.session = onnxruntime.InferenceSession(self.path, providers=["CPUExecutionProvider"])
        except Exception as error:
            # onnxruntime has no common class of its errors
            reason = str(error).strip().splitlines()[0][:200]
            raise ModelFileError(f"{self.path}: not a model that can be run ({reason}); export it again") from error
        metadata = self.session.get_modelmeta().custom_metadata_map
        if "card" not in metadata:
            raise ModelFileError(f"{self.path}: an ONNX file, but not one of ours (it has no card); train one first")
        self.card: dict[str, Any] = json.loads(metadata["card"])

    @property
    def classes(self) -> list[str]:
        """The classes, in the order of the logits."""
        return self.card["classes"]

    def run(self, films: np.ndarray) -> dict[str, np.ndarray]:
        """Run the network on prepared films (N, size, size) float32 in [0, 1]; see `export` for the outputs."""
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, {"pixels": films[:, None]}), strict=True))

    def predict(
        self,
        films: Iterable[str | Input],
        *,
        limits: Limits | None = None,
        all_frames: bool = False,
        keep_pixels: bool = False,
    ) -> Iterator[Prediction]:
        """Yield one Prediction a film, in order; nothing is read before it is needed.

        Parameters
        ----------
        limits
            What one file may cost; None is the reader's own.
        all_frames
            Whether each frame of a file with several is a row of its own, instead of the first one with a flag.
        keep_pixels
            Whether the rows carry the film, for a picture of it.
        """
        read = self._read(films, limits or Limits(), all_frames)
        while batch := list(islice(read, BATCH)):
            yield from self._predict_batch(batch, keep_pixels)

    @staticmethod
    def _read(
        films: Iterable[str | Input], limits: Limits, all_frames: bool
    ) -> Iterator[tuple[Prediction, np.ndarray | None]]:
        """Yield a row without a verdict, and the pixels (H, W) or None, of each film or frame."""
        for film in films:
            source = film if isinstance(film, Input) else Input(film)
            for frame in itertools.count():
                began = time.perf_counter()
                row = Prediction(source.path, frame=frame if all_frames and frame else None)
                pixels = None
                try:
                    read = source.read(limits, frame if all_frames else None)
                    row, pixels = dataclasses.replace(row, flags=read.flags), read.pixels
                except NoSuchFrame as error:
                    if frame:
                        break
                    row = dataclasses.replace(row, error=str(error))
                except UnreadableImage as error:
                    row = dataclasses.replace(row, error=str(error))
                yield dataclasses.replace(row, seconds=time.perf_counter() - began), pixels
                if not all_frames or row.error or "multi-frame" not in row.flags:
                    break

    def _predict_batch(self, read: list[tuple[Prediction, np.ndarray | None]], keep: bool) -> list[Prediction]:
        began = time.perf_counter()
        inputs = [to_input(pixels, self.card["size"]) for _, pixels in read if pixels is not None]
        outputs = self.run(np.stack(inputs)) if inputs else {}
        share = (time.perf_counter() - began) / max(1, len(inputs))
        numbers = iter(range(len(inputs)))
        rows = []
        for row, pixels in read:
            verdict = {} if pixels is None else self._verdict(outputs, next(numbers))
            seconds = round(row.seconds + (share if verdict else 0), 4)
            rows.append(dataclasses.replace(row, seconds=seconds, pixels=pixels if keep else None, **verdict))
        return rows

    def _verdict(self, outputs: dict[str, np.ndarray], i: int) -> dict[str, Any]:
        p = dict(zip(self.classes, map(float, outputs["probabilities"][i]), strict=True))
        return {**decide(p, self.card), "probabilities": p, "evidence": outputs["evidence"][i]}

    def evidence_shown(self, row: Prediction) -> np.ndarray:
        """Return the map (h, w) to show for a row: what speaks for its class, against the others.

        Binary: for the positive class, less what speaks for the other one (their difference makes the probability).
        Multi-class: for the class given. Multi-label: for the finding with the highest probability.
        """
        assert row.evidence is not None
        k = self.classes.index(self.card["positive"] or max(row.probabilities, key=row.probabilities.__getitem__))
        return class_map(row.evidence, k, self.card["task"])


def class_map(evidence: np.ndarray, k: int, task: str) -> np.ndarray:
    """Return the map (h, w) that is shown for class `k`, from evidence (K, h, w).

    Multi-label: what speaks for the finding. Else: the same, less what speaks for the other classes on average.
    """
    if task == "multilabel":
        return evidence[k]
    return evidence[k] - np.delete(evidence, k, axis=0).mean(0)


def decide(p: dict[str, float], card: dict[str, Any]) -> dict[str, Any]:
    """Return label, probability and threshold from the probabilities of one film and the card's threshold."""
    threshold = card["threshold"]
    if card["task"] == "binary":
        positive = card["positive"]
        negative = next(c for c in p if c != positive)
        label = positive if p[positive] >= threshold else negative
        return {"label": label, "probability": p[positive], "threshold": threshold}
    if card["task"] == "multilabel":
        found = [c for c in p if p[c] >= threshold[c]]
        return {"label": "|".join(found), "probability": max(p.values()), "threshold": threshold}
    label = max(p, key=p.__getitem__)
    return {"label": label, "probability": p[label], "threshold": None}


def rows_to_csv(rows: Iterable[Prediction], classes: list[str]) -> str:
    """Return the rows as CSV text, one probability column a class; no cell is a formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    probabilities = [f"p_{name}" for name in classes]
    head = ("path", "frame", "label", "probability", *probabilities, "threshold", "flags", "error", "seconds")
    writer.writerow(head)
    for row in rows:
        threshold = json.dumps(row.threshold) if isinstance(row.threshold, dict) else row.threshold
        numbers = [row.probability, *(row.probabilities.get(name) for name in classes), threshold]
        cells = (row.path, row.frame, row.label, *numbers, " ".join(row.flags), row.error, row.seconds)
        writer.writerow([safe_cell(cell) for cell in cells])
    return text.getvalue()


def overlay(pixels: np.ndarray, evidence: np.ndarray) -> np.ndarray:
    """Return the film with its evidence laid over it, (H, W, 3) uint8.

    Orange speaks for the class, blue against it, full colour at the strongest place of this film; readable with
    the usual kinds of colour blindness (Okabe and Ito 2008).

    Parameters
    ----------
    pixels
        (H, W) float32 in [0, 1].
    evidence
        (h, w), any scale; 0 is neutral.
    """
    from PIL import Image

    height, width = pixels.shape
    scale = float(np.abs(evidence).max()) or 1.0
    small = Image.fromarray((evidence / scale).astype(np.float32))
    strength = np.clip(np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)), -1, 1)
    colour = np.where(strength[..., None] > 0, ORANGE, BLUE)
    opacity = 0.6 * np.abs(strength[..., None]) ** 1.5
    mixed = pixels[..., None] * (1 - opacity) + colour * opacity
    return np.round(np.clip(mixed, 0, 1) * 255).astype(np.uint8)
