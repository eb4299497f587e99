"""Which rooms may be entered without the heavy libraries."""

import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "torchvision", "fastai", "sklearn", "matplotlib", "onnx", "pydicom", "scipy", "pandas")


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


LIGHT = ("cli", "config", "errors", "runs", "images", "predict", "console", "inert", "serving", "output")


@pytest.mark.parametrize("module", LIGHT)
def test_light_rooms_import_nothing_heavy(module: str) -> None:
    assert loaded_after(f"import cxr_fastai.{module}") == set()


NUMBERS = ("table", "metrics", "evaluate", "report", "audit", "grading", "verify", "leaderboard", "leaderboard_text")


@pytest.mark.parametrize("module", NUMBERS)
def test_number_rooms_import_no_torch(module: str) -> None:
    assert loaded_after(f"import cxr_fastai.{module}") & {"torch", "torchvision", "fastai"} == set()


def test_predicting_imports_no_torch(finished, films) -> None:
    film = next(films.rglob("*.png"))
    code = f"from cxr_fastai.predict import Predictor\nlist(Predictor({str(finished)!r}).predict([{str(film)!r}]))"
    assert loaded_after(code) & {"torch", "torchvision", "fastai", "sklearn", "onnx"} == set()


def test_help_answers_at_once() -> None:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "cli.py", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - began)
    # Measured at 0.2 s on an idle machine; the bound of the design is 0.4 s, doubled for a busy one.
    assert min(times) < 0.8
