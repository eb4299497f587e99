"""The commands: each parses, calls one function of the package, and prints what it returned.

Heavy imports stand inside the commands, so that `--help` answers at once. Errors become one line here and
nowhere else. Exit codes: 0 done, 1 done but some inputs failed, 2 could not start, 130 stopped by the user.
"""

import io
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from cxr_fastai import __version__
from cxr_fastai.cli_explore import explorer
from cxr_fastai.cli_options import (
    DEFAULT_DATA,
    AllowLeaks,
    Arch,
    Augment,
    BatchSize,
    Data,
    Device,
    Dropout,
    Epochs,
    FirstLayers,
    Folds,
    FreezeEpochs,
    HashIds,
    Json,
    Patience,
    PatientRegex,
    Positive,
    Precision,
    Prevalence,
    Seed,
    Size,
    SkipBad,
    SplitCsv,
    Task,
    Test,
    Uncertain,
    Valid,
    WeightDecay,
    Weights,
    ensure_phantoms,
    is_given,
    make_phantoms,
    train_config,
)
from cxr_fastai.cli_predict import print_json, receiver
from cxr_fastai.config import TRACKERS, GenerateConfig, TrainConfig, rank
from cxr_fastai.errors import CxrError, UsageError

app = typer.Typer(
    name="cxr",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn folders of chest radiographs (or none: it makes synthetic ones) into a classifier that can be trusted, "
    "explained and handed over. Start with: [bold]python cli.py train[/bold]. Research software, not a medical device.",
)
app.add_typer(receiver)
app.add_typer(explorer)
DEBUG = "--debug"


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show the traceback of an error.")] = False,
) -> None:
    """Handle what stands before the command; `--debug` is read in `main`."""
    if version:
        print(__version__)  # noqa: T201
        raise typer.Exit


@app.command()
def generate(
    out: Annotated[
        str, typer.Option(help="Folder to write; one of ours is replaced when the new one is finished.")
    ] = GenerateConfig.out,
    n: Annotated[int, typer.Option(help="Number of films.")] = GenerateConfig.n,
    task: Annotated[
        str, typer.Option(help="binary (normal/abnormal), multiclass (one finding a film) or multilabel.")
    ] = GenerateConfig.task,
    size: Annotated[int, typer.Option(help="Side of a film in pixels.")] = GenerateConfig.size,
    seed: Seed = GenerateConfig.seed,
    difficulty: Annotated[
        str, typer.Option(help="How visible the findings are: easy, medium or hard.")
    ] = GenerateConfig.difficulty,
    format: Annotated[str, typer.Option(help="png or jpeg.")] = GenerateConfig.format,
    plant: Annotated[
        list[str] | None,
        typer.Option(
            help="Plant a known defect, repeatable: leak:0.1, mislabel:0.05, "
            "shortcut:0.9 or shortcut:0.9:KIND with KIND marker, border, brightness or format."
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; the films are the same for any number.")] = None,
    as_json: Json = False,
) -> None:
    """Make synthetic chest radiographs with labels, patients and the exact place of each finding."""
    from cxr_fastai.console import Console

    config = GenerateConfig(
        out=out,
        n=n,
        task=task,
        size=size,
        seed=seed,
        difficulty=difficulty,
        format=format,
        plant=tuple(plant or ()),
        workers=workers,
    )
    console = Console(machine=as_json)
    made = make_phantoms(config, console)
    if as_json:
        print_json(made)


@app.command()
def train(
    ctx: typer.Context,
    data: Data = None,
    config: Annotated[
        Path | None, typer.Option(help="Settings from this TOML file; options given here go before them.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run folder; else train-001, train-002 ...")] = None,
    out: Annotated[str, typer.Option(help="Folder of run folders.")] = TrainConfig.out,
    seed: Seed = TrainConfig.seed,
    task: Task = TrainConfig.task,
    positive: Positive = None,
    patient_regex: PatientRegex = None,
    test: Test = TrainConfig.test,
    valid: Valid = TrainConfig.valid,
    skip_bad: SkipBad = False,
    uncertain: Uncertain = TrainConfig.uncertain,
    hash_ids: HashIds = False,
    split_csv: SplitCsv = None,
    folds: Folds = TrainConfig.folds,
    audit: Annotated[
        str,
        typer.Option(
            help="Before training: cheap (copies, patients) or full (as the verb audit).", rich_help_panel="Data"
        ),
    ] = TrainConfig.audit,
    allow_leaks: AllowLeaks = False,
    arch: Arch = TrainConfig.arch,
    weights: Weights = TrainConfig.weights,
    size: Size = TrainConfig.size,
    batch_size: BatchSize = TrainConfig.batch_size,
    epochs: Epochs = TrainConfig.epochs,
    freeze_epochs: FreezeEpochs = TrainConfig.freeze_epochs,
    first_layers: FirstLayers = TrainConfig.first_layers,
    lr: Annotated[
        str, typer.Option(help="Peak learning rate of Adam, or auto: from lr-find.", rich_help_panel="Training")
    ] = f"{TrainConfig.lr:g}",
    weight_decay: WeightDecay = TrainConfig.weight_decay,
    dropout: Dropout = TrainConfig.dropout,
    augment: Augment = TrainConfig.augment,
    patience: Patience = TrainConfig.patience,
    precision: Precision = TrainConfig.precision,
    device: Device = TrainConfig.device,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep checkpoints/last.pth of a run that ended well.")
    ] = False,
    target_sensitivity: Annotated[
        float | None,
        typer.Option(help="Choose the threshold that reaches it on validation.", rich_help_panel="Training"),
    ] = None,
    target_specificity: Annotated[
        float | None, typer.Option(help="Likewise; without either, Youden's.", rich_help_panel="Training")
    ] = None,
    prevalence: Prevalence = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with a run folder that was cut off, with the settings that it was begun with."),
    ] = None,
    checkpoint_minutes: Annotated[
        float, typer.Option(help="Write a checkpoint so often within an epoch, too; 0: after each epoch.")
    ] = TrainConfig.checkpoint_minutes,
    track: Annotated[
        list[str] | None,
        typer.Option(help=f"Follow it in {', '.join(TRACKERS)}, too (repeatable).", rich_help_panel="Training"),
    ] = None,
    track_images: Annotated[
        bool,
        typer.Option("--track-images", help="Show up to 16 test films there.", rich_help_panel="Training"),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train, test, explain and export a classifier; everything it leaves is in one run folder."""
    if resume is not None:
        alone(ctx, "resume", "as_json")
    settings = train_config(locals())
    from cxr_fastai.console import Console

    console = Console(machine=as_json, quiet=rank() > 0)
    if resume is None:
        ensure_phantoms(data, settings, console)
    with console.busy("Starting fastai"):
        from cxr_fastai import training

    run, metrics = training.resume(resume, console) if resume else training.train(settings, console)
    if rank() > 0:
        return
    show_metrics(metrics, console)
    console.say(f"Run folder: {run}   report: {run / 'report.html'}   next: python cli.py predict IMAGE")
    if as_json:
        print_json({**metrics, "run": str(run)})


def alone(ctx: typer.Context, name: str, *allowed: str) -> None:
    """Refuse every option beside one that says all."""
    given = {key for key in ctx.params if is_given(ctx, key)}
    if others := sorted(given - {name, *allowed}):
        flags = ", ".join(key if key == "data" else f"--{key.replace('_', '-')}" for key in others)
        raise UsageError(f"--{name} takes all settings from the run; leave out {flags}")


def show_metrics(metrics: dict[str, Any], console: Any) -> None:
    """Print the table of figures with intervals, and the confusion matrix."""
    from rich.table import Table

    from cxr_fastai.report import shown_metrics

    title = f"{metrics['split']} films: {metrics['n']} of {metrics['n_patients']} patients"
    table = Table(title=title, title_justify="left")
    for head in ("measure", "value", "95 % interval", "films"):
        table.add_column(head, justify="left" if head == "measure" else "right")
    for row in shown_metrics(metrics):
        table.add_row(*row)
    console.rich.print(table)
    if not isinstance(metrics["confusion"][0][0], list):
        counts = Table(title="confusion (row: truth, column: said)", title_justify="left")
        for head in ("", *metrics["classes"]):
            counts.add_column(head, justify="right")
        for name, line in zip(metrics["classes"], metrics["confusion"], strict=True):
            counts.add_row(name, *map(str, line))
        console.rich.print(counts)
    if metrics["errors"]:
        console.say(f"{metrics['errors']} films could not be read; they are in no figure above")


@app.command()
def audit(
    data: Data = None,
    model: Annotated[
        str | None, typer.Option(help="Run folder whose model looks for wrong labels; else the shipped weights.")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Write a page with the films to this HTML file.")] = None,
    task: Task = TrainConfig.task,
    patient_regex: PatientRegex = None,
    hash_ids: HashIds = False,
    seed: Seed = TrainConfig.seed,
    as_json: Json = False,
) -> None:
    """Look for what makes figures wrong: copies, leaks, shortcuts, wrong labels, bad films. Ends with 1 on an error."""
    from cxr_fastai.audit import run_audit
    from cxr_fastai.audit.page import show_audit
    from cxr_fastai.console import Console

    console = Console(machine=as_json)
    ensure_phantoms(data, TrainConfig(), console)
    options = {"task": task, "patient_regex": patient_regex, "hash_ids": hash_ids}
    found = run_audit(str(data or DEFAULT_DATA), model=model, page=page, options=options, seed=seed, console=console)
    show_audit(found, console)
    if as_json:
        print_json(found.to_dict())
    if any(finding.severity == "error" for finding in found.findings):
        raise typer.Exit(1)


@app.command()
def verify(
    run: Annotated[str, typer.Argument(help="Run folder.")] = "exports/latest",
    films: Annotated[int, typer.Option(help="Test films to predict again.", min=0)] = 8,
    as_json: Json = False,
) -> None:
    """Check a run: files against their hashes, figures against predictions.csv, predictions against the model."""
    from cxr_fastai.console import Console
    from cxr_fastai.verify import show_verification, verify_run

    console = Console(machine=as_json)
    found = verify_run(run, films, console)
    show_verification(found, console)
    if as_json:
        print_json(found)
    if found["problems"]:
        raise typer.Exit(1)


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="Run folder.")] = "exports/latest",
    data: Annotated[
        Path | None, typer.Argument(help="Labelled folder or CSV; without it, the run's own test films.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for predictions.csv and metrics.json.")] = None,
    map_labels: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            help="What a label of DATA is called by the model, THEIRS=OURS (repeatable); '*' is every other label, "
            "an empty OURS leaves it out.",
        ),
    ] = None,
    prevalence: Prevalence = None,
    as_json: Json = False,
) -> None:
    """Test a trained classifier on its untouched test films, or on any other labelled films."""
    from cxr_fastai.console import Console
    from cxr_fastai.evaluate import evaluate_run

    console = Console(machine=as_json)
    metrics = evaluate_run(
        run,
        None if data is None else str(data),
        None if out is None else str(out),
        console,
        mapping=map_labels or (),
        prevalence=prevalence or (),
    )
    show_metrics(metrics, console)
    if as_json:
        print_json(metrics)
    if metrics["errors"]:
        raise typer.Exit(1)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Folder of run folders.")] = Path(TrainConfig.out),
    sort: Annotated[str, typer.Option(help="By which metric: auroc, accuracy, f1, brier ...")] = "auroc",
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option("--diff", metavar="A B", help="Tell what differs between two runs, and between their figures."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw validation AUROC and loss of the runs against epoch into this .png.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the finished runs of a folder, best first, with whether the best one's lead may be chance."""
    from cxr_fastai import leaderboard
    from cxr_fastai.console import Console
    from cxr_fastai.leaderboard_text import show_diff, show_ranking

    console = Console(machine=as_json)
    if plot is not None:
        leaderboard.check_plot(plot)
    found: dict[str, Any]
    if diff is not None:
        shown = [leaderboard.open_run(folder / name if (folder / name).exists() else name) for name in diff]
        found, damaged = leaderboard.diff_runs(*shown), False
        show_diff(found, console)
    else:
        shown, unfinished = leaderboard.open_runs(folder)
        with console.busy("Comparing runs"):
            found, damaged = leaderboard.rank(shown, unfinished, sort), any(run["damaged"] for run in unfinished)
        show_ranking(found, folder, console)
    if plot is not None:
        leaderboard.plot_runs(shown, plot)
        console.say(f"Histories: {plot}")
    if as_json:
        print_json(found)
    if damaged:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; turn every expected error into one line and its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # an epoch is seen when it ends, in a log file, too
    # fastai and torch still call things that torch deprecates; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|fastai")
    try:
        code = app(standalone_mode=False)
    except CxrError as error:
        if DEBUG in sys.argv:
            raise
        code = fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = fail("stopped by Ctrl-C", 130)
    except BrokenPipeError:
        # The reader of our output (head, say) has gone; nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except ModuleNotFoundError as error:
        if DEBUG in sys.argv or (error.name or "").startswith("cxr_fastai"):
            raise
        code = fail(
            f"{error.name} is not installed: this is the slim install, for predict, inspect and serve; for the rest "
            "install everything (pip install .)",
            2,
        )
    except Exception as error:
        # typer's usage errors: their class is its own in some versions and click's in others
        if not hasattr(error, "format_message"):
            raise
        code = fail(f"{error.format_message()} (see --help)", 2)
    sys.exit(code)


def fail(message: str, code: int) -> int:
    """Print an error as one line on standard error and return its exit code."""
    print("error: " + " ".join(message.split()), file=sys.stderr)  # noqa: T201
    return code
