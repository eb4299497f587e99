"""model.onnx + films -> a stream of Prediction, one a film. No torch, no fastai.

    for row in Predictor("exports/latest").predict(["a.png", "folder"]): ...

Every input gets a row: a film that cannot be read is a row with `error`, the others are done.
"""

import dataclasses
import glob
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cxr_fastai.errors import ModelFileError, UnreadableImage, UsageError
from cxr_fastai.images import films_below, read_film, to_input
from cxr_fastai.runs import find_model

BATCH = 16
ORANGE, BLUE = np.array([[0.90, 0.62, 0.0], [0.0, 0.45, 0.70]], np.float32)


@dataclass(frozen=True)
class Prediction:
    """One row of output.

    probability: binary: of the positive class, the one that `threshold` is about; else that of `label`'s class
    (multi-label: the highest of all). label: multi-label joins the findings by "|", and is "" where there is none.
    threshold: binary: a number; multi-label: one a finding; multi-class: None, the highest probability wins.
    evidence: (K, h, w) contributions to the logits, not part of the JSON.
    """

    path: str
    label: str | None = None
    probability: float | None = None
    probabilities: dict[str, float] = field(default_factory=dict)
    threshold: float | dict[str, float] | None = None
    flags: tuple[str, ...] = ()
    error: str | None = None
    seconds: float = 0.0
    evidence: np.ndarray | None = field(default=None, repr=False, compare=False)

    def without_evidence(self) -> "Prediction":
        """Return the row without its map, so that many rows can be kept."""
        return dataclasses.replace(self, evidence=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain JSON types, in the order of the contract."""
        row = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "evidence"}
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

    def predict(self, paths: Iterable[str]) -> Iterator[Prediction]:
        """Yield one Prediction a path, in order; nothing is read before it is needed."""
        stream = iter(paths)
        while batch := list(islice(stream, BATCH)):
            yield from self._predict_batch(batch)

    def _predict_batch(self, paths: Sequence[str]) -> list[Prediction]:
        began = time.perf_counter()
        films: list[np.ndarray] = []
        rows: list[Prediction] = []
        for path in paths:
            try:
                film = read_film(path)
            except UnreadableImage as error:
                rows.append(Prediction(path, error=str(error)))
                continue
            films.append(to_input(film.pixels, self.card["size"]))
            rows.append(Prediction(path, flags=film.flags))
        outputs = self.run(np.stack(films)) if films else {}
        seconds = (time.perf_counter() - began) / len(paths)
        done = iter(range(len(films)))
        return [
            dataclasses.replace(
                row, seconds=round(seconds, 4), **({} if row.error else self._verdict(outputs, next(done)))
            )
            for row in rows
        ]

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
        if self.card["task"] == "multilabel":
            return row.evidence[k]
        others = [c for c in range(len(self.classes)) if c != k]
        return row.evidence[k] - row.evidence[others].mean(0)


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


def find_films(inputs: Sequence[str]) -> list[str]:
    """Return the films meant by files, folders (searched to the bottom) and globs, in order, each once.

    Raises
    ------
    UsageError
        Where an input does not exist, or holds no film.
    """
    found: dict[str, None] = {}
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            films = list(map(str, films_below(path)))
        elif path.exists():
            films = [given]
        else:
            films = sorted(glob.glob(given, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
        if not films:
            what = "no film in that folder" if path.is_dir() else "no such file or folder"
            raise UsageError(f"{given}: {what}; give image files, folders or globs")
        found.update(dict.fromkeys(films))
    return list(found)


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
