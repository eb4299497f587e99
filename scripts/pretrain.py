"""Pretrain DenseNet121 on endless phantoms, each seen once, and write the weights that ship with the package.

    python scripts/pretrain.py --out DIR --size 128 --images 200000
    python scripts/pretrain.py --out DIR --size 224 --images 20000 --decay
    python scripts/pretrain.py --out DIR --export cxr_fastai/weights/densenet121-phantom.safetensors
    python scripts/pretrain.py --out DIR --start FILE.safetensors --seed 1 --minutes 5 --batch 128 --rate 2e-3 \
        --workers 15 --shards 1 --device cuda
    python scripts/pretrain.py --judge FILE.safetensors

Each call is a stage that goes on from DIR/checkpoint.pt: warm-up, then a constant rate, which `--decay` takes down to
zero over its stage (Hu et al., MiniCPM, 2024). A stage ends after `--images` films or `--minutes`, whichever comes
first, and decays by whichever it is given (by time, if both). `--start` begins a new run with exported weights.
SIGTERM or Ctrl-C saves and ends; `--resume` ends the stage that was cut off. Out: DIR/checkpoint.pt, DIR/log.jsonl, and
by `--export` the averaged weights with a card and the log beside them. `--judge` measures exported weights.

The network learns which of the eight findings a film shows, where (on the grid of the last features: the evidence
must point at the finding), its view and the size of the heart. All chance of a film comes from the seed and its number
(see pretrain_films.py), so that no film comes twice, and on a CPU with `--shards 1` a resumed run goes on exactly.
(Several shards update the statistics of the norms as they come; `--minutes` follow the clock.)
"""

import copy
import hashlib
import json
import os
import platform
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import typer
from pretrain_films import HELD_OUT, TRAINING, Batches
from safetensors import safe_open
from safetensors.torch import load_file, save

from cxr_fastai.config import usable_cores
from cxr_fastai.data import normalised
from cxr_fastai.errors import UsageError
from cxr_fastai.metrics import auroc
from cxr_fastai.model import EvidenceHead
from cxr_fastai.phantom import FINDINGS, GENERATOR_VERSION
from cxr_fastai.runs import atomic_path, write_text

N_HELD_OUT = 400
HELD_OUT_BATCH = 50
SPREAD_OUT = ("Cardiomegaly", "Edema")  # findings that no one place shows
WARM_UP = 6400  # films
EMA = 0.995  # a step
WEIGHT_DECAY = 0.05
LOSS_WEIGHTS = {"findings": 1.0, "places": 4.0, "view": 0.1, "heart": 0.2}
SAVE_SECONDS = 180.0
CHECK_EVERY, CHECK_SECONDS = 6000, 45.0  # films and seconds that must both have passed before the next judging
ENDLESS = 10**9  # films of a stage that only time ends


class Pretrainer(torch.nn.Module):
    """torchvision's DenseNet121 under the evidence head, and what is learned beside the findings."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torchvision.models.densenet121(weights=None).features
        self.findings = EvidenceHead(1024, len(FINDINGS), dropout=0.0)
        self.extra = torch.nn.Linear(1024, 2)  # view, heart
        torch.nn.init.zeros_(self.findings.linear.bias)
        # The evidence of a place, scaled and shifted, is the logit of the finding being there: a nodule fills one
        # place of 49, so that the mean over places and the place itself need scales of their own.
        self.scale = torch.nn.Parameter(torch.full((len(FINDINGS), 1, 1), -1.0))
        self.shift = torch.nn.Parameter(torch.full((len(FINDINGS), 1, 1), -3.0))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Films (N, 1, S, S) in [0, 1] -> logits (N, 8), logits of places (N, 8, S/32, S/32), view and heart (N, 2)."""
        whole = normalised(pixels).contiguous(memory_format=torch.channels_last)
        with torch.autocast(pixels.device.type, torch.bfloat16, cache_enabled=False):  # shards must not share casts
            features = self.features(whole)
        features = features.float()
        evidence = self.findings.evidence(features) * (features.shape[2] * features.shape[3])
        return (
            self.findings(features),
            evidence * self.scale.exp() + self.shift,
            self.extra(EvidenceHead.pool(features)),
        )

    def losses(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the parts of the loss, unweighted."""
        logits, places, extra = self(batch["pixels"])
        known = batch["known"]

        def bce(given: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
            return F.binary_cross_entropy_with_logits(given, truth, reduction="none")

        return {
            "findings": (bce(logits, batch["findings"]) * known).mean(),
            "places": (bce(places, batch["places"]) * known[:, :, None, None]).mean(),
            "view": bce(extra[:, 0], batch["view"]).mean(),
            "heart": F.smooth_l1_loss(extra[:, 1], batch["heart"]),
        }


@torch.no_grad()
def judge(model: Pretrainer, films: list[dict[str, torch.Tensor]], device: str) -> dict[str, Any]:
    """Measure a model on held-out films: AUROC of any finding and of each, and how often the evidence points right."""
    model.eval()
    out = [tuple(t.cpu() for t in model(batch["pixels"].to(device))) for batch in films]
    model.train()
    logits, evidence, extra = (torch.cat(parts) for parts in zip(*out, strict=True))
    truth, places = (torch.cat([batch[key] for batch in films]) for key in ("findings", "places"))
    any_finding = 1 - (1 - logits.double().sigmoid()).prod(1)  # noisy-or
    local = torch.tensor([name not in SPREAD_OUT for name in FINDINGS])
    shown = (places.flatten(2).amax(2) > 0) & local
    target = places.flatten(2)[shown] > 0.1
    hits = target.gather(1, evidence.flatten(2)[shown].argmax(1, keepdim=True)).float().mean()
    each = {name: round(float(auroc(truth[:, k], logits[:, k])), 4) for k, name in enumerate(FINDINGS)}
    return {
        "auroc_any": round(float(auroc(truth.amax(1), any_finding)), 4),
        "auroc_mean": round(float(np.mean(list(each.values()))), 4),
        "auroc": each,
        "auroc_view": round(float(auroc(torch.cat([batch["view"] for batch in films]), extra[:, 0])), 4),
        "pointing": round(float(hits), 4),
        "pointed_at": int(shown.sum()),
        "pointing_by_chance": round(float(target.float().mean()), 4),
    }


def held_out(seed: int, size: int) -> list[dict[str, torch.Tensor]]:
    """Draw the phantoms held out of a seed, a process a core."""
    films = torch.utils.data.DataLoader(
        Batches(seed, HELD_OUT, size, HELD_OUT_BATCH), batch_size=None, sampler=range(N_HELD_OUT // HELD_OUT_BATCH),
        num_workers=min(usable_cores(), N_HELD_OUT // HELD_OUT_BATCH), worker_init_fn=begin_worker,
    )  # fmt: skip
    return list(films)


def judge_weights(weights: dict[str, torch.Tensor], seed: int, size: int) -> dict[str, Any]:
    """Measure exported weights on phantoms held out; of a film's view they know nothing any more."""
    model = Pretrainer()
    fill(model, weights, "the weights")
    return {key: value for key, value in judge(model, held_out(seed, size), "cpu").items() if key != "auroc_view"}


def fill(model: Pretrainer, weights: dict[str, torch.Tensor], name_of: str) -> None:
    """Take the network and the heads of the findings from exported weights."""
    known = model.state_dict()
    given = {name.replace("findings.", "findings.linear."): value for name, value in weights.items()}
    wanted = {name for name in known if name.startswith(("features.", "findings."))}
    lacking = wanted - given.keys()
    other = [name for name in wanted & given.keys() if given[name].shape != known[name].shape]
    if lacking or other:
        name = sorted(lacking or other)[0]
        raise UsageError(f"{name_of} do not fit: {name} is missing or of another shape")
    model.load_state_dict({name: given[name] for name in wanted}, strict=False)


class Run:
    """A pretraining under way in a folder: network, its average, optimizer and counters, saved whole."""

    def __init__(self, out: Path, seed: int, device: str):
        torch.manual_seed(seed)
        self.out, self.device = out, device
        self.model = Pretrainer().to(device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        matrices = [p for p in self.model.parameters() if p.ndim in (2, 4)]
        others = [p for p in self.model.parameters() if p.ndim not in (2, 3, 4)]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": others},
            # Not in exported weights: a run that starts from those finds them in hundreds of steps, not in thousands.
            {"params": [self.model.scale, self.model.shift], "faster": 10.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
        self.at: dict[str, Any] = {"seed": seed, "seen": 0, "steps": 0, "seconds": 0.0, "stages": []}
        if self.checkpoint.is_file():
            # By way of the CPU, where Adam's counts must stay: on a GPU each step would wait for each of them.
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            for part in ("model", "average", "optimizer"):
                getattr(self, part).load_state_dict(state[part])
            self.at = state["at"]

    @property
    def checkpoint(self) -> Path:
        """Where the run is saved. Nothing is drawn outside the films, so that their number is the state of chance."""
        return self.out / "checkpoint.pt"

    def start_from(self, path: Path) -> None:
        """Take the network and the heads of the findings from exported weights, and record which."""
        for network in (self.model, self.average):
            fill(network, load_file(path), f"--start: the weights in {path}")
        with safe_open(path, "pt") as opened:
            record = opened.metadata() or {}
        seen = record.get("images_seen", "an unknown number of")
        if str(self.at["seed"]) in [value for key, value in record.items() if key.split("_")[-1] == "seed"]:
            raise UsageError(f"--start: {path} has seen the films of seed {self.at['seed']}; choose another --seed")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        self.at["started_from"] = f"{path.name}, sha256 {digest}, {seen} images seen"

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {part: getattr(self, part).state_dict() for part in ("model", "average", "optimizer")}
        with atomic_path(self.checkpoint) as temporary:
            torch.save({**state, "at": self.at}, temporary)

    def step(self, batch: dict[str, torch.Tensor], rate: float) -> torch.Tensor:
        """Learn from one batch; return the parts of its loss, where they are, so that nothing waits for them."""
        # On two cores, half a batch a thread beats two threads on one batch: none waits for the other within a layer.
        size = -(-len(batch["pixels"]) // self.stage["shards"])
        split = {key: value.to(self.device, non_blocking=True).split(size) for key, value in batch.items()}
        shards = [dict(zip(split, tensors, strict=True)) for tensors in zip(*split.values(), strict=True)]
        shares = [len(shard["pixels"]) / len(batch["pixels"]) for shard in shards]
        if len(shards) > 1:
            with ThreadPoolExecutor(len(shards)) as pool:
                each = list(pool.map(self.learn, shards, shares))
        else:
            each = [self.learn(shards[0], shares[0])]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("faster", 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.at["steps"] += 1
        ours, theirs = (
            [value for value in network.state_dict().values() if value.is_floating_point()]
            for network in (self.average, self.model)
        )
        torch._foreach_lerp_(ours, theirs, 1 - min(EMA, self.at["steps"] / (10 + self.at["steps"])))
        return torch.stack(each).sum(0)

    def learn(self, shard: dict[str, torch.Tensor], share: float) -> torch.Tensor:
        """Add the gradient of a share of a batch; return the parts of its loss, of which the batch's is the sum."""
        parts = {name: share * part for name, part in self.model.losses(shard).items()}
        sum(LOSS_WEIGHTS[name] * part for name, part in parts.items()).backward()
        return torch.stack([parts[name].detach() for name in LOSS_WEIGHTS])

    @property
    def stage(self) -> dict[str, Any]:
        """The last stage: how it was asked for, and where and when it began."""
        return self.at["stages"][-1]

    def rate(self) -> float:
        """Return the learning rate at the counter: up at first, then constant, down to 0 over a decaying stage."""
        warmth = min(1.0, (self.at["seen"] + 1) / WARM_UP)
        return self.stage["rate"] * warmth * (self.left() if self.stage["decay"] else 1)

    def left(self) -> float:
        """Return the share of the last stage that is still to come, of its minutes if it was given some."""
        stage = self.stage
        if stage["minutes"]:
            return max(0.0, 1 - (self.at["seconds"] - stage["began"]) / (60 * stage["minutes"]))
        return 1 - (self.at["seen"] - stage["start"]) / stage["images"]

    def begin(self, stage: dict[str, Any]) -> None:
        """Start a stage; one that was cut off before it keeps what it saw.

        A stage has size, images, minutes (0 for no limit), decay, batch, rate and shards.
        """
        for last in self.at["stages"][-1:]:
            last["images"] = self.at["seen"] - last["start"]
        at = {"start": self.at["seen"], "began": self.at["seconds"]}
        self.at["stages"].append({**stage, **at, "commit": commit(), "machine": machine(self.device)})

    def train(self, workers: int) -> bool:
        """Train to the end of the last stage, or until a signal comes; return whether it was the former."""
        stage, began = self.stage, time.time() - self.at["seconds"]
        batch = stage["batch"]
        judged = held_out(self.at["seed"], stage["size"])
        first, end = -(-self.at["seen"] // batch), -(-(stage["start"] + stage["images"]) // batch)
        loader = torch.utils.data.DataLoader(
            Batches(self.at["seed"], TRAINING, stage["size"], batch),
            batch_size=None, sampler=range(first, end), num_workers=workers,
            prefetch_factor=2 if workers else None, worker_init_fn=begin_worker, pin_memory=self.device == "cuda",
        )  # fmt: skip
        stopped: list[int] = []
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda number, _: stopped.append(number))
        losses: list[torch.Tensor] = []
        saved = checked = time.time()
        for index, films in zip(range(first, end), loader, strict=False):
            losses.append(self.step(films, self.rate()))
            self.at["seen"], self.at["seconds"] = (index + 1) * batch, time.time() - began
            if time.time() - saved > SAVE_SECONDS:
                self.save()
                saved = time.time()
            due = len(losses) * batch >= CHECK_EVERY and time.time() - checked > CHECK_SECONDS
            last = index + 1 == end or self.left() <= 0
            if due or last or stopped:
                speed = len(losses) * batch / (time.time() - checked)
                self.log(losses, speed, judge(self.average, judged, self.device) if not stopped else {})
                losses, checked = [], time.time()
            if last:
                stage["images"] = self.at["seen"] - stage["start"]  # --resume has nothing left to do
            if last or stopped:
                break
        self.save()
        return not stopped

    def log(self, losses: list[torch.Tensor], speed: float, figures: dict[str, Any]) -> None:
        """Add a line to log.jsonl, and a short one to the terminal."""
        means = torch.stack(losses).mean(0).tolist()
        loss = {name: round(mean, 4) for name, mean in zip(LOSS_WEIGHTS, means, strict=True)}
        line = {"seen": self.at["seen"], "seconds": round(self.at["seconds"]), "images_per_second": round(speed, 1),
                "size": self.stage["size"], "rate": self.optimizer.param_groups[0]["lr"], "loss": loss,
                **figures}  # fmt: skip
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        shown = {key: value for key, value in line.items() if not isinstance(value, dict)} | loss
        print(" ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                       for key, value in shown.items()), flush=True)  # fmt: skip


def begin_worker(_: int) -> None:
    """In a worker: one thread, and signals left to the parent, which saves first and then ends its workers."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def commit() -> str:
    """Return the commit of this code."""
    root = Path(__file__).parents[1]
    said = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False).stdout
    return said.strip() or "unknown"


def machine(device: str) -> str:
    """Return what computes: the GPU or the processor, and how many cores."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.split(":")[1].strip() for line in about.splitlines() if line.startswith("model name")]
    name = (names or [platform.machine()])[0] if device == "cpu" else torch.cuda.get_device_name(device)
    return f"{name}, {os.cpu_count()} cores"


def describe(run: Run) -> dict[str, str]:
    """Return the record of a run for the weights' metadata and card."""
    stages = [
        f"{min(s['images'], run.at['seen'] - s['start'])} at {s['size']} pixels{', rate to 0' if s['decay'] else ''}"
        for s in run.at["stages"]
    ]
    start = {"started_from": run.at["started_from"]} if "started_from" in run.at else {}
    return {
        **start,
        "images_seen": str(run.at["seen"]),
        "stages": "; ".join(stages),
        "seconds": str(round(run.at["seconds"])),
        "machine": "; ".join(dict.fromkeys(s["machine"] for s in run.at["stages"])),
        "seed": str(run.at["seed"]),
        "commit": "; ".join(dict.fromkeys(s["commit"] for s in run.at["stages"])),
        "generator": f"cxr_fastai.phantom {GENERATOR_VERSION}",
        "findings": "|".join(FINDINGS),
        "license": "Apache-2.0",
    }


def export(run: Run, path: Path) -> None:
    """Write the averaged weights (convolutions in half precision), torchvision's names, and a card beside them."""
    tensors = {}
    for name, value in run.average.state_dict().items():
        if name.startswith(("features.", "findings.")):
            kept = value.cpu().half() if value.ndim == 4 else value.cpu()
            tensors[name.replace("findings.linear.", "findings.")] = kept.contiguous()
    log = run.out / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    checks = [line for line in map(json.loads, lines) if "auroc" in line]
    write_weights(path, tensors, describe(run), checks[-1] if checks else {}, "`scripts/pretrain.py`")
    write_text(path.with_suffix(".jsonl"), "\n".join([*lines, ""]))


def write_weights(
    path: Path, tensors: dict[str, torch.Tensor], record: dict[str, str], last: dict[str, Any], by: str
) -> None:
    """Write weights, with their record as metadata, and a card beside them that tells what wrote them."""
    content = save(tensors, metadata=record)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    write_text(path.with_suffix(".md"), card({**record, "SHA-256": digest}, last, by))


def card(record: dict[str, str], last: dict[str, Any], by: str) -> str:
    """Return the card of the weights, markdown."""
    rows = [f"| {key.replace('_', ' ')} | {value.replace('|', ', ')} |" for key, value in record.items()]
    figures = {
        "AUROC of any finding": last.get("auroc_any"),
        **{f"AUROC of {name}": value for name, value in last.get("auroc", {}).items()},
        "AUROC of the view": last.get("auroc_view"),
        f"Evidence strongest inside the finding (all but {' and '.join(SPREAD_OUT)})": last.get("pointing"),
        "The same of a place at random": last.get("pointing_by_chance"),
    }
    return "\n".join([
        "# DenseNet121 pretrained on phantoms", "",
        f"Written by {by}.", "",
        "Trained on synthetic chest radiographs alone, each seen once: no patient's image was used, and none is needed",
        "to make these weights again. To start from, not to diagnose with.", "",
        "| | |", "|---|---|", *rows, "",
        f"On {N_HELD_OUT} phantoms held out, at {last.get('size')} pixels, after {last.get('seen')} images:", "",
        "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in figures.items() if value is not None), "",
    ])  # fmt: skip


def main(
    out: Annotated[Path | None, typer.Option(help="folder of the run; what is there goes on")] = None,
    size: Annotated[int, typer.Option(help="side of the films, a multiple of 32")] = 128,
    images: Annotated[int, typer.Option(help="films of a new stage; 0 without --minutes starts none")] = 0,
    minutes: Annotated[float, typer.Option(help="end the new stage after so many minutes; 0 for no limit")] = 0.0,
    start: Annotated[Path | None, typer.Option(help="weights that a new run begins with, .safetensors")] = None,
    decay: Annotated[bool, typer.Option(help="take the rate down to 0 over the new stage")] = False,
    resume: Annotated[bool, typer.Option(help="end the stage that was cut off, as that was asked for")] = False,
    judge_of: Annotated[Path | None, typer.Option("--judge", help="only measure these weights, at 224 pixels")] = None,
    export_to: Annotated[Path | None, typer.Option("--export", help="then write the weights, .safetensors")] = None,
    batch: Annotated[int, typer.Option(help="films a step")] = 32,
    rate: Annotated[float, typer.Option(help="constant learning rate")] = 1e-3,
    workers: Annotated[int, typer.Option(help="processes that draw films")] = 1,
    threads: Annotated[int, typer.Option(help="threads of torch within a layer")] = 1,
    shards: Annotated[int, typer.Option(help="parts of a batch that are learned from at once")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    seed: Annotated[int, typer.Option(help="of a new run; what is there keeps its own")] = 0,
) -> None:
    if judge_of:
        print(json.dumps(judge_weights(load_file(judge_of), seed, 224), indent=1))
        return
    if out is None:
        raise UsageError("--out: name the folder of the run")
    if resume and (images or minutes):
        raise UsageError("--resume ends the stage that was cut off: leave --images and --minutes out")
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    out.mkdir(parents=True, exist_ok=True)
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    run = Run(out, seed, device)
    if start:
        if run.at["stages"]:
            raise UsageError(f"--start begins a new run, but {out} holds one: leave --start out")
        run.start_from(start)
    if resume and not run.at["stages"]:
        raise UsageError(f"--resume: {out} holds no checkpoint; start a stage with --images")
    if images or minutes:
        run.begin({"size": size, "images": images or ENDLESS, "minutes": minutes, "decay": decay, "batch": batch,
                   "rate": rate, "shards": shards})  # fmt: skip
    if (images or minutes or resume) and not run.train(workers):
        print(f"stopped after {run.at['seen']} films; --resume goes on")
        raise typer.Exit(130)
    if export_to:
        export(run, export_to)


if __name__ == "__main__":
    typer.run(main)
