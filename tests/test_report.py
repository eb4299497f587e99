"""The report and the model card: what stands in them, and when; nothing is fetched, nothing is run."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cxr_fastai.metrics import reliability
from cxr_fastai.predict import Prediction, Predictor
from cxr_fastai.report import alarms, choose_films, plots, read_run, shown_metrics, write_model_card, write_report
from cxr_fastai.runs import read_cells


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_rows(run: Path) -> tuple[Predictor, pd.DataFrame, list[Prediction]]:
    predictor = Predictor(run)
    table = read_cells(run / "split.csv")
    table = table[table["split"] == "test"].reset_index(drop=True)
    return predictor, table, list(predictor.predict(table["path"]))


test_rows.__test__ = False  # type: ignore[attr-defined]


def written(run: Path) -> str:
    write_report(run, *test_rows(run))
    return (run / "report.html").read_text(encoding="utf-8")


def test_nothing_is_fetched_and_no_script_runs(run: Path) -> None:
    page = written(run)
    urls = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(urls) > 10
    assert all(url.startswith(("data:image/png;base64,", "#")) for url in urls)
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert not re.search(r"url\(|@import|srcset", page)


def test_figures_are_those_of_metrics_json(run: Path) -> None:
    page, metrics = written(run), json.loads((run / "metrics.json").read_text())
    for name, value, interval, n in shown_metrics(metrics):
        assert f'<tr><td>{name}<td class="n">{value}<td class="n">{interval}<td class="n">{n}</tr>' in page
    assert f"{metrics['n']} films of {metrics['n_patients']} patients" in page


def test_alarms_sound_where_there_is_a_reason_and_only_there(run: Path) -> None:
    (run / "too_good.json").unlink(missing_ok=True)
    (run / "audit.json").write_text(json.dumps({"findings": []}))
    assert alarms(read_run(run)) == []
    leak = {"kind": "copy-across-splits", "severity": "error", "paths": [], "detail": "2 pairs <b>on both sides"}
    note = {"kind": "near-copy", "severity": "note", "paths": [], "detail": "a note"}
    (run / "audit.json").write_text(json.dumps({"findings": [note, leak]}))
    (run / "too_good.json").write_text(json.dumps({"auroc": 0.995, "detail": "the marker tells it", "shortcuts": {}}))
    record = json.loads((run / "config.json").read_text())
    record["config"]["allow_leaks"], record["synthetic"] = True, True
    (run / "config.json").write_text(json.dumps(record))
    assert [line.split()[0:3] for line in alarms(read_run(run))] == [
        ["The", "split", "leaks,"], ["Audit:", "2", "pairs"], ["A", "test", "AUROC"], ["The", "films", "are"],
    ]  # fmt: skip
    page = written(run)
    assert "2 pairs &lt;b&gt;on both sides" in page
    assert "the marker tells it" in page
    write_model_card(run)
    assert "every figure is about phantoms" in (run / "MODEL_CARD.md").read_text()


def test_names_are_escaped(run: Path) -> None:
    predictor, table, rows = test_rows(run)
    table.loc[0, "label"] = "<script>alert(1)</script>"
    write_report(run, predictor, table, rows)
    page = (run / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_films_shown_are_the_surest_errors_the_hardest_and_the_surest_hits() -> None:
    predictor = type("P", (), {"card": {"positive": "b"}})()
    p = [0.95, 0.9, 0.52, 0.05, 0.6]
    labels = ["a", "b", "b", "a", "a"]
    rows = [Prediction(f"{i}", "b" if q >= 0.5 else "a", q, {"a": 1 - q, "b": q}, 0.5) for i, q in enumerate(p)]
    found = choose_films(pd.DataFrame({"label": labels}), rows, predictor)
    assert {kind: [row.path for row, _ in pairs] for kind, pairs in found.items()} == {
        "Surest errors": ["0", "4"], "Hardest cases": ["3"], "Surest hits": ["1", "2"],
    }  # fmt: skip


def test_the_roc_curve_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score, roc_curve

    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 300).astype(float)
    p = np.round(y * 0.4 + rng.random(300), 2)
    curve = plots.roc_points(y, p, np.ones((1, 300)))[0]
    false, true, _ = roc_curve(y, p, drop_intermediate=False)
    np.testing.assert_allclose(curve[1:], np.interp(plots.GRID, false, true)[1:], atol=1e-12)
    assert np.trapezoid(curve, plots.GRID) == pytest.approx(roc_auc_score(y, p), abs=0.01)


def test_plots_have_labelled_axes() -> None:
    y, p, ids = np.arange(60) % 2 * 1.0, np.linspace(0, 1, 60), np.arange(60)
    history = pd.DataFrame({
        "fold": [1, 1, 2, 2], "epoch": [1, 2, 1, 2], "phase": ["frozen", "fine-tune"] * 2, "train_loss": 1.0,
        "valid_loss": 1.1, "train_accuracy": 0.5, "valid_accuracy": 0.4, "valid_auroc": 0.6,
    })  # fmt: skip
    for made in (
        plots.plot_roc([("b", y, p, ids)], (0.1, 0.9)),
        plots.plot_precision_recall([("b", y, p, ids), ("c", y, p, ids)]),
        plots.plot_reliability({"b": reliability(y, p)}),
        plots.plot_history(history),
    ):
        assert all(axes.get_xlabel() and axes.get_ylabel() and axes.get_legend() for axes in made.axes)


def test_the_model_card_has_the_sections_and_the_checklist(run: Path) -> None:
    write_model_card(run)
    card = (run / "MODEL_CARD.md").read_text()
    headings = re.findall(r"^## (.*)$", card, re.MULTILINE)
    assert headings[:9] == [
        "Model details", "Intended use", "Factors", "Metrics", "Evaluation data", "Training data",
        "Quantitative analyses", "Ethical considerations", "Caveats and recommendations",
    ]  # fmt: skip
    assert headings[9].startswith("CLAIM checklist")
    assert card.count("\n| ") > 25
