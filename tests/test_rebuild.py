"""Networks made again from fastai exports: load_learner's logits, or a refusal that says what is different."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cxr_fastai.errors import ModelFileError, UsageError
from cxr_fastai.inert import read_export
from exports import loaded, make_learner, save, write_pictures

ONE_LINE = re.compile(r"[^\n\r\x1b]{20,900}")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def plain(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the export of a resnet18, as the documentation makes it."""
    return save(make_learner(pictures), tmp_path_factory.mktemp("plain") / "export.pkl")


def their_batch(learn: Any, films: list[str]) -> Any:
    import torch

    return torch.cat([batch[0].as_subclass(torch.Tensor) for batch in learn.dls.test_dl(films, num_workers=0)])


# Honest exports


def assert_same_logits(path: Path, films: list[str]) -> None:
    """Check that films and logits are load_learner's, to the last bit."""
    import torch

    from cxr_fastai.predict_export import RebuiltNetwork
    from cxr_fastai.rebuild import prepare

    export, learn = read_export(path), loaded(path)
    ours, theirs = np.stack([prepare(film, export) for film in films]), their_batch(learn, films)
    np.testing.assert_array_equal(ours, theirs.numpy())
    with torch.no_grad():
        expected = learn.model.eval()(theirs).numpy()
    assert np.ptp(expected) > 1e-3
    np.testing.assert_array_equal(RebuiltNetwork(export).run(ours)["logits"], expected)


@pytest.mark.parametrize("arch", ["resnet18", "densenet121", "vgg11_bn"])
def test_export_of_the_documentation_gives_the_same_logits(arch: str, pictures: Path, tmp_path: Path) -> None:
    path = save(make_learner(pictures, arch), tmp_path / "export.pkl")
    assert_same_logits(path, [str(p) for p in sorted(pictures.rglob("*.png"))])
    export = read_export(path)
    assert (export.architecture, export.classes, export.task) == (arch, ("cat", "dog"), "binary")
    assert (export.size, export.resize_method, export.opened) == ((64, 64), "crop", "RGB")
    mean, std = export.normalise or ((), ())
    np.testing.assert_allclose([mean, std], [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], rtol=1e-6)
    assert export.unneeded == ()


def fastai_all() -> Any:
    from fastai.vision import all as fastai

    return fastai


def both_labels(path):
    return [path.parent.name]


VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "squish, one channel, smaller by the batch": lambda: {
        "item": [fastai_all().Resize((64, 96), method="squish")],
        "block": fastai_all().PILImageBW,
        "batch": fastai_all().aug_transforms(size=24),
        "learner": {"n_in": 1},
    },
    "pad with reflection, other head": lambda: {
        "item": [fastai_all().Resize(96, method="pad", pad_mode="reflection")],
        "learner": {"concat_pool": False, "lin_ftrs": [32, 16], "ps": 0.1},
    },
    "pad with zeros, no batch transforms": lambda: {
        "item": [fastai_all().Resize((80, 60), method="pad", pad_mode="zeros")],
        "batch": [],
        "learner": {"first_bn": False, "bn_final": True},
    },
    "RandomResizedCrop": lambda: {"item": [fastai_all().RandomResizedCrop(64, min_scale=0.5)]},
    "multi-label": lambda: {
        "target": fastai_all().MultiCategoryBlock,
        "get_y": both_labels,
        "learner": {"lin_first": True},
    },
}


CASES = [*((variant, 2) for variant in VARIANTS), ("squish, one channel, smaller by the batch", 5), ("multi-label", 4)]


@pytest.mark.parametrize(("variant", "protocol"), CASES)
def test_other_exports_give_the_same_logits(variant: str, protocol: int, pictures: Path, tmp_path: Path) -> None:
    path = save(make_learner(pictures, **VARIANTS[variant]()), tmp_path / "e.pkl", pickle_protocol=protocol)
    assert_same_logits(path, [str(p) for p in sorted(pictures.rglob("*.png"))])


def test_own_export_gives_the_same_logits(finished: Path, films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from cxr_fastai.images import read_radiograph, to_input
    from cxr_fastai.predict import Predictor
    from cxr_fastai.predict_export import ExportPredictor

    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    path, paths = finished / "learner.pkl", [str(p) for p in sorted(films.rglob("*.png"))[:20]]
    predictor = ExportPredictor(path)
    inputs = np.stack([to_input(read_radiograph(p), 32) for p in paths])
    found = predictor.run(inputs)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    learn = loaded(path)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = learn.model.eval()((torch.from_numpy(inputs)[:, None] - mean) / std).numpy()
    np.testing.assert_array_equal(found["logits"], expected)
    sums = found["evidence"].sum((2, 3)) + predictor.card["bias"]
    np.testing.assert_allclose(sums, expected, atol=1e-5)

    ours, theirs = list(predictor.predict(paths)), list(Predictor(finished).predict(paths))
    for mine, onnx in zip(ours, theirs, strict=True):
        assert (mine.path, mine.label, mine.threshold) == (onnx.path, onnx.label, onnx.threshold)
        assert mine.probabilities == pytest.approx(onnx.probabilities, abs=1e-4)
        np.testing.assert_allclose(mine.evidence, onnx.evidence, atol=1e-4)


def test_rows_of_somebody_elses_export(plain: Path, pictures: Path, tmp_path: Path) -> None:
    from cxr_fastai.predict_export import ExportPredictor

    (tmp_path / "no.png").write_bytes(b"no film")
    films = [str(p) for p in sorted(pictures.rglob("*.png"))]
    predictor = ExportPredictor(plain)
    rows = list(predictor.predict([*films, str(tmp_path / "no.png")], keep_pixels=True))
    assert [row.error is None for row in rows] == [True] * 12 + [False]
    learn = loaded(plain)
    with learn.no_bar():
        expected = learn.get_preds(dl=learn.dls.test_dl(films, num_workers=0))[0].numpy()
    for line, p in zip(rows, expected, strict=False):
        assert list(line.probabilities.values()) == pytest.approx(p.tolist(), abs=1e-6)
        assert (line.threshold, line.evidence) == (0.5, None)
        assert line.label == ("dog" if line.probabilities["dog"] >= 0.5 else "cat")
        assert line.pixels is not None
    with pytest.raises(UsageError, match="bf16"):
        ExportPredictor(plain, precision="bf16")


def test_ensemble_is_read_too(finished: Path, tmp_path: Path) -> None:
    import copy

    import torch

    from cxr_fastai.export import export_learner
    from cxr_fastai.model import ensemble
    from cxr_fastai.predict_export import ExportPredictor

    learn = loaded(finished / "learner.pkl")
    other = copy.deepcopy(learn.model)
    with torch.no_grad():
        other[1].linear.weight.mul_(-0.5)
    learn.model = ensemble([learn.model, other]).eval()
    export_learner(learn, tmp_path / "learner.pkl")
    films = np.random.default_rng(0).random((3, 32, 32), np.float32)
    found = ExportPredictor(tmp_path / "learner.pkl").run(films)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = learn.model((torch.from_numpy(films)[:, None] - mean) / std).numpy()
    np.testing.assert_array_equal(found["logits"], expected)


def test_card_beside_must_be_of_the_same_classes(finished: Path, plain: Path, tmp_path: Path) -> None:
    from cxr_fastai.predict_export import card_of

    (tmp_path / "model.onnx").write_bytes((finished / "model.onnx").read_bytes())
    export = read_export(finished / "learner.pkl")
    head = SimpleNamespace(linear=SimpleNamespace(bias=np.zeros(2)))
    network: Any = SimpleNamespace(explains=True, model=[None, head])
    moved: Any = SimpleNamespace(**{**vars(export), "path": tmp_path / "learner.pkl"})
    assert card_of(moved, network)["operating_point"]["rule"] == "youden"
    moved.classes = ("cat", "dog")
    with pytest.raises(ModelFileError, match="is of another training"):
        card_of(moved, network)


def test_unpickling_unsafely_says_why_not(plain: Path, tmp_path: Path) -> None:
    import torch

    from cxr_fastai.predict_export import unpickle_unsafely

    assert list(unpickle_unsafely(plain).dls.vocab) == ["cat", "dog"]
    (tmp_path / "bad.pkl").write_bytes(b"no pickle")
    with pytest.raises(ModelFileError, match=r"bad\.pkl: cannot be unpickled \(UnpicklingError: "):
        unpickle_unsafely(tmp_path / "bad.pkl")
    torch.save([1], tmp_path / "list.pkl")
    with pytest.raises(ModelFileError, match=r"list\.pkl: cannot be unpickled \(AttributeError: "):
        unpickle_unsafely(tmp_path / "list.pkl")


# Networks that are not what their records say


def changed(learn: Any, path: Path, change: Callable[[Any], None]) -> Path:
    change(learn)
    return save(learn, path)


def forward_of_its_own(films: Any) -> Any:
    return films


def set_nan(learn: Any) -> None:
    import torch

    with torch.no_grad():
        learn.model[0][0].weight[0, 0, 0, 0] = float("nan")


def other_activation(learn: Any) -> None:
    from torch import nn

    learn.model[1][5] = nn.Sigmoid()


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a hook": (lambda learn: learn.model[0].register_forward_hook(forward_of_its_own), "has hooks at '0'"),
    "a method": (lambda learn: setattr(learn.model[1][4], "forward", forward_of_its_own), "a 'forward' of its own"),
    "a stride": (lambda learn: setattr(learn.model[0][0], "stride", (1, 1)), r"'stride' = \(1, 1\), not \(2, 2\)"),
    "an epsilon": (lambda learn: setattr(learn.model[0][1], "eps", 0.5), "'eps' = 0.5, not 1e-05"),
    "a weight that is not finite": (set_nan, r"its weight '0\.0\.weight' is not finite"),
    "half precision": (lambda learn: learn.model.half(), "is float16"),
    "another activation": (other_activation, "torch.nn.modules.activation.Sigmoid, which vision_learner's heads"),
    "another loss": (lambda learn: setattr(learn, "loss_func", fastai_all().MSELossFlat()), "its loss is"),
    "three parts": (lambda learn: learn.model.append(learn.model[1][4]), "not a body and a head"),
    "no head": (lambda learn: learn.model[1].__delitem__(slice(2, None)), "makes .* numbers of a film for 2 classes"),
    "no pooling": (lambda learn: learn.model[1].__delitem__(slice(0, 2)), "its network does not take its films"),
    "one class too many": (lambda learn: learn.dls.vocab.items.append("cow"), "for 3 classes"),
    "a name that clears the terminal": (lambda learn: learn.dls.vocab.items.__setitem__(0, "\x1b[2J"), "be printed"),
    "a film transform": (
        lambda learn: learn.dls.add_tfms([fastai_all().CropPad(48)], "after_item"),
        "go through fastai.vision.augment.CropPad",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_network_with_other_behaviour_is_refused(change: str, pictures: Path, tmp_path: Path) -> None:
    from cxr_fastai.rebuild import rebuild

    function, reason = CHANGES[change]
    path = changed(make_learner(pictures), tmp_path / "export.pkl", function)
    with pytest.raises(ModelFileError, match=reason) as caught:
        rebuild(read_export(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert ONE_LINE.fullmatch(str(caught.value))


@pytest.mark.parametrize(("arch", "named"), [("squeezenet1_0", "squeezenet.Fire"), ("xresnet18", "layers.ConvLayer")])
def test_unknown_architecture_is_named(arch: str, named: str, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=rf"its body is a .*{named}.*, which is none of densenet121"):
        read_export(save(make_learner(pictures, arch), tmp_path / "export.pkl"))


def test_film_that_fits_no_known_way_is_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="its films keep their own sizes"):
        read_export(save(make_learner(pictures, item=[], learner={}, batch=[]), tmp_path / "export.pkl"))
