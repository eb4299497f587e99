"""Which films are unlike those of training, which sets hold the truth, and what a model says of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import fake_film
from PIL import Image

from cxr_fastai.errors import ModelFileError
from cxr_fastai.metrics.conformal import conformal_scores, cut_of, prediction_set
from cxr_fastai.outliers import fit_outliers, limit_of
from cxr_fastai.predict import Predictor
from cxr_fastai.views import views_of


def features(n: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.abs(rng.normal(size=(n, 6)) @ np.eye(6, 40) + rng.normal(0, 0.1, (n, 40)) + 3 + shift) ** 2


def test_films_like_those_of_training_lie_within_the_limit_and_others_beyond() -> None:
    outliers = fit_outliers(features(300, 0))
    limit = limit_of(outliers.distance(features(200, 1)))
    assert (outliers.distance(features(400, 2)) > limit).mean() < 0.05
    assert (outliers.distance(features(400, 3, shift=2.0)) > limit).all()
    assert outliers.distance(features(300, 0)).mean() == pytest.approx(1, abs=0.02)


def test_two_equal_films_more_do_not_break_the_fit() -> None:
    same = np.tile(features(2, 0), (10, 1))
    distance = fit_outliers(same).distance(features(5, 1))
    assert np.isfinite(distance).all()


def test_the_limit_is_a_quantile_of_many_and_above_all_of_few() -> None:
    distances = np.arange(1.0, 1001.0)
    assert limit_of(distances) == 976.0  # ceil(1001 * 0.975)
    assert limit_of(np.array([1.0, 2.0])) == pytest.approx(2.2)


def test_the_graph_tells_the_distance_and_the_card_its_limit(finished: Path, films: Path) -> None:
    predictor = Predictor(finished)
    assert predictor.run(np.zeros((3, 32, 32), np.float32))["distance"].shape == (3, 1)
    assert predictor.card["outliers"]["limit"] > 0
    paths = [str(path) for path in sorted(films.rglob("*.png"))]
    like = [row.unlike for row in predictor.predict(paths)]
    assert np.mean(np.array(like) > 1) < 0.1


def test_no_verdict_on_what_is_unlike_training(finished: Path, tmp_path: Path) -> None:
    Image.fromarray(255 - fake_film(np.random.default_rng(0), "normal").T).save(tmp_path / "odd.png")
    predictor = Predictor(finished)
    predictor.cards[0]["outliers"]["limit"] = 1e-9
    (row,) = predictor.predict([str(tmp_path / "odd.png")], abstain=True, coverage=0.9)
    assert "unlike-training" in row.flags
    assert (row.label, row.probability, row.probabilities, row.set, row.error) == (None, None, {}, None, None)
    (answered,) = predictor.predict([str(tmp_path / "odd.png")])
    assert "unlike-training" in answered.flags
    assert answered.label in predictor.classes


def test_cuts_by_hand() -> None:
    scores = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert cut_of(scores, 0.9) == 0.9  # ceil(10 * 0.9) = 9
    assert cut_of(scores, 0.5) == 0.5
    assert cut_of(scores, 0.95) == float("inf")  # nine films cannot promise it
    assert prediction_set({"a": 0.75, "b": 0.25}, [scores], 0.3) == ["a"]
    assert prediction_set({"a": 0.75, "b": 0.25}, [scores], 0.9) == ["a", "b"]
    assert prediction_set({"a": 0.6, "b": 0.4}, [scores], 0.1) == []
    assert prediction_set({"a": 0.9, "b": 0.5}, [[0.2] * 9, [0.5] * 9], 0.9) == {"a": ["a"], "b": ["b", "no b"]}


def test_scores_are_one_minus_the_probability_of_the_truth() -> None:
    p = np.array([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4]])
    assert conformal_scores(np.array([0, 1, 1]), p, multilabel=False) == [[0.1, 0.3, 0.6]]
    truth = np.array([[1, 0], [np.nan, 1], [0, 0.7]])
    assert conformal_scores(truth, p, multilabel=True) == [[0.1, 0.6], [0.1, 0.3]]
    assert len(conformal_scores(np.zeros(5000), np.full((5000, 2), 0.5), multilabel=False)[0]) == 1000


def test_sets_hold_the_truth_as_often_as_asked() -> None:
    rng = np.random.default_rng(0)
    held = []
    for _ in range(200):
        y = rng.integers(0, 3, 400)
        p = rng.dirichlet(np.ones(3), 400) + 1.0 * np.eye(3)[y] * rng.random((400, 1))
        p /= p.sum(1, keepdims=True)
        scores = conformal_scores(y[:100], p[:100], multilabel=False)
        sets = [prediction_set(dict(zip("abc", row, strict=True)), scores, 0.9) for row in p[100:]]
        held.append(np.mean(["abc"[truth] in said for truth, said in zip(y[100:], sets, strict=True)]))
    assert np.mean(held) == pytest.approx(0.9, abs=0.01)


def test_a_model_without_scores_makes_no_sets(finished: Path, films: Path) -> None:
    predictor = Predictor(finished)
    path = str(next(films.rglob("*.png")))
    assert next(predictor.predict([path], coverage=0.9)).set is not None
    assert next(predictor.predict([path])).set is None
    del predictor.cards[0]["conformal"]
    with pytest.raises(ModelFileError, match="has no scores for --coverage; train again"):
        next(predictor.predict([path], coverage=0.9))


def test_views_are_the_film_and_seven_others_of_its_size() -> None:
    film = fake_film(np.random.default_rng(0), "normal", 64).astype(np.float32)[None] / 255
    views = list(views_of(film, 1.0))
    assert len(views) == 8
    assert np.array_equal(views[0], film)
    assert np.array_equal(views[1][0], film[0][:, ::-1])
    for view in views[2:]:
        assert view.shape == film.shape
        assert 0 <= view.min() <= view.max() <= 1
        assert 0.001 < np.abs(view - film).mean() < 0.3
    assert len(list(views_of(film, 0.0))) == 1


def test_turning_keeps_the_middle_in_the_middle() -> None:
    film = np.zeros((1, 65, 65), np.float32)
    film[0, 31:34, 31:34] = 1
    for view in list(views_of(film, 1.0))[2:6]:
        rows, columns = np.nonzero(view[0] > 0.5)
        assert (rows.mean(), columns.mean()) == (pytest.approx(32, abs=0.6), pytest.approx(32, abs=0.6))


def test_several_models_and_views_are_averaged_with_their_spread(finished: Path, films: Path) -> None:
    path = str(next(films.rglob("*.png")))
    (one,) = Predictor(finished).predict([path])
    (twice,) = Predictor([finished, finished]).predict([path])
    assert twice.probability == pytest.approx(one.probability, abs=1e-6)
    assert one.spread is None
    assert twice.spread == pytest.approx(0, abs=1e-6)
    (turned,) = Predictor(finished).predict([path], tta=True)
    assert turned.spread > 0
    assert np.array_equal(turned.evidence, one.evidence)


def test_models_of_other_classes_are_not_averaged(finished: Path, tmp_path: Path) -> None:
    from test_grading import save_bright_model

    other = save_bright_model(tmp_path / "other.onnx", {"abnormal": 1.0, "well": 0.0})
    with pytest.raises(ModelFileError, match=r"its classes are \['abnormal', 'well'\], but those of"):
        Predictor([finished, other])


def test_the_card_says_which_precisions_agree(finished: Path) -> None:
    found = Predictor(finished).card["precision"]["bf16"]
    assert found["passed"] in (True, False)
    assert "reason" in found or found["largest_difference"] >= 0
    json.dumps(found)
