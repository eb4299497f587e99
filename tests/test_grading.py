import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pandas as pd
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from cxr_fastai.console import Console
from cxr_fastai.errors import DataError
from cxr_fastai.grading import (
    ANY,
    COLUMNS,
    grade,
    grade_map,
    graded_masks,
    masks_of,
    randomised,
    rank_correlation,
    summarise,
    upsampled,
    within_reach,
    write_evidence,
)
from cxr_fastai.predict import Prediction, Predictor, class_map
from cxr_fastai.runs import read_cells

SIZE = 56  # of the fake's input, 8 pixels a place


def save_bright_model(path: Path, weights: dict[str, float], **card: object) -> Path:
    """Write a model whose evidence for a class is its weight times the brightness of a place, on maps of 7 x 7."""
    w = np.array(list(weights.values()), np.float32).reshape(-1, 1, 1, 1)
    nodes = [
        helper.make_node("AveragePool", ["pixels"], ["features"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Conv", ["features", "w"], ["evidence"]),
        helper.make_node("ReduceMean", ["evidence", "places"], ["logits"], keepdims=0),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
    ]
    shapes = {"logits": ["n", len(w)], "probabilities": ["n", len(w)], "evidence": ["n", len(w), 7, 7]}
    graph = helper.make_graph(
        nodes,
        "bright",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 1, SIZE, SIZE])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.array([2, 3]), "places")],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)])
    told = {"classes": list(weights), "task": "binary", "positive": "abnormal", "threshold": 0.5, "size": SIZE, **card}
    model.metadata_props.add(key="card", value=json.dumps(told))
    onnx.save(model, path)
    return path


def write_film(path: Path, spot: tuple[slice, slice] | None, shape: tuple[int, int] = (112, 112)) -> None:
    """Write a dim film with one bright spot."""
    film = np.random.default_rng(0).integers(0, 60, shape)
    if spot:
        film[spot] = 250
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(film.astype(np.uint8)).save(path)


def write_mask(path: Path, spot: tuple[slice, slice], shape: tuple[int, int] = (112, 112)) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[spot] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)
    return mask > 0


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder of a film with a spot in the upper right, that is twice as wide as high, and one without."""
    spot = (slice(0, 32), slice(192, 224))
    write_film(tmp_path / "data/images/abnormal/1_0.png", spot, (112, 224))
    write_mask(tmp_path / "data/masks/1_0__Nodule.png", spot, (112, 224))
    write_mask(tmp_path / "data/masks/1_0__Mass.png", (slice(96, 112), slice(0, 32)), (112, 224))
    write_film(tmp_path / "data/images/normal/2_0.png", None)
    return tmp_path / "data"


def table_of(data: Path) -> pd.DataFrame:
    paths = [str(path) for path in sorted(data.rglob("images/*/*.png"))]
    return pd.DataFrame({"path": paths, "patient_id": [Path(path).stem.partition("_")[0] for path in paths]})


# Masks ---------------------------------------------------------------------------------------------------------------


def test_masks_are_found_by_the_name_of_the_film(data: Path) -> None:
    masks = masks_of(data / "images/abnormal/1_0.png")
    assert {name: (mask.shape, int(mask.sum())) for name, mask in masks.items()} == {
        "Mass": ((112, 224), 16 * 32),
        "Nodule": ((112, 224), 32 * 32),
    }
    assert masks["Nodule"][0, 223]
    assert masks_of(data / "images/normal/2_0.png") == {}
    assert masks_of(data / "images/abnormal/1.png") == {}  # not 1_0__


def test_masks_that_cannot_be_used_are_named(data: Path) -> None:
    write_mask(data / "masks/1_0__Edema.png", (slice(0, 9), slice(0, 9)), (112, 112))
    with pytest.raises(DataError, match=r"masks of .*1_0\.png differ in size: \(112, 112\), \(112, 224\); make them"):
        masks_of(data / "images/abnormal/1_0.png")
    (data / "masks/1_0__Edema.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"1_0__Edema\.png cannot be read \(UnidentifiedImageError\); generate"):
        masks_of(data / "images/abnormal/1_0.png")


def test_what_is_graded_against_what() -> None:
    nodule, mass = np.zeros((2, 4, 4), bool)
    nodule[0, 0] = mass[1] = True
    masks = {"Nodule": nodule, "Mass": mass, "Edema": np.zeros((4, 4), bool)}  # Edema: nothing of it on the film
    binary = graded_masks(masks, {"classes": ["abnormal", "normal"], "positive": "abnormal"})
    assert [(finding, name, int(mask.sum())) for finding, name, mask in binary] == [
        ("Nodule", "abnormal", 1), ("Mass", "abnormal", 4), (ANY, "abnormal", 5),
    ]  # fmt: skip
    several = graded_masks(masks, {"classes": ["Edema", "Mass"], "positive": None})
    assert [(finding, name) for finding, name, _ in several] == [("Mass", "Mass")]
    two = graded_masks(masks, {"classes": ["Mass", "Nodule"], "positive": "Nodule"})
    assert [(finding, name) for finding, name, _ in two] == [("Nodule", "Nodule"), ("Mass", "Mass"), (ANY, "Nodule")]
    assert two[2][2].sum() == 1


# One map -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "positive"), [("binary", "b"), ("multiclass", None), ("multilabel", None)])
def test_the_map_is_the_one_that_users_see(task: str, positive: str | None) -> None:
    classes = ["a", "b"] if task == "binary" else ["a", "b", "c"]
    evidence = np.random.default_rng(0).normal(size=(len(classes), 7, 7)).astype(np.float32)
    row = Prediction("x", probabilities={"a": 0.1, "b": 0.7, "c": 0.2}, evidence=evidence)
    model = SimpleNamespace(classes=classes, card={"task": task, "positive": positive})
    shown = Predictor.evidence_shown(model, row)  # type: ignore[arg-type]
    np.testing.assert_array_equal(class_map(evidence, 1, task), shown)


def test_share_counts_positive_evidence_only() -> None:
    evidence, mask = np.zeros((7, 7)), np.zeros((7, 7), bool)
    mask[:, :3] = True
    evidence[1, 1], evidence[1, 5], evidence[5, 2] = 3, 1, -8
    assert grade_map(evidence, mask, mask) == (1.0, 0.75)
    assert grade_map(-evidence, mask, mask) == (1.0, 1.0)
    evidence[1, 5] = 9
    assert grade_map(evidence * 1e300, mask, mask) == pytest.approx((0, 0.25))


def test_what_is_not_defined_is_nan() -> None:
    mask = np.zeros((8, 8), bool)
    mask[:2] = True
    np.testing.assert_equal(grade_map(np.ones((1, 1)), mask, mask), (np.nan, 0.25))
    np.testing.assert_equal(grade_map(np.full((8, 8), -1.0), mask, mask), (np.nan, np.nan))
    np.testing.assert_equal(grade_map(np.zeros((8, 8)), mask, mask), (np.nan, np.nan))
    np.testing.assert_equal(grade_map(np.full((8, 8), np.inf), mask, mask), (np.nan, np.nan))


def test_a_maximum_may_be_half_a_place_beside_the_mask() -> None:
    mask = np.zeros((70, 70), bool)
    mask[35, 35] = True
    assert within_reach(mask, (7, 7)).sum() == 81  # whole points at most 5 from the middle
    wide = np.zeros((70, 140), bool)
    wide[35, 70] = True
    near = within_reach(wide, (7, 7))
    assert near[35, 80]
    assert near[40, 70]
    assert not near[35, 81]
    assert not near[41, 70]


def test_a_perfect_map_hits_a_spot_smaller_than_a_place() -> None:
    for top, left in ((3, 3), (17, 90), (40, 61), (108, 50)):
        mask = np.zeros((112, 112), bool)
        mask[top : top + 4, left : left + 4] = True
        small = np.asarray(Image.fromarray(mask.astype(np.float32)).resize((7, 7), Image.Resampling.BOX))
        assert grade_map(small, mask, within_reach(mask, (7, 7)))[0] == 1
        assert not within_reach(mask, (7, 7))[56, 0]


def test_maps_grow_in_their_own_shape() -> None:
    evidence = np.zeros((7, 7), np.float32)
    evidence[0, 6] = 1
    shown = upsampled(evidence, (112, 224))
    assert shown.shape == (112, 224)
    assert np.unravel_index(shown.argmax(), shown.shape) >= (0, 192)


def test_rank_correlation_sees_order_only() -> None:
    a = np.arange(49.0).reshape(7, 7)
    assert rank_correlation(a, a**3) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert np.isnan(rank_correlation(a, np.ones((7, 7))))
    assert np.isnan(rank_correlation(a, np.full((7, 7), np.inf)))


# All of it -----------------------------------------------------------------------------------------------------------


def test_random_weights_are_the_same_numbers_in_another_order(tmp_path: Path) -> None:
    names = [f"c{i}" for i in range(20)]
    path = save_bright_model(
        tmp_path / "m.onnx",
        {name: float(i) for i, name in enumerate(names)},
        task="multilabel",
        positive=None,
        threshold=dict.fromkeys(names, 0.5),
    )
    before, predictor = path.read_bytes(), Predictor(path)
    film = np.ones((1, SIZE, SIZE), np.float32)
    true, first, again, second = (
        p.run(film)["evidence"][0, :, 0, 0] for p in (predictor, *(randomised(predictor, seed) for seed in (0, 0, 1)))
    )
    np.testing.assert_array_equal(true, np.arange(20))
    np.testing.assert_array_equal(np.sort(first), true)
    np.testing.assert_array_equal(first, again)
    assert not (first == true).all()
    assert not (first == second).all()
    assert path.read_bytes() == before


def test_each_finding_of_each_film_is_graded(data: Path, tmp_path: Path) -> None:
    predictor = Predictor(save_bright_model(tmp_path / "m.onnx", {"abnormal": 1.0, "normal": 0.0}))
    broken = data / "images/abnormal/3_0.png"
    write_mask(data / "masks/3_0__Nodule.png", (slice(0, 9), slice(0, 9)))
    broken.write_bytes(b"x")
    calls: list[int] = []
    frame = grade(predictor, table_of(data), lambda: calls.append(1))
    assert len(calls) == 3
    assert tuple(frame.columns) == COLUMNS
    assert frame[["patient_id", "finding", "class"]].to_numpy().tolist() == [
        ["1", "Mass", "abnormal"], ["1", "Nodule", "abnormal"], ["1", ANY, "abnormal"],
    ]  # fmt: skip
    assert frame["hit"].tolist() == [0, 1, 1]
    mass, nodule, both = frame.to_dict("records")
    assert mass["area"] == 16 / 112 / 7
    assert both["area"] == pytest.approx(mass["area"] + nodule["area"])
    # The map is brightness: the spot has more of it than its area, the dim place just that.
    assert mass["share"] == pytest.approx(mass["area"], rel=0.05)
    assert nodule["share"] > 1.5 * nodule["area"]
    assert both["share"] == pytest.approx(mass["share"] + nodule["share"])
    assert all(frame["reach"] > frame["area"])
    # Two weights in random order are either the true network or its opposite.
    assert set(frame["rank_correlation"].abs().round(6)) == {1}


def test_a_film_without_masks_costs_nothing(data: Path) -> None:
    normal = table_of(data).iloc[1:]
    frame = grade(SimpleNamespace(card={}), normal)  # type: ignore[arg-type]
    assert frame.empty
    assert summarise(frame) == {}


def example() -> pd.DataFrame:
    rows = [
        ("a.png", "1", "Mass", "abnormal", 1.0, 0.5, 0.3, 0.1, 0.0, np.nan, 0.2),
        ("a.png", "1", ANY, "abnormal", 1.0, 0.5, 0.3, 0.1, 0.0, np.nan, 0.2),
        ("b.png", "2", "Edema", "abnormal", 0.0, 0.7, 0.5, 0.4, 1.0, 0.3, -0.4),
        ("b.png", "2", ANY, "abnormal", 0.0, 0.7, np.nan, 0.4, 1.0, 0.3, np.nan),
        ("c.png", "2", ANY, "abnormal", 1.0, 0.6, 0.7, 0.1, 0.0, 0.1, 0.1),
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def test_a_summary_has_means_intervals_and_chance() -> None:
    found = summarise(example())
    assert list(found["findings"]) == ["Edema", "Mass", ANY]
    overall = found["overall"]
    assert overall == found["findings"][ANY]
    assert (overall["n"], overall["n_patients"]) == (3, 2)
    assert overall["pointing"]["value"] == pytest.approx(2 / 3)
    assert overall["pointing"]["n"] == 3
    assert 0 <= overall["pointing"]["low"] < 2 / 3 < overall["pointing"]["high"] <= 1
    assert (overall["share"]["value"], overall["share"]["n"]) == (0.5, 2)
    means = [overall[key] for key in ("reach", "area", "random_pointing", "random_share")]
    assert means == pytest.approx([0.6, 0.2, 1 / 3, 0.2])
    assert found["sanity"] == {"rank_correlation": pytest.approx(0.15), "n": 2}
    assert found["findings"]["Mass"]["random_share"] is None
    assert found["findings"]["Mass"]["pointing"] == {"value": 1.0, "low": None, "high": None, "n": 1}


def test_text_gives_the_same_summary_and_without_a_union_all_rows_count(tmp_path: Path) -> None:
    frame = example()
    frame.to_csv(tmp_path / "e.csv", index=False)
    assert summarise(read_cells(tmp_path / "e.csv")) == summarise(frame)
    assert summarise(frame[frame["finding"] != ANY])["overall"]["n"] == 2


def test_nothing_defined_is_none() -> None:
    found = summarise(example().assign(**dict.fromkeys(COLUMNS[4:], np.nan)))
    assert found["overall"]["share"] == {"value": None, "low": None, "high": None, "n": 0}
    assert found["sanity"] == {"rank_correlation": None, "n": 0}
    assert "NaN" not in json.dumps(found)


def test_evidence_files_say_the_same(data: Path, tmp_path: Path) -> None:
    predictor = Predictor(save_bright_model(tmp_path / "m.onnx", {"abnormal": 1.0, "normal": 0.0}))
    found = write_evidence(tmp_path, predictor, table_of(data))
    assert found is not None
    assert found["findings"]["Nodule"]["pointing"]["value"] == 1
    assert json.loads((tmp_path / "evidence.json").read_text()) == found
    assert summarise(read_cells(tmp_path / "evidence.csv")) == found


def test_no_masks_no_files_and_broken_ones_are_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictor = Predictor(save_bright_model(tmp_path / "m.onnx", {"abnormal": 1.0, "normal": 0.0}))
    assert write_evidence(tmp_path, predictor, table_of(data).iloc[1:]) is None
    (data / "masks/1_0__Mass.png").write_bytes(b"x")
    assert write_evidence(tmp_path, predictor, table_of(data), Console()) is None
    assert "WARNING: Evidence not graded. mask" in capsys.readouterr().out
    assert not list(tmp_path.glob("evidence*"))
