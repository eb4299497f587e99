from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from cxr_fastai.errors import ModelFileError
from cxr_fastai.predict import Predictor, decide, overlay


def test_a_binary_threshold_is_met_at_equality() -> None:
    card = {"task": "binary", "positive": "abnormal", "threshold": 0.3}
    assert decide({"abnormal": 0.3, "normal": 0.7}, card) == {"label": "abnormal", "probability": 0.3, "threshold": 0.3}
    assert decide({"abnormal": 0.29, "normal": 0.71}, card)["label"] == "normal"


def test_the_highest_class_wins_and_findings_have_their_own_thresholds() -> None:
    p = {"Edema": 0.2, "Mass": 0.5, "normal": 0.3}
    assert decide(p, {"task": "multiclass", "positive": None, "threshold": None}) == {
        "label": "Mass", "probability": 0.5, "threshold": None,
    }  # fmt: skip
    thresholds = {"Edema": 0.1, "Mass": 0.6}
    found = decide({"Edema": 0.2, "Mass": 0.5}, {"task": "multilabel", "positive": None, "threshold": thresholds})
    assert found == {"label": "Edema", "probability": 0.5, "threshold": thresholds}


def test_every_input_gets_a_row_in_order(finished: Path, films: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"x")
    good = sorted(str(p) for p in films.rglob("*.png"))[:20]
    paths = [*good[:3], str(bad), *good[3:]]
    rows = list(Predictor(finished).predict(paths))
    assert [row.path for row in rows] == paths
    assert [row.error is None for row in rows] == [path != str(bad) for path in paths]
    assert rows[3].label is None
    assert rows[3].probabilities == {}
    alone = [row.probability for row in Predictor(finished).predict([good[-1]])]
    assert rows[-1].probability == pytest.approx(alone[0], abs=1e-6)


def test_the_row_is_the_contract(finished: Path, films: Path) -> None:
    row = next(Predictor(finished).predict([str(next(films.rglob("*.png")))])).to_dict()
    assert list(row) == [
        "path", "label", "probability", "probabilities", "threshold", "flags", "error", "seconds", "frame",
        "unlike", "spread", "set",
    ]  # fmt: skip
    assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-6)
    assert row["probability"] == row["probabilities"]["abnormal"]


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"nonsense")
    with pytest.raises(ModelFileError, match=r"a\.onnx: not a model that can be run"):
        Predictor(tmp_path / "a.onnx")
    tensor = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("same", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["pixels"], ["same"])], "g", [tensor], [other])
    onnx.save(
        onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)]),
        tmp_path / "b.onnx",
    )
    with pytest.raises(ModelFileError, match=r"b\.onnx: an ONNX file, but not one of ours"):
        Predictor(tmp_path / "b.onnx")


def test_overlay_is_orange_for_blue_against_and_the_film_where_neutral() -> None:
    evidence = np.zeros((4, 4), np.float32)
    evidence[0, 0], evidence[3, 3] = 2.0, -2.0
    picture = overlay(np.full((64, 64), 0.5, np.float32), evidence).astype(int)
    assert picture.shape == (64, 64, 3)
    assert picture[4, 4, 0] - picture[4, 4, 2] > 60
    assert picture[60, 60, 2] - picture[60, 60, 0] > 60
    assert picture[60, 4].tolist() == [128, 128, 128]
    assert np.array_equal(overlay(np.full((8, 8), 1.0, np.float32), np.zeros((2, 2)))[0, 0], [255, 255, 255])


def test_the_evidence_points_to_the_disc_that_makes_a_film_abnormal(finished: Path, films: Path) -> None:
    predictor = Predictor(finished)
    rows = list(predictor.predict([str(p) for p in sorted((films / "abnormal").iterdir())]))
    shown = np.mean([predictor.evidence_shown(row) for row in rows], axis=0)
    assert shown.shape == (1, 1)  # 32 pixels leave one place: its evidence is the logit difference without the bias
    logits = np.log([row.probability / (1 - row.probability) for row in rows])
    bias = predictor.card["bias"]
    assert shown.item() + bias[0] - bias[1] == pytest.approx(logits.mean(), abs=1e-3)


def test_deep_films_are_scaled_not_clipped(finished: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    film = rng.integers(0, 256, (64, 64)).astype(np.uint8)
    Image.fromarray(film).save(tmp_path / "8.png")
    Image.fromarray(film.astype(np.uint16) * 257).save(tmp_path / "16.png")
    eight, sixteen = Predictor(finished).predict([str(tmp_path / "8.png"), str(tmp_path / "16.png")])
    assert eight.probability == pytest.approx(sixteen.probability, abs=1e-4)


def test_every_frame_is_a_row_where_asked(finished: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pages = [Image.fromarray(rng.integers(0, 255, (64, 64), dtype=np.uint8)) for _ in range(3)]
    path = tmp_path / "pages.tif"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    (first,) = Predictor(finished).predict([str(path)])
    assert "multi-frame" in first.flags
    every = list(Predictor(finished).predict([str(path)], all_frames=True))
    assert [row.frame for row in every] == [None, 1, 2]
    assert every[0].probability == first.probability
    assert every[2].probability != first.probability


def test_pixels_are_kept_only_where_asked(finished: Path, films: Path) -> None:
    path = str(next(films.rglob("*.png")))
    assert next(Predictor(finished).predict([path])).pixels is None
    assert next(Predictor(finished).predict([path], keep_pixels=True)).pixels.shape == (64, 64)
