"""model.onnx + films -> a stream of Prediction, one a film. No torch, no fastai.

    for row in Predictor("exports/latest").predict(["a.png", "folder"]): ...

Every input gets a row: a film that cannot be read is a row with `error`, the others are done.
"""

import dataclasses
import itertools
import json
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cxr_fastai.config import usable_cores
from cxr_fastai.engine import Engine, open_engine
from cxr_fastai.errors import ModelFileError, NoSuchFrame, UnreadableImage
from cxr_fastai.images import Limits, to_input
from cxr_fastai.inputs import Input
from cxr_fastai.metrics.conformal import prediction_set
from cxr_fastai.modelfile import read_model
from cxr_fastai.outliers import FLAG as OUTLIER
from cxr_fastai.views import views_of

BATCH, AHEAD = 16, 3  # films a step; batches read ahead
ARRAYS = ("evidence", "pixels")
ORANGE, BLUE = np.array([[0.90, 0.62, 0.0], [0.0, 0.45, 0.70]], np.float32)


@dataclass(frozen=True)
class Prediction:
    """One row of output.

    probability: binary: of the positive class, the one that `threshold` is about; else that of `label`'s class
    (multi-label: the highest of all). label: multi-label joins the findings by "|", and is "" where there is none.
    threshold: binary: a number; multi-label: one a finding; multi-class: None, the highest probability wins.
    frame: the number of the frame, from 1 on, where every frame of a file was asked for; the first one has None.
    unlike: how far from the films of training, 1 at the limit; beyond it the row is flagged "unlike-training", and
    without a verdict (label, probability None) where abstaining was asked for. None for models that do not tell.
    spread: standard deviation of `probability` over models and views, where there are several.
    set: classes that hold the truth as often as asked; see `metrics.conformal.prediction_set`.
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
    unlike: float | None = None
    spread: float | None = None
    set: Any = None
    evidence: np.ndarray | None = field(default=None, repr=False, compare=False)
    pixels: np.ndarray | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain JSON types, in the order of the contract."""
        row = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ARRAYS}
        return {**row, "flags": list(self.flags)}

    def to_json(self) -> str:
        """Return the row as one line of JSON."""
        return json.dumps(self.to_dict())


class Read(NamedTuple):
    """A film as it was read: its row without a verdict, its pixels, and what each network sees of it."""

    row: Prediction
    pixels: np.ndarray | None
    inputs: dict[int, np.ndarray]


class Predictor:
    """One trained classifier, or several as one, from model.onnx files or run folders.

    Parameters
    ----------
    models
        A model.onnx or run folder; or a sequence of them, whose probabilities are averaged.
    precision
        fp32, bf16, or auto: whatever is fastest here and agrees (see `engine`). Figures are always measured in fp32.
    threads
        Of the arithmetic; None is as many as there are cores.

    Attributes
    ----------
    card : dict
        What the model says of itself: classes, task, positive, size, threshold, temperature, bias, versions. Of several
        models the first one's, with the mean of their thresholds.
    fingerprints : list of str
        SHA-256 of each model file.
    """

    def __init__(
        self,
        models: str | Path | Sequence[str | Path] = "exports/latest",
        *,
        precision: str = "fp32",
        threads: int | None = None,
    ):
        named = [models] if isinstance(models, str | Path) else list(models)
        loaded = [read_model(model) for model in named]
        self.path = loaded[0].path
        self.cards = [file.card for file in loaded]
        self.fingerprints = [file.sha256 for file in loaded]
        self.card = joint_card([file.path for file in loaded], self.cards)
        self.engines: list[Engine] = []
        for file in loaded:
            try:
                self.engines.append(open_engine(file.data, file.card, precision, threads))
            except ModelFileError as error:
                raise ModelFileError(f"{file.path}: {error}") from error

    @property
    def classes(self) -> list[str]:
        """The classes, in the order of the logits."""
        return self.card["classes"]

    @property
    def precision(self) -> str:
        """In what the networks multiply."""
        return self.engines[0].precision

    def run(self, films: np.ndarray) -> dict[str, np.ndarray]:
        """Run the (first) network on prepared films (N, size, size) float32 in [0, 1]; see `export` for the outputs."""
        return self.engines[0].run(films)

    def predict(
        self,
        films: Iterable[str | Input],
        *,
        limits: Limits | None = None,
        all_frames: bool = False,
        keep_pixels: bool = False,
        abstain: bool = False,
        tta: bool = False,
        coverage: float | None = None,
    ) -> Iterator[Prediction]:
        """Yield one Prediction a film, in order; films are read ahead while the network works, a few batches at most.

        Parameters
        ----------
        limits
            What one file may cost; None is the reader's own.
        all_frames
            Whether each frame of a file with several is a row of its own, instead of the first one with a flag.
        keep_pixels
            Whether the rows carry the film, for a picture of it.
        abstain
            Whether a film unlike those of training gets no verdict; it is flagged in any case.
        tta
            Whether to average over views of each film (see `views`).
        coverage
            How often the set of classes of each row shall hold the truth; None makes no set.
        """
        if coverage is not None and any("conformal" not in card for card in self.cards):
            raise ModelFileError(f"{self.path}: has no scores for --coverage; train again to have them")
        read = self._read(films, limits or Limits(), all_frames, keep_pixels)
        try:
            while batch := list(islice(read, BATCH)):
                yield from self._predict_batch(batch, abstain, tta, coverage)
        finally:
            read.close()

    def _read(
        self, films: Iterable[str | Input], limits: Limits, all_frames: bool, keep: bool
    ) -> Generator[Read, None, None]:
        """Yield what was read of each film or frame, in order."""
        sources = (film if isinstance(film, Input) else Input(film) for film in films)
        if all_frames:
            for source in sources:
                for frame in itertools.count():
                    read = self._read_one(source, limits, frame, keep)
                    if read is not None:
                        yield read
                    if read is None or read.row.error or "multi-frame" not in read.row.flags:
                        break
            return
        with ThreadPoolExecutor(usable_cores()) as pool:
            waiting: deque[Future[Read | None]] = deque()
            try:
                for source in sources:
                    waiting.append(pool.submit(self._read_one, source, limits, None, keep))
                    if len(waiting) >= AHEAD * BATCH:
                        yield _there(waiting.popleft())
                while waiting:
                    yield _there(waiting.popleft())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _read_one(self, source: Input, limits: Limits, frame: int | None, keep: bool) -> Read | None:
        """Read one film, or one frame of it; None for a frame beyond the last."""
        began = time.perf_counter()
        row, pixels, inputs = Prediction(source.path, frame=frame or None), None, {}
        try:
            film = source.read(limits, frame)
            row = dataclasses.replace(row, flags=film.flags)
            pixels = film.pixels if keep else None
            inputs = {size: to_input(film.pixels, size) for size in {card["size"] for card in self.cards}}
        except NoSuchFrame as error:
            if frame:
                return None
            row = dataclasses.replace(row, error=str(error))
        except UnreadableImage as error:
            row = dataclasses.replace(row, error=str(error))
        return Read(dataclasses.replace(row, seconds=time.perf_counter() - began), pixels, inputs)

    def _predict_batch(
        self, read: Sequence[Read], abstain: bool, tta: bool, coverage: float | None
    ) -> Iterator[Prediction]:
        began = time.perf_counter()
        seen = [film.inputs for film in read if film.inputs]
        said = self._ask(seen, tta) if seen else None
        share = (time.perf_counter() - began) / max(1, len(seen))
        numbers = iter(range(len(seen)))
        for film in read:
            seconds = round(film.row.seconds + (share if film.inputs else 0), 4)
            row = dataclasses.replace(film.row, seconds=seconds, pixels=film.pixels)
            if film.inputs and said is not None:
                row = self._judged(row, said, next(numbers), abstain, coverage)
            yield row

    def _ask(self, seen: Sequence[dict[int, np.ndarray]], tta: bool) -> "Said":
        """Run every network on every view of a batch."""
        probabilities, evidence, unlike = [], [], []
        for engine, card in zip(self.engines, self.cards, strict=True):
            films = np.stack([inputs[card["size"]] for inputs in seen])
            views = views_of(films, card.get("augment", 1.0) if tta else 0.0)
            for number, view in enumerate(views):
                found = engine.run(view)
                probabilities.append(found["probabilities"])
                if number == 0:
                    evidence.append(found["evidence"])
                    if "outliers" in card:
                        unlike.append(found["distance"].ravel() / card["outliers"]["limit"])
        same = len({maps.shape for maps in evidence}) == 1
        return Said(np.stack(probabilities), np.mean(evidence, axis=0) if same else evidence[0],
                    np.mean(unlike, axis=0) if unlike else None)  # fmt: skip

    def _judged(self, row: Prediction, said: "Said", i: int, abstain: bool, coverage: float | None) -> Prediction:
        """Return the row of film `i` of a batch with its verdict, or with the flag for which there is none."""
        each = said.probabilities[:, i]
        p = dict(zip(self.classes, map(float, each.mean(0)), strict=True))
        verdict: dict[str, Any] = {**decide(p, self.card), "probabilities": p, "evidence": said.evidence[i]}
        if len(each) > 1:
            shown = self.card["positive"] or max(p, key=p.__getitem__)
            verdict["spread"] = round(float(each[:, self.classes.index(shown)].std()), 6)
        if coverage is not None:
            verdict["set"] = prediction_set(p, self.card["conformal"], coverage)
        if said.unlike is not None:
            verdict["unlike"] = round(float(said.unlike[i]), 4)
            if said.unlike[i] > 1:
                verdict["flags"] = (*row.flags, OUTLIER)
                if abstain:
                    verdict |= {"label": None, "probability": None, "probabilities": {}, "evidence": None}
                    verdict |= {"spread": None, "set": None}
        return dataclasses.replace(row, **verdict)

    def evidence_shown(self, row: Prediction) -> np.ndarray:
        """Return the map (h, w) to show for a row: what speaks for its class, against the others.

        Binary: for the positive class, less what speaks for the other one (their difference makes the probability).
        Multi-class: for the class given. Multi-label: for the finding with the highest probability.
        """
        assert row.evidence is not None
        k = self.classes.index(self.card["positive"] or max(row.probabilities, key=row.probabilities.__getitem__))
        return class_map(row.evidence, k, self.card["task"])


class Said(NamedTuple):
    """What networks say of a batch: probabilities (views of all, N, K), evidence (N, K, h, w), distances (N,)."""

    probabilities: np.ndarray
    evidence: np.ndarray
    unlike: np.ndarray | None


def _there(read: "Future[Read | None]") -> Read:
    found = read.result()
    assert found is not None  # only a frame that was asked for can be missing
    return found


def joint_card(paths: Sequence[Path], cards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the card of several models as one; raise ModelFileError where they do not speak of the same classes."""
    first = cards[0]
    for path, card in zip(paths, cards, strict=True):
        for key in ("classes", "task", "positive"):
            if card.get(key) != first.get(key):
                raise ModelFileError(
                    f"{path}: its {key} are {card.get(key)}, but those of {paths[0]} are {first.get(key)}; "
                    "only models of the same classes can be averaged"
                )
    if len(cards) == 1 or first["task"] == "multiclass":
        return first
    thresholds = [card["threshold"] for card in cards]
    if first["task"] == "binary":
        return {**first, "threshold": float(np.mean(thresholds))}
    return {**first, "threshold": {name: float(np.mean([t[name] for t in thresholds])) for name in first["classes"]}}


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
