"""Finished cells of `transfer.py` -> figures with intervals, a table in markdown, a plot, JSON.

Every interval is over patients, by a bootstrap in which a patient counts equally often for every seed and every start,
so that differences are paired; and over seeds, by how much they differ (a single one tells nothing of that).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxr_fastai.metrics import auroc, logit_interval, resample_weights
from cxr_fastai.phantom import FINDINGS
from cxr_fastai.report.plots import BLUE, GREEN, ORANGE
from cxr_fastai.runs import atomic_path, write_text

AGES = {"under 18": (0, 18), "18 to 39": (18, 40), "40 to 59": (40, 60), "60 and over": (60, 200)}
COLOURS = {"phantom": BLUE, "random": ORANGE, "imagenet": GREEN}
MARKS = {"phantom": "o", "random": "s", "imagenet": "^"}
NAMES = {"phantom": "phantom weights", "random": "random weights", "imagenet": "ImageNet weights"}

Tests = dict[tuple[str, int], pd.DataFrame]
Sample = tuple[np.ndarray, np.ndarray, np.ndarray]  # labels, scores, patients of one seed


def truth_of(table: pd.DataFrame) -> np.ndarray:
    """Return 1 for abnormal films and 0 for normal ones, (n,)."""
    return (table["label"] == "abnormal").to_numpy().astype(float)


def resampled(samples: Sequence[Sample], boot: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the AUROC of each seed, the mean of seeds in resamples of patients, and on how many patients it rests.

    Parameters
    ----------
    samples
        One a seed: labels (n,) of 0 and 1, scores (n,), patients (n,). The seeds' films may differ.
    boot
        Resamples. The same are drawn for the same patients.

    Returns
    -------
    each : (S,) float64
    drawn : (boot,) float64, NaN where a resample lacks a class
    patients : int
        Of the rarer class.
    """
    ids = np.unique(np.concatenate([patients for _, _, patients in samples]).astype(str))
    weights = np.concatenate(list(resample_weights(ids, boot)))
    drawn = np.mean([auroc(y, p, weights[:, np.searchsorted(ids, who.astype(str))]) for y, p, who in samples], axis=0)
    of_class = [{str(who) for y, _, names in samples for who in names[y == label]} for label in (0, 1)]
    return np.array([float(auroc(y, p)) for y, p, _ in samples]), drawn, min(map(len, of_class))


def reach(each: np.ndarray, drawn: np.ndarray, patients: int) -> float:
    """Return half of the 95 % interval of a mean over seeds, by Student's t.

    The variance over patients is the bootstrap's, that over seeds the squared standard error of the mean of seeds; the
    degrees of freedom of their sum are Satterthwaite's. What seeds differ by since each has other test films counts in
    both: the interval is rather too wide than too narrow. NaN where it rests on one patient.
    """
    from scipy.stats import t

    seeds = len(each)
    if patients < 2:
        return float("nan")
    over_seeds = each.var(ddof=1) / seeds if seeds > 1 else 0.0
    over = np.array([np.nanvar(drawn, ddof=1) * patients / (patients - 1), over_seeds])
    if not over.any():
        return 0.0
    freedom = over.sum() ** 2 / (over**2 / [patients - 1, max(1, seeds - 1)]).sum()
    return float(t.ppf(0.975, freedom) * np.sqrt(over.sum()))


def area(samples: Sequence[Sample], boot: int) -> dict[str, Any]:
    """Return the AUROC of one or several seeds: {"value", "low", "high", "n" (films a seed), "seeds"}."""
    each, drawn, patients = resampled(samples, boot)
    value = float(each.mean())
    low, high = logit_interval(value, reach(each, drawn, patients), patients)
    films = round(float(np.mean([len(y) for y, _, _ in samples])))
    return {"value": value, "low": low, "high": high, "n": films, "seeds": len(samples)}


def gain(ours: Sequence[Sample], theirs: Sequence[Sample], boot: int) -> dict[str, float]:
    """Return the difference of two AUROC on the same films and seeds: {"value", "low", "high"}, 95 % by Student's t."""
    (a, drawn_a, patients), (b, drawn_b, _) = (resampled(samples, boot) for samples in (ours, theirs))
    value, half = float((a - b).mean()), reach(a - b, drawn_a - drawn_b, patients)
    return {"value": value, "low": value - half, "high": value + half}


# ---- figures ----


def any_finding(logits: np.ndarray) -> np.ndarray:
    """Return the noisy-or of findings (n, K), the probability of any were they independent, as a logit (n,).

    As a logit it keeps the order among films that are nearly certain.
    """
    none = -np.logaddexp(0, logits.astype(float)).sum(1)  # log of the product of 1 - p
    return np.log(-np.expm1(none)) - none


def zero_shot(logits: np.ndarray, table: pd.DataFrame, boot: int) -> dict[str, Any]:
    """Return the figures of the shipped head: the fixed score, by view and age, and what was only looked at."""
    y, ids = truth_of(table), table["patient_id"].to_numpy()
    fixed = any_finding(logits)
    scores = {"largest logit": logits.max(1), **dict(zip(FINDINGS, logits.T, strict=True))}
    parts = {f"view {view}": (table["view"] == view).to_numpy() for view in sorted(set(table["view"]) - {""})}
    age = pd.to_numeric(table["age"], errors="coerce").to_numpy()
    parts |= {f"age {name}": (age >= low) & (age < high) for name, (low, high) in AGES.items()}
    groups = {name: area([(y[own], fixed[own], ids[own])], boot)
              for name, own in parts.items() if len(set(y[own])) == 2}  # fmt: skip
    return {
        "fixed": area([(y, fixed, ids)], boot),
        "groups": groups,
        "looked at": {name: area([(y, score, ids)], boot) for name, score in scores.items()},
    }


def learned(records: list[dict[str, Any]], tests: Tests, boot: int) -> list[dict[str, Any]]:
    """Return one row a kind, hospital, number of films and epochs: AUROC of each start, gains over random."""
    samples: dict[tuple[str, str, int, int], dict[str, list[Sample]]] = {}
    for record in sorted(records, key=lambda r: r["seed"]):
        if record["kind"] == "zero":
            continue
        test = tests[record["hospital"], record["seed"]]
        own = (truth_of(test), np.array(record["scores"]), test["patient_id"].to_numpy())
        key = (record["kind"], record["hospital"], record["shots"], record["epochs"])
        samples.setdefault(key, {}).setdefault(record["start"], []).append(own)
    rows = []
    for (kind, hospital, shots, epochs), starts in sorted(samples.items()):
        base = starts.get("random", [])
        rows.append({
            "kind": kind, "hospital": hospital, "films": shots, "epochs": epochs,
            "auroc": {start: area(own, boot) for start, own in starts.items()},
            "over random": {start: gain(own, base, boot) for start, own in starts.items()
                            if start != "random" and len(base) == len(own)},
        })  # fmt: skip
    return rows


# ---- markdown ----


def told(entry: dict[str, Any] | None, sign: bool = False) -> str:
    """Return a value with its interval, for a table."""
    if not entry:
        return "–"
    value, low, high = (f"{entry[key]:+.3f}" if sign else f"{entry[key]:.3f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def grid(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return the lines of a markdown table."""
    return ["", *(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)), ""]


def starts_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the starts that occur, in the order in which they are told."""
    return [start for start in NAMES if any(start in row["auroc"] for row in rows)]


def table_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of what was learned from few films: a row a hospital and number of films."""
    starts = starts_of(rows)
    others = [start for start in starts if start != "random"] if "random" in starts else []
    head = ["hospital", "real films", *(NAMES[s] for s in starts), *(f"{s} − random" for s in others)]
    return grid(head, [
        [row["hospital"], row["films"], *(told(row["auroc"].get(s)) for s in starts),
         *(told(row["over random"].get(s), sign=True) for s in others)]
        for row in rows
    ])  # fmt: skip


def number_of_seeds(rows: Sequence[dict[str, Any]]) -> int:
    """Return over how many seeds, at most, the figures of rows are means."""
    return max((entry["seeds"] for row in rows for entry in row["auroc"].values()), default=0)


def page(found: dict[str, Any]) -> str:
    """Return transfer.md."""
    setting = found["setting"]
    return "\n".join([
        "# From phantoms to real films", "",
        "Written by `python bench/transfer.py --real DIR`. AUROC of abnormal against normal films, with 95 % intervals",
        f"over patients and seeds; films at {setting['size']} pixels; weights {setting['weights']} (SHA-256).", "",
        "![AUROC by number of real films](transfer.png)", "",
        *about_zero_shot(found["zero-shot"]),
        *about_learned(found["learned"], setting),
        "Labels of such collections leak through view, age and scanner: a logistic regression on thumbnails does well",
        "on them. These tables compare starts on the same films; no figure says how a model does elsewhere.",
        *(["", *(f"- {note}" for note in found["notes"])] if found["notes"] else []), "",
    ])  # fmt: skip


def about_zero_shot(zero: dict[str, Any]) -> list[str]:
    """Return what the page says of the shipped findings head."""
    if not zero:
        return []
    looked = next(iter(zero.values()))["looked at"]
    groups = [(name, group, entry) for name, own in zero.items() for group, entry in own["groups"].items()]
    return [
        "## Zero-shot", "",
        "The findings head that ships with the weights; it has learned from no real film. The score was fixed before",
        "the first look at a real film: the noisy-or of the eight findings. The phantoms and the pretraining were not:",
        "from generator 1.1 on they were mended where the model was wrong on these very films, and of three sets of",
        "weights the one was shipped that does best on Kermany's (docs/phantom-log.md). So these are films of",
        "development, and the figures may be too high for a hospital that nobody has looked at.",
        *grid(["hospital", "films", "any finding"],
              [[name, own["fixed"]["n"], told(own["fixed"])] for name, own in zero.items()]),
        "The same score within groups:",
        *grid(["hospital", "group", "films", "any finding"], [[*head, e["n"], told(e)] for *head, e in groups]),
        "Only looked at: each score against abnormal films of any kind. The best of so many is best by chance, too.",
        *grid(["score", *zero], [[name, *(told(own["looked at"][name]) for own in zero.values())] for name in looked]),
    ]  # fmt: skip


def about_learned(rows: Sequence[dict[str, Any]], setting: dict[str, Any]) -> list[str]:
    """Return what the page says of fits and probes."""
    epochs = setting["epochs"]
    fits, trained, probes = ([row for row in rows if row["kind"] == kind] for kind in ("fit", "train", "probe"))
    longer = [(row, row["auroc"]["random"]) for row in fits if row["epochs"] != epochs]
    told_longer = [
        "Random weights for longer, to see whether they are starved:",
        *grid(["hospital", "real films", "epochs", "seeds", "random weights"],
              [[row["hospital"], row["films"], row["epochs"], e["seeds"], told(e)] for row, e in longer]),
    ] if longer else []  # fmt: skip
    return [
        "## Fine-tuned with few real films", "",
        f"`fitting.fit` with the product's recipe of each start, {epochs} epochs of {setting['films an epoch']} films:",
        "fewer come several times, so that all cells have as many steps. A fifth of the films chooses the epoch.",
        "Tested on held-out patients, on the same films for every start; differences are paired.",
        f"{number_of_seeds(fits)} seeds.",
        *table_of([row for row in fits if row["epochs"] == epochs]),
        *told_longer,
        "### As `python cli.py train` does by default", "",
        "Each film once an epoch and the default number of epochs, so that few films are few steps.",
        f"{number_of_seeds(trained)} seeds.",
        *table_of(trained),
        "## Linear probe on frozen features", "",
        "A logistic regression on the features of the body, its C chosen by cross-validation by patient within the",
        "films. Random weights have the statistics of their batch normalisation set on films, without labels.",
        f"{number_of_seeds(probes)} seeds.",
        *table_of(probes),
    ]  # fmt: skip


# ---- plot ----


def draw(found: dict[str, Any], path: Path) -> None:
    """Plot AUROC against the number of real films, a panel a hospital, a line a start."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    names = sorted({row["hospital"] for row in found["learned"]} | set(found["zero-shot"]))
    figure = Figure(figsize=(6.0 * len(names), 4.8), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        rows = [row for row in found["learned"] if row["hospital"] == name]
        for start in starts_of(rows):
            line(panel, rows, start, "fit", found["setting"]["epochs"])
            line(panel, rows, start, "probe", 0)
        if name in found["zero-shot"]:
            zero = found["zero-shot"][name]["fixed"]
            panel.axhline(zero["value"], color="black", linestyle="--", linewidth=1.3, label="zero-shot, no real film")
            panel.axhspan(zero["low"], zero["high"], color="black", alpha=0.06, linewidth=0)
        shots = sorted({row["films"] for row in rows})
        panel.set_xscale("log")
        panel.set_xticks(shots, [str(n) for n in shots])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set(title=name, xlabel="real films learned from")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("AUROC on held-out patients")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def line(panel: Any, rows: Sequence[dict[str, Any]], start: str, kind: str, epochs: int) -> None:
    """Draw the line of a start: a fit solid with its band, a probe dotted."""
    own = [(row["films"], row["auroc"][start]) for row in rows
           if row["kind"] == kind and row["epochs"] == epochs and start in row["auroc"]]  # fmt: skip
    if not own:
        return
    films = [n for n, _ in own]
    low, value, high = ([entry[key] for _, entry in own] for key in ("low", "value", "high"))
    what = f"{NAMES[start]}, {'fine-tuned' if kind == 'fit' else 'linear probe'}"
    panel.plot(films, value, color=COLOURS[start], marker=MARKS[start], linestyle="-" if kind == "fit" else ":",
               markerfacecolor=COLOURS[start] if kind == "fit" else "white", label=what)  # fmt: skip
    if kind == "fit":
        panel.fill_between(films, low, high, color=COLOURS[start], alpha=0.15, linewidth=0)


def write(
    out: Path,
    records: list[dict[str, Any]],
    tables: dict[str, pd.DataFrame],
    tests: Tests,
    setting: dict[str, Any],
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Write transfer.md, transfer.png and transfer.json into a folder; return what the last one holds.

    Parameters
    ----------
    records
        As `transfer.run_job` makes them.
    tables
        All films of each hospital.
    tests
        The test films of each hospital and seed.
    setting
        What all cells have in common, with `epochs` of the usual fit and `boot`.
    notes
        What was left out, and why.
    """
    boot = setting["boot"]
    found = {
        "setting": setting,
        "notes": list(notes),
        "zero-shot": {r["hospital"]: zero_shot(np.array(r["scores"]), tables[r["hospital"]], boot)
                      for r in records if r["kind"] == "zero"},
        "learned": learned(records, tests, boot),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "transfer.json", json.dumps(found, indent=1) + "\n")
    write_text(out / "transfer.md", page(found))
    draw(found, out / "transfer.png")
    print(page(found))
    print(f"wrote transfer.md, transfer.png and transfer.json in {out}")
    return found
