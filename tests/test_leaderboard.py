"""Finished runs side by side: which can be compared, what their difference means, what is said of the others."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_fastai.cli import main
from cxr_fastai.console import Console
from cxr_fastai.errors import DataError, ModelFileError, UsageError
from cxr_fastai.evaluate import measure
from cxr_fastai.leaderboard import compare_runs, diff_runs, open_run, open_runs, plot_runs, rank
from cxr_fastai.leaderboard_text import meaning, show_diff, show_ranking
from cxr_fastai.metrics import compare
from cxr_fastai.runs import finish, write_text

CLASSES = ["abnormal", "normal"]
N = 60


def make_run(
    root: Path, name: str, skill: float = 1.0, *, seed: int = 0, films: str = "films", hashed: bool = False, **config
) -> Path:
    """Write a finished run of `N` test films, two a patient; the higher the skill, the better it tells them apart."""
    run = root / name
    run.mkdir(parents=True)
    y = np.arange(N) % 2
    p = 1 / (1 + np.exp(-np.random.default_rng(seed).normal(skill * (2 * y - 1), 1.0)))
    patients = [f"{'h' if hashed else 'p'}{i // 2}" for i in range(N)]
    labels = ["abnormal" if positive else "normal" for positive in y]
    paths = [f"{films}/{i}.png" for i in range(N)]
    table = pd.DataFrame({"path": paths, "patient_id": patients, "label": labels})
    said = pd.DataFrame({"predicted": labels, "probability": p, "p_abnormal": p, "p_normal": 1 - p})
    rows = pd.concat([table, said], axis=1).assign(flags="", error="").astype(str)
    card = {"classes": CLASSES, "task": "binary", "positive": "abnormal", "threshold": 0.5, "temperature": 1.0}
    settings = {"data": films, "arch": "resnet18", "weights": "none", "size": 32, "folds": 0, "lr": 0.001, **config}
    record = {"config": {"name": name, **settings}, "task": "binary", "device": "cpu", "versions": {"torch": "2.11"}}
    history = pd.DataFrame(
        {"epoch": [1, 2], "valid_loss": [0.7, 0.6], "valid_auroc": [0.6, 0.5 + skill / 10], "seconds": [1.5, 2.0]}
    )
    write_text(run / "config.json", json.dumps(record))
    write_text(run / "metrics.json", json.dumps({"run": name, "split": "test", **measure(rows, card)}))
    rows.to_csv(run / "predictions.csv", index=False)
    history.to_csv(run / "history.csv", index=False)
    table.assign(split="test").to_csv(run / "split.csv", index=False)
    finish(run)
    return run


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Return a folder of a good run, one all but as good, and a bad one."""
    make_run(tmp_path, "good", 1.2)
    make_run(tmp_path, "alike", 1.1, seed=1, lr=0.01)
    make_run(tmp_path, "bad", 0.1, seed=2)
    return tmp_path


# Ranks ---------------------------------------------------------------------------------------------------------------


def test_the_best_stands_first_and_differences_are_those_of_the_paired_bootstrap(three: Path) -> None:
    found = rank(*open_runs(three))
    (group,) = found["groups"]
    assert [entry["run"] for entry in group["runs"]] == ["good", "alike", "bad"]
    assert (group["test"]["n"], group["test"]["n_patients"]) == (60, 30)
    best, alike, bad = group["runs"]
    assert best["difference"] is None
    a, b = open_run(three / "bad"), open_run(three / "good")
    expected = compare(a.truth, a.p, b.p, a.patients, CLASSES, task="binary", positive="abnormal",
                       threshold_a=0.5, threshold_b=0.5)["metrics"]["auroc"]  # fmt: skip
    assert bad["difference"] == {"value": expected["difference"], **{k: expected[k] for k in ("low", "high", "p")}}
    values = [entry["metrics"]["auroc"]["value"] for entry in (bad, best)]
    assert bad["difference"]["value"] == pytest.approx(values[0] - values[1], abs=1e-12)
    assert [meaning(entry["difference"]) for entry in (alike, bad)] == ["may be chance", "beyond chance"]
    assert (best["seconds"], best["facts"]["epochs"], best["config"]["lr"]) == (3.5, "2", 0.001)


def test_what_is_better_when_lower_is_sorted_the_other_way(three: Path) -> None:
    entries = rank(*open_runs(three), "brier")["groups"][0]["runs"]
    values = [entry["metrics"]["brier"]["value"] for entry in entries]
    assert values == sorted(values)
    assert entries[2]["difference"]["value"] == pytest.approx(values[2] - values[0], abs=1e-12)
    with pytest.raises(UsageError, match="--sort is speed, but must be one of auroc, accuracy, sensitivity"):
        rank([], [], "speed")


def test_the_same_run_twice_has_no_difference(tmp_path: Path, capsys) -> None:
    for name in ("a", "b"):
        make_run(tmp_path, name)
    entry = rank(*open_runs(tmp_path))["groups"][0]["runs"][1]
    assert (entry["run"], entry["difference"]) == ("b", {"value": 0, "low": 0, "high": 0, "p": 1})
    assert meaning(entry["difference"]) == "equal here"
    show_ranking(rank(*open_runs(tmp_path)), tmp_path, Console())
    out = capsys.readouterr().out
    assert "; difference none; finished" in out
    assert "a is best by AUROC. On these films b reached the same: too easy, or too few, to tell them apart." in out


def test_only_the_same_films_are_compared(three: Path) -> None:
    make_run(three, "elsewhere", 3.0, films="other")
    make_run(three, "hashed", 1.0, seed=4, hashed=True)  # other names for the same patients
    groups = rank(*open_runs(three))["groups"]
    assert [[entry["run"] for entry in group["runs"]] for group in groups] == [
        ["good", "alike", "hashed", "bad"], ["elsewhere"],
    ]  # fmt: skip
    assert groups[0]["test"]["fingerprint"] != groups[1]["test"]["fingerprint"]


@pytest.mark.parametrize("change", ["label", "patient", "row order"])
def test_the_same_paths_with_another_truth_are_another_test(tmp_path: Path, change: str) -> None:
    make_run(tmp_path, "a")
    run = make_run(tmp_path, "b")
    frame = pd.read_csv(run / "predictions.csv", dtype=str, keep_default_na=False)
    if change == "label":
        frame.loc[0, "label"] = "abnormal"
    elif change == "patient":
        frame.loc[0, "patient_id"] = "p9"
    else:
        frame = frame[::-1]
    frame.to_csv(run / "predictions.csv", index=False)
    finish(run)
    assert len(rank(*open_runs(tmp_path))["groups"]) == (1 if change == "row order" else 2)


def test_too_few_films_have_no_difference(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run = make_run(tmp_path, name)
        frame = pd.read_csv(run / "predictions.csv", dtype=str, keep_default_na=False)
        frame.iloc[:3].to_csv(run / "predictions.csv", index=False)  # one abnormal film
        finish(run)
    a, b = (open_run(tmp_path / name) for name in ("a", "b"))
    assert compare_runs(a, b) is None
    found = rank([a, b], [])
    assert found["groups"][0]["runs"][1]["difference"] is None
    assert diff_runs(a, b)["note"] == "too few test films of a class"


# What cannot be listed -----------------------------------------------------------------------------------------------


def test_unfinished_and_damaged_runs_say_why(three: Path) -> None:
    (three / "good" / "manifest.json").unlink()
    with (three / "bad" / "predictions.csv").open("a") as stream:
        stream.write("x")
    (three / "alike" / "metrics.json").unlink()
    (three / "started").mkdir()
    (three / "started" / "audit.json").write_text("{}")
    for name in ("notes", "films"):
        (three / name).mkdir()  # no run at all
    runs, left = open_runs(three)
    assert runs == []
    assert [(entry["run"], entry["reason"], entry["damaged"]) for entry in left] == [
        ("alike", "damaged: metrics.json is missing", True),
        ("bad", "damaged: predictions.csv is not what the manifest says "
                f"(python cli.py verify {three / 'bad'})", True),
        ("good", "not finished, 2 epochs done: still training, or stopped", False),
        ("started", "not finished, no epoch done: still training, or stopped", False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "{}"), ("config.json", "[]"), ("config.json", "["), ("metrics.json", '{"metrics": {}}'),
        ("predictions.csv", ""), ("predictions.csv", "path,label\na,b\n"), ("history.csv", "epoch\n"),
        ("split.csv", "\0"), ("manifest.json", "[]"), ("manifest.json", "[" * 100_000),
    ],
)  # fmt: skip
def test_no_damage_is_a_traceback(tmp_path: Path, file: str, text: str) -> None:
    run = make_run(tmp_path, "a")
    (run / file).write_text(text)
    if file != "manifest.json":
        finish(run)
    with pytest.raises(DataError, match=r"a: damaged"):
        open_run(run)
    assert [entry["damaged"] for entry in open_runs(tmp_path)[1]] == [True]


def test_what_is_no_folder_of_runs_is_refused(three: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing is not a folder; name the one that the runs lie in"):
        open_runs(three / "nothing")
    with pytest.raises(UsageError, match=r"good is a run itself; name the folder that it lies in"):
        open_runs(three / "good")
    with pytest.raises(ModelFileError, match="no run there"):
        open_run(three / "nothing")


# Two runs ------------------------------------------------------------------------------------------------------------


def test_diff_tells_what_differs_and_leaves_out_what_does_not(three: Path) -> None:
    found = diff_runs(open_run(three / "good"), open_run(three / "alike"))
    assert found["differs"] == {"config.lr": [0.001, 0.01]}
    assert found["comparison"]["metrics"]["auroc"]["a"] > found["comparison"]["metrics"]["auroc"]["b"]
    assert found["note"] == ""
    elsewhere = make_run(three, "elsewhere", 3.0, films="other")
    found = diff_runs(open_run(three / "good"), open_run(elsewhere))
    assert list(found["differs"]) == ["config.data", "test.fingerprint"]
    assert found["comparison"] is None
    assert found["note"] == (
        "their films have the same names, labels and patients, but lie elsewhere; train both on one folder"
    )
    split = (elsewhere / "split.csv").read_text()
    write_text(elsewhere / "split.csv", split.replace("test", "train", 1))
    finish(elsewhere)
    found = diff_runs(open_run(three / "good"), open_run(elsewhere))
    assert found["note"] == "the test films are others (60 and 60, 0 of them in both)"


# For people ----------------------------------------------------------------------------------------------------------


def shown(folder: Path, capsys: pytest.CaptureFixture[str], sort: str = "auroc") -> list[str]:
    show_ranking(rank(*open_runs(folder), sort), folder, Console())
    return capsys.readouterr().out.splitlines()


def test_people_see_the_best_and_whether_its_lead_means_anything(three: Path, capsys) -> None:
    (three / "bad" / "manifest.json").unlink()
    lines = shown(three, capsys)
    assert lines[0] == (
        "60 test films of 30 patients, data films, architecture resnet18, weights none, size 32 px, epochs 2"
    )
    assert lines[1].startswith(" 1. good; AUROC 0.")
    assert "; difference (best); finished 20" in lines[1]
    assert lines[2].startswith(" 2. alike; AUROC 0.")
    assert "epochs took 4 s" in lines[2]
    assert lines[3] == "good is best by AUROC. Its lead over alike may be chance (its interval contains 0)."
    assert lines[-2].startswith("A run that is chosen by its test figures looks better than it is")
    assert lines[-1] == "Not listed: bad (not finished, 2 epochs done: still training, or stopped)"


def test_runs_of_two_test_sets_are_two_tables(three: Path, capsys) -> None:
    make_run(three, "elsewhere", 3.0, films="other")
    lines = shown(three, capsys, "f1")
    assert lines[0].startswith("Test set 1: 60 test films")
    assert lines[1].startswith(" 1. good; F1 0.")
    assert "Its lead over bad is beyond chance (its interval is all on one side of 0)." in lines[4]
    assert lines[6].startswith("Test set 2: 60 test films of 30 patients, data other")
    assert lines[8] == "One run: nothing to compare it with."
    assert lines[10] == "Figures of different test sets are not comparable."


def test_an_empty_folder_says_what_to_do(tmp_path: Path, capsys) -> None:
    assert shown(tmp_path, capsys) == [f"No finished run in {tmp_path}; train one with: python cli.py train"]


def test_a_terminal_of_a_hundred_columns_shows_whole_figures(three: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    show_ranking(rank(*open_runs(three)), three, Console())
    lines = capsys.readouterr().out.splitlines()
    assert any("AUROC" in line and "finished" in line for line in lines)
    assert not any("…" in line for line in lines)


def test_diff_is_told_in_words(three: Path, capsys) -> None:
    show_diff(diff_runs(open_run(three / "good"), open_run(three / "bad")), Console())
    out = capsys.readouterr().out
    assert "What differs between good and bad\n 1. nothing\n" in out
    assert "The same 60 test films of 30 patients, good less bad\n 1. AUROC; good 0." in out
    assert "verdict beyond chance" in out
    assert "DeLong's test of the AUROC, which takes films for independent: p 0.000" in out
    make_run(three, "elsewhere", 3.0, films="other")
    show_diff(diff_runs(open_run(three / "good"), open_run(three / "elsewhere")), Console())
    out = capsys.readouterr().out
    assert " 1. data; good films; elsewhere other\n" in out
    assert "Their figures are not compared: their films have the same names" in out


# Pictures and the command --------------------------------------------------------------------------------------------


def test_histories_are_drawn_one_line_a_run(three: Path, tmp_path: Path) -> None:
    from cxr_fastai.report.plots import plot_histories

    runs = [*open_runs(three)[0]]
    drawn = plot_histories({run.name: run.history for run in runs}, "a note")
    auroc, loss = drawn.axes
    assert [line.get_label() for line in auroc.lines] == ["alike", "bad", "good"]
    assert auroc.lines[2].get_ydata().tolist() == pytest.approx([0.6, 0.62])
    assert [axes.get_xlabel() for axes in drawn.axes] == ["epoch", "epoch"]
    assert (auroc.get_ylabel(), loss.get_ylabel()) == ("validation AUROC", "validation loss (cross-entropy, nats)")
    assert len({line.get_color() for line in auroc.lines}) == 3
    folds = pd.concat([runs[0].history.assign(fold=k, valid_loss=[k, k + 2]) for k in (1, 2)])
    assert plot_histories({"x": folds}).axes[1].lines[0].get_ydata().tolist() == [1.5, 3.5]
    plot_runs(runs, tmp_path / "sub" / "h.png")
    with Image.open(tmp_path / "sub" / "h.png") as picture:
        assert picture.width > 600
    with pytest.raises(UsageError, match=r"--plot is h\.xls, but must be a file that ends in \.png"):
        plot_runs(runs, "h.xls")
    with pytest.raises(UsageError, match="--plot: there is no finished run to draw"):
        plot_runs([], "h.png")


def test_many_runs_differ_in_more_than_colour() -> None:
    from cxr_fastai.report.plots import plot_histories

    history = pd.DataFrame({"epoch": [1, 2], "valid_auroc": [0.5, 0.6], "valid_loss": [0.7, 0.6]})
    lines = plot_histories({f"run-{i}": history for i in range(28)}).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == 28


def cxr(monkeypatch, capsys, *args: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["cxr", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code or 0, *capsys.readouterr()


def test_the_command_prints_json_and_ends_with_1_where_a_run_is_damaged(three: Path, monkeypatch, capsys) -> None:
    code, out, _ = cxr(monkeypatch, capsys, "runs", three, "--plot", three / "h.png", "--json")
    found = json.loads(out)
    assert code == 0
    assert set(found["groups"][0]["runs"][0]) >= {"run", "metrics", "difference", "config"}
    assert found["unfinished"] == []
    assert (three / "h.png").is_file()
    (three / "bad" / "config.json").write_text("{")
    code, out, err = cxr(monkeypatch, capsys, "runs", three)
    assert (code, err) == (1, "")
    assert out.splitlines()[-1].startswith("Not listed: bad (damaged: config.json is not what the manifest says")
    code, out, _ = cxr(monkeypatch, capsys, "runs", three, "--diff", "good", three / "alike", "--json")
    assert code == 0
    assert json.loads(out)["differs"] == {"config.lr": [0.001, 0.01]}
    code, _, err = cxr(monkeypatch, capsys, "runs", three, "--diff", "good", "gone")
    assert code == 2
    assert err == "error: gone: no run there; train one first (python cli.py train), or name another\n"
