"""Settings in a TOML file, for people: `train --config FILE.toml`, and what a sweep found best.

    lr = 0.0012
    size = 160
    prevalence = [0.05, 0.2]

A setting that the file does not name keeps its default; a command-line option goes before the file. Paths are taken
as they stand, from the folder in which the command runs. Standard library only.
"""

import dataclasses
import json
import tomllib
import types
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from cxr_fastai.config import TrainConfig
from cxr_fastai.errors import UsageError

AUTO = "auto"  # of the learning rate: TOML has no word for None
WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", tuple: "a list of numbers"}


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings of a TOML file as `TrainConfig` takes them.

    Raises
    ------
    UsageError
        Where the file cannot be read, or holds a setting that there is not, or a value of another kind.
    """
    flag = f"--config {path}"
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{flag}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # TOML's own error, and text that is not UTF-8
        raise UsageError(f"{flag}: not a TOML file ({error})") from error
    kinds = get_type_hints(TrainConfig)
    if unknown := sorted(set(found) - set(kinds)):
        raise UsageError(f"{flag}: unknown setting {', '.join(unknown)}; known are {', '.join(sorted(kinds))}")
    return {name: _checked(flag, name, value, kinds[name]) for name, value in found.items()}


def _checked(flag: str, name: str, value: Any, kind: Any) -> Any:
    if name == "lr" and value == AUTO:
        return None
    allowed = [k for k in (get_args(kind) if isinstance(kind, types.UnionType) else (kind,)) if k is not type(None)]
    wanted = get_origin(allowed[0]) or allowed[0]
    numbers = value if wanted is tuple and isinstance(value, list) else [value]
    number = float if wanted in (tuple, float) else wanted
    # In Python True is a number, in a file of settings it is not; a whole number will do for any.
    fits = all(type(v) is number or (number is float and type(v) is int) for v in numbers)
    if not fits or (wanted is tuple and not isinstance(value, list)):
        raise UsageError(f"{flag}: {name} is {value!r}, but must be {WORDS[wanted]}")
    return tuple(numbers) if wanted is tuple else number(value)


def to_toml(config: TrainConfig, leave_out: tuple[str, ...] = ()) -> str:
    """Return a config as TOML text that `read_settings` reads; what is None, or named in `leave_out`, is left out."""
    settings = dataclasses.asdict(config)
    lr = settings["lr"]
    settings["lr"] = AUTO if lr is None else lr
    return "".join(
        f"{name} = {_as_toml(value)}\n"
        for name, value in settings.items()
        if value is not None and name not in leave_out
    )


def _as_toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_toml, value))}]"
    # JSON's strings, numbers and words are TOML's, but for the one character that TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
