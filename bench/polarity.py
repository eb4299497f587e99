"""How well `judge` tells polarity and orientation, and how much `equalise` hides. Also fits the judge's templates.

    python bench/polarity.py --films DIR [--limit 0] [--fit]

DIR is any folder of real, upright chest films with white bones. Printed are, for all films, and for each subfolder with
templates fitted on the others: the share that is wrongly flagged, and the share that is found once the same films are
inverted or turned. Then the mean difference, on the 8-bit scale at 224 px, that changes of tone and format leave after
`to_input`. --fit prints templates to paste into cxr_fastai/judge.py.
"""

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image

from cxr_fastai.errors import UnreadableImage
from cxr_fastai.images import judge, looks_like_film, read_film, resize, to_input


def read_all(folder: Path, limit: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Read every film: (N, 64, 64) thumbnails, the subfolder of each, and a few films in full."""
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and looks_like_film(p) and "NOTCHEST" not in p.name]
    small, source, full = [], [], []
    for k, path in enumerate(paths[:: max(1, len(paths) // limit) if limit else 1]):
        try:
            film = read_film(path)
        except UnreadableImage as error:
            print(f"not read: {path.name}: {error}")
            continue
        small.append(resize(film.pixels, judge.SMALL))
        source.append(path.relative_to(folder).parts[0])
        if k % 32 == 0 or min(film.pixels.shape) >= 1024:
            full.append(film.pixels)
    return np.stack(small), np.array(source), full


def changed(film: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Vary a thumbnail as films vary: gamma, crop, mirror, window."""
    top, bottom, left, right = rng.integers(0, 9, 4)
    film = film[top : judge.SMALL - bottom, left : judge.SMALL - right] ** np.float32(2 ** rng.uniform(-1.2, 1.2))
    low, high = np.percentile(film, [rng.uniform(0, 10), rng.uniform(90, 100)])
    film = np.clip((film - low) / (high - low + 1e-6), 0, 1)[:, :: rng.choice([-1, 1])]
    return resize(np.ascontiguousarray(film, dtype=np.float32), judge.SMALL)


def fit(films: np.ndarray) -> dict[str, np.ndarray]:
    """Fit the three templates by ridge regression, on the films and on two variations of each."""
    rng = np.random.default_rng(0)
    films = np.concatenate([films, *[[changed(film, rng) for film in films] for _ in range(2)]])
    turned = [np.array([judge.rank_grid(np.rot90(f, k)).ravel() for f in films]) for k in range(4)]
    differences = {
        "bone white": turned[0],
        "not sideways": np.concatenate([turned[0] - turned[1], turned[0] - turned[3]]),
        "not on its head": turned[0] - turned[2],
    }
    templates = {}
    for name, x in differences.items():
        weights = np.linalg.solve(x.T @ x / len(x) + np.eye(64) / 64, x.mean(axis=0))
        templates[name] = np.round(weights / np.abs(weights).max() * 99).astype(int).reshape(8, 8)
    return templates


def rates(films: np.ndarray) -> str:
    """Count what `judge` says of films as they are, inverted and turned."""

    def share(flag: str, versions: list[np.ndarray]) -> str:
        return f"{np.mean([flag in judge.doubts(np.ascontiguousarray(v)) for v in versions]):7.2%}"

    lines = [f"n = {len(films)}; wrongly flagged / found when it is so"]
    inverted = [1 - film for film in films]
    lines.append(f"  inverted?    {share('inverted?', list(films))} / {share('inverted?', inverted)}")
    sure = [np.mean([judge.looks_inverted(f, judge.SURELY_INVERTED) for f in group]) for group in (films, inverted)]
    lines.append(f"  surely       {sure[0]:7.2%} / {sure[1]:7.2%}   (a DICOM tag is overruled)")
    turned = [np.rot90(film, k) for film in films for k in (1, 3)]
    lines.append(f"  sideways?    {share('sideways?', list(films))} / {share('sideways?', turned)}")
    upside = [np.rot90(film, 2) for film in films]
    lines.append(f"  upside-down? {share('upside-down?', list(films))} / {share('upside-down?', upside)}")
    wrong = np.mean([judge.looks_inverted(f, judge.SURELY_INVERTED) for f in (*turned, *upside)])
    lines.append(f"  turned films that are taken for surely inverted: {wrong:.2%}")
    scores = [judge.likeness(judge.rank_grid(film), "bone white") for film in films]
    return "\n".join([*lines, f"  polarity score: least {min(scores):.2f}, median {np.median(scores):.2f}"])


def windowed(film: np.ndarray, low: float, high: float) -> np.ndarray:
    """Clip to two percentiles, as a display window does."""
    dark, white = np.percentile(film, (low, high))
    return np.clip((film - dark) / (white - dark), 0, 1).astype(np.float32)


def as_jpeg(film: np.ndarray, quality: int) -> np.ndarray:
    """Write as JPEG and read it again."""
    file = io.BytesIO()
    Image.fromarray(np.round(film * 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return read_film(file.getvalue()).pixels


def with_marker(film: np.ndarray) -> np.ndarray:
    """Put a white side marker into a corner."""
    film = film.copy()
    film[: film.shape[0] // 16, : film.shape[1] // 10] = 1
    return film


CHANGES = {
    "none": lambda f: f,
    "x / 16 (12 bits in 16)": lambda f: f / 16,
    "x / 2 + 0.2": lambda f: f / 2 + np.float32(0.2),
    "rounded to 8 bits": lambda f: np.round(f * 255) / 255,
    "gamma 0.6": lambda f: f ** np.float32(0.6),
    "gamma 1.6": lambda f: f ** np.float32(1.6),
    "window 1 to 99 %": lambda f: windowed(f, 1, 99),
    "window 3 to 97 %": lambda f: windowed(f, 3, 97),
    "window 0 to 95 %": lambda f: windowed(f, 0, 95),
    "window 8 to 92 %": lambda f: windowed(f, 8, 92),
    "sigmoid": lambda f: 1 / (1 + np.exp(-6 * (f - np.float32(0.5)))),
    "JPEG quality 95": lambda f: as_jpeg(f, 95),
    "JPEG quality 50": lambda f: as_jpeg(f, 50),
    "white side marker": with_marker,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=0, help="read about so many films; 0: all")
    parser.add_argument("--fit", action="store_true", help="fit templates and print them")
    options = parser.parse_args()
    films, source, full = read_all(options.films, options.limit)
    if options.fit:
        judge.TEMPLATES = fit(films)
        for name, template in judge.TEMPLATES.items():
            print(f'    "{name}": np.array(')
            print("        " + str(template.tolist()).replace("], [", "],\n         ["))
            print("    ),")
    print("All films:", rates(films))
    kept = judge.TEMPLATES
    for part in sorted(set(source)):
        if 100 < np.sum(source == part) < len(source):
            judge.TEMPLATES = fit(films[source != part])
            print(f"{part}, templates fitted on the others:", rates(films[source == part]))
    judge.TEMPLATES = kept
    print(f"Mean difference left after a change, 8-bit scale at 224 px, {len(full)} films: read → to_input")
    for name, change in CHANGES.items():
        after = [np.ascontiguousarray(change(f), dtype=np.float32) for f in full]
        plain = np.mean([np.abs(resize(a, 224) - resize(f, 224)).mean() for a, f in zip(after, full, strict=True)])
        left = np.mean([np.abs(to_input(a, 224) - to_input(f, 224)).mean() for a, f in zip(after, full, strict=True)])
        print(f"  {name:24s} {plain * 255:6.2f} → {left * 255:5.2f}")


if __name__ == "__main__":
    main()
