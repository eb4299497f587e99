"""Honest exports of fastai's own making, untrained and small, for the tests of the inert reader."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_pictures(folder: Path) -> Path:
    """Write twelve grey pictures of several shapes in two classes."""
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(90, 120), (120, 90), (64, 64), (200, 150), (70, 160), (250, 250)] * 2):
        y, x = np.mgrid[:height, :width]
        grey = 127 + 60 * np.sin(x / 9 + i) + 40 * np.cos(y / 13) + rng.normal(0, 15, (height, width))
        path = folder / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(path)
    return folder


def make_learner(pictures: Path, arch: str = "resnet18", **how: Any) -> Any:
    """Return a Learner as fastai's documentation makes one, untrained."""
    import torch
    from fastai.vision import all as fastai

    settings = {"item": [fastai.Resize(64)], "block": fastai.PILImage, "learner": {}, **how}
    normalise = fastai.Normalize.from_stats(*fastai.imagenet_stats, cuda=False)
    block = fastai.DataBlock(
        blocks=(fastai.ImageBlock(settings["block"]), settings.get("target", fastai.CategoryBlock)),
        get_items=fastai.get_image_files,
        get_y=settings.get("get_y", fastai.parent_label),
        splitter=fastai.RandomSplitter(seed=1),
        item_tfms=settings["item"],
        batch_tfms=settings.get("batch", [*fastai.aug_transforms(), normalise]),
    )
    dls = block.dataloaders(pictures, bs=4, num_workers=0, device=torch.device("cpu"))
    torch.manual_seed(0)
    learn = fastai.vision_learner(dls, getattr(fastai, arch), pretrained=False, **settings["learner"])
    for module in learn.model.modules():  # statistics as after training, so that no layer is without effect
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return learn


def save(learn: Any, path: Path, **options: Any) -> Path:
    learn.path = path.parent
    learn.export(path.name, **options)
    return path


def loaded(path: Path) -> Any:
    """Return what fastai's own load_learner makes of a file."""
    from fastai.learner import load_learner

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_learner(path)
