"""Where the evidence of a run lies on a folder of phantoms, by finding.

    python bench/evidence.py exports/latest data/synthetic [--limit 500]

Prints for each finding: films, pointing (the map's maximum is in or near the mask) and share (of the positive evidence
in the mask), each with its 95 % interval over patients; what they are for a map that knows nothing (reach, area), for
networks with random weights, and the best that a map of so few places can do (the mask itself, averaged to
the map's places); last, the rank correlation of true and random maps, which should be near 0. On the run's own data,
films that it learned from are left out; on other data all are taken.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from cxr_fastai.console import Console
from cxr_fastai.grading import ANY, grade, grade_map, masks_of, summarise, within_reach
from cxr_fastai.predict import Predictor
from cxr_fastai.runs import find_run, read_cells
from cxr_fastai.table import load_table


def best_possible(frame: pd.DataFrame, places: tuple[int, int]) -> pd.DataFrame:
    """Return hit and share of the mask itself as a map of `places` (h, w), for each row of evidence.csv."""
    rows = []
    for path, finding in zip(frame["path"], frame["finding"], strict=True):
        masks = masks_of(path)
        mask = np.logical_or.reduce(list(masks.values())) if finding == ANY else masks[finding]
        small = Image.fromarray(mask.astype(np.float32)).resize(places[::-1], Image.Resampling.BOX)
        rows.append(grade_map(np.asarray(small), mask, within_reach(mask, places)))
    return pd.DataFrame(rows, columns=["hit", "share"], index=frame.index)


def films_of(run: str, data: str) -> pd.DataFrame:
    """Return the films to grade: path and patient_id."""
    table, split = load_table(data), read_cells(find_run(run) / "split.csv")
    learned = set(split.loc[split["split"] != "test", "path"].map(lambda path: Path(path).resolve()))
    return table[[Path(path).resolve() not in learned for path in table["path"]]]


def told(entry: dict) -> str:
    """Return a value with its interval."""
    if entry["low"] is None:
        return "    -              " if entry["value"] is None else f"{entry['value']:5.2f}              "
    return f"{entry['value']:5.2f} ({entry['low']:4.2f} to {entry['high']:4.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("data")
    parser.add_argument("--limit", type=int, default=500, help="films at most, the first in order of their paths")
    options = parser.parse_args()
    predictor, table = Predictor(options.run), films_of(options.run, options.data).head(options.limit)
    with Console(machine=True).progress("Grading evidence", len(table)) as advance:
        frame = grade(predictor, table, advance)
    if frame.empty:
        print(f"{options.data}: no film with a mask among {len(table)}")
        return 1
    size = predictor.card["size"]
    places = predictor.run(np.zeros((1, size, size), np.float32))["evidence"].shape[2:]
    best, found = best_possible(frame, places), summarise(frame)
    print(f"{'finding':14} {'films':>5} {'pointing':>20} {'reach':>5} {'random':>6} {'best':>5}"
          f" {'share':>20} {'area':>5} {'random':>6} {'best':>5}")  # fmt: skip
    for name, rows in (*found["findings"].items(), ("overall", found["overall"])):
        own = frame["finding"] == (name if name != "overall" else ANY if ANY in found["findings"] else frame["finding"])
        random = [rows[key] if rows[key] is not None else np.nan for key in ("random_pointing", "random_share")]
        print(f"{name:14} {rows['n']:5} {told(rows['pointing'])} {rows['reach']:5.2f} {random[0]:6.2f}"
              f" {best.loc[own, 'hit'].mean():5.2f} {told(rows['share'])} {rows['area']:5.2f} {random[1]:6.2f}"
              f" {best.loc[own, 'share'].mean():5.2f}")  # fmt: skip
    print(
        f"rank correlation with random networks: {found['sanity']['rank_correlation']:.2f} (n {found['sanity']['n']})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
