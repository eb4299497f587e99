"""The commands for the one who receives a model: predict, inspect, serve. None of them needs torch for a model.onnx."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from cxr_fastai.config import PREDICT_PRECISIONS, Limits, require
from cxr_fastai.errors import UsageError
from cxr_fastai.runs import atomic_path

receiver = typer.Typer()
SHOWN = 40  # rows that people are shown; of more, a count

Model = Annotated[
    list[str] | None,
    typer.Option(help="Run folder or .onnx file; repeated, the mean of several. Default: exports/latest."),
]
Precision = Annotated[
    str, typer.Option(help=f"Arithmetic: {', '.join(PREDICT_PRECISIONS)}; auto is the fastest that agrees.")
]
MaxPixels = Annotated[int, typer.Option(help="Refuse films with more pixels.", min=1, rich_help_panel="Limits")]
MaxMb = Annotated[float, typer.Option(help="Refuse files with more megabytes.", min=0, rich_help_panel="Limits")]
MaxSeconds = Annotated[
    float, typer.Option(help="Refuse files that take longer to read.", min=0, rich_help_panel="Limits")
]


@receiver.command()
def predict(
    images: Annotated[
        list[str],
        typer.Argument(help="Films: files, folders, globs, .zip archives, or - for a list on standard input."),
    ],
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a film on standard output.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "--csv", help="Write the rows to this file: .csv, .jsonl or .parquet."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a run with the same --out was stopped.")
    ] = False,
    evidence: Annotated[
        Path | None, typer.Option(help="Write each film with its evidence laid over it into this folder.")
    ] = None,
    coverage: Annotated[
        float | None,
        typer.Option(help="Give the set of classes that holds the truth so often, such as 0.9."),
    ] = None,
    tta: Annotated[bool, typer.Option("--tta", help="Average over flipped, turned and nearer views.")] = False,
    abstain: Annotated[
        bool,
        typer.Option("--abstain/--no-abstain", help="Give no verdict on films unlike those of training."),
    ] = True,
    precision: Precision = "auto",
    frames: Annotated[str, typer.Option(help="Of a file with several frames: first, or all, a row each.")] = "first",
    max_pixels: MaxPixels = Limits.max_pixels,
    max_mb: MaxMb = Limits.max_bytes / 2**20,
    max_seconds: MaxSeconds = Limits.max_seconds,
) -> None:
    """Classify films with a trained model; every film gets a row. Needs no torch and no GPU."""
    require(frames in ("first", "all"), "--frames", frames, "first or all")
    require(precision in PREDICT_PRECISIONS, "--precision", precision, f"one of {', '.join(PREDICT_PRECISIONS)}")
    require(coverage is None or 0 < coverage < 1, "--coverage", coverage, "a share above 0 and below 1")
    if resume and out is None:
        raise UsageError("--resume goes on with a file: name the same --out as before")
    if resume and frames == "all":
        raise UsageError("--resume cannot count films where each frame is a row; leave out --frames all")
    from cxr_fastai.console import Console
    from cxr_fastai.inputs import find_inputs
    from cxr_fastai.output import Journal, check_format
    from cxr_fastai.predict import Predictor

    if out is not None:
        check_format(out)
    console = Console(machine=as_json)
    predictor = Predictor(model or ["exports/latest"], precision=precision)
    films = find_inputs(images)
    limits = Limits(max_pixels, int(max_mb * 2**20), max_seconds)
    asked: dict[str, Any] = {"abstain": abstain, "tta": tta, "coverage": coverage}
    journal = None
    if out is not None:
        settings = {**asked, "precision": predictor.engines[0].precision, "limits": limits.to_json(), "frames": frames}
        journal = Journal(out, [[film.path for film in films], predictor.fingerprints, settings], resume)
        if journal.done:
            console.say(f"{out}: {journal.done} of {len(films)} films were done before")
    tally = Tally()
    done = journal.done if journal else 0
    for earlier in journal.rows() if journal and done else ():
        tally.add(earlier, as_json)
    rows = predictor.predict(
        films[done:], limits=limits, all_frames=frames == "all", keep_pixels=evidence is not None, **asked
    )
    with console.progress("Reading films", len(films)) as advance, journal or nullcontext():
        for _ in range(done):
            advance()
        for row in rows:
            if row.frame is None:
                advance()
            if evidence is not None and row.evidence is not None:
                save_overlay(predictor, row, evidence / f"{tally.n + 1:06d}-{safe_stem(row.path)}.png")
            if journal:
                journal.write(row)
            tally.add(row.to_dict(), as_json)
    if journal:
        journal.finish(predictor.card)
        console.say(f"{out}: {tally.n} rows")
    if not as_json:
        tally.show(console)
    if tally.errors:
        raise typer.Exit(1)


class Tally:
    """Rows as they come: printed as JSON where asked, counted, and the first ones kept for a table."""

    def __init__(self) -> None:
        self.n = self.errors = 0
        self.first: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()

    def add(self, row: dict[str, Any], as_json: bool) -> None:
        """Take one row, as `Prediction.to_dict` gives it."""
        self.n += 1
        self.errors += row["error"] is not None
        self.counts["could not be read" if row["error"] else verdict_of(row)] += 1
        if len(self.first) <= SHOWN:
            self.first.append(row)
        if as_json:
            print(json.dumps(row), flush=True)  # noqa: T201

    def show(self, console: Any) -> None:
        """Print a table of the rows for people, names escaped; of many rows, how many there are of each kind."""
        from rich.markup import escape
        from rich.table import Table

        table = Table()
        if self.n > SHOWN:
            for head in ("class", "films"):
                table.add_column(head, justify="right" if head == "films" else "left")
            for name, count in self.counts.most_common():
                table.add_row(escape(name), str(count))
            console.rich.print(table)
            console.say("Each film: --json, or --out FILE")
            return
        for head in ("film", "class", "probability", "threshold", "remarks"):
            table.add_column(head, justify="right" if head in ("probability", "threshold") else "left", overflow="fold")
        for cells in map(shown, self.first):
            table.add_row(*map(escape, cells))
        console.rich.print(table)


def verdict_of(row: dict[str, Any]) -> str:
    """Return a row's label in words."""
    return "no verdict" if row["label"] is None else row["label"] or "no finding"


def shown(row: dict[str, Any]) -> Iterator[str]:
    """Yield the cells of a row for people."""
    from cxr_fastai.images import printable

    yield printable(row["path"])
    yield "-" if row["error"] else verdict_of(row)
    p, spread, threshold = row["probability"], row["spread"], row["threshold"]
    yield "-" if p is None else f"{p:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
    yield f"{threshold:.3f}" if isinstance(threshold, float) else "-"
    held = row["set"]
    if isinstance(held, dict):
        held = [name for names in held.values() for name in names]
    remarks = [row["error"] or " ".join(row["flags"])]
    yield " ".join([*remarks, "" if held is None else "{" + ", ".join(held) + "}"]).strip()


def save_overlay(predictor: Any, row: Any, path: Path) -> None:
    """Write the film of a row with its evidence laid over it as a PNG."""
    from PIL import Image

    from cxr_fastai.predict import overlay

    with atomic_path(path) as temporary:
        Image.fromarray(overlay(row.pixels, predictor.evidence_shown(row))).save(temporary, "PNG")


def safe_stem(path: str) -> str:
    """Return the name of a film as a file name that every system and terminal takes."""
    return re.sub(r"[^\w.-]", "_", Path(path).stem.encode("ascii", "replace").decode())[:80]


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object as the last line of standard output."""
    print(json.dumps(value))  # noqa: T201
