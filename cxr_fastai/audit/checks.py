"""From what was seen to findings: one line for people each, with the films concerned and the remedy.

A finding is an error where a number from these data would be wrong, a warning where it may mislead, else a note.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from cxr_fastai.audit.duplicates import Duplicate
from cxr_fastai.audit.labels import LabelIssue
from cxr_fastai.audit.shortcuts import Probe
from cxr_fastai.images import FLAGS, printable
from cxr_fastai.listing import SPLITS
from cxr_fastai.sources import counted

if TYPE_CHECKING:
    from cxr_fastai.audit.scan import Scan

LEAKS = frozenset({"patient-across-splits", "copy-across-splits"})
SURELY_DOUBTFUL = 0.2  # label quality below which a film is worth a look
RARE, UNEVEN = 20, 10.0  # films of a class, and how many times more the commonest class may have
NAMED = 3
# Flags of the reader that say that a film may not be what it is taken for.
DOUBTS = frozenset({"inverted?", "sideways?", "upside-down?", "no-anatomy", "half-empty", "clipped", "tiny",
                    "few-grey-levels", "body-part", "colour", "multi-frame", "aspect"})  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing found: its kind, "error", "warning" or "note", the paths concerned, and a line for people."""

    kind: str
    severity: str
    paths: list[str]
    detail: str


def counts_of(table: pd.DataFrame, scan: "Scan") -> dict[str, Any]:
    """Count films, patients, labels, splits, and what else the table and the files tell."""
    counts: dict[str, Any] = {"films": len(table), "patients": int(table["patient_id"].nunique())}
    labels = table["label"].map(lambda label: label.split("|") if label else ["(none)"]).explode()
    counts["labels"] = labels.value_counts().to_dict()
    for column in ("split", "view", "sex", "source"):
        if column in table and table[column].astype(str).ne("").any():
            counts[column] = table[column].astype(str).replace("", "unknown").value_counts().to_dict()
    files = scan.properties
    if {"width", "height"} <= set(files):
        read = files.dropna(subset=["width", "height"])
        sizes = Counter(f"{int(w)}×{int(h)}" for w, h in zip(read["width"], read["height"], strict=True))
        counts["sizes"] = dict(sizes.most_common(8))
    for column in ("format", "mode", "bitsstored"):
        if column in files and files[column].notna().any():
            counts[column] = files[column].dropna().astype(str).value_counts().to_dict()
    return counts


def check_films(scan: "Scan") -> list[Finding]:
    """Name films that cannot be read or are doubtful, and files whose name says another format."""
    found = []
    if scan.errors:
        path, reason = next(iter(scan.errors.items()))
        detail = (
            f"{counted(len(scan.errors), 'film')} cannot be read, such as {printable(path)}: {reason}; mend or remove"
        )
        found.append(Finding("unreadable", "error", sorted(scan.errors), detail))
    raised: dict[str, list[str]] = defaultdict(list)
    for path, flags in zip(scan.table["path"], scan.flags, strict=True):
        for flag in flags:
            raised[flag].append(path)
    for flag, paths in sorted(raised.items()):
        severity = "warning" if flag in DOUBTS else "note"
        reason = FLAGS.get(flag, flag)
        found.append(
            Finding(flag, severity, paths, f"{counted(len(paths), 'film')} with {flag}: {reason}{_such_as(paths)}")
        )
    return found


def check_patients(table: pd.DataFrame) -> list[Finding]:
    """Look at patients on both sides of the split, patients that are not known, and classes too small to learn."""
    found = []
    if (table["split"] != "").any():
        splits = table[table["split"] != ""].groupby("patient_id")["split"].nunique()
        torn = table[table["patient_id"].isin(splits[splits > 1].index)]
        if len(torn):
            who = ", ".join(map(printable, sorted(set(torn["patient_id"]))[:NAMED]))
            number = counted(torn["patient_id"].nunique(), "patient")
            detail = f"{number} on both sides of the split ({who}); split by patient"
            found.append(Finding("patient-across-splits", "error", torn["path"].tolist(), detail))
    known_from = str(table.attrs.get("patients_from", ""))
    if table["patient_id"].is_unique and len(table) > 1:
        detail = (
            f"every film counts as a patient of its own (patients from {known_from}); if some have "
            "several films, their split leaks and intervals are too narrow: give patient ids "
            "(column patient_id, or --patient-regex)"
        )
        found.append(Finding("patients-unknown", "warning", [], detail))
    else:
        several = int((table["patient_id"].value_counts() > 1).sum())
        detail = (
            f"{counted(several, 'patient')} with several films; a split must keep them together "
            f"(patients from {known_from})"
        )
        found.append(Finding("several-films", "note", [], detail))
    labels = table["label"].map(lambda label: label.split("|")).explode()
    sizes = labels[labels != ""].value_counts()
    for name, n in sizes[sizes < RARE].items():
        found.append(
            Finding("rare-class", "warning", [], f"only {counted(int(n), 'film')} of {name}; its figures will be vague")
        )
    if table.attrs.get("task") != "multilabel" and len(sizes) > 1 and sizes.iloc[0] > UNEVEN * sizes.iloc[-1]:
        times = sizes.iloc[0] / sizes.iloc[-1]
        detail = f"{sizes.index[0]} has {times:.0f} times the films of {sizes.index[-1]}; look at precision, too"
        found.append(Finding("uneven-classes", "note", [], detail))
    return found


def check_copies(table: pd.DataFrame, copies: Sequence[Duplicate]) -> list[Finding]:
    """Say of copies of a film whether they cross the split, patients or labels."""
    rows = table[["path", "patient_id", "label", "split"]].to_dict("records")
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for copy in copies:
        a, b = rows[copy.first], rows[copy.second]
        pair = (a["path"], b["path"])
        groups["exact-copy" if copy.kind == "exact" else "near-copy"].append(pair)
        if a["split"] != b["split"] and {a["split"], b["split"]} <= set(SPLITS):
            groups["copy-across-splits"].append(pair)
        if a["patient_id"] != b["patient_id"]:
            groups["copy-across-patients"].append(pair)
        # Films of one patient, minutes apart, may be much alike and yet show something new.
        if a["label"] != b["label"] and (copy.kind == "exact" or a["patient_id"] != b["patient_id"]):
            groups["copy-with-another-label"].append(pair)
    said = {
        "copy-across-splits": ("error", "on both sides of the split"),
        "copy-across-patients": ("warning", "under two patient ids, which a split by patient does not keep together"),
        "copy-with-another-label": ("warning", "with different labels; correct one of the two"),
        "exact-copy": ("note", "that are the same file twice"),
        "near-copy": ("note", "that are one exposure, resized, cropped or of another tone"),
    }
    return [
        Finding(kind, severity, [path for pair in groups[kind] for path in pair],
                f"{counted(len(groups[kind]), 'pair')} of films {what}, such as {_pair(groups[kind][0])}")
        for kind, (severity, what) in said.items()
        if groups[kind]
    ]  # fmt: skip


def check_shortcuts(probes: Sequence[Probe], table: pd.DataFrame) -> list[Finding]:
    """Turn what gives the label away into warnings."""
    found = [
        Finding("shortcut", "warning", [], f"the label can be told from {p.name} without anatomy: AUROC {p.auroc:.2f}, "
                f"p {p.p:.3f}: {p.detail}")
        for p in probes
        if p.flagged
    ]  # fmt: skip
    if not probes:
        found.append(Finding("shortcut", "note", [], f"{len(table)} films are too few to look for shortcuts"))
    return found


def check_labels(issues: Sequence[LabelIssue]) -> list[Finding]:
    """Name the films whose label a network that never saw it strongly doubts."""
    doubtful = [issue for issue in issues if issue.quality < SURELY_DOUBTFUL and issue.suggested != issue.label]
    if not doubtful:
        return []
    first = doubtful[0]
    detail = (
        f"{counted(len(doubtful), 'label')} may be wrong; look at them, worst first: {printable(first.path)} is "
        f"labelled {first.label or 'no finding'} and looks like {first.suggested or 'no finding'}"
    )
    return [Finding("label-error", "warning", [issue.path for issue in doubtful], detail)]


def _such_as(paths: Sequence[str]) -> str:
    return f"; such as {', '.join(map(printable, paths[:NAMED]))}"


def _pair(pair: tuple[str, str]) -> str:
    return " and ".join(map(printable, pair))
