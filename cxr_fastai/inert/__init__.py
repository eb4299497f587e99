"""What is inside a fastai export, read without running it: no name in it is imported, nothing is called.

    learner.pkl ──► archive.py: members, each byte accounted for ──► instructions.py, machine.py: a tree of records
    ──► network.py: layers, weights, architecture; learner.py: classes, what is done to a film ──► InertExport

`rebuild.py` makes the network again from that. `describe` tells what is in a model file of any kind, a hostile one
too. Only the standard library and numpy; a file that is not an honest export raises ModelFileError, one line.
"""

from cxr_fastai.inert.describe import describe
from cxr_fastai.inert.export import InertExport, read_export
from cxr_fastai.inert.learner import Step
from cxr_fastai.inert.network import Layer

__all__ = ["InertExport", "Layer", "Step", "describe", "read_export"]
