"""The transfer bench: whole patients held out, nested films, paired intervals, cells that are not done twice."""

import json
import sys
from argparse import ArgumentTypeError, Namespace
from concurrent.futures import Future
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import transfer
import transfer_report
from transfer import Job, deal, few, repeated
from transfer_report import any_finding, area, gain


@pytest.fixture
def table() -> pd.DataFrame:
    """Return 120 films of 80 patients, half of them abnormal."""
    rows = [
        {"path": f"{i}.png", "label": ("normal", "abnormal")[i // 60], "patient_id": f"p{i * 2 // 3}", "split": ""}
        for i in range(120)
    ]
    return transfer.described(pd.DataFrame(rows).assign(view=["AP", "PA"] * 60, age="40"))


def test_a_test_holds_whole_patients_and_at_most_half_the_films(table: pd.DataFrame) -> None:
    for seed in range(3):
        pool, test = deal(table, seed, 300)
        assert not set(pool["patient_id"]) & set(test["patient_id"])
        assert len(pool) + len(test) == 120
        assert 55 <= len(test) <= 65
    assert not deal(table, 0, 300)[1]["path"].equals(deal(table, 1, 300)[1]["path"])


def test_few_films_are_balanced_nested_and_split_by_patient(table: pd.DataFrame) -> None:
    small, large = few(table, 20, 3), few(table, 50, 3)
    assert small is not None
    assert large is not None
    assert set(small["path"]) < set(large["path"])
    for chosen, n in ((small, 20), (large, 50)):
        assert chosen["label"].value_counts().to_dict() == {"abnormal": n // 2, "normal": n // 2}
        sides = chosen.groupby("patient_id")["split"].nunique()
        assert (sides == 1).all()
        assert 0.1 * n <= (chosen["split"] == "valid").sum() <= 0.3 * n
    assert few(table, 200, 3) is None


def test_an_epoch_repeats_training_films_only(table: pd.DataFrame) -> None:
    chosen = few(table, 20, 0)
    assert chosen is not None
    epoch = repeated(chosen, 64)
    counts = epoch.groupby("split")["path"].agg(["size", "nunique"])
    assert counts.loc["train", "size"] == 64
    assert counts.loc["train", "nunique"] == (chosen["split"] == "train").sum()
    assert counts.loc["valid", "size"] == counts.loc["valid", "nunique"]
    assert epoch.attrs == chosen.attrs


def test_noisy_or_is_that_of_probabilities_and_does_not_saturate() -> None:
    logits = np.array([[-2.0, 0.5, -1.0], [0.0, 0.0, 0.0]])
    p = 1 - np.prod(1 - 1 / (1 + np.exp(-logits)), axis=1)
    assert any_finding(logits) == pytest.approx(np.log(p / (1 - p)))
    sure = any_finding(np.array([[40.0, -1.0], [41.0, -1.0]]))
    assert sure[0] < sure[1] < np.inf


def test_a_gain_is_zero_for_equal_scores_and_surer_for_paired_ones() -> None:
    rng = np.random.default_rng(0)
    y, ids = np.tile([0.0, 1.0], 60), np.arange(120).astype(str)
    ours = [(y, y + rng.normal(0, 1, 120), ids) for _ in range(3)]
    none = gain(ours, ours, 200)
    assert none["value"] == none["low"] == none["high"] == 0
    slightly = [(y, score + rng.normal(0, 0.1, 120), ids) for _, score, _ in ours]
    paired, alone = gain(ours, slightly, 200), area(ours, 200)
    assert paired["low"] < paired["value"] < paired["high"]
    assert paired["high"] - paired["low"] < alone["high"] - alone["low"]
    assert (alone["n"], alone["seeds"]) == (120, 3)


def test_an_area_of_seeds_is_their_mean() -> None:
    y, ids = np.array([0.0, 0.0, 1.0, 1.0]), np.array(["a", "b", "c", "d"])
    right, half = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 3.0, 1.0, 4.0])
    found = area([(y, right, ids), (y, half, ids)], 100)
    assert found["value"] == pytest.approx((1.0 + 0.75) / 2)
    assert found["low"] <= found["value"] <= found["high"]


def test_an_interval_holds_how_much_seeds_differ() -> None:
    y, ids = np.tile([0.0, 1.0], 60), np.arange(120).astype(str)

    def differing_by(low: float, high: float) -> dict[str, float]:
        each = np.array([low, high, low, high])
        return transfer_report.reach(each, np.random.default_rng(0).normal(0.8, 0.01, 2000), 60)

    # Without it: Student's t of 59 degrees, and the bootstrap's standard error.
    assert differing_by(0.8, 0.8) == pytest.approx(2.001 * 0.01 * np.sqrt(60 / 59), rel=0.05)
    # All but alone: of 3 degrees, and the standard error of the mean of four seeds.
    assert differing_by(0.6, 1.0) == pytest.approx(3.182 * 0.4 / np.sqrt(12), rel=0.01)
    right = [(y, y, ids)] * 3
    assert area(right, 200)["high"] == 1
    assert area(right, 200)["low"] == pytest.approx(0.025 ** (1 / 60))
    assert np.isnan(area([(y[:2], y[:2], ids[:2])], 50)["low"])


def test_one_failed_job_ends_the_bench_and_leaves_what_was_done(tmp_path: Path, monkeypatch) -> None:
    class Pool:
        """Does jobs where it stands; what was asked of its end."""

        ended: ClassVar[list[dict]] = []

        def __init__(self, *_: object) -> None: ...

        def submit(self, _: object, job: Job) -> Future:
            future: Future = Future()
            if job.seed == 1:
                future.set_exception(ValueError("a film is damaged"))
            else:
                future.set_result([{**transfer.record_key(job, 20), "seconds": 1.0, "scores": [0.5]}])
            return future

        def shutdown(self, **how: bool) -> None:
            self.ended.append(how)

    monkeypatch.setattr(transfer, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(transfer, "as_completed", list)
    jobs = [Job("fit", "one", "random", seed, (20,), 3) for seed in range(3)]
    file, setting = tmp_path / "cells.jsonl", {"size": 64}
    settings = transfer.Settings(tmp_path, transfer.SHIPPED_WEIGHTS, 64, 10, "cpu", 1)
    with pytest.raises(ValueError, match="a film is damaged"):
        transfer.run_all(jobs, file, setting, settings, 1)
    assert Pool.ended == [{"cancel_futures": True}]
    assert transfer.left_of(jobs, transfer.finished(file, setting)) == jobs[1:]


def test_a_number_of_films_is_even() -> None:
    assert transfer.even("20") == 20
    with pytest.raises(ArgumentTypeError, match="25 is odd: give an even number"):
        transfer.even("25")


def test_a_probe_separates_what_a_line_separates() -> None:
    rng = np.random.default_rng(0)
    y = np.tile([0, 1], 20)
    x = rng.normal(0, 1, (40, 5)) + 4 * y[:, None]
    scores = transfer.probe(x, y, np.arange(40) // 2, np.array([[0.0] * 5, [4.0] * 5]), 0)
    assert scores[0] < 0 < scores[1]


def test_a_plan_leaves_out_what_the_films_do_not_suffice_for(table: pd.DataFrame) -> None:
    options = Namespace(seeds=1, shots=[20, 40, 400], test=60, epochs=4)
    jobs = transfer.plan({"one": table}, options, ["phantom", "random"])
    fits = [(job.start, job.shots, job.epochs) for job in jobs if job.kind == "fit"]
    assert {shots for _, shots, _ in fits} == {(20,), (40,)}
    assert ("random", (40,), 16) in fits
    trained = [(job.start, job.shots, job.epochs) for job in jobs if job.kind == "train"]
    assert trained == [(start, (n,), 4) for n in (20, 40) for start in ("phantom", "random")]
    assert [job.shots for job in jobs if job.kind == "probe"] == [(20, 40)] * 2


def test_cells_are_taken_over_only_where_the_setting_is_the_same(tmp_path: Path) -> None:
    file, setting = tmp_path / "cells.jsonl", {"size": 64, "weights": "a"}
    jobs = [Job("probe", "one", start, 0, (20, 50)) for start in ("phantom", "random")]
    lines = [
        json.dumps({**transfer.record_key(job, n), "scores": [], "setting": setting}) for job in jobs for n in job.shots
    ]
    file.write_text("\n".join(lines) + '\n{"kind": "fi', encoding="utf-8")
    assert transfer.left_of(jobs, transfer.finished(file, setting)) == []
    assert transfer.left_of(jobs, transfer.finished(file, {**setting, "weights": "b"})) == jobs[:1]
    assert transfer.left_of(jobs, transfer.finished(file, {**setting, "size": 224})) == jobs
    file.write_text("\n".join(lines[1:]), encoding="utf-8")
    assert transfer.left_of(jobs, transfer.finished(file, setting)) == jobs[:1]


def test_a_manifest_becomes_one_table_a_hospital(tmp_path: Path) -> None:
    (tmp_path / "manifest.csv").write_text(
        "path,label,patient_id,view\n"
        "here/a.png,NORMAL,1,\nhere/b.png,PNEUMONIA,2,\nthere/images/c.png,abnormal,3,AP\n"
        "there/native1024/c.png,abnormal,3,AP\ndicom/d.dcm,,4,\n",
        encoding="utf-8",
    )
    tables = transfer.hospitals(tmp_path)
    assert {name: table["label"].tolist() for name, table in tables.items()} == {
        "here": ["normal", "abnormal"],
        "there": ["abnormal"],
    }
    assert set(tables["here"]["age"]) == {""}  # a column that is not there


def test_the_page_tells_every_start_and_what_was_left_out(table: pd.DataFrame, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tests = {("one", seed): deal(table, seed, 60)[1] for seed in range(2)}
    records = [{"kind": "zero", "hospital": "one", "scores": rng.normal(size=(120, 8)).tolist(), "seed": 0}]
    for (hospital, seed), test in tests.items():
        for start in ("phantom", "random"):
            cells = (("fit", 4, 20), ("fit", 4, 50), ("fit", 12, 50), ("train", 4, 20), ("probe", 0, 20))
            for kind, epochs, shots in cells:
                if epochs == 12 and start == "phantom":
                    continue
                scores = rng.normal(size=len(test)).tolist()
                records.append({"kind": kind, "hospital": hospital, "start": start, "seed": seed, "shots": shots,
                                "epochs": epochs, "scores": scores})  # fmt: skip
    setting = {"size": 64, "weights": "abc", "epochs": 4, "films an epoch": 320, "boot": 50}
    found = transfer_report.write(tmp_path, records, {"one": table}, tests, setting, ["imagenet left out: no network"])
    text = (tmp_path / "transfer.md").read_text(encoding="utf-8")
    for part in ("phantom − random", "imagenet left out: no network", "view AP", "for longer", "4 epochs of 320 films",
                 "are paired.\n2 seeds."):  # fmt: skip
        assert part in text
    assert json.loads((tmp_path / "transfer.json").read_text(encoding="utf-8")) == found
    assert len(found["learned"]) == 5
    assert (tmp_path / "transfer.png").read_bytes()[:4] == b"\x89PNG"


def test_without_real_films_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["transfer.py", "--real", str(tmp_path)])
    assert transfer.main() == 0
    assert "skipped: no manifest.csv" in capsys.readouterr().out


def test_a_body_with_random_weights_gets_statistics_of_the_films(films: Path) -> None:
    opener = transfer.OpenFilm(32)
    paths = sorted(map(str, films.rglob("*.png")))
    body = transfer.body_of("random", 0, paths, opener, transfer.SHIPPED_WEIGHTS)
    settings = transfer.Settings(films, transfer.SHIPPED_WEIGHTS, 32, 10, "cpu", 1)
    pooled = transfer.features(body, paths[:4], opener, settings)
    assert pooled.shape == (4, 1024)
    assert np.isfinite(pooled).all()
    assert pooled.std(axis=0).max() > 0


@pytest.mark.parametrize("kind", ["fit", "train"])
def test_a_fit_scores_the_films_held_out(films: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    paths = sorted(films.rglob("*.png"))
    rows = [{"path": str(p), "label": p.parent.name, "patient_id": p.stem, "split": ""} for p in paths]
    own = transfer.described(pd.DataFrame(rows))
    monkeypatch.setattr(transfer, "EPOCH", 16)
    settings = transfer.Settings(films, transfer.SHIPPED_WEIGHTS, 32, 20, "cpu", 1)
    job = Job(kind, "one", "random", 0, (20,), 2)
    (record,) = transfer.run_job(job, own, transfer.OpenFilm(32), settings)
    assert len(record["scores"]) == len(deal(own, 0, 20)[1])
    assert len(set(record["scores"])) > 10
    assert transfer.left_of([job], {transfer.key_text(record): record}) == []
