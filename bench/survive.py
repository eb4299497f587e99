"""Whether training survives what happens to it: kills, a full disk, signals, a diverging loss, too little memory.

    python bench/survive.py kill [--kills 50]     # SIGKILL at random moments, over epochs and saves alike
    python bench/survive.py disk | signals | nan | memory | damaged | vanish

Each prints what it found and ends with 0 only if all of it holds. Before each, a run is finished in the same folder:
after every fault it must still verify. A run that was cut off is gone on with by `train --resume`, and must end with
the weights and the history of one that never was. DenseNet121 on small phantoms, so that a run takes a minute.
"""

import argparse
import contextlib
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pandas as pd
import torch

from cxr_fastai.config import GenerateConfig
from cxr_fastai.phantom import generate
from cxr_fastai.verify import verify_run

ROOT = Path(__file__).parents[1]
EPOCHS = 4  # the frozen one, too
SETTINGS = ("--size", "64", "--epochs", str(EPOCHS - 1), "--device", "cpu")


class Place:
    """A folder with films, and the runs on them."""

    def __init__(self, folder: Path, films: int):
        self.data, self.out = folder / "films", folder / "exports"
        generate(GenerateConfig(out=str(self.data), n=films, size=96, workers=os.cpu_count()))

    def command(self, *options: str) -> list[str]:
        """Return the command of a run with more options."""
        return [sys.executable, str(ROOT / "cli.py"), "train", *options]

    def start(self, name: str, *options: str) -> list[str]:
        """Return the command that begins a run."""
        return self.command(str(self.data), "--out", str(self.out), "--name", name, *SETTINGS, *options)

    def go_on(self, name: str) -> list[str]:
        """Return the command that goes on with a run, or begins it where nothing was left of it."""
        run = self.out / name
        return self.command("--resume", str(run)) if (run / "config.json").is_file() else self.start(name)

    def finish(self, name: str) -> Path:
        """Train a run that nothing disturbs."""
        run(self.start(name), expect=0)
        return self.out / name


def run(command: list[str], expect: int, limit: int | None = None) -> str:
    """Run a command to its end, with at most `limit` bytes a file; return what it wrote to standard error."""

    def narrow() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=narrow)
    if done.returncode != expect:
        raise SystemExit(f"exit {done.returncode} instead of {expect}: {' '.join(command)}\n{done.stderr[-2000:]}")
    return done.stderr.strip()


def weights(folder: Path) -> str:
    """Return a hash of all tensors of a run's model."""
    digest = hashlib.sha256()
    for tensor in sorted(onnx.load(folder / "model.onnx").graph.initializer, key=lambda t: t.name):
        digest.update(tensor.name.encode() + onnx.numpy_helper.to_array(tensor).tobytes())
    return digest.hexdigest()[:16]


def history(folder: Path) -> pd.DataFrame:
    """Return what a run learned, epoch by epoch, without how long it took."""
    return pd.read_csv(folder / "history.csv").drop(columns="seconds")


def verifies(folder: Path) -> bool:
    """Tell whether a finished run is whole, and every figure in it follows from its files."""
    return not verify_run(folder)["problems"]


def equal(one: Path, other: Path) -> bool:
    """Tell whether two runs ended with the same weights, history and predictions."""
    same = weights(one) == weights(other), history(one).equals(history(other))
    return all(same) and (one / "predictions.csv").read_bytes() == (other / "predictions.csv").read_bytes()


def checked(name: str, holds: bool) -> bool:
    """Print one finding."""
    print(f"{'ok  ' if holds else 'FAIL'} {name}", flush=True)
    return holds


def kill(place: Place, asked: argparse.Namespace) -> bool:
    """SIGKILL runs at random moments until they end; each must equal the unbroken one."""
    began = time.monotonic()
    unbroken = place.finish("unbroken")
    whole = time.monotonic() - began
    chance, kills, holds, runs = random.Random(asked.seed), 0, True, 0
    while kills < asked.kills:
        runs += 1
        name, here = f"killed-{runs}", 0
        while True:
            process = subprocess.Popen(
                place.go_on(name), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
            wait = None
            if kills < asked.kills and here < asked.at_once:
                wait = at_random(process, place.out / name / "history.csv", chance, whole)
            try:
                _, errors = process.communicate(timeout=wait)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills, here = kills + 1, here + 1
                state = torch_state(place.out / name)
                holds &= checked(f"kill {kills}, run {runs}, {state}; the finished run verifies", verifies(unbroken))
                if (place.out / name / "manifest.json").exists():  # all was written; there is nothing to go on with
                    break
                continue
            if process.returncode:
                raise SystemExit(f"resuming {name}: exit {process.returncode}: {errors[-2000:]}")
            break
        holds &= checked(f"run {runs} after {here} kills: weights {weights(place.out / name)}, equal to the unbroken",
                         equal(place.out / name, unbroken))  # fmt: skip
        holds &= checked(f"run {runs} verifies, nothing half written is left", verifies(place.out / name) and not list(
            (place.out / name).rglob(".writing-*")))  # fmt: skip
        shutil.rmtree(place.out / name)
    print(f"{kills} kills in {runs} runs; an unbroken run takes {whole:.0f} s")
    return holds


def at_random(process: subprocess.Popen, rows: Path, chance: random.Random, whole: float) -> float:
    """Wait until a run has trained no or one more epoch, by chance, and say for how many seconds more it is to go on.

    A moment drawn over the whole run would seldom lie in training: of a short run most is starting and export.
    """

    def epochs() -> int:
        return rows.read_text().count("\n") - 1 if rows.exists() else 0

    before = epochs()
    if before == EPOCHS or chance.random() < 0.5:
        return chance.uniform(0, 0.6 * whole)  # starting, which takes a third of it, then training, tests or export
    while epochs() == before and process.poll() is None:
        time.sleep(0.05)
    return chance.uniform(0, 0.15 * whole)


def torch_state(folder: Path) -> str:
    """Say how far a killed run was, by its checkpoint, which must be whole."""
    file = folder / "checkpoints" / "last.pth"
    if not file.exists():
        return "finished, the process about to end" if (folder / "manifest.json").exists() else "before any checkpoint"
    state = torch.load(file, map_location="cpu", weights_only=True)
    return f"at {len(state['history'])} epochs"


def disk(place: Place, asked: argparse.Namespace) -> bool:
    """Let files grow to a limit that a checkpoint, and one that an export, goes beyond."""
    unbroken, holds = place.finish("unbroken"), True
    for megabytes, what in ((20, "a checkpoint"), (1, "anything")):
        said = run(place.start(f"full-{megabytes}"), expect=2, limit=megabytes * 1_000_000)
        last = said.splitlines()[-1]
        holds &= checked(f"{what} does not fit: {last}", "cannot write" in last and "MB free" in last)
        holds &= checked("the finished run verifies", verifies(unbroken))
        run(place.go_on(f"full-{megabytes}"), expect=0)
        holds &= checked("with room again it ends like the unbroken", equal(place.out / f"full-{megabytes}", unbroken))
    return holds


def signals(place: Place, asked: argparse.Namespace) -> bool:
    """Stop runs by SIGINT and SIGTERM within an epoch: exit 130, a checkpoint, and the same end."""
    unbroken, holds = place.finish("unbroken"), True
    for number in (signal.SIGINT, signal.SIGTERM):
        name = number.name.lower()
        process = subprocess.Popen(place.start(name), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while not (place.out / name / "history.csv").exists():
            time.sleep(0.05)
        time.sleep(1.0)
        process.send_signal(number)
        _, errors = process.communicate()
        holds &= checked(f"{number.name}: exit {process.returncode}, {errors.strip().splitlines()[-1]}",
                         process.returncode == 130 and "--resume" in errors)  # fmt: skip
        state = torch.load(place.out / name / "checkpoints" / "last.pth", weights_only=True)
        holds &= checked(f"its checkpoint loads, {state['films']} films into epoch {len(state['history']) + 1}", True)
        run(place.go_on(name), expect=0)
        holds &= checked("resumed, it ends like the unbroken", equal(place.out / name, unbroken))
    return holds


def nan(place: Place, asked: argparse.Namespace) -> bool:
    """Train at a rate that diverges."""
    finished = place.finish("finished")
    said = run(place.start("diverged", "--lr", "1e12"), expect=2)
    holds = checked(said.splitlines()[-1], "the loss became" in said and "smaller --lr" in said)
    left = {path.name for path in (place.out / "diverged").iterdir()}
    holds &= checked("no model is left of it", not left & {"learner.pkl", "model.onnx", "manifest.json"})
    return holds & checked("the finished run verifies, and is the latest", verifies(finished) and (
        place.out / "latest").resolve() == finished.resolve())  # fmt: skip


def memory(place: Place, asked: argparse.Namespace) -> bool:
    """Let steps of more than 4 films run out of memory after the first epoch, as an allocator says it.

    The run must end like one of the same seed that was never short. Without augmentation, dropout and rounding to bf16,
    and with a whole number of batches an epoch, only the learning rate's schedule is slightly off.
    """
    from cxr_fastai import training
    from cxr_fastai.config import TrainConfig
    from cxr_fastai.console import Console

    same = {"size": 64, "epochs": EPOCHS - 1, "device": "cpu", "augment": 0.0, "dropout": 0.0, "precision": "fp32"}
    fit = training.fit

    def train(name: str) -> tuple[int, float, float]:
        config = TrainConfig(data=str(place.data), out=str(place.out), name=name, **same)  # type: ignore[arg-type]
        folder, metrics = training.train(config, Console())
        losses = history(folder)["train_loss"]
        return len(losses), losses.iloc[-1], metrics["metrics"]["auroc"]["value"]

    def short_of_memory(*given: Any) -> None:
        rows = place.out / "short" / "history.csv"

        def weigh(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if model.training and len(inputs[0]) > 4 and rows.exists():
                raise torch.OutOfMemoryError("simulated: more than 4 films do not fit")

        scales = given[0].model.register_forward_pre_hook(weigh)
        fit(*given)
        scales.remove()

    epochs, loss, auroc = train("whole")
    training.fit = short_of_memory  # type: ignore[assignment]
    short_epochs, short_loss, short_auroc = train("short")
    holds = checked(f"16 films a step, 4 at a time: {short_epochs} epochs", short_epochs == epochs == EPOCHS)
    said = f"training loss {loss:.3f} never short, {short_loss:.3f} short"
    holds &= checked(said, abs(loss - short_loss) < 0.01)
    said = f"test AUROC {auroc:.3f} never short, {short_auroc:.3f} short"
    return holds & checked(said, abs(auroc - short_auroc) < 0.02)


def damaged(place: Place, asked: argparse.Namespace) -> bool:
    """Damage 3 films: they are named before the first epoch, and left out where that is asked for."""
    paths = sorted(place.data.rglob("images/*/*.png"))[::40][:3]
    for path in paths:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said = run(place.start("damaged"), expect=2)
    holds = checked(f"refused: {said.splitlines()[-1][:150]}...", all(path.name in said for path in paths))
    holds &= checked("nothing is left of that run", not (place.out / "damaged").exists())
    run(place.start("skipped", "--skip-bad"), expect=0)
    return holds & checked("--skip-bad trains on the others", verifies(place.out / "skipped"))


def vanish(place: Place, asked: argparse.Namespace) -> bool:
    """Remove a film while a run learns from it."""
    process = subprocess.Popen(place.start("vanished"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (place.out / "vanished" / "history.csv").exists():
        time.sleep(0.05)
    gone = pd.read_csv(place.out / "vanished" / "split.csv").query("split == 'train'")["path"].iloc[0]
    Path(gone).unlink()
    _, errors = process.communicate()
    said = errors.strip().splitlines()[-1] if errors.strip() else "nothing"
    return checked(f"exit {process.returncode}, said: {said}", process.returncode == 0)


FAULTS: dict[str, Callable[[Place, argparse.Namespace], bool]] = {
    one.__name__: one for one in (kill, disk, signals, nan, memory, damaged, vanish)
}


def main() -> None:
    """Bring about one kind of fault and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fault", choices=FAULTS)
    parser.add_argument("--films", type=int, help="200, and 320 for memory: 14 batches of 16 to learn from")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--at-once", type=int, default=10, help="kills of one run before it may end")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    films = asked.films or (320 if asked.fault == "memory" else 200)
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(ROOT):
        os.environ["CXR_CACHE"] = f"{temporary}/cache"
        holds = FAULTS[asked.fault](Place(Path(temporary), films), asked)
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
