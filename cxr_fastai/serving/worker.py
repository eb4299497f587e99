"""One worker process: films come in through a pipe as bytes, rows go out as JSON. Never pickles, never files.

    in:   length of head (4 bytes), length of data (8 bytes), head as JSON {"name", "pictures"}, data
    out:  length (4 bytes), JSON {"row", "picture"}; first of all {"card"}, or {"failed"} if the model will not load

Started by `workers.py` with its settings as JSON; ends when the pipe does, and so with its server.
"""

import base64
import contextlib
import io
import json
import os
import signal
import struct
import sys
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from cxr_fastai.errors import CxrError
from cxr_fastai.images import Limits
from cxr_fastai.inputs import Input
from cxr_fastai.predict import Prediction, Predictor

HEAD, ANSWER = struct.Struct(">IQ"), struct.Struct(">I")
PICTURE_SIDE = 1024  # pixels of the film as shown


@dataclass(frozen=True)
class Upload(Input):
    """A film that a client sent: its bytes, under the name that it was sent with."""

    data: bytes = b""

    def read_bytes(self, limits: Limits) -> bytes:
        """Return what was sent; how long it may be is for the reader to see."""
        return self.data


def bound(megabytes: int) -> None:
    """Take from this process what hostile bytes could use: more memory, files, a dump with a patient in it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the server ends this one
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, limit in (
        (resource.RLIMIT_DATA, megabytes * 2**20),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # a system that has no such limit, or a lower one already
            resource.setrlimit(kind, (limit, limit))


def picture_of(predictor: Predictor, row: Prediction) -> dict[str, Any]:
    """Return what a page shows of a row: film as a PNG data URI, evidence (h, w) as lists, none without a verdict."""
    assert row.pixels is not None
    film = Image.fromarray(np.round(row.pixels * 255).astype(np.uint8))
    film.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BILINEAR)
    stream = io.BytesIO()
    film.save(stream, "PNG", compress_level=1)
    shown = None if row.evidence is None else predictor.evidence_shown(row)
    evidence = [] if shown is None else np.asarray(shown, np.float64).round(5).tolist()
    return {"film": "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode(), "evidence": evidence}


def answer(predictor: Predictor, head: dict[str, Any], data: bytes, limits: Limits) -> dict[str, Any]:
    """Return row and picture of one film; whatever happens, there is a row."""
    try:
        film = Upload(head["name"], data=data)
        (row,) = predictor.predict([film], limits=limits, keep_pixels=head["pictures"], abstain=True)
        picture = picture_of(predictor, row) if head["pictures"] and row.error is None else None
        return {"row": row.to_dict(), "picture": picture}
    except MemoryError:
        error = "reading it needs more memory than there is"
    except Exception as fault:  # noqa: BLE001 (a worker that goes on is better than one that must be started again)
        error = f"it cannot be classified ({type(fault).__name__})"
    return {"row": Prediction(head["name"], error=error).to_dict(), "picture": None}


def serve(source: BinaryIO, sink: BinaryIO, predictor: Predictor, limits: Limits) -> None:
    """Answer films from `source` on `sink`, one after the other, until `source` ends."""
    while len(lengths := source.read(HEAD.size)) == HEAD.size:
        head_length, data_length = HEAD.unpack(lengths)
        head = json.loads(source.read(head_length))
        data = source.read(data_length)
        if len(data) < data_length:
            return
        send(sink, answer(predictor, head, data, limits))


def send(sink: BinaryIO, message: dict[str, Any]) -> None:
    """Write one message."""
    text = json.dumps(message).encode()
    sink.write(ANSWER.pack(len(text)) + text)
    sink.flush()


def main() -> None:
    """Run one worker on standard input and output."""
    settings = json.loads(sys.argv[1])
    sink = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # what a decoder in C prints would be no answer, and may quote a header
        os.dup2(nowhere, descriptor)
    bound(settings["megabytes"])
    try:
        predictor = Predictor(settings["model"], precision="auto", threads=settings["threads"])
        size = predictor.card["size"]
        predictor.run(np.zeros((1, size, size), np.float32))  # the first film takes ten times as long as the next
    except CxrError as error:
        send(sink, {"failed": str(error)})
        return
    send(sink, {"card": predictor.card})
    with contextlib.suppress(BrokenPipeError):  # the server has gone
        serve(sys.stdin.buffer, sink, predictor, Limits(**settings["limits"]))
