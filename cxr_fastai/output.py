"""Rows -> a file of CSV, JSON lines or Parquet, one row a film, which a kill never leaves half written.

While a run goes on, its rows are appended to a journal beside the file, FILE.part: JSON, one line a film. When all is
done the journal becomes FILE, which appears whole or not at all. `--resume` keeps what the journal holds of the same
films, model and settings, and goes on from there. Memory does not grow with the number of films.
"""

import csv
import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from cxr_fastai.errors import UsageError
from cxr_fastai.metrics.conformal import listed
from cxr_fastai.predict import Prediction
from cxr_fastai.runs import atomic_path, safe_cell

FORMATS = (".csv", ".jsonl", ".parquet")
GROUP = 5000  # rows of Parquet in memory at a time
TEXT = ("path", "label", "flags", "error", "set")


def check_format(path: Path) -> None:
    """Raise UsageError where the ending of `path` is none of `FORMATS`, or its library is not installed."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--out is {path}, but must end in {', '.join(FORMATS)}")
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise UsageError(f"--out is {path}, and Parquet needs pyarrow: pip install pyarrow") from None


class Journal:
    """The rows of a run so far, on disk.

    Parameters
    ----------
    path
        The file wanted in the end; the journal is `path` with `.part` after it.
    job
        What must be the same for a run to go on: films, model, settings. Any JSON value.
    resume
        Whether to go on where a run of the same job stopped; else what it left is written over.

    Raises
    ------
    UsageError
        Where there is a journal of another job to resume, or the folder cannot be written.
    """

    def __init__(self, path: Path, job: Any, resume: bool):
        self.path, self.part = path, path.with_name(path.name + ".part")
        self.job = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
        self.done = 0
        try:
            self.part.parent.mkdir(parents=True, exist_ok=True)
            kept = self._kept() if resume and self.part.exists() else 0
            self._file = self.part.open("r+b" if kept else "wb")
            self._file.truncate(kept)
            self._file.seek(kept)
            if not kept:
                self._file.write(json.dumps({"job": self.job}).encode() + b"\n")
        except OSError as error:
            raise UsageError(f"cannot write {self.part}: {error.strerror}; choose another --out") from error

    def _kept(self) -> int:
        """Count the rows of an earlier run, and return how many bytes of its journal are whole lines."""
        kept = 0
        with self.part.open("rb") as file:
            head = file.readline()
            if not head.endswith(b"\n"):
                return 0  # killed before the first row
            if head != json.dumps({"job": self.job}).encode() + b"\n":
                raise UsageError(
                    f"{self.part} is of another run (other films, model or settings); repeat that run's options, or "
                    "start anew without --resume"
                )
            kept = len(head)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                kept += len(line)
                self.done += 1
        return kept

    def write(self, row: Prediction) -> None:
        """Append a row and have the system take it, so that a kill of this process does not lose it."""
        try:
            # Surrogates of names that are not UTF-8 survive as \\udcXX: json escapes all that is not ASCII.
            self._file.write(row.to_json().encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise UsageError(
                f"cannot write {self.part}: {error.strerror}; free some space and go on with --resume"
            ) from error

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield all rows written so far, of earlier runs too."""
        with self.part.open("rb") as file:
            file.readline()
            for line in file:
                yield json.loads(line)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def finish(self, card: Mapping[str, Any]) -> None:
        """Make the file that was wanted out of the journal, and remove the journal; `card` is the model's."""
        writer = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}[self.path.suffix.lower()]
        with atomic_path(self.path) as temporary, temporary.open("wb") as file:
            writer(file, self.rows(), card)
        self.part.unlink()


def _flat(row: dict[str, Any], card: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as cells: one probability a class; what has parts as text."""
    p = row["probabilities"]
    threshold, held = row["threshold"], listed(row["set"])
    return {
        "path": row["path"],
        "frame": row["frame"],
        "label": row["label"],
        "probability": row["probability"],
        **{f"p_{name}": p.get(name) for name in card["classes"]},
        "threshold": json.dumps(threshold) if isinstance(threshold, dict) else threshold,
        "flags": " ".join(row["flags"]),
        "error": row["error"],
        "seconds": row["seconds"],
        "unlike": row["unlike"],
        "spread": row["spread"],
        "set": None if held is None else "|".join(held),
    }


def _write_csv(file: IO[bytes], rows: Iterable[dict[str, Any]], card: Mapping[str, Any]) -> None:
    text = io.TextIOWrapper(file, "utf-8", "backslashreplace", newline="")  # type: ignore[type-var]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_flat(Prediction("").to_dict(), card))
    writer.writerows([safe_cell(cell) for cell in _flat(row, card).values()] for row in rows)
    text.detach()  # flushed, and the file left open


def _write_jsonl(file: IO[bytes], rows: Iterable[dict[str, Any]], card: Mapping[str, Any]) -> None:
    file.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def _write_parquet(file: IO[bytes], rows: Iterable[dict[str, Any]], card: Mapping[str, Any]) -> None:
    import pyarrow
    import pyarrow.parquet

    names = list(_flat(Prediction("").to_dict(), card))
    text = {*TEXT, "threshold"} if card["task"] == "multilabel" else TEXT
    types = {name: pyarrow.string() if name in text else pyarrow.float64() for name in names}
    schema = pyarrow.schema(list((types | {"frame": pyarrow.int32()}).items()))
    cells = (_flat(row, card) for row in rows)
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        while several := list(itertools.islice(cells, GROUP)):
            for row in several:
                row["path"] = row["path"].encode("utf-8", "backslashreplace").decode()
            writer.write_table(pyarrow.Table.from_pylist(several, schema))
