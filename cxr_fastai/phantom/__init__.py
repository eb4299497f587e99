"""Synthetic chest radiographs whose every pixel of truth is known.

    from cxr_fastai.phantom import FINDINGS, GenerateConfig, generate, render, sample

`sample` draws a film's parameters, `render` turns them into pixels and masks, `generate` writes a dataset folder.
"""

from cxr_fastai.phantom.anatomy import sample_patient
from cxr_fastai.phantom.dataset import COLUMNS, NORMAL, SHORTCUTS, TASKS, GenerateConfig, generate
from cxr_fastai.phantom.film import DIFFICULTIES, GENERATOR_VERSION, Parameters, Phantom, render, sample
from cxr_fastai.phantom.findings import FINDINGS

__all__ = [
    "COLUMNS",
    "DIFFICULTIES",
    "FINDINGS",
    "GENERATOR_VERSION",
    "NORMAL",
    "SHORTCUTS",
    "TASKS",
    "GenerateConfig",
    "Parameters",
    "Phantom",
    "generate",
    "render",
    "sample",
    "sample_patient",
]
