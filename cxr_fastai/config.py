"""What can be set, one frozen dataclass a verb; the defaults are the paper's.

Standard library only. Every class checks itself when it is made, and a message names the command-line flag.
`to_json` and `from_json` carry a config into and out of a run folder.
"""

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cxr_fastai.errors import UsageError

TASKS = ("auto", "binary", "multiclass", "multilabel")
AUDITS = ("cheap", "full")
UNCERTAIN = ("ignore", "ones", "zeros", "soft")
FIRST_LAYERS = ("auto", "keep", "train")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
PREDICT_PRECISIONS = ("auto", "fp32", "bf16")
DEVICES = ("auto", "cpu", "cuda")
# The usual networks. Any other of torchvision or timm will do whose body ends in a map of features, so that evidence
# has a place; whether it does is seen where it is made (architectures.py).
ARCHITECTURES = (
    *(f"densenet{n}" for n in (121, 161, 169, 201)),
    *(f"resnet{n}" for n in (18, 34, 50, 101, 152)),
    *(f"vgg{n}_bn" for n in (11, 13, 16, 19)),
)  # fmt: skip
TRACKERS = ("tensorboard", "mlflow", "trackio")
NETWORK_NAME = re.compile(r"\w+(\.\w+)?", re.ASCII)  # timm's have a tag of their weights after a point
SHORTCUTS = ("marker", "border", "brightness", "format")
MAX_SEED = 2**32 - 1


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def world() -> int:
    """Return how many processes train together (set by torchrun or accelerate); 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process among them, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def require(condition: bool, flag: str, value: object, allowed: str) -> None:
    """Raise the UsageError of one flag unless `condition` holds."""
    if not condition:
        raise UsageError(f"{flag} is {value}, but must be {allowed}")


class Saved:
    """JSON in and out, for every config."""

    def to_json(self) -> str:
        """Return the config as a JSON object, keys in the order of the fields."""
        return json.dumps(dataclasses.asdict(self), indent=1)  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Make the config again from `to_json`'s text; keys that are not fields are refused by name."""
        values: dict[str, Any] = json.loads(text)
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(values) - known):
            raise UsageError(f"config: unknown setting {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**values)


@dataclass(frozen=True)
class Limits(Saved):
    """What one file may cost. The defaults keep a reader below 600 MB and 5 s, and let every radiograph pass.

    Attributes
    ----------
    max_pixels : int
        Rows × columns; the largest radiographs have about 22 million.
    max_bytes : int
        Length of the file.
    max_seconds : float
        CPU time of the reading thread. Looked at whenever a parser asks for more bytes, and at the end; a codec in C is
        not interrupted, which is why the pixels are limited.
    """

    max_pixels: int = 25_000_000
    max_bytes: int = 128 * 1024 * 1024
    max_seconds: float = 5.0


def parse_plant(text: str) -> tuple[str, float, str]:
    """Return kind, amount and what of a planted defect, `kind:amount[:what]`; raise UsageError where it is not one."""
    kind, _, rest = text.partition(":")
    amount, _, what = rest.partition(":")
    if kind not in ("leak", "shortcut", "mislabel"):
        raise UsageError(f"--plant {text!r}: unknown kind {kind!r}; use leak:F, shortcut:S[:KIND] or mislabel:F")
    try:
        value = float(amount)
    except ValueError:
        raise UsageError(f"--plant {text!r}: {amount!r} is not a number; write for example {kind}:0.1") from None
    if not 0.0 < value <= 1.0:
        raise UsageError(f"--plant {text!r}: {amount} is out of range; use a fraction above 0 and up to 1")
    if kind != "shortcut" and what:
        raise UsageError(f"--plant {text!r}: only shortcut takes a third part; write {kind}:{amount}")
    what = what or ("marker" if kind == "shortcut" else "")
    if kind == "shortcut" and what not in SHORTCUTS:
        raise UsageError(f"--plant {text!r}: unknown shortcut {what!r}; use one of {', '.join(SHORTCUTS)}")
    return kind, value, what


@dataclass(frozen=True)
class GenerateConfig(Saved):
    """One folder of synthetic films.

    out: folder to write; one of ours is replaced when the new one is finished. n: films, without the copies that
    `leak` adds. task: binary (half normal, half abnormal), multiclass (one finding a film, classes of equal size) or
    multilabel. size: side of a film in pixels. seed: same seed, same bytes. difficulty: how severe findings are.
    format: png or jpeg. plant: known defects, `leak:F`, `shortcut:S[:marker|border|brightness|format]`, `mislabel:F`,
    each kind once. workers: processes, None is one a core. images_per_patient: mean number of films of a patient.
    """

    out: str = "data/synthetic"
    n: int = 750
    task: str = "binary"
    size: int = 224
    seed: int = 0
    difficulty: str = "medium"
    format: str = "png"
    plant: tuple[str, ...] = ()
    workers: int | None = None
    images_per_patient: float = 1.2

    def __post_init__(self) -> None:
        object.__setattr__(self, "plant", tuple(self.plant))  # JSON gives a list
        tasks, levels, formats = TASKS[1:], ("easy", "medium", "hard"), ("png", "jpeg")
        require(bool(self.out.strip()), "--out", repr(self.out), "a folder to write")
        require(2 <= self.n <= 10_000_000, "--n", self.n, "from 2 to 10000000")
        require(self.task in tasks, "--task", self.task, f"one of {', '.join(tasks)}")
        require(64 <= self.size <= 1024, "--size", self.size, "from 64 to 1024 pixels")
        require(0 <= self.seed <= MAX_SEED, "--seed", self.seed, f"a whole number from 0 to {MAX_SEED}")
        require(self.difficulty in levels, "--difficulty", self.difficulty, f"one of {', '.join(levels)}")
        require(self.format in formats, "--format", self.format, f"one of {', '.join(formats)}")
        require(self.workers is None or self.workers >= 1, "--workers", self.workers, "1 or more")
        require(1 <= self.images_per_patient <= 3, "--images-per-patient", self.images_per_patient, "from 1 to 3")
        kinds = [parse_plant(text)[0] for text in self.plant]
        if len(set(kinds)) < len(kinds):
            raise UsageError(f"--plant names {max(kinds, key=kinds.count)} twice: name each kind once")


@dataclass(frozen=True)
class DataConfig(Saved):
    """How a folder or CSV becomes a table with a split.

    data: folder of films, or CSV (`path,label[,patient_id][,split]`).
    task: what the labels are; `auto` looks at them.
    positive: the class that a binary threshold is about; None picks the one that is not a word for normal.
    patient_regex: finds the patient id in a file name (first group); None knows Kermany's and NIH's names.
    test, valid: shares of the whole, by patient. seed: of the split.
    skip_bad: leave out films that cannot be read, instead of refusing the data.
    uncertain: what a finding that a source calls uncertain (-1) is trained as: `ignore` leaves it out of the loss,
        `ones` and `zeros` take it for present or absent, `soft` for 0.7 present. Nothing is ever measured on it.
    hash_ids: store a hash instead of each patient id (pseudonymisation, not anonymisation; file names stay).
    split_csv: a file that gives the split, by path or patient. folds: parts for cross-validation; 0 is none.
    audit: what is looked for before training, `cheap` or `full`. allow_leaks: train although the split leaks.
    """

    data: str = "data/synthetic"
    task: str = "auto"
    positive: str | None = None
    patient_regex: str | None = None
    test: float = 0.2
    valid: float = 0.1
    seed: int = 0
    skip_bad: bool = False
    uncertain: str = "ignore"
    hash_ids: bool = False
    split_csv: str | None = None
    folds: int = 0
    audit: str = "cheap"
    allow_leaks: bool = False

    def __post_init__(self) -> None:
        require(self.folds == 0 or 2 <= self.folds <= 20, "--folds", self.folds, "0 (none), or from 2 to 20")
        require(self.audit in AUDITS, "--audit", self.audit, f"one of {', '.join(AUDITS)}")
        require(self.task in TASKS, "--task", self.task, f"one of {', '.join(TASKS)}")
        require(self.uncertain in UNCERTAIN, "--uncertain", self.uncertain, f"one of {', '.join(UNCERTAIN)}")
        require(0 < self.test < 1, "--test", self.test, "a share above 0 and below 1")
        require(0 < self.valid < 1, "--valid", self.valid, "a share above 0 and below 1")
        require(self.test + self.valid < 1, "--test plus --valid", self.test + self.valid, "below 1")
        require(0 <= self.seed <= MAX_SEED, "--seed", self.seed, f"a whole number from 0 to {MAX_SEED}")

    @property
    def synthetic(self) -> bool:
        """Whether the films are a folder that `generate` wrote."""
        return (Path(self.data) / "dataset.json").is_file()


@dataclass(frozen=True)
class TrainConfig(DataConfig):
    """One training run.

    name, out: the run folder is `out/name`; without a name train-001, train-002 ...
    arch: torchvision or timm name. weights: auto, imagenet, phantom, none, or a file.
    size: side of the square input in pixels. batch_size: films a step.
    epochs: that train the network; freeze_epochs: before them, with the pretrained body kept.
    first_layers: of a pretrained body (`architectures.first_layers`), train or keep them; auto keeps those that
        learned from phantoms where the films are phantoms, too, and on real films the stem, none on few.
    lr: peak learning rate of Adam, or None to take it from lr-find. weight_decay: Adam's, decoupled.
    dropout: before the last layer. augment: strength of flips, turns, crops and contrast; 0 is none, 1 the paper's.
    patience: epochs without a better validation AUROC before training stops; 0 never stops.
    precision: of the arithmetic in training; auto is bf16 where the hardware has it, else fp32.
    checkpoint_minutes: how often a checkpoint is written within an epoch; 0 is at the end of each alone.
    target_sensitivity, target_specificity: what the threshold must reach on validation; neither is Youden's.
    prevalence: at which predictive values are told, besides that of the test films.
    track: where the run is told of as it goes on, beside its folder. track_images: show some test films there, too.
    """

    name: str | None = None
    out: str = "exports"
    arch: str = "densenet121"
    weights: str = "auto"
    size: int = 224
    batch_size: int = 16
    epochs: int = 3
    freeze_epochs: int = 1
    first_layers: str = "auto"
    lr: float | None = 1e-3
    weight_decay: float = 0.01
    dropout: float = 0.1
    augment: float = 1.0
    patience: int = 5
    precision: str = "auto"
    device: str = "auto"
    keep_checkpoints: bool = False
    checkpoint_minutes: float = 0
    target_sensitivity: float | None = None
    target_specificity: float | None = None
    prevalence: tuple[float, ...] = ()
    track: tuple[str, ...] = ()
    track_images: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prevalence", "track"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON gives a list
        for tracker in self.track:
            require(tracker in TRACKERS, "--track", tracker, f"one of {', '.join(TRACKERS)}")
        require(len(set(self.track)) == len(self.track), "--track", ", ".join(self.track), "each tracker once")
        require(bool(self.track) or not self.track_images, "--track-images", "given alone", "beside a --track")
        for flag, share in (
            ("--target-sensitivity", self.target_sensitivity),
            ("--target-specificity", self.target_specificity),
            *(("--prevalence", share) for share in self.prevalence),
        ):
            require(share is None or 0 < share < 1, flag, share, "a share above 0 and below 1")
        if self.target_sensitivity is not None and self.target_specificity is not None:
            raise UsageError(
                "--target-sensitivity and --target-specificity: a threshold can reach one of them; give one"
            )
        named = NETWORK_NAME.fullmatch(self.arch) is not None
        require(named, "--arch", self.arch, f"a name in torchvision or timm, such as {ARCHITECTURES[0]}")
        require(32 <= self.size <= 1024, "--size", self.size, "from 32 to 1024 pixels")
        require(2 <= self.batch_size <= 4096, "--batch-size", self.batch_size, "from 2 to 4096")
        require(1 <= self.epochs <= 10_000, "--epochs", self.epochs, "from 1 to 10000")
        require(0 <= self.freeze_epochs <= 1000, "--freeze-epochs", self.freeze_epochs, "from 0 to 1000")
        choices = ", ".join(FIRST_LAYERS)
        require(self.first_layers in FIRST_LAYERS, "--first-layers", self.first_layers, f"one of {choices}")
        # No upper bound below infinity: a rate that diverges is found and reported by the training itself.
        require(self.lr is None or 0 < self.lr < float("inf"), "--lr", self.lr, "a number above 0, or auto")
        require(0 <= self.weight_decay <= 10, "--weight-decay", self.weight_decay, "from 0 to 10")
        require(0 <= self.dropout < 1, "--dropout", self.dropout, "from 0 to below 1")
        require(0 <= self.augment <= 3, "--augment", self.augment, "from 0 (none) to 3 (strong); 1 is the paper's")
        require(
            0 <= self.checkpoint_minutes < float("inf"), "--checkpoint-minutes", self.checkpoint_minutes, "0 or more"
        )
        require(self.patience >= 0, "--patience", self.patience, "0 (never stop early) or more epochs")
        require(self.precision in PRECISIONS, "--precision", self.precision, f"one of {', '.join(PRECISIONS)}")
        require(self.device in DEVICES, "--device", self.device, f"one of {', '.join(DEVICES)}")
        name_ok = self.name is None or (
            self.name not in ("", ".", "..", "latest") and "/" not in self.name and "\\" not in self.name
        )
        require(name_ok, "--name", self.name, "a plain folder name, other than 'latest'")


@dataclass(frozen=True)
class SweepConfig:
    """One search for settings: what is tried, and for how long.

    train: what no trial changes; its name is the sweep's, too. Its epochs and freeze_epochs together are those of each
        trial, however they are shared between the two phases.
    trials: how many are to be finished in all, those of earlier calls and other machines included.
    minutes: after which no trial begins, nor one that would hardly end in time; None is no limit.
    archs, weights, sizes, batch_sizes: what is chosen from.
    rate_factor: how far below and above lr-find's suggestion a trial's learning rate may lie.
    storage: Optuna's, a database URL or `journal:FILE`; None is a file of SQLite in the sweep's folder.
    workers: processes. final: whether the winner is trained and tested in the end.
    """

    train: TrainConfig
    trials: int = 20
    minutes: float | None = None
    archs: tuple[str, ...] = (TrainConfig.arch,)
    weights: tuple[str, ...] = (TrainConfig.weights,)
    sizes: tuple[int, ...] = (TrainConfig.size,)
    batch_sizes: tuple[int, ...] = (TrainConfig.batch_size,)
    rate_factor: float = 4.0
    storage: str | None = None
    workers: int = 1
    final: bool = True

    def __post_init__(self) -> None:
        require(1 <= self.trials <= 100_000, "--trials", self.trials, "from 1 to 100000")
        require(self.minutes is None or 0 < self.minutes < float("inf"), "--minutes", self.minutes, "above 0")
        require(1 <= self.rate_factor <= 100, "--rate-factor", self.rate_factor, "from 1 to 100")
        require(1 <= self.workers <= 256, "--workers", self.workers, "from 1 to 256")
        require(not self.train.folds, "--folds", self.train.folds, "0: a sweep chooses on one validation set")
        where = self.storage is None or re.fullmatch("journal:.+|.+://.*", self.storage) is not None
        require(where, "--storage", repr(self.storage), "a database URL, or journal:FILE")
        choices: dict[str, tuple[Any, ...]] = {"arch": self.archs, "size": self.sizes, "batch_size": self.batch_sizes}
        for field, values in choices.items():
            require(len(set(values)) == len(values) > 0, f"--{field.replace('_', '-')}", values, "given, each once")
            for value in values:
                dataclasses.replace(self.train, **{field: value})  # checks it


def sizes_around(size: int) -> tuple[int, ...]:
    """Return a size with a smaller and a larger one, of half and twice the pixels, in steps of 32."""
    near = (round(size * factor / 32) * 32 for factor in (0.7, 1.4))
    return tuple(sorted({size, *(n for n in near if 32 <= n <= 1024)}))


def batch_sizes_around(batch_size: int) -> tuple[int, ...]:
    """Return half of a batch size, itself and twice it."""
    return tuple(sorted({max(2, batch_size // 2), batch_size, min(4096, 2 * batch_size)}))
