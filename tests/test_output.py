"""Rows on disk: whole or not at all, and a stopped run goes on where it stopped."""

import csv
import json
from pathlib import Path

import pytest

from cxr_fastai.errors import UsageError
from cxr_fastai.output import Journal, check_format
from cxr_fastai.predict import Prediction

CARD = {"classes": ["abnormal", "normal"], "task": "binary"}


def row(number: int, **more: object) -> Prediction:
    told = {"label": "abnormal", "probability": 0.75, "probabilities": {"abnormal": 0.75, "normal": 0.25}}
    return Prediction(f"film-{number}.png", threshold=0.5, **{**told, **more})


def write(path: Path, numbers: range, *, resume: bool = False, job: object = "job") -> Journal:
    with Journal(path, job, resume) as journal:
        for number in numbers:
            journal.write(row(number))
    return journal


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_file_appears_when_all_is_done_and_the_journal_goes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    journal = write(path, range(3))
    assert not path.exists()
    journal.finish(CARD)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if suffix == ".csv":
        found = list(csv.DictReader(path.read_text().splitlines()))
        assert [r["path"] for r in found] == ["film-0.png", "film-1.png", "film-2.png"]
        assert found[0]["p_normal"] == "0.25"
    elif suffix == ".jsonl":
        found = [json.loads(line) for line in path.read_text().splitlines()]
        assert found == [row(number).to_dict() for number in range(3)]
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table(path).to_pylist()
        assert [r["path"] for r in table] == ["film-0.png", "film-1.png", "film-2.png"]
        assert table[2]["p_abnormal"] == 0.75
        assert table[2]["threshold"] == 0.5
        assert table[2]["error"] is None


def test_a_stopped_run_goes_on_after_its_last_whole_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write(path, range(3))
    part = tmp_path / "rows.csv.part"
    part.write_bytes(part.read_bytes()[:-20])  # killed in the middle of the third row
    with Journal(path, "job", resume=True) as journal:
        assert journal.done == 2
        for number in (2, 3):
            journal.write(row(number))
    assert [r["path"] for r in journal.rows()] == [f"film-{number}.png" for number in range(4)]


def test_without_resume_a_run_begins_anew(tmp_path: Path) -> None:
    write(tmp_path / "rows.csv", range(3))
    journal = write(tmp_path / "rows.csv", range(1))
    assert journal.done == 0
    assert len(list(journal.rows())) == 1


def test_another_job_is_not_gone_on_with(tmp_path: Path) -> None:
    write(tmp_path / "rows.csv", range(3))
    with pytest.raises(UsageError, match=r"rows\.csv\.part is of another run"):
        write(tmp_path / "rows.csv", range(3), resume=True, job="other")


def test_a_run_killed_before_its_first_row_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "rows.csv.part").write_bytes(b'{"jo')
    with Journal(tmp_path / "rows.csv", "job", resume=True) as journal:
        assert journal.done == 0


def test_cells_are_no_formulas_and_odd_names_are_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rows.csv", "job", resume=False)
    with journal:
        journal.write(Prediction("=1+1.png", error="bad"))
        journal.write(Prediction("caf\udce9.png", label="", probability=0.1))
    journal.finish(CARD)
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert lines[1].startswith("'=1+1.png,")
    assert lines[2].startswith("caf\\udce9.png,")


def test_sets_and_several_thresholds_become_text(tmp_path: Path) -> None:
    card = {"classes": ["Edema", "Mass"], "task": "multilabel"}
    p = {"Edema": 0.7, "Mass": 0.1}
    said = Prediction(
        "a.png", "Edema", 0.7, p, {"Edema": 0.5, "Mass": 0.2}, set={"Edema": ["Edema"], "Mass": ["Mass", "no Mass"]}
    )
    for suffix in (".csv", ".parquet"):
        journal = Journal(tmp_path / f"rows{suffix}", "job", resume=False)
        with journal:
            journal.write(said)
        journal.finish(card)
    found = next(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    assert found["set"] == "Edema|Mass|no Mass"
    assert json.loads(found["threshold"]) == {"Edema": 0.5, "Mass": 0.2}
    parquet = pytest.importorskip("pyarrow.parquet")
    assert parquet.read_table(tmp_path / "rows.parquet").to_pylist()[0]["threshold"] == found["threshold"]


def test_endings_that_are_no_format(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--out is rows\.xlsx, but must end in \.csv, \.jsonl, \.parquet"):
        check_format(Path("rows.xlsx"))
