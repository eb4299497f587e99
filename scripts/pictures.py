"""Make the README's pictures from a generated dataset and a finished run.

    python cli.py generate && python cli.py train && python scripts/pictures.py

Writes docs/phantoms.png (films) and docs/evidence.png (film, evidence with the outline of the truth).
"""

from pathlib import Path

import numpy as np
import pandas as pd
import typer
from PIL import Image, ImageFilter

from cxr_fastai.images import read_radiograph
from cxr_fastai.predict import Predictor, overlay

GAP = 4
COLUMNS = 6


def grid(films: list[np.ndarray], columns: int) -> Image.Image:
    """Lay films (H, W[, 3]) uint8 out row by row on white."""
    height, width = films[0].shape[:2]
    rows = -(-len(films) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for i, film in enumerate(films):
        sheet.paste(Image.fromarray(film).convert("RGB"), (i % columns * (width + GAP), i // columns * (height + GAP)))
    return sheet


def grey(path: Path) -> np.ndarray:
    """Read a film as (H, W) uint8."""
    return np.round(read_radiograph(path) * 255).astype(np.uint8)


def outlined(film: np.ndarray, masks: list[Path]) -> np.ndarray:
    """Draw the white outline of each mask over a film (H, W, 3) uint8."""
    picture = film.copy()
    for path in masks:
        mask = Image.open(path)
        edge = np.asarray(mask.filter(ImageFilter.MaxFilter(3))) > np.asarray(mask)
        picture[edge] = 255
    return picture


def main(data: Path = Path("data/synthetic"), run: str = "exports/latest", docs: Path = Path("docs")) -> None:
    table = pd.read_csv(data / "labels.csv", keep_default_na=False)
    normal = table[table["label"] == "normal"].head(COLUMNS)
    chosen = table[table["findings"] != ""].drop_duplicates("findings")
    chosen = chosen[~chosen["findings"].isin(["No Finding"])].head(COLUMNS)
    docs.mkdir(exist_ok=True)
    grid([grey(data / p) for p in (*normal["path"], *chosen["path"])], COLUMNS).save(
        docs / "phantoms.png", optimize=True
    )

    predictor = Predictor(run)
    test = pd.read_csv(f"{run}/predictions.csv", keep_default_na=False)
    found = test[(test["label"] == predictor.card["positive"]) & (test["label"] == test["predicted"])]
    best = found.sort_values("probability", ascending=False)["path"].head(3)
    pictures = []
    for row in predictor.predict(best):
        film = read_radiograph(row.path)
        masks = sorted((data / "masks").glob(f"{Path(row.path).stem}__*.png"))
        pictures += [grey(Path(row.path)), outlined(overlay(film, predictor.evidence_shown(row)), masks)]
    grid([np.dstack([p] * 3) if p.ndim == 2 else p for p in pictures], COLUMNS).save(
        docs / "evidence.png", optimize=True
    )
    print(f"{docs}/phantoms.png {docs}/evidence.png")


if __name__ == "__main__":
    typer.run(main)
