"""Attack the inert reader of fastai exports, and compare its logits with those of `load_learner`.

    python bench/inert.py exports/latest/learner.pkl data/synthetic/images [--mutations 100000] [--prove]

1. Hostile files (`hostile_pickles.py`), watched by an audit hook: each refused, nothing run. `--prove` unpickles the
   attacks in processes of their own, to see how many do work.
2. Mutants of an honest pickle: only `ModelFileError` may come out, in less than a second and 600 MB, nothing run.
3. Changed bytes in the export: all refused.
4. Films through both: our export, and one made here as fastai's documentation does; logits within 1e-6.

The export is one of your own: part 4 loads it with `load_learner`. Exit code 1 if any of that does not hold.
"""

import argparse
import multiprocessing
import pickletools
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from hostile_pickles import Watch, archives, pickles, pieces

from cxr_fastai.errors import ModelFileError
from cxr_fastai.inert import read_export
from cxr_fastai.inert.archive import members_of
from cxr_fastai.inert.export import export_of, storages_of
from cxr_fastai.inert.instructions import walk
from cxr_fastai.inert.learner import read_learner
from cxr_fastai.inert.machine import Machine
from cxr_fastai.inert.names import refuse_attacks
from cxr_fastai.inert.network import architecture_of, layers_of
from cxr_fastai.modelfile import read_file

MAX_SECONDS, MAX_MB, MAX_LOGIT = 1.0, 600.0, 1e-6
SMALL = {"data.pkl": b"\x80\x02]q\x00.", "byteorder": b"little", "data/0": b"12345678", "version": b"3\n"}


# Honest exports


def make_learner(folder: Path, arch: str | None) -> Any:
    """Return a Learner as fastai's documentation makes one, untrained; without `arch` of a very small network."""
    from fastai.vision import all as fastai
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(12):
        path = folder / ("a", "b")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (90, 70 + 9 * i), dtype=np.uint8)).save(path)
    normalise = fastai.Normalize.from_stats(*fastai.imagenet_stats, cuda=False)
    dls = fastai.ImageDataLoaders.from_folder(
        folder, valid_pct=0.3, seed=0, bs=4, num_workers=0, item_tfms=fastai.Resize(96),
        device=fastai.torch.device("cpu"), batch_tfms=[*(fastai.aug_transforms() if arch else []), normalise],
    )  # fmt: skip
    if arch:
        return fastai.vision_learner(dls, getattr(fastai, arch), pretrained=False, metrics=fastai.accuracy)
    body = fastai.nn.Sequential(fastai.nn.Conv2d(3, 64, 7, bias=False), fastai.nn.BatchNorm2d(64))
    return fastai.Learner(dls, fastai.nn.Sequential(body, fastai.create_head(64, 2)), metrics=fastai.accuracy)


def save(learn: Any, path: Path) -> Path:
    learn.path = path.parent
    learn.export(path.name)
    return path


# 1. Hostile files


def attack(export: Path, watch: Watch, folder: Path) -> bool:
    """Read every hostile file; return whether each was refused and nothing ran."""
    from cxr_fastai.rebuild import rebuild

    canary, passed, ran, slowest = folder / "canary", [], [], 0.0
    members = members_of(read_file(export))
    rebuild(read_export(export))  # imports what reading an honest one imports
    hostile = pickles(bytes(members["data.pkl"]), str(canary))
    packed = archives(SMALL)
    for what in [*hostile, *packed]:
        path = folder / "hostile.pkl"
        if what in packed:
            path.write_bytes(packed[what]())
        else:
            data = memoryview(hostile[what]())
        began = time.perf_counter()
        with watch as events:
            try:
                if what in packed:
                    read_export(path)
                else:
                    rebuild(export_of(path, {**members, "data.pkl": data}))
                passed.append(what)
            except ModelFileError as error:
                if "\n" in str(error):
                    passed.append(f"{what} (more than one line)")
        slowest = max(slowest, time.perf_counter() - began)
        if events or canary.exists():
            ran.append(f"{what}: {events[:1]}")
    print(f"hostile files: {len(hostile) + len(packed)}, refused {len(hostile) + len(packed) - len(passed)}, "
          f"ran something {len(ran)}, slowest {slowest:.2f} s")  # fmt: skip
    for line in [*passed, *ran]:
        print(f"  NOT: {line}")
    return not passed and not ran


def prove(folder: Path) -> None:
    """Unpickle the attacks with Python's own pickle, each in its own process, and say how many ran."""
    worked = []
    for what in pieces(""):
        canary = folder / "proof"
        canary.unlink(missing_ok=True)
        (folder / "attack.pkl").write_bytes(b"\x80\x02" + pieces(str(canary))[what] + b".")
        code = f"import pickle; pickle.load(open({str(folder / 'attack.pkl')!r}, 'rb'))"
        try:
            subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False, stdin=-3)
        except subprocess.TimeoutExpired:
            continue
        if canary.exists():
            worked.append(what)
    print(f"  of {len(pieces(''))} attacks, {len(worked)} made their file when unpickled: {', '.join(worked)}")


# 2. Mutants


def mutant(number: int, data: bytes, cuts: list[int]) -> bytes:
    """Return mutant `number` of a pickle whose instructions begin at `cuts`; the same number is the same mutant."""
    rng = random.Random(number)
    parts = [data[a:b] for a, b in zip(cuts, [*cuts[1:], len(data)], strict=True)]
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
        kind = rng.randrange(8)
        if kind == 0:
            parts[i] = b""
        elif kind == 1:
            parts[i] += parts[j]
        elif kind == 2:
            parts[i], parts[j] = parts[j], parts[i]
        elif kind == 3:
            parts[i] = parts[i] * rng.choice((2, 3, 1000))
        elif kind == 4:
            parts[i:i] = parts[j : j + rng.randrange(1, 40)] * rng.choice((1, 1, 50))
        elif kind == 5:
            parts[i] = bytes([rng.randrange(256)]) + parts[i][1:]
        elif parts[i]:
            at = rng.randrange(len(parts[i]))
            byte = rng.choice((rng.randrange(256), 0, 255, 127, 128))
            parts[i] = parts[i][:at] + bytes([byte]) + parts[i][at + 1 :]
    return b"".join(parts)


def try_mutants(task: tuple[bytes, dict[str, int], dict[str, bytes], range]) -> dict[str, Any]:
    """Read a share of the mutants, as far as everything but the weights goes."""
    data, storages, numbers, share = task
    members = {key: memoryview(value) for key, value in numbers.items()}
    cuts = [at for _, _, at in pickletools.genops(data) if at is not None]
    watch, counts, bad, worst = Watch(), Counter[str](), [], (0.0, 0)
    for number in share:
        changed = mutant(number, data, cuts)
        began = time.perf_counter()
        with watch as events:
            try:
                machine = Machine(changed, storages)
                root = walk(machine)
                refuse_attacks(machine.calls)
                read_learner(root, members)
                architecture_of(layers_of(root.get("model"))[0])
                counts["read"] += 1
            except ModelFileError as error:
                counts["refused as no network" if "body" in str(error) else "refused"] += 1
                if "\n" in str(error) or len(str(error)) > 2_000:
                    bad.append(f"{number}: {error!r:.200}")
            except Exception as error:  # noqa: BLE001 - the very thing that is looked for
                bad.append(f"{number}: {error!r:.200}")
        worst = max(worst, (time.perf_counter() - began, number))
        if events:
            bad.append(f"{number}: ran {events[:1]}")
    return {"counts": counts, "bad": bad, "worst": worst, "peak": peak_mb()}


def peak_mb() -> float:
    """Return the most memory that this process has had, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent had before the start
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def mutate(export: Path, count: int, workers: int) -> bool:
    """Read mutants of an export's pickle in worker processes."""
    members = members_of(read_file(export))
    data = bytes(members["data.pkl"])
    few = {key: bytes(value) for key, value in members.items() if key.startswith("data/") and len(value) < 1_000}
    shares = [range(i, count, 4 * workers) for i in range(4 * workers)]
    began = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        found = pool.map(try_mutants, [(data, storages_of(members), few, share) for share in shares], 1)
    counts: Counter[str] = sum((f["counts"] for f in found), Counter())
    bad = [line for share in found for line in share["bad"]]
    worst, peak = max(share["worst"] for share in found), max(share["peak"] for share in found)
    print(f"mutants of {len(data):,} bytes: {dict(counts)}, slowest {worst[0]:.2f} s (number {worst[1]}), "
          f"peak {peak:.0f} MB, {time.perf_counter() - began:.0f} s in all")  # fmt: skip
    for line in bad[:20]:
        print(f"  NOT: {line}")
    return not bad and worst[0] < MAX_SECONDS and peak < MAX_MB


# 3. Changed bytes


def flip(export: Path, count: int) -> bool:
    """Change one bit of an export, again and again."""
    sound, rng, passed = read_file(export), random.Random(0), []
    for _ in range(count):
        at = rng.randrange(len(sound))
        changed = bytearray(sound)
        changed[at] ^= 1 << rng.randrange(8)
        try:
            members_of(bytes(changed))
            passed.append(at)
        except ModelFileError:
            continue
    print(f"changed bytes: {count}, refused {count - len(passed)}")
    return not passed


# 4. Parity


def parity(export: Path, films: list[str]) -> bool:
    """Compare logits and probabilities with load_learner's, film by film."""
    import torch

    from cxr_fastai.predict_export import RebuiltNetwork, unpickle_unsafely
    from cxr_fastai.rebuild import prepare

    began = time.perf_counter()
    read = read_export(export)
    network, seconds = RebuiltNetwork(read), time.perf_counter() - began
    learn = unpickle_unsafely(export)
    inputs = logits = 0.0
    for start in range(0, len(films), 16):
        some = films[start : start + 16]
        ours = np.stack([prepare(film, read) for film in some])
        theirs = torch.cat([b[0].as_subclass(torch.Tensor) for b in learn.dls.test_dl(some, num_workers=0)])
        inputs = max(inputs, float(np.abs(ours - theirs.numpy()).max()))
        # Our own films go through no grid here (see `rebuild.on_batch`), so that the same input is compared.
        with torch.no_grad():
            expected = learn.model.eval()(torch.from_numpy(ours)).numpy()
        logits = max(logits, float(np.abs(network.run(ours)["logits"] - expected).max()))
    print(f"{read.architecture}, {len(films)} films: inputs differ by {inputs:.1e}, logits by {logits:.1e}; "
          f"read and rebuilt in {seconds:.2f} s")  # fmt: skip
    return logits <= MAX_LOGIT and inputs <= (1e-3 if read.opened == "film" else MAX_LOGIT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="a learner.pkl of your own")
    parser.add_argument("films", type=Path, help="a folder of grey films")
    parser.add_argument("--n", type=int, default=64, help="films to compare")
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--prove", action="store_true")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    films = [str(path) for path in sorted(given.films.rglob("*.png"))]
    films = films[:: max(1, len(films) // given.n)][: given.n]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        other = save(make_learner(folder / "pictures", "resnet18"), folder / "other.pkl")
        tiny = save(make_learner(folder / "pictures", None), folder / "tiny.pkl")
        held = [attack(other, Watch(), folder)]
        if given.prove:
            prove(folder)
        held.append(mutate(tiny, given.mutations, given.workers))
        held.append(flip(given.export, given.flips))
        held += [parity(given.export, films), parity(other, films)]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
