"""The command line as a person or a script meets it: one line an error, the exit codes, JSON last."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_films
from PIL import Image

from cxr_fastai.cli import main


def run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["cxr", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


@pytest.fixture
def cxr(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    return lambda *args: run(capsys, monkeypatch, *map(str, args))


def csv_of(path: Path, head: str, *rows: str) -> Path:
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


def film(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (64, 64), 128).save(path)
    return path


@pytest.mark.parametrize("verb", ["generate", "train", "lr-find", "sweep", "evaluate", "predict", "inspect", "serve"])
def test_help_names_every_option_with_its_default(cxr, verb: str) -> None:
    code, out, _ = cxr(verb, "--help")
    assert code == 0
    assert "--json" in out
    assert verb in out


def test_version(cxr) -> None:
    code, out, _ = cxr("--version")
    assert (code, out) == (0, "0.1.0\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("train", "no/such/folder"), "no/such/folder does not exist; give a folder of class folders or a CSV file"),
        (("train", "--epochs", "0"), "--epochs is 0, but must be from 1 to 10000"),
        (("train", "--epochs", "three"), "Invalid value for '--epochs'"),
        (("train", "--lr", "fast"), "--lr is fast, but must be a number above 0, or auto"),
        (("train", "--config", "no.toml"), "--config no.toml: cannot be read (No such file or directory)"),
        (("train", "x", "--arch", "densenet12"), "--arch is densenet12: "),
        (("sweep", "--trials", "0"), "--trials is 0, but must be from 1 to 100000"),
        (("sweep", "--storage", "here"), "--storage is 'here', but must be a database URL, or journal:FILE"),
        (("predict", __file__, "--model", "no/model"), "no/model: no run there; train one first"),
        (("evaluate", "no/run"), "no/run: no run there"),
        (("generate", "--n", "0"), "--n is 0"),
        (("predikt",), "No such command 'predikt'"),
        (("predict",), "Missing argument"),
        (("predict", "x.png", "--resume"), "--resume goes on with a file: name the same --out as before"),
        (("predict", "x.png", "--coverage", "1.5"), "--coverage is 1.5, but must be a share above 0 and below 1"),
        (("predict", "x.png", "--precision", "int8"), "--precision is int8, but must be one of auto, fp32, bf16"),
        (("predict", "x.png", "--out", "rows.xlsx"), "--out is rows.xlsx, but must end in .csv, .jsonl, .parquet"),
        (("predict", "learner.pkl"), "learner.pkl is a model, but no film is named after it"),
        (("predict", "a.pkl", "b.pkl", __file__), "only model.onnx files and run folders can be averaged"),
        (("inspect", "no-such.onnx"), "no-such.onnx"),
        (("serve", "--model", "no/model"), "no/model: no run there; train one first"),
        (("serve", "--port", "99999"), "--port is 99999, but must be from 0 (any free one) to 65535"),
    ],
)
def test_what_cannot_start_says_so_in_one_line_and_ends_with_2(cxr, args: tuple[str, ...], message: str) -> None:
    code, out, err = cxr(*args)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_data_that_cannot_be_trained_on(cxr, tmp_path: Path) -> None:
    def refused(data: Path) -> str:
        code, _, err = cxr("train", data, "--out", tmp_path / "out", "--weights", "none", "--size", "32")
        assert code == 2
        assert err.count("\n") == 1
        return err

    write_films(tmp_path / "one", ["normal"] * 4)
    assert "normal" in refused(tmp_path / "one")
    write_films(tmp_path / "empty", ["normal"] * 4)
    (tmp_path / "empty" / "abnormal").mkdir()
    assert "abnormal" in refused(tmp_path / "empty")
    a = film(tmp_path / "a.png")
    assert "label" in refused(csv_of(tmp_path / "no.csv", "path,klass", f"{a},x"))
    twice = refused(csv_of(tmp_path / "two.csv", "path,label", f"{a},x", f"{a},y"))
    assert "a.png" in twice
    write_films(tmp_path / "bad", ["normal", "abnormal"] * 20)
    broken = tmp_path / "bad" / "normal" / "00000000_000.png"
    broken.write_bytes(broken.read_bytes()[:300])
    assert "00000000_000.png" in refused(tmp_path / "bad")
    assert not list((tmp_path / "out").iterdir())


def test_skip_bad_leaves_the_broken_film_out(cxr, tmp_path: Path) -> None:
    write_films(tmp_path / "films", ["normal", "abnormal"] * 30)
    (tmp_path / "films" / "normal" / "00000000_000.png").write_bytes(b"x")
    code, out, err = cxr(
        "train", tmp_path / "films", "--out", tmp_path / "out", "--name", "x", "--size", "32", "--weights", "none",
        "--arch", "resnet18", "--epochs", "1", "--skip-bad", "--json",
    )  # fmt: skip
    assert code == 0
    assert "left out" in err
    assert json.loads(out.splitlines()[-1])["run"] == str(tmp_path / "out" / "x")
    assert "00000000_000" not in (tmp_path / "out" / "x" / "split.csv").read_text()


def test_predict_prints_one_object_a_file_and_ends_with_1_where_one_failed(
    cxr, finished, films: Path, tmp_path: Path
) -> None:
    paths = sorted((films / "abnormal").iterdir())
    (tmp_path / "bad.png").write_bytes(b"x")
    code, out, _ = cxr("predict", *paths, "--model", finished, "--json")
    assert code == 0
    assert [json.loads(line)["path"] for line in out.splitlines()] == list(map(str, paths))
    code, out, _ = cxr("predict", tmp_path / "bad.png", *paths, "--model", finished, "--json")
    assert code == 1
    assert len(out.splitlines()) == 31
    assert json.loads(out.splitlines()[0])["error"]


def test_predict_writes_csv_and_evidence(cxr, finished, films: Path, tmp_path: Path) -> None:
    code, out, _ = cxr("predict", films, "--model", finished, "--csv", tmp_path / "p.csv", "--evidence", tmp_path / "e",
                       "--no-abstain")  # fmt: skip
    assert code == 0
    with (tmp_path / "p.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 60
    assert {row["label"] for row in rows} <= {"normal", "abnormal"}
    assert len(list((tmp_path / "e").iterdir())) == 60
    with Image.open(next((tmp_path / "e").iterdir())) as picture:
        assert picture.size == (64, 64)
    assert "\x1b" not in out  # no control characters without a terminal


def told(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_a_stopped_run_goes_on_and_ends_as_the_unbroken_one(cxr, finished, films: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"x")
    paths = [*sorted((films / "normal").iterdir()), tmp_path / "bad.png"]
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    asked = ("predict", *paths, "--model", finished, "--no-abstain")
    assert cxr(*asked, "--out", whole)[0] == 1
    # What a kill leaves: the journal with some rows, the last one cut.
    journal = tmp_path / "broken.jsonl.part"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cxr_fastai.output.Journal.finish", lambda self, card: None)
        cxr(*asked, "--out", broken)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:12]) + lines[12][:30])
    code, out, _ = cxr(*asked, "--out", broken, "--resume")
    assert code == 1
    assert "11 of 31 films were done before" in out
    assert told(broken) == told(whole)
    assert not journal.exists()


def test_many_rows_are_counted_instead_of_shown(cxr, finished, films: Path) -> None:
    code, out, _ = cxr("predict", films, "--model", finished, "--no-abstain")
    assert code == 0
    counts = [int(line.split("│")[2]) for line in out.splitlines() if line.startswith("│")]
    assert sum(counts) == 60
    assert "Each film: --json, or --out FILE" in out


def test_a_fastai_export_predicts_without_being_unpickled(cxr, finished, films: Path) -> None:
    film = next(films.rglob("*.png"))
    answers = [
        json.loads(cxr("predict", *given, "--json", "--no-abstain")[1].splitlines()[-1])
        for given in (
            (finished / "learner.pkl", film),
            (film, "--model", finished, "--precision", "fp32"),
            (film, "--model", finished / "learner.pkl", "--unsafe-unpickle"),
        )
    ]
    assert answers[1]["probability"] == pytest.approx(answers[0]["probability"], abs=1e-5)
    assert answers[2]["probability"] == pytest.approx(answers[0]["probability"], abs=1e-5)
    assert answers[0]["threshold"] == answers[1]["threshold"]


def test_inspect_tells_what_is_in_a_model(cxr, finished) -> None:
    code, out, _ = cxr("inspect", finished / "learner.pkl", "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 0
    assert found["classes"] == ["abnormal", "normal"]
    assert found["calls"]["others"] == []
    code, out, _ = cxr("inspect", finished / "model.onnx")
    assert code == 0
    assert "classes: abnormal, normal" in out
    assert "  conformal: 6 numbers" in out


def test_evaluate_repeats_the_runs_own_figures(cxr, finished) -> None:
    code, out, _ = cxr("evaluate", finished, "--json")
    assert code == 0
    again = json.loads(out.splitlines()[-1])
    first = json.loads((finished / "metrics.json").read_text())
    assert again["metrics"] == first["metrics"]
    assert again["confusion"] == first["confusion"]


def test_evaluate_on_other_films(cxr, finished, tmp_path: Path) -> None:
    write_films(tmp_path / "other", ["normal", "abnormal"] * 10, seed=5)
    code, out, _ = cxr("evaluate", finished, tmp_path / "other", "--out", tmp_path / "result", "--json")
    assert code == 0
    found = json.loads(out.splitlines()[-1])
    assert found["n"] == 20
    assert {p.name for p in (tmp_path / "result").iterdir()} == {"predictions.csv", "metrics.json"}
    write_films(tmp_path / "strange", ["normal", "lupus"] * 5)
    code, _, err = cxr("evaluate", finished, tmp_path / "strange")
    assert code == 2
    assert "label 'lupus' is none of the model's classes (abnormal, normal)" in err


def test_a_reader_that_goes_away_is_no_error(finished, films: Path) -> None:
    command = f"{sys.executable} cli.py predict {films} --model {finished} --json | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.count("\n") == 1
    assert done.stderr == "" or "Traceback" not in done.stderr


def test_debug_shows_the_traceback(finished) -> None:
    done = subprocess.run(
        [sys.executable, "cli.py", "--debug", "evaluate", "nothing"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "Traceback" in done.stderr
