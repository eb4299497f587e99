"""Runs with one thing changed, and whether `verify` names it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
from test_grading import save_bright_model, write_film, write_mask

from cxr_fastai import __version__
from cxr_fastai.console import Console
from cxr_fastai.errors import ModelFileError
from cxr_fastai.evaluate import measure, predict_table, predictions_csv
from cxr_fastai.grading import write_evidence
from cxr_fastai.predict import Predictor
from cxr_fastai.runs import finish, read_cells, sha256, write_text
from cxr_fastai.split import fingerprint
from cxr_fastai.verify import differences, inside, show_verification, verify_run

CLASSES = ["abnormal", "normal"]


def write_films(folder: Path) -> pd.DataFrame:
    """Write 6 films of 6 patients, bright spots of several sizes; the table has the first two in train."""
    rows = []
    for i in range(6):
        spot = (slice(0, 20), slice(0, 20 + 12 * i))
        label = "abnormal" if i % 2 else "normal"
        path = folder / "images" / label / f"{i}_0.png"
        write_film(path, spot)
        if i % 2:
            write_mask(folder / "masks" / f"{i}_0__Mass.png", spot)
        rows.append((str(path), label, str(i), "test" if i > 1 else "train"))
    return pd.DataFrame(rows, columns=["path", "label", "patient_id", "split"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run folder with a model of one layer."""
    run = tmp_path_factory.mktemp("fake") / "run"
    table = write_films(run.parent / "data")
    run.mkdir()
    versions = {"cxr_fastai": __version__}
    card = {"temperature": 1.0, "arch": "bright", "folds": 0, "versions": versions}
    card["data"] = {"films": len(table), "fingerprint": fingerprint(table)}
    predictor = Predictor(save_bright_model(run / "model.onnx", {"abnormal": 2.0, "normal": -1.0}, **card))
    config = {"size": predictor.card["size"], "arch": "bright", "folds": 0, "prevalence": [0.1]}
    record = {"config": config, "task": "binary", "classes": CLASSES, "positive": "abnormal", "versions": versions}
    write_text(run / "config.json", json.dumps(record))
    write_text(run / "split.csv", table.to_csv(index=False))
    write_text(run / "learner.pkl", "never opened")
    test = table[table["split"] == "test"].reset_index(drop=True)
    write_text(run / "predictions.csv", predictions_csv(test, predict_table(predictor, test), CLASSES))
    for name, split, prevalence in (("metrics", "test", (0.1,)), ("cross_validation", "out of fold", ())):
        found = measure(read_cells(run / "predictions.csv"), predictor.card, prevalence)
        write_text(run / f"{name}.json", json.dumps({"run": "run", "split": split, **found}))
    shutil.copy(run / "predictions.csv", run / "out_of_fold.csv")
    assert write_evidence(run, predictor, test)
    finish(run)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """Return a copy of the run that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def forge(run: Path) -> None:
    """Make the manifest fit what lies there now."""
    (run / "manifest.json").unlink()
    finish(run)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def problems(run: Path, **options: int) -> list[str]:
    return [f"{problem['file']}: {problem['detail']}" for problem in verify_run(run, **options)["problems"]]


# Sound runs ----------------------------------------------------------------------------------------------------------


def test_a_trained_run_is_as_it_says(finished: Path) -> None:
    result = verify_run(finished, films=3)
    assert result["problems"] == []
    assert result["checked"]["notes"] == []
    assert result["checked"]["files"] == len(json.loads((finished / "manifest.json").read_text())["sha256"])
    assert result["checked"]["films"] == 3
    assert result["checked"]["numbers"] > 40


def test_a_sound_run_has_no_problem_and_may_be_renamed(run: Path) -> None:
    moved = run.rename(run.with_name("other"))
    result = verify_run(moved)
    assert result["run"] == str(moved)
    assert result["problems"] == []
    checked = result["checked"]
    assert (checked["files"], checked["films"], checked["films_gone"], checked["notes"]) == (10, 4, 0, [])
    assert checked["manifest_sha256"] == sha256(moved / "manifest.json")
    assert verify_run(moved, films=0)["checked"]["films"] == 0


def test_films_that_are_gone_are_said_and_no_problem(run: Path) -> None:
    frame = read_cells(run / "predictions.csv")
    film, away = Path(frame["path"][0]), run.parent / "away.png"
    shutil.move(film, away)
    try:
        result = verify_run(run)
    finally:
        shutil.move(away, film)
    assert result["problems"] == []
    assert (result["checked"]["films"], result["checked"]["films_gone"]) == (3, 1)


def test_what_is_no_finished_run_is_refused(run: Path) -> None:
    (run / "manifest.json").unlink()
    with pytest.raises(ModelFileError, match="did not finish"):
        verify_run(run)
    with pytest.raises(ModelFileError, match="no run there"):
        verify_run(run / "nothing")


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["learner.pkl", "config.json", "evidence.csv", "model.onnx"])
def test_one_byte_is_found(run: Path, name: str) -> None:
    content = bytearray((run / name).read_bytes())
    content[-1] ^= 1
    (run / name).write_bytes(content)
    assert f"{name}: changed: its SHA-256 is not that of the manifest" in problems(run)


def test_missing_and_extra_files_are_named(run: Path) -> None:
    (run / "learner.pkl").unlink()
    (run / "sub").mkdir()
    (run / "sub/note.txt").write_text("x")
    (run / "gone").symlink_to("/nowhere")
    assert problems(run) == [
        "learner.pkl: missing: the manifest names it",
        "gone: extra: the manifest does not name it",
        "sub/note.txt: extra: the manifest does not name it",
    ]
    (run / "gone").unlink()
    forge(run)
    assert problems(run) == ["learner.pkl: missing, and the manifest does not name it: every run has one"]


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "sub/../../x", "./model.onnx", "a\\..\\x", "a\0b", "", "link", "x" * 999],
)
def test_a_manifest_cannot_lead_out_of_the_folder(run: Path, name: str) -> None:
    (run / "link").symlink_to("/etc/passwd")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["sha256"][name] = "0" * 64
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert inside(run, name) is None
    first = problems(run, films=0)[0]
    assert first.startswith("manifest.json: names ")
    assert first.endswith("which is not in the run folder; it was not opened")


def test_a_name_is_shown_without_its_control_characters(run: Path) -> None:
    (run / "\x1b[31mred").write_text("x")
    assert problems(run) == ["\\x1b[31mred: extra: the manifest does not name it"]


@pytest.mark.parametrize("text", ["", "[]", '{"sha256": 3}', '{"sha256": ["ab", "c"]}', "[" * 100_000])
def test_a_damaged_manifest_is_a_problem(run: Path, text: str) -> None:
    (run / "manifest.json").write_text(text)
    found = problems(run)
    assert found[0].startswith("manifest.json: holds no list of hashes")
    assert "model.onnx: extra: the manifest does not name it" in found


def test_a_pipe_is_not_waited_for(run: Path) -> None:
    (run / "predictions.csv").unlink()
    os.mkfifo(run / "predictions.csv")
    found = problems(run)
    assert found == ["predictions.csv: missing: the manifest names it"]


# Numbers, with a manifest made to fit --------------------------------------------------------------------------------


def last_digit_changed(value: float) -> float:
    return float(np.nextafter(value, 0))


@pytest.mark.parametrize(
    ("name", "path", "change"),
    [
        ("metrics.json", "metrics.auroc.value", last_digit_changed),
        ("metrics.json", "metrics.brier.low", last_digit_changed),
        ("metrics.json", "metrics.f1.n", lambda n: n + 1),
        ("metrics.json", "confusion[0][1]", lambda n: n + 1),
        ("metrics.json", "threshold", lambda t: t + 0.1),
        ("metrics.json", "positive", lambda _: "normal"),
        ("metrics.json", "split", lambda _: "all"),
        ("cross_validation.json", "metrics.auroc.value", last_digit_changed),
        ("evidence.json", "findings.Mass.share.value", last_digit_changed),
        ("evidence.json", "sanity.rank_correlation", lambda r: r / 2),
    ],
)
def test_a_changed_number_is_named_by_its_path(run: Path, name: str, path: str, change: Callable) -> None:
    content = json.loads((run / name).read_text())
    *keys, last = [int(key) if key.isdigit() else key for key in path.replace("[", ".").replace("]", "").split(".")]
    place = content
    for key in keys:
        place = place[key]
    old, place[last] = place[last], change(place[last])
    (run / name).write_text(json.dumps(content))
    forge(run)
    found = problems(run)
    assert len(found) == 1
    assert found[0].startswith(f"{name}: {path} is {place[last]}, but {old} from ")
    assert ("the last digits" in found[0]) == (change is last_digit_changed)


def test_a_number_that_is_gone_or_added_is_named(run: Path) -> None:
    edit(run / "metrics.json", '"auroc"', '"better"')
    forge(run)
    found = problems(run)
    assert [line.partition(" is ")[0] for line in found] == [
        "metrics.json: metrics.auroc",
        "metrics.json: metrics.better",
    ]
    assert "metrics.auroc is absent, but a group of 4 from predictions.csv" in found[0]


def test_a_changed_probability_is_found_even_when_all_else_was_made_to_fit(run: Path) -> None:
    frame = read_cells(run / "predictions.csv")
    old = frame.loc[0, "p_abnormal"]
    digit = str((int(old[4]) + 5) % 10)
    edit(run / "predictions.csv", f",{old},", f",{old[:4]}{digit}{old[5:]},")  # `probability` comes first
    forge(run)
    found = problems(run, films=0)
    assert any("probability is" in line and "from the p_ columns" in line for line in found)
    edit(run / "predictions.csv", f",{old},", f",{old[:4]}{digit}{old[5:]},")
    predictor = Predictor(run / "model.onnx")
    again = {"run": "run", "split": "test", **measure(read_cells(run / "predictions.csv"), predictor.card, (0.1,))}
    (run / "metrics.json").write_text(json.dumps(again))
    forge(run)
    assert any("the probabilities add up to" in line for line in problems(run, films=0))
    gap = [line for line in problems(run) if line.endswith("the cell, the film or the model was changed")]
    assert len(gap) == 1
    assert f"p_abnormal of {frame.loc[0, 'path']} is {old[:4]}{digit}" in gap[0]


def test_a_changed_call_or_label_or_row_is_found(run: Path) -> None:
    frame = read_cells(run / "predictions.csv")
    text = (run / "predictions.csv").read_text()
    line = text.splitlines()[1]
    edit(run / "predictions.csv", f",{frame['label'][0]},{frame['predicted'][0]},", ",normal,nothing,")
    forge(run)
    assert f"row 1 ({frame['path'][0]}): predicted is 'nothing'" in " ".join(problems(run))
    (run / "predictions.csv").write_text(text.replace(line, line.replace(",2,normal,", ",2,abnormal,")))
    forge(run)
    assert any("row 1 is of" in found and "in split.csv" in found for found in problems(run))
    (run / "predictions.csv").write_text(text.replace(line + "\n", ""))
    forge(run)
    assert "predictions.csv: 3 rows, but 4 test films in split.csv" in problems(run)


def test_cells_that_are_no_numbers_are_a_problem(run: Path) -> None:
    frame = read_cells(run / "predictions.csv")
    edit(run / "predictions.csv", frame.loc[0, "p_normal"], "high")
    forge(run)
    found = problems(run)
    assert {line.partition(":")[0] for line in found} == {"predictions.csv", "metrics.json", "model.onnx"}
    assert all("ValueError: could not convert string to float: 'high'" in line for line in found)


# Split, card, model --------------------------------------------------------------------------------------------------


def test_a_changed_split_is_found(run: Path) -> None:
    edit(run / "split.csv", ",normal,0,train", ",normal,3,train")
    forge(run)
    found = problems(run)
    assert found[0] == "split.csv: its films, labels, patients or splits are not those that the model was made from"
    assert found[1].startswith("split.csv: 1 patient on both sides of the split: 3 (test+train)")


def test_a_card_that_does_not_fit_is_found(run: Path) -> None:
    record = json.loads((run / "config.json").read_text())
    record["positive"], record["config"]["size"] = "normal", 64
    (run / "config.json").write_text(json.dumps(record))
    forge(run)
    assert problems(run) == [
        "config.json: positive is normal, but abnormal in model.onnx",
        "config.json: size is 64, but 56 in model.onnx",
    ]


def test_another_version_is_a_note(run: Path) -> None:
    model = onnx.load(run / "model.onnx")
    edit(run / "config.json", f'"cxr_fastai": "{__version__}"', '"cxr_fastai": "0.0.1"')
    model.metadata_props[0].value = model.metadata_props[0].value.replace(__version__, "0.0.1")
    onnx.save(model, run / "model.onnx")
    forge(run)
    result = verify_run(run)
    assert result["problems"] == []
    assert result["checked"]["notes"] == [
        f"config.json: cxr_fastai 0.0.1 made the run; {__version__} may measure more or otherwise"
    ]


def test_a_changed_weight_changes_what_is_predicted(run: Path) -> None:
    model = onnx.load(run / "model.onnx")
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.full((2, 1, 1, 1), 0.5, np.float32), "w"))
    onnx.save(model, run / "model.onnx")
    forge(run)
    found = problems(run)
    assert len(found) == 4
    assert all("the cell, the film or the model was changed" in line for line in found)


@pytest.mark.parametrize("damage", ["cut", "no card", "card without task", "card is a list", "card is no JSON"])
def test_a_damaged_model_is_one_problem_and_the_rest_is_still_looked_at(run: Path, damage: str) -> None:
    path = run / "model.onnx"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    else:
        model = onnx.load(path)
        card = model.metadata_props[0]
        card.key = "cord" if damage == "no card" else "card"
        card.value = {
            "card without task": card.value.replace('"task"', '"tusk"'),
            "card is a list": "[]",
            "card is no JSON": "{",
        }.get(damage, card.value)
        onnx.save(model, path)
    edit(run / "split.csv", ",normal,0,train", ",normal,3,train")
    forge(run)
    result = verify_run(run)
    assert [problem["file"] for problem in result["problems"]] == ["model.onnx", "split.csv"]
    assert "cannot be checked" in result["problems"][0]["detail"]
    notes = [note.partition(":")[0] for note in result["checked"]["notes"]]
    assert notes == ["config.json", "split.csv", "predictions.csv", "metrics.json", "cross_validation.json"]


def test_a_film_that_changed_is_found(run: Path, tmp_path: Path) -> None:
    film = Path(read_cells(run / "predictions.csv")["path"][1])
    kept = film.read_bytes()
    try:
        write_film(film, (slice(60, 112), slice(60, 112)))
        changed = problems(run)
        film.write_bytes(b"x")
        unreadable = problems(run)
    finally:
        film.write_bytes(kept)
    assert len(changed) == 1
    assert f"of {film} is " in changed[0]
    assert unreadable == [f"predictions.csv: {film} can no longer be read: it is no picture format that we know"]


# For people ----------------------------------------------------------------------------------------------------------


def test_differences_are_paths_with_both_values() -> None:
    old = {"a": [1, {"b": float("nan")}], "c": True, "only": 1}
    new = {"a": [1, {"b": float("nan")}], "c": 1, "more": None}
    assert list(differences(old, new)) == [("c", True, 1), ("more", "absent", None), ("only", 1, "absent")]
    assert list(differences({"a": [1]}, {"a": [1, 2]})) == [("a", [1], [1, 2])]


def test_people_are_told_what_was_found_and_what_cannot_be(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_verification(verify_run(run), Console())
    told = capsys.readouterr().out
    assert "10 files are as the manifest says" in told
    assert "4 test films were predicted again\nNo problem found." in told
    assert sha256(run / "manifest.json") in told
    for i in range(12):
        (run / f"{i}.txt").write_text("x")
    edit(run / "metrics.json", '"auroc"', '"better"')
    show_verification(verify_run(run), Console())
    told = capsys.readouterr().out
    assert "PROBLEM 7.txt: extra: the manifest does not name it" in told
    assert "15 problems: do not rely on this run" in told


def test_many_problems_of_a_file_are_counted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = verify_run(run)
    result["problems"] = [{"file": "metrics.json", "detail": f"number {i}"} for i in range(14)]
    show_verification(result, Console())
    told = capsys.readouterr().out
    assert told.count("PROBLEM metrics.json: number") == 10
    assert "PROBLEM metrics.json: and 4 more of it; --json lists all" in told
