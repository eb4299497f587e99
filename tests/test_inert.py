"""Fastai exports read without running them: hostile ones run nothing, each is refused in one line."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxr_fastai.errors import ModelFileError
from cxr_fastai.inert import describe, read_export
from cxr_fastai.inert.archive import members_of
from cxr_fastai.inert.export import export_of
from cxr_fastai.inert.instructions import walk
from cxr_fastai.inert.machine import Machine
from cxr_fastai.inert.network import layers_of
from cxr_fastai.inert.records import Global, Mapping, Record, Tensor
from cxr_fastai.modelfile import read_file
from exports import make_learner, save, write_pictures

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from hostile_pickles import Watch, archives, call, name, pack, pickles, pieces, row, storage, text, zipped

ONE_LINE = re.compile(r"[^\n\r\x1b]{20,900}")
WATCH = Watch()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the export of a resnet18, as the documentation makes it."""
    folder = tmp_path_factory.mktemp("plain")
    return save(make_learner(write_pictures(folder / "pictures")), folder / "export.pkl")


@pytest.fixture(scope="module")
def members(plain: Path) -> dict[str, memoryview]:
    return members_of(read_file(plain))


# Hostile pickles


def outcome(read: Callable[[], Any]) -> tuple[str | None, list[str]]:
    """Return the one line of the refusal, or None, and what ran meanwhile."""
    with WATCH as events:
        try:
            read()
            refusal = None
        except ModelFileError as error:
            refusal = str(error)
    return refusal, list(events)


def read_pickle(members: dict[str, memoryview], data: bytes) -> Any:
    from cxr_fastai.rebuild import rebuild

    return rebuild(export_of(Path("export.pkl"), {**members, "data.pkl": memoryview(data)}))


HOSTILE = list(pickles(b"\x80\x02N.", "x"))


def test_watch_sees_what_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with WATCH as events:
        pickle.loads(pickle.PROTO + b"\x02" + pieces(str(canary))["builtins.exec"] + b".")
    assert canary.exists()
    assert {event.split()[0] for event in events} >= {"pickle.find_class", "compile", "exec", "open"}


def test_there_are_enough_attacks() -> None:
    assert len(pieces("x")) >= 50
    assert len(HOSTILE) >= 80


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_pickle_is_refused_and_runs_nothing(what: str, members: dict, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    read_pickle(members, bytes(members["data.pkl"]))  # whatever is imported by then is no work of the file
    data = pickles(bytes(members["data.pkl"]), str(canary))[what]()
    refusal, events = outcome(lambda: read_pickle(members, data))
    assert refusal is not None
    assert ONE_LINE.fullmatch(refusal)
    assert events == []
    assert not canary.exists()


def test_function_by_value_is_never_run(members: dict, tmp_path: Path) -> None:
    """Honest exports have functions by value, too: such a file cannot be told from them, so it is read, inert."""
    canary = tmp_path / "canary"
    code = row(*[b"K\x00"] * 6, text("x"), b")))", text("evil.py"), text("evil"), text("evil"))
    stored = call(
        name("cloudpickle.cloudpickle", "_make_function"),
        call(call(name("cloudpickle.cloudpickle", "_builtin_type"), text("CodeType")), code),
        b"}NNN",
    )
    data = bytes(members["data.pkl"])
    refusal, events = outcome(lambda: read_pickle(members, data[:2] + stored + b"0" + data[2:]))
    assert (refusal, events, canary.exists()) == (None, [], False)


# Hostile archives


SMALL = {"data.pkl": b"\x80\x02]q\x00.", "byteorder": b"little", "data/0": b"12345678", "version": b"3\n"}


@pytest.mark.parametrize("what", list(archives(SMALL)))
def test_hostile_archive_is_refused_and_unpacks_nothing(what: str, tmp_path: Path) -> None:
    path = tmp_path / "export.pkl"
    path.write_bytes(archives(SMALL)[what]())
    refusal, events = outcome(lambda: read_export(path))
    assert refusal is not None
    assert ONE_LINE.fullmatch(refusal)
    assert refusal.startswith(f"{path}: ")
    assert events == []
    assert list(tmp_path.iterdir()) == [path]


def test_archive_is_written_here_as_torch_writes_it(plain: Path) -> None:
    import torch

    data = read_file(plain)
    folder = "export"
    torchs = members_of(data)
    assert pack(torchs, folder) == data
    state = {"a": torch.arange(4.0), "b": torch.zeros(2, 3)}
    torch.save(state, file := io.BytesIO())
    packed = pack(members_of(file.getvalue()))
    assert torch.equal(torch.load(io.BytesIO(packed), weights_only=True)["a"], state["a"])


def test_every_flipped_bit_of_a_small_archive_is_seen() -> None:
    sound = pack(SMALL)
    assert set(members_of(sound)) == set(SMALL)
    passed = []
    for i in range(len(sound)):
        for bit in (0, 3, 7):
            bad = bytearray(sound)
            bad[i] ^= 1 << bit
            try:
                found = members_of(bytes(bad))
            except ModelFileError:
                continue
            passed.append((i, bit, found))
    # The name of the one folder says nothing, and stands twice: one flip makes two folders of it.
    assert passed == []


def test_flipped_bytes_of_an_export_are_refused(plain: Path, tmp_path: Path) -> None:
    sound, rng = read_file(plain), np.random.default_rng(0)
    path = tmp_path / "export.pkl"
    for i in rng.integers(0, len(sound), 40):
        bad = bytearray(sound)
        bad[i] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        with pytest.raises(ModelFileError, match=r"damaged, or packed by another program|no zip"):
            read_export(path)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.mkdir(), "not an ordinary file|cannot be read"),
        (lambda path: None, "cannot be read"),
        (lambda path: path.write_bytes(b"\x80\x02}."), "no zip"),
    ],
)
def test_what_is_no_archive_is_refused(make: Callable, reason: str, tmp_path: Path) -> None:
    make(tmp_path / "export.pkl")
    with pytest.raises(ModelFileError, match=rf"export\.pkl: .*({reason})"):
        read_export(tmp_path / "export.pkl")


def test_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "export.pkl")
    with pytest.raises(ModelFileError, match="not an ordinary file"):
        read_export(tmp_path / "export.pkl")


def test_file_beyond_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "export.pkl"
    with path.open("wb") as file:
        file.truncate(2**31 + 1)  # takes no room on the disk
    with pytest.raises(ModelFileError, match=r"2,147,483,649 bytes; at most 2,147,483,648 are read"):
        read_export(path)


# The machine


def made(data: bytes, storages: dict[str, int] | None = None) -> Any:
    return walk(Machine(b"\x80\x02" + data + b".", storages))


def test_values_are_those_of_pickle() -> None:
    value = [None, True, False, 0, -1, 255, 65535, 2**31, -(2**40), 2**100, 1.5, "ä\ud800", (), (1,), (1, 2), [[]]]
    for protocol in (2, 3, 4, 5):
        assert walk(Machine(pickle.dumps(value, protocol), None)) == value
    value = {"a": b"bytes", "b": bytearray(b"more")}
    assert walk(Machine(pickle.dumps(value, 5), None)).by_name() == value


def test_names_become_records() -> None:
    record = made(call(name("os", "system"), text("ls")) + b"}" + text("a") + b"K\x01sb")
    assert isinstance(record, Record)
    assert (record.made_by, record.arguments, record.get("a")) == (Global("os", "system"), ("ls",), 1)


def test_memo_gives_the_same_object() -> None:
    first, second = made(b"(]q\x05h\x05t")
    assert first is second


def test_tensor_is_checked_against_its_storage() -> None:
    parts = storage("FloatStorage", "0", 6)
    shape, strides = row(b"K\x02", b"K\x02"), row(b"K\x02", b"K\x01")
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    tensor = call(rebuild, row(*parts) + b"Q", b"K\x01", shape, strides, b"\x89", b"N")
    found = made(tensor, {"0": 24})
    assert isinstance(found, Tensor)
    assert (found.offset, found.shape, found.strides) == (1, (2, 2), (2, 1))
    for size in (23, 25, 0):
        with pytest.raises(ModelFileError, match="not what the archive holds"):
            made(tensor, {"0": size})
    with pytest.raises(ModelFileError, match="reaches beyond its storage"):
        made(tensor.replace(b"K\x02K\x01t", b"K\x04K\x01t"), {"0": 24})


def module(**attributes: Any) -> Record:
    """Return the record of a torch module."""
    own = {key: Mapping([]) for key in ("_parameters", "_buffers", "_modules")}
    return Record(Global("torch.nn", "Module"), (), Mapping(list({**own, **attributes}.items())))


def test_module_inside_itself_ends() -> None:
    record = module()
    record.get("_modules").pairs.append(("a", record))
    with pytest.raises(ModelFileError, match="more layers than any that is known"):
        layers_of(record)


def test_modules_that_double_end() -> None:
    record = module()
    for _ in range(40):
        record = module(_modules=Mapping([("a", record), ("b", record)]))
    with pytest.raises(ModelFileError, match="more layers than any that is known"):
        layers_of(record)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"_modules": Mapping([("a", 3)])}, "at 'a' that is no torch module"),
        ({"_modules": Mapping([("a.b", module())])}, "a part that has no name"),
        ({"_modules": Mapping([(1, module())])}, "a part that has no name"),
        ({"_modules": []}, "without _modules"),
        ({"_non_persistent_buffers_set": Global("os", "system")}, "a strange torch.nn.Module"),
        ({"_parameters": Mapping([("w", Record(Global("os", "system"), ()))])}, "that is no tensor"),
        ({"_forward_pre_hooks": Mapping([(0, 1)])}, "_forward_pre_hooks"),
        ({f"a{i}": i for i in range(300)}, "a strange torch.nn.Module"),
    ],
)
def test_bent_modules_are_refused(attributes: dict, reason: str) -> None:
    with pytest.raises(ModelFileError, match=reason):
        layers_of(module(**attributes))


# Descriptions


def test_description_of_an_export(plain: Path) -> None:
    found = describe(plain)
    json.dumps(found)
    assert (found["kind"], found["problem"], found["stopped"]) == ("a fastai export", None, None)
    assert (found["classes"], found["task"], found["size"]) == (["cat", "dog"], "binary", [64, 64])
    assert found["tensors"] == {"n": 132, "bytes": 46870448}
    assert found["imports"]["others"] == found["calls"]["others"] == []
    assert "builtins.getattr" in found["imports"]["needed"]
    assert any("PILBase.create" in function for function in found["code"])


GIVEN_AWAY = r"canary|antigravity|breakpoint|libc|127\.0|pip\._int|registry|sys\.|marshal|torch\.s|loads|Learner|system"


DATA = ("storage", "persistent", "set of", "OrderedDict")  # no calls


@pytest.mark.parametrize("what", [what for what in pieces("x") if not what.startswith(DATA)])
def test_description_names_what_a_hostile_file_would_call(what: str, tmp_path: Path) -> None:
    data = b"\x80\x02" + pieces("/tmp/canary")[what] + b"."
    paths = [tmp_path / kind for kind in ("torch.pkl", "zipfile.pkl", "bare.pkl")]
    zipfile.ZipFile(io.BytesIO(zipped({"a": b""}))).close()  # imports the encoding of names in zips, the first time
    contents = (pack({**SMALL, "data.pkl": data}), zipped({"data.pkl": data}), data)
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
        found: dict[str, Any] = {}
        refusal, events = outcome(lambda path=path, found=found: found.update(describe(path)))
        assert (refusal, events) == (None, [])
        json.dumps(found)
        assert found["problem"]
        seen = [*found["imports"]["others"], *found["calls"]["others"], str(found["stopped"])]
        assert re.search(GIVEN_AWAY, str(seen)), what


def test_description_of_other_files(finished: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    state = {"a.weight": torch.zeros(3, 4), "a.n": torch.tensor(1)}
    torch.save(state, tmp_path / "w.pth")
    assert describe(tmp_path / "w.pth")["tensors"] == {"n": 2, "bytes": 56}
    torch.save(torch.nn.Linear(3, 4).state_dict(), tmp_path / "w.pth")
    found = describe(tmp_path / "w.pth")
    assert (found["kind"], found["tensors"]) == ("a state dict", {"n": 2, "bytes": 64})
    torch.save({"model": state, "epoch": 3}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert describe(tmp_path / "old.pth")["calls"]["others"] == []

    save_file(state, tmp_path / "w.safetensors", {"made": "here"})
    found = describe(tmp_path / "w.safetensors")
    assert (found["tensors"], found["metadata"]) == ({"n": 2, "bytes": 56}, {"made": "here"})

    found = describe(finished / "model.onnx")
    assert (found["kind"], found["problem"], found["inputs"]) == ("an ONNX model", None, ["pixels"])
    assert found["outputs"][:4] == ["logits", "probabilities", "evidence", "features"]
    assert found["classes"] == found["card"]["classes"] == ["abnormal", "normal"]
    (tmp_path / "bad.onnx").write_bytes((finished / "model.onnx").read_bytes()[:1000])
    assert describe(tmp_path / "bad.onnx")["problem"]

    (tmp_path / "words.txt").write_text("no model at all")
    with pytest.raises(ModelFileError, match=r"words\.txt: not a model file that is known"):
        describe(tmp_path / "words.txt")


def test_reading_imports_nothing_heavy() -> None:
    wanted = "[m for m in ('torch', 'fastai', 'PIL', 'cloudpickle') if m in sys.modules]"
    code = f"import sys, cxr_fastai.inert; print(*{wanted})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
