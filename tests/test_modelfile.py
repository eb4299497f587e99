"""What is wrong with a model file is found before anything runs."""

import contextlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_grading import save_bright_model

from cxr_fastai.errors import ModelFileError
from cxr_fastai.modelfile import read_model
from cxr_fastai.runs import sha256

WEIGHTS = {"abnormal": 1.0, "normal": 0.0}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_bright_model(tmp_path / "model.onnx", WEIGHTS)


def changed(path: Path, change) -> Path:
    proto = onnx.load(path)
    change(proto)
    path.write_bytes(proto.SerializeToString())
    return path


def test_bytes_and_card_are_those_of_the_file(model: Path) -> None:
    path, data, card, digest = read_model(model)
    assert path == model
    assert data == model.read_bytes()
    assert digest == sha256(model)
    assert card["classes"] == ["abnormal", "normal"]


def test_the_manifest_beside_it_must_know_it(model: Path) -> None:
    manifest = model.parent / "manifest.json"
    manifest.write_text(json.dumps({"sha256": {"model.onnx": sha256(model)}}))
    assert read_model(model.parent).path.name == "model.onnx"
    changed(model, lambda proto: proto.metadata_props[0].__setattr__("value", json.dumps({"classes": []})))
    with pytest.raises(ModelFileError, match=r"not the file that was exported \(its SHA-256 differs"):
        read_model(model)
    manifest.write_text("{}")
    with pytest.raises(ModelFileError, match="does not tell its hash"):
        read_model(model)


def test_weights_in_another_file_are_refused_wherever_they_hide(model: Path, tmp_path: Path) -> None:
    outside = numpy_helper.from_array(np.ones(3, np.float32), "outside")
    outside.ClearField("raw_data")
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="../../etc/passwd")
    inner = helper.make_graph([], "inner", [], [], [outside])
    places = {
        "initializer": lambda proto: proto.graph.initializer.append(outside),
        "constant": lambda proto: proto.graph.node.append(helper.make_node("Constant", [], ["c"], value=outside)),
        "subgraph": lambda proto: proto.graph.node.append(
            helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner)
        ),
    }
    for place, change in places.items():
        path = save_bright_model(tmp_path / f"{place}.onnx", WEIGHTS)
        with pytest.raises(ModelFileError, match="its weights lie in another file, which is never opened"):
            read_model(changed(path, change))


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
def test_weights_that_are_not_finite_are_refused(model: Path, kind: type) -> None:
    bad = numpy_helper.from_array(np.array([1, np.nan], kind), "bad")
    with pytest.raises(ModelFileError, match="some of its weights are not finite"):
        read_model(changed(model, lambda proto: proto.graph.initializer.append(bad)))


def test_bfloat16_is_looked_into_and_lists_of_floats_too(model: Path, tmp_path: Path) -> None:
    half = helper.make_tensor("half", TensorProto.BFLOAT16, [2], np.array([0x3F80, 0x7F80], "<u2").tobytes(), raw=True)
    with pytest.raises(ModelFileError, match="some of its weights are not finite"):
        read_model(changed(model, lambda proto: proto.graph.initializer.append(half)))
    listed = helper.make_tensor("listed", TensorProto.FLOAT, [2], [1.0, float("inf")])
    other = save_bright_model(tmp_path / "listed.onnx", WEIGHTS)
    with pytest.raises(ModelFileError, match="some of its weights are not finite"):
        read_model(changed(other, lambda proto: proto.graph.initializer.append(listed)))


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"classes": ["a", "a"]}, "classes"),
        ({"classes": "ab"}, "classes"),
        ({"task": "guess"}, "task"),
        ({"size": 10**9}, "size"),
        ({"positive": "none"}, "positive"),
        ({"threshold": float("nan")}, "threshold"),
        ({"threshold": 2}, "threshold"),
        ({"task": "multilabel", "threshold": {"abnormal": 0.5}}, "threshold"),
    ],
)
def test_a_card_that_makes_no_sense_is_refused(tmp_path: Path, card: dict, message: str) -> None:
    path = save_bright_model(tmp_path / "m.onnx", WEIGHTS, **card)
    with pytest.raises(ModelFileError, match=f"its card says {message} = "):
        read_model(path)


def test_bytes_cut_or_changed_never_escape_as_another_error(model: Path) -> None:
    data, rng = bytearray(model.read_bytes()), np.random.default_rng(0)
    for number in range(300):
        mutant = bytearray(data)
        if number % 3 == 0:
            del mutant[rng.integers(len(mutant)) :]
        else:
            for _ in range(3):
                mutant[rng.integers(len(mutant))] = rng.integers(256)
        model.write_bytes(mutant)
        with contextlib.suppress(ModelFileError):  # and nothing else
            read_model(model)
