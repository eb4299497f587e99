"""The commands for the one who receives a model: predict, inspect, serve. None of them needs torch for a model.onnx."""

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from cxr_fastai.config import PREDICT_PRECISIONS, Limits, require
from cxr_fastai.errors import UsageError
from cxr_fastai.runs import atomic_path
from cxr_fastai.serving import ServeConfig

receiver = typer.Typer()
PICKLES = (".pkl", ".pth", ".pickle")
MODEL_SUFFIXES = (*PICKLES, ".onnx")
SHOWN = 40  # rows that people are shown; of more, a count

Model = Annotated[
    list[str] | None,
    typer.Option(help="Run folder, .onnx or fastai export; repeated, the mean of several. Default: exports/latest."),
]
Precision = Annotated[
    str, typer.Option(help=f"Arithmetic: {', '.join(PREDICT_PRECISIONS)}; auto is the sooner, where they agree.")
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
    dicom: Annotated[
        Path | None,
        typer.Option(
            help="Write a DICOM Secondary Capture with the evidence and a Structured Report of each film into this "
            "folder; research, not for clinical use."
        ),
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
    unsafe_unpickle: Annotated[
        bool,
        typer.Option("--unsafe-unpickle", help="Unpickle a .pkl, which runs whatever code is inside; only your own."),
    ] = False,
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
    from cxr_fastai.engine import precision_for
    from cxr_fastai.inputs import find_inputs, safe_stem
    from cxr_fastai.output import Journal, check_format

    if out is not None:
        check_format(out)
    console = Console(machine=as_json)
    models, images = models_among(model, images)
    films = find_inputs(images)
    predictor = open_predictor(models, precision_for(len(films), precision), unsafe_unpickle)
    limits = Limits(max_pixels, int(max_mb * 2**20), max_seconds)
    asked: dict[str, Any] = {"abstain": abstain, "tta": tta, "coverage": coverage}
    journal = None
    if out is not None:
        settings = {**asked, "precision": predictor.precision, "limits": limits.to_json(), "frames": frames}
        journal = Journal(out, [[film.path for film in films], predictor.fingerprints, settings], resume)
        if journal.done:
            console.say(f"{out}: {journal.done} of {len(films)} films were done before")
    tally = Tally()
    done = journal.done if journal else 0
    for earlier in journal.rows() if journal and done else ():
        tally.add(earlier, as_json)
    keep = evidence is not None or dicom is not None
    rows = predictor.predict(films[done:], limits=limits, all_frames=frames == "all", keep_pixels=keep, **asked)
    sources = {film.path: film for film in films} if dicom else {}
    with console.progress("Reading films", len(films)) as advance, journal or nullcontext():
        for _ in range(done):
            advance()
        for row in rows:
            if row.frame is None:
                advance()
            if evidence is not None and row.evidence is not None:
                save_overlay(predictor, row, evidence / f"{tally.n + 1:06d}-{safe_stem(row.path)}.png")
            if dicom is not None:
                save_dicom(predictor, row, sources[row.path], limits, dicom, tally.n + 1)
            if journal:
                journal.write(row)
            tally.add(row.to_dict(), as_json)
    if journal:
        journal.finish(predictor.card)
        console.say(f"{out}: {tally.n} rows")
    if not as_json:
        tally.show(console, written=out is not None)
    if tally.errors:
        raise typer.Exit(1)


def models_among(named: list[str] | None, images: list[str]) -> tuple[list[str], list[str]]:
    """Return models and films: without --model, model files before the films are meant, as in `predict m.pkl a.png`."""
    if named:
        return named, images
    models = list(itertools.takewhile(lambda name: Path(name).suffix.lower() in MODEL_SUFFIXES, images))
    if models and len(models) == len(images):
        raise UsageError(f"{models[0]} is a model, but no film is named after it; give image files, folders or globs")
    return models or ["exports/latest"], images[len(models) :]


def open_predictor(models: list[str], precision: str, unsafe: bool = False) -> Any:
    """Return the Predictor of model.onnx files or run folders, or of one fastai export, which alone needs torch."""
    exports = [name for name in models if Path(name).suffix.lower() in PICKLES]
    if not exports:
        from cxr_fastai.predict import Predictor

        require(not unsafe, "--unsafe-unpickle", "given", "used with a .pkl model")
        return Predictor(models, precision=precision)
    if len(models) > 1:
        raise UsageError(f"--model {exports[0]}: only model.onnx files and run folders can be averaged")
    try:
        from cxr_fastai.predict_export import ExportPredictor, UnpickledPredictor
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{exports[0]} is a fastai export, which needs {error.name}; use its model.onnx, or install everything"
        ) from None
    return UnpickledPredictor(exports[0]) if unsafe else ExportPredictor(exports[0], precision=precision)


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
        if len(self.first) < SHOWN:
            self.first.append(row)
        if as_json:
            print(json.dumps(row), flush=True)  # noqa: T201

    def show(self, console: Any, written: bool) -> None:
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
            if not written:
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
    from cxr_fastai.metrics.conformal import listed

    yield printable(row["path"])
    yield "-" if row["error"] else verdict_of(row)
    p, spread, threshold = row["probability"], row["spread"], row["threshold"]
    yield "-" if p is None else f"{p:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
    yield f"{threshold:.3f}" if isinstance(threshold, float) else "-"
    held = listed(row["set"])
    remarks = [row["error"] or " ".join(row["flags"])]
    yield " ".join([*remarks, "" if held is None else "{" + ", ".join(held) + "}"]).strip()


def save_overlay(predictor: Any, row: Any, path: Path) -> None:
    """Write the film of a row with its evidence laid over it as a PNG."""
    from PIL import Image

    from cxr_fastai.predict import overlay

    with atomic_path(path) as temporary:
        Image.fromarray(overlay(row.pixels, predictor.evidence_shown(row))).save(temporary, "PNG")


def save_dicom(predictor: Any, row: Any, source: Any, limits: Limits, folder: Path, number: int) -> None:
    """Write the picture and the report of a row as DICOM objects; nothing for a film that could not be read."""
    from cxr_fastai.dicom_out import write_dicom

    if row.error is None:
        shown = None if row.evidence is None else predictor.evidence_shown(row)
        data = source.read_bytes(limits)
        write_dicom(row, shown, data, predictor.card, folder, number, predictor.fingerprints)


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object as the last line of standard output."""
    print(json.dumps(value))  # noqa: T201


@receiver.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="model.onnx, a fastai export (.pkl), .pth or .safetensors.")],
    as_json: Annotated[bool, typer.Option("--json", help="Result as JSON on standard output.")] = False,
) -> None:
    """Show what a model file holds, and what it would run if it were unpickled. Nothing of it is run."""
    from cxr_fastai.console import Console
    from cxr_fastai.inert.describe import describe

    found = describe(file)
    show_facts(found, Console(machine=as_json))
    if as_json:
        print_json(found)
    if found["problem"]:
        raise typer.Exit(1)


def show_facts(facts: dict[str, Any], console: Any, indent: str = "") -> None:
    """Print what is known of a model file, a line each, names escaped."""
    from cxr_fastai.images import printable

    for key, value in facts.items():
        if isinstance(value, dict) and value:
            console.say(f"{indent}{key}:")
            show_facts(value, console, indent + "  ")
        elif value not in (None, [], {}):
            console.say(f"{indent}{key}: {printable(in_words(value))}")


def in_words(value: Any) -> str:
    """Return a fact as text for a line: names joined, of numbers in lists only how many there are."""
    if not isinstance(value, list):
        return str(value)
    if isinstance(value[0], list):
        return f"{sum(map(len, value))} numbers"
    return ", ".join(map(str, value))


@receiver.command()
def serve(
    model: Annotated[str, typer.Option(help="Run folder or .onnx file.")] = ServeConfig.model,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond this machine a token is asked for (CXR_TOKEN sets it).")
    ] = ServeConfig.host,
    port: Annotated[int, typer.Option(help="Port; 0 takes any free one.")] = ServeConfig.port,
    workers: Annotated[int | None, typer.Option(help="Processes that read and classify; else one a core.")] = None,
    max_mb: Annotated[float, typer.Option(help="Of a request's body.", rich_help_panel="Limits")] = ServeConfig.max_mb,
    max_files: Annotated[int, typer.Option(help="Of one request.", rich_help_panel="Limits")] = ServeConfig.max_files,
    queue: Annotated[
        int, typer.Option(help="Films that wait at a time, before clients are sent away.", rich_help_panel="Limits")
    ] = ServeConfig.queue,
    header_seconds: Annotated[
        float, typer.Option(help="Until a request's head must be there.", rich_help_panel="Limits")
    ] = ServeConfig.header_seconds,
    body_seconds: Annotated[
        float, typer.Option(help="Until its body must be there.", rich_help_panel="Limits")
    ] = ServeConfig.body_seconds,
    predict_seconds: Annotated[
        float, typer.Option(help="For one film.", rich_help_panel="Limits")
    ] = ServeConfig.predict_seconds,
    max_pixels: MaxPixels = ServeConfig.max_pixels,
    as_json: Annotated[
        bool, typer.Option("--json", help="Address as JSON on standard output once the server is ready.")
    ] = False,
) -> None:
    """Open a page on which films are dropped, and a REST service (POST /predict), for this machine alone."""
    config = ServeConfig(
        model=model, host=host, port=port, workers=workers, max_mb=max_mb, max_files=max_files, queue=queue,
        header_seconds=header_seconds, body_seconds=body_seconds, predict_seconds=predict_seconds,
        max_pixels=max_pixels, token=os.environ.get("CXR_TOKEN"),
    )  # fmt: skip
    from cxr_fastai.console import Console
    from cxr_fastai.serving.server import run_server

    run_server(config, Console(machine=as_json), print_json if as_json else lambda facts: None)
