"""What several commands have in common: their options, and how options become a config. Imports nothing heavy."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from cxr_fastai.config import ARCHITECTURES, DEVICES, PRECISIONS, TASKS, UNCERTAIN, GenerateConfig, TrainConfig, world
from cxr_fastai.config_file import read_settings
from cxr_fastai.errors import UsageError

DEFAULT_DATA = TrainConfig.data

Json = Annotated[bool, typer.Option("--json", help="Result as JSON on standard output, all else on standard error.")]
Data = Annotated[
    Path | None,
    typer.Argument(
        help="Folder of class folders, CSV with path,label[,patient_id][,split], DICOM tree with a labels.csv, or the "
        "root of NIH ChestX-ray14, CheXpert, MIMIC-CXR-JPG, RSNA, Kermany, Shenzhen or Montgomery. "
        f"Without it: {DEFAULT_DATA}, made if missing."
    ),
]
Task = Annotated[str, typer.Option(help=f"What the labels are: {', '.join(TASKS)}.", rich_help_panel="Data")]
PatientRegex = Annotated[
    str | None, typer.Option(help="Finds the patient id in a file name (first group).", rich_help_panel="Data")
]
Positive = Annotated[
    str | None, typer.Option(help="The class that a binary threshold is about.", rich_help_panel="Data")
]
Test = Annotated[float, typer.Option(help="Share of films kept for the test, by patient.", rich_help_panel="Data")]
Valid = Annotated[float, typer.Option(help="Share of films for validation, by patient.", rich_help_panel="Data")]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out films that cannot be read.", rich_help_panel="Data")
]
Uncertain = Annotated[
    str,
    typer.Option(help=f"Train findings called uncertain (-1) as: {', '.join(UNCERTAIN)}.", rich_help_panel="Data"),
]
HashIds = Annotated[
    bool, typer.Option("--hash-ids", help="Store a hash instead of each patient id.", rich_help_panel="Data")
]
SplitCsv = Annotated[
    str | None,
    typer.Option(
        "--split-csv",
        help="CSV with path (or patient_id) and split, such as a run's split.csv.",
        rich_help_panel="Data",
    ),
]
Folds = Annotated[
    int,
    typer.Option(help="Cross-validate in so many parts and export the ensemble; 0: one part.", rich_help_panel="Data"),
]
AllowLeaks = Annotated[
    bool,
    typer.Option("--allow-leaks", help="Train although the split leaks; the report says so.", rich_help_panel="Data"),
]
Prevalence = Annotated[
    list[float] | None,
    typer.Option(help="Tell predictive values at this prevalence, too (repeatable)."),
]
Seed = Annotated[int, typer.Option(help="Same seed, same machine, same result.")]
ARCH_HELP = f"Network: any of torchvision or timm that ends in a map of features, such as {', '.join(ARCHITECTURES)}."
Arch = Annotated[str, typer.Option(help=ARCH_HELP, rich_help_panel="Training")]
WEIGHTS_HELP = "Start from: auto, imagenet, phantom, none, or a .safetensors or .pth file."
Weights = Annotated[str, typer.Option(help=WEIGHTS_HELP, rich_help_panel="Training")]
Size = Annotated[int, typer.Option(help="Side of the square input in pixels.", rich_help_panel="Training")]
BatchSize = Annotated[int, typer.Option(help="Films a step.", rich_help_panel="Training")]
Epochs = Annotated[int, typer.Option(help="Epochs that train the network.", rich_help_panel="Training")]
FreezeEpochs = Annotated[
    int,
    typer.Option(
        help="Epochs before them that train the new last layer only; where all layers learn from the first epoch "
        "(random weights, phantom weights on fewer than 512 real films), more of the same.",
        rich_help_panel="Training",
    ),
]
FirstLayers = Annotated[
    str,
    typer.Option(
        help="Of a pretrained network: train, or keep, which is much faster; auto keeps what learned from phantoms "
        "where the films are phantoms, too, and else the very first.",
        rich_help_panel="Training",
    ),
]
Patience = Annotated[
    int,
    typer.Option(
        help="Stop after so many epochs without a better validation AUROC; 0 never.", rich_help_panel="Training"
    ),
]
Dropout = Annotated[float, typer.Option(help="Before the last layer.", rich_help_panel="Training")]
WeightDecay = Annotated[float, typer.Option(help="Adam's, decoupled.", rich_help_panel="Training")]
Augment = Annotated[
    float,
    typer.Option(help="Strength of flips, turns, crops, contrast; 0 none, 1 the paper's.", rich_help_panel="Training"),
]
Precision = Annotated[
    str, typer.Option(help=f"Arithmetic in training: {', '.join(PRECISIONS)}.", rich_help_panel="Training")
]
Device = Annotated[str, typer.Option(help=f"Where to train: {', '.join(DEVICES)}.", rich_help_panel="Training")]


def make_phantoms(config: GenerateConfig, console: Any) -> dict[str, Any]:
    """Generate a dataset with progress; return what was made."""
    from cxr_fastai.phantom import generate as generate_phantoms

    with console.progress("Making films", config.n) as advance:
        table = generate_phantoms(config, lambda done, total: advance())
    counts = table["label"].value_counts().to_dict()
    console.say(
        f"{config.out}: {len(table)} synthetic films of {table['patient_id'].nunique()} patients, seed {config.seed}"
    )
    return {
        "out": config.out,
        "n": len(table),
        "labels": counts,
        "patients": int(table["patient_id"].nunique()),
        "seed": config.seed,
    }


def ensure_phantoms(data: Path | None, config: TrainConfig, console: Any) -> None:
    """Make the default folder of phantoms where neither DATA nor a file of settings names any, and it is not there."""
    if data is None and config.data == DEFAULT_DATA and not config.synthetic:
        if world() > 1:
            raise UsageError(f"no films in {DEFAULT_DATA}, and several processes cannot make them; run generate first")
        console.say(f"No DATA given: making synthetic films in {DEFAULT_DATA}")
        make_phantoms(GenerateConfig(), console)


def train_config(given: dict[str, Any]) -> TrainConfig:
    """Return the config that a command's options make: they bear the names of its fields."""
    settings = {field.name: given[field.name] for field in dataclasses.fields(TrainConfig) if field.name in given}
    rate = {"lr": learning_rate(given["lr"])} if "lr" in given else {}
    named = (name.strip() for part in given.get("track") or () for name in part.split(","))
    lists = {"prevalence": tuple(given.get("prevalence") or ()), "track": tuple(named)}
    return TrainConfig(
        **{**settings, **rate, **lists, "data": str(given["data"] or DEFAULT_DATA), **settings_of_file(given)}
    )


def settings_of_file(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the file that --config names, without those that the command line gives, too."""
    if given.get("config") is None:
        return {}
    return {name: value for name, value in read_settings(given["config"]).items() if not is_given(given["ctx"], name)}


def is_given(ctx: typer.Context, name: str) -> bool:
    """Tell whether the command line itself gives an option; its default does not count."""
    source = ctx.get_parameter_source(name)  # compared by name: typer brings a click of its own in some versions
    return source is not None and source.name != "DEFAULT"


def learning_rate(text: str) -> float | None:
    """Return the rate meant by --lr; None is auto."""
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--lr is {text}, but must be a number above 0, or auto") from None
