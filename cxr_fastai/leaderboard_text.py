"""What `leaderboard` found, in words and tables for people: a line a run where no terminal is.

Every row is a column's name -> text above and text below it, so that a table of nine columns fits a terminal.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cxr_fastai.console import QUIET, Console
from cxr_fastai.images import printable
from cxr_fastai.report import METRIC_NAMES, shown_metrics
from cxr_fastai.verify import brief

ADVICE = (
    "A run that is chosen by its test figures looks better than it is: tell its figures from films that chose nothing "
    "(python cli.py evaluate RUN DATA)."
)


def meaning(difference: Mapping[str, float | None] | None) -> str:
    """Say whether a difference is more than chance."""
    if difference is None or difference["low"] is None or difference["high"] is None:
        return "cannot be told"
    if difference["low"] == difference["value"] == difference["high"] == 0:
        return "equal here"  # no resample tells them apart, as where both are perfect; that proves nothing of others
    return "may be chance" if difference["low"] <= 0 <= difference["high"] else "beyond chance"


def verdict(group: Mapping[str, Any], sort: str) -> str:
    """Say in words which run of a group is best, and which of the others are surely not as good."""
    best, *others = group["runs"]
    line = f"{best['run']} is best by {METRIC_NAMES[sort]}."
    for kind, told in (
        ("may be chance", "may be chance (its interval contains 0)"),
        ("beyond chance", "is beyond chance (its interval is all on one side of 0)"),
        ("cannot be told", "cannot be told from these films"),
    ):
        if names := [entry["run"] for entry in others if meaning(entry["difference"]) == kind]:
            line += f" Its lead over {', '.join(names)} {told}."
    if names := [entry["run"] for entry in others if meaning(entry["difference"]) == "equal here"]:
        line += f" On these films {', '.join(names)} reached the same: too easy, or too few, to tell them apart."
    return line


def show_ranking(found: Mapping[str, Any], folder: str | Path, console: Console = QUIET) -> None:
    """Print the groups, what their differences mean, and on the last line the runs that are in none of them."""
    sort = found["sort"]
    for number, group in enumerate(found["groups"], 1):
        test, runs = group["test"], group["runs"]
        shared = [key for key in runs[0]["facts"] if len({entry["facts"][key] for entry in runs}) == 1]
        title = f"{test['n']} test films of {test['n_patients']} patients"
        title = f"Test set {number}: {title}" if len(found["groups"]) > 1 else title
        title = ", ".join([title, *(f"{key} {printable(runs[0]['facts'][key])}" for key in shared)])
        rows = [_shown(entry, sort, shared, first=entry is runs[0]) for entry in runs]
        _print_rows(title, rows, console)
        console.say(verdict(group, sort) if len(runs) > 1 else "One run: nothing to compare it with.")
        console.say("")
    if len(found["groups"]) > 1:
        console.say("Figures of different test sets are not comparable.")
    if any(len(group["runs"]) > 1 for group in found["groups"]):
        console.say(ADVICE)
    if not found["groups"]:
        console.say(f"No finished run in {folder}; train one with: python cli.py train")
    if left := [f"{entry['run']} ({entry['reason']})" for entry in found["unfinished"]]:
        console.say(f"Not listed: {'; '.join(left)}")


def _shown(entry: Mapping[str, Any], sort: str, shared: Sequence[str], first: bool) -> dict[str, tuple[str, str]]:
    """Return one run as column -> text above and text below."""
    figures = {row[0]: (row[1], row[2]) for row in shown_metrics(dict(entry))}
    heads = dict.fromkeys((METRIC_NAMES[sort], METRIC_NAMES["auroc"], METRIC_NAMES["accuracy"]))
    own = {key: (printable(text), "") for key, text in entry["facts"].items() if key not in shared}
    date, _, time = entry["finished"].partition("T")
    seconds = "" if entry["seconds"] is None else f"{entry['seconds']:.0f} s"
    return {
        "run": (entry["run"], ""),
        **own,
        **{head: figures[head] for head in heads},
        "difference": ("(best)", "") if first else _shown_difference(entry["difference"]),
        "finished": (f"{date} {time[:5]}", f"epochs took {seconds}" if seconds else ""),
    }


def _shown_difference(found: Mapping[str, float | None] | None) -> tuple[str, str]:
    if found is None or found["low"] is None or found["high"] is None:
        return "undefined" if found is None else f"{found['value']:+.3f}", "no interval"
    if meaning(found) == "equal here":
        return "none", ""
    p = "" if found["p"] is None else ", p < 0.001" if found["p"] < 0.001 else f", p {found['p']:.3f}"
    return f"{found['value']:+.3f}{p}", f"{found['low']:+.3f} to {found['high']:+.3f}"


def show_diff(found: Mapping[str, Any], console: Console = QUIET) -> None:
    """Print what two runs do not have in common, the differences of their figures, and whether they mean anything."""
    a, b = found["runs"]
    rows = [
        {"setting": (path.removeprefix("config."), ""), a: (_cell(old), ""), b: (_cell(new), "")}
        for path, (old, new) in found["differs"].items()
    ]
    _print_rows(f"What differs between {a} and {b}", rows or [{"setting": ("nothing", "")}], console)
    if found["comparison"] is None:
        console.say(f"Their figures are not compared: {found['note']}.")
        return
    entries = found["comparison"]["metrics"]
    rows = []
    for key, name in METRIC_NAMES.items():
        gap = {**entries[key], "value": entries[key]["difference"]}
        values = [("undefined" if entries[key][side] is None else f"{entries[key][side]:.3f}", "") for side in "ab"]
        told = None if gap["value"] is None else gap
        rows.append({"measure": (name, ""), a: values[0], b: values[1], "difference": _shown_difference(told),
                     "verdict": (meaning(told), "")})  # fmt: skip
    count, patients = found["comparison"]["n"], found["comparison"]["n_patients"]
    _print_rows(f"The same {count} test films of {patients} patients, {a} less {b}", rows, console)
    if delong := found["comparison"]["delong"]:
        console.say(f"DeLong's test of the AUROC, which takes films for independent: p {delong['p']:.3f}")


def _cell(value: Any) -> str:
    text = printable(brief(value))
    return f"{text[:12]}…" if len(text) == 64 else text  # of a hash, enough to tell two apart


def _print_rows(title: str, rows: Sequence[Mapping[str, tuple[str, str]]], console: Console) -> None:
    """Print a table on a terminal; elsewhere a line a row that names its columns."""
    console.say(title)
    if not console.rich.is_terminal:
        for number, row in enumerate(rows, 1):
            console.say(f"{number:>2}. " + "; ".join(_plain(row)))
        return
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in rows[0]:
        table.add_column(escape(head), overflow="fold")
    for row in rows:
        cells = ((escape(above), f"\n[dim]{escape(below)}[/dim]" if below else "") for above, below in row.values())
        table.add_row(*map("".join, cells))
    console.rich.print(table, soft_wrap=False)


def _plain(row: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    for i, (head, (above, below)) in enumerate(row.items()):
        yield (f"{head} " if i else "") + above + (f" ({below})" if below else "")
