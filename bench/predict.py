"""How fast `predict` is, how much memory it takes, and what a kill costs, against fastai on the same films.

    python bench/predict.py cold --run exports/latest --film FILM
    python bench/predict.py rate --run exports/latest [--n 1000] [--rounds 2]
    python bench/predict.py memory --run exports/latest [--n 20000]
    python bench/predict.py kill --run exports/latest [--n 20000] [--kills 10]

cold: one film, a new process each time, against `load_learner` and `predict` in another (at most 1.2 s, and at least 5
times faster).
rate: films a second of `predict` (auto and fp32) against the bare onnxruntime session on decoded arrays (at least 90
%), fastai's `get_preds` with a DataLoader (3 times) and a loop over `learn.predict` (4 times), in turns; last, how near
the network comes to what this processor multiplies in large matrices.
memory: resident memory of `predict` over links to few films, after the first 1,000 rows (at most 30 MB more).
kill: the same, killed at random and resumed: each film once, and all but the seconds equal to an unbroken run.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from cxr_fastai.config import GenerateConfig, usable_cores
from cxr_fastai.console import Console
from cxr_fastai.images import read_radiograph, to_input
from cxr_fastai.modelfile import read_model
from cxr_fastai.phantom import generate
from cxr_fastai.predict import Predictor

ROOT = Path(__file__).parents[1]
COLD_SECONDS, COLD_RATIO = 1.2, 5.0
OF_BARE, OF_PREDS, OF_LOOP = 0.9, 3.0, 4.0
GROWTH_MB, WARM_ROWS = 30.0, 1000
GFLOP = 5.67  # of one film through DenseNet121 at 224 pixels (2.83 billion multiplications and additions)
LOOP = """
import sys
from fastai.vision.all import load_learner
learn = load_learner(sys.argv[1])
with learn.no_bar():
    print(learn.predict(sys.argv[2])[2])
"""


def seconds_of(command: list[str]) -> float:
    """Run a command and return its wall time."""
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return time.perf_counter() - began


def cold(options: argparse.Namespace) -> bool:
    """One film in a new process, ours and fastai's in turns."""
    film = options.film or str(next(Path("data/synthetic/images/abnormal").glob("*.png")))
    ours = [sys.executable, "cli.py", "predict", film, "--model", options.run, "--json"]
    theirs = [sys.executable, "-W", "ignore", "-c", LOOP, f"{options.run}/learner.pkl", film]
    times = [(seconds_of(ours), seconds_of(theirs)) for _ in range(options.rounds + 1)][1:]
    a, b = np.median(times, axis=0)
    code = f"import sys; sys.argv = {['cxr', *ours[2:]]!r}\ntry:\n from cxr_fastai.cli import main; main()\nfinally:\n"
    code += " print(*sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'fastai', 'torchvision', 'pandas'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    heavy = done.stdout.splitlines()[-1]
    ours_times = [own for own, _ in times]
    print(f"cold: predict {a:.2f} s ({min(ours_times):.2f} to {max(ours_times):.2f}), "
          f"load_learner and predict {b:.2f} s: {b / a:.1f} times; heavy modules: {heavy or 'none'}")  # fmt: skip
    return a <= COLD_SECONDS and b / a >= COLD_RATIO and not heavy


def rate_of(work: Callable[[], object], n: int) -> float:
    """Return films a second of one piece of work."""
    began = time.perf_counter()
    work()
    return n / (time.perf_counter() - began)


def rate(options: argparse.Namespace) -> bool:
    """Films a second of everything, in turns."""
    import onnxruntime
    import torch
    from fastai.vision.all import load_learner

    with tempfile.TemporaryDirectory() as folder:
        generate(GenerateConfig(out=f"{folder}/set", n=options.n, seed=77))
        paths = sorted(str(path) for path in Path(f"{folder}/set/images").rglob("*.png"))
        path, data, card, _ = read_model(options.run)
        arrays = np.stack([to_input(read_radiograph(film), card["size"]) for film in paths])[:, None]
        bare = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        learn = load_learner(path.parent / "learner.pkl")
        auto, fp32 = Predictor(options.run, precision="auto"), Predictor(options.run)
        batches = np.array_split(arrays, max(1, len(arrays) // 16))
        few = paths[: max(1, options.n // 10)]

        def get_preds() -> None:
            with learn.no_bar():
                learn.get_preds(dl=learn.dls.test_dl(paths, bs=16, num_workers=usable_cores()))

        def loop() -> None:
            with learn.no_bar():
                for film in few:
                    learn.predict(film)

        works: dict[str, tuple[Callable[[], object], int]] = {
            "bare": (lambda: [bare.run(None, {"pixels": batch}) for batch in batches], options.n),
            "auto": (lambda: list(auto.predict(paths)), options.n),
            "fp32": (lambda: list(fp32.predict(paths)), options.n),
            "get_preds": (get_preds, options.n),
            "loop": (loop, len(few)),
        }
        rates: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(options.rounds):
            for name, (work, n) in works.items():
                rates[name].append(rate_of(work, n))
    r = {name: float(np.median(found)) for name, found in rates.items()}
    print(f"rate over {options.n} films, films a second: bare onnxruntime {r['bare']:.1f}, predict "
          f"{auto.engines[0].precision} {r['auto']:.1f}, predict fp32 {r['fp32']:.1f}, get_preds {r['get_preds']:.1f}, "
          f"learn.predict {r['loop']:.1f}")  # fmt: skip
    best = {"bare": r["auto"] / r["bare"], "get_preds": r["auto"] / r["get_preds"], "loop": r["auto"] / r["loop"]}
    print(f"  predict is {best['bare']:.2f} of bare (fp32 {r['fp32'] / r['bare']:.2f}), {best['get_preds']:.1f} times "
          f"get_preds (fp32 {r['fp32'] / r['get_preds']:.1f}), {best['loop']:.1f} times learn.predict")  # fmt: skip
    torch.set_num_threads(usable_cores())
    for kind in (torch.float32, torch.bfloat16):
        a = torch.rand(2048, 2048, dtype=kind)
        peak = rate_of(lambda a=a: [a @ a for _ in range(20)], 20) * 2 * 2048**3 / 1e9
        own = r["auto" if kind == torch.bfloat16 else "fp32"] * GFLOP
        print(f"  {kind}: large matrices {peak:.0f} GFLOP/s, predict {own:.0f} GFLOP/s: {own / peak:.0%} of that")
    return best["bare"] >= OF_BARE and best["get_preds"] >= OF_PREDS and best["loop"] >= OF_LOOP


def links(folder: Path, n: int) -> Path:
    """Make `n` links to 50 phantoms and to one file that is no film."""
    generate(GenerateConfig(out=str(folder / "set"), n=50, seed=78))
    films = sorted((folder / "set" / "images").rglob("*.png"))
    (folder / "bad.png").write_bytes(b"no film")
    films.append(folder / "bad.png")
    (folder / "many").mkdir()
    for i in range(n):
        (folder / "many" / f"{i:06d}.png").symlink_to(films[i % len(films)].resolve())
    return folder / "many"


def start(run: str, films: Path, out: Path, *more: str) -> subprocess.Popen:
    """Start `predict` over a folder."""
    command = [sys.executable, "cli.py", "predict", str(films), "--model", run, "--out", str(out), *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def rows_in(part: Path) -> int:
    """Count the rows of a journal."""
    return part.read_bytes().count(b"\n") - 1 if part.exists() else 0


def memory(options: argparse.Namespace) -> bool:
    """Watch the resident memory of one long run."""
    with tempfile.TemporaryDirectory() as name, Console().progress("predict", options.n) as advance:
        folder = Path(name)
        films, out, seen = links(folder, options.n), folder / "rows.jsonl", 0
        process, sizes = start(options.run, films, out), []
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(0.5)
            rows = rows_in(folder / "rows.jsonl.part")
            for _ in range(rows - seen):
                advance()
            seen = max(rows, seen)
            if rows >= WARM_ROWS and watched.is_running() and watched.status() != psutil.STATUS_ZOMBIE:
                sizes.append(watched.memory_info().rss / 1e6)
        lines = len(out.read_text().splitlines())
    growth = max(sizes) - sizes[0]
    print(f"memory: {lines} rows for {options.n} films (exit {process.returncode}); {sizes[0]:.0f} MB after "
          f"{WARM_ROWS}, at most {max(sizes):.0f} MB later: {growth:+.1f} MB")  # fmt: skip
    return lines == options.n and process.returncode == 1 and growth < GROWTH_MB


def told(out: Path) -> list[dict]:
    """Return the rows of a file without their seconds."""
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def kill(options: argparse.Namespace) -> bool:
    """Kill a run at random and go on, until it is done."""
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        films = links(folder, options.n)
        whole, broken = folder / "whole.jsonl", folder / "broken.jsonl"
        began = time.perf_counter()
        start(options.run, films, whole).wait()
        unbroken = time.perf_counter() - began  # with the start; half of it is spent between kills
        kills = 0
        while not broken.exists():
            process = start(options.run, films, broken, "--resume")
            try:
                process.wait(rng.uniform(0, unbroken / options.kills) if kills < options.kills else None)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
        a, b = told(whole), told(broken)
    once = len({row["path"] for row in b}) == len(b) == options.n
    print(f"kill: {kills} kills, {len(b)} rows, each film once: {once}; equal to the unbroken run: {a == b}")
    return once and a == b and kills == options.kills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cold", "rate", "memory", "kill"])
    parser.add_argument("--run", default="exports/latest")
    parser.add_argument("--film")
    parser.add_argument("--n", type=int)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.n = options.n or {"rate": 1000}.get(options.what, 20_000)
    options.rounds = 5 if options.what == "cold" and options.rounds == 2 else options.rounds
    good = {"cold": cold, "rate": rate, "memory": memory, "kill": kill}[options.what](options)
    print("ok" if good else "FAILS")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
