"""Which films a report shows, and how: the film, its evidence beside it, what was said and what is true."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxr_fastai.errors import UnreadableImage
from cxr_fastai.images import printable, read_radiograph, resize
from cxr_fastai.predict import Prediction, Predictor, overlay
from cxr_fastai.report.plots import png_uri

SHOWN = 4  # of each kind
SIDE = 320


def choose_films(
    table: pd.DataFrame, rows: Sequence[Prediction], predictor: Predictor
) -> dict[str, list[tuple[Prediction, str]]]:
    """Return the films to show with their truth: surest errors, hardest cases (nearest to the call), surest hits."""
    read = [(row, truth) for row, truth in zip(rows, table["label"], strict=True) if row.error is None]
    sure = sorted(read, key=lambda pair: -_sureness(pair[0]))
    wrong = [pair for pair in sure if pair[0].label != pair[1]]
    right = [pair for pair in sure if pair[0].label == pair[1]]
    positive = [pair for pair in right if pair[1] == predictor.card["positive"]] or right
    shown = wrong[:SHOWN] + positive[:SHOWN]
    hard = [pair for pair in reversed(sure) if pair not in shown]
    return {"Surest errors": wrong[:SHOWN], "Hardest cases": hard[:SHOWN], "Surest hits": positive[:SHOWN]}


def _sureness(row: Prediction) -> float:
    """Return how far a film is from another call."""
    if isinstance(row.threshold, float) and row.probability is not None:
        return abs(row.probability - row.threshold)
    if isinstance(row.threshold, dict):
        return min(abs(p - row.threshold[name]) for name, p in row.probabilities.items())
    first, second, *_ = sorted(row.probabilities.values(), reverse=True)
    return first - second


def shown_film(predictor: Predictor, row: Prediction, truth: str) -> dict[str, Any]:
    """Return pictures and words of one film; one that has gone since it was tested has words only."""
    words = {
        "name": printable(Path(row.path).name),
        "said": row.label or "no finding",
        "truth": truth or "no finding",
        "probability": row.probability,
        "right": row.label == truth,
    }
    try:
        pixels = resize(read_radiograph(row.path), SIDE)
    except UnreadableImage:
        return words
    film = _png(np.round(pixels * 255).astype(np.uint8))
    return {**words, "film": film, "evidence": _png(overlay(pixels, predictor.evidence_shown(row)))}


def _png(pixels: np.ndarray) -> str:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    return png_uri(stream.getvalue())
