"""Two processes that train together, over gloo on the CPU, against one that trains alone."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("accelerate")

SCRIPT = """
import sys
from cxr_fastai.config import TrainConfig
from cxr_fastai.console import QUIET
from cxr_fastai.training import train

kinds = {
    # Norms keep their statistics: what weights that have learned do, on few real films only when asked to.
    # So parts of a batch are the batch.
    "pretrained": {
        "arch": "densenet121", "weights": "phantom", "epochs": 1, "freeze_epochs": 1, "first_layers": "train",
    },
    "random": {"arch": "resnet18", "weights": "none", "epochs": 2, "freeze_epochs": 0},
}
config = TrainConfig(
    data=sys.argv[1], out=sys.argv[2], name="x", size=32, batch_size=8, dropout=0, augment=0, lr=1e-4,
    precision="fp32", device="cpu", **kinds[sys.argv[3]],
)
run, metrics = train(config, QUIET)
"""


def launch(films: Path, out: Path, processes: int, kind: str) -> Path:
    """Train in so many processes, as torchrun starts them; return the run folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    several = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, str(films), str(out), kind],
            env={**os.environ, **(several | {"RANK": str(i), "LOCAL_RANK": str(i)} if processes > 1 else {})},
            stderr=subprocess.PIPE, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip
    for process in started:
        _, errors = process.communicate(timeout=250)
        assert process.returncode == 0, errors[-3000:]
    return out / "x"


def test_two_processes_end_with_the_figures_of_one(films: Path, tmp_path: Path) -> None:
    one = launch(films, tmp_path / "one", 1, "pretrained")
    two = launch(films, tmp_path / "two", 2, "pretrained")
    histories = [pd.read_csv(run / "history.csv").drop(columns="seconds") for run in (one, two)]
    assert len(histories[1]) == 2
    numbers = histories[0].select_dtypes("number").columns
    assert (histories[0][numbers] - histories[1][numbers]).abs().max().max() < 1e-3
    metrics = [json.loads((run / "metrics.json").read_text())["metrics"] for run in (one, two)]
    for name, values in metrics[0].items():
        assert metrics[1][name]["value"] == pytest.approx(values["value"], abs=1e-3), name
    rows = [pd.read_csv(run / "predictions.csv")["p_abnormal"] for run in (one, two)]
    assert (rows[0] - rows[1]).abs().max() < 1e-3


@pytest.mark.long
def test_with_batch_norms_two_processes_leave_one_finished_run(films: Path, tmp_path: Path) -> None:
    run = launch(films, tmp_path, 2, "random")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "x"]
    assert (run / "manifest.json").is_file()
    assert not list(tmp_path.rglob(".writing-*"))
    state = json.loads((run / "config.json").read_text())
    assert state["config"]["batch_size"] == 8
    assert pd.read_csv(run / "history.csv")["train_loss"].between(0, 10).all()
