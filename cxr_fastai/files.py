"""Opening what a stranger named, films and model files alike. Standard library only."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from cxr_fastai.errors import UnreadableImage


def open_regular(path: str | Path) -> BinaryIO:
    """Open an ordinary file, and nothing that would block or never end; UnreadableImage for anything else."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise UnreadableImage("it is a folder, not a file" if stat.S_ISDIR(mode) else "it is a device, not a file")
    return os.fdopen(descriptor, "rb")
