"""Read every awkward or hostile file of a corpus and compare what comes out with what its manifest expects.

    python shared/badinputs/make_handmade.py /tmp/handmade
    python bench/badinputs.py --corpus shared/badinputs --handmade /tmp/handmade

A corpus is a folder with `manifest.csv` and `files/`, or with `handmade.csv` beside its files: file, kind, expect and,
where the pixels must equal another file's, same_as and tol (mean absolute difference, 8-bit scale, 224 px). Every file
is read in a worker process that is replaced when it hangs or dies. Exit code 1 if a file is not as expected, takes
longer or more memory than the limits below, or prints anything.
"""

import argparse
import csv
import multiprocessing
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from cxr_fastai.errors import UnreadableImage
from cxr_fastai.images import read_film, resize

MAX_SECONDS, MAX_MB, HANG = 5.0, 600.0, 30.0
CANARIES = ("eps_ran_canary", "pwned")
# Rows that only a model that knows chest films can flag. Listed apart: due from the out-of-distribution score.
NEEDS_A_MODEL = ("flip_lr.png",)


@dataclass
class Row:
    """One file of a corpus, what is expected of it and what came out."""

    path: Path
    kind: str
    expect: str
    same_as: Path | None
    tolerance: float
    got: str = "crash"
    detail: str = ""
    flags: tuple[str, ...] = ()
    seconds: float = 0.0
    megabytes: float = 0.0
    printed: str = ""
    small: Any = field(default=None, repr=False)


def load(folder: Path) -> list[Row]:
    """Read a corpus folder's list."""
    handmade = folder / "handmade.csv"
    files = folder if handmade.exists() else folder / "files"
    rows = []
    with (handmade if handmade.exists() else folder / "manifest.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            same_as = files / line["same_as"] if line.get("same_as") else None
            path = files / os.fsdecode(
                line["file"].replace("\\xff\\xfe", "\udcff\udcfe").encode("utf-8", "surrogateescape")
            )
            rows.append(Row(path, line["kind"], line["expect"], same_as, float(line.get("tol") or 256)))
    return rows


def peak_megabytes() -> float:
    """Read the most memory this process has held since `clear_refs` was written to."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def work(pipe: Connection, printed: Path) -> None:
    """Read the paths that come through the pipe, one by one, in a process of its own."""
    catch = os.open(printed, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(catch, 1)
    os.dup2(catch, 2)
    while (path := pipe.recv()) is not None:
        Path("/proc/self/clear_refs").write_text("5")
        before, start = os.fstat(catch).st_size, time.monotonic()
        small: Any = None
        flags: tuple[str, ...] = ()
        try:
            film = read_film(path)
            got, detail, flags, small = "predict", "", film.flags, resize(film.pixels, 224)
        except UnreadableImage as error:
            got, detail = "refuse", str(error)
        except BaseException as error:  # noqa: BLE001 - that nothing else comes out is what is tested
            got, detail = "traceback", f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - start
        said = os.pread(catch, 200, before).decode("utf-8", "replace")
        pipe.send((got, detail, flags, seconds, peak_megabytes(), said, small))


class Worker:
    """A process that reads one file after another, and is replaced when it hangs or dies."""

    def __init__(self, printed: Path):
        self.printed = printed
        self.start()

    def start(self) -> None:
        """Start a fresh process."""
        self.pipe, other = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(
            target=work, args=(other, self.printed), daemon=True
        )
        self.process.start()
        other.close()

    def read(self, row: Row) -> None:
        """Fill in what comes out for one row."""
        start = time.monotonic()
        self.pipe.send(row.path)
        try:
            if not self.pipe.poll(HANG):
                raise TimeoutError
            row.got, row.detail, row.flags, row.seconds, row.megabytes, row.printed, row.small = self.pipe.recv()
        except (EOFError, TimeoutError) as error:
            row.got = "hang" if isinstance(error, TimeoutError) else "crash"
            row.seconds = time.monotonic() - start
            self.process.kill()
            self.start()


def miss(row: Row, references: dict[Path, np.ndarray]) -> str:
    """Say what is wrong with a row, or nothing."""
    if row.got not in ("predict", "refuse"):
        return row.got
    if row.seconds > MAX_SECONDS or row.megabytes > MAX_MB:
        return f"{row.seconds:.1f} s, {row.megabytes:.0f} MB"
    if row.printed:
        return f"printed {row.printed!r}"
    if row.got == "refuse":
        return "refused" if row.expect == "predict" else "" if row.detail.isprintable() else "unprintable reason"
    if row.expect == "refuse":
        return "predicted"
    if row.expect == "warn" and not row.flags:
        return "no flag"
    if row.same_as in references and row.expect == "predict":
        difference = float(np.abs(row.small - references[row.same_as]).mean()) * 255
        if difference > row.tolerance:
            return f"pixels differ by {difference:.1f} of 255, more than {row.tolerance:g}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, action="append", default=[], help="folder with manifest.csv and files/")
    parser.add_argument("--handmade", type=Path, action="append", default=[], help="folder that make_handmade.py wrote")
    parser.add_argument("--list", action="store_true", help="print every row")
    options = parser.parse_args()
    rows = [row for folder in options.corpus + options.handmade for row in load(folder)]
    worker = Worker(Path(f"/tmp/badinputs-printed-{os.getpid()}"))
    for row in rows:
        worker.read(row)
    worker.pipe.send(None)
    worker.process.join(10)
    worker.printed.unlink()
    references = {row.path: row.small for row in rows if row.small is not None}
    wrong = {id(row): what for row in rows if (what := miss(row, references))}
    later = [row for row in rows if id(row) in wrong and row.path.name.endswith(NEEDS_A_MODEL)]
    due = [row for row in rows if id(row) in wrong and row not in later]
    print("expect     files  as expected  read  refused   worst s  worst MB")
    for expect in sorted({row.expect for row in rows}):
        group = [row for row in rows if row.expect == expect]
        got = Counter(row.got for row in group)
        right, read, refused = sum(id(r) not in wrong for r in group), got["predict"], got["refuse"]
        seconds, megabytes = max(r.seconds for r in group), max(r.megabytes for r in group)
        print(f"{expect:9s} {len(group):6d} {right:12d} {read:5d} {refused:8d} {seconds:9.2f} {megabytes:9.0f}")
    for title, group in (("Not as expected", due), ("Due from an out-of-distribution model", later)):
        print(f"{title}: {len(group)}")
        for row in group:
            print(f"  {row.expect:8s}{str(row.path)[-70:]!r}: {wrong[id(row)]} {row.detail}")
    if options.list:
        for row in rows:
            cost = f"{row.seconds:6.2f} s {row.megabytes:5.0f} MB"
            print(f"{row.expect:8s}{row.got:8s}{cost} {row.path.name[-60:]!r} {row.flags} {row.detail}")
    here = [name for name in CANARIES if Path(name).exists()]
    print("Side effects:", here or "none")
    return 1 if due or here else 0


if __name__ == "__main__":
    sys.exit(main())
