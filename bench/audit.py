"""How many planted copies `audit` finds, and how many pairs it takes for copies that are none.

    python bench/audit.py --seeds 10
    python bench/audit.py --real DATA

Writes sets of phantoms with `leak:0.1`, and compares the pairs found with those planted; films of one patient that are
told for one are counted apart, since they leak nothing. With --real, films of DATA are altered in memory (half the
size, JPEG 50, tone, gamma, crops up to 6 % a side, all together) and looked for among all. Fails below 95 % found, or
above 0.5 % false pairs.
"""

import argparse
import dataclasses
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from cxr_fastai.audit.duplicates import find_duplicates
from cxr_fastai.audit.scan import SIDE, scan
from cxr_fastai.config import GenerateConfig
from cxr_fastai.images import read_radiograph, resize
from cxr_fastai.phantom import generate
from cxr_fastai.table import load_table

FOUND, FALSE = 0.95, 0.005
ALTERED = 100  # films of each kind with --real


def planted(options: argparse.Namespace, seed: int) -> tuple[int, int, int, int]:
    """Return pairs planted, planted and found, falsely found, and found within a patient, of one set."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/set"
        generate(GenerateConfig(out=out, n=options.n, seed=seed, plant=("leak:0.1",), workers=options.workers))
        table = load_table(out)
        record = json.loads((Path(out) / "dataset.json").read_text())["planted"][0]["paths"]
        truth = {frozenset(pair) for pair in record}
        found, within = set(), set()
        for copy in find_duplicates(scan(table)):
            rows = table.iloc[[copy.first, copy.second]]
            pair = frozenset(Path(path).relative_to(out).as_posix() for path in rows["path"])
            (within if rows["patient_id"].nunique() == 1 else found).add(pair)
    return len(truth), len(found & truth), len(found - truth), len(within)


def altered(pixels: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Return a film (H, W) as somebody else may have stored it."""
    height, width = pixels.shape
    if kind == "half the size":
        return resize(pixels, min(height, width) // 2)
    if kind == "JPEG 50":
        stream = io.BytesIO()
        Image.fromarray((pixels * 255).astype(np.uint8)).save(stream, "JPEG", quality=50)
        return np.asarray(Image.open(stream), np.float32) / 255
    if kind == "tone":
        return np.clip(pixels * rng.uniform(0.8, 1.2) + rng.uniform(-0.1, 0.1), 0, 1)
    if kind == "gamma":
        return pixels ** rng.choice([0.7, 1.4])
    if kind == "crop":
        top, bottom, left, right = (rng.uniform(0, 0.06, 4) * [height, height, width, width]).astype(int)
        return np.ascontiguousarray(pixels[top : height - bottom, left : width - right])
    return altered(altered(altered(pixels, "crop", rng), "gamma", rng), "JPEG 50", rng)


def real(data: str) -> bool:
    """Print what is found in real films, and how many of their altered copies."""
    table = load_table(data)
    began = time.perf_counter()
    seen = scan(table)
    read = time.perf_counter()
    copies = find_duplicates(seen)
    print(f"{len(table)} films read in {read - began:.1f} s, compared in {time.perf_counter() - read:.1f} s")
    for copy in copies:
        a, b = table["path"][copy.first], table["path"][copy.second]
        print(f"  {copy.kind} {copy.similarity:.3f} {Path(a).name} {Path(b).name}")
    known, rng, good = {(c.first, c.second) for c in copies}, np.random.default_rng(0), True
    readable = [i for i, path in enumerate(table["path"]) if path not in seen.errors]
    for kind in ("half the size", "JPEG 50", "tone", "gamma", "crop", "all"):
        rows = rng.choice(readable, min(ALTERED, len(readable)), replace=False)
        films = [resize(altered(read_radiograph(table["path"][i]), kind, rng), SIDE) for i in rows]
        both = dataclasses.replace(
            seen,
            thumbnails=np.concatenate([seen.thumbnails, np.stack(films)]),
            sha256=[*seen.sha256, *(f"altered {i}" for i in range(len(rows)))],
        )
        pairs = {(c.first, c.second) for c in find_duplicates(both)} - known
        right = {(int(row), len(table) + i) for i, row in enumerate(rows)}
        # A copy of a film that has a copy already is a copy of both.
        false = {
            (a, b) for a, b in pairs - right if b < len(table) or rows[b - len(table)] not in np.ravel(list(known))
        }
        print(f"{kind}: {len(pairs & right)} of {len(right)} found, {len(false)} false pairs")
        good &= len(pairs & right) >= FOUND * len(right) and len(false) <= FALSE * len(right)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--real", help="look into this folder or CSV file instead")
    options = parser.parse_args()
    if options.real:
        return int(not real(options.real))
    counts = []
    for seed in range(options.seeds):
        counts.append(planted(options, seed))
        n, right, false, within = counts[-1]
        print(f"seed {seed}: {right} of {n} planted pairs found, {false} false, {within} within a patient", flush=True)
    n, right, false, _ = np.sum(counts, axis=0)
    share = false / max(1, right + false)
    good = right >= FOUND * n and share <= FALSE
    verdict = "ok" if good else "FAILS"
    print(f"found {right / n:.1%} (wanted {FOUND:.0%}), false {share:.2%} (at most {FALSE:.1%}) {verdict}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
