"""The commands that look for settings: lr-find and sweep. Heavy imports stand inside them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cxr_fastai.cli_options import (
    ARCH_HELP,
    WEIGHTS_HELP,
    AllowLeaks,
    Arch,
    Augment,
    BatchSize,
    Data,
    Device,
    Dropout,
    Epochs,
    FirstLayers,
    FreezeEpochs,
    HashIds,
    Json,
    Patience,
    PatientRegex,
    Positive,
    Precision,
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
    train_config,
)
from cxr_fastai.cli_predict import print_json
from cxr_fastai.config import SweepConfig, TrainConfig, batch_sizes_around, sizes_around

explorer = typer.Typer()
PLOT = Path("exports/lr_find.png")


@explorer.command("lr-find")
def lr_find(
    data: Data = None,
    seeds: Annotated[
        int, typer.Option(help="Runs, each with its own seed; the median is suggested.", min=1, max=100)
    ] = 3,
    iterations: Annotated[int, typer.Option(help="Steps of one run.", min=30, max=10_000)] = 100,
    plot: Annotated[Path, typer.Option(help="Where the plot goes.")] = PLOT,
    unfrozen: Annotated[
        bool,
        typer.Option("--unfrozen", help="For the phase that trains the network, instead of the new last layer alone."),
    ] = False,
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
    arch: Arch = TrainConfig.arch,
    weights: Weights = TrainConfig.weights,
    size: Size = TrainConfig.size,
    batch_size: BatchSize = TrainConfig.batch_size,
    first_layers: FirstLayers = TrainConfig.first_layers,
    weight_decay: WeightDecay = TrainConfig.weight_decay,
    dropout: Dropout = TrainConfig.dropout,
    augment: Augment = TrainConfig.augment,
    precision: Precision = TrainConfig.precision,
    device: Device = TrainConfig.device,
    as_json: Json = False,
) -> None:
    """Find a learning rate: fastai's lr_find over several seeds, with the spread and a plot."""
    config = train_config(locals())
    from cxr_fastai.console import Console

    console = Console(machine=as_json)
    ensure_phantoms(data, config, console)
    with console.busy("Starting fastai"):
        from cxr_fastai.explore import find_rate

    found = find_rate(config, seeds=seeds, iterations=iterations, plot=plot, unfrozen=unfrozen, console=console)
    if as_json:
        print_json(found)


@explorer.command()
def sweep(
    data: Data = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the sweep and of the winner's run; one that is there goes on.")
    ] = None,
    out: Annotated[
        str, typer.Option(help="Folder of run folders; the sweep lies in OUT/sweeps/NAME.")
    ] = TrainConfig.out,
    trials: Annotated[
        int, typer.Option(help="Trials to finish in all, those of earlier calls and other machines included.")
    ] = SweepConfig.trials,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no trial that would end later; without it no limit.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes, which share the cores.")] = SweepConfig.workers,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Where the trials are kept, for several machines: a database URL or journal:FILE. Without it a file "
            "of SQLite in the sweep's folder."
        ),
    ] = None,
    final: Annotated[
        bool, typer.Option("--final/--no-final", help="Train the winner and open the test films.")
    ] = SweepConfig.final,
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
    allow_leaks: AllowLeaks = False,
    arch: Annotated[list[str] | None, typer.Option(help=f"{ARCH_HELP} Repeatable.", rich_help_panel="Search")] = None,
    weights: Annotated[
        list[str] | None, typer.Option(help=f"{WEIGHTS_HELP} Repeatable.", rich_help_panel="Search")
    ] = None,
    size: Annotated[
        list[int] | None,
        typer.Option(
            help="Side of the input; one is tried with a smaller and a larger one, several are the choice.",
            rich_help_panel="Search",
        ),
    ] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            help="One is tried with its half and its double, several are the choice.", rich_help_panel="Search"
        ),
    ] = None,
    rate_factor: Annotated[
        float,
        typer.Option(help="A learning rate lies within it around lr-find's suggestion.", rich_help_panel="Search"),
    ] = SweepConfig.rate_factor,
    epochs: Epochs = TrainConfig.epochs,
    freeze_epochs: FreezeEpochs = TrainConfig.freeze_epochs,
    first_layers: FirstLayers = TrainConfig.first_layers,
    patience: Patience = TrainConfig.patience,
    precision: Precision = TrainConfig.precision,
    device: Device = TrainConfig.device,
    as_json: Json = False,
) -> None:
    """Search for settings by validation AUROC (Optuna), then train and test the winner; --name goes on after Ctrl-C."""
    config = sweep_config(locals())
    from cxr_fastai.console import Console

    console = Console(machine=as_json)
    ensure_phantoms(data, config.train, console)
    with console.busy("Starting fastai"):
        from cxr_fastai.sweep import sweep as run_sweep

    found = run_sweep(config, console)
    if found["run"]:
        console.say(f"Run folder: {found['run']}   report: {found['run']}/report.html")
    if as_json:
        print_json(found)


def sweep_config(given: dict[str, Any]) -> SweepConfig:
    """Return the config that the options of `sweep` make."""
    archs = tuple(given["arch"] or [TrainConfig.arch])
    sizes = tuple(given["size"] or [TrainConfig.size])
    batch_sizes = tuple(given["batch_size"] or [TrainConfig.batch_size])
    one = {"arch": archs[0], "weights": TrainConfig.weights, "size": sizes[0], "batch_size": batch_sizes[0]}
    return SweepConfig(
        train=train_config({**given, **one}),
        archs=archs,
        weights=tuple(given["weights"] or [TrainConfig.weights]),
        sizes=sizes_around(sizes[0]) if len(sizes) == 1 else sizes,
        batch_sizes=batch_sizes_around(batch_sizes[0]) if len(batch_sizes) == 1 else batch_sizes,
        **{key: given[key] for key in ("trials", "minutes", "rate_factor", "storage", "workers", "final")},
    )
