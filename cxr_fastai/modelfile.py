"""model.onnx -> its bytes and its card, once nothing about the file is wrong; numpy and the standard library only.

What is looked at before anything runs: the SHA-256 in manifest.json, where that lies beside the file; that no tensor
is kept in another file (a path that the file chooses, which a runtime would open); that every weight is finite; that
the card is complete and makes sense. The bytes that were checked are the bytes that run.

A protobuf message is a list of fields: a key (number and wire type), then a varint, 4 or 8 bytes, or a length and so
many bytes (protobuf.dev, "Encoding"). Only the fields of onnx.proto that matter here are followed.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cxr_fastai.errors import ModelFileError, UnreadableImage
from cxr_fastai.files import open_regular
from cxr_fastai.runs import MANIFEST, find_model

MAX_BYTES = 2**31  # protobuf's own limit
MAX_DEPTH = 16  # graphs inside graphs
# Field numbers of onnx.proto3.
GRAPH, METADATA = 7, 14  # of a ModelProto
NODE, INITIALIZER, SPARSE = 1, 5, 15  # of a GraphProto
ATTRIBUTE = 5  # of a NodeProto
TENSOR, SUBGRAPH, TENSORS, SUBGRAPHS = 5, 6, 10, 11  # of an AttributeProto
DATA_TYPE, FLOATS, RAW, DOUBLES, EXTERNAL, LOCATION = 2, 4, 9, 10, 13, 14  # of a TensorProto
FLOAT_TYPES, BFLOAT16 = {1: "<f4", 10: "<f2", 11: "<f8"}, 16


class ModelFile(NamedTuple):
    """A model.onnx that was checked: its path, its bytes, the card in them, and their SHA-256."""

    path: Path
    data: bytes
    card: dict[str, Any]
    sha256: str


def read_file(path: str | Path, longest: int = MAX_BYTES) -> bytes:
    """Return the bytes of an ordinary file.

    Raises
    ------
    ModelFileError
        Where there is none, it cannot be opened, or it is too large.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > longest:
                raise ModelFileError(f"{path}: {size:,} bytes; at most {longest:,} are read")
            return file.read(size)  # a read of so many bytes as are allowed would take as much memory
    except UnreadableImage:
        raise ModelFileError(f"{path}: not an ordinary file; name a model file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "its name cannot be used"
        raise ModelFileError(f"{path}: cannot be read ({reason}); name another model") from None


def read_model(model: str | Path) -> ModelFile:
    """Read and check the model.onnx meant by `model`: such a file, or the folder of a finished run.

    Raises
    ------
    ModelFileError
        Where there is none, it is damaged or doctored, or it is no model of ours.
    """
    path = find_model(model)
    data = read_file(path)
    sha256 = hashlib.sha256(data).hexdigest()
    _check_manifest(path, sha256)
    try:
        card = _checked(data)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None
    except (ValueError, IndexError, RecursionError) as error:
        raise ModelFileError(f"{path}: not a model that can be run ({error}); export it again") from None
    return ModelFile(path, data, card, sha256)


def _check_manifest(path: Path, sha256: str) -> None:
    """Compare a model with the hash that its run folder has of it."""
    manifest = path.parent / MANIFEST
    if not manifest.is_file():
        return
    try:
        expected = json.loads(manifest.read_text(encoding="utf-8"))["sha256"][path.name]
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelFileError(f"{path}: {MANIFEST} beside it does not tell its hash; train or export again") from None
    if sha256 != expected:
        raise ModelFileError(
            f"{path}: not the file that was exported (its SHA-256 differs from {MANIFEST}'s); export or copy it again"
        )


def _checked(data: bytes) -> dict[str, Any]:
    """Check a ModelProto; return its card."""
    texts: dict[str, str] = {}
    graphs = 0
    for number, value in fields(memoryview(data)):
        if number == GRAPH and isinstance(value, memoryview):
            _check_graph(value, 0)
            graphs += 1
        elif number == METADATA and isinstance(value, memoryview):
            pair = {key: bytes(text).decode() for key, text in fields(value) if isinstance(text, memoryview)}
            texts[pair.get(1, "")] = pair.get(2, "")
    if graphs != 1:
        raise ValueError("it holds no network" if not graphs else "it holds several networks")
    if "card" not in texts:
        raise ModelFileError("an ONNX file, but not one of ours (it has no card); train one first")
    card = json.loads(texts["card"])
    _check_card(card)
    return card


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of each field of a protobuf message; raise ValueError where it is not one."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value: int | memoryview
            value, at = _varint(message, at)
        else:
            length, at = _varint(message, at) if wire == 2 else ({1: 8, 5: 4}.get(wire, -1), at)
            if length < 0 or at + length > end:
                raise ValueError("damaged or cut short")
            value, at = message[at : at + length], at + length
        yield number, value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise ValueError("damaged: a number without an end")


def _check_graph(graph: memoryview, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError("its graphs are nested too deeply")
    for number, value in fields(graph):
        if not isinstance(value, memoryview):
            continue
        if number == INITIALIZER:
            _check_tensor(value)
        elif number == SPARSE:
            for _, part in fields(value):
                if isinstance(part, memoryview):
                    _check_tensor(part)
        elif number == NODE:
            for at, attribute in fields(value):
                if at == ATTRIBUTE and isinstance(attribute, memoryview):
                    _check_attribute(attribute, depth)


def _check_attribute(attribute: memoryview, depth: int) -> None:
    for number, value in fields(attribute):
        if not isinstance(value, memoryview):
            continue
        if number in (TENSOR, TENSORS):
            _check_tensor(value)
        elif number in (SUBGRAPH, SUBGRAPHS):
            _check_graph(value, depth + 1)


def _check_tensor(tensor: memoryview) -> None:
    """Refuse a tensor whose values lie in another file or are not finite."""
    kind, values = 0, []
    for number, value in fields(tensor):
        if number == EXTERNAL or (number == LOCATION and value != 0):
            raise ModelFileError("its weights lie in another file, which is never opened; export it as one file")
        if number == DATA_TYPE and isinstance(value, int):
            kind = value
        elif number in (RAW, FLOATS, DOUBLES) and isinstance(value, memoryview):
            values.append((number, value))
    for number, value in values:
        dtype = {FLOATS: "<f4", DOUBLES: "<f8"}.get(number, FLOAT_TYPES.get(kind))
        finite = not dtype or np.isfinite(np.frombuffer(value, dtype)).all()
        if kind == BFLOAT16:  # numpy has no such type: all ones in the exponent mean infinite or not a number
            finite = not ((np.frombuffer(value, "<u2") & 0x7F80) == 0x7F80).any()
        if not finite:
            raise ModelFileError("some of its weights are not finite; train again with a smaller --lr")


def _check_card(card: Any) -> None:
    """Refuse a card that is incomplete or out of range; what follows relies on it."""
    if not isinstance(card, dict):
        raise ModelFileError("its card is not an object; export it again")
    names, task, threshold = card.get("classes"), card.get("task"), card.get("threshold")
    classes: list[str] = names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []
    size = card.get("size")
    sound = {
        "classes": len(set(classes)) == len(classes) > 0,
        "task": task in ("binary", "multiclass", "multilabel"),
        "size": isinstance(size, int) and 32 <= size <= 1024,
        "positive": task != "binary" or (len(classes) == 2 and card.get("positive") in classes),
        "threshold": task == "multiclass" or (_share(threshold) if task == "binary" else _shares(threshold, classes)),
    }
    if wrong := [name for name, right in sound.items() if not right]:
        raise ModelFileError(f"its card says {wrong[0]} = {str(card.get(wrong[0]))[:80]!r}, which makes no sense")


def _share(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= 1


def _shares(value: Any, names: list[str]) -> bool:
    return isinstance(value, dict) and set(value) == set(names) and all(map(_share, value.values()))
