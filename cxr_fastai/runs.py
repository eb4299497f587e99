"""The run folder: what a training run leaves behind, written so that a kill never damages a finished one.

    exports/NAME/   config.json split.csv history.csv history.png learner.pkl model.onnx predictions.csv
                    metrics.json report.html MODEL_CARD.md manifest.json

Every file is written to a temporary name, synced and renamed (`atomic_path`). `manifest.json` holds the SHA-256
of the others and comes last: a folder without it is not finished. `exports/latest` points to the newest that is.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cxr_fastai.errors import ModelFileError, UsageError

if TYPE_CHECKING:
    import pandas as pd

SHIPPED_WEIGHTS = Path(__file__).parent / "weights" / "densenet121-phantom.safetensors"
MANIFEST = "manifest.json"
LATEST = "latest"
TEMPORARY = ".writing-"
TORCH_WRITERS = ("inline_container", "PytorchStreamWriter")  # in what torch says when a file cannot be written
FORMULA = "=+-@\t\r"  # what a formula may begin with


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to; it takes the place of `path` only when the body ends well.

    Raises
    ------
    UsageError
        Where the folder cannot be written (full, read-only, no permission), with the path and the space left.
    """
    path = Path(path)
    # The suffix stays: writers such as matplotlib choose the format by it.
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise _cannot_write(path, error.strerror or str(error)) from error
    except RuntimeError as error:
        if not any(writer in str(error) for writer in TORCH_WRITERS):
            raise
        raise _cannot_write(path, "torch could not write all of it") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _cannot_write(path: Path, reason: str) -> UsageError:
    return UsageError(f"cannot write {path}: {reason}{_space_left(path.parent)}")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, all or nothing."""
    with atomic_path(path) as temporary:
        # A file name that is not UTF-8 reaches here as surrogates; it is written as \\udcXX.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def safe_cell(value: object) -> object:
    """Return a CSV cell that a spreadsheet will not take for a formula: a leading = + - @ gets an apostrophe."""
    text = isinstance(value, str) and value[:1] in tuple(FORMULA)
    return f"'{value}" if text else value


def read_cells(path: str | Path | IO[str]) -> "pd.DataFrame":
    """Return a CSV file that was written with `safe_cell`, every cell as the text that it was made from."""
    import pandas as pd  # a third of a second, which `predict` need not wait for

    cells = pd.read_csv(path, dtype=str, keep_default_na=False, encoding_errors="backslashreplace")
    return cells.replace(rf"^'(?=[{re.escape(FORMULA)}])", "", regex=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _space_left(folder: Path) -> str:
    try:
        return f" ({shutil.disk_usage(folder).free / 1e6:,.0f} MB free there); free some space or choose another --out"
    except OSError:
        return "; choose another --out"


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def new_run(out: str, name: str | None) -> Path:
    """Make the folder of a new run, `out/name`, or the next free `out/train-NNN`.

    Raises
    ------
    UsageError
        Where `out/name` is there already: a finished run is never written over.
    """
    root = Path(out)
    root.mkdir(parents=True, exist_ok=True)
    if name is None:
        taken = [int(m[1]) for p in root.iterdir() if (m := re.fullmatch(r"train-(\d+)", p.name))]
        name = f"train-{max(taken, default=0) + 1:03d}"
    run = root / name
    try:
        run.mkdir()
    except FileExistsError:
        raise UsageError(f"{run} is there already; choose another --name, or remove that folder") from None
    return run


def sweep_temporary(run: Path) -> None:
    """Remove what a killed run left half written."""
    for stray in run.rglob(f"{TEMPORARY}*"):
        stray.unlink()


def finish(run: Path) -> None:
    """Write the manifest of `run`, sweep its temporary files and let `latest` point to it."""
    sweep_temporary(run)
    files = sorted(p for p in run.rglob("*") if p.is_file() and p.name != MANIFEST)
    hashes = {p.relative_to(run).as_posix(): sha256(p) for p in files}
    write_text(run / MANIFEST, json.dumps({"sha256": hashes}, indent=1))
    pointer = run.parent / f"{TEMPORARY}{os.getpid()}-{LATEST}"
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(run.name)
    except OSError:  # a file system without links
        pointer.write_text(run.name, encoding="utf-8")
    pointer.replace(run.parent / LATEST)


def find_run(run: str | Path) -> Path:
    """Return the folder of a finished run; `exports/latest` is followed to the run that it points to.

    Raises
    ------
    ModelFileError
        Where there is no run, or the run never finished.
    """
    folder = Path(run)
    if folder.is_file() and folder.name == LATEST:
        folder = folder.parent / folder.read_text(encoding="utf-8").strip()
    if not folder.is_dir():
        raise ModelFileError(f"{run}: no run there; train one first (python cli.py train), or name another")
    if not (folder / MANIFEST).is_file():
        raise ModelFileError(f"{run}: that run did not finish (it has no {MANIFEST}); train again, or name another")
    return folder.resolve()


def find_model(model: str | Path) -> Path:
    """Return the model.onnx meant by `model`: an .onnx file itself, or the folder of a finished run."""
    path = Path(model)
    if path.suffix == ".onnx" and path.is_file():
        return path
    if path.is_file() and path.name != LATEST:
        raise ModelFileError(f"{model}: not a model; give an .onnx file or a run folder such as exports/latest")
    return find_run(path) / "model.onnx"
