"""How often `predict` abstains on what is no chest film, and how often on new films of the kind it was trained on.

    python bench/outliers.py --run exports/latest [--photos FOLDER] [--legs FILE ...]
    python bench/outliers.py --run exports/kermany --photos FOLDER --legs A.dcm B.dcm
    python bench/outliers.py --run exports/latest --coverage-films 600 [--splits 20]

Films unlike any: photographs (those of scikit-learn and, where installed, scikit-image, or of --photos; whole, in grey,
and random parts of them), noise of all sizes, blanks, pages of text, and the legs named. A film counts as told where
`predict` gives it no verdict: by the distance of its features (column "distance"), or with the reader's refusal and
flags of pictures that are no body ("told"). Films of the run's test split, and with --fresh so many new phantoms, must
get one. Fails below 95 % told, or above 5 % of the run's own kind flagged.

--coverage-films: how often sets at 0.9 hold the truth over random splits by patient of so many new phantoms into
validation and test, with the network as it is. Fails outside 0.88 to 0.92.
"""

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cxr_fastai.config import GenerateConfig
from cxr_fastai.metrics import conformal_scores, prediction_set
from cxr_fastai.phantom import generate
from cxr_fastai.predict import Predictor
from cxr_fastai.runs import find_run, read_cells
from cxr_fastai.table import load_table

TOLD, FALSE = 0.95, 0.05
PARTS, COVERAGE, SLACK = 5, 0.9, 0.02
REFUSING = {"no-anatomy", "half-empty", "clipped", "few-grey-levels", "colour"}
# Of scikit-image's pictures those that a camera or a microscope took.
PHOTOS = (
    *("astronaut", "brick", "camera", "cell", "chelsea", "coffee", "coins", "grass", "gravel", "horse"),
    *("hubble_deep_field", "ihc", "microaneurysms", "moon", "motorcycle_left", "retina", "rocket"),
)


def photographs(folder: str | None, rng: np.random.Generator) -> Iterator[Image.Image]:
    """Yield grey photographs, whole and in parts."""
    from sklearn.datasets import load_sample_images

    whole = [Image.fromarray(picture) for picture in load_sample_images().images]
    spec = importlib.util.find_spec("skimage")
    if folder:
        whole += [Image.open(path) for path in sorted(Path(folder).iterdir())]
    elif spec and spec.origin:
        data = Path(spec.origin).parent / "data"
        whole += [Image.open(path) for name in PHOTOS for path in data.glob(f"{name}.*")]
    for picture in whole:
        grey = picture.convert("L")
        yield grey
        for _ in range(PARTS):
            side = int(rng.uniform(0.4, 0.9) * min(grey.size))
            left, top = rng.integers(grey.width - side + 1), rng.integers(grey.height - side + 1)
            yield grey.crop((left, top, left + side, top + side))


def noises(rng: np.random.Generator) -> Iterator[Image.Image]:
    for side in (4, 8, 16, 32, 64, 224):
        for _ in range(8):
            picture = Image.fromarray((rng.random((side, side)) * 255).astype(np.uint8))
            yield picture.resize((224, 224), Image.Resampling.BICUBIC)


def blanks(rng: np.random.Generator) -> Iterator[Image.Image]:
    for level in (10, 60, 128, 200, 245):
        for spread in (0, 1, 3, 8):
            film = np.full((256, 256), level) + rng.normal(0, spread, (256, 256))
            yield Image.fromarray(film.clip(0, 255).astype(np.uint8))


def pages(rng: np.random.Generator) -> Iterator[Image.Image]:
    for _ in range(30):
        page = Image.new("L", (600, 800), int(rng.integers(220, 256)))
        draw = ImageDraw.Draw(page)
        for y in range(30, 760, int(rng.integers(14, 30))):
            words = ("".join(rng.choice(list("abcdefghilmnoprstu"), rng.integers(2, 9))) for _ in range(12))
            draw.text((30, y), " ".join(words), fill=int(rng.integers(0, 60)))
        yield page


def saved(pictures: Iterator[Image.Image], folder: Path) -> list[str]:
    folder.mkdir()
    paths = []
    for number, picture in enumerate(pictures):
        paths.append(str(folder / f"{number:04d}.png"))
        picture.save(paths[-1])
    return paths


def flagged(predictor: Predictor, paths: Sequence[str]) -> tuple[int, int, int]:
    """Return films, those flagged by the distance, and those told in any way."""
    rows = list(predictor.predict(paths))
    far = [row.error is None and row.unlike is not None and row.unlike > 1 for row in rows]
    told = [a or row.error is not None or not REFUSING.isdisjoint(row.flags) for a, row in zip(far, rows, strict=True)]
    return len(rows), sum(far), sum(told)


def outliers(options: argparse.Namespace) -> bool:
    predictor, rng = Predictor(options.run), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sets = {
            "photographs": saved(photographs(options.photos, rng), folder / "photographs"),
            "noise": saved(noises(rng), folder / "noise"),
            "blank": saved(blanks(rng), folder / "blank"),
            "text": saved(pages(rng), folder / "text"),
            "legs": options.legs,
        }
        counts = {kind: flagged(predictor, paths) for kind, paths in sets.items() if paths}
        split = read_cells(find_run(options.run) / "split.csv")
        own = {"test films": split.loc[split["split"] == "test", "path"].tolist()}
        if options.fresh:
            generate(GenerateConfig(out=f"{name}/fresh", n=options.fresh, seed=4242))
            own["new phantoms"] = sorted(map(str, Path(f"{name}/fresh/images").rglob("*.png")))
        held = {kind: flagged(predictor, paths) for kind, paths in own.items()}
    for kind, (n, far, told) in (counts | held).items():
        print(f"{kind:14} {n:4} films, beyond the limit {far / n:6.1%}, told {told / n:6.1%}")
    whole = np.sum(list(counts.values()), axis=0)
    print(f"all unlike: {whole[0]} films, beyond the limit {whole[1] / whole[0]:.1%}, told {whole[2] / whole[0]:.1%}")
    return all(told >= TOLD * n for n, _, told in counts.values()) and all(
        far <= FALSE * n for n, far, _ in held.values()
    )


def coverage(options: argparse.Namespace) -> bool:
    predictor, rng = Predictor(options.run), np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as name:
        generate(GenerateConfig(out=f"{name}/set", n=options.coverage_films, seed=4343, difficulty=options.difficulty))
        table = load_table(f"{name}/set")
        rows = list(predictor.predict(table["path"]))
    p = np.array([[row.probabilities[c] for c in predictor.classes] for row in rows])
    y = np.array([predictor.classes.index(label) for label in table["label"]])
    patients, found, sizes = table["patient_id"].to_numpy(), [], []
    for _ in range(options.splits):
        chosen = rng.permutation(np.unique(patients))
        valid = np.isin(patients, chosen[: len(chosen) // 3])
        scores = conformal_scores(y[valid], p[valid], multilabel=False)
        sets = [prediction_set(dict(zip(predictor.classes, q, strict=True)), scores, COVERAGE) for q in p[~valid]]
        found.append(np.mean([predictor.classes[k] in held for k, held in zip(y[~valid], sets, strict=True)]))
        sizes.append(np.mean([len(held) for held in sets]))
    print(f"sets at {COVERAGE}: hold the truth of {np.mean(found):.3f} of the films over {options.splits} splits "
          f"(from {min(found):.3f} to {max(found):.3f}), {np.mean(sizes):.2f} classes each")  # fmt: skip
    return abs(float(np.mean(found)) - COVERAGE) <= SLACK


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="exports/latest")
    parser.add_argument("--photos", help="folder of photographs, instead of scikit-image's")
    parser.add_argument("--legs", nargs="*", default=[], help="films of other parts of the body")
    parser.add_argument("--fresh", type=int, default=0, help="new phantoms that must not be flagged")
    parser.add_argument("--coverage-films", type=int, default=0)
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--difficulty", default="medium")
    options = parser.parse_args()
    good = coverage(options) if options.coverage_films else outliers(options)
    print("ok" if good else "FAILS")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
