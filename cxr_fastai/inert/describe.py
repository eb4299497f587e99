"""What is in a model file of any kind, told without running it: for people who were sent one.

    learner.pkl, .pth, .pickle   what unpickling would import and call, hostile or not; classes, tensors
    model.onnx                   its card, inputs and outputs
    .safetensors                 its header

Of a hostile pickle as much is told as can be followed. A file that is none of these raises ModelFileError.
"""

import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

from cxr_fastai.errors import ModelFileError
from cxr_fastai.inert.archive import ZIP, members_of
from cxr_fastai.inert.export import export_of, storages_of
from cxr_fastai.inert.instructions import MAX_PICKLE, walk
from cxr_fastai.inert.machine import STORAGES, Machine
from cxr_fastai.inert.names import unneeded_calls, unneeded_names
from cxr_fastai.inert.records import Global, Mapping, Record, Storage, shown
from cxr_fastai.modelfile import GRAPH, fields, read_file, read_model

MAX_HEADER = 16 * 2**20
MAX_PICKLES = 8  # one after another in a file, as torch wrote them before 1.6
MAX_SHOWN = 40
ENTRY = b"PK\1\2"


def describe(path: str | Path) -> dict[str, Any]:
    """Return what a model file holds, as plain JSON types.

    Returns
    -------
    dict
        `path`, `bytes`, `kind` (what the file is), `problem` (why it cannot be predicted with, or None). Of pickles:
        `imports` and `calls`, each `needed` (what fastai's own exports have) and `others` (code of whoever made it, or
        an attack; calls with their arguments), and `code` (functions that are stored in the file itself). As far as
        they are there: `members`, `tensors`, `classes`, `task`, `architecture`, `size`, `steps`, `card`, `inputs`,
        `outputs`, `metadata`.

    Raises
    ------
    ModelFileError
        Where the file cannot be opened, or is none of these kinds.
    """
    path = Path(path)
    data = read_file(path)
    facts: dict[str, Any] = {"path": str(path), "bytes": len(data), "kind": "unknown", "problem": None}
    if data[:4] == ZIP or zipfile.is_zipfile(io.BytesIO(data[-(2**17) :])):
        return {**facts, **_of_archive(path, data)}
    if data[8:9] == b"{" and len(data) >= 8 + int.from_bytes(data[:8], "little"):
        return {**facts, **_of_safetensors(data)}
    if path.suffix == ".onnx":
        return {**facts, **_of_onnx(path, data)}
    if not data:
        raise ModelFileError(f"{path}: the file is empty")
    found = _of_pickle(data[:MAX_PICKLE], None)
    if not (found["imports"]["needed"] or found["imports"]["others"]) and data[:1] != b"\x80":
        raise ModelFileError(f"{path}: not a model file that is known (fastai export, ONNX, safetensors, torch)")
    return {**facts, "kind": "a bare pickle", "problem": "it is no file of torch's; nothing can be read", **found}


# Pickles


class Curious(Machine):
    """A machine that goes on where an honest export would end, to see what a hostile one is after."""

    def __init__(self, data: bytes, storages: dict[str, int] | None):
        super().__init__(data, storages)
        self.code: list[str] = []

    def call(self, called: Any, arguments: Any, suffix: str = "") -> Record:
        """Note functions that are stored by value, too."""
        record = super().call(called, arguments, suffix)
        if "CodeType" in shown(called) and len(self.code) < MAX_SHOWN:
            self.code.append(" ".join(a for a in arguments[10:13] if isinstance(a, str))[:200] or "without a name")
        return record

    def storage(self, reference: Any) -> Any:
        """Take anything for a storage."""
        try:
            return super().storage(reference)
        except ModelFileError:
            return Record(self.name("persistent id", shown(reference)), ())

    def build(self, target: Any, state: Any) -> None:
        """Show what is set on a function or class."""
        if isinstance(target, Global):
            self.calls.setdefault(f"{target}.__setstate__", Record(Global(str(target), "__setstate__"), (state,)))
        else:
            super().build(target, state)


def _of_pickle(data: bytes, storages: dict[str, int] | None) -> dict[str, Any]:
    """Return what the pickles in `data` would import and call, as far as they can be followed."""
    machine = Curious(data, storages)
    stopped = None
    try:
        for _ in range(MAX_PICKLES):
            walk(machine, every_protocol=True)
            machine.stack, machine.marks, machine.memo = [], [], {}
            if machine.position >= len(data):
                break
    except ModelFileError as error:
        stopped = str(error)
    names, calls = [str(name) for name in machine.globals.values()], list(machine.calls)
    others, strange = unneeded_names(names), unneeded_calls(calls)
    return {
        "imports": {"needed": sorted(set(names) - set(others)), "others": others},
        "calls": {
            "needed": [call for call in calls if call not in set(strange)],
            "others": [shown(machine.calls[call]) for call in strange],
        },
        "code": machine.code,
        "stopped": stopped,
    }


def _of_archive(path: Path, data: bytes) -> dict[str, Any]:
    """Describe a zip: as torch writes it, or any other that has a data.pkl."""
    try:
        members = members_of(data)
    except ModelFileError as error:
        return {"kind": "a zip archive", "problem": str(error), **_of_foreign_zip(data)}
    pickle = bytes(members["data.pkl"])
    storages = storages_of(members)
    found: dict[str, Any] = {
        "kind": "a file of torch's",
        "members": {"n": len(members), "bytes": sum(map(len, members.values()))},
        **_of_pickle(pickle, storages),
    }
    try:
        machine = Machine(pickle, storages)
        root = walk(machine)
        if isinstance(root, Mapping):
            return {**found, "kind": "a state dict", "tensors": _tensors(root)}
        found["kind"] = f"a file of torch's that holds {shown(root)}"
        export = export_of(path, members)
    except ModelFileError as error:
        return {**found, "problem": str(error)}
    return {
        **found,
        "kind": "a fastai export",
        "tensors": {"n": len(export.weights), "bytes": sum(a.nbytes for a in export.weights.values())},
        "classes": list(export.classes),
        "task": export.task,
        "architecture": export.architecture,
        "size": list(export.size),
        "opened": export.opened,
        "steps": [{"name": step.name, **step.settings} for step in export.steps],
    }


def _of_foreign_zip(data: bytes) -> dict[str, Any]:
    """Look for a pickle in a zip that torch did not write, or that was changed."""
    if data.count(ENTRY) > 10_000:
        return {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [info for info in archive.infolist() if Path(info.filename).name.endswith(".pkl")]
            pickles = [archive.open(info).read(MAX_PICKLE) for info in names[:MAX_PICKLES]]
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, OSError, EOFError):
        return {}
    found = [_of_pickle(pickle, None) for pickle in pickles]
    return _joined(found) if found else {}


def _joined(found: list[dict[str, Any]]) -> dict[str, Any]:
    joined: dict[str, Any] = {"stopped": next((f["stopped"] for f in found if f["stopped"]), None)}
    for key in ("imports", "calls"):
        joined[key] = {part: [x for f in found for x in f[key][part]] for part in ("needed", "others")}
    return {**joined, "code": [name for f in found for name in f["code"]]}


def _tensors(root: Mapping) -> dict[str, int]:
    """Count the tensors of a state dict, and of those that it holds."""
    waiting, number, size = [root], 0, 0
    for mapping in waiting[:1] + [m for m in root.by_name().values() if isinstance(m, Mapping)]:
        for value in mapping.by_name().values():
            if hasattr(value, "storage") and isinstance(value.storage, Storage):
                number += 1
                size += math.prod(value.shape) * int(STORAGES[value.storage.kind][2])
    return {"n": number, "bytes": size}


# Other kinds


def _of_safetensors(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length]) if length <= MAX_HEADER else None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        return {"kind": "a safetensors file", "problem": "its header is damaged"}
    metadata = header.pop("__metadata__", {})
    ends = [t["data_offsets"][1] for t in header.values() if isinstance(t, dict) and "data_offsets" in t]
    return {
        "kind": "a safetensors file",
        "tensors": {"n": len(header), "bytes": max(ends, default=0)},
        "metadata": metadata,
        "problem": "it holds weights alone; train --weights starts from them",
    }


def _of_onnx(path: Path, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": "an ONNX model"}
    try:
        graph = next(v for n, v in fields(memoryview(data)) if n == GRAPH and isinstance(v, memoryview))
        for word, wanted in (("inputs", 11), ("outputs", 12)):  # field numbers of GraphProto
            infos = [v for n, v in fields(graph) if n == wanted and isinstance(v, memoryview)]
            found[word] = [bytes(v).decode() for info in infos for n, v in fields(info) if n == 1]  # type: ignore[arg-type]
        card = read_model(path).card
    except (StopIteration, ValueError, IndexError) as error:
        return {**found, "problem": f"damaged ({error})"}
    except ModelFileError as error:
        return {**found, "problem": str(error)}
    keys = ("classes", "task", "arch", "size")
    return {**found, "card": card, **{key: card[key] for key in keys if key in card}}
