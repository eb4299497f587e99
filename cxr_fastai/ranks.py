"""Several processes on one training, started by torchrun or `accelerate launch`: what they tell each other.

    torchrun --nproc_per_node 2 cli.py train

Each process takes its part of every batch (see `together.py`). The first, rank 0, alone owns the run folder; the others
work in a temporary one. Their outputs are joined before any figure is made.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cxr_fastai.config import rank, world
from cxr_fastai.errors import UsageError


@contextlib.contextmanager
def joined(cuda: bool) -> Iterator[None]:
    """Join the other processes for the length of the body; do nothing without a launcher."""
    if world() == 1:
        yield
        return
    try:
        from accelerate import PartialState
    except ImportError:
        raise UsageError(
            "training by several processes needs accelerate: pip install accelerate, or start one process"
        ) from None
    PartialState(cpu=not cuda)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Run the body in rank 0 first, then in the others: what it puts into the cache they find there."""
    if rank():
        torch.distributed.barrier()
    yield
    if world() > 1 and not rank():
        torch.distributed.barrier()


@contextlib.contextmanager
def own_folder(run: Path) -> Iterator[Path]:
    """Give rank 0 the run folder, and every other a temporary one with the same checkpoints."""
    if not rank():
        yield run
        return
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / run.name
        copy.mkdir()
        if (run / "checkpoints").is_dir():
            shutil.copytree(run / "checkpoints", copy / "checkpoints")
        yield copy


def said_by_first(value: Any) -> Any:
    """Return what rank 0 gave, in every process."""
    if world() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def joined_outputs(outputs: torch.Tensor, loader: Any) -> torch.Tensor:
    """Return the rows of all ranks in the order of the films, (n, ...), without those that made the parts equal."""
    if world() == 1:
        return outputs
    parts: list[Any] = [None] * world()
    torch.distributed.all_gather_object(parts, outputs.cpu())
    return torch.cat(parts)[: loader.n]


def any_of(found: torch.Tensor) -> bool:
    """Return whether `found` is true in any process."""
    if world() > 1:
        flag = found.int()
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)
    return bool(found)


def bare(model: nn.Module) -> nn.Module:
    """Return the network inside what several processes train."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
