"""Write the mean of two exported sets of weights, those that a pretraining started from and those that it ended with.

    python scripts/mean_of_weights.py BEFORE.safetensors AFTER.safetensors --out MEAN.safetensors

Weights that a network was trained on to, and those before, lie in one valley: halfway it does better on films of
another kind than at either end (Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022). Out: the file, and
a card with both records and what the mean reaches on held-out phantoms.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from pretrain import N_HELD_OUT, Pretrainer, card, judge
from pretrain_films import HELD_OUT, Batches
from safetensors import safe_open
from safetensors.torch import load_file, save

from cxr_fastai.errors import UsageError

SIZE, BATCH, SEED = 224, 50, 1


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
    model = Pretrainer()
    features = {key.removeprefix("features."): value for key, value in tensors.items() if key.startswith("features.")}
    model.features.load_state_dict(features)
    model.findings.linear.load_state_dict({key: tensors[f"findings.{key}"] for key in ("weight", "bias")})
    films = Batches(SEED, HELD_OUT, SIZE, BATCH)
    reached = judge(model, [films[index] for index in range(N_HELD_OUT // BATCH)], "cpu")
    reached.pop("auroc_view")  # that part of the network is not in the files
    out.write_bytes(save(tensors, metadata=record))
    out.with_suffix(".md").write_text(card(record, {**reached, "size": SIZE, "seen": "all"}), encoding="utf-8")
    print(" ".join(f"{key} {value}" for key, value in reached.items()))


if __name__ == "__main__":
    typer.run(main)
