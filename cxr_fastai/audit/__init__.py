"""What is wrong with films, labels and their split before anyone trains on them.

In: a table (see `cxr_fastai.table`). Out: an `Audit`: counts, findings with the films concerned, what gives the label
away, and the labels that are likely wrong. `audit DATA` does all of it; `train` the cheap part, on films it has read.

    rooms: scan (every film once), duplicates, shortcuts and sights, labels, checks (findings), page (for people)
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from cxr_fastai.audit.checks import (
    LEAKS,
    Finding,
    check_copies,
    check_films,
    check_labels,
    check_patients,
    check_shortcuts,
    counts_of,
)
from cxr_fastai.audit.duplicates import find_duplicates
from cxr_fastai.audit.labels import LabelIssue, features_of, features_of_weights, label_issues
from cxr_fastai.audit.scan import SIDE, Scan, scan
from cxr_fastai.audit.shortcuts import Probe, count_probes, probe
from cxr_fastai.console import QUIET, Console
from cxr_fastai.errors import DataError

if TYPE_CHECKING:
    from cxr_fastai.data import OpenFilm
    from cxr_fastai.predict import Predictor

LABELS_KEPT = 50  # of the ranking of doubtful labels
TOO_GOOD = 0.99


@dataclass(frozen=True)
class Audit:
    """What was found in n films: counts and probes by name; findings and doubtful labels, the worst first."""

    n: int
    counts: dict[str, Any]
    findings: list[Finding]
    shortcuts: dict[str, Probe] = field(default_factory=dict)
    labels: list[LabelIssue] = field(default_factory=list)

    def to_json(self) -> str:
        """Return it as JSON; keys are a contract (DESIGN.md)."""
        return json.dumps(self.to_dict(), indent=1)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        return {
            "n": self.n,
            "counts": self.counts,
            "findings": [asdict(finding) for finding in self.findings],
            "shortcuts": {
                name: {key: value for key, value in asdict(found).items() if key != "name"}
                for name, found in self.shortcuts.items()
            },
            "labels": [asdict(issue) for issue in self.labels],
        }


def audit_table(
    table: pd.DataFrame, *, model: "Predictor | None" = None, seed: int = 0, console: Console = QUIET
) -> tuple[Audit, Scan]:
    """Audit a table in full: every film is read, shortcuts and, where a network is at hand, labels are looked into.

    Parameters
    ----------
    table
        As `load_table` gives it, split or not.
    model
        Whose features tell films apart, to find wrong labels; without it the weights that ship with the package.
    seed
        Of folds and permutations.
    """
    with console.progress("Reading films", len(table)) as advance:
        seen = scan(table, advance)
    with console.progress("Comparing films", len(table)) as advance:
        findings = _cheap(table, seen, advance)
    with console.progress("Looking for shortcuts", count_probes(seen)) as advance:
        probes = probe(seen, seed, advance)
    issues, note = _doubtful_labels(table, model, seed, console)
    findings += [*check_films(seen), *check_shortcuts(probes, table), *check_labels(issues), *note]
    return _audit(table, seen, findings, probes, issues), seen


def audit_films(
    table: pd.DataFrame, opener: "OpenFilm", *, level: str = "cheap", seed: int = 0, console: Console = QUIET
) -> Audit:
    """Audit films that `train` has read already: copies and patients across the split; with level "full", all else."""
    if level == "full":
        return audit_table(table, seed=seed, console=console)[0]
    with console.progress("Comparing films", 2 * len(table)) as advance:
        small = opener.thumbnails(table["path"], SIDE, advance)
        seen = Scan.of_thumbnails(table, small, [opener.identity(path) for path in table["path"]])
        findings = _cheap(table, seen, advance)
    return _audit(table, seen, findings)


def too_good(
    table: pd.DataFrame, auroc: float | None, seed: int = 0, console: Console = QUIET
) -> dict[str, Any] | None:
    """Look for shortcuts in test films that a model tells apart without a fault: AUROC of 0.99 or more.

    Returns
    -------
    dict or None
        {"auroc", "shortcuts": {name: {"auroc", "p", "flagged", "detail", "n"}}, "detail"}; None below 0.99.
    """
    if auroc is None or auroc < TOO_GOOD:
        return None
    with console.progress("Too good? Looking for shortcuts", len(table)) as advance:
        seen = scan(table, advance)
    probes = probe(seen, seed)
    flagged = [f"{p.name} (AUROC {p.auroc:.2f}): {p.detail}" for p in probes if p.flagged]
    if not probes:
        detail = "the test films are too few to look for shortcuts"
    elif flagged:
        detail = "the label can be told without anatomy from " + "; ".join(flagged)
    else:
        detail = "no shortcut was found in border, markers, tone, file or a 32×32 thumbnail; test on other films, too"
    console.warn(f"a test AUROC of {auroc:.3f} is too good to be believed unasked", detail)
    shortcuts = {p.name: {k: v for k, v in asdict(p).items() if k != "name"} for p in probes}
    return {"auroc": auroc, "shortcuts": shortcuts, "detail": detail}


def refuse_leaks(audit: Audit) -> None:
    """Raise DataError where the split leaks, with the first films and the remedy."""
    leaks = [finding for finding in audit.findings if finding.kind in LEAKS and finding.severity == "error"]
    if leaks:
        more = f" (and {len(leaks) - 1} more kinds of leak)" if len(leaks) > 1 else ""
        raise DataError(
            f"the split leaks: {leaks[0].detail}{more}. Remove the copies or give both films one patient id "
            "(audit.json of `cxr audit DATA --json` lists them), or train all the same with --allow-leaks"
        )


def _cheap(table: pd.DataFrame, seen: Scan, advance: Callable[[], None]) -> list[Finding]:
    return [*check_patients(table), *check_copies(table, find_duplicates(seen, advance))]


def _audit(
    table: pd.DataFrame,
    seen: Scan,
    findings: Sequence[Finding],
    probes: Sequence[Probe] = (),
    issues: Sequence[LabelIssue] = (),
) -> Audit:
    order = {"error": 0, "warning": 1, "note": 2}
    ranked = sorted(findings, key=lambda finding: order[finding.severity])
    return Audit(len(table), counts_of(table, seen), ranked, {p.name: p for p in probes}, list(issues[:LABELS_KEPT]))


def _doubtful_labels(
    table: pd.DataFrame, model: "Predictor | None", seed: int, console: Console
) -> tuple[list[LabelIssue], list[Finding]]:
    """Rank the labels by what a network sees; a note where that cannot be done."""
    from cxr_fastai.runs import SHIPPED_WEIGHTS

    if model is None and not SHIPPED_WEIGHTS.is_file():
        return [], [Finding("label-error", "note", [], "labels were not looked into: name a trained run with --model")]
    with console.progress("Looking into labels", len(table)) as advance:
        features = features_of(table, model, advance) if model else features_of_weights(table, "phantom", advance)
    try:
        return label_issues(table, features, seed), []
    except DataError as error:
        return [], [Finding("label-error", "note", [], f"labels were not looked into: {error}")]


def run_audit(
    data: str,
    *,
    model: str | None = None,
    page: Path | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    console: Console = QUIET,
) -> Audit:
    """Audit a folder or CSV file: the verb `audit`; `options` are those of `load_table`."""
    from cxr_fastai.audit.page import write_page
    from cxr_fastai.predict import Predictor
    from cxr_fastai.table import load_table

    table = load_table(data, **(options or {}))
    for note in table.attrs["notes"]:
        console.say(note)
    found, seen = audit_table(table, model=Predictor(model) if model else None, seed=seed, console=console)
    if page is not None:
        write_page(found, seen, page)
        console.say(f"Page: {page}")
    return found
