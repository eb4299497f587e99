"""From folders of chest radiographs to a classifier that can be trusted, explained and handed over."""

import os

__version__ = "0.1.0"
# From 1.29 on onnxruntime reports its use to its maker; nothing of this project leaves the machine.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
