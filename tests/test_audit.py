"""The audit on small fakes: copies, leaks, patients, classes, doubtful films, and what people get to see."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import SHARED, write_films
from PIL import Image
from scipy.ndimage import gaussian_filter

from cxr_fastai.audit import Audit, probe, refuse_leaks, run_audit, scan, too_good
from cxr_fastai.audit.checks import Finding, check_copies, check_labels, check_patients
from cxr_fastai.audit.duplicates import Duplicate, find_duplicates
from cxr_fastai.audit.labels import LabelIssue
from cxr_fastai.audit.scan import SIDE, Scan
from cxr_fastai.errors import DataError
from cxr_fastai.images import resize
from cxr_fastai.table import load_table


def anatomy(n: int, seed: int = 0, side: int = 224) -> np.ndarray:
    """Return films (n, side, side), alike at a glance as those of one scanner, each with fine structure of its own."""
    rng = np.random.default_rng(seed)
    shared = gaussian_filter(rng.random((side, side)), side / 8)
    own = gaussian_filter(rng.random((n, side, side)), (0, side / 56, side / 56))
    films = (shared - shared.mean()) / shared.std() + (own - own.mean()) / own.std()
    return ((films - films.min()) / np.ptp(films)).astype(np.float32)


def thumbnails(films: list[np.ndarray]) -> np.ndarray:
    return np.stack([resize(np.ascontiguousarray(film, np.float32), SIDE) for film in films])


def scanned(films: list[np.ndarray], identities: list[str] | None = None) -> Scan:
    table = pd.DataFrame({"path": [f"{i}.png" for i in range(len(films))]})
    return Scan.of_thumbnails(table, thumbnails(films), identities or [str(i) for i in range(len(films))])


def rows(**columns: list) -> pd.DataFrame:
    n = len(next(iter(columns.values())))
    defaults = {"path": [f"{i}.png" for i in range(n)], "label": ["a", "b"] * (n // 2), "split": [""] * n}
    table = pd.DataFrame({**defaults, "patient_id": [f"p{i}" for i in range(n)], **columns})
    table.attrs = {"task": "binary", "classes": ["a", "b"], "patients_from": "a column", "notes": []}
    return table


def test_films_that_only_look_alike_are_no_copies() -> None:
    assert find_duplicates(scanned(list(anatomy(40)))) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda film: resize(film, 112),
        lambda film: film**1.6,
        lambda film: np.clip(0.8 * film + 0.15, 0, 1),
        lambda film: film[13:, :-13],
        lambda film: film[5:-12, 11:-4] ** 0.7,
    ],
    ids=["half the size", "gamma", "brightness", "crop", "crop and gamma"],
)
def test_an_altered_copy_is_found(change) -> None:
    films = list(anatomy(40))
    (copy,) = find_duplicates(scanned([*films, change(films[7])]))
    assert (copy.first, copy.second, copy.kind) == (7, 40, "near")
    assert 0.9 <= copy.similarity <= 1


def test_equal_files_are_exact_copies_of_the_first() -> None:
    films = list(anatomy(6))
    found = find_duplicates(scanned([*films, films[2], films[2]], ["a", "b", "c", "d", "e", "f", "c", "c"]))
    assert found == [Duplicate(2, 6, "exact", 1.0), Duplicate(2, 7, "exact", 1.0)]


def test_fewer_than_two_films_have_no_copies() -> None:
    assert find_duplicates(scanned(list(anatomy(1)))) == []


def test_copies_are_said_to_cross_split_patients_and_labels() -> None:
    table = rows(split=["train", "test", "train", "train"], patient_id=["p", "q", "r", "r"], label=["a", "a", "a", "b"])
    assert [f.kind for f in check_copies(table, [Duplicate(2, 3, "near", 0.95)])] == ["near-copy"]
    found = {f.kind: f for f in check_copies(table, [Duplicate(0, 1, "near", 0.95), Duplicate(2, 3, "exact", 1.0)])}
    assert {kind: f.severity for kind, f in found.items()} == {
        "copy-across-splits": "error", "copy-across-patients": "warning", "copy-with-another-label": "warning",
        "exact-copy": "note", "near-copy": "note",
    }  # fmt: skip
    assert found["copy-across-splits"].paths == ["0.png", "1.png"]
    assert found["copy-with-another-label"].paths == ["2.png", "3.png"]
    assert found["copy-across-splits"].detail == "1 pair of films on both sides of the split, such as 0.png and 1.png"


def test_a_leaking_split_is_refused_and_the_remedy_said() -> None:
    leak = Finding("copy-across-splits", "error", ["a", "b"], "1 pair of films on both sides of the split")
    with pytest.raises(DataError, match=r"^the split leaks: 1 pair of films .* Remove the copies .* --allow-leaks"):
        refuse_leaks(Audit(2, {}, [leak]))
    refuse_leaks(Audit(2, {}, [Finding("unreadable", "error", ["a"], "1 film cannot be read")]))


def test_patients_on_both_sides_unknown_patients_and_rare_classes() -> None:
    torn = check_patients(rows(split=["train", "test"] * 2, patient_id=["p", "p", "q", "r"]))
    assert [(f.kind, f.severity) for f in torn if f.severity == "error"] == [("patient-across-splits", "error")]
    assert torn[0].paths == ["0.png", "1.png"]
    alone = {f.kind: f.detail for f in check_patients(rows(path=[f"{i}.png" for i in range(50)]))}
    assert "every film counts as a patient of its own" in alone["patients-unknown"]
    few = [
        f.detail
        for f in check_patients(rows(label=["a"] * 40 + ["b"] * 3, path=[str(i) for i in range(43)], split=[""] * 43))
    ]
    assert "only 3 films of b; its figures will be vague" in few
    assert any(detail.startswith("a has 13 times the films of b") for detail in few)


def test_only_labels_that_look_like_another_are_doubted() -> None:
    issues = [
        LabelIssue("x.png", "a", "b", 0.05),
        LabelIssue("y.png", "a", "a", 0.1),
        LabelIssue("z.png", "b", "a", 0.4),
    ]
    (found,) = check_labels(issues)
    assert found.paths == ["x.png"]
    assert found.detail.endswith("x.png is labelled a and looks like b")
    assert check_labels(issues[1:]) == []


def test_scan_sees_film_border_histogram_and_file(tmp_path: Path) -> None:
    film = np.full((128, 96), 100, np.uint8)
    film[0], film[:, -1], film[30:90, 20:60] = 255, 0, np.arange(40, dtype=np.uint8) * 4
    Image.fromarray(film).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"not a picture")
    seen = scan(pd.DataFrame({"path": [str(tmp_path / "a.png"), str(tmp_path / "b.png")]}))
    assert list(seen.errors) == [str(tmp_path / "b.png")]
    top, bottom, _, right = seen.borders[0].reshape(4, SIDE)
    assert top[:60] == pytest.approx(1.0)
    assert right[2:] == pytest.approx(0.0)
    assert bottom[:60] == pytest.approx(100 / 255)
    assert seen.histograms[0].sum() == pytest.approx(1, abs=1e-6)
    assert seen.properties.loc[0, ["width", "height", "suffix", "format"]].tolist() == [96, 128, ".png", "PNG"]
    assert np.isnan(seen.thumbnails[1]).all()
    assert seen.sha256[1] == ""


def test_a_figure_that_is_too_good_is_looked_into(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(60):
        film = (anatomy(1, seed=i, side=64)[0] * 200).astype(np.uint8)
        label = ("normal", "abnormal")[i % 2]
        if i % 2:
            film[2:9, 2:9] = 255  # a marker on every abnormal film
        (tmp_path / label).mkdir(exist_ok=True)
        Image.fromarray(film).save(tmp_path / label / f"{i:08d}_{int(rng.integers(9)):03d}.png")
    table = load_table(tmp_path)
    assert too_good(table, 0.98) is None
    assert too_good(table, None) is None
    alarm = too_good(table, 0.995)
    assert alarm is not None
    assert alarm["auroc"] == 0.995
    assert alarm["shortcuts"]["edges"]["flagged"]
    assert "upper left" in alarm["detail"]


def test_the_page_opens_offline_and_escapes_names(tmp_path: Path) -> None:
    write_films(tmp_path / "films", ["<b>x", "normal"] * 12)
    found = run_audit(str(tmp_path / "films"), page=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;x" in page
    assert "<b>x" not in page
    assert all(url.startswith("data:") for url in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert json.loads(found.to_json())["n"] == 24
    assert set(json.loads(found.to_json())) == {"n", "counts", "findings", "shortcuts", "labels"}


def test_the_verb_ends_with_1_where_figures_would_be_wrong(films: Path, tmp_path: Path) -> None:
    def audit(folder: Path) -> tuple[int, dict]:
        command = [sys.executable, "-m", "cxr_fastai", "audit", str(folder), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, json.loads(done.stdout.splitlines()[-1])

    code, found = audit(films)
    assert code == 0
    assert found["counts"]["labels"] == {"abnormal": 30, "normal": 30}
    write_films(tmp_path, ["normal", "abnormal"] * 6)
    (tmp_path / "normal" / "bad.png").write_bytes(b"no film")
    code, found = audit(tmp_path)
    assert code == 1
    assert [f["kind"] for f in found["findings"] if f["severity"] == "error"] == ["unreadable"]


@pytest.mark.skipif(not (SHARED / "data" / "real-cxr").is_dir(), reason="needs the real films in ../shared")
def test_real_films_tell_what_their_notes_say() -> None:
    thumbnail = {p.name: p for p in probe(scan(load_table(SHARED / "data" / "real-cxr" / "kermany")))}["thumbnail"]
    assert thumbnail.auroc == pytest.approx(0.97, abs=0.03)
    assert thumbnail.flagged
