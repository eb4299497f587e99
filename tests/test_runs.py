import json
import signal
from pathlib import Path

import pandas as pd
import pytest
from fastcore.xtras import modify_exception

from cxr_fastai.errors import ModelFileError, UsageError
from cxr_fastai.runs import (
    atomic_path,
    find_model,
    find_run,
    finish,
    new_run,
    read_cells,
    safe_cell,
    sha256,
    write_text,
)


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "first")

    def cut_off() -> None:
        with atomic_path(file) as temporary:
            temporary.write_text("half")
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        cut_off()
    assert file.read_text() == "first"
    assert list(tmp_path.iterdir()) == [file]


def test_a_disk_that_is_full_is_named_whoever_writes(tmp_path: Path) -> None:
    """Torch's archives are written in C++, whose error is not an OSError."""
    resource = pytest.importorskip("resource")
    import torch

    def write(name: str) -> None:
        with atomic_path(tmp_path / name) as temporary:
            if name == "a.pth":
                torch.save(torch.zeros(100_000), temporary)
            else:
                temporary.write_bytes(bytes(400_000))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        for name in ("a.pth", "a.bin"):
            with pytest.raises(UsageError, match=rf"cannot write .*{name}: .* MB free there"):
                write(name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []


def test_our_message_stays_when_fastai_puts_words_before_it() -> None:
    error = UsageError("cannot write a.pth")
    assert str(modify_exception(error, "Exception occured in `Checkpoint`", replace=True)) == "cannot write a.pth"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write .*file/a\.txt: File exists .*or choose another --out"):
        write_text(tmp_path / "file" / "a.txt", "x")


def test_runs_are_numbered_and_never_written_over(tmp_path: Path) -> None:
    assert [new_run(str(tmp_path), None).name for _ in range(2)] == ["train-001", "train-002"]
    (tmp_path / "train-001").rmdir()
    assert new_run(str(tmp_path), None).name == "train-003"
    with pytest.raises(UsageError, match="train-002 is there already; choose another --name"):
        new_run(str(tmp_path), "train-002")


def test_finish_lists_every_file_sweeps_strays_and_points_latest(tmp_path: Path) -> None:
    run = new_run(str(tmp_path), "a")
    (run / "model.onnx").write_bytes(b"abc")
    (run / ".writing-1-x").write_text("stray")
    with pytest.raises(ModelFileError, match=r"did not finish \(it has no manifest.json\)"):
        find_run(run)
    finish(run)
    assert json.loads((run / "manifest.json").read_text()) == {"sha256": {"model.onnx": sha256(run / "model.onnx")}}
    assert sha256(run / "model.onnx") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert not (run / ".writing-1-x").exists()
    assert find_model(tmp_path / "latest") == run.resolve() / "model.onnx"
    second = new_run(str(tmp_path), "b")
    finish(second)
    assert find_run(tmp_path / "latest") == second.resolve()


def test_latest_as_a_text_file_is_followed(tmp_path: Path) -> None:
    run = new_run(str(tmp_path), "a")
    finish(run)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").write_text("a")
    assert find_run(tmp_path / "latest") == run.resolve()


def test_what_is_not_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no run there; train one first"):
        find_model(tmp_path / "nothing")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ModelFileError, match=r"a\.txt: not a model; give an \.onnx file"):
        find_model(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("cell", "written"), [("=1+1", "'=1+1"), ("-x.png", "'-x.png"), ("a=b", "a=b"), (-1.5, -1.5), (None, None)]
)
def test_no_cell_is_a_formula(cell: object, written: object) -> None:
    assert safe_cell(cell) == written


def test_cells_are_read_as_they_were_before_they_were_made_safe(tmp_path: Path) -> None:
    cells = ["=1+1", "-x.png", "+7", "@home", "'quoted", "plain", "", "NA", "3.10"]
    table = pd.DataFrame({"path": cells})
    table.map(safe_cell).to_csv(tmp_path / "split.csv", index=False)
    assert read_cells(tmp_path / "split.csv")["path"].tolist() == cells
