"""Synthetic chest radiographs whose every pixel of truth is known.

    from cxr_fastai.phantom import FINDINGS, generate, render, sample

`sample` draws a film's parameters, `render` turns them into pixels and masks, `generate` writes a dataset folder.
"""

from cxr_fastai.phantom.dataset import COLUMNS, NORMAL, generate
from cxr_fastai.phantom.film import DIFFICULTIES, GENERATOR_VERSION, Parameters, Phantom, render, sample
from cxr_fastai.phantom.findings import FINDINGS
from cxr_fastai.phantom.patient import Patient, sample_patient

__all__ = [
    "COLUMNS",
    "DIFFICULTIES",
    "FINDINGS",
    "GENERATOR_VERSION",
    "NORMAL",
    "Parameters",
    "Patient",
    "Phantom",
    "generate",
    "render",
    "sample",
    "sample_patient",
]
