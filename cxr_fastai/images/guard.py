"""What keeps a parser of hostile bytes within bounds: its time, and what it and its C libraries print."""

import contextlib
import io
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable

from cxr_fastai.errors import UnreadableImage


def printable(text: str) -> str:
    """Escape whatever a terminal, a log or a CSV should not be given raw: controls, surrogates, direction marks."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class TimedBytes(io.BytesIO):
    """Bytes as a file that refuses to be read after a deadline, so that no parser can go on for ever."""

    def __init__(self, data: bytes, deadline: float):
        super().__init__(data)
        self.deadline = deadline

    def read(self, size: int | None = -1) -> bytes:
        """Read as `io.BytesIO` does, before the deadline."""
        if time.thread_time() > self.deadline:
            raise UnreadableImage("reading it takes too long; export it uncompressed, or smaller")
        return super().read(size)


class Shared:
    """A context that the first of several concurrent users enters and the last one leaves, for state of the process."""

    def __init__(self, enter: Callable[[contextlib.ExitStack], None]):
        self.enter, self.users, self.lock, self.stack = enter, 0, threading.Lock(), contextlib.ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            self.users += 1
            if self.users == 1:
                self.enter(self.stack)

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                self.stack.close()


def _ignore_warnings(stack: contextlib.ExitStack) -> None:
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    for logger in (logging.getLogger("PIL"), logging.getLogger("pydicom")):
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL + 1)


def _drop_standard_error(stack: contextlib.ExitStack) -> None:
    with contextlib.suppress(OSError):  # it may be closed, and then nothing is printed anyway
        kept = os.dup(2)
        stack.callback(os.close, kept)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        stack.callback(os.close, nowhere)
        os.dup2(nowhere, 2)
        stack.callback(os.dup2, kept, 2)


quiet = Shared(_ignore_warnings)  # what Pillow and pydicom warn and log
quiet_in_c = Shared(_drop_standard_error)  # what libtiff prints; used for TIFF only
