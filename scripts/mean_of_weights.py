"""Write the mean of two exported sets of weights, those that a pretraining started from and those that it ended with.

    python scripts/mean_of_weights.py BEFORE.safetensors AFTER.safetensors --out MEAN.safetensors

Weights that a network was trained on to, and those before, lie in one valley: halfway it does better on films of
another kind than at either end (Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022). Out: the file, and
a card with both records and what the mean reaches on held-out phantoms.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from pretrain import judge_weights, write_weights
from safetensors import safe_open
from safetensors.torch import load_file

from cxr_fastai.errors import UsageError

SIZE, SEED = 224, 1


def mean_of(before: Path, after: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the mean of two files' tensors, and the records of both as one."""
    one, other = load_file(before), load_file(after)
    if {k: v.shape for k, v in one.items()} != {k: v.shape for k, v in other.items()}:
        raise UsageError(f"{before} and {after} are not of one network: their tensors differ in name or shape")
    mean = {k: ((one[k].float() + other[k].float()) / 2).to(one[k].dtype) for k in one if one[k].is_floating_point()}
    counts = {k: other[k] for k in other if k not in mean}  # batches that a normalisation saw
    record = {"mean_of": f"{before.name}, {after.name}"}
    for name, file in (("before", before), ("after", after)):
        with safe_open(file, "pt") as opened:
            theirs = opened.metadata() or {}
        record |= {f"{name}_{key}": value for key, value in theirs.items() if key not in ("findings", "license")}
    return {**mean, **counts}, {**record, "findings": theirs["findings"], "license": theirs["license"]}


def main(
    before: Annotated[Path, typer.Argument(help="weights that a pretraining started from")],
    after: Annotated[Path, typer.Argument(help="weights that it ended with")],
    out: Annotated[Path, typer.Option(help="file to write, .safetensors; the card goes beside it, .md")],
) -> None:
    tensors, record = mean_of(before, after)
    reached = judge_weights(tensors, SEED, SIZE)
    by = "`scripts/mean_of_weights.py` from two files that `scripts/pretrain.py` wrote"
    write_weights(out, tensors, record, {**reached, "size": SIZE, "seen": "all"}, by)
    print(json.dumps(reached, indent=1))


if __name__ == "__main__":
    typer.run(main)
